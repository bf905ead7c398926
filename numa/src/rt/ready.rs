//! Waiting until a descriptor is readable or writable, through the ring.
//!
//! Called for descriptors that glommio has no type for: pidfds, bells, control sockets with
//! descriptors in flight. Refuses to read or write them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::Context;

use futures_lite::AsyncRead;
use rustix::event::epoll;

/// Waits until `fd` can be read, or has failed or been closed at its other end.
///
/// # Errors
/// When the process has no descriptor left.
pub async fn readable(fd: impl AsFd) -> io::Result<()> {
    wait(fd.as_fd(), epoll::EventFlags::IN).await
}

/// Waits until `fd` can be written, or has failed or been closed at its other end.
///
/// # Errors
/// When the process has no descriptor left.
pub async fn writable(fd: impl AsFd) -> io::Result<()> {
    wait(fd.as_fd(), epoll::EventFlags::OUT).await
}

/// Waits until a listening socket has a connection to accept.
///
/// # Errors
/// When the process has no descriptor left.
pub(super) async fn connecting(listener: &OwnedFd) -> io::Result<()> {
    // The receive after the poll fails with ENOTCONN and takes nothing.
    polled(listener.try_clone()?).await;
    Ok(())
}

async fn wait(fd: BorrowedFd<'_>, flags: epoll::EventFlags) -> io::Result<()> {
    // Not `fd` itself: it may be a socket, and the receive after the poll would take its bytes. An
    // epoll descriptor is readable when what it watches is ready, and no receive works on it.
    let epoll: OwnedFd = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, fd, epoll::EventData::new_u64(0), flags)?;
    polled(epoll).await;
    Ok(())
}

/// Waits until `fd`, which no receive may work on, is readable.
///
/// glommio polls sockets only, and only as the first half of a receive. So the first read of a
/// "stream" over `fd` waits for POLLIN and then fails: that it ends, in whatever way, means ready.
pub(crate) async fn polled(fd: OwnedFd) {
    let mut stream = crate::sys::glommio_unix_stream(fd);
    std::future::poll_fn(|cx: &mut Context<'_>| {
        let mut nothing = [0u8; 1];
        Pin::new(&mut stream).poll_read(cx, &mut nothing).map(drop)
    })
    .await;
}
