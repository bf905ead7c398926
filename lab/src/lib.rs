//! The lab: everything that tests and measures Mica without the machine it is meant for.
//!
//! Called by tests, by `mica-lab` and by the benchmarks; nothing in production depends on it. `host` is
//! the emulated dual-socket machine, `tiny_guest` the freestanding guest that runs on any KVM, `one_vm`
//! one VM process driven by hand, `engine` what its operations cost, `bench` what a client of a host waits for,
//! `served` a daemon as the child of a benchmark,
//! `fleet` many hosts that are only simulated. Refuses to be a dependency of anything else.

#![forbid(unsafe_code)]

pub mod bench;
pub mod engine;
pub mod fleet;
pub mod host;
pub mod one_vm;
pub mod served;
pub mod tiny_guest;
