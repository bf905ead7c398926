//! Machines from XML, lists of cpus and `numa_maps`: an answer within bounds, whatever it is.
//!
//! Run by libFuzzer.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mica_numa::topology::{NODES_MAX, from_xml};
use mica_numa::{CpuList, PlanConfig, numa_maps, plan};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(topology) = from_xml(bytes) {
        let cpus = topology.cpus();
        assert!(!cpus.is_empty(), "a machine without a cpu");
        assert!(cpus.cpus().iter().all(|cpu| *cpu < 1024));
        let threads: usize =
            topology.nodes.iter().flat_map(|node| &node.cores).map(|core| core.threads().len()).sum();
        assert_eq!(threads, cpus.cpus().len(), "a thread is in two cores");
        let plan = plan(&topology, &PlanConfig::default()).expect("what has a core has a plan");
        assert!(plan.seats.iter().all(|seat| cpus.contains(seat.core)));
    }
    for mapping in numa_maps::parse(bytes) {
        assert!(mapping.pages.keys().all(|node| *node < NODES_MAX));
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(list) = text.parse::<CpuList>()
    {
        assert_eq!(list.to_string().parse::<CpuList>(), Ok(list));
    }
});
