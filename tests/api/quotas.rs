//! How many sandboxes a key may have, and how fast it may make them: across shards, after failures and
//! after a new daemon.

use std::thread;

use serde_json::{Value, json};

use crate::client::Reply;
use crate::daemon::{Daemon, eventually};
use crate::exposition::scrape;
use crate::template::TEMPLATE;

fn create(daemon: &Daemon, key: &str) -> Reply {
    let body = json!({ "templateID": TEMPLATE, "timeout": 300 });
    daemon.ask_as(key, "POST", "/v2/sandboxes", Some(&body))
}

fn made(reply: &Reply) -> String {
    assert_eq!(reply.status, 201, "{reply:?}");
    reply.json()["sandboxID"].as_str().expect("an id").to_owned()
}

fn act(daemon: &Daemon, key: &str, id: &str, action: &str, body: &Value) -> Reply {
    daemon.ask_as(key, "POST", &format!("/sandboxes/{id}/{action}"), Some(body))
}

/// Checks that it is a 429 that SDKs wait for, and says how long.
fn refused(reply: &Reply) -> u64 {
    reply.error(429);
    assert_eq!(reply.headers["should-retry"], "true");
    reply.headers["retry-after"].parse().expect("whole seconds")
}

fn listed(daemon: &Daemon, key: &str) -> usize {
    daemon.ask_as(key, "GET", "/v2/sandboxes", None).json().as_array().expect("a list").len()
}

#[test]
fn a_key_has_so_many_sandboxes_running_and_paused() {
    let daemon = Daemon::start();
    let key = daemon.make_key(&["--sandboxes-max", "3"]);
    let first = made(&create(&daemon, &key));
    let second = made(&create(&daemon, &key));
    assert_eq!(act(&daemon, &key, &second, "pause", &json!({})).status, 204);
    let third = made(&create(&daemon, &key));
    assert_eq!(refused(&create(&daemon, &key)), 1, "the paused one counts");
    // The second is woken whatever the bound: it has its place.
    let woken = act(&daemon, &key, &second, "connect", &json!({ "timeout": 60 }));
    assert_eq!(woken.status, 201, "{woken:?}");
    for action in ["clone", "fork"] {
        refused(&act(&daemon, &key, &first, action, &json!({ "count": 1 })));
    }
    assert_eq!(daemon.ask_as(&key, "DELETE", &format!("/sandboxes/{third}"), None).status, 204);
    // Gone when the answer comes, so there is room at once; for one, and not for two.
    for action in ["clone", "fork"] {
        refused(&act(&daemon, &key, &first, action, &json!({ "count": 2 })));
    }
    let clone = act(&daemon, &key, &first, "clone", &json!({ "count": 1 }));
    assert_eq!(clone.status, 201, "{clone:?}");
    refused(&create(&daemon, &key));
    assert_eq!(listed(&daemon, &key), 3);
    // Another key of the same tenant has its own bound.
    made(&create(&daemon, daemon.key()));
}

#[test]
fn clients_that_ask_at_once_get_no_more_than_the_bound() {
    let daemon = Daemon::start();
    let key = daemon.make_key(&["--sandboxes-max", "3"]);
    let statuses: Vec<u16> = thread::scope(|scope| {
        let asks: Vec<_> = (0..9).map(|_| scope.spawn(|| create(&daemon, &key).status)).collect();
        asks.into_iter().map(|ask| ask.join().expect("an answer")).collect()
    });
    let count = |wanted| statuses.iter().filter(|status| **status == wanted).count();
    assert_eq!((count(201), count(429)), (3, 6), "{statuses:?}");
    let made = |result| {
        let labels = [("operation", "create"), ("result", result)];
        scrape(&daemon).get("mica_operations_total", &labels)
    };
    assert_eq!(made("error"), 0.0, "a quota that is used up is no create that failed");
}

#[test]
fn creates_that_fail_take_no_place() {
    let daemon =
        Daemon::start_with(&["--pool-min", "0", "--pool-max", "0", "--boot-deadline", "1"]);
    let key = daemon.make_key(&["--sandboxes-max", "2"]);
    for _ in 0..3 {
        let body = json!({ "templateID": "nothing" });
        daemon.ask_as(&key, "POST", "/v2/sandboxes", Some(&body)).error(404);
    }
    daemon.change_vm_options("--hang restore");
    for _ in 0..3 {
        create(&daemon, &key).error(504);
    }
    // A client that goes while its sandbox is made.
    let body = json!({ "templateID": TEMPLATE }).to_string();
    let mut gone = daemon.connect();
    gone.send(format!(
        "POST /v2/sandboxes HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    ));
    drop(gone);
    daemon.change_vm_options("");
    eventually("its place is free again", || {
        let (a, b) = (create(&daemon, &key), create(&daemon, &key));
        for reply in [&a, &b].into_iter().filter(|reply| reply.status == 201) {
            let path = format!("/sandboxes/{}", made(reply));
            assert_eq!(daemon.ask_as(&key, "DELETE", &path, None).status, 204);
        }
        (a.status, b.status) == (201, 201)
    });
    let first = made(&create(&daemon, &key));
    // Clones that do not come up give back what they took.
    daemon.change_vm_options("--hang restore");
    act(&daemon, &key, &first, "clone", &json!({ "count": 1 })).error(504);
    daemon.change_vm_options("");
    let second = made(&create(&daemon, &key));
    refused(&create(&daemon, &key));
    // And so does one that ends by itself.
    let reply = act(&daemon, &key, &second, "timeout", &json!({ "timeout": 0 }));
    assert_eq!(reply.status, 204);
    eventually("its time is over", || create(&daemon, &key).status == 201);
}

#[test]
fn a_new_daemon_counts_what_the_last_one_left() {
    let mut daemon = Daemon::start();
    let key = daemon.make_key(&["--sandboxes-max", "2"]);
    let first = made(&create(&daemon, &key));
    let second = made(&create(&daemon, &key));
    assert_eq!(act(&daemon, &key, &second, "pause", &json!({})).status, 204);
    daemon.crash();
    daemon.restart();
    refused(&create(&daemon, &key));
    for id in [first, second] {
        assert_eq!(daemon.ask_as(&key, "DELETE", &format!("/sandboxes/{id}"), None).status, 204);
    }
    made(&create(&daemon, &key));
    made(&create(&daemon, &key));
    refused(&create(&daemon, &key));
}

#[test]
fn a_key_makes_so_many_in_a_second() {
    let daemon = Daemon::start();
    // One in a hundred seconds: nothing of it comes back while the test runs.
    let key = daemon.make_key(&["--creates-per-second", "0.01"]);
    let id = made(&create(&daemon, &key));
    let wait = refused(&create(&daemon, &key));
    assert!((50..=100).contains(&wait), "{wait}");
    for action in ["clone", "fork"] {
        let wait = refused(&act(&daemon, &key, &id, action, &json!({ "count": 2 })));
        assert!((50..=200).contains(&wait), "{wait}");
    }
    assert_eq!(listed(&daemon, &key), 1);
    assert_eq!(daemon.ask_as(&key, "GET", &format!("/sandboxes/{id}"), None).status, 200);
    // What comes back comes back.
    let key = daemon.make_key(&["--creates-per-second", "2"]);
    made(&create(&daemon, &key));
    eventually("a place in the bucket", || create(&daemon, &key).status == 201);
}
