//! Creates that fail at each of their steps, are cancelled, or find no room.
//!
//! Against the double, in all its moods. After each, nothing may be left.

use std::time::Duration;

use mica_shards::{HostConfig, RunError, ShardError, rt};

use crate::common::{Bench, Leftovers, request};
use crate::wait::eventually;

/// Creates one sandbox with the double in this mood, expects failure, and checks what is left.
fn failure(mood: &'static str, boot_deadline: Duration) -> ShardError {
    let bench = Bench::new();
    bench.set_mood(mood);
    let config = HostConfig { boot_deadline, ..bench.config() };
    let (send, receive) = std::sync::mpsc::channel();
    let places = bench.clone();
    let ended = bench.host_with(config, move |host| async move {
        let error = host.create(request("agent")).await.unwrap_err();
        assert!(host.list().await.unwrap().is_empty());
        eventually("nothing is left", async || places.leftovers() == Leftovers::default()).await;
        send.send(error).unwrap();
    });
    ended.unwrap();
    assert_eq!(bench.leftovers(), Leftovers::default(), "{mood}");
    receive.recv().unwrap()
}

fn reason(mood: &'static str) -> (String, String) {
    match failure(mood, Duration::from_secs(20)) {
        ShardError::BootFailed { reason, console_tail } => (reason, console_tail),
        other => panic!("{mood}: {other:?}"),
    }
}

#[test]
fn a_vm_process_that_fails_says_why() {
    for (mood, expected, complaint) in [
        ("exit-at-once", "first word", "the jail cannot be closed"),
        // Its end is seen by whatever is done with it next.
        ("exit-before-the-jail", "", "no right to be jailed"),
    ] {
        let (reason, _) = reason(mood);
        assert!(reason.contains(expected), "{reason}");
        assert!(reason.contains(complaint), "{reason}");
        assert!(!reason.contains('\x1b'), "{reason:?}");
    }
}

#[test]
fn every_failing_step_is_named() {
    for (mood, expected) in [
        ("garbage", "no event"),
        ("too-long", "too long"),
        ("out-of-turn", "protocol"),
        ("not-built", "KVM has no more"),
        ("second-built", "protocol"),
        ("eof-at-restore", "closed its control socket"),
        ("bad-restore", "no such state"),
        ("panics", "reset"),
        ("init-refused", "nothing listens"),
        ("init-error", "no disk here"),
        ("init-garbage", "no answer"),
        ("init-flood", "too long"),
        ("init-hangs-up", "closed the connection"),
    ] {
        let (reason, _) = reason(mood);
        assert!(reason.contains(expected), "{mood}: {reason}");
    }
}

#[test]
fn the_end_of_the_console_comes_with_the_error() {
    let (_, tail) = reason("panics");
    assert_eq!(tail, "hello from the console\nKernel panic - not syncing: no init found\n");
}

/// Longer than a busy machine takes for a step, and short.
const DEADLINE: Duration = Duration::from_millis(1500);

#[test]
fn a_step_that_takes_too_long_is_given_up_where_it_was() {
    for (mood, expected) in [
        ("silent", "its process"),
        ("deaf", "its process"),
        ("never-built", "its process"),
        ("never-starts", "bring the guest up"),
        ("init-silent", "agent in the guest"),
    ] {
        match failure(mood, DEADLINE) {
            ShardError::BootTimedOut { step, deadline, .. } => {
                assert!(step.contains(expected), "{mood}: {step}");
                assert_eq!(deadline, DEADLINE);
            }
            // The making of a process has a deadline of its own that may come first.
            ShardError::BootFailed { reason, .. } if expected == "its process" => {
                assert!(reason.contains("too long"), "{mood}: {reason}");
            }
            other => panic!("{mood}: {other:?}"),
        }
    }
}

#[test]
fn a_template_without_a_running_snapshot_says_what_to_do() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let error = host.create(request("cold")).await.unwrap_err();
        assert!(matches!(&error, ShardError::TemplateNotWarm(name) if name == "cold"), "{error:?}");
        assert!(error.to_string().contains("mica template warm cold"), "{error}");
    });
}

#[test]
fn a_template_that_is_not_there_is_named() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        for name in ["nothing", "../../etc", ""] {
            let error = host.create(request(name)).await.unwrap_err();
            assert!(matches!(error, ShardError::NoSuchTemplate(n) if n == name));
        }
    });
}

#[test]
fn the_bound_holds_and_room_is_given_back() {
    let bench = Bench::new();
    // Odd, so that the shards' shares differ.
    let config = HostConfig { sandboxes_max: 5, ..bench.config() };
    let ended = bench.host_with(config, |host| async move {
        let mut ids = Vec::new();
        for _ in 0..5 {
            ids.push(host.create(request("agent")).await.unwrap().id);
        }
        for _ in 0..3 {
            let full = host.create(request("agent")).await.unwrap_err();
            assert!(matches!(full, ShardError::AtCapacity { sandboxes_max: 5 }), "{full:?}");
        }
        host.kill(ids[2]).await.unwrap();
        host.create(request("agent")).await.unwrap();
        assert!(host.create(request("agent")).await.is_err());
    });
    ended.unwrap();
}

#[test]
fn a_client_that_goes_away_leaves_nothing() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.host("init-silent", move |host| async move {
        // At every stage: at once, while it is being made, while its agent is waited for.
        for wait_ms in [0, 1, 3, 10, 40, 100] {
            let create = host.create(request("agent"));
            let wait = Duration::from_millis(wait_ms);
            assert!(rt::time::timeout(wait, create).await.is_err());
        }
        eventually("all are taken back", async || places.leftovers() == Leftovers::default()).await;
    });
}

#[test]
fn what_nobody_wants_any_more_is_not_begun() {
    const CREATES: usize = 40;
    let bench = Bench::new();
    bench.set_mood("init-silent");
    let begun = bench.root.join("begun");
    bench.write_program(&format!("echo begun >> {}", begun.display()));
    let places = bench.clone();
    let ended = bench.host_with(bench.config(), move |host| async move {
        let creates: Vec<_> = (0..CREATES)
            .map(|_| {
                let host = host.clone();
                rt::spawn(async move { host.create(request("agent")).await })
            })
            .collect();
        rt::yield_now().await;
        for create in creates {
            create.end().await;
        }
        eventually("all are taken back", async || places.leftovers() == Leftovers::default()).await;
    });
    ended.unwrap();
    let begun = std::fs::read_to_string(begun).unwrap_or_default().lines().count();
    assert!(begun < CREATES / 2, "{begun} VM processes were started for nobody");
    assert_eq!(bench.leftovers(), Leftovers::default());
}

#[test]
fn a_sandbox_can_be_killed_while_it_comes_up() {
    let bench = Bench::new();
    let sandboxes = bench.store().join("sandboxes");
    bench.host("init-silent", move |host| async move {
        for _ in 0..4 {
            let maker = host.clone();
            let create = rt::spawn(async move { maker.create(request("agent")).await });
            let mut id = None;
            eventually("its directory is there", async || {
                let mut entries = std::fs::read_dir(&sandboxes).unwrap();
                id = entries.find_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
                id.is_some()
            })
            .await;
            assert!(host.get(id.unwrap()).await.is_err(), "nobody sees it yet");
            host.kill(id.unwrap()).await.unwrap();
            let error = create.join().await.unwrap().unwrap_err();
            assert!(matches!(error, ShardError::KilledDuringCreate(_)), "{error:?}");
        }
    });
}

#[test]
fn a_stop_during_a_create_ends_it() {
    let bench = Bench::new();
    bench.set_mood("init-silent");
    let ended = bench.host_with(bench.config(), |host| async move {
        for _ in 0..3 {
            let host = host.clone();
            rt::spawn(async move {
                let error = host.create(request("agent")).await.unwrap_err();
                assert!(matches!(error, ShardError::ShuttingDown), "{error:?}");
            })
            .detach();
        }
        rt::time::sleep(Duration::from_millis(20)).await;
    });
    ended.unwrap();
    assert_eq!(bench.leftovers(), Leftovers::default());
}

#[test]
fn a_host_that_cannot_run_says_so_at_start() {
    let bench = Bench::new();
    let never = |_| async { panic!("it must not start") };
    let good = bench.config();
    let missing = HostConfig { vm_program: "/no/such/vm".into(), ..good.clone() };
    let error = bench.host_with(missing, never).unwrap_err();
    assert!(matches!(&error, RunError::Config(text) if text.contains("/no/such/vm")), "{error}");
    let plain = HostConfig { cgroup_root: "/tmp/mica".into(), ..good.clone() };
    let error = bench.host_with(plain, never).unwrap_err();
    assert!(in_full(&error).contains("cgroup v2"), "{error:?}");
    // A root that holds others' cgroups loses none of them.
    std::fs::create_dir(&bench.cgroup).unwrap();
    std::fs::create_dir(bench.cgroup.join("precious")).unwrap();
    let error = bench.host_with(good.clone(), never).unwrap_err();
    assert!(in_full(&error).contains("precious"), "{error:?}");
    std::fs::remove_dir(bench.cgroup.join("precious")).unwrap();
    let zero = HostConfig { sandboxes_max: 0, ..good };
    assert!(matches!(bench.host_with(zero, never), Err(RunError::Config(_))));
}

/// An error and its causes.
fn in_full(error: &dyn std::error::Error) -> String {
    let cause = error.source().map(in_full).unwrap_or_default();
    format!("{error}: {cause}")
}
