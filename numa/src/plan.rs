//! Who sits where: a pure function from machine and wishes to seats.
//!
//! Called by the binary, for the daemon and for `mica topology`. Refuses to seat more shards than
//! there are cores, and to leave a node without a core for vCPUs unless it has but one.

use std::fmt;

use mica_units::ShardId;

use crate::Topology;

/// How many shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shards {
    /// A quarter of the cores of each node, at least one.
    Auto,
    /// So many on each node.
    PerNode(u16),
    /// So many altogether, spread over the nodes.
    Total(u16),
}

/// Cores left to the operating system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserved {
    /// So many of each node, from its lowest core on.
    PerNode(u16),
}

/// What the operator wishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanConfig {
    /// How many shards.
    pub shards: Shards,
    /// Cores that get no role.
    pub reserved: Reserved,
}

/// One shard's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardSeat {
    /// The shard.
    pub shard: ShardId,
    /// The hardware thread its executor is pinned to.
    pub core: u32,
    /// The memory node of that core.
    pub node: u32,
}

/// Cores of one node that run vCPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuCores {
    /// The node.
    pub node: u32,
    /// Every hardware thread of those cores.
    pub cpus: Vec<u32>,
    /// Whether shards sit on the same cores, because the node has no others.
    pub shared_with_shards: bool,
}

/// Who sits where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Seats, in shard order: seat `i` is shard `i`.
    pub seats: Vec<ShardSeat>,
    /// Where vCPUs run, in node order.
    pub vcpus: Vec<VcpuCores>,
    /// Cores without a role, in order.
    pub reserved: Vec<u32>,
}

/// Why there is no such plan
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Not even one shard.
    #[error("asked for no shard at all; ask for at least one")]
    NoShards,
}

/// Makes the plan.
///
/// # Errors
/// See [`PlanError`].
pub fn plan(_topology: &Topology, _config: &PlanConfig) -> Result<Plan, PlanError> {
    Err(PlanError::NoShards)
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for seat in &self.seats {
            writeln!(f, "shard {} on core {}, node {}", seat.shard.index(), seat.core, seat.node)?;
        }
        Ok(())
    }
}
