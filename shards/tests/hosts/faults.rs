//! VM processes that misbehave, sandboxes that are killed, and a store that is full, in the middle of
//! each operation.
//!
//! Against the double, in all its moods. What is told apart: whether the sandbox goes on as it was, and
//! that nothing is left of one that does not.

use std::time::Duration;

use mica_shards::{Host, HostConfig, ShardError, rt};
use mica_units::SandboxId;

use crate::common::{Bench, Leftovers, assert_memory, memory, request, tell};
use crate::wait::eventually;

/// What is asked of a sandbox while something goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Snapshot,
    SnapshotDisk,
    Pause,
    Rollback,
}

const WISHES: [Wish; 4] = [Wish::Snapshot, Wish::SnapshotDisk, Wish::Pause, Wish::Rollback];
/// Those after which a snapshot is a client's.
const SNAPSHOTS: [Wish; 2] = [Wish::Snapshot, Wish::SnapshotDisk];

async fn ask(host: &Host, id: SandboxId, wish: Wish, back: &str) -> Result<(), ShardError> {
    match wish {
        Wish::Snapshot => host.snapshot(id, None).await.map(drop),
        Wish::SnapshotDisk => host.snapshot_disk(id, None).await.map(drop),
        Wish::Pause => host.pause(id).await,
        Wish::Rollback => host.rollback(id, back.to_owned()).await,
    }
}

/// A sandbox with a snapshot, and different from it.
async fn prepared(host: &Host) -> (SandboxId, String) {
    let id = host.create(request("agent")).await.unwrap().id;
    tell(host, id, "fill 10 40 3").await;
    let back = host.snapshot(id, None).await.unwrap().id;
    tell(host, id, "fill 30 200 5").await;
    tell(host, id, "disk later").await;
    (id, back)
}

#[test]
fn a_vm_process_that_breaks_off_an_operation_takes_its_sandbox_and_nothing_else() {
    let moods: &[(&str, &[Wish])] = &[
        ("never-freezes", &WISHES),
        ("dies-at-freeze", &WISHES),
        ("ends-at-freeze", &WISHES),
        ("dies-frozen", &WISHES),
        ("frozen-twice", &WISHES),
        ("thaws-unasked", &WISHES),
        ("garbage-when-frozen", &WISHES),
        ("never-thaws", &SNAPSHOTS),
        ("dies-at-thaw", &SNAPSHOTS),
        ("thaws-twice", &SNAPSHOTS),
        ("bad-rollback", &[Wish::Rollback]),
        ("dies-at-rollback", &[Wish::Rollback]),
        ("never-rolls-back", &[Wish::Rollback]),
        ("init-error", &[Wish::Rollback]),
        ("init-silent", &[Wish::Rollback]),
    ];
    let bench = Bench::new();
    let places = bench.clone();
    let config = HostConfig { boot_deadline: Duration::from_millis(1500), ..bench.config() };
    let ended = bench.host_with(config, move |host| async move {
        let bystander = host.create(request("agent")).await.unwrap().id;
        for (mood, wishes) in moods {
            for wish in *wishes {
                places.set_mood("good");
                let (id, back) = prepared(&host).await;
                places.set_mood(mood);
                let outcome = ask(&host, id, *wish, &back).await;
                // What was told before the VM process broke off is done: a pause has its copy.
                let told = outcome.is_ok();
                assert!(!told || *wish != Wish::Rollback, "{mood}, {wish:?}");
                if !told {
                    let gone = async || host.get(id).await.is_err();
                    eventually(&format!("{mood}, {wish:?}: it is gone"), gone).await;
                }
                places.set_mood("good");
                drop(host.kill(id).await);
                for snapshot in host.snapshots(Some(id)).await.unwrap() {
                    assert!(told || snapshot.id == back, "{mood}, {wish:?}: nobody was told of it");
                    host.delete_snapshot(&snapshot.id).await.unwrap();
                }
                let expected = Leftovers { cgroups: 1, sandboxes: 1, snapshots: 0 };
                let clean = async || places.leftovers() == expected;
                eventually(&format!("{mood}, {wish:?}: nothing is left"), clean).await;
            }
        }
        assert!(tell(&host, bystander, "look 100 1").await.starts_with("65"));
    });
    ended.unwrap();
}

#[test]
fn an_operation_that_cannot_be_done_leaves_the_sandbox_as_it_was() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        let (id, back) = prepared(&host).await;
        let expected = memory(&host, id).await;
        for mood in ["state-too-long", "state-longer-than-the-exchange", "state-empty"] {
            for wish in [Wish::Snapshot, Wish::Pause] {
                places.set_mood(mood);
                let error = ask(&host, id, wish, &back).await.unwrap_err();
                let failed = matches!(&error, ShardError::OperationFailed { .. });
                assert!(failed, "{mood}, {wish:?}: {error:?}");
                // At once: it is ready for the next thing.
                places.set_mood("good");
                assert_memory(&memory(&host, id).await, &expected, mood);
                assert_eq!(places.leftovers().snapshots, 1, "{mood}, {wish:?}");
            }
        }
        // What the failed ones had protected is in the next one.
        let snapshot = host.snapshot(id, None).await.unwrap().id;
        let copy = host.create(request(&snapshot)).await.unwrap().id;
        assert_memory(&memory(&host, copy).await, &expected, "in the copy");
        host.rollback(id, back.clone()).await.unwrap();
        host.rollback(id, snapshot.clone()).await.unwrap();
        assert_memory(&memory(&host, id).await, &expected, "back again");
        host.delete_snapshot(&back).await.unwrap();
        host.delete_snapshot(&snapshot).await.unwrap();
    });
}

#[test]
fn a_lie_about_where_memory_is_hurts_the_liar_alone() {
    for mood in ["memory-nowhere", "memory-elsewhere"] {
        let bench = Bench::new();
        let places = bench.clone();
        bench.host(mood, move |host| async move {
            let liar = host.create(request("agent")).await.unwrap().id;
            places.set_mood("good");
            for wish in [Wish::Rollback, Wish::Snapshot, Wish::Pause] {
                // Where nothing is mapped, nothing is found: that is a snapshot of its own lie.
                let outcome = ask(&host, liar, wish, &"0".repeat(20)).await;
                let nowhere = mood == "memory-nowhere";
                let fits = match &outcome {
                    Ok(()) => wish != Wish::Rollback && !nowhere,
                    Err(ShardError::OperationFailed { .. }) => nowhere,
                    Err(ShardError::NoSuchSnapshot(_)) => wish == Wish::Rollback && !nowhere,
                    Err(_) => false,
                };
                assert!(fits, "{mood}, {wish:?}: {outcome:?}");
            }
            for snapshot in host.snapshots(Some(liar)).await.unwrap() {
                host.delete_snapshot(&snapshot.id).await.unwrap();
            }
            host.kill(liar).await.unwrap();
            let honest = host.create(request("agent")).await.unwrap().id;
            let snapshot = host.snapshot(honest, None).await.unwrap().id;
            host.delete_snapshot(&snapshot).await.unwrap();
        });
    }
}

#[test]
fn a_kill_in_the_middle_of_an_operation_leaves_nothing() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        for wish in WISHES {
            for wait_ms in [0, 1, 2, 4, 7, 11, 16, 25, 40] {
                let (id, back) = prepared(&host).await;
                let asking = {
                    let (host, back) = (host.clone(), back.clone());
                    rt::spawn(async move { ask(&host, id, wish, &back).await })
                };
                rt::time::sleep(Duration::from_millis(wait_ms)).await;
                host.kill(id).await.unwrap();
                let outcome = asking.join().await.unwrap();
                let mut left = host.snapshots(Some(id)).await.unwrap();
                left.retain(|snapshot| snapshot.id != back);
                let told = outcome.is_ok() && SNAPSHOTS.contains(&wish);
                assert_eq!(left.len(), usize::from(told), "{wish:?} after {wait_ms} ms");
                for snapshot in left.iter().map(|snapshot| &snapshot.id).chain([&back]) {
                    host.delete_snapshot(snapshot).await.unwrap();
                }
                let clean = async || places.leftovers() == Leftovers::default();
                eventually(&format!("{wish:?} after {wait_ms} ms: nothing is left"), clean).await;
            }
        }
    });
}

#[test]
fn a_kill_in_the_middle_of_a_resume_leaves_nothing() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        for on_disk in [false, true] {
            for wait_ms in [0, 1, 3, 6, 12, 30, 60] {
                let id = host.create(request("agent")).await.unwrap().id;
                host.pause(id).await.unwrap();
                if on_disk {
                    places.pids().into_iter().for_each(crate::common::kill_process);
                }
                let resuming = {
                    let host = host.clone();
                    rt::spawn(async move { host.resume(id, Duration::from_secs(60), None).await })
                };
                rt::time::sleep(Duration::from_millis(wait_ms)).await;
                host.kill(id).await.unwrap();
                drop(resuming.join().await.unwrap());
                let clean = async || places.leftovers() == Leftovers::default();
                eventually(&format!("after {wait_ms} ms: nothing is left"), clean).await;
            }
        }
    });
}

#[test]
fn two_clients_at_once_get_one_operation_and_one_refusal() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        for first in WISHES {
            for second in WISHES {
                let (id, back) = prepared(&host).await;
                let start = |wish| {
                    let (host, back) = (host.clone(), back.clone());
                    rt::spawn(async move { ask(&host, id, wish, &back).await })
                };
                let (one, two) = (start(first), start(second));
                let outcomes = [one.join().await.unwrap(), two.join().await.unwrap()];
                let (done, refused): (Vec<_>, Vec<_>) =
                    outcomes.iter().partition(|outcome| outcome.is_ok());
                assert_eq!(done.len(), 1, "{first:?}, {second:?}: {outcomes:?}");
                let conflict = matches!(
                    refused[0],
                    Err(ShardError::Conflict { .. }
                        | ShardError::AlreadyPaused(_)
                        | ShardError::IsPaused(_))
                );
                assert!(conflict, "{first:?}, {second:?}: {outcomes:?}");
                host.kill(id).await.unwrap();
                for snapshot in host.snapshots(None).await.unwrap() {
                    host.delete_snapshot(&snapshot.id).await.unwrap();
                }
            }
        }
    });
}

#[test]
fn a_full_store_is_said_and_the_sandbox_goes_on() {
    let bench = Bench::on_small_disk(48);
    let places = bench.clone();
    bench.host("good", move |host| async move {
        let (id, back) = prepared(&host).await;
        tell(&host, id, "fill 1000 3000 6").await;
        let expected = memory(&host, id).await;
        let ballast = places.store().join("ballast");
        std::fs::write(&ballast, vec![1; 64 << 20]).unwrap_err();
        for wish in [Wish::Snapshot, Wish::Pause] {
            for _ in 0..2 {
                let error = ask(&host, id, wish, &back).await.unwrap_err();
                assert!(matches!(error, ShardError::NoSpace), "{wish:?}: {error:?}");
                assert_memory(&memory(&host, id).await, &expected, "it goes on");
                assert_eq!(places.leftovers().snapshots, 1, "{wish:?}");
            }
        }
        let error = host.create(request("agent")).await.unwrap_err();
        assert!(matches!(error, ShardError::NoSpace), "{error:?}");
        let error = host.create(request(&back)).await.unwrap_err();
        assert!(matches!(error, ShardError::NoSpace), "{error:?}");
        let error = host.clone_sandbox(id, 2, None).await.unwrap_err();
        assert!(matches!(error, ShardError::NoSpace), "{error:?}");
        let before = Leftovers { cgroups: 1, sandboxes: 1, snapshots: 1 };
        eventually("nothing is left of them", async || places.leftovers() == before).await;

        std::fs::remove_file(&ballast).unwrap();
        let snapshot = host.snapshot(id, None).await.unwrap().id;
        let copy = host.create(request(&snapshot)).await.unwrap().id;
        assert_memory(&memory(&host, copy).await, &expected, "nothing was missed");
        host.pause(id).await.unwrap();
        for snapshot in [&back, &snapshot] {
            host.delete_snapshot(snapshot).await.unwrap();
        }
        host.kill(id).await.unwrap();
    });
}

#[test]
fn a_rollback_in_a_full_store_is_done_or_is_not() {
    let bench = Bench::on_small_disk(48);
    let places = bench.clone();
    bench.host("good", move |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        tell(&host, id, "disk first").await;
        let first = host.snapshot(id, None).await.unwrap().id;
        let at_first = memory(&host, id).await;
        tell(&host, id, "fill 0 100 8").await;
        tell(&host, id, "disk second").await;
        let at_second = memory(&host, id).await;
        std::fs::write(places.store().join("ballast"), vec![1; 64 << 20]).unwrap_err();
        let outcome = host.rollback(id, first.clone()).await;
        std::fs::remove_file(places.store().join("ballast")).unwrap();
        let life = Duration::from_secs(60);
        let (_, was_paused) = host.ensure_running(id, life).await.unwrap();
        let (expected, disk) = match &outcome {
            Err(ShardError::NoSpace) => (&at_second, "second"),
            // Paused half way, it went on to where it was going.
            Err(ShardError::OperationFailed { .. }) if was_paused => (&at_first, "first"),
            Ok(()) => (&at_first, "first"),
            Err(other) => panic!("{other:?}"),
        };
        assert_memory(&memory(&host, id).await, expected, &format!("{outcome:?}"));
        assert_eq!(tell(&host, id, "disk").await, disk, "{outcome:?}");
        host.delete_snapshot(&first).await.unwrap();
    });
}
