//! Creates that fail at each of their steps, are cancelled, or find no room.
//!
//! Run by `cargo test` against the double. After each, nothing may be left.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;
mod wait;

use std::time::Duration;

use common::{Bench, Leftovers, request};
use mica_shards::{RunError, ShardError, rt};
use wait::eventually;

/// Creates one sandbox with the double in `mode`, expects failure, and checks what is left.
fn failure(mode: &'static str, boot_deadline: Duration) -> ShardError {
    let bench = Bench::new();
    let config = mica_shards::HostConfig { boot_deadline, ..bench.config(mode) };
    let (send, receive) = std::sync::mpsc::channel();
    let ended = bench.host_with(config, move |host| async move {
        let error = host.create(request("agent")).await.unwrap_err();
        assert!(host.list().await.unwrap().is_empty());
        send.send(error).unwrap();
    });
    ended.unwrap();
    assert_eq!(bench.leftovers(), Leftovers::default(), "{mode}");
    receive.recv().unwrap()
}

fn reason(mode: &'static str) -> (String, String) {
    match failure(mode, Duration::from_secs(20)) {
        ShardError::BootFailed { reason, console_tail } => (reason, console_tail),
        other => panic!("{mode}: {other:?}"),
    }
}

#[test]
fn a_vm_process_that_fails_says_why() {
    let (reason, _) = reason("exit-at-once");
    assert!(reason.contains("closed its control socket"), "{reason}");
    assert!(reason.contains("the jail cannot be closed"), "{reason}");
    assert!(!reason.contains('\x1b'), "{reason:?}");
}

#[test]
fn every_failing_step_is_named() {
    for (mode, expected) in [
        ("garbage", "no event"),
        ("too-long", "too long"),
        ("out-of-turn", "protocol"),
        ("second-jailed", "twice"),
        ("eof-after-boot", "closed its control socket"),
        ("bad-config", "no such kernel"),
        ("panics", "reset"),
        ("init-refused", "nothing listens"),
        ("init-error", "no disk here"),
        ("init-garbage", "no answer"),
        ("init-flood", "too long"),
        ("init-hangs-up", "in form"),
    ] {
        let (reason, _) = reason(mode);
        assert!(reason.contains(expected), "{mode}: {reason}");
    }
}

#[test]
fn the_end_of_the_console_comes_with_the_error() {
    let (_, tail) = reason("panics");
    assert_eq!(tail, "hello from the console\nKernel panic - not syncing: no init found\n");
}

#[test]
fn a_boot_that_takes_too_long_is_given_up_where_it_was() {
    for (mode, expected) in [
        ("silent", "lock itself in"),
        ("deaf", "guest to boot"),
        ("never-rings", "guest to boot"),
        ("init-silent", "agent in the guest"),
    ] {
        match failure(mode, Duration::from_millis(400)) {
            ShardError::BootTimedOut { step, deadline, .. } => {
                assert!(step.contains(expected), "{mode}: {step}");
                assert_eq!(deadline, Duration::from_millis(400));
            }
            other => panic!("{mode}: {other:?}"),
        }
    }
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
    let config = mica_shards::HostConfig { sandboxes_max: 5, ..bench.config("good") };
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
    let cgroup = bench.cgroup.clone();
    bench.host("never-rings", move |host| async move {
        // At every stage: at once, while it is being made, while it boots.
        for wait_ms in [0, 1, 3, 10, 40, 100] {
            let create = host.create(request("agent"));
            let wait = Duration::from_millis(wait_ms);
            assert!(rt::time::timeout(wait, create).await.is_err());
        }
        eventually("all are taken back", async || std::fs::read_dir(&cgroup).unwrap().all(is_file))
            .await;
    });
}

#[test]
fn what_nobody_wants_any_more_is_not_begun() {
    const CREATES: usize = 40;
    let bench = Bench::new();
    let begun = bench.root.join("begun");
    let program = bench.program("never-rings");
    let exec = std::fs::read_to_string(&program).unwrap();
    let (shell, exec) = exec.split_once('\n').unwrap();
    let text = format!("{shell}\necho begun >> {}\n{exec}", begun.display());
    let cgroup = bench.cgroup.clone();
    let config = bench.config("never-rings");
    std::fs::write(&program, text).unwrap();
    let ended = bench.host_with(config, move |host| async move {
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
        eventually("all are taken back", async || std::fs::read_dir(&cgroup).unwrap().all(is_file))
            .await;
    });
    ended.unwrap();
    let begun = std::fs::read_to_string(begun).unwrap_or_default().lines().count();
    assert!(begun < CREATES / 2, "{begun} VM processes were started for nobody");
    assert_eq!(bench.leftovers(), Leftovers::default());
}

#[test]
fn a_sandbox_can_be_killed_while_it_boots() {
    let bench = Bench::new();
    let cgroup = bench.cgroup.clone();
    bench.host("never-rings", move |host| async move {
        for _ in 0..4 {
            let maker = host.clone();
            let create = rt::spawn(async move { maker.create(request("agent")).await });
            let mut id = None;
            eventually("its cgroup is there", async || {
                let mut entries = std::fs::read_dir(&cgroup).unwrap();
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
    let config = bench.config("never-rings");
    let ended = bench.host_with(config, |host| async move {
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
    let good = bench.config("good");
    let missing = mica_shards::HostConfig { vm_program: "/no/such/vm".into(), ..good.clone() };
    let error = bench.host_with(missing, never).unwrap_err();
    assert!(matches!(&error, RunError::Config(text) if text.contains("/no/such/vm")), "{error}");
    let plain = mica_shards::HostConfig { cgroup_root: "/tmp/mica".into(), ..good.clone() };
    let error = bench.host_with(plain, never).unwrap_err();
    let RunError::Machine(source) = error else { panic!("{error:?}") };
    assert!(source.to_string().contains("cgroup v2"), "{source}");
    // A root that holds others' cgroups loses none of them.
    std::fs::create_dir(&bench.cgroup).unwrap();
    std::fs::create_dir(bench.cgroup.join("precious")).unwrap();
    let error = bench.host_with(good.clone(), never).unwrap_err();
    let RunError::Machine(source) = error else { panic!("{error:?}") };
    assert!(source.to_string().contains("precious"), "{source}");
    std::fs::remove_dir(bench.cgroup.join("precious")).unwrap();
    let zero = mica_shards::HostConfig { sandboxes_max: 0, ..good };
    assert!(matches!(bench.host_with(zero, never), Err(RunError::Config(_))));
}

fn is_file(entry: std::io::Result<std::fs::DirEntry>) -> bool {
    entry.unwrap().file_type().unwrap().is_file()
}
