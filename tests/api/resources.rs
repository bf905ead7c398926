//! Sandboxes come and go, daemons crash, and nothing of either stays.

use std::thread;
use std::time::{Duration, Instant};

use crate::client::PATIENCE;
use crate::daemon::{Daemon, TEMPLATE, eventually};
use crate::upstream::Upstream;

const ROUNDS: usize = 50;

#[test]
fn fifty_rounds_leave_nothing() {
    let daemon = Daemon::start();
    // What is opened once and kept is opened in the first rounds.
    for _ in 0..4 {
        round(&daemon);
    }
    let before = settled(&daemon, None);
    assert_eq!(before[1..], [0, 0, 0], "processes, cgroups, sandbox directories");
    for _ in 0..ROUNDS {
        round(&daemon);
    }
    let after = settled(&daemon, Some(before));
    assert_eq!(after, before, "open files, processes, cgroups, sandbox directories");
}

/// A sandbox with a request through it.
fn round(daemon: &Daemon) {
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        served.head();
        served.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    assert_eq!(client.send("\r\n").reply().status, 200);
    server.join();
    assert_eq!(daemon.ask("DELETE", &format!("/sandboxes/{id}"), None).status, 204);
}

/// The holdings once they are `wanted`, or stay the same for a moment: the daemon sees closed
/// connections a moment after they close.
fn settled(daemon: &Daemon, wanted: Option<[usize; 4]>) -> [usize; 4] {
    let deadline = Instant::now() + PATIENCE;
    let mut last = daemon.holdings();
    loop {
        thread::sleep(Duration::from_millis(200));
        let now = daemon.holdings();
        let done = wanted.map_or(now == last, |wanted| now == wanted);
        if done || Instant::now() > deadline {
            return now;
        }
        last = now;
    }
}

#[test]
fn a_create_whose_client_goes_away_is_taken_back() {
    let daemon = Daemon::start();
    // A VM process that never says a word: the create waits for it.
    daemon.replace_vm_program("exec sleep 3600");
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
        eventually("its process is there", || daemon.vm_processes().len() == 1);
        drop(client);
        eventually("it is gone", || daemon.holdings()[1..] == [0, 0, 0]);
    }
}

#[test]
fn a_daemon_that_was_killed_cleans_up_when_it_starts_again() {
    let mut daemon = Daemon::start();
    let ids = [daemon.create(), daemon.create()];
    let left = daemon.vm_processes();
    assert_eq!(left.len(), 2);
    daemon.crash_and_restart();
    for id in &ids {
        daemon.ask("GET", &format!("/sandboxes/{id}"), None).error(404);
    }
    assert_eq!(settled(&daemon, None)[1..], [0, 0, 0]);
    for process in left {
        assert!(!is_running(process), "process {process} of the first daemon runs on");
    }
    // And it works.
    daemon.create();
}

/// Whether a process exists and is no zombie: nobody here may be its parent to bury it.
fn is_running(process: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{process}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")))
}
