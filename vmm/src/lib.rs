//! The VM process `mica-vm`: KVM, guest memory, vCPUs, virtio devices, and the jail around them.
//!
//! Used by the binary of this crate only. One process is one VM. Refuses to know HTTP, any disk
//! format, any path: all it ever gets are descriptors beside frames (`mica_wire::vm`).
//!
//! ```text
//!  main ──▶ jail ──▶ control ──▶ build ──▶ boot, kvm, virtio
//!                       │                     │
//!                       ◀── notices ── vcpus ─┴─ bus ── console
//! ```

#![deny(unsafe_code)]

pub mod boot;
mod build;
mod bus;
mod console;
pub mod control;
pub mod floor;
pub mod jail;
mod kvm;
mod layout;
mod memory;
mod notices;
pub mod panics;
mod ring;
mod state;
mod vcpus;
pub mod virtio;
