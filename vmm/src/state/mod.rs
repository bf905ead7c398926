//! The saved state of a VM, as bytes that outlive the process that wrote them.
//!
//! Called by `virtio`, `console` and `kvm` with their parts. Refuses to hold anything of the host it
//! was saved on.

mod devices;

pub use devices::{
    BalloonState, BlkState, DeviceState, PortPair, QueueState, TransportState, Unfit, VsockState,
};
