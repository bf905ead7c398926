//! Pauses and snapshots that keep the disk alone, and going on from there: a boot, in memory that is empty.
//!
//! Against the double, whose kernel fills a few frames and whose agent writes what is `cached` to its disk
//! when it is told to.

use std::path::Path;
use std::time::{Duration, Instant};

use mica_shards::{
    ConnectError, CreateRequest, Host, HostConfig, Lifecycle, OnTimeout, ShardError, Visitor,
};
use mica_storage::Store;
use mica_units::SandboxId;

use crate::common::{
    Bench, FRAMES, Leftovers, Places, assert_memory, kill_process, memory, port, read_all, request,
    tell,
};
use crate::daemon::Daemon;
use crate::wait::eventually;

const LIFE: Duration = Duration::from_secs(600);

/// What memory is after a boot.
fn booted() -> Vec<u8> {
    (0..FRAMES).map(|frame| if (2000..2016).contains(&frame) { 0xb0 } else { 0 }).collect()
}

/// A sandbox with something in memory, and something on its way to the disk.
async fn written(host: &Host, wish: CreateRequest) -> SandboxId {
    let id = host.create(wish).await.unwrap().id;
    for line in ["fill 10 40 3", "register 21", "disk old", "cached written"] {
        tell(host, id, line).await;
    }
    id
}

async fn has_booted(host: &Host, id: SandboxId, disk: &str) {
    assert_memory(&memory(host, id).await, &booted(), "after a boot");
    assert_eq!(tell(host, id, "base").await, "booted with console=ttyS0");
    assert_eq!(tell(host, id, "register").await, "0");
    assert_eq!(tell(host, id, "disk").await, disk);
}

/// The files of layers anywhere below the directory of sandboxes and that of pauses.
fn layers_of(places: &Places, id: SandboxId) -> usize {
    let names = |dir: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let of_sandbox = names(&places.store().join("sandboxes").join(id.as_str()));
    of_sandbox.iter().filter(|name| name.starts_with("memory.")).count()
}

#[test]
fn what_was_paused_without_memory_boots_with_its_disk() {
    for log_writes in [false, true] {
        boots_with_its_disk(log_writes);
    }
}

fn boots_with_its_disk(log_writes: bool) {
    let bench = Bench::new();
    bench.set_mood("good");
    let places = bench.clone();
    let config = HostConfig { log_writes, ..bench.config() };
    let ended = bench.host_with(config, move |host| async move {
        let id = written(&host, CreateRequest { auto_resume: true, ..request("agent") }).await;
        let before = host.snapshot(id, None).await.unwrap().id;
        let then = memory(&host, id).await;
        host.pause_to_disk(id).await.unwrap();
        let info = host.get(id).await.unwrap();
        assert_eq!((info.state, info.disk_alone), (Lifecycle::Paused, true));
        assert_eq!(layers_of(&places, id), 0, "its memory is given back");
        eventually("its process ends", async || places.cgroups().is_empty()).await;
        let visited = host.visit(id, port(7), Visitor::Client(None)).await.unwrap_err();
        assert_eq!(visited, ConnectError::IsPaused(id), "no request wakes it");
        let refused = host.snapshot(id, None).await.unwrap_err();
        assert!(matches!(refused, ShardError::IsPaused(_)), "{refused:?}");
        let refused = host.rollback(id, before.clone()).await.unwrap_err();
        assert!(matches!(refused, ShardError::IsPaused(_)), "{refused:?}");
        let refused = host.pause(id).await.unwrap_err();
        assert!(matches!(refused, ShardError::AlreadyPaused(_)), "{refused:?}");

        let resumed = host.resume(id, LIFE, None).await.unwrap();
        assert_eq!(
            (resumed.id, resumed.state, resumed.disk_alone),
            (id, Lifecycle::Running, false)
        );
        has_booted(&host, id, "written").await;
        let about = read_all(&host, id, 14).await;
        assert!(about.contains("COLOUR=green\n") && about.contains(id.as_str()), "{about}");
        assert!(about.contains("times=1\n"), "another process: {about}");
        goes_on_as_any_other(&host, id, &places).await;
        // And back to the time when it had another memory.
        host.rollback(id, before.clone()).await.unwrap();
        assert_memory(&memory(&host, id).await, &then, "after the rollback");
        assert_eq!(tell(&host, id, "disk").await, "old");
        host.delete_snapshot(&before).await.unwrap();
        host.kill(id).await.unwrap();
        assert_eq!(places.leftovers(), Leftovers::default());
    });
    ended.unwrap();
}

/// A guest that was booted is captured and put back like one that was restored.
async fn goes_on_as_any_other(host: &Host, id: SandboxId, places: &Places) {
    tell(host, id, "fill 300 5 7").await;
    let now = memory(host, id).await;
    let snapshot = host.snapshot(id, None).await.unwrap().id;
    let copy = host.create(request(&snapshot)).await.unwrap().id;
    assert_memory(&memory(host, copy).await, &now, "in a copy");
    host.kill(copy).await.unwrap();
    tell(host, id, "fill 0 4096 9").await;
    host.rollback(id, snapshot.clone()).await.unwrap();
    assert_memory(&memory(host, id).await, &now, "after a rollback");
    host.delete_snapshot(&snapshot).await.unwrap();
    tell(host, id, "fill 301 1 8").await;
    let now = memory(host, id).await;
    host.pause(id).await.unwrap();
    places.pids().into_iter().for_each(kill_process);
    eventually("it is on disk alone", async || places.cgroups().is_empty()).await;
    assert!(!host.get(id).await.unwrap().disk_alone);
    host.resume(id, LIFE, None).await.unwrap();
    assert_memory(&memory(host, id).await, &now, "after a pause");
}

#[test]
fn what_was_paused_with_its_memory_boots_when_that_is_not_wanted() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        for on_disk in [false, true] {
            let id = written(&host, request("agent")).await;
            host.pause(id).await.unwrap();
            if on_disk {
                places.pids().into_iter().for_each(kill_process);
                eventually("it has no process", async || places.cgroups().is_empty()).await;
            }
            let (info, was_paused) = host.ensure_booted(id, LIFE).await.unwrap();
            assert_eq!((info.state, was_paused), (Lifecycle::Running, true));
            // Nobody told its agent to write.
            has_booted(&host, id, "old").await;
            eventually("its memory is dropped", async || places.leftovers().snapshots == 0).await;
            let again = host.boot(id, LIFE, None).await.unwrap_err();
            assert!(matches!(again, ShardError::AlreadyRunning(_)), "{again:?}");
            let (_, was_paused) = host.ensure_booted(id, LIFE).await.unwrap();
            assert!(!was_paused, "one that runs goes on");
            host.kill(id).await.unwrap();
        }
    });
}

#[test]
fn a_boot_that_fails_leaves_it_paused_as_it_was() {
    let bench = Bench::new();
    bench.set_mood("good");
    let places = bench.clone();
    let config = HostConfig { boot_deadline: Duration::from_secs(3), ..bench.config() };
    let ended = bench.host_with(config, move |host| async move {
        let id = written(&host, request("agent")).await;
        host.pause_to_disk(id).await.unwrap();
        for mood in ["bad-boot", "never-starts", "never-rings", "init-error", "not-built"] {
            places.set_mood(mood);
            let error = loop {
                match host.resume(id, LIFE, None).await.unwrap_err() {
                    ShardError::Conflict { .. } => {
                        mica_shards::rt::time::sleep(Duration::from_millis(5)).await;
                    }
                    error => break error,
                }
            };
            let told =
                matches!(error, ShardError::OperationFailed { .. } | ShardError::BootFailed { .. });
            assert!(told, "{mood}: {error:?}");
            let info = host.get(id).await.unwrap();
            assert_eq!((info.state, info.disk_alone), (Lifecycle::Paused, true), "{mood}");
        }
        places.set_mood("good");
        eventually("it boots", async || host.resume(id, LIFE, None).await.is_ok()).await;
        has_booted(&host, id, "written").await;
        assert_eq!(layers_of(&places, id), 1, "what boots that failed left is gone");
        host.kill(id).await.unwrap();
        assert_eq!(places.leftovers(), Leftovers::default());
    });
    ended.unwrap();
}

#[test]
fn what_could_not_boot_again_runs_on() {
    let bench = Bench::new();
    bench.set_mood("good");
    let places = bench.clone();
    let config = HostConfig { boot_deadline: Duration::from_secs(3), ..bench.config() };
    let ended = bench.host_with(config, move |host| async move {
        let id = written(&host, request("agent")).await;
        let now = memory(&host, id).await;
        // An agent of before there were such pauses, and one that does not answer.
        for mood in ["sync-error", "sync-silent"] {
            places.set_mood(mood);
            let error = host.pause_to_disk(id).await.unwrap_err();
            let ShardError::OperationFailed { reason, .. } = &error else { panic!("{error:?}") };
            assert!(reason.contains("its agent did not write its disk"), "{reason}");
            places.set_mood("good");
            assert_memory(&memory(&host, id).await, &now, "it runs on");
        }
        let paused = written(&host, request("agent")).await;
        host.pause_to_disk(paused).await.unwrap();
        let kept = written(&host, request("agent")).await;
        host.pause(kept).await.unwrap();
        let store = Store::open(&places.store()).unwrap();
        assert!(store.delete_template(&"agent".parse().unwrap()).unwrap());
        let error = host.pause_to_disk(id).await.unwrap_err();
        assert!(matches!(error, ShardError::CannotBoot { .. }), "{error:?}");
        assert_memory(&memory(&host, id).await, &now, "it runs on");
        let error = host.boot(kept, LIFE, None).await.unwrap_err();
        assert!(matches!(error, ShardError::CannotBoot { .. }), "{error:?}");
        eventually("its memory is still there", async || {
            host.resume(kept, LIFE, None).await.is_ok()
        })
        .await;
        assert_eq!(tell(&host, kept, "register").await, "21");
        // A pause without memory has a kernel of its own.
        host.resume(paused, LIFE, None).await.unwrap();
        has_booted(&host, paused, "written").await;
        // Nothing of the failures is in the way of a pause as any other.
        host.pause(id).await.unwrap();
        assert!(!host.get(id).await.unwrap().disk_alone);
        host.resume(id, LIFE, None).await.unwrap();
        assert_memory(&memory(&host, id).await, &now, "after a pause");
    });
    ended.unwrap();
}

#[test]
fn at_the_end_of_its_time_it_is_paused_without_memory_if_that_was_wished_for() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let wish = CreateRequest { on_timeout: OnTimeout::PauseToDisk, ..request("agent") };
        let id = written(&host, wish).await;
        let is_paused =
            async || host.get(id).await.is_ok_and(|info| info.state == Lifecycle::Paused);
        // The wish outlives a resume that says only that there is to be a pause.
        for on_timeout in [None, Some(OnTimeout::Pause)] {
            host.set_timeout(id, Duration::ZERO).await.unwrap();
            eventually("it is paused", is_paused).await;
            assert!(host.get(id).await.unwrap().disk_alone);
            host.resume(id, LIFE, on_timeout).await.unwrap();
            has_booted(&host, id, "written").await;
        }
        assert_eq!(host.get(id).await.unwrap().on_timeout, OnTimeout::PauseToDisk);
        host.kill(id).await.unwrap();
    });
}

#[test]
fn it_waits_on_its_disk_for_the_next_daemon() {
    let bench = Bench::new();
    let mut daemon = Daemon::start(&bench, false);
    let [paused, running] = [daemon.tell("create agent"), daemon.tell("create agent")];
    for id in [&paused, &running] {
        for line in ["register 21", "disk old", "cached written"] {
            daemon.tell(&format!("tell {id} {line}"));
        }
        daemon.tell(&format!("pause-to-disk {id}"));
    }
    // One that has booted is taken over as it runs.
    daemon.tell(&format!("resume {running}"));
    daemon.tell(&format!("tell {running} fill 700 3 5"));
    daemon.kill();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        let [paused, running]: [SandboxId; 2] = [&paused, &running].map(|id| id.parse().unwrap());
        let info = host.get(paused).await.unwrap();
        assert_eq!((info.state, info.disk_alone), (Lifecycle::Paused, true));
        host.resume(paused, LIFE, None).await.unwrap();
        has_booted(&host, paused, "written").await;
        eventually("it is taken over", async || host.connect(running, port(7)).await.is_ok()).await;
        let now = memory(&host, running).await;
        let snapshot = host.snapshot(running, None).await.unwrap().id;
        let copy = host.create(request(&snapshot)).await.unwrap().id;
        assert_memory(&memory(&host, copy).await, &now, "in a copy");
        assert_eq!(now[700..703], [5; 3]);
        host.delete_snapshot(&snapshot).await.unwrap();
        for id in [paused, running, copy] {
            host.kill(id).await.unwrap();
        }
        eventually("nothing is left", async || places.leftovers() == Leftovers::default()).await;
    });
}

#[test]
fn a_snapshot_of_the_disk_takes_nothing_from_its_sandbox() {
    for log_writes in [false, true] {
        takes_nothing(log_writes);
    }
}

fn takes_nothing(log_writes: bool) {
    let bench = Bench::new();
    bench.set_mood("good");
    let places = bench.clone();
    let config = HostConfig { log_writes, ..bench.config() };
    let ended = bench.host_with(config, move |host| async move {
        let id = written(&host, request("agent")).await;
        let first = host.snapshot(id, None).await.unwrap().id;
        tell(&host, id, "fill 100 20 6").await;
        let of_disk = host.snapshot_disk(id, Some("d".to_owned())).await.unwrap();
        assert_eq!((of_disk.name.as_deref(), of_disk.sandbox), (Some("d"), Some(id)));
        let info = host.get(id).await.unwrap();
        assert_eq!((info.state, info.disk_alone), (Lifecycle::Running, false));
        // What was written before it and after it is in what is kept of the memory later.
        tell(&host, id, "fill 300 5 7").await;
        tell(&host, id, "disk newer").await;
        let now = memory(&host, id).await;
        let second = host.snapshot(id, None).await.unwrap().id;
        let copy = host.create(request(&second)).await.unwrap().id;
        assert_memory(&memory(&host, copy).await, &now, "in a copy");
        let refused = host.rollback(id, of_disk.id.clone()).await.unwrap_err();
        assert!(matches!(refused, ShardError::SnapshotOfDisk(_)), "{refused:?}");
        assert_memory(&memory(&host, id).await, &now, "after a rollback that was refused");
        host.rollback(id, first.clone()).await.unwrap();
        host.pause(id).await.unwrap();
        assert!(!host.get(id).await.unwrap().disk_alone);
        host.resume(id, LIFE, None).await.unwrap();
        assert_eq!(tell(&host, id, "register").await, "21");

        let made = host.create(request(&of_disk.id)).await.unwrap();
        has_booted(&host, made.id, "written").await;
        assert_eq!((made.state, made.disk_alone), (Lifecycle::Running, false));
        for id in [id, copy] {
            host.kill(id).await.unwrap();
        }
        goes_on_as_any_other(&host, made.id, &places).await;
        for snapshot in [first, second, of_disk.id] {
            assert!(host.delete_snapshot(&snapshot).await.unwrap());
        }
        host.kill(made.id).await.unwrap();
        assert_eq!(places.leftovers(), Leftovers::default());
    });
    ended.unwrap();
}

#[test]
fn a_snapshot_of_the_disk_that_fails_leaves_nothing() {
    let bench = Bench::new();
    bench.set_mood("good");
    let places = bench.clone();
    let config = HostConfig { boot_deadline: Duration::from_secs(3), ..bench.config() };
    let ended = bench.host_with(config, move |host| async move {
        let id = written(&host, request("agent")).await;
        let now = memory(&host, id).await;
        for mood in ["sync-error", "sync-silent"] {
            places.set_mood(mood);
            let error = host.snapshot_disk(id, None).await.unwrap_err();
            let ShardError::OperationFailed { operation, reason, .. } = &error else {
                panic!("{error:?}")
            };
            assert_eq!(*operation, "a snapshot");
            assert!(reason.contains("its agent did not write its disk"), "{reason}");
            places.set_mood("good");
            assert_memory(&memory(&host, id).await, &now, "it runs on");
        }
        assert_eq!(places.leftovers().snapshots, 0);
        let of_disk = host.snapshot_disk(id, None).await.unwrap().id;
        // A create that does not come up leaves nothing of itself, and the snapshot as it was.
        for mood in ["bad-boot", "never-rings", "init-error"] {
            places.set_mood(mood);
            let error = host.create(request(&of_disk)).await.unwrap_err();
            let told =
                matches!(error, ShardError::BootFailed { .. } | ShardError::BootTimedOut { .. });
            assert!(told, "{mood}: {error:?}");
        }
        places.set_mood("good");
        let made = host.create(request(&of_disk)).await.unwrap().id;
        has_booted(&host, made, "written").await;
        assert!(host.delete_snapshot(&of_disk).await.unwrap());
        for id in [id, made] {
            host.kill(id).await.unwrap();
        }
        assert_eq!(places.leftovers(), Leftovers::default());
    });
    ended.unwrap();
}

#[test]
fn a_snapshot_of_the_disk_outlives_its_daemon_and_what_was_made_from_it_too() {
    let bench = Bench::new();
    let mut daemon = Daemon::start(&bench, false);
    let source = daemon.tell("create agent");
    for line in ["register 21", "disk old", "cached written"] {
        daemon.tell(&format!("tell {source} {line}"));
    }
    let of_disk = daemon.tell(&format!("snapshot-disk {source}"));
    let made = daemon.tell(&format!("create {of_disk}"));
    daemon.tell(&format!("tell {made} fill 700 3 5"));
    daemon.kill();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        let [source, made]: [SandboxId; 2] = [&source, &made].map(|id| id.parse().unwrap());
        for id in [source, made] {
            eventually("it is taken over", async || host.connect(id, port(7)).await.is_ok()).await;
        }
        assert_eq!(tell(&host, source, "register").await, "21");
        assert_eq!(memory(&host, made).await[700..703], [5; 3]);
        // The kernel of what was made from it is the snapshot's, once there is no template.
        let store = Store::open(&places.store()).unwrap();
        assert!(store.delete_template(&"agent".parse().unwrap()).unwrap());
        host.pause_to_disk(made).await.unwrap();
        host.resume(made, LIFE, None).await.unwrap();
        has_booted(&host, made, "written").await;
        let again = host.create(request(&of_disk)).await.unwrap().id;
        has_booted(&host, again, "written").await;
        assert!(host.delete_snapshot(&of_disk).await.unwrap());
        // With that its kernel is gone as well.
        let error = host.snapshot_disk(again, None).await.unwrap_err();
        assert!(matches!(error, ShardError::CannotBoot { .. }), "{error:?}");
        assert_eq!(tell(&host, again, "disk").await, "written", "it runs on");
        for id in [source, made, again] {
            host.kill(id).await.unwrap();
        }
        eventually("nothing is left", async || places.leftovers() == Leftovers::default()).await;
    });
}

/// Whether a VM process was handed the disk of another sandbox: then it was told to boot.
fn has_a_disk_beside(places: &Places, sandbox: &str) -> bool {
    places.pids().into_iter().any(|pid| {
        let Ok(fds) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        let links = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
        let mut disks = links.filter(|link| link.ends_with("disk"));
        disks.any(|disk| !disk.to_string_lossy().contains(sandbox))
    })
}

#[test]
fn a_daemon_that_is_killed_while_one_boots_leaves_nothing_of_it() {
    let bench = Bench::new();
    let mut daemon = Daemon::start(&bench, false);
    let source = daemon.tell("create agent");
    let of_disk = daemon.tell(&format!("snapshot-disk {source}"));
    bench.set_mood("never-rings");
    daemon.begin(&format!("create {of_disk}"));
    let places = bench.clone();
    // No shard is here to wait on.
    let begun = Instant::now();
    while !has_a_disk_beside(&places, &source) {
        assert!(begun.elapsed() < Duration::from_secs(20), "it never boots");
        std::thread::sleep(Duration::from_millis(2));
    }
    daemon.kill();
    bench.host("good", move |host| async move {
        let source: SandboxId = source.parse().unwrap();
        eventually("it is taken over", async || host.connect(source, port(7)).await.is_ok()).await;
        let running: Vec<_> = host.list().await.unwrap().into_iter().map(|info| info.id).collect();
        assert_eq!(running, [source]);
        let alone = Leftovers { cgroups: 1, sandboxes: 1, snapshots: 1 };
        eventually("nothing is left of the other", async || places.leftovers() == alone).await;
        host.delete_snapshot(&of_disk).await.unwrap();
        host.kill(source).await.unwrap();
    });
}
