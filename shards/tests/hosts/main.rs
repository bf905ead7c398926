//! Whole hosts: two shards, a store, cgroups, and VM processes played by the double.
//!
//! Run by `cargo test` as root. Each test has a host of its own. What is told apart here is what a
//! client would see, and what is left on the machine.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cold;
mod common;
mod create;
mod daemon;
mod faults;
mod history;
mod life;
mod on_demand;
mod pausing;
mod placement;
mod pool;
mod restart;
mod routing;
mod snapshots;
mod spill;
mod wait;
mod waking;
