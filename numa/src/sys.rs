//! The few places where a descriptor changes its Rust owner without the compiler's help.
//!
//! Called by `rt::net` and `rt::ready`. Refuses anything else: all other system calls of this crate
//! go through rustix.

#![expect(unsafe_code, reason = "glommio takes sockets over by raw descriptor number only")]

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

/// Hands a stream socket (or any descriptor that is only polled) to glommio.
pub(crate) fn glommio_unix_stream(fd: OwnedFd) -> glommio::net::UnixStream {
    // SAFETY: `into_raw_fd` gives up ownership of an open descriptor, so the stream is its only
    // owner from here on and closes it exactly once. glommio makes no assumption about the kind
    // of socket beyond calling recv and send on it, which fail cleanly on any other descriptor.
    unsafe { glommio::net::UnixStream::from_raw_fd(fd.into_raw_fd()) }
}

/// Hands a connected TCP socket to glommio.
pub(crate) fn glommio_tcp_stream(fd: OwnedFd) -> glommio::net::TcpStream {
    // SAFETY: as above: ownership moves, the descriptor is open and closed once.
    unsafe { glommio::net::TcpStream::from_raw_fd(fd.into_raw_fd()) }
}
