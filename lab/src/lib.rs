//! The lab: everything that tests and measures Mica without the machine it is meant for.
//!
//! `host` is the emulated dual-socket machine behind `mica-lab`. Nothing in production depends on
//! this crate.

#![forbid(unsafe_code)]

pub mod host;
//! mica-lab.

pub mod one_vm;
pub mod tiny_guest;
