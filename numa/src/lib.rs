//! The machine: which cores and memory nodes it has, who sits where, and the executor on each seat.
//!
//! Called by `shards` and `storage`, and by the binary to print the plan. The only crate that
//! imports glommio, hwloc or `core_affinity`, or starts shard threads. Refuses to know what runs on
//! its executors.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod arena;
mod bell;
mod blocking;
pub mod cpus;
pub mod facts;
pub mod idle;
pub mod io;
pub mod latency;
pub mod mailbox;
pub mod memfd;
pub mod numa_maps;
pub mod placement;
pub mod plan;
pub mod preflight;
pub mod process;
pub mod rt;
pub mod seat;
mod stop;
mod sys;
pub mod topology;
pub mod userfault;
pub mod watchdog;

pub use cpus::CpuList;
pub use placement::Placement;
pub use plan::{
    MemoryPolicy, Plan, PlanConfig, PlanError, Reserved, ShardSeat, Shards, Smt, VcpuPin, plan,
};
pub use stop::StopSignal;
pub use topology::Topology;
