//! What the engine's operations cost.
//!
//! Called by `mica-bench`. `place` is where it works, `operations` and `density` are what it measures at the
//! shard, `http` at a client; `scale` is what the daemon itself takes, with `standin` in the place of
//! VMs and its `figures`; `registry` is what choosing a host costs, and `registry_report` what was found; `floor` is the physical limit that the figures are printed beside,
//! `machine` what they are figures of, and `report` prints them. Refuses to judge.

pub mod client;
pub mod density;
pub mod dirt;
pub mod figures;
pub mod floor;
pub mod handover;
pub mod http;
pub mod machine;
pub mod memory;
pub mod operations;
pub mod place;
pub mod registry;
pub mod registry_report;
pub mod report;
pub mod scale;
pub mod series;
pub mod standin;
