//! The VM process `mica-vm`: KVM, guest memory, vCPUs, virtio devices.
//!
//! Called by the binary of this crate only. Refuses to know HTTP or any disk format.

#![deny(unsafe_code)]

mod ring;
pub mod virtio;
