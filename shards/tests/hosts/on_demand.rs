//! Guests whose pages come when they are touched: what they hold, what is captured of them, and what a
//! rollback and the next daemon make of them.
//!
//! Against the double, whose memory is registered with a userfaultfd as a guest's. Refuses to touch what it
//! need not: most of a test's memory is missing until it looks.

use mica_shards::{Host, HostConfig};
use mica_units::SandboxId;

use crate::common::{Bench, assert_memory, base_memory, bytes, memory, port, request, tell};
use crate::daemon::Daemon;
use crate::wait::eventually;

/// Above this an image is restored on demand; what is written below makes one larger than it.
const OVER_MIB: u32 = 1;

/// A memory with `count` frames from `first` on full of `byte`.
fn filled(mut memory: Vec<u8>, first: usize, count: usize, byte: u8) -> Vec<u8> {
    memory[first..first + count].fill(byte);
    memory
}

/// A snapshot that is restored on demand, and its memory.
async fn large(host: &Host) -> (String, Vec<u8>) {
    let id = host.create(request("agent")).await.unwrap().id;
    tell(host, id, "fill 200 1000 7").await;
    let snapshot = host.snapshot(id, None).await.unwrap().id;
    host.kill(id).await.unwrap();
    (snapshot, filled(base_memory(), 200, 1000, 7))
}

/// Ends everything, so that the bench finds nothing left.
async fn clear(host: &Host) {
    for sandbox in host.list().await.unwrap() {
        host.kill(sandbox.id).await.unwrap();
    }
    for snapshot in host.snapshots(None).await.unwrap() {
        host.delete_snapshot(&snapshot.id).await.unwrap();
    }
}

fn on_demand(bench: &Bench) -> HostConfig {
    HostConfig { on_demand_over_mib: OVER_MIB, ..bench.config() }
}

/// How many frames of a sandbox are in memory.
async fn resident_frames(host: &Host, id: SandboxId) -> usize {
    let process = host.bench_process_of(id).await.unwrap();
    let text = std::fs::read_to_string(format!("/proc/{}/smaps", process.pid)).unwrap();
    let in_memory = |line: &str| -> Option<usize> {
        line.strip_prefix("Rss:")?.trim().strip_suffix(" kB")?.trim().parse().ok()
    };
    text.lines().filter_map(in_memory).sum::<usize>() / 4
}

#[test]
fn pages_come_when_they_are_touched_and_captures_miss_none() {
    let bench = Bench::new();
    let ended = bench.host_with(on_demand(&bench), |host| async move {
        let (snapshot, expected) = large(&host).await;
        let untouched = host.create(request(&snapshot)).await.unwrap().id;
        let touched = host.create(request(&snapshot)).await.unwrap().id;
        assert_memory(&memory(&host, touched).await, &expected, "all of it");
        let (some, all) =
            (resident_frames(&host, untouched).await, resident_frames(&host, touched).await);
        assert!(some + 900 < all, "{some} frames are there before anyone looks, {all} after");
        // Of a guest that misses most of its memory.
        tell(&host, untouched, "fill 190 20 9").await;
        tell(&host, untouched, "forget 205 10").await;
        let next = host.snapshot(untouched, None).await.unwrap().id;
        let copy = host.create(request(&next)).await.unwrap().id;
        let now = memory(&host, untouched).await;
        assert_memory(&now[..205], &filled(expected.clone(), 190, 20, 9)[..205], "written");
        assert_memory(&now[215..], &expected[215..], "not written");
        let copied = memory(&host, copy).await;
        assert_memory(&copied[..205], &now[..205], "the copy's written pages");
        assert_memory(&copied[215..], &now[215..], "the copy's other pages");
        clear(&host).await;
    });
    ended.unwrap();
}

#[test]
fn one_goes_back_with_most_of_its_memory_missing() {
    let bench = Bench::new();
    let ended = bench.host_with(on_demand(&bench), |host| async move {
        let (snapshot, expected) = large(&host).await;
        let id = host.create(request(&snapshot)).await.unwrap().id;
        tell(&host, id, "fill 10 40 3").await;
        let then = filled(expected, 10, 40, 3);
        let mark = host.snapshot(id, None).await.unwrap().id;
        tell(&host, id, "fill 20 300 4").await;
        host.rollback(id, mark.clone()).await.unwrap();
        // Given back and read again it shows something, and nobody waits for ever.
        tell(&host, id, "forget 3000 100").await;
        assert_memory(&memory(&host, id).await, &then, "after a rollback");
        tell(&host, id, "fill 600 10 5").await;
        let later = host.snapshot(id, None).await.unwrap().id;
        host.rollback(id, mark).await.unwrap();
        assert_memory(&memory(&host, id).await, &then, "after another");
        let copy = host.create(request(&later)).await.unwrap().id;
        let at_later = filled(then, 600, 10, 5);
        assert_memory(&memory(&host, copy).await, &at_later, "what was captured between");
        clear(&host).await;
    });
    ended.unwrap();
}

#[test]
fn the_next_daemon_brings_in_what_is_missing() {
    for goes_back in [false, true] {
        let bench = Bench::new();
        let mut daemon = Daemon::start_with(&bench, false, OVER_MIB, false);
        let first = daemon.tell("create agent");
        daemon.tell(&format!("tell {first} fill 200 1000 7"));
        let snapshot = daemon.tell(&format!("snapshot {first}"));
        daemon.tell(&format!("kill {first}"));
        let id = daemon.tell(&format!("create {snapshot}"));
        daemon.tell(&format!("tell {id} fill 10 40 3"));
        let mark = daemon.tell(&format!("snapshot {id}"));
        if goes_back {
            daemon.tell(&format!("tell {id} fill 30 200 4"));
            daemon.tell(&format!("rollback {id} {mark}"));
        }
        daemon.kill();
        let expected = filled(filled(base_memory(), 200, 1000, 7), 10, 40, 3);
        let mut daemon = Daemon::start_with(&bench, false, OVER_MIB, false);
        let look = format!("tell {id} look 0 4096");
        assert_memory(&bytes(&daemon.tell(&look)), &expected, "after the takeover");
        daemon.tell(&format!("tell {id} fill 400 50 6"));
        daemon.tell(&format!("rollback {id} {mark}"));
        assert_memory(&bytes(&daemon.tell(&look)), &expected, "back again");
        daemon.kill();
        let ended = bench.host_with(on_demand(&bench), move |host| async move {
            let id: SandboxId = id.parse().unwrap();
            let there = async || host.connect(id, port(7)).await.is_ok();
            eventually("it is there", there).await;
            assert_memory(&memory(&host, id).await, &expected, "once more");
            clear(&host).await;
        });
        ended.unwrap();
    }
}
