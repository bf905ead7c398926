//! The VM process `mica-vm`: KVM, guest memory, vCPUs, virtio devices, and the jail around them.
//!
//! Used by the binary of this crate only. One process is one VM. Refuses to know HTTP, any disk
//! format, any path: all it ever gets are descriptors beside frames (`mica_wire::vm`).
//!
//! ```text
//!  main ──▶ jail ──▶ control ──▶ build, restore, freeze ──▶ boot, memory, kvm, virtio
//!                       │                │                      │
//!                       ◀── notices ── vcpus ──────── bus ──────┴─ console
//! ```

#![deny(unsafe_code)]

pub mod boot;
#[cfg(feature = "breakout")]
pub mod breakout;
mod build;
mod bus;
mod console;
pub mod control;
mod descriptors;
mod discard;
mod exchange;
pub mod floor;
mod freeze;
pub mod generation;
pub mod jail;
mod kvm;
mod layout;
mod memory;
mod notices;
pub mod panics;
mod restore;
mod ring;
pub mod state;
mod vcpus;
pub mod virtio;
