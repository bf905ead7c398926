//! Cores and memory nodes of a machine, as plain data.
//!
//! Called by the binary and by the planner. Refuses to guess: a machine whose cores cannot be read
//! is an error.

/// A machine, or the part of it that this process may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Memory nodes that have usable cores, ordered by index.
    pub nodes: Vec<Node>,
}

/// One memory node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The operating system's index.
    pub index: u32,
    /// Its memory, in bytes. 0 where the system does not tell.
    pub memory_bytes: u64,
    /// Its usable cores, ordered by index.
    pub cores: Vec<Core>,
}

/// One physical core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Core {
    /// The first usable hardware thread: what a seat is pinned to, and the core's name.
    pub cpu: u32,
    /// Every usable hardware thread of this core, `cpu` first.
    pub threads: Vec<u32>,
}

/// Why the topology cannot be read
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// hwloc gives nothing.
    #[error("hwloc cannot read this machine's topology; is /sys mounted?")]
    Hwloc,
    /// It found no core that this process may run on.
    #[error("this process may not run on any core; check its cpuset and affinity")]
    NoCores,
}

/// Reads the machine this process runs on, limited to the cores it may use.
///
/// # Errors
/// See [`TopologyError`].
pub fn read() -> Result<Topology, TopologyError> {
    let topology = hwloc2::Topology::new().ok_or(TopologyError::Hwloc)?;
    crate::topology::from_hwloc(&topology)
}

fn from_hwloc(_topology: &hwloc2::Topology) -> Result<Topology, TopologyError> {
    Err(TopologyError::NoCores)
}
