//! Rules of virtio that a guest can break, as errors.
//!
//! Made by the queue and transport code when it reads something that no correct driver writes;
//! carried by `mica-vm` into the ending of that VM. Refuses to carry guest bytes: a rule and where
//! it was broken say enough, and nothing the guest chose reaches a log.

use super::DeviceKind;

/// What the guest did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rule {
    /// `QueueNum` is 0, above the maximum or no power of two (virtio 1.2, 2.7).
    #[error("its size is no power of two up to the offered maximum")]
    QueueSize,
    /// A ring address is not aligned (2.7), or is the reserved address 0.
    #[error("a ring address is not aligned, or is 0")]
    QueueAddress,
    /// A ring lies outside guest memory.
    #[error("a ring lies outside guest memory")]
    QueueOutsideMemory,
    /// The available index moved by more than the queue size (2.7.13).
    #[error("the available index runs ahead by more than the queue size")]
    AvailIndex,
    /// A chain starts outside the table, loops, is longer than the queue, or breaks the rules of
    /// indirect tables (2.7.5).
    #[error("a descriptor chain does not end, or points outside its table")]
    ChainBroken,
    /// A descriptor points outside guest memory.
    #[error("a descriptor points outside guest memory")]
    BufferOutsideMemory,
    /// A device-readable descriptor follows a device-writable one (2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    ChainOrder,
    /// A chain lacks the bytes that every request of its device has.
    #[error("a request is shorter than its fixed parts")]
    RequestTooShort,
}

/// A guest broke a rule that kills its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("virtio {device} queue {queue}: {rule}")]
pub struct GuestFault {
    /// Which device.
    pub device: DeviceKind,
    /// Which of its queues.
    pub queue: u16,
    /// What was broken.
    pub rule: Rule,
}

/// Why a device stopped working.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The guest is at fault.
    #[error("the guest broke a rule of virtio")]
    Guest(#[from] GuestFault),
    /// The host is at fault.
    #[error("virtio {device}: cannot {operation}")]
    Host {
        /// Which device.
        device: DeviceKind,
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}
