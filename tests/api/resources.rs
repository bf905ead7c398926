//! Sandboxes come and go, daemons crash, and nothing of either stays.

use std::collections::BTreeSet;
use std::num::NonZeroU16;

use mica_units::SandboxId;
use serde_json::json;

use crate::daemon::{Daemon, NO_POOL, eventually, kill, patiently};
use crate::template::TEMPLATE;
use crate::upstream::Upstream;

const ROUNDS: usize = 50;
const ROUNDS_OF_EVERYTHING: usize = 10;

/// Enough for each shard to have come to rest, and fewer than a leak would hide in.
const WARM_UP_ROUNDS: usize = 40;

/// One process waits on each of the two shards, so that what the pool holds is always the same.
const SMALL_POOL: [&str; 4] = ["--pool-min", "1", "--pool-max", "1"];

#[test]
fn fifty_rounds_leave_nothing() {
    rounds(ROUNDS, round);
}

#[test]
fn rounds_of_every_operation_leave_nothing() {
    rounds(ROUNDS_OF_EVERYTHING, |daemon| {
        let id = daemon.create();
        let snapshot = daemon.snapshot(&id);
        let back = json!({ "snapshotID": snapshot });
        let back = patiently(|| daemon.act_with(&id, "rollback", &back));
        assert_eq!(back.status, 200, "{back:?}");
        let clones = json!({ "count": 2 });
        let clones = patiently(|| daemon.act_with(&id, "clone", &clones));
        assert_eq!(clones.status, 201, "{clones:?}");
        daemon.pause(&id);
        assert_eq!(daemon.act(&id, "resume").status, 201);
        daemon.pause(&id);
        for clone in clones.json().as_array().expect("a list") {
            let clone = clone["sandboxID"].as_str().expect("an id");
            assert_eq!(daemon.delete(clone).status, 204);
        }
        assert_eq!(daemon.delete(&id).status, 204);
        let gone = daemon.ask("DELETE", &format!("/templates/{snapshot}"), None);
        assert_eq!(gone.status, 204, "{gone:?}");
        id
    });
}

/// Runs rounds, each of which gives the id of its sandbox, and compares what the daemon holds.
fn rounds(count: usize, round: impl Fn(&Daemon) -> String) {
    let daemon = Daemon::start_with(&SMALL_POOL);
    let full = || daemon.processes().len() == 2;
    let at_rest = || {
        eventually("the pool is full", full);
        daemon.settled(None)
    };
    // What a shard opens once and keeps, it opens in its first rounds: what was written a moment ago
    // it looks up once more.
    let mut before = at_rest();
    let mut shards = BTreeSet::new();
    for _ in 0..WARM_UP_ROUNDS {
        let id: SandboxId = round(&daemon).parse().expect("an id");
        let now = at_rest();
        if now == before {
            shards.insert(id.shard(NonZeroU16::new(2).expect("two")));
        }
        if shards.len() == 2 {
            break;
        }
        before = now;
    }
    assert_eq!(shards.len(), 2, "each round leaves files open");
    assert_eq!(before[1..], [0, 0, 0], "processes, cgroups, sandbox directories");
    for _ in 0..count {
        round(&daemon);
    }
    eventually("the pool is full", full);
    let after = daemon.settled(Some(before));
    assert_eq!(after, before, "open files, processes, cgroups, sandbox directories");
    eventually("only the template's own snapshot is kept", || daemon.snapshots_kept() == 1);
}

/// A sandbox with a request through it.
fn round(daemon: &Daemon) -> String {
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        served.head();
        served.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    assert_eq!(client.send("\r\n").reply().status, 200);
    server.join();
    assert_eq!(daemon.delete(&id).status, 204);
    id
}

#[test]
fn a_create_whose_client_goes_away_is_taken_back() {
    // Without a pool a create waits for a process of its own.
    let daemon = Daemon::start_with(&NO_POOL);
    daemon.change_vm_options("--hang restore");
    let body = format!("{{\"templateID\":\"{TEMPLATE}\"}}");
    for (framing, body) in [
        (format!("content-length: {}", body.len()), body.clone()),
        (
            "transfer-encoding: chunked".to_owned(),
            format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len()),
        ),
    ] {
        let mut client = daemon.connect();
        client.send(format!(
            "POST /v2/sandboxes HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\n{framing}\r\n\r\n{body}",
            daemon.key()
        ));
        eventually("its process is there", || daemon.processes().len() == 1);
        drop(client);
        eventually("it is gone", || {
            daemon.processes().is_empty() && daemon.holdings()[1..] == [0, 0, 0]
        });
    }
    daemon.change_vm_options("");
    daemon.create();
}

#[test]
fn what_died_beside_the_daemon_is_cleaned_up_when_it_starts_again() {
    let mut daemon = Daemon::start();
    let (alive, dead) = (daemon.create(), daemon.create());
    let process = daemon.vm_of(&dead);
    let pool = daemon.processes();
    daemon.crash();
    kill("KILL", process);
    daemon.restart();
    daemon.get(&dead).error(404);
    assert_eq!(daemon.state(&alive), "running");
    eventually("nothing of the dead one is left", || daemon.holdings()[1..] == [1, 1, 1]);
    // Shells that waited are nobody's now.
    let waited = pool.into_iter().filter(|(_, name)| name == "standin-vm");
    for (shell, _) in waited {
        assert!(!is_running(shell), "process {shell} of the first daemon runs on");
    }
    daemon.create();
    assert_eq!(daemon.delete(&alive).status, 204);
}

/// Whether a process exists and is no zombie: nobody here may be its parent to bury it.
fn is_running(process: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{process}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")))
}
