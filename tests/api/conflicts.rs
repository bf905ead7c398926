//! Two operations on one sandbox, and the end of it or of its process in the middle of one.
//!
//! A stopped VM process (SIGSTOP) holds an operation where it asks the guest to stop, for as long as
//! the test needs.

use std::sync::mpsc::channel;
use std::thread;

use serde_json::{Value, json};

use crate::client::PATIENCE;
use crate::daemon::{Daemon, NO_POOL, eventually, kill, patiently};

fn snapshots(daemon: &Daemon) -> Value {
    daemon.ask("GET", "/snapshots", None).json()
}

/// A sandbox with a snapshot, and the request that each operation on it is.
struct Subject {
    id: String,
    snapshot: String,
}

impl Subject {
    fn new(daemon: &Daemon) -> Self {
        let id = daemon.create();
        let snapshot = daemon.snapshot(&id);
        // The answer may come while the guest is still being told to go on.
        eventually("it can be used", || !is_busy(daemon, &id));
        Self { id, snapshot }
    }

    fn request(&self, operation: &str) -> (String, Option<Value>) {
        let body = match operation {
            "rollback" => Some(json!({ "snapshotID": self.snapshot })),
            "clone" | "fork" => Some(json!({ "count": 2 })),
            _ => None,
        };
        (format!("/sandboxes/{}/{operation}", self.id), body)
    }

    fn begin(&self, daemon: &Daemon, operation: &str) -> thread::JoinHandle<crate::client::Reply> {
        let (path, body) = self.request(operation);
        daemon.begin("POST", &path, body.as_ref())
    }
}

#[test]
fn of_two_operations_at_once_one_is_refused_at_once() {
    let daemon = Daemon::start();
    for (a, b) in [
        ("snapshots", "snapshots"),
        ("snapshots", "pause"),
        ("snapshots", "rollback"),
        ("pause", "pause"),
        ("pause", "rollback"),
        ("rollback", "rollback"),
        ("clone", "snapshots"),
        ("clone", "clone"),
        ("fork", "pause"),
    ] {
        let subject = Subject::new(&daemon);
        let process = daemon.vm_of(&subject.id);
        kill("STOP", process);
        let (sender, replies) = channel();
        for operation in [a, b] {
            let (begun, sender) = (subject.begin(&daemon, operation), sender.clone());
            thread::spawn(move || sender.send((operation, begun.join())));
        }
        let next = || {
            let (operation, reply) = replies.recv_timeout(PATIENCE).expect("an answer");
            (operation, reply.expect("a reply"))
        };
        // The one that came second, whichever that was: the first cannot end.
        let (refused, reply) = next();
        let message = reply.error(409);
        assert!(message.contains("busy") && message.contains(&subject.id), "{refused}: {message}");
        assert_eq!(reply.headers["should-retry"], "true");
        assert_eq!(reply.headers["retry-after"], "1");
        kill("CONT", process);
        let (done, reply) = next();
        assert!((200..300).contains(&reply.status), "{done} beside {refused}: {reply:?}");
        // Nothing stays between states: it is paused if that was asked, and runs otherwise.
        let state = daemon.state(&subject.id);
        assert_eq!(state, if done == "pause" { "paused" } else { "running" });
        if done == "pause" {
            assert_eq!(daemon.act(&subject.id, "resume").status, 201);
        }
        daemon.snapshot(&subject.id);
        assert_eq!(daemon.delete(&subject.id).status, 204);
    }
}

#[test]
fn a_kill_ends_what_is_going_on() {
    let daemon = Daemon::start();
    for operation in ["snapshots", "pause", "rollback", "clone", "fork"] {
        let subject = Subject::new(&daemon);
        let before = snapshots(&daemon);
        kill("STOP", daemon.vm_of(&subject.id));
        let begun = subject.begin(&daemon, operation);
        busy(&daemon, &subject);
        assert_eq!(daemon.delete(&subject.id).status, 204, "{operation}");
        let reply = begun.join().expect("a reply");
        assert_eq!(reply.status, 404, "{operation}: {reply:?}");
        reply.error(404);
        daemon.get(&subject.id).error(404);
        assert_eq!(snapshots(&daemon), before, "nothing unacknowledged is left: {operation}");
        eventually("nothing of it is left", || daemon.holdings()[1..] == [0, 0, 0]);
    }
}

#[test]
fn a_process_that_dies_in_an_operation_takes_only_its_sandbox() {
    let daemon = Daemon::start();
    let other = daemon.create();
    for operation in ["snapshots", "pause", "rollback", "clone"] {
        let subject = Subject::new(&daemon);
        let before = snapshots(&daemon);
        let process = daemon.vm_of(&subject.id);
        kill("STOP", process);
        let begun = subject.begin(&daemon, operation);
        busy(&daemon, &subject);
        kill("KILL", process);
        let reply = begun.join().expect("a reply");
        assert!(reply.status >= 400, "{operation}: {reply:?}");
        reply.error(reply.status);
        eventually("it is gone", || daemon.get(&subject.id).status == 404);
        assert_eq!(snapshots(&daemon), before, "nothing unacknowledged is left: {operation}");
        assert_eq!(daemon.state(&other), "running");
        daemon.snapshot(&other);
        assert_eq!(daemon.vm_processes().len(), 1);
    }
}

#[test]
fn an_operation_whose_client_goes_away_ends_all_the_same() {
    let daemon = Daemon::start();
    for operation in ["snapshots", "pause", "rollback"] {
        let subject = Subject::new(&daemon);
        let process = daemon.vm_of(&subject.id);
        kill("STOP", process);
        let (path, body) = subject.request(operation);
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let mut client = daemon.connect();
        client.send(format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\ncontent-length: {}\r\n\r\n{body}",
            daemon.key(),
            body.len()
        ));
        busy(&daemon, &subject);
        drop(client);
        kill("CONT", process);
        let free = || {
            let refused = daemon.act(&subject.id, "resume");
            refused.status == 201 || !refused.error(409).contains("busy")
        };
        eventually("the sandbox can be used again", free);
        assert_eq!(daemon.state(&subject.id), "running", "{operation}");
        daemon.snapshot(&subject.id);
    }
}

#[test]
fn clones_whose_client_goes_away_are_taken_back() {
    let daemon = Daemon::start_with(&NO_POOL);
    let id = daemon.create();
    daemon.change_vm_options("--hang restore");
    for operation in ["clone", "fork"] {
        let mut client = daemon.connect();
        let body = "{\"count\":3}";
        client.send(format!(
            "POST /sandboxes/{id}/{operation} HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\n\
             content-length: {}\r\n\r\n{body}",
            daemon.key(),
            body.len()
        ));
        eventually("their processes are there", || daemon.processes().len() == 4);
        drop(client);
        eventually("they are gone", || daemon.processes().len() == 1);
        assert_eq!(snapshots(&daemon), json!([]), "and so is what they were made from");
        eventually("nothing of them is left", || {
            daemon.holdings()[1..] == [1, 1, 1] && daemon.snapshots_kept() == 1
        });
    }
    daemon.change_vm_options("");
    assert_eq!(daemon.act(&id, "clone").status, 201);
}

#[test]
fn a_paused_sandbox_outlives_its_process() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let process = daemon.vm_of(&id);
    daemon.pause(&id);
    kill("KILL", process);
    eventually("its process is gone", || daemon.vm_processes().is_empty());
    assert_eq!(daemon.state(&id), "paused");
    // What is left of the process is taken back first.
    let life = json!({ "timeout": 60 });
    let reply = patiently(|| daemon.act_with(&id, "resume", &life));
    assert_eq!(reply.status, 201, "{reply:?}");
    assert_eq!(daemon.state(&id), "running");
    daemon.snapshot(&id);
}

/// Waits until an operation has the sandbox.
fn busy(daemon: &Daemon, subject: &Subject) {
    eventually("the operation has begun", || is_busy(daemon, &subject.id));
}

/// Whether an operation has a sandbox that is not paused: a resume is refused for that then, and not
/// because it runs.
fn is_busy(daemon: &Daemon, id: &str) -> bool {
    daemon.act(id, "resume").error(409).contains("busy")
}
