//! Rounds of every kind of life, and the counts of everything before and after.
//!
//! Run by `cargo test`, alone in its process: it counts what the whole process holds.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "hosts/common.rs"]
#[expect(dead_code, reason = "the other tests need the rest")]
mod common;
#[path = "hosts/wait.rs"]
mod wait;

use common::{Bench, Leftovers, Places, kill_process, port, request, tell};
use mica_shards::{Host, rt};
use mica_units::SandboxId;
use wait::eventually;

/// The life that a resume gives.
const LIFE: std::time::Duration = std::time::Duration::from_secs(600);

/// Rounds that are counted, and those before.
const ROUNDS: u32 = 20;
const FIRST_ROUNDS: u32 = 8;

/// What was written a moment ago is looked up again, so it takes more than once until all is open.
const WARM_UPS_MAX: u32 = 4;

/// What this process and the machine hold for it.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    processes: usize,
    descriptors: usize,
    threads: usize,
    left: Leftovers,
}

fn held(places: &Places) -> Held {
    let mut descriptors = links("/proc/self/fd");
    // A shard makes its rings when it starts. As long as it waits for one it holds that twice.
    descriptors.retain(|link| link != "anon_inode:[io_uring]");
    Held {
        processes: children(),
        // One is the directory that is being read.
        descriptors: descriptors.len(),
        threads: threads(),
        left: places.leftovers(),
    }
}

/// What the descriptors of a process are.
fn links(path: &str) -> Vec<String> {
    let links = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    // One may be closed while it is looked at.
    let read = links.filter_map(|link| std::fs::read_link(link).ok());
    read.map(|link| link.to_string_lossy().into_owned()).collect()
}

/// Threads of this process. The kernel's own for its rings come and go.
fn threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.join("comm")).ok());
    names.filter(|name| !name.starts_with("iou-")).count()
}

/// Live or unreaped children of this process, of all its threads.
fn children() -> usize {
    let count = |path: &std::path::Path| {
        std::fs::read_to_string(path).map(|text| text.split_whitespace().count()).unwrap_or(0)
    };
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.map(|task| count(&task.unwrap().path().join("children"))).sum()
}

/// Every operation once, and some that fail.
async fn work_with(host: &Host, places: &Places, id: SandboxId, round: u32) {
    tell(host, id, "fill 10 40 3").await;
    let snapshot = host.snapshot(id, None).await.unwrap().id;
    tell(host, id, "fill 20 40 4").await;
    host.rollback(id, snapshot.clone()).await.unwrap();
    assert!(host.rollback(id, "0".repeat(20)).await.is_err());
    let copies = host.clone_sandbox(id, 2, None).await.unwrap();
    for copy in copies {
        host.kill(copy.id).await.unwrap();
    }
    host.pause(id).await.unwrap();
    if round.is_multiple_of(2) {
        // A process that dies while its sandbox waits: it is resumed from disk.
        for pid in places.pids() {
            kill_process(pid);
        }
        eventually("its process is taken back", async || places.cgroups().is_empty()).await;
    }
    // A process that was just being made for it may have died with the others.
    eventually("it goes on", async || host.resume(id, LIFE, None).await.is_ok()).await;
    assert!(host.delete_snapshot(&snapshot).await.unwrap());
}

async fn one_round(host: &Host, places: &Places, round: u32) {
    let id = host.create(request("agent")).await.unwrap().id;
    let echo = host.connect(id, port(7)).await.unwrap();
    assert!(host.connect(id, port(8080)).await.is_err());
    work_with(host, places, id, round).await;
    match round % 3 {
        // By the host, with a stream open.
        0 => host.kill(id).await.unwrap(),
        // By its guest.
        1 => {
            assert!(host.connect(id, port(9)).await.is_err());
            eventually("the guest is gone", async || host.get(id).await.is_err()).await;
        }
        // By its time.
        _ => {
            host.set_timeout(id, std::time::Duration::ZERO).await.unwrap();
            eventually("its time is over", async || host.get(id).await.is_err()).await;
        }
    }
    drop(echo);
    // One that fails, and one whose maker goes away.
    assert!(host.create(request("nothing")).await.is_err());
    let wait = std::time::Duration::from_millis(u64::from(round % 5));
    if let Ok(made) = rt::time::timeout(wait, host.create(request("agent"))).await {
        host.kill(made.unwrap().id).await.unwrap();
    }
}

#[test]
fn many_rounds_leave_nothing() {
    let bench = Bench::new();
    let places = bench.clone();
    let before_all = held(&bench);
    bench.host("good", move |host| async move {
        // The first rounds make what stays: lazily made descriptors and threads, images that both
        // shards keep open.
        let mut before = None;
        for _ in 0..WARM_UPS_MAX {
            for round in 0..FIRST_ROUNDS {
                one_round(&host, &places, round).await;
            }
            eventually("it is quiet", async || held(&places).processes == 0).await;
            rt::time::sleep(std::time::Duration::from_millis(50)).await;
            if before.replace(held(&places)) == Some(held(&places)) {
                break;
            }
        }
        let before = before.unwrap();
        assert_eq!((before.processes, before.left), (0, Leftovers::default()));
        for round in 0..ROUNDS {
            one_round(&host, &places, round).await;
        }
        eventually("all is as before", async || {
            let now = held(&places);
            if now != before {
                eprintln!("{now:?} instead of {before:?}");
            }
            now == before
        })
        .await;
    });
    // Not the descriptors: an executor does not drop the tasks it ends with, and glommio 0.9 never
    // closes its eventfd. A daemon's executors end with its process.
    let after_all = || Held { descriptors: before_all.descriptors, ..held(&bench) };
    // A thread that was joined is listed for a moment longer.
    let begun = std::time::Instant::now();
    while after_all() != before_all && begun.elapsed() < std::time::Duration::from_secs(10) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(after_all(), before_all);
}
