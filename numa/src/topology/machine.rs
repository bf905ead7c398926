//! The machine this process runs on: cores, caches and packages from hwloc, the rest from sysfs.
//!
//! Called by the binary at start. Refuses cores that this process may not use, and a machine on which
//! it may use none.

use std::collections::BTreeMap;
use std::path::Path;

use hwloc2::{ObjectType, TopologyObject};

use super::{Cache, NODES_MAX, Parts, Topology, TopologyError, sysfs};
use crate::cpus::{CPUS_MAX, CpuList};

/// Reads the machine this process runs on, limited to the cores it may use: online, in its cgroup's
/// cpuset (hwloc leaves out the others) and in its affinity mask (hwloc does not look at that). Memory
/// that its cpuset forbids counts as not there.
///
/// # Errors
/// See [`TopologyError`].
pub fn read() -> Result<Topology, TopologyError> {
    let affinity = rustix::thread::sched_getaffinity(None).map_err(TopologyError::Affinity)?;
    let fits = |cpu: u32| usize::try_from(cpu).ok().filter(|_| cpu < CPUS_MAX);
    read_allowed(|cpu| fits(cpu).is_some_and(|cpu| affinity.is_set(cpu)))
}

fn read_allowed(allowed: impl Fn(u32) -> bool) -> Result<Topology, TopologyError> {
    let hwloc = hwloc2::Topology::new().ok_or(TopologyError::Hwloc)?;
    let root = Path::new("/");
    let mut nodes = sysfs::nodes(root);
    let mut near: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let mut cores = Vec::new();
    for object in core_objects(&hwloc)? {
        let threads: Vec<u32> = cpus(object).filter(|cpu| allowed(*cpu)).collect();
        // hwloc leaves out nodes whose memory this process may not use. There sysfs counts. A core that
        // is near to several nodes counts for the first.
        let told = object.nodeset().into_iter().flatten().take(NODES_MAX as usize).next();
        let first = threads.first().copied();
        let listed = || {
            let first = first?;
            nodes.iter().find(|(_, part)| part.cpus.contains(first)).map(|(index, _)| *index)
        };
        near.entry(told.or_else(listed).unwrap_or(0)).or_default().extend(&threads);
        cores.push(threads);
    }
    for part in nodes.values_mut() {
        part.cpus = CpuList::default();
    }
    for (index, cpus) in near {
        nodes.entry(index).or_default().cpus = cpus.into_iter().collect();
    }
    let packages = objects(&hwloc, &ObjectType::Package);
    let packages = packages.iter().map(|package| (package.os_index(), cpus(package).collect()));
    let caches = |kind| {
        let cache = |cache| Cache { bytes: size_of(cache), cpus: cpus(cache).collect() };
        objects(&hwloc, kind).into_iter().map(cache).collect()
    };
    let topology = Parts {
        model: sysfs::model(root),
        cores,
        packages: packages.collect(),
        nodes,
        caches: caches(&ObjectType::L3Cache),
        l2: caches(&ObjectType::L2Cache),
        devices: sysfs::devices(root),
    }
    .assemble();
    if topology.cpus().is_empty() { Err(TopologyError::NoCores) } else { Ok(topology) }
}

fn size_of(cache: &TopologyObject) -> u64 {
    cache.cache_attributes().map_or(0, |attributes| attributes.size())
}

/// The hardware threads of an object. hwloc's sets can be infinite, and a loop must not be.
fn cpus(object: &TopologyObject) -> impl Iterator<Item = u32> {
    object.cpuset().into_iter().flatten().take(CPUS_MAX as usize)
}

fn objects<'h>(hwloc: &'h hwloc2::Topology, kind: &ObjectType) -> Vec<&'h TopologyObject> {
    // The only kinds asked for here are those with a real depth: the crate panics on others.
    hwloc.objects_with_type(kind).unwrap_or_default()
}

/// Cores, or hardware threads on a machine (some virtual ones) that tells of no cores.
fn core_objects(hwloc: &hwloc2::Topology) -> Result<Vec<&TopologyObject>, TopologyError> {
    [ObjectType::Core, ObjectType::PU]
        .iter()
        .map(|kind| objects(hwloc, kind))
        .find(|objects| !objects.is_empty())
        .ok_or(TopologyError::Hwloc)
}

#[cfg(test)]
mod tests {
    use super::super::Node;
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
        assert!(topology.nodes.iter().any(|node| node.memory_bytes > 0), "{topology:?}");
    }

    /// Run by the tests below, in a process that sees another machine.
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
        let [cache] = &topology.nodes[1].caches[..] else { panic!("{topology:?}") };
        assert_eq!((cache.bytes, cache.cpus.to_string()), (4096, "4,6-7".to_owned()));
        let l2 = topology.nodes[1].l2.iter().map(|cache| (cache.bytes, cache.cpus.to_string()));
        assert_eq!(l2.collect::<Vec<_>>(), [(2048, "4".to_owned()), (2048, "6-7".to_owned())]);
        assert_eq!(topology.nodes[1].package, Some(1));
    }

    /// The same file, read by hwloc and by us.
    #[test]
    #[ignore = "needs the environment that the next test gives it"]
    fn in_a_process_that_sees_a_file() {
        let hwlocs = read_allowed(|_| true).unwrap();
        let ours = include_bytes!("../../tests/machines/2x24x2.xml");
        let ours = super::super::from_xml(ours).unwrap();
        let view = |topology: &Topology| {
            let caches = |n: &Node| (n.caches.clone(), n.l2.clone());
            let node = |n: &Node| (n.index, n.package, n.cores.clone(), caches(n));
            topology.nodes.iter().map(node).collect::<Vec<_>>()
        };
        assert_eq!((ours.nodes.len(), ours.nodes[1].l2.len()), (2, 24));
        assert_eq!(view(&hwlocs), view(&ours));
    }

    fn with_environment(child: &str, name: &str, value: &str) {
        let child = format!("topology::machine::tests::{child}");
        let ran = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", &child])
            .env(name, value)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success() && said.contains("1 passed"), "{said}");
    }

    #[test]
    fn a_machine_of_two_nodes_is_read() {
        let machine = "pack:2 [numa] l3:1(size=4096) l2:2(size=2048) core:1 pu:2";
        with_environment("in_a_process_that_sees_two_nodes", "HWLOC_SYNTHETIC", machine);
    }

    #[test]
    fn hwloc_says_the_same_of_a_file() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/machines/2x24x2.xml");
        with_environment("in_a_process_that_sees_a_file", "HWLOC_XMLFILE", file);
    }
}
