//! Waiting until a descriptor is readable or writable, through the ring.
//!
//! Called for descriptors that glommio has no type for: pidfds, bells, control sockets with
//! descriptors in flight. Refuses to read or write them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};

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

async fn wait(fd: BorrowedFd<'_>, flags: epoll::EventFlags) -> io::Result<()> {
    // glommio polls sockets only, and only as the first half of a receive. An epoll descriptor is
    // readable when what it watches is ready, so the poll of a "stream" over it is the wait we
    // want; the receive that follows fails with ENOTSOCK, reads nothing, and means ready.
    let epoll: OwnedFd = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, fd, epoll::EventData::new_u64(0), flags)?;
    let mut stream = crate::sys::glommio_unix_stream(epoll);
    std::future::poll_fn(|cx: &mut Context<'_>| {
        let mut nothing = [0u8; 1];
        match Pin::new(&mut stream).poll_read(cx, &mut nothing) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(_) => Poll::Ready(()),
        }
    })
    .await;
    Ok(())
}
