//! How sockets get from the control thread to the device.
//!
//! Called by the control thread (to hand one over) and the device (to take them). Refuses more than
//! [`QUEUED_MAX`] waiting for the device's thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use crate::virtio::Event;

/// Sockets handed over and not yet taken by the device thread.
const QUEUED_MAX: usize = 128;

/// Why a connection was not taken. The socket is closed then, so its other end sees the end.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Too many connections wait for the device thread.
    #[error("too many connections wait for the device thread; try again")]
    Busy,
    /// The device thread is gone.
    #[error("the device thread has ended")]
    Gone,
    /// The device could not be woken.
    #[error("cannot wake the device thread")]
    Wake(#[source] std::io::Error),
}

/// The control thread's end: hands sockets to the device. Can be cloned and shared.
#[derive(Clone, Debug)]
pub struct Connector {
    queue: SyncSender<(OwnedFd, u32)>,
    wake: Arc<Event>,
}

impl Connector {
    /// Connects `socket`, a connected stream socket, to `guest_port` of the guest. Returns at once;
    /// a guest that refuses, or a device that has no room, closes the socket. It may be blocking or
    /// not. System calls made here: `write`, `futex`.
    ///
    /// # Errors
    /// When the queue to the device thread is full or the device is gone.
    pub fn connect(&self, socket: OwnedFd, guest_port: u32) -> Result<(), ConnectError> {
        self.queue.try_send((socket, guest_port)).map_err(|error| match error {
            TrySendError::Full(_) => ConnectError::Busy,
            TrySendError::Disconnected(_) => ConnectError::Gone,
        })?;
        self.wake.signal().map_err(ConnectError::Wake)
    }
}

/// The device's end.
#[derive(Debug)]
pub(super) struct Requests {
    queue: Receiver<(OwnedFd, u32)>,
    wake: Arc<Event>,
}

impl Requests {
    /// Both ends.
    pub(super) fn new() -> std::io::Result<(Self, Connector)> {
        let wake = Arc::new(Event::new()?);
        let (sender, receiver) = sync_channel(QUEUED_MAX);
        Ok((Self { queue: receiver, wake: Arc::clone(&wake) }, Connector { queue: sender, wake }))
    }

    /// The next one. Clears the event first, so that none is missed.
    pub(super) fn take_all(&self, mut take: impl FnMut(OwnedFd, u32)) -> std::io::Result<()> {
        self.wake.clear()?;
        // Bounded by the queue, but that senders may refill it meanwhile: one queue full a turn.
        for (socket, port) in self.queue.try_iter().take(QUEUED_MAX) {
            take(socket, port);
        }
        // A sender signals after it queued, so what came in since has signalled again.
        Ok(())
    }
}

impl AsFd for Requests {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (*self.wake).as_fd()
    }
}
