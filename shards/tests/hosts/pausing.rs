//! Pausing and resuming: in the process, from disk, at the end of a sandbox's time, and what a paused
//! sandbox survives.
//!
//! Against the double.

use std::time::Duration;

use mica_shards::{ConnectError, Host, HostConfig, Lifecycle, OnTimeout, ShardError, rt};
use mica_units::SandboxId;

use crate::common::{
    Bench, Leftovers, Places, assert_memory, kill_process, memory, port, read_all, request, tell,
};
use crate::wait::eventually;

const LIFE: Duration = Duration::from_secs(600);

/// A sandbox with something in it; what its memory is.
async fn written(host: &Host) -> (SandboxId, Vec<u8>) {
    let id = host.create(request("agent")).await.unwrap().id;
    tell(host, id, "fill 10 40 3").await;
    tell(host, id, "fill 110 3 4").await;
    tell(host, id, "register 21").await;
    tell(host, id, "disk written").await;
    (id, memory(host, id).await)
}

async fn is_as_written(host: &Host, id: SandboxId, expected: &[u8]) {
    assert_memory(&memory(host, id).await, expected, "after the resume");
    assert_eq!(tell(host, id, "register").await, "21");
    assert_eq!(tell(host, id, "disk").await, "written");
}

/// Ends the process of the one sandbox that is paused, and waits until it is on disk alone.
async fn without_process(places: &Places) {
    for pid in places.pids() {
        kill_process(pid);
    }
    eventually("its process is taken back", async || places.cgroups().is_empty()).await;
}

#[test]
fn a_paused_sandbox_goes_on_where_it_was() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        let (id, expected) = written(&host).await;
        for on_disk in [false, true, true, false] {
            host.pause(id).await.unwrap();
            let info = host.get(id).await.unwrap();
            assert_eq!(info.state, Lifecycle::Paused);
            assert_eq!(host.list().await.unwrap().len(), 1);
            let refused = host.connect(id, port(7)).await.unwrap_err();
            assert_eq!(refused, ConnectError::IsPaused(id));
            for (refusal, what) in [
                (host.pause(id).await.unwrap_err(), "pause"),
                (host.snapshot(id, None).await.unwrap_err(), "snapshot"),
                (host.rollback(id, "0".repeat(20)).await.unwrap_err(), "rollback"),
            ] {
                let fits = match refusal {
                    ShardError::AlreadyPaused(_) => what == "pause",
                    ShardError::IsPaused(_) => what != "pause",
                    _ => false,
                };
                assert!(fits, "{what}: {refusal:?}");
            }
            if on_disk {
                without_process(&places).await;
            }
            let resumed = host.resume(id, LIFE, None).await.unwrap();
            assert_eq!((resumed.id, resumed.state), (id, Lifecycle::Running));
            is_as_written(&host, id, &expected).await;
            let about = read_all(&host, id, 14).await;
            assert!(about.contains("new=false\n"), "{about}");
            let again = host.resume(id, LIFE, None).await.unwrap_err();
            assert!(matches!(again, ShardError::AlreadyRunning(_)), "{again:?}");
            let (_, was_paused) = host.ensure_running(id, LIFE).await.unwrap();
            assert!(!was_paused);
        }
        assert!(host.snapshots(None).await.unwrap().is_empty(), "a pause is no client's snapshot");
        eventually("no snapshot of a pause is left", async || places.leftovers().snapshots == 0)
            .await;
        host.pause(id).await.unwrap();
        host.kill(id).await.unwrap();
        assert_eq!(places.leftovers(), Leftovers::default(), "a paused one can be killed");
    });
}

#[test]
fn what_is_written_after_a_resume_is_in_the_next_snapshot() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        let (id, _) = written(&host).await;
        for round in 0..6u8 {
            let from = 10 + u32::from(round) * 7;
            tell(&host, id, &format!("fill {from} 11 {}", 100 + round)).await;
            let expected = memory(&host, id).await;
            host.pause(id).await.unwrap();
            if round % 2 == 0 {
                without_process(&places).await;
            }
            host.resume(id, LIFE, None).await.unwrap();
            assert_memory(&memory(&host, id).await, &expected, "after the resume");
            let snapshot = host.snapshot(id, None).await.unwrap().id;
            let copy = host.create(request(&snapshot)).await.unwrap().id;
            assert_memory(&memory(&host, copy).await, &expected, "in the copy");
            host.kill(copy).await.unwrap();
            tell(&host, id, "fill 0 4096 9").await;
            host.rollback(id, snapshot.clone()).await.unwrap();
            assert_memory(&memory(&host, id).await, &expected, "after the rollback");
            host.delete_snapshot(&snapshot).await.unwrap();
        }
    });
}

#[test]
fn at_the_end_of_its_time_it_is_paused_if_that_was_wished_for() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let mut wish = request("agent");
        wish.timeout = Duration::from_millis(100);
        wish.on_timeout = OnTimeout::Pause;
        let id = host.create(wish).await.unwrap().id;
        let is_paused =
            async || host.get(id).await.is_ok_and(|info| info.state == Lifecycle::Paused);
        eventually("it is paused", is_paused).await;
        let (_, was_paused) = host.ensure_running(id, Duration::from_millis(100)).await.unwrap();
        assert!(was_paused);
        eventually("it is paused again", is_paused).await;
        // What is to happen can be changed.
        let life = Duration::from_millis(100);
        host.resume(id, life, Some(OnTimeout::Kill)).await.unwrap();
        eventually("it is gone", async || host.get(id).await.is_err()).await;
    });
}

#[test]
fn a_resume_that_fails_leaves_it_paused_and_can_be_tried_again() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.set_mood("good");
    let config = HostConfig { boot_deadline: Duration::from_millis(700), ..bench.config() };
    let ended = bench.host_with(config, move |host| async move {
        let (id, expected) = written(&host).await;
        host.pause(id).await.unwrap();
        // In its process first; from then on from disk.
        for mood in [
            "never-thaws",
            "bad-restore",
            "eof-at-restore",
            "never-starts",
            "never-built",
            "silent",
            "not-built",
            "exit-at-once",
            "init-error",
            "init-silent",
            "panics",
            "starts-twice",
        ] {
            places.set_mood(mood);
            let error = loop {
                // The process that the last try was given up for may not be there yet.
                match host.resume(id, LIFE, None).await.unwrap_err() {
                    ShardError::Conflict { .. } => {
                        rt::time::sleep(Duration::from_millis(5)).await;
                    }
                    error => break error,
                }
            };
            let told =
                matches!(error, ShardError::OperationFailed { .. } | ShardError::BootFailed { .. });
            assert!(told, "{mood}: {error:?}");
            let info = host.get(id).await.unwrap();
            assert_eq!(info.state, Lifecycle::Paused, "{mood}");
        }
        places.set_mood("good");
        eventually("it goes on", async || host.resume(id, LIFE, None).await.is_ok()).await;
        is_as_written(&host, id, &expected).await;
        // And a thaw that ends the process.
        host.pause(id).await.unwrap();
        for mood in ["dies-at-thaw", "thaws-twice"] {
            places.set_mood(mood);
            host.resume(id, LIFE, None).await.unwrap_err();
            places.set_mood("good");
            eventually("it goes on", async || host.resume(id, LIFE, None).await.is_ok()).await;
            is_as_written(&host, id, &expected).await;
            host.pause(id).await.unwrap();
        }
        host.kill(id).await.unwrap();
        assert_eq!(places.leftovers(), Leftovers::default());
    });
    ended.unwrap();
}

#[test]
fn a_resume_waits_for_a_process_that_is_being_given_back() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        let (id, expected) = written(&host).await;
        host.pause(id).await.unwrap();
        for pid in places.pids() {
            kill_process(pid);
        }
        // At once: its end may or may not have been seen.
        eventually("it goes on", async || host.resume(id, LIFE, None).await.is_ok()).await;
        is_as_written(&host, id, &expected).await;
    });
}

#[test]
fn when_memory_is_short_frozen_processes_go_the_longest_paused_first() {
    let bench = Bench::new();
    bench.set_mood("good");
    let places = bench.clone();
    // More than any machine has: it is always short.
    let config = HostConfig { memory_reserve_mib: u32::MAX, ..bench.config() };
    let ended = bench.host_with(config, move |host| async move {
        let (first, expected) = written(&host).await;
        let (second, _) = written(&host).await;
        let (third, _) = written(&host).await;
        host.pause(first).await.unwrap();
        host.pause(second).await.unwrap();
        eventually("both are on disk alone", async || places.cgroups().len() == 1).await;
        assert_eq!(host.get(third).await.unwrap().state, Lifecycle::Running, "that runs");
        host.resume(first, LIFE, None).await.unwrap();
        is_as_written(&host, first, &expected).await;
    });
    ended.unwrap();
}

#[test]
fn paused_ones_without_a_process_take_no_room() {
    let bench = Bench::new();
    bench.set_mood("good");
    let places = bench.clone();
    let config = HostConfig { sandboxes_max: 2, ..bench.config() };
    let ended = bench.host_with(config, move |host| async move {
        let mut paused = Vec::new();
        for _ in 0..3 {
            let id = host.create(request("agent")).await.unwrap().id;
            host.pause(id).await.unwrap();
            without_process(&places).await;
            paused.push(id);
        }
        // Its process may count for a moment longer.
        let mut running = Vec::new();
        while running.len() < 2 {
            match host.create(request("agent")).await {
                Ok(info) => running.push(info.id),
                Err(ShardError::AtCapacity { .. }) => {
                    rt::time::sleep(Duration::from_millis(5)).await;
                }
                Err(other) => panic!("{other:?}"),
            }
        }
        for id in &paused {
            let full = host.resume(*id, LIFE, None).await.unwrap_err();
            assert!(matches!(full, ShardError::AtCapacity { .. }), "{full:?}");
            assert_eq!(host.get(*id).await.unwrap().state, Lifecycle::Paused);
        }
    });
    ended.unwrap();
}

#[test]
fn a_drain_keeps_what_is_paused_and_ends_what_runs() {
    let bench = Bench::new();
    bench.set_mood("good");
    let (send, receive) = std::sync::mpsc::channel();
    let ended = bench.host_with(bench.config(), move |host| async move {
        let (paused, expected) = written(&host).await;
        let running = host.create(request("agent")).await.unwrap().id;
        host.pause(paused).await.unwrap();
        send.send((paused, running, expected)).unwrap();
    });
    ended.unwrap();
    let (paused, running, expected) = receive.recv().unwrap();
    assert_eq!(bench.leftovers(), Leftovers { cgroups: 1, sandboxes: 1, snapshots: 1 });
    let places = bench.clone();
    bench.host("good", move |host| async move {
        assert!(host.get(running).await.is_err());
        let info = host.get(paused).await.unwrap();
        assert_eq!((info.state, &*info.metadata["who"]), (Lifecycle::Paused, "a test"));
        assert_eq!(places.cgroups().len(), 1, "with its process");
        eventually("it goes on", async || host.resume(paused, LIFE, None).await.is_ok()).await;
        is_as_written(&host, paused, &expected).await;
        host.kill(paused).await.unwrap();
    });
}
