//! Cores and memory nodes of a machine, as plain data.
//!
//! Called by the binary and by the planner. Refuses to guess: a machine whose cores cannot be read
//! is an error.

use std::collections::BTreeMap;
use std::fs;

use hwloc2::{ObjectType, TopologyObject};
use rustix::thread::CpuSet;

/// Most bits of a node set that are looked at: `MAX_NUMNODES` of x86-64 kernels. hwloc's sets can
/// be infinite, and a loop must not be.
const NODES_MAX: usize = 1024;

/// Most hardware threads: what an affinity mask of this process can name.
const CPUS_MAX: usize = CpuSet::MAX_CPU;

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
    /// Its usable cores, ordered by their first thread.
    pub cores: Vec<Core>,
}

/// One physical core.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Core {
    /// Every usable hardware thread, in order. Never empty: [`Core::new`] checks.
    threads: Vec<u32>,
}

impl Core {
    /// A core with these hardware threads; `None` if there are none.
    #[must_use]
    pub fn new(mut threads: Vec<u32>) -> Option<Self> {
        threads.sort_unstable();
        threads.dedup();
        (!threads.is_empty()).then_some(Self { threads })
    }

    /// The first hardware thread: what a seat is pinned to, and the core's name.
    #[must_use]
    pub fn cpu(&self) -> u32 {
        self.threads[0]
    }

    /// Every usable hardware thread, in order.
    #[must_use]
    pub fn threads(&self) -> &[u32] {
        &self.threads
    }
}

/// Why the topology cannot be read
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// hwloc gives nothing.
    #[error("hwloc cannot read this machine's topology; is /sys mounted?")]
    Hwloc,
    /// The kernel does not tell which cores this process may use.
    #[error("cannot read this process's core affinity")]
    Affinity(#[source] rustix::io::Errno),
    /// There is no core that this process may run on.
    #[error("this process may not run on any core; check its cpuset and affinity")]
    NoCores,
}

/// Reads the machine this process runs on, limited to the cores it may use: online, in its cgroup's
/// cpuset (hwloc leaves out the others) and in its affinity mask (hwloc does not look at that).
///
/// # Errors
/// See [`TopologyError`].
pub fn read() -> Result<Topology, TopologyError> {
    let affinity = rustix::thread::sched_getaffinity(None).map_err(TopologyError::Affinity)?;
    read_allowed(|cpu| usize::try_from(cpu).is_ok_and(|c| c < CPUS_MAX && affinity.is_set(c)))
}

fn read_allowed(allowed: impl Fn(u32) -> bool) -> Result<Topology, TopologyError> {
    let hwloc = hwloc2::Topology::new().ok_or(TopologyError::Hwloc)?;
    let mut nodes: BTreeMap<u32, Vec<Core>> = BTreeMap::new();
    for object in core_objects(&hwloc)? {
        let threads = object.cpuset().into_iter().flatten().take(CPUS_MAX);
        let core = Core::new(threads.filter(|cpu| allowed(*cpu)).collect());
        // A core that is near to several nodes counts for the first.
        let node = object.nodeset().into_iter().flatten().take(NODES_MAX).next();
        if let Some(core) = core {
            nodes.entry(node.unwrap_or(0)).or_default().push(core);
        }
    }
    let nodes: Vec<Node> = nodes.into_iter().map(|(index, cores)| node(index, cores)).collect();
    if nodes.is_empty() { Err(TopologyError::NoCores) } else { Ok(Topology { nodes }) }
}

fn node(index: u32, mut cores: Vec<Core>) -> Node {
    cores.sort();
    Node { index, memory_bytes: node_memory_bytes(index), cores }
}

/// Cores, or hardware threads on a machine (some virtual ones) that tells of no cores.
fn core_objects(hwloc: &hwloc2::Topology) -> Result<Vec<&TopologyObject>, TopologyError> {
    [ObjectType::Core, ObjectType::PU]
        .iter()
        .filter_map(|kind| hwloc.objects_with_type(kind).ok())
        .find(|objects| !objects.is_empty())
        .ok_or(TopologyError::Hwloc)
}

/// From sysfs and not from hwloc: memory nodes sit at a virtual depth in hwloc 2 (-3), which the
/// hwloc2 crate takes for the depth of bridges (hwloc 1). 0 where there is no such file.
fn node_memory_bytes(index: u32) -> u64 {
    fs::read_to_string(format!("/sys/devices/system/node/node{index}/meminfo"))
        .ok()
        .and_then(|text| meminfo_total_bytes(&text))
        .unwrap_or(0)
}

/// Finds `Node 0 MemTotal:  123 kB` and gives it in bytes.
fn meminfo_total_bytes(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.contains(" MemTotal:"))?;
    let kib: u64 = line.split_whitespace().nth(3)?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_the_cores_that_this_process_may_use() {
        let topology = read().unwrap();
        let mut threads: Vec<u32> = topology
            .nodes
            .iter()
            .flat_map(|node| &node.cores)
            .flat_map(|core| core.threads().to_vec())
            .collect();
        threads.sort_unstable();
        let parallelism = std::thread::available_parallelism().unwrap().get();
        let affinity = rustix::thread::sched_getaffinity(None).unwrap();
        assert_eq!(threads.len(), affinity.count() as usize);
        assert!(threads.len() >= parallelism, "{threads:?}");
        let mut unique = threads.clone();
        unique.dedup();
        assert_eq!(unique, threads, "a thread belongs to one core");
    }

    /// Run by the test below, in a process that sees another machine.
    #[test]
    #[ignore = "needs the environment that the next test gives it"]
    fn in_a_process_that_sees_two_nodes() {
        let topology = read_allowed(|cpu| cpu != 5).unwrap();
        let threads =
            |node: &Node| node.cores.iter().map(|core| core.threads().to_vec()).collect::<Vec<_>>();
        assert_eq!(topology.nodes.len(), 2);
        assert_eq!(topology.nodes[1].index, 1);
        assert_eq!(threads(&topology.nodes[0]), [[0, 1], [2, 3]]);
        // Thread 5 may not be used.
        assert_eq!(threads(&topology.nodes[1]), [vec![4], vec![6, 7]]);
    }

    #[test]
    fn a_machine_of_two_nodes_is_read() {
        let child = "topology::tests::in_a_process_that_sees_two_nodes";
        let ran = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", child])
            .env("HWLOC_SYNTHETIC", "pack:2 [numa] core:2 pu:2")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success() && said.contains("1 passed"), "{said}");
    }

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "Node 1 MemTotal:       16384 kB\nNode 1 MemFree:  5 kB\n";
        assert_eq!(meminfo_total_bytes(text), Some(16_777_216));
        assert_eq!(meminfo_total_bytes("Node 0 MemFree: 1 kB\n"), None);
        assert_eq!(meminfo_total_bytes("Node 0 MemTotal: lots kB\n"), None);
    }

    #[test]
    fn a_core_has_threads() {
        assert_eq!(Core::new(vec![]), None);
        let core = Core::new(vec![5, 1, 5]).unwrap();
        assert_eq!((core.cpu(), core.threads()), (1, &[1, 5][..]));
    }
}
