//! A machine and its plan as JSON. `docs/tuning.md` describes it: fields are added, and none changes.
//!
//! Called by `mica topology --json`. Refuses nothing.

use std::collections::BTreeMap;

use anyhow::Result;
use mica_numa::topology::{Cache, DeviceKind};
use serde::Serialize;

use super::Layout;

/// Raised when a field changes its meaning or goes.
const VERSION: u32 = 1;

#[derive(Serialize)]
struct Shown<'a> {
    version: u32,
    machine: Machine<'a>,
    plan: PlanShown<'a>,
}

#[derive(Serialize)]
struct Machine<'a> {
    model: Option<&'a str>,
    nodes: Vec<NodeShown<'a>>,
    devices: Vec<DeviceShown<'a>>,
}

#[derive(Serialize)]
struct NodeShown<'a> {
    node: u32,
    package: Option<u32>,
    memory_bytes: u64,
    distances: &'a BTreeMap<u32, u32>,
    cores: Vec<&'a [u32]>,
    l3: Vec<CacheShown<'a>>,
    l2: Vec<CacheShown<'a>>,
}

#[derive(Serialize)]
struct CacheShown<'a> {
    bytes: u64,
    cpus: &'a [u32],
}

#[derive(Serialize)]
struct DeviceShown<'a> {
    kind: &'static str,
    name: &'a str,
    node: Option<u32>,
}

#[derive(Serialize)]
struct PlanShown<'a> {
    smt: String,
    vcpu_pin: String,
    memory: String,
    shards: Vec<ShardShown<'a>>,
    vcpus: Vec<VcpusShown<'a>>,
    free: &'a [u32],
    reserved: &'a [u32],
}

#[derive(Serialize)]
struct ShardShown<'a> {
    shard: u16,
    cpu: u32,
    node: u32,
    memory_node: u32,
    blocking_cpus: &'a [u32],
}

#[derive(Serialize)]
struct VcpusShown<'a> {
    node: u32,
    memory_node: u32,
    cpus: &'a [u32],
    shared_with_shards: bool,
}

/// # Errors
/// None that is known: everything here can be written as JSON.
pub(super) fn show(layout: &Layout) -> Result<String> {
    let shown = Shown { version: VERSION, machine: machine(layout), plan: plan(layout) };
    Ok(serde_json::to_string_pretty(&shown)? + "\n")
}

fn machine(layout: &Layout) -> Machine<'_> {
    let topology = &layout.topology;
    let nodes = topology.nodes.iter().map(|node| NodeShown {
        node: node.index,
        package: node.package,
        memory_bytes: node.memory_bytes,
        distances: &node.distances,
        cores: node.cores.iter().map(mica_numa::topology::Core::threads).collect(),
        l3: caches(&node.caches),
        l2: caches(&node.l2),
    });
    let devices = topology.devices.iter().map(|device| DeviceShown {
        kind: match device.kind {
            DeviceKind::Nvme => "nvme",
            DeviceKind::Network => "network",
        },
        name: &device.name,
        node: device.node,
    });
    Machine { model: topology.model.as_deref(), nodes: nodes.collect(), devices: devices.collect() }
}

fn caches(caches: &[Cache]) -> Vec<CacheShown<'_>> {
    caches.iter().map(|cache| CacheShown { bytes: cache.bytes, cpus: cache.cpus.cpus() }).collect()
}

fn plan(layout: &Layout) -> PlanShown<'_> {
    let plan = &layout.plan;
    let shards = plan.seats.iter().map(|seat| {
        let own = plan.blocking.iter().find(|own| own.shard == seat.shard);
        ShardShown {
            shard: seat.shard.index(),
            cpu: seat.core,
            node: seat.node,
            memory_node: seat.memory_node,
            blocking_cpus: own.map_or(&[], |own| &own.cpus),
        }
    });
    let vcpus = plan.vcpus.iter().map(|vcpus| VcpusShown {
        node: vcpus.node,
        memory_node: vcpus.memory_node,
        cpus: &vcpus.cpus,
        shared_with_shards: vcpus.shared_with_shards,
    });
    PlanShown {
        smt: layout.smt.to_string(),
        vcpu_pin: plan.pin.to_string(),
        memory: plan.memory.to_string(),
        shards: shards.collect(),
        vcpus: vcpus.collect(),
        free: &plan.free,
        reserved: &plan.reserved,
    }
}
