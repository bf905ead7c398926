//! virtio-vsock (virtio 1.2, 5.10), streams only: connections from the host into the guest.
//!
//! Called through the transport, and through a [`Connector`] by the control thread. Refuses every
//! connection that the guest starts; one to the doorbell port is also reported, once.

use std::os::fd::{BorrowedFd, OwnedFd};

use super::{DeviceError, DeviceKind, GuestRam, Progress, Ready, VirtQueue, VirtioDevice};

/// Why a connection was not taken. The socket is closed then, so its other end sees the end.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Too many connections wait for the device thread.
    #[error("too many connections wait for the guest; try again")]
    Busy,
    /// The device thread is gone.
    #[error("the device thread has ended")]
    Gone,
}

/// The control thread's end: hands sockets to the device. Can be cloned and shared.
#[derive(Clone, Debug)]
pub struct Connector {}

impl Connector {
    /// Connects `socket`, a connected stream socket, to `guest_port` of the guest. Returns at once:
    /// a guest that refuses closes the socket. A system call made here: `write`.
    ///
    /// # Errors
    /// When the queue to the device thread is full or the device is gone.
    pub fn connect(&self, socket: OwnedFd, guest_port: u32) -> Result<(), ConnectError> {
        drop((socket, guest_port));
        Ok(())
    }
}

/// The device.
#[derive(Debug)]
pub struct Vsock {}

impl Vsock {
    /// A device whose guest has the address `guest_cid`. `doorbell` is called on the device thread
    /// when the guest first connects to `DOORBELL_PORT` of the host; it must not block.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(
        guest_cid: u32,
        doorbell: Box<dyn FnOnce() + Send>,
    ) -> std::io::Result<(Self, Connector)> {
        drop((guest_cid, doorbell));
        Ok((Self {}, Connector {}))
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256, 8]
    }
    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}
    fn activate(&mut self, _features: u64) {}
    fn reset(&mut self) {}
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn process(
        &mut self,
        _queues: &mut [VirtQueue],
        _memory: &GuestRam,
        _ready: Ready,
    ) -> Result<Progress, DeviceError> {
        Ok(Progress::Idle)
    }
}
