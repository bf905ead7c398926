//! Cores, caches, memory nodes and devices of a machine, as plain data.
//!
//! Called by the binary and by the planner. Two readers fill it: [`read`] this machine, [`from_xml`]
//! another one that `lstopo` exported. Refuses to guess: a machine whose cores cannot be read is an
//! error.

mod machine;
mod sysfs;
mod xml;

use std::collections::BTreeMap;

use crate::cpus::CpuList;

pub use machine::read;
pub use xml::{XML_BYTES_MAX, XmlError, from_xml};

/// Most memory nodes: `MAX_NUMNODES` of x86-64 kernels.
pub const NODES_MAX: u32 = 1024;

/// What the kernel says of a node's distance to itself (`numa_distance` in ACPI's SLIT).
pub const DISTANCE_LOCAL: u32 = 10;

/// A machine, or the part of it that this process may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// What its processors call themselves, if that is known.
    pub model: Option<String>,
    /// Memory nodes that have usable cores or usable memory, ordered by index.
    pub nodes: Vec<Node>,
    /// NVMe drives and network interfaces, ordered by name.
    pub devices: Vec<Device>,
}

/// One memory node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// The operating system's index.
    pub index: u32,
    /// The processor package it is a part of, if that is known.
    pub package: Option<u32>,
    /// Its memory that this process may use, in bytes. 0: it has none, or the system does not tell.
    pub memory_bytes: u64,
    /// Its usable cores, ordered by their first thread. None on a node that is memory only.
    pub cores: Vec<Core>,
    /// Its third-level caches, in the order of their cores.
    pub caches: Vec<Cache>,
    /// Its second-level caches, in the order of their cores: each of a core, or of a few.
    pub l2: Vec<Cache>,
    /// How far other nodes are, as the system counts it. Empty where it does not tell.
    pub distances: BTreeMap<u32, u32>,
}

/// A second-level or third-level cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    /// Its size. 0 where the system does not tell.
    pub bytes: u64,
    /// The usable hardware threads that share it.
    pub cpus: CpuList,
}

/// What a device is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DeviceKind {
    /// An NVMe drive.
    Nvme,
    /// A network interface.
    Network,
}

/// A device that is near to one node, or to none in particular.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Device {
    /// What it is.
    pub kind: DeviceKind,
    /// Its name on the system: `nvme0n1`, `eth0`.
    pub name: String,
    /// The node it is near to, where the system tells of one.
    pub node: Option<u32>,
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

impl Node {
    /// Its usable hardware threads.
    #[must_use]
    pub fn cpus(&self) -> CpuList {
        self.cores.iter().flat_map(Core::threads).copied().collect()
    }
}

impl Topology {
    /// All usable hardware threads.
    #[must_use]
    pub fn cpus(&self) -> CpuList {
        self.nodes.iter().flat_map(|node| &node.cores).flat_map(Core::threads).copied().collect()
    }

    /// The node whose memory is nearest to `from`: itself where it has memory, else the nearest that
    /// has; of equals one of the same package, then the lowest. `from` itself where no node tells of
    /// memory.
    #[must_use]
    pub fn memory_near(&self, from: &Node) -> u32 {
        if from.memory_bytes > 0 {
            return from.index;
        }
        let far = |node: &Node| {
            let distance = from.distances.get(&node.index).copied().unwrap_or(u32::MAX);
            (distance, node.package != from.package, node.index)
        };
        let with_memory = self.nodes.iter().filter(|node| node.memory_bytes > 0);
        with_memory.min_by_key(|node| far(node)).map_or(from.index, |node| node.index)
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

/// What a reader found, before cores are with their nodes.
#[derive(Debug, Default)]
struct Parts {
    model: Option<String>,
    /// Usable hardware threads of each core.
    cores: Vec<Vec<u32>>,
    /// Index and cpus of each package.
    packages: Vec<(u32, CpuList)>,
    nodes: BTreeMap<u32, NodePart>,
    caches: Vec<Cache>,
    l2: Vec<Cache>,
    devices: Vec<Device>,
}

#[derive(Debug, Default)]
struct NodePart {
    memory_bytes: u64,
    cpus: CpuList,
    distances: BTreeMap<u32, u32>,
}

impl Parts {
    /// Puts cores and caches with their nodes. A core that is near to several nodes is of the one with
    /// the fewest cpus, then of the lowest; one that is near to none is of node 0.
    fn assemble(self) -> Topology {
        let mut by_node: BTreeMap<u32, Vec<Core>> = BTreeMap::new();
        for core in self.cores.into_iter().filter_map(Core::new) {
            let near = self.nodes.iter().filter(|(_, part)| part.cpus.contains(core.cpu()));
            let node = near.min_by_key(|(index, part)| (part.cpus.cpus().len(), **index));
            by_node.entry(node.map_or(0, |(index, _)| *index)).or_default().push(core);
        }
        let mut indices: Vec<u32> = self.nodes.keys().chain(by_node.keys()).copied().collect();
        indices.sort_unstable();
        indices.dedup();
        let mut parts = self.nodes;
        let mut nodes = Vec::new();
        for index in indices {
            let NodePart { memory_bytes, cpus: _, distances } =
                parts.remove(&index).unwrap_or_default();
            let mut cores = by_node.remove(&index).unwrap_or_default();
            cores.sort();
            let mut node = Node { index, memory_bytes, cores, distances, ..Node::default() };
            let cpus = node.cpus();
            let first = cpus.cpus().first();
            let package =
                self.packages.iter().find(|(_, of)| first.is_some_and(|c| of.contains(*c)));
            node.package = package.map(|(index, _)| *index);
            node.caches = caches_of(&self.caches, &cpus);
            node.l2 = caches_of(&self.l2, &cpus);
            if !node.cores.is_empty() || memory_bytes > 0 {
                nodes.push(node);
            }
        }
        let alone = if let [node] = &nodes[..] { Some(node.index) } else { None };
        let known = |node: &u32| nodes.iter().any(|known| known.index == *node);
        let mut devices = self.devices;
        for device in &mut devices {
            // What is near to the only node need not say so.
            device.node = device.node.filter(known).or(alone);
        }
        devices.sort();
        devices.dedup();
        Topology { model: self.model, nodes, devices }
    }
}

/// The parts of caches that are of these cpus.
fn caches_of(caches: &[Cache], cpus: &CpuList) -> Vec<Cache> {
    let part = |cache: &Cache| {
        let shared = cache.cpus.cpus().iter().copied().filter(|cpu| cpus.contains(*cpu));
        Cache { bytes: cache.bytes, cpus: shared.collect() }
    };
    let mut found: Vec<Cache> =
        caches.iter().map(part).filter(|cache| !cache.cpus.is_empty()).collect();
    found.sort_by(|a, b| a.cpus.cpus().cmp(b.cpus.cpus()));
    found
}

/// A name from outside that may be printed and drawn: its printable ASCII, bounded.
fn printable(text: &str) -> String {
    let harmless = |c: char| if c.is_ascii_graphic() { c } else { ' ' };
    let text: String = text.chars().take(1024).map(harmless).collect();
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    words.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_has_threads() {
        assert_eq!(Core::new(vec![]), None);
        let core = Core::new(vec![5, 1, 5]).unwrap();
        assert_eq!((core.cpu(), core.threads()), (1, &[1, 5][..]));
    }

    fn node(index: u32, package: u32, memory_bytes: u64, far: &[(u32, u32)]) -> Node {
        let distances = far.iter().copied().collect();
        Node { index, package: Some(package), memory_bytes, distances, ..Node::default() }
    }

    #[test]
    fn the_nearest_memory_is_ones_own_or_the_closest() {
        let near = |nodes: Vec<Node>| {
            let topology = Topology { nodes, ..Topology::default() };
            topology.memory_near(&topology.nodes[0])
        };
        let far = [(1, 32), (2, 21)];
        assert_eq!(near(vec![node(0, 0, 1, &far), node(1, 1, 1, &[])]), 0);
        assert_eq!(near(vec![node(0, 0, 0, &far), node(1, 0, 1, &[]), node(2, 1, 1, &[])]), 2);
        // Without distances, one of the same package; without memory anywhere, itself.
        assert_eq!(near(vec![node(0, 1, 0, &[]), node(1, 0, 1, &[]), node(2, 1, 1, &[])]), 2);
        assert_eq!(near(vec![node(0, 0, 0, &far), node(1, 1, 0, &[])]), 0);
    }

    #[test]
    fn parts_are_put_together() {
        let list = |text: &str| text.parse::<CpuList>().unwrap();
        let part =
            |memory_bytes, cpus| NodePart { memory_bytes, cpus: list(cpus), ..NodePart::default() };
        let device =
            |name: &str, node| Device { kind: DeviceKind::Network, name: name.to_owned(), node };
        let parts = Parts {
            cores: vec![vec![1, 3], vec![0, 2], vec![], vec![4]],
            packages: vec![(7, list("0-4"))],
            // Node 2 is a part of what node 1 is near to, as memory with a wide bus is.
            nodes: [(1, part(5, "0-3")), (2, part(6, "0-4")), (3, part(0, "")), (4, part(9, ""))]
                .into(),
            caches: vec![Cache { bytes: 64, cpus: list("0-4") }],
            devices: vec![device("b", Some(2)), device("a", Some(8))],
            ..Parts::default()
        };
        let topology = parts.assemble();
        let shown: Vec<_> = topology
            .nodes
            .iter()
            .map(|n| (n.index, n.package, n.memory_bytes, n.cpus().to_string(), n.caches.len()))
            .collect();
        let expected = [
            (1, Some(7), 5, "0-3".to_owned(), 1),
            (2, Some(7), 6, "4".to_owned(), 1),
            (4, None, 9, String::new(), 0),
        ];
        assert_eq!(shown, expected, "node 3 has neither cores nor memory");
        assert_eq!(topology.devices, [device("a", None), device("b", Some(2))]);
    }

    #[test]
    fn names_from_outside_are_harmless() {
        assert_eq!(printable("AMD\u{1b}[31m  EPYC\n9654 \u{202e}"), "AMD [31m EPYC 9654");
        assert_eq!(printable(&"x".repeat(1000)).len(), 64);
    }
}
