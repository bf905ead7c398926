//! Creates go to another node while theirs is short of memory.
//!
//! What nodes have is made up: over the directory in which the kernel says it lies another, for the thread of the test and
//! those that it starts.

use std::fs;
use std::path::Path;
use std::rc::Rc;

use mica_numa::Plan;
use mica_numa::plan::VcpuCores;
use mica_shards::{Host, HostConfig};
use mica_units::{SandboxId, ShardCount};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;

use crate::common::{Bench, Leftovers, request, two_seats};
use crate::wait::eventually;

const NODES: &str = "/sys/devices/system/node";
const RESERVE_MIB: u32 = 1024;

/// From now on this thread, and those that it starts, see these nodes: so many MiB of each are free.
#[expect(deprecated, reason = "only what is unsafe with descriptors is, and none are unshared")]
fn pretend(free_mib: [u32; 2]) {
    rustix::thread::unshare(UnshareFlags::NEWNS).unwrap();
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE).unwrap();
    mount("none", NODES, "tmpfs", MountFlags::empty(), None).unwrap();
    for (node, free) in (0..).zip(free_mib) {
        fs::create_dir(Path::new(NODES).join(format!("node{node}"))).unwrap();
        say(node, free);
    }
}

fn say(node: u32, free_mib: u32) {
    let line = |name: &str, mib: u32| format!("Node {node} {name}: {} kB\n", u64::from(mib) << 10);
    let lines =
        [("MemTotal", 65_536), ("MemFree", free_mib), ("FilePages", 0), ("Shmem", 0), ("Dirty", 0)];
    let text: String = lines.map(|(name, mib)| line(name, mib)).concat();
    fs::write(Path::new(NODES).join(format!("node{node}/meminfo")), text).unwrap();
}

/// The two seats, each on a node of its own, and its memory there.
fn two_nodes() -> Plan {
    let mut plan = two_seats();
    let cpus = plan.vcpus[0].cpus.clone();
    // Processes get theirs from the one that is there.
    let vcpus =
        |node| VcpuCores { node, memory_node: 0, cpus: cpus.clone(), shared_with_shards: true };
    plan.vcpus = vec![vcpus(0), vcpus(1)];
    for (node, seat) in (0..).zip(&mut plan.seats) {
        (seat.node, seat.memory_node) = (node, node);
    }
    plan
}

fn shard_of(id: SandboxId) -> u16 {
    id.shard(ShardCount::new(2).unwrap()).index()
}

/// Makes one and gives its shard; one on shard 0 is ended, so that shard always has the fewest.
async fn create(host: &Host) -> u16 {
    let id = host.create(request("agent")).await.unwrap().id;
    if shard_of(id) == 0 {
        host.kill(id).await.unwrap();
    }
    shard_of(id)
}

#[test]
fn a_node_that_is_short_of_memory_gets_no_creates_while_another_is_not() {
    if !Path::new(NODES).exists() {
        println!("this kernel knows no nodes: nothing can be made up");
        return;
    }
    let bench = Bench::new();
    bench.set_mood("good");
    let plan = two_nodes();
    pretend([RESERVE_MIB / 2, RESERVE_MIB * 2]);
    let config = HostConfig { memory_reserve_mib: RESERVE_MIB, ..bench.config() };
    let ran = bench.host_on(&plan, config, |host| async move {
        let host = Rc::new(host);
        // Shard 0 has none, so by load alone all but the first would go there.
        eventually("shard 1 has one", async || create(&host).await == 1).await;
        eventually("the node of shard 0 is seen to be short", async || create(&host).await == 1)
            .await;
        for _ in 0..10 {
            assert_eq!(create(&host).await, 1);
        }
        // Where all are short, load is what is left.
        say(1, RESERVE_MIB / 2);
        eventually("both are seen to be short", async || create(&host).await == 0).await;
        for _ in 0..5 {
            assert_eq!(create(&host).await, 0);
        }
    });
    ran.unwrap();
    assert_eq!(bench.leftovers(), Leftovers::default());
}
