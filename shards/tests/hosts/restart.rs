//! Daemons that are killed at any moment, or told to stop, and the next ones: what they find, take over,
//! and remove.
//!
//! The first daemon is a process of its own, so that killing it does not kill the test; the next one is a
//! host in the test.

use std::path::PathBuf;
use std::time::Duration;

use mica_shards::{Host, HostConfig, Lifecycle, RunError};
use mica_units::SandboxId;

use crate::common::{
    Bench, Leftovers, Places, assert_memory, base_memory, bytes, kill_process, memory, read_all,
    request, tell,
};
use crate::daemon::Daemon;
use crate::wait::eventually;

const LIFE: Duration = Duration::from_secs(600);

fn id_of(text: &str) -> SandboxId {
    text.parse().unwrap()
}

/// A sandbox of a daemon: it was snapshotted, and written to since. Its memory now and then.
struct Written {
    id: SandboxId,
    snapshot: String,
    then: Vec<u8>,
    now: Vec<u8>,
}

fn write(daemon: &mut Daemon) -> Written {
    let id = daemon.tell("create agent");
    let look = format!("tell {id} look 0 4096");
    for line in ["fill 10 40 3", "register 21", "disk then"] {
        daemon.tell(&format!("tell {id} {line}"));
    }
    let snapshot = daemon.tell(&format!("snapshot {id}"));
    let then = bytes(&daemon.tell(&look));
    for line in ["fill 30 100 5", "register 22", "disk now"] {
        daemon.tell(&format!("tell {id} {line}"));
    }
    let now = bytes(&daemon.tell(&look));
    Written { id: id_of(&id), snapshot, then, now }
}

async fn is_at(host: &Host, id: SandboxId, expected: &[u8], register: &str, disk: &str) {
    assert_memory(&memory(host, id).await, expected, "memory");
    assert_eq!(tell(host, id, "register").await, register);
    assert_eq!(tell(host, id, "disk").await, disk);
}

/// Waits until a sandbox that was taken over can be used, running or paused.
async fn settled(host: &Host, id: SandboxId) -> Lifecycle {
    let mut found = Lifecycle::Running;
    eventually("it is taken over", async || {
        found = host.get(id).await.unwrap().state;
        // A running one answers when it goes on; a paused one says so.
        found == Lifecycle::Paused || host.connect(id, crate::common::port(7)).await.is_ok()
    })
    .await;
    found
}

#[test]
fn running_sandboxes_are_taken_over_as_they_are() {
    let bench = Bench::new();
    let mut daemon = Daemon::start(&bench, false);
    let one = write(&mut daemon);
    let two = write(&mut daemon);
    let pids = bench.pids();
    daemon.kill();
    assert_eq!(bench.pids(), pids, "they live on");
    let places = bench.clone();
    bench.host("good", move |host| async move {
        assert_eq!(host.list().await.unwrap().len(), 2);
        assert_eq!(places.pids(), pids, "in the same processes");
        for Written { id, snapshot, then, now } in [one, two] {
            assert_eq!(settled(&host, id).await, Lifecycle::Running);
            is_at(&host, id, &now, "22", "now").await;
            let info = host.get(id).await.unwrap();
            assert_eq!((info.template_name.as_str(), info.memory.count()), ("agent", 16));
            // The first capture of a new daemon misses nothing that was written before.
            let later = host.snapshot(id, None).await.unwrap().id;
            let copy = host.create(request(&later)).await.unwrap().id;
            is_at(&host, copy, &now, "22", "now").await;
            host.kill(copy).await.unwrap();
            host.rollback(id, snapshot.clone()).await.unwrap();
            is_at(&host, id, &then, "21", "then").await;
            host.rollback(id, later.clone()).await.unwrap();
            is_at(&host, id, &now, "22", "now").await;
            host.pause(id).await.unwrap();
            host.resume(id, LIFE, None).await.unwrap();
            is_at(&host, id, &now, "22", "now").await;
            host.delete_snapshot(&later).await.unwrap();
            host.delete_snapshot(&snapshot).await.unwrap();
            host.kill(id).await.unwrap();
        }
        // A process of a resume that failed is buried beside the path.
        let nothing = Leftovers::default();
        eventually("nothing is left", async || places.leftovers() == nothing).await;
    });
}

#[test]
fn they_are_taken_over_again_and_again() {
    for log_writes in [false, true] {
        again_and_again(log_writes);
    }
}

fn again_and_again(log_writes: bool) {
    let bench = Bench::new();
    let mut daemon = Daemon::start_with(&bench, true, 0, log_writes);
    let Written { id, snapshot, now, .. } = write(&mut daemon);
    for round in 0..3 {
        // Killed, or stopped by an operator who wants them to go on.
        if round % 2 == 0 {
            daemon.kill()
        } else {
            daemon.stop()
        }
        daemon = Daemon::start_with(&bench, true, 0, log_writes);
        let look = format!("tell {id} look 0 4096");
        assert_memory(&bytes(&daemon.tell(&look)), &now, "after a takeover");
        let later = daemon.tell(&format!("snapshot {id}"));
        daemon.tell(&format!("tell {id} fill 0 4096 1"));
        daemon.tell(&format!("rollback {id} {later}"));
        assert_memory(&bytes(&daemon.tell(&look)), &now, "after a rollback");
    }
    daemon.kill();
    bench.host("good", move |host| async move {
        is_at(&host, id, &now, "22", "now").await;
        host.kill(id).await.unwrap();
        for left in host.snapshots(None).await.unwrap() {
            host.delete_snapshot(&left.id).await.unwrap();
        }
        assert!(!host.delete_snapshot(&snapshot).await.unwrap());
    });
}

#[test]
fn paused_ones_wait_for_the_next_daemon_with_their_process_and_without() {
    let bench = Bench::new();
    let mut daemon = Daemon::start(&bench, false);
    let with = write(&mut daemon);
    let with_pids = bench.pids();
    let without = write(&mut daemon);
    for id in [with.id, without.id] {
        daemon.tell(&format!("pause {id}"));
    }
    daemon.kill();
    // Its process goes while no daemon looks.
    bench.pids().into_iter().filter(|pid| !with_pids.contains(pid)).for_each(kill_process);
    let places = bench.clone();
    bench.host("good", move |host| async move {
        for Written { id, snapshot, then, now } in [with, without] {
            assert_eq!(host.get(id).await.unwrap().state, Lifecycle::Paused);
            eventually("it goes on", async || host.resume(id, LIFE, None).await.is_ok()).await;
            is_at(&host, id, &now, "22", "now").await;
            let later = host.snapshot(id, None).await.unwrap().id;
            let copy = host.create(request(&later)).await.unwrap().id;
            is_at(&host, copy, &now, "22", "now").await;
            host.rollback(id, snapshot.clone()).await.unwrap();
            is_at(&host, id, &then, "21", "then").await;
            for snapshot in [&snapshot, &later] {
                host.delete_snapshot(snapshot).await.unwrap();
            }
            host.kill(copy).await.unwrap();
            host.kill(id).await.unwrap();
        }
        // A process of a resume that failed is buried beside the path.
        let nothing = Leftovers::default();
        eventually("nothing is left", async || places.leftovers() == nothing).await;
    });
}

#[test]
fn a_process_that_cannot_be_taken_over_is_ended() {
    let bench = Bench::new();
    let mut daemon = Daemon::start(&bench, false);
    let paused = write(&mut daemon);
    daemon.tell(&format!("pause {}", paused.id));
    let running = id_of(&daemon.tell("create agent"));
    daemon.kill();
    for id in [paused.id, running] {
        let directory = bench.store().join("sandboxes").join(id.as_str());
        let names = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let is_layer =
            |path: &PathBuf| path.file_name().unwrap().as_encoded_bytes().starts_with(b"memory.");
        let layers: Vec<PathBuf> = names.filter(is_layer).collect();
        assert!(!layers.is_empty(), "{id} keeps its layers");
        layers.iter().for_each(|path| std::fs::remove_file(path).unwrap());
    }
    let places = bench.clone();
    bench.host("good", move |host| async move {
        let Written { id, snapshot, now, .. } = paused;
        eventually("their processes are gone", async || places.cgroups().is_empty()).await;
        assert!(host.get(running).await.is_err());
        // What it is resumed from is on disk.
        eventually("it goes on", async || host.resume(id, LIFE, None).await.is_ok()).await;
        is_at(&host, id, &now, "22", "now").await;
        host.kill(id).await.unwrap();
        host.delete_snapshot(&snapshot).await.unwrap();
        let nothing = Leftovers::default();
        eventually("nothing is left", async || places.leftovers() == nothing).await;
    });
}

#[test]
fn one_whose_process_died_meanwhile_is_gone() {
    let bench = Bench::new();
    let mut daemon = Daemon::start(&bench, false);
    let id = id_of(&daemon.tell("create agent"));
    daemon.kill();
    bench.pids().into_iter().for_each(kill_process);
    bench.host("good", move |host| async move {
        assert!(host.get(id).await.is_err());
        assert!(host.list().await.unwrap().is_empty());
    });
}

#[test]
fn what_has_no_record_is_removed() {
    let bench = Bench::new();
    let mut daemon = Daemon::start(&bench, false);
    let damaged = id_of(&daemon.tell("create agent"));
    let without = id_of(&daemon.tell("create agent"));
    let pids = bench.pids();
    daemon.kill();
    let directory = |id: SandboxId| bench.store().join("sandboxes").join(id.as_str());
    let record = directory(damaged).join("record");
    let mut bytes = std::fs::read(&record).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&record, bytes).unwrap();
    std::fs::remove_file(directory(without).join("record")).unwrap();
    std::fs::create_dir(bench.store().join("snapshots").join("abcdefghij0123456789")).unwrap();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        assert!(host.list().await.unwrap().is_empty());
        assert_eq!(places.leftovers(), Leftovers::default());
        host.create(request("agent")).await.unwrap();
    });
    for pid in pids {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        assert!(stat.map_or(true, |stat| stat.contains(") Z ")), "process {pid} lives");
    }
}

#[test]
fn a_damaged_snapshot_costs_its_own_sandbox_and_not_the_host() {
    let bench = Bench::new();
    let mut daemon = Daemon::start(&bench, false);
    let paused = id_of(&daemon.tell("create agent"));
    daemon.tell(&format!("pause {paused}"));
    let running = id_of(&daemon.tell("create agent"));
    daemon.kill();
    let snapshots = std::fs::read_dir(bench.store().join("snapshots")).unwrap();
    let pause = snapshots.map(|entry| entry.unwrap().path().join("manifest")).find(|manifest| {
        String::from_utf8_lossy(&std::fs::read(manifest).unwrap()).contains(paused.as_str())
    });
    let manifest = pause.unwrap();
    let mut bytes = std::fs::read(&manifest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&manifest, bytes).unwrap();
    let ended = bench.host_with(bench.config(), move |host| async move {
        assert_eq!(settled(&host, running).await, Lifecycle::Running);
        assert_eq!(host.get(paused).await.unwrap().state, Lifecycle::Paused);
        host.kill(paused).await.unwrap();
        host.create(request("agent")).await.unwrap();
    });
    ended.unwrap();
    // What was damaged is left to be looked at.
    assert_eq!(bench.leftovers(), Leftovers { cgroups: 0, sandboxes: 0, snapshots: 1 });
}

#[test]
fn a_process_that_does_not_say_how_far_it_is_is_ended() {
    for mood in ["never-reports", "reports-garbage", "reports-idle"] {
        let bench = Bench::new();
        let mut daemon = Daemon::start(&bench, false);
        let running = id_of(&daemon.tell("create agent"));
        let paused = write(&mut daemon);
        daemon.tell(&format!("pause {}", paused.id));
        daemon.kill();
        bench.set_mood(mood);
        let places = bench.clone();
        let config = HostConfig { boot_deadline: Duration::from_millis(1500), ..bench.config() };
        let ended = bench.host_with(config, move |host| async move {
            eventually("that one is gone", async || host.get(running).await.is_err()).await;
            // The other is on disk, whatever its process says.
            places.set_mood("good");
            let Written { id, snapshot, now, .. } = paused;
            eventually("it goes on", async || host.resume(id, LIFE, None).await.is_ok()).await;
            is_at(&host, id, &now, "22", "now").await;
            host.kill(id).await.unwrap();
            host.delete_snapshot(&snapshot).await.unwrap();
            assert_eq!(places.leftovers(), Leftovers::default(), "{mood}");
        });
        ended.unwrap();
    }
}

#[test]
fn what_was_said_to_a_daemon_that_is_gone_is_not_for_the_next() {
    let bench = Bench::new();
    let mut daemon = Daemon::start(&bench, false);
    let Written { id, snapshot, now, .. } = write(&mut daemon);
    let pids = bench.pids();
    daemon.kill();
    let places = bench.clone();
    bench.host("reports-to-another", move |host| async move {
        assert_eq!(settled(&host, id).await, Lifecycle::Running);
        is_at(&host, id, &now, "22", "now").await;
        assert_eq!(places.pids(), pids, "in the same process");
        host.kill(id).await.unwrap();
        host.delete_snapshot(&snapshot).await.unwrap();
    });
}

/// What is under way when the daemon is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    Create,
    Snapshot,
    Pause,
    Resume,
    ResumeFromDisk,
    Rollback,
    Clone,
}

/// Kills a daemon so long into an operation, and looks at what the next one makes of it.
fn cut_off(cut: Cut, wait: Duration) {
    let bench = Bench::new();
    let mut daemon = Daemon::start(&bench, false);
    let written = write(&mut daemon);
    let id = written.id;
    if matches!(cut, Cut::Resume | Cut::ResumeFromDisk) {
        daemon.tell(&format!("pause {id}"));
    }
    if cut == Cut::ResumeFromDisk {
        bench.pids().into_iter().for_each(kill_process);
    }
    daemon.begin(&match cut {
        Cut::Create => "create agent".to_owned(),
        Cut::Snapshot => format!("snapshot {id}"),
        Cut::Pause => format!("pause {id}"),
        Cut::Resume | Cut::ResumeFromDisk => format!("resume {id}"),
        Cut::Rollback => format!("rollback {id} {}", written.snapshot),
        Cut::Clone => format!("clone {id} 2"),
    });
    std::thread::sleep(wait);
    daemon.kill();
    let places = bench.clone();
    let what = format!("{cut:?} after {wait:?}");
    bench.host("good", move |host| async move {
        look_after(&host, &places, cut, &written, &what).await;
    });
}

async fn look_after(host: &Host, places: &Places, cut: Cut, written: &Written, what: &str) {
    let Written { id, snapshot, then, now } = written;
    let id = *id;
    if settled(host, id).await == Lifecycle::Paused {
        assert!(!matches!(cut, Cut::Create | Cut::Snapshot | Cut::Clone), "{what}: it is paused");
        eventually("it goes on", async || host.ensure_running(id, LIFE).await.is_ok()).await;
    }
    // Of the two times of a rollback it is one, whole.
    let is_then = cut == Cut::Rollback && tell(host, id, "register").await == "21";
    let (expected, register, disk) =
        if is_then { (then, "21", "then") } else { (now, "22", "now") };
    assert_memory(&memory(host, id).await, expected, what);
    assert_eq!(tell(host, id, "register").await, register, "{what}");
    assert_eq!(tell(host, id, "disk").await, disk, "{what}");
    let about = read_all(host, id, 14).await;
    assert!(about.contains(&format!("id={id}\n")), "{what}: {about}");
    // Others are there whole, or not at all.
    for other in host.list().await.unwrap() {
        if other.id != id {
            assert!(matches!(cut, Cut::Create | Cut::Clone), "{what}: {other:?}");
            let fresh = base_memory();
            let expected = if cut == Cut::Create { &fresh } else { now };
            assert_memory(&memory(host, other.id).await, expected, what);
            host.kill(other.id).await.unwrap();
        }
    }
    for left in host.snapshots(None).await.unwrap() {
        if left.id != *snapshot {
            assert_eq!(cut, Cut::Snapshot, "{what}: {left:?}");
            let copy = host.create(request(&left.id)).await.unwrap().id;
            assert_memory(&memory(host, copy).await, now, what);
            host.kill(copy).await.unwrap();
            host.delete_snapshot(&left.id).await.unwrap();
        }
    }
    host.rollback(id, snapshot.clone()).await.unwrap();
    assert_memory(&memory(host, id).await, then, what);
    host.kill(id).await.unwrap();
    host.delete_snapshot(snapshot).await.unwrap();
    let clean = async || places.leftovers() == Leftovers::default();
    eventually(&format!("{what}: nothing is left"), clean).await;
}

/// Spread over the time that the operations take.
const WAITS_MS: [u64; 7] = [0, 2, 5, 9, 15, 30, 60];

fn cut_off_everywhere(cut: Cut) {
    for wait_ms in WAITS_MS {
        cut_off(cut, Duration::from_millis(wait_ms));
    }
}

#[test]
fn a_daemon_killed_during_a_create_leaves_it_whole_or_not_at_all() {
    cut_off_everywhere(Cut::Create);
}

#[test]
fn a_daemon_killed_during_a_snapshot_leaves_the_sandbox_running() {
    cut_off_everywhere(Cut::Snapshot);
}

#[test]
fn a_daemon_killed_during_a_pause_leaves_it_running_or_paused() {
    cut_off_everywhere(Cut::Pause);
}

#[test]
fn a_daemon_killed_during_a_resume_leaves_it_running_or_paused() {
    cut_off_everywhere(Cut::Resume);
    cut_off_everywhere(Cut::ResumeFromDisk);
}

#[test]
fn a_daemon_killed_during_a_rollback_leaves_it_before_or_after() {
    cut_off_everywhere(Cut::Rollback);
}

#[test]
fn a_daemon_killed_during_a_clone_leaves_the_source_and_whole_copies() {
    cut_off_everywhere(Cut::Clone);
}

#[test]
fn two_daemons_do_not_share_a_cgroup_root() {
    let bench = Bench::new();
    let mut first = Daemon::start(&bench, false);
    first.tell("create agent");
    let second = bench.host_with(bench.config(), |_| async { panic!("it must not start") });
    let Err(RunError::Machine(source)) = second else { panic!("{second:?}") };
    assert!(source.to_string().contains("another daemon"), "{source}");
    assert_eq!(bench.pids().len(), 1, "the first one's sandbox lives");
    first.stop();
    // The lock went with it, and so did its sandbox.
    bench.host("good", |host| async move {
        assert!(host.list().await.unwrap().is_empty());
    });
}
