//! Snapshots of running sandboxes, sandboxes made of them, and rollbacks: what memory, disk and state
//! hold afterwards, page for page.
//!
//! Against the double, whose pages are told apart, read and put back as a guest's.

use std::time::Duration;

use mica_shards::{HostConfig, ShardError, rt};

use crate::common::{
    BASE_REGISTER, Bench, FRAMES, assert_memory, base_memory, memory, port, read_all, request, tell,
};
use crate::wait::eventually;

/// The memory that is `memory` with `count` frames from `first` on full of `byte`.
fn filled(mut memory: Vec<u8>, first: usize, count: usize, byte: u8) -> Vec<u8> {
    memory[first..first + count].fill(byte);
    memory
}

#[test]
fn a_snapshot_holds_what_was_and_the_sandbox_goes_on() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let made = host.create(request("agent")).await.unwrap();
        let id = made.id;
        tell(&host, id, "fill 10 40 3").await;
        tell(&host, id, "fill 150 30 9").await;
        tell(&host, id, "register 11").await;
        tell(&host, id, "disk first").await;
        let first = host.snapshot(id, Some("first".to_owned())).await.unwrap();
        assert_eq!((first.name.as_deref(), first.sandbox), (Some("first"), Some(id)));
        assert_eq!(first.template_id, made.template_id);
        let at_first = filled(filled(base_memory(), 10, 40, 3), 150, 30, 9);
        assert_memory(&memory(&host, id).await, &at_first, "it goes on as it was");
        tell(&host, id, "fill 0 20 4").await;
        tell(&host, id, "register 12").await;
        tell(&host, id, "disk second").await;
        let second = host.snapshot(id, None).await.unwrap();
        tell(&host, id, "fill 0 4096 5").await;

        let listed: Vec<String> =
            host.snapshots(Some(id)).await.unwrap().into_iter().map(|info| info.id).collect();
        assert_eq!(listed, [second.id.clone(), first.id.clone()], "the newest first");
        for (snapshot, expected, register, disk) in [
            (&first, at_first.clone(), "11", "first"),
            (&second, filled(at_first, 0, 20, 4), "12", "second"),
        ] {
            let copy = host.create(request(&snapshot.id)).await.unwrap();
            assert_eq!(copy.template_id, made.template_id);
            assert_memory(&memory(&host, copy.id).await, &expected, "memory");
            assert_eq!(tell(&host, copy.id, "register").await, register);
            assert_eq!(tell(&host, copy.id, "disk").await, disk);
            let about = read_all(&host, copy.id, 14).await;
            assert!(about.contains(&format!("id={}\n", copy.id)), "{about}");
            assert!(about.contains("new=true\n"), "{about}");
        }
        assert!(host.delete_snapshot(&first.id).await.unwrap());
        assert!(!host.delete_snapshot(&first.id).await.unwrap());
        assert!(host.delete_snapshot(&second.id).await.unwrap());
        let gone = host.create(request(&first.id)).await.unwrap_err();
        assert!(matches!(gone, ShardError::NoSuchTemplate(_)), "{gone:?}");
        // The template is none of theirs.
        assert!(!host.delete_snapshot(&made.template_id).await.unwrap());
        let third = host.snapshot(id, None).await.unwrap();
        assert!(host.delete_snapshot(&third.id).await.unwrap(), "it does not need the others");
    });
}

#[test]
fn a_rollback_puts_memory_disk_and_state_back() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        let mut times = Vec::new();
        for (number, line) in ["fill 10 40 3", "fill 150 30 9", "fill 0 4096 1"].iter().enumerate()
        {
            tell(&host, id, line).await;
            tell(&host, id, &format!("register {number}")).await;
            tell(&host, id, &format!("disk time-{number}")).await;
            let snapshot = host.snapshot(id, None).await.unwrap().id;
            times.push((snapshot, memory(&host, id).await, number));
        }
        let mut echo = host.connect(id, port(7)).await.unwrap();
        // Back, forth, and where it is already.
        for at in [0, 2, 1, 1, 0, 2, 0] {
            let (snapshot, expected, number) = &times[at];
            tell(&host, id, "fill 5 300 77").await;
            tell(&host, id, "disk elsewhere").await;
            host.rollback(id, snapshot.clone()).await.unwrap();
            assert_memory(&memory(&host, id).await, expected, &format!("at {at}"));
            assert_eq!(tell(&host, id, "register").await, number.to_string());
            assert_eq!(tell(&host, id, "disk").await, format!("time-{number}"));
            let about = read_all(&host, id, 14).await;
            assert!(about.contains("new=false\n"), "the same sandbox: {about}");
        }
        let mut rest = Vec::new();
        let ended = futures_lite::AsyncReadExt::read_to_end(&mut echo, &mut rest).await;
        assert!(ended.is_err() || rest.is_empty(), "streams of another time end");
        // A snapshot of after a rollback, and back to one of before.
        tell(&host, id, "fill 200 10 8").await;
        let now = memory(&host, id).await;
        let branch = host.snapshot(id, None).await.unwrap().id;
        host.rollback(id, times[2].0.clone()).await.unwrap();
        assert_memory(&memory(&host, id).await, &times[2].1, "memory");
        host.rollback(id, branch.clone()).await.unwrap();
        assert_memory(&memory(&host, id).await, &now, "memory");
        let copy = host.create(request(&branch)).await.unwrap().id;
        assert_memory(&memory(&host, copy).await, &now, "memory");
        for (snapshot, ..) in times {
            host.delete_snapshot(&snapshot).await.unwrap();
        }
        host.rollback(id, branch.clone()).await.unwrap();
        assert_memory(&memory(&host, id).await, &now, "it needs none of the others");
        host.delete_snapshot(&branch).await.unwrap();
    });
}

#[test]
fn a_page_that_was_given_back_shows_what_the_snapshot_holds() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        // In a captured page, in one of the base, and in one that was never written.
        tell(&host, id, "fill 10 30 3").await;
        tell(&host, id, "fill 120 4 6").await;
        let snapshot = host.snapshot(id, None).await.unwrap().id;
        let expected = memory(&host, id).await;
        // A balloon drops it: the page is not the guest's own any more, and what shows is the base.
        tell(&host, id, "forget 10 20").await;
        tell(&host, id, "forget 110 12").await;
        tell(&host, id, "forget 300 1").await;
        host.rollback(id, snapshot.clone()).await.unwrap();
        assert_memory(&memory(&host, id).await, &expected, "memory");
        // Again, where a rollback has mapped the snapshot itself.
        tell(&host, id, "forget 10 20").await;
        assert_memory(&memory(&host, id).await, &expected, "what is mapped shows");
        tell(&host, id, "fill 12 3 99").await;
        tell(&host, id, "forget 13 1").await;
        host.rollback(id, snapshot.clone()).await.unwrap();
        assert_memory(&memory(&host, id).await, &expected, "memory");
        host.delete_snapshot(&snapshot).await.unwrap();
    });
}

#[test]
fn a_rollback_goes_to_ones_own_snapshots_only() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let made = host.create(request("agent")).await.unwrap();
        let other = host.create(request("agent")).await.unwrap().id;
        let foreign = host.snapshot(other, None).await.unwrap().id;
        tell(&host, made.id, "fill 1 1 1").await;
        let error = host.rollback(made.id, foreign.clone()).await.unwrap_err();
        assert!(matches!(error, ShardError::ForeignSnapshot { .. }), "{error:?}");
        for nothing in ["0".repeat(20), "agent".to_owned(), String::new(), "../x".to_owned()] {
            let error = host.rollback(made.id, nothing).await.unwrap_err();
            assert!(matches!(error, ShardError::NoSuchSnapshot(_)), "{error:?}");
        }
        // Not to a template either: it is not a state of this sandbox.
        let error = host.rollback(made.id, made.template_id.clone()).await.unwrap_err();
        assert!(matches!(error, ShardError::NoSuchSnapshot(_)), "{error:?}");
        let expected = {
            let mut expected = base_memory();
            expected[1] = 1;
            expected
        };
        assert_memory(&memory(&host, made.id).await, &expected, "it goes on as it was");
        host.delete_snapshot(&foreign).await.unwrap();
    });
}

/// The layers of a snapshot: their inodes and lengths.
fn layers(store: &std::path::Path, snapshot: &str) -> std::collections::BTreeMap<u64, u64> {
    use std::os::unix::fs::MetadataExt;
    let files = std::fs::read_dir(store.join("snapshots").join(snapshot)).unwrap();
    let is_layer =
        |file: &std::fs::DirEntry| file.file_name().to_string_lossy().starts_with("memory.");
    let stats = files.map(Result::unwrap).filter(is_layer).map(|file| file.metadata().unwrap());
    stats.map(|stat| (stat.ino(), stat.len())).collect()
}

#[test]
fn the_next_snapshot_holds_only_what_was_written_since_whoever_tells() {
    for (mood, log_writes) in [("good", false), ("untracked", true)] {
        let bench = Bench::new();
        bench.set_mood(mood);
        let store = bench.store();
        let config = HostConfig { log_writes, capture_budget_mib: 16, ..bench.config() };
        let ended = bench.host_with(config, move |host| async move {
            let id = host.create(request("agent")).await.unwrap().id;
            tell(&host, id, "fill 200 2000 3").await;
            let first = host.snapshot(id, None).await.unwrap().id;
            tell(&host, id, "fill 500 20 4").await;
            let second = host.snapshot(id, None).await.unwrap().id;
            let (before, after) = (layers(&store, &first), layers(&store, &second));
            assert!(before.values().any(|bytes| *bytes >= 2000 * 4096), "{mood}: {before:?}");
            let new: Vec<u64> =
                after.iter().filter(|(id, _)| !before.contains_key(id)).map(|(_, b)| *b).collect();
            assert!(new.len() == 1 && new[0] < 60 * 4096, "{mood}: {new:?}");
            let copy = host.create(request(&second)).await.unwrap().id;
            let expected = filled(filled(base_memory(), 200, 2000, 3), 500, 20, 4);
            assert_memory(&memory(&host, copy).await, &expected, mood);
            // After a rollback the log starts anew.
            host.rollback(id, first.clone()).await.unwrap();
            tell(&host, id, "fill 700 30 5").await;
            let third = host.snapshot(id, None).await.unwrap().id;
            let copy = host.create(request(&third)).await.unwrap().id;
            let expected = filled(filled(base_memory(), 200, 2000, 3), 700, 30, 5);
            assert_memory(&memory(&host, copy).await, &expected, mood);
        });
        ended.unwrap();
    }
}

#[test]
fn a_log_that_cannot_be_is_no_log() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.set_mood("untracked");
    let config = HostConfig { log_writes: true, ..bench.config() };
    let ended = bench.host_with(config, move |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        let mut expected = base_memory();
        for (byte, mood) in [(1, "good"), (2, "log-too-long"), (3, "log-too-short"), (4, "good")] {
            places.set_mood(mood);
            let first = usize::from(byte) * 100;
            tell(&host, id, &format!("fill {first} 150 {byte}")).await;
            expected = filled(expected, first, 150, byte);
            let snapshot = host.snapshot(id, None).await.unwrap().id;
            places.set_mood("good");
            let copy = host.create(request(&snapshot)).await.unwrap().id;
            assert_memory(&memory(&host, copy).await, &expected, mood);
            host.kill(copy).await.unwrap();
        }
    });
    ended.unwrap();
}

#[test]
fn a_guest_that_writes_all_the_time_is_copied_as_it_was_at_one_moment() {
    for mood in ["good", "untracked"] {
        let bench = Bench::new();
        bench.set_mood(mood);
        // Less than it writes: the most is copied while it runs, where its writes can be told.
        let config = HostConfig { capture_budget_mib: 1, ..bench.config() };
        let ended = bench.host_with(config, |host| async move {
            let id = host.create(request("agent")).await.unwrap().id;
            tell(&host, id, "fill 1000 2500 1").await;
            tell(&host, id, "churn 1000 2500").await;
            for _ in 0..3 {
                let snapshot = host.snapshot(id, None).await.unwrap().id;
                let copy = host.create(request(&snapshot)).await.unwrap().id;
                let found = memory(&host, copy).await;
                // The guest goes through them in their order: a number, then the one before it.
                let churned = &found[1000..3500];
                let edges = churned.windows(2).filter(|pair| pair[0] != pair[1]).count();
                assert!(edges <= 1, "{churned:?}");
                let (first, last) = (churned[0], churned[2499]);
                assert!(first == last || first == last % 250 + 1, "{first} before {last}");
                assert_memory(&found[..1000], &base_memory()[..1000], "the rest");
                host.kill(copy).await.unwrap();
                host.delete_snapshot(&snapshot).await.unwrap();
            }
        });
        ended.unwrap();
    }
}

#[test]
fn many_captures_at_once_share_few_buffers() {
    let bench = Bench::new();
    bench.set_mood("good");
    let config = HostConfig { io_buffers: 4, capture_budget_mib: 64, ..bench.config() };
    let ended = bench.host_with(config, |host| async move {
        let mut ids = Vec::new();
        for byte in 1..=6 {
            let id = host.create(request("agent")).await.unwrap().id;
            tell(&host, id, &format!("fill 0 4000 {byte}")).await;
            ids.push((id, byte));
        }
        let start = |(id, byte): &(_, u8)| {
            let (host, id, byte) = (host.clone(), *id, *byte);
            rt::spawn(async move {
                let snapshot = host.snapshot(id, None).await.unwrap().id;
                let copy = host.create(request(&snapshot)).await.unwrap().id;
                let found = memory(&host, copy).await;
                assert!(found[..4000].iter().all(|found| *found == byte));
                host.delete_snapshot(&snapshot).await.unwrap();
            })
        };
        for task in ids.iter().map(start).collect::<Vec<_>>() {
            assert!(task.join().await.is_some(), "one panicked");
        }
    });
    ended.unwrap();
}

#[test]
fn a_chain_of_snapshots_may_be_long() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        let mut taken = Vec::new();
        for number in 1..=24u32 {
            tell(&host, id, &format!("fill {} 8 {number}", number * 20)).await;
            let snapshot = host.snapshot(id, None).await.unwrap().id;
            taken.push((snapshot, memory(&host, id).await));
        }
        for at in [3, 23, 11, 0] {
            host.rollback(id, taken[at].0.clone()).await.unwrap();
            assert_memory(&memory(&host, id).await, &taken[at].1, &format!("snapshot {at}"));
        }
        let copy = host.create(request(&taken[23].0)).await.unwrap().id;
        assert_memory(&memory(&host, copy).await, &taken[23].1, "memory");
        for (snapshot, _) in taken {
            host.delete_snapshot(&snapshot).await.unwrap();
        }
    });
}

#[test]
fn clones_come_whole_or_not_at_all_and_forks_each_for_itself() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        tell(&host, id, "fill 7 7 7").await;
        let expected = memory(&host, id).await;
        let clones = host.clone_sandbox(id, 3, Some(Duration::from_secs(60))).await.unwrap();
        assert_eq!(clones.len(), 3);
        for clone in clones {
            assert_memory(&memory(&host, clone.id).await, &expected, "memory");
            let life = clone.end_at.unwrap().duration_since(clone.started_at).unwrap();
            assert!(life <= Duration::from_secs(61), "{life:?}");
            host.kill(clone.id).await.unwrap();
        }
        assert!(host.snapshots(None).await.unwrap().is_empty(), "no snapshot of it is left");

        places.set_mood("bad-restore:2");
        let error = host.clone_sandbox(id, 3, None).await.unwrap_err();
        assert!(
            matches!(&error, ShardError::BootFailed { reason, .. } if reason.contains("no such"))
        );
        eventually("only the first one is left", async || places.cgroups().len() == 1).await;
        assert_eq!(host.list().await.unwrap().len(), 1);
        assert!(host.snapshots(None).await.unwrap().is_empty());

        places.set_mood("bad-restore:3");
        let forks = host.fork(id, 3, None).await.unwrap();
        assert_eq!(forks.iter().filter(|fork| fork.is_ok()).count(), 2, "{forks:?}");
        for fork in forks.into_iter().flatten() {
            assert_memory(&memory(&host, fork.id).await, &expected, "memory");
        }
        places.set_mood("never-freezes");
        assert!(host.snapshots(None).await.unwrap().is_empty());
        assert_eq!(host.list().await.unwrap().len(), 3);
    });
}

#[test]
fn what_a_new_sandbox_has_is_the_running_snapshots() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        // One that was made and changed does not show in the next.
        for _ in 0..2 {
            let id = host.create(request("agent")).await.unwrap().id;
            assert_memory(&memory(&host, id).await, &base_memory(), "memory");
            assert_eq!(tell(&host, id, "register").await, BASE_REGISTER.to_string());
            tell(&host, id, &format!("fill 0 {FRAMES} 200")).await;
            tell(&host, id, "register 1").await;
        }
    });
}
