//! A daemon killed with SIGKILL, and the next one that cleans up what it left.
//!
//! Run by `cargo test`. The daemon is the double, so that killing it does not kill the test.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use common::{Bench, DOUBLE, Leftovers, request};
use mica_shards::RunError;

fn daemon(bench: &Bench, mode: &str, count: u32) -> Child {
    let mut child = Command::new(DOUBLE)
        .arg("daemon")
        .args([bench.store(), bench.cgroup.clone(), bench.program(mode)])
        .arg(count.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    child
}

/// Processes in the cgroups of sandboxes.
fn pids(bench: &Bench) -> Vec<String> {
    let mut pids = Vec::new();
    for entry in std::fs::read_dir(&bench.cgroup).unwrap() {
        let procs = entry.unwrap().path().join("cgroup.procs");
        if procs.parent() != Some(&bench.cgroup) {
            let text = std::fs::read_to_string(procs).unwrap_or_default();
            pids.extend(text.lines().map(str::to_owned));
        }
    }
    pids
}

#[test]
fn what_a_killed_daemon_left_is_removed_by_the_next() {
    let bench = Bench::new();
    // These VM processes go on without their daemon.
    let mut killed = daemon(&bench, "stubborn", 3);
    assert_eq!(bench.leftovers(), Leftovers { cgroups: 3, disks: 3 });
    killed.kill().unwrap();
    killed.wait().unwrap();
    let orphans = pids(&bench);
    assert_eq!(orphans.len(), 3, "they live on");

    bench.host("good", |host| async move {
        assert!(host.list().await.unwrap().is_empty());
        host.create(request("agent")).await.unwrap();
    });
    for pid in orphans {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        assert!(stat.map_or(true, |stat| stat.contains(") Z ")), "process {pid} lives");
    }
}

#[test]
fn two_daemons_do_not_share_a_cgroup_root() {
    let bench = Bench::new();
    let mut first = daemon(&bench, "good", 1);
    let second = bench.host_with(bench.config("good"), |_| async { panic!("it must not start") });
    let Err(RunError::Machine(source)) = second else { panic!("{second:?}") };
    assert!(source.to_string().contains("another daemon"), "{source}");
    assert_eq!(pids(&bench).len(), 1, "the first one's sandbox lives");
    first.kill().unwrap();
    first.wait().unwrap();
    // The lock went with it.
    bench.host("good", |host| async move {
        assert!(host.list().await.unwrap().is_empty());
    });
}
