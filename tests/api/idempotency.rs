//! Creates that are sent twice under one `Idempotency-Key`.

use serde_json::{Value, json};

use crate::client::Reply;
use crate::daemon::{Daemon, NO_POOL, eventually};
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
