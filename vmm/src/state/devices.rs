//! What is saved of the devices: plain numbers, nothing of this host.
//!
//! Made and taken back by `virtio` and `console`, carried by [`super::VmState`]. Refuses nothing by
//! itself: who takes a part back checks it against the device it is for, and answers [`Unfit`].

use rkyv::{Archive, Deserialize, Serialize};

/// A part of a saved state that does not fit the VM it is to be put into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved state does not fit this VM: {0}")]
pub struct Unfit(pub &'static str);

/// One virtio device: its registers, its queues, and what is its own.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct TransportState {
    /// The device's number in the virtio specification.
    pub kind: u32,
    /// The status register.
    pub status: u32,
    /// The interrupt status register.
    pub interrupt: u32,
    /// Which half of the device's features is shown.
    pub device_features_sel: u32,
    /// Which half of the driver's features is written.
    pub driver_features_sel: u32,
    /// What the driver accepted.
    pub driver_features: u64,
    /// The selected queue.
    pub queue_sel: u32,
    /// All queues, in order.
    pub queues: Vec<QueueState>,
    /// What is the device's own.
    pub own: DeviceState,
}

/// One queue, as its driver described it and as far as it has come.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueState {
    /// The driver has made it ready.
    pub ready: bool,
    /// Entries.
    pub size: u16,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub driver: u64,
    /// Address of the used ring.
    pub device: u64,
    /// Number of the next chain to take, modulo 2^16.
    pub next_available: u16,
    /// Number of the next chain to return, modulo 2^16.
    pub next_used: u16,
}

/// What a device keeps beside registers and queues.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// The root disk.
    Blk(BlkState),
    /// Randomness: nothing.
    Rng,
    /// Streams.
    Vsock(VsockState),
    /// Reports of free pages: nothing.
    Balloon,
}

/// What the guest knows of its root disk.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlkState {
    /// Its length. The file that comes with the state must be as long.
    pub bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// What the guest knows of its streams.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct VsockState {
    /// Where the numbering of host-side ports goes on.
    pub generation: u32,
    /// The doorbell has been rung.
    pub rung: bool,
    /// Connections that the guest holds for open. None of them outlives the save: each is answered
    /// with a reset when the guest goes on.
    pub open: Vec<PortPair>,
}

/// One stream, by its ends.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortPair {
    /// The host's port.
    pub host: u32,
    /// The guest's port.
    pub guest: u32,
}
