//! Creates that are sent twice under one `Idempotency-Key`.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::client::Reply;
use crate::daemon::{Daemon, NO_POOL, eventually, patiently};
use crate::programs::{guest, write_vm_program};
use crate::template::TEMPLATE;

const NAME: &str = "0b8e5a2c-6a0f-4a8b-9d4e-3b1c5f7a9e00";

fn request(key: &str, path: &str, name: &str, body: &Value) -> String {
    let body = body.to_string();
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\nidempotency-key: {name}\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn create(daemon: &Daemon, name: &str, body: &Value) -> Reply {
    daemon.connect().send(request(daemon.key(), "/v2/sandboxes", name, body)).reply()
}

fn body() -> Value {
    json!({ "templateID": TEMPLATE, "timeout": 300 })
}

fn code(reply: &Reply) -> String {
    reply.json()["error_code"].as_str().unwrap_or_default().to_owned()
}

fn count(daemon: &Daemon) -> usize {
    daemon.ask("GET", "/v2/sandboxes", None).json().as_array().expect("a list").len()
}

#[test]
fn the_same_request_gives_the_same_answer_and_one_sandbox() {
    let daemon = Daemon::start();
    let first = create(&daemon, NAME, &body());
    assert_eq!(first.status, 201, "{first:?}");
    // Each connection may be another shard's.
    for _ in 0..8 {
        let again = create(&daemon, NAME, &body());
        assert_eq!((again.status, &again.body), (201, &first.body), "{again:?}");
        assert_eq!(again.headers["content-type"], first.headers["content-type"]);
    }
    assert_eq!(count(&daemon), 1);
    let id = first.json()["sandboxID"].as_str().expect("an id").to_owned();
    assert_eq!(daemon.delete(&id).status, 204);
    assert_eq!(create(&daemon, NAME, &body()).body, first.body, "whatever became of it");
    assert_eq!(count(&daemon), 0);
    // Without a name every request is one of its own, and so is one with another name.
    daemon.create();
    assert_eq!(create(&daemon, "other", &body()).status, 201);
    assert_eq!(count(&daemon), 2);
}

#[test]
fn another_request_under_the_same_name_is_refused() {
    let daemon = Daemon::start();
    assert_eq!(create(&daemon, NAME, &body()).status, 201);
    let other = create(&daemon, NAME, &json!({ "templateID": TEMPLATE, "timeout": 301 }));
    other.error(422);
    assert_eq!(code(&other), "idempotency_request_mismatch");
    let v1 = daemon.connect().send(request(daemon.key(), "/sandboxes", NAME, &body())).reply();
    v1.error(422);
    let v1 = daemon.connect().send(request(daemon.key(), "/sandboxes", "v1", &body())).reply();
    assert_eq!(v1.status, 201, "{v1:?}");
    assert_eq!(count(&daemon), 2);
    for bad in ["", "UPPER", "a b", "a_b", &"a".repeat(256)] {
        assert!(create(&daemon, bad, &body()).error(400).contains("Idempotency-Key"), "{bad}");
    }
    assert_eq!(count(&daemon), 2);
}

#[test]
fn names_are_their_tenants_own() {
    let daemon = Daemon::start();
    let key = daemon.make_key(&["--tenant", "other"]);
    let first = create(&daemon, NAME, &body());
    let elsewhere = json!({ "templateID": TEMPLATE, "timeout": 60 });
    let other = daemon.connect().send(request(&key, "/v2/sandboxes", NAME, &elsewhere)).reply();
    assert_eq!(other.status, 201, "{other:?}");
    assert_ne!(first.json()["sandboxID"], other.json()["sandboxID"]);
}

#[test]
fn while_the_first_is_at_work_the_second_is_told_to_wait_and_a_failure_is_forgotten() {
    let options = [&NO_POOL[..], &["--boot-deadline", "3"]].concat();
    let daemon = Daemon::start_with(&options);
    daemon.change_vm_options("--hang restore");
    let mut first = daemon.connect();
    first.send(request(daemon.key(), "/v2/sandboxes", NAME, &body()));
    eventually("the first is at work", || daemon.processes().len() == 1);
    let second = create(&daemon, NAME, &body());
    second.error(409);
    assert_eq!(code(&second), "idempotency_in_progress");
    assert_eq!((&*second.headers["should-retry"], &*second.headers["retry-after"]), ("true", "1"));
    create(&daemon, NAME, &json!({ "templateID": TEMPLATE })).error(422);
    first.reply().error(504);
    daemon.change_vm_options("");
    // It came to nothing, so the same name may try again at once, also something else.
    let again = create(&daemon, NAME, &json!({ "templateID": TEMPLATE, "timeout": 60 }));
    assert_eq!(again.status, 201, "{again:?}");
    assert_eq!(count(&daemon), 1);
}

#[test]
fn a_client_that_goes_leaves_its_name_free() {
    let daemon = Daemon::start_with(&NO_POOL);
    daemon.change_vm_options("--hang restore");
    let mut gone = daemon.connect();
    gone.send(request(daemon.key(), "/v2/sandboxes", NAME, &body()));
    eventually("it is at work", || daemon.processes().len() == 1);
    drop(gone);
    daemon.change_vm_options("");
    eventually("the name is free", || create(&daemon, NAME, &body()).status == 201);
    eventually("one is there", || count(&daemon) == 1);
}

#[test]
fn what_is_over_a_quota_may_be_tried_again_under_its_name() {
    let daemon = Daemon::start();
    let key = daemon.make_key(&["--sandboxes-max", "1"]);
    let ask =
        |name: &str| daemon.connect().send(request(&key, "/v2/sandboxes", name, &body())).reply();
    let first = ask("a");
    ask("b").error(429);
    assert_eq!(ask("a").body, first.body, "to say it again takes no place");
    let id = first.json()["sandboxID"].as_str().expect("an id").to_owned();
    assert_eq!(daemon.ask_as(&key, "DELETE", &format!("/sandboxes/{id}"), None).status, 204);
    assert_eq!(ask("b").status, 201);
}

/// Waits until a daemon has taken this sandbox over: until then its operations are refused.
fn is_taken_over(daemon: &Daemon, key: &str, id: &str) {
    let path = format!("/sandboxes/{id}/snapshots");
    let kept = patiently(|| daemon.ask_as(key, "POST", &path, None));
    assert_eq!(kept.status, 201, "{kept:?}");
}

/// The records of sandboxes in the store.
fn records(daemon: &Daemon) -> usize {
    let sandboxes = std::fs::read_dir(daemon.directory().join("store/sandboxes"));
    let sandboxes = sandboxes.expect("a directory").flatten();
    sandboxes.filter(|entry| entry.path().join("record").exists()).count()
}

#[test]
fn a_daemon_that_is_killed_leaves_its_names_to_the_next() {
    let mut daemon = Daemon::start();
    let key = daemon.make_key(&["--tenant", "other", "--sandboxes-max", "1"]);
    let with = |key: &str, name: &str, body: &Value| request(key, "/v2/sandboxes", name, body);
    let wish = json!({ "templateID": TEMPLATE, "timeout": 300, "autoPause": true, "secure": true });
    let first = create(&daemon, NAME, &wish);
    let paused = create(&daemon, "paused", &body());
    let theirs = daemon.connect().send(with(&key, NAME, &body())).reply();
    for made in [&first, &paused, &theirs] {
        assert_eq!(made.status, 201, "{made:?}");
    }
    let id = |reply: &Reply| reply.json()["sandboxID"].as_str().expect("an id").to_owned();
    daemon.pause(&id(&paused));
    let fork = daemon.act_with(&id(&first), "fork", &json!({ "count": 1 }));
    assert_eq!(fork.status, 201, "{fork:?}");
    let fork = fork.json()[0]["sandbox"]["sandboxID"].as_str().expect("an id").to_owned();
    // Twice: what the second daemon found it hands on, and what it wrote anew has the name still.
    for round in 0..2 {
        daemon.crash();
        daemon.restart();
        for _ in 0..4 {
            let again = create(&daemon, NAME, &wish);
            assert_eq!((again.status, again.json()), (201, first.json()), "{round}: {again:?}");
        }
        let again = create(&daemon, "paused", &body());
        assert_eq!((again.status, again.json()), (201, paused.json()), "{round}");
        assert_eq!(daemon.state(&id(&paused)), "paused", "it is not woken");
        let other = create(&daemon, NAME, &body());
        other.error(422);
        assert_eq!(code(&other), "idempotency_request_mismatch");
        let v1 = daemon.connect().send(request(daemon.key(), "/sandboxes", NAME, &wish)).reply();
        v1.error(422);
        // Each tenant has its own, and to say it again takes no place under a quota.
        let again = daemon.connect().send(with(&key, NAME, &body())).reply();
        assert_eq!((again.status, again.json()), (201, theirs.json()), "{round}");
        daemon.connect().send(with(&key, "more", &body())).reply().error(429);
        assert_eq!(count(&daemon), 3, "the two and the fork, which has no name");
        let timeout = json!({ "timeout": 600 });
        assert_eq!(daemon.act_with(&id(&first), "timeout", &timeout).status, 204);
        for running in [&id(&first), &fork] {
            is_taken_over(&daemon, daemon.key(), running);
        }
        is_taken_over(&daemon, &key, &id(&theirs));
    }
    // What has ended since cannot be told: it may have been answered or not.
    assert_eq!(daemon.delete(&id(&first)).status, 204);
    let again = create(&daemon, NAME, &wish);
    again.error(409);
    assert_eq!(code(&again), "idempotency_outcome_unknown");
    // What has ended before leaves nothing.
    daemon.crash();
    daemon.restart();
    let anew = create(&daemon, NAME, &body());
    assert_eq!(anew.status, 201, "{anew:?}");
    assert_ne!(id(&anew), id(&first));
}

#[test]
fn names_outlive_a_daemon_that_was_told_to_end() {
    let mut daemon = Daemon::start_with(&["--keep-sandboxes"]);
    let first = create(&daemon, NAME, &body());
    assert_eq!(first.status, 201, "{first:?}");
    daemon.signal("TERM");
    assert!(daemon.wait().success());
    daemon.restart();
    let again = create(&daemon, NAME, &body());
    assert_eq!((again.status, again.json()), (201, first.json()), "{again:?}");
    assert_eq!(count(&daemon), 1);
}

#[test]
fn of_a_create_that_was_cut_off_the_outcome_is_unknown() {
    let mut daemon = Daemon::start_with(&NO_POOL);
    // One whose agent is there and never answers: its record is written, and its create is not over.
    let mute = daemon.directory().join("mute");
    let agent = format!(
        "#!/bin/sh\nsetsid '{}' \"$@\" > \"$0.said\" &\nuntil grep -q ready \"$0.said\"; do sleep 0.02; done\n\
         kill -STOP $!\necho ready\nexec sleep 600\n",
        guest().display()
    );
    std::fs::write(&mute, agent).expect("a script");
    std::fs::set_permissions(&mute, Permissions::from_mode(0o755)).expect("a mode");
    let options = format!("--guest '{}'", mute.display());
    write_vm_program(&daemon.directory().join("vm"), &options);
    let mut cut = daemon.connect();
    cut.send(request(daemon.key(), "/v2/sandboxes", NAME, &body()));
    eventually("its record is there", || records(&daemon) == 1);
    daemon.crash();
    daemon.change_vm_options("");
    // Also of the daemon after the next, though that wrote the record anew.
    for _ in 0..2 {
        daemon.restart();
        let again = create(&daemon, NAME, &body());
        again.error(409);
        assert_eq!(code(&again), "idempotency_outcome_unknown");
        create(&daemon, NAME, &json!({ "templateID": TEMPLATE })).error(422);
        let left = daemon.ask("GET", "/v2/sandboxes", None).json();
        let [only] = &left.as_array().expect("a list")[..] else { panic!("one is left: {left}") };
        let id = only["sandboxID"].as_str().expect("an id").to_owned();
        let timeout = json!({ "timeout": 600 });
        assert_eq!(daemon.act_with(&id, "timeout", &timeout).status, 204);
        is_taken_over(&daemon, daemon.key(), &id);
        daemon.crash();
    }
}
