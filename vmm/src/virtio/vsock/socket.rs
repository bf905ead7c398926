//! The host's side of one connection: a stream socket in the device's epoll.
//!
//! Called by the connection. Refuses to wait, to raise SIGPIPE, and to leave anything behind: its
//! other end learns of the end even where someone else still holds a duplicate of this one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

/// The socket. Closed, shut down and out of the epoll when dropped.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    epoll: Arc<OwnedFd>,
}

impl Socket {
    /// Adds `fd` to `epoll` under `token`, edge-triggered: each change is told once, and it is the
    /// reader's and writer's work to go on until the socket has no more.
    pub(super) fn new(fd: OwnedFd, epoll: &Arc<OwnedFd>, token: u32) -> Result<Self, Errno> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(epoll, &fd, EventData::new_u64(u64::from(token)), flags)?;
        Ok(Self { fd, epoll: Arc::clone(epoll) })
    }

    /// Reads what there is. `AGAIN` when there is nothing, 0 at the end.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let limit = buffer.len();
        rustix::io::retry_on_intr(|| recv(&self.fd, &mut *buffer, RecvFlags::DONTWAIT))
            .map(|(_, bytes)| bytes.min(limit))
    }

    /// Writes what there is room for; 0 when there is none.
    pub(super) fn send(&self, data: &[u8]) -> Result<usize, Errno> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::io::retry_on_intr(|| send(&self.fd, data, flags)) {
            Err(Errno::AGAIN) => Ok(0),
            other => other,
        }
    }

    /// Ends one direction, or both.
    pub(super) fn shut(&self, how: Shutdown) -> Result<(), Errno> {
        shutdown(&self.fd, how)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Neither can fail in a way that matters: at worst the other end is gone already, or the
        // epoll has dropped the socket by itself.
        shutdown(&self.fd, Shutdown::Both).ok();
        epoll::delete(&self.epoll, &self.fd).ok();
    }
}
