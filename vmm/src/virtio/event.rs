//! An event descriptor: a counter in the kernel that epoll, KVM and io_uring understand.
//!
//! Called by the devices and by whoever wakes them. Refuses to block: it is made non-blocking.
//!
//! vmm-sys-util has such a type too, but it lends its descriptor only as a number, which safe code
//! cannot give to epoll. KVM's side makes one of those from a duplicate of this one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, read, retry_on_intr, write};

/// An eventfd, close-on-exec and non-blocking.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// A new event, not signalled.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// A second descriptor of the same event.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Signals it. Signalling twice before it is cleared is the same as once.
    ///
    /// # Errors
    /// Only for a descriptor that is not an event.
    pub fn signal(&self) -> io::Result<()> {
        match retry_on_intr(|| write(&self.0, &1u64.to_ne_bytes())) {
            // The counter is full, so it is signalled.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Takes the signal back; whether there was one.
    ///
    /// # Errors
    /// Only for a descriptor that is not an event.
    pub fn clear(&self) -> io::Result<bool> {
        match retry_on_intr(|| read(&self.0, &mut [0u8; 8])) {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Event> for OwnedFd {
    fn from(event: Event) -> Self {
        event.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_signals_are_one() {
        let event = Event::new().unwrap();
        let twin = event.try_clone().unwrap();
        assert!(!event.clear().unwrap());
        twin.signal().unwrap();
        twin.signal().unwrap();
        assert!(event.clear().unwrap());
        assert!(!twin.clear().unwrap());
    }
}
