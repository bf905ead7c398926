//! API keys: made, shown once, taken and revoked while the daemon runs; a host without keys; and secrets
//! that must not be in its log.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::client::Reply;
use crate::daemon::{Daemon, NO_POOL};
use crate::template::TEMPLATE;

/// How long a change may take to be seen.
const SOON: Duration = Duration::from_secs(1);

fn with(daemon: &Daemon, headers: &str) -> Reply {
    let head = format!("GET /v2/sandboxes HTTP/1.1\r\nhost: x\r\n{headers}\r\n");
    daemon.connect().send(head).reply()
}

#[test]
fn keys_come_and_go_without_a_restart() {
    let daemon = Daemon::start();
    let options = ["create", "--tenant", "team-1", "--sandboxes-max", "5", "--name", "CI"];
    let key = daemon.key_command(&options).trim().to_owned();
    assert!(key.starts_with("e2b_") && key.len() == 44, "{key}");
    thread::sleep(SOON);
    // Each connection may be another shard's.
    let ask = || daemon.ask_as(&key, "GET", "/v2/sandboxes", None);
    assert!((0..8).all(|_| ask().status == 200));

    let listed: Value =
        serde_json::from_str(&daemon.key_command(&["list", "--json"])).expect("JSON");
    let [shown] = &listed.as_array().expect("a list")[..] else { panic!("{listed}") };
    assert_eq!((&shown["tenant"], &shown["name"]), (&json!("team-1"), &json!("CI")));
    assert_eq!(shown["sandboxes_max"], 5);
    let id = shown["id"].as_str().expect("an id").to_owned();
    let table = daemon.key_command(&["list"]);
    assert!(table.contains(&id) && table.contains("team-1"), "{table}");
    let kept = std::fs::read_to_string(daemon.key_database()).expect("the database");
    for text in [listed.to_string(), table, kept] {
        assert!(!text.contains(&key[4..]), "the key is shown once: {text}");
    }
    let mode = daemon.key_database().metadata().expect("the database").mode();
    assert_eq!(mode & 0o777, 0o600);

    daemon.key_command(&["revoke", &id]);
    thread::sleep(SOON);
    for _ in 0..8 {
        ask().error(401);
    }
    assert_eq!(with(&daemon, &format!("x-api-key: {}\r\n", daemon.key())).status, 200);
    let mut again = Command::new(env!("CARGO_BIN_EXE_mica"));
    again.args(["key", "revoke", &id, "--key-db"]).arg(daemon.key_database());
    let output = again.output().expect("mica key");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("mica key list"), "{said}");
}

#[test]
fn a_bearer_token_wins_over_the_other_header() {
    let daemon = Daemon::start();
    let key = daemon.make_key(&[]);
    let wrong = format!("e2b_{}", "0".repeat(40));
    let both = |bearer: &str, header: &str| {
        with(&daemon, &format!("authorization: Bearer {bearer}\r\nX-API-KEY: {header}\r\n"))
    };
    assert_eq!(both(&key, &wrong).status, 200);
    both(&wrong, &key).error(401);
    assert_eq!(
        with(&daemon, &format!("authorization: Basic eDp5\r\nx-api-key: {key}\r\n")).status,
        200
    );
    for headers in ["", "x-api-key: \r\n", "authorization: Bearer \r\n", "x-api-key: e2b_\r\n"] {
        let reply = with(&daemon, headers);
        assert!(reply.error(401).contains("mica key create"), "{reply:?}");
        assert!(reply.json()["code"].is_u64(), "SDKs read a number");
    }
}

#[test]
fn an_open_host_needs_no_key_and_is_only_its_machines() {
    let daemon = Daemon::start_with(&["--open"]);
    assert_eq!(with(&daemon, "").status, 200);
    assert_eq!(with(&daemon, "x-api-key: anything\r\n").status, 200);
    assert_eq!(with(&daemon, "origin: http://localhost:5173\r\n").status, 200);
    with(&daemon, "origin: https://elsewhere.example\r\n").error(401);
    // A page's own name, which its DNS has turned into this machine's address.
    let rebound = "GET /v2/sandboxes HTTP/1.1\r\nhost: elsewhere.example:3000\r\n\r\n";
    daemon.connect().send(rebound).reply().error(401);
    let id = daemon.create();
    // A key is still its tenant's, once it is known: until then it is as good as none.
    let key = daemon.make_key(&["--tenant", "other"]);
    thread::sleep(SOON);
    daemon.ask_as(&key, "GET", &format!("/sandboxes/{id}"), None).error(404);

    let output = Command::new(env!("CARGO_BIN_EXE_mica"))
        .args(["serve", "--open", "--listen", "0.0.0.0:0", "--vm-program", "/bin/true"])
        .stdin(Stdio::null())
        .output()
        .expect("mica serve");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("loopback"), "{said}");
}

#[test]
fn the_agent_of_a_secure_sandbox_takes_its_token_and_no_other() {
    let daemon = Daemon::start_with(&NO_POOL);
    daemon.use_real_agent();
    let create = |secure: bool| {
        let body = json!({ "templateID": TEMPLATE, "secure": secure });
        let made = daemon.ask("POST", "/sandboxes", Some(&body));
        assert_eq!(made.status, 201, "{made:?}");
        let made = made.json();
        (made["sandboxID"].as_str().expect("an id").to_owned(), made["envdAccessToken"].clone())
    };
    let ask = |id: &str, path: &str, token: &str| {
        let mut client = daemon.to_sandbox(id, 49983, &format!("GET {path}"));
        client.send(format!("x-access-token: {token}\r\n\r\n")).reply().status
    };
    let ((one, token), (two, other)) = (create(true), create(true));
    let (token, other) = (token.as_str().expect("a token"), other.as_str().expect("a token"));
    assert_ne!(token, other);
    for path in ["/envs", "/metrics", "/files?path=/etc/hostname"] {
        assert_ne!(ask(&one, path, token), 401, "{path}");
        for wrong in ["", other, &token[1..], daemon.key()] {
            assert_eq!(ask(&one, path, wrong), 401, "{path}");
        }
    }
    assert_eq!((ask(&one, "/envs", token), ask(&two, "/envs", other)), (200, 200));
    let (open, none) = create(false);
    assert!(none.is_null(), "{none}");
    assert_eq!(ask(&open, "/envs", ""), 200);
}

#[test]
fn secrets_are_not_in_the_log() {
    let log = std::env::temp_dir().join(format!("mica-api-log-{}", std::process::id()));
    let file = File::create(&log).expect("a log");
    let daemon = Daemon::start_as(
        &[],
        |_| {},
        |command| {
            command.env("MICA_LOG", "trace").stderr(file);
        },
    );
    let key = daemon.make_key(&["--tenant", "team-1"]);
    let body = json!({
        "templateID": TEMPLATE,
        "secure": true,
        "envVars": { "PASSWORD": "s3cr3t-value" },
    });
    let made = daemon.ask_as(&key, "POST", "/v2/sandboxes", Some(&body));
    assert_eq!(made.status, 201, "{made:?}");
    let token = made.json()["envdAccessToken"].as_str().expect("a token").to_owned();
    let id = made.json()["sandboxID"].as_str().expect("an id").to_owned();
    let mut client = daemon.to_sandbox(&id, 1, "GET /files?path=x");
    client.send(format!("x-access-token: {token}\r\n\r\n")).reply().error(502);
    let clone = daemon.ask_as(&key, "POST", &format!("/sandboxes/{id}/clone"), None);
    assert_eq!(clone.status, 201, "{clone:?}");
    daemon.ask_as(&"e2b_".repeat(11), "GET", "/v2/sandboxes", None).error(401);
    assert_eq!(daemon.ask_as(&key, "DELETE", &format!("/sandboxes/{id}"), None).status, 204);
    let (own, other) = (daemon.key().to_owned(), clone.json()[0]["envdAccessToken"].clone());
    drop(daemon);
    let text = std::fs::read_to_string(&log).expect("the log");
    std::fs::remove_file(&log).expect("the log");
    assert!(text.contains(&id), "it says what happens");
    let other = other.as_str().expect("a token");
    for secret in [&key[4..], &own[4..], &token, other, "s3cr3t-value", "e2b_e2b_"] {
        let line = text.lines().find(|line| line.contains(secret));
        assert_eq!(line, None);
    }
}
