//! Fifty rounds of every kind of life, and the counts of everything before and after.
//!
//! Run by `cargo test`, alone in its process: it counts what the whole process holds.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod wait;

use common::{Bench, Places, request};
use mica_shards::{Host, rt};
use mica_units::GuestPort;
use wait::eventually;

/// What this process and the machine hold for it.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    processes: usize,
    descriptors: usize,
    threads: usize,
    cgroups: usize,
    disks: usize,
}

fn held(places: &Places) -> Held {
    let count = |path: &str| std::fs::read_dir(path).unwrap().count();
    let left = places.leftovers();
    Held {
        processes: children(),
        // One is the directory that is being read.
        descriptors: count("/proc/self/fd"),
        threads: count("/proc/self/task"),
        cgroups: left.cgroups,
        disks: left.disks,
    }
}

/// Live or unreaped children of this process, of all its threads.
fn children() -> usize {
    let count = |path: &std::path::Path| {
        std::fs::read_to_string(path).map(|text| text.split_whitespace().count()).unwrap_or(0)
    };
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.map(|task| count(&task.unwrap().path().join("children"))).sum()
}

async fn one_round(host: &Host, round: u32) {
    let id = host.create(request("agent")).await.unwrap().id;
    let echo = host.connect(id, GuestPort::new(7).unwrap()).await.unwrap();
    assert!(host.connect(id, GuestPort::new(8080).unwrap()).await.is_err());
    match round % 3 {
        // By the host, with a stream open.
        0 => host.kill(id).await.unwrap(),
        // By its guest.
        1 => {
            assert!(host.connect(id, GuestPort::new(9).unwrap()).await.is_err());
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
fn fifty_rounds_leave_nothing() {
    let bench = Bench::new();
    let places = bench.clone();
    let before_all = held(&bench);
    bench.host("good", move |host| async move {
        // The first round makes what stays: lazily made descriptors and threads.
        one_round(&host, 0).await;
        eventually("it is quiet", async || held(&places).processes == 0).await;
        rt::time::sleep(std::time::Duration::from_millis(50)).await;
        let before = held(&places);
        assert_eq!((before.processes, before.cgroups, before.disks), (0, 0, 0));
        for round in 0..50 {
            one_round(&host, round).await;
        }
        eventually("all is as before", async || {
            let now = held(&places);
            if now != before {
                eprintln!("{now:?}");
            }
            now == before
        })
        .await;
    });
    let after_all = held(&bench);
    // Not the descriptors: an executor does not drop the tasks it ends with, and glommio 0.9 never
    // closes its eventfd. A daemon's executors end with its process.
    let descriptors = after_all.descriptors;
    assert_eq!(after_all, Held { descriptors, ..before_all });
}
