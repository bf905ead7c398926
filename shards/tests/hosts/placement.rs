//! VM processes are where the plan says, from their first instruction on.
//!
//! Against the double, read from /proc. Memory nodes are counted where the kernel knows any; how it is
//! with two of them is shown end to end (`tests/e2e/test_placement.py`). A plan of two nodes shows here
//! what guests start from on each.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::Duration;

use mica_numa::plan::VcpuCores;
use mica_numa::{MemoryPolicy, Plan, VcpuPin, topology};
use mica_shards::metrics::Value;
use mica_shards::{Host, HostConfig, ShardError, rt};
use mica_units::{Mebibytes, SandboxId, ShardCount};

use crate::common::{Bench, Leftovers, port, request, tell, two_seats};
use crate::wait::eventually;

/// The line of a process's status with this name.
fn status(pid: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().to_owned()
}

/// The only thread that guests may run on: the last of this process's.
fn last_cpu_for_vcpus() -> (Plan, u32) {
    let mut plan = two_seats();
    let allowed = status(std::process::id(), "Cpus_allowed_list:");
    let last = *allowed.parse::<mica_numa::CpuList>().unwrap().cpus().last().unwrap();
    plan.vcpus[0].cpus = vec![last];
    plan.vcpus[0].shared_with_shards = true;
    (plan, last)
}

#[test]
fn a_vm_process_has_the_cores_and_the_memory_of_its_node() {
    let bench = Bench::new();
    bench.set_mood("agent");
    for (memory, policy) in [(MemoryPolicy::Bind, "bind:"), (MemoryPolicy::Preferred, "prefer")] {
        let (plan, cpu) = last_cpu_for_vcpus();
        let plan = Plan { memory, ..plan };
        let places = bench.clone();
        let config = HostConfig { boot_deadline: Duration::from_secs(20), ..bench.config() };
        let ran = bench.host_on(&plan, config, move |host| async move {
            let made = host.create(request("agent")).await.unwrap();
            let pids = places.pids();
            assert!(!pids.is_empty());
            for pid in pids {
                assert_eq!(status(pid, "Cpus_allowed_list:"), cpu.to_string());
                let maps = Path::new("/proc").join(pid.to_string()).join("numa_maps");
                if let Ok(maps) = fs::read_to_string(maps) {
                    let stack = maps.lines().find(|line| line.contains(" stack ")).unwrap();
                    assert!(stack.contains(policy), "{stack}");
                }
            }
            let placed = host.wrong_node(made.id).await.unwrap();
            // This machine may have more nodes than one; all of a process is on one in any case.
            assert_eq!((placed.pages, placed.vcpu_time), (0, Duration::ZERO), "{placed:?}");
            if Path::new("/proc/self/numa_maps").exists() {
                assert!(placed.pages_in_memory > 0, "{placed:?}");
            }
            host.kill(made.id).await.unwrap();
            assert!(host.wrong_node(made.id).await.is_err(), "it is gone");
        });
        ran.unwrap();
    }
}

/// The pages on a wrong node of each sandbox that has a process, and of all together.
async fn wrong_pages(host: &Host) -> (Vec<Option<u64>>, Option<u64>) {
    let view = host.view(None, 100).await.unwrap();
    let of_each = view.sandboxes.iter().filter_map(|one| one.process);
    let of_each = of_each.map(|process| process.wrong_node_pages).collect();
    let measured = host.measure().await.unwrap();
    let samples = measured.into_iter().flat_map(|shard| shard.samples);
    let mut sum = None;
    for sample in samples.filter(|sample| sample.family.name == "mica_vm_wrong_node_pages") {
        let Value::Whole(pages) = sample.value else { panic!("{sample:?}") };
        *sum.get_or_insert(0) += pages;
    }
    (of_each, sum)
}

#[test]
fn a_host_looks_by_itself_for_what_is_on_a_wrong_node() {
    if !Path::new("/proc/self/numa_maps").exists() {
        println!("this kernel knows no nodes: nothing is looked at");
        return;
    }
    let bench = Bench::new();
    bench.set_mood("agent");
    let mut plan = two_seats();
    // A node that is not there: whatever a process has is on another.
    let strange = topology::read().unwrap().nodes.iter().map(|node| node.index).max().unwrap() + 1;
    for vcpus in &mut plan.vcpus {
        vcpus.memory_node = strange;
    }
    let ran = bench.host_on(&plan, bench.config(), move |host| async move {
        assert_eq!(wrong_pages(&host).await, (vec![], Some(0)));
        let (first, second) = (host.create(request("agent")), host.create(request("agent")));
        let (first, second) = (first.await.unwrap().id, second.await.unwrap().id);
        // Nobody asks for it: the shards look.
        eventually("both were looked at", async || {
            let (of_each, _) = wrong_pages(&host).await;
            of_each.len() == 2 && of_each.iter().all(Option::is_some)
        })
        .await;
        let (of_each, sum) = wrong_pages(&host).await;
        assert!(of_each.iter().all(|pages| *pages > Some(0)), "{of_each:?}");
        assert_eq!(sum, of_each.iter().flatten().copied().reduce(|a, b| a + b));
        let placed = host.wrong_node(first).await.unwrap();
        assert_eq!(placed.pages, placed.pages_in_memory, "{placed:?}");
        host.kill(first).await.unwrap();
        let (left, sum) = wrong_pages(&host).await;
        assert_eq!((left.len(), sum), (1, left[0]), "its count went with it");
        host.kill(second).await.unwrap();
        assert_eq!(wrong_pages(&host).await, (vec![], Some(0)));
    });
    ran.unwrap();
    assert_eq!(bench.leftovers(), Leftovers::default(), "the looks end with the host");
}

/// Where each vCPU thread of a process may run.
fn vcpus_of(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let tasks = tasks.map(|entry| entry.unwrap().path());
    // The double has threads that end, also between the listing and this; none of them is a vCPU's.
    let is_vcpu = |task: &PathBuf| {
        fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("vcpu-"))
    };
    let allowed = |task: PathBuf| {
        let text = fs::read_to_string(task.join("status")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        line.unwrap().trim().to_owned()
    };
    tasks.filter(is_vcpu).map(allowed).collect()
}

#[test]
fn each_vcpu_has_a_hardware_thread_where_the_plan_says_so() {
    let bench = Bench::new();
    bench.set_mood("agent");
    let allowed = status(std::process::id(), "Cpus_allowed_list:");
    let allowed: mica_numa::CpuList = allowed.parse().unwrap();
    let mut plan = Plan { pin: VcpuPin::Core, ..two_seats() };
    plan.vcpus[0].cpus = allowed.cpus().to_vec();
    let places = bench.clone();
    let ran = bench.host_on(&plan, bench.config(), move |host| async move {
        for round in 0..2 {
            let mut made = Vec::new();
            for _ in 0..2 {
                made.push(host.create(request("agent")).await.unwrap().id);
            }
            let mut counts = BTreeMap::new();
            for cpu in places.pids().into_iter().flat_map(vcpus_of) {
                *counts.entry(cpu.parse::<u32>().expect("one cpu")).or_insert(0) += 1;
            }
            assert_eq!(counts.values().sum::<i32>(), 4, "two sandboxes of two vCPUs: {counts:?}");
            // As even as can be, also after others have gone.
            let most = 4usize.div_ceil(allowed.cpus().len());
            assert!(
                counts.values().all(|count| *count <= i32::try_from(most).unwrap()),
                "{round}: {counts:?}"
            );
            for id in made {
                host.kill(id).await.unwrap();
            }
        }
    });
    ran.unwrap();
}

/// Memory of a template whose copy takes longer than to start a sandbox without it.
const LARGE: Mebibytes = Mebibytes::new(128);

/// The two seats, each on a node of its own. The memory of both is of this machine's one.
fn two_nodes(memory: MemoryPolicy) -> Plan {
    let mut plan = Plan { memory, ..two_seats() };
    let cpus = plan.vcpus[0].cpus.clone();
    let vcpus =
        |node| VcpuCores { node, memory_node: 0, cpus: cpus.clone(), shared_with_shards: true };
    plan.vcpus = vec![vcpus(0), vcpus(1)];
    for (node, seat) in (0..).zip(&mut plan.seats) {
        (seat.node, seat.memory_node) = (node, 0);
    }
    plan
}

/// What sandboxes that are made at once start from, by shard.
async fn bases(host: &Host, count: usize) -> BTreeMap<u16, Vec<String>> {
    let creates: Vec<_> = (0..count)
        .map(|_| {
            let host = host.clone();
            rt::spawn(async move { host.create(request("large")).await.unwrap().id })
        })
        .collect();
    let mut found: BTreeMap<u16, Vec<String>> = BTreeMap::new();
    for create in creates {
        let id = create.join().await.unwrap();
        let shard = id.shard(ShardCount::new(2).unwrap()).index();
        found.entry(shard).or_default().push(tell(host, id, "base").await);
        host.kill(id).await.unwrap();
    }
    found
}

#[test]
fn where_memory_is_bound_the_first_creates_wait_for_their_nodes_copy() {
    let bench = Bench::new();
    bench.set_mood("agent");
    let file = bench.add_large(LARGE);
    let config = || HostConfig { replica_budget_mib: 256, ..bench.config() };
    let ran = bench.host_on(&two_nodes(MemoryPolicy::Bind), config(), |host| async move {
        let found = bases(&host, 4).await;
        assert_eq!(found.len(), 2, "creates went to one node only: {found:?}");
        for base in found.into_values().flatten() {
            assert!(base.starts_with("/memfd:mica-replica"), "{base}");
        }
    });
    ran.unwrap();
    // One whose copy would not fit is the page cache's, as the operator decided.
    let small = HostConfig { replica_budget_mib: 64, ..bench.config() };
    let ran = bench.host_on(&two_nodes(MemoryPolicy::Bind), small, |host| async move {
        for base in bases(&host, 2).await.into_values().flatten() {
            assert_eq!(Path::new(&base), file);
        }
    });
    ran.unwrap();
}

#[test]
fn a_create_that_waits_for_a_copy_ends_by_its_deadline_and_with_the_host() {
    let bench = Bench::new();
    bench.set_mood("agent");
    bench.add_large(LARGE);
    let boot_deadline = Duration::from_millis(5);
    let config = HostConfig { replica_budget_mib: 256, boot_deadline, ..bench.config() };
    let ran = bench.host_on(&two_nodes(MemoryPolicy::Bind), config, |host| async move {
        let late = host.create(request("large")).await.unwrap_err();
        assert!(matches!(late, ShardError::BootTimedOut { .. }), "{late}");
        // The host ends while this one waits.
        rt::spawn(async move { host.create(request("large")).await }).detach();
    });
    ran.unwrap();
    assert_eq!(bench.leftovers().sandboxes, 0);
}

#[test]
fn a_copy_that_a_create_began_is_made_although_its_client_went_away() {
    let bench = Bench::new();
    bench.set_mood("agent");
    bench.add_large(LARGE);
    let config = HostConfig { replica_budget_mib: 256, ..bench.config() };
    let ran = bench.host_on(&two_nodes(MemoryPolicy::Bind), config, |host| async move {
        let short = Duration::from_millis(5);
        let given_up = rt::time::timeout(short, host.create(request("large"))).await;
        assert!(given_up.is_err(), "{given_up:?}");
        assert_eq!(bases(&host, 4).await.into_values().flatten().count(), 4);
    });
    ran.unwrap();
}

#[test]
fn where_memory_is_bound_a_copy_that_fails_is_an_error_until_it_can_be_made() {
    let bench = Bench::new();
    bench.set_mood("agent");
    let file = bench.add_large(Mebibytes::new(32));
    let whole = fs::read(&file).unwrap();
    let mut damaged = whole.clone();
    damaged[5 << 20] ^= 1;
    let config = || HostConfig { replica_budget_mib: 256, ..bench.config() };

    fs::write(&file, &damaged).unwrap();
    let mend = (file.clone(), whole);
    let ran = bench.host_on(&two_nodes(MemoryPolicy::Bind), config(), |host| async move {
        for _ in 0..2 {
            let error = host.create(request("large")).await.unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, ShardError::BootFailed { .. }), "{text}");
            assert!(text.contains("no copy of its template's memory"), "{text}");
            assert!(text.contains("damaged at"), "{text}");
        }
        fs::write(mend.0, mend.1).unwrap();
        for base in bases(&host, 4).await.into_values().flatten() {
            assert!(base.starts_with("/memfd:mica-replica"), "{base}");
        }
    });
    ran.unwrap();

    // Where it is only preferred, guests start from the file.
    fs::write(&file, &damaged).unwrap();
    let ran = bench.host_on(&two_nodes(MemoryPolicy::Preferred), config(), |host| async move {
        for base in bases(&host, 2).await.into_values().flatten() {
            assert_eq!(Path::new(&base), file);
        }
    });
    ran.unwrap();
    assert_eq!(bench.pids(), [0; 0]);
}

/// A sandbox of the large template whose second snapshot has pages that the first has not, and that were
/// written again since: to go to the second and then to the first maps them from both in turn.
async fn with_two_snapshots(host: &Host) -> (SandboxId, [String; 2]) {
    let id = host.create(request("large")).await.unwrap().id;
    let first = host.snapshot(id, None).await.unwrap().id;
    tell(host, id, "fill 10 4 1").await;
    let second = host.snapshot(id, None).await.unwrap().id;
    tell(host, id, "fill 10 4 2").await;
    (id, [first, second])
}

#[test]
fn where_memory_is_bound_a_rollback_maps_its_nodes_copy() {
    let bench = Bench::new();
    bench.set_mood("agent");
    let file = bench.add_large(Mebibytes::new(32));
    for (memory, is_copy) in [(MemoryPolicy::Bind, true), (MemoryPolicy::Preferred, false)] {
        let config = HostConfig { replica_budget_mib: 256, ..bench.config() };
        let file = file.clone();
        let ran = bench.host_on(&two_nodes(memory), config, move |host| async move {
            let (id, [first, second]) = with_two_snapshots(&host).await;
            host.rollback(id, second).await.unwrap();
            assert_eq!(tell(&host, id, "look 10 4").await, "01010101");
            host.rollback(id, first).await.unwrap();
            let base = tell(&host, id, "base").await;
            assert_eq!(base.starts_with("/memfd:mica-replica"), is_copy, "{base}");
            assert!(is_copy || Path::new(&base) == file, "{base}");
            host.kill(id).await.unwrap();
        });
        ran.unwrap();
    }
}

#[test]
fn a_rollback_whose_copy_cannot_be_made_changes_nothing() {
    let bench = Bench::new();
    bench.set_mood("agent");
    let file = bench.add_large(Mebibytes::new(32));
    let whole = fs::read(&file).unwrap();
    let mut damaged = whole.clone();
    damaged[5 << 20] ^= 1;
    let config =
        |keep_sandboxes| HostConfig { replica_budget_mib: 256, keep_sandboxes, ..bench.config() };
    let (tell_next, heard) = channel();
    let ran = bench.host_on(&two_nodes(MemoryPolicy::Preferred), config(true), |host| async move {
        let (id, [first, _]) = with_two_snapshots(&host).await;
        tell_next.send((id, first)).unwrap();
    });
    ran.unwrap();
    let (id, snapshot) = heard.recv().unwrap();
    fs::write(&file, &damaged).unwrap();
    let ran =
        bench.host_on(&two_nodes(MemoryPolicy::Bind), config(false), move |host| async move {
            eventually("it is taken over", async || host.connect(id, port(7)).await.is_ok()).await;
            let error = host.rollback(id, snapshot.clone()).await.unwrap_err().to_string();
            assert!(error.contains("no copy of its template's memory"), "{error}");
            assert!(error.contains("damaged at"), "{error}");
            assert_eq!(tell(&host, id, "look 10 4").await, "02020202", "it goes on as it was");
            fs::write(file, whole).unwrap();
            host.rollback(id, snapshot).await.unwrap();
            assert_ne!(tell(&host, id, "look 10 4").await, "02020202");
            assert!(tell(&host, id, "base").await.starts_with("/memfd:mica-replica"));
            host.kill(id).await.unwrap();
        });
    ran.unwrap();
}
