//! Every control-plane endpoint: fields, codes, headers, and that any shard answers for any other.

use std::collections::BTreeSet;
use std::num::NonZeroU16;
use std::thread;
use std::time::{Duration, Instant};

use mica_units::SandboxId;
use serde_json::{Value, json};

use crate::client::PATIENCE;
use crate::daemon::Daemon;
use crate::template::{MEMORY, TEMPLATE};

#[test]
fn health_is_open_to_everyone_and_nothing_else_is() {
    let daemon = Daemon::start();
    let mut connection = daemon.connect();
    let open = connection.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n").reply();
    assert_eq!(open.status, 200);
    // The same connection goes on: keep-alive.
    let head = connection.send("HEAD /health HTTP/1.1\r\nhost: x\r\n\r\n").head();
    assert_eq!(head.0, 200);
    for request in ["GET /sandboxes", "POST /v2/sandboxes", "GET /templates"] {
        let ask = |key: &str| {
            let request =
                format!("{request} HTTP/1.1\r\nhost: x\r\n{key}content-length: 0\r\n\r\n");
            daemon.connect().send(request).reply()
        };
        assert!(ask("").error(401).contains("X-API-Key"));
        let wrong = daemon.key().replace(['0', '1', '2', '3', '4', '5', '6', '7'], "8");
        ask(&format!("X-API-Key: {wrong}\r\n")).error(401);
        assert_ne!(ask(&format!("X-API-KEY: {}\r\n", daemon.key())).status, 401);
        assert_ne!(ask(&format!("authorization: Bearer {}\r\n", daemon.key())).status, 401);
    }
}

#[test]
fn a_sandbox_from_create_to_kill() {
    let daemon = Daemon::start();
    let body = json!({
        "templateID": TEMPLATE, "timeout": 60, "metadata": { "a b": "c&d" }, "envVars": { "X": "1" },
    });
    let reply = daemon.ask("POST", "/v2/sandboxes", Some(&body));
    assert_eq!(reply.status, 201, "{reply:?}");
    let created = reply.json();
    let id = created["sandboxID"].as_str().expect("an id");
    for field in ["templateID", "clientID", "envdVersion", "envdAccessToken"] {
        assert!(created[field].as_str().is_some_and(|text| !text.is_empty()), "{field}: {created}");
    }
    assert_eq!(created["alias"], TEMPLATE);
    assert_eq!(created.get("domain"), None, "no domain was configured");

    let got = daemon.ask("GET", &format!("/sandboxes/{id}"), None).json();
    assert_eq!(got["sandboxID"], id);
    assert_eq!(got["state"], "running");
    assert_eq!(got["envdAccessToken"], created["envdAccessToken"]);
    assert_eq!((&got["cpuCount"], &got["memoryMB"]), (&json!(2), &json!(MEMORY.count())));
    assert_eq!(got["diskSizeMB"], 1);
    assert_eq!(got["metadata"], json!({ "a b": "c&d" }));
    assert_eq!(lifetime(&got), 60);

    // An old client appends its own id.
    assert_eq!(daemon.ask("GET", &format!("/sandboxes/{id}-6532622b"), None).status, 200);

    let longer = json!({ "timeout": 600 });
    let reply = daemon.ask("POST", &format!("/sandboxes/{id}/timeout"), Some(&longer));
    assert_eq!((reply.status, reply.body.len()), (204, 0));
    let got = daemon.ask("GET", &format!("/sandboxes/{id}"), None).json();
    assert!((600..=605).contains(&lifetime(&got)), "{got}");

    let reply = daemon.ask("DELETE", &format!("/sandboxes/{id}"), None);
    assert_eq!((reply.status, reply.body.len()), (204, 0));
    let gone = format!("Sandbox \"{id}\" doesn't exist or you don't have access to it");
    for (method, path) in [("GET", ""), ("DELETE", ""), ("POST", "/timeout")] {
        let reply = daemon.ask(method, &format!("/sandboxes/{id}{path}"), Some(&longer));
        assert_eq!(reply.error(404), gone, "{method}");
    }
    assert!(daemon.vm_processes().is_empty());
}

/// Whole seconds between `startedAt` and `endAt`, which differ in their last digits only.
pub fn lifetime(detail: &Value) -> i64 {
    let seconds = |field: &str| {
        let text = detail[field].as_str().expect("a time");
        let number = |range| text.get(range).and_then(|n: &str| n.parse::<i64>().ok());
        let parts = [number(11..13), number(14..16), number(17..19)].map(|n| n.expect("digits"));
        assert!(text.ends_with('Z'), "{text}");
        parts[0] * 3600 + parts[1] * 60 + parts[2]
    };
    let difference = seconds("endAt") - seconds("startedAt");
    difference.rem_euclid(24 * 3600)
}

#[test]
fn connecting_shows_a_sandbox_and_never_shortens_its_life() {
    let daemon = Daemon::start();
    let body = json!({ "templateID": TEMPLATE, "timeout": 600 });
    let created = daemon.ask("POST", "/v2/sandboxes", Some(&body)).json();
    let id = created["sandboxID"].as_str().expect("an id");
    let connect = |version: &str, body: Option<Value>| {
        daemon.ask("POST", &format!("{version}/sandboxes/{id}/connect"), body.as_ref())
    };
    let life = || lifetime(&daemon.ask("GET", &format!("/sandboxes/{id}"), None).json());
    for body in [None, Some(json!({})), Some(json!({ "timeout": 1 }))] {
        let reply = connect("/v2", body.clone());
        assert_eq!((reply.status, reply.json()), (200, created.clone()), "{body:?}");
        assert_eq!(life(), 600, "{body:?}");
    }
    assert_eq!(connect("", Some(json!({ "timeout": 10 }))).status, 200);
    assert_eq!(life(), 600);
    assert_eq!(connect("", Some(json!({ "timeout": 900 }))).status, 200);
    assert!((900..=905).contains(&life()), "{}", life());
    // CubeSandbox's clients leave it out on v1.
    assert_eq!(connect("", Some(json!({}))).status, 200);
    assert!(connect("/v2", Some(json!({ "timeout": -2 }))).error(400).contains("at least 1"));
    assert!(connect("/v2", Some(json!({ "timeout": 86401 }))).error(400).contains("24 hours"));
    let nobody = "i00000000000000000000";
    for path in ["/sandboxes", "/v2/sandboxes"] {
        let path = format!("{path}/{nobody}/connect");
        let message = daemon.ask("POST", &path, Some(&json!({ "timeout": 9 }))).error(404);
        let text = format!("Sandbox \"{nobody}\" doesn't exist or you don't have access to it");
        assert_eq!(message, text);
    }
}

#[test]
fn the_default_life_is_the_hosts_own() {
    let daemon = Daemon::start();
    for path in ["/sandboxes", "/v2/sandboxes"] {
        let body = json!({ "templateID": TEMPLATE });
        let id = daemon.ask("POST", path, Some(&body)).json()["sandboxID"].clone();
        let id = id.as_str().expect("an id");
        let got = daemon.ask("GET", &format!("/sandboxes/{id}"), None).json();
        assert!((299..=301).contains(&lifetime(&got)), "{path}: {got}");
    }
}

#[test]
fn a_sandbox_ends_with_its_timeout() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let path = format!("/sandboxes/{id}/timeout");
    assert_eq!(daemon.ask("POST", &path, Some(&json!({ "timeout": 1 }))).status, 204);
    let deadline = Instant::now() + PATIENCE;
    while daemon.ask("GET", &format!("/sandboxes/{id}"), None).status == 200 {
        assert!(Instant::now() < deadline, "it outlived its timeout");
        thread::sleep(Duration::from_millis(50));
    }
    let now = daemon.create();
    let path = format!("/sandboxes/{now}/timeout");
    assert_eq!(daemon.ask("POST", &path, Some(&json!({ "timeout": 0 }))).status, 204);
    while daemon.ask("GET", &format!("/sandboxes/{now}"), None).status == 200 {
        assert!(Instant::now() < deadline, "it outlived a timeout of 0");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn every_shard_answers_for_every_other() {
    let daemon = Daemon::start();
    let mut shards = BTreeSet::new();
    let mut ids = Vec::new();
    // Placement is the host's choice; an id tells which it was.
    while shards.len() < 2 {
        assert!(ids.len() < 16, "all sandboxes went to one shard of two: {ids:?}");
        let id = daemon.create();
        let parsed: SandboxId = id.parse().expect("an id of ours");
        shards.insert(parsed.shard(NonZeroU16::new(2).expect("two")));
        ids.push(id);
    }
    // The kernel spreads connections over the shards' listeners by a hash of the client's port.
    for _ in 0..16 {
        for id in &ids {
            let reply = daemon.ask("GET", &format!("/sandboxes/{id}"), None);
            assert_eq!(reply.json()["sandboxID"], **id);
        }
    }
    let listed = daemon.ask("GET", "/sandboxes", None).json();
    let listed: BTreeSet<_> = entries(&listed).into_iter().collect();
    assert_eq!(listed, ids.into_iter().collect());
}

fn entries(list: &Value) -> Vec<String> {
    let entry = |entry: &Value| entry["sandboxID"].as_str().expect("an id").to_owned();
    list.as_array().expect("a list").iter().map(entry).collect()
}

#[test]
fn lists_filter_order_and_page() {
    let daemon = Daemon::start();
    let mut ids = Vec::new();
    for label in ["c&d", "c&d", "other"] {
        let body = json!({ "templateID": TEMPLATE, "timeout": 60, "metadata": { "a b": label } });
        let created = daemon.ask("POST", "/v2/sandboxes", Some(&body)).json();
        ids.push(created["sandboxID"].as_str().expect("an id").to_owned());
    }
    // Encoded as the newest SDK does.
    let filter = "metadata=a%252520b%3Dc%252526d";
    for path in ["/v2/sandboxes", "/sandboxes"] {
        let found = daemon.ask("GET", &format!("{path}?{filter}&state=running%2Cpaused"), None);
        assert_eq!(found.headers["x-total-running"], "2");
        let found = found.json();
        assert_eq!(
            entries(&found).into_iter().collect::<BTreeSet<_>>(),
            ids[..2].iter().cloned().collect()
        );
        assert_eq!(found[0].get("envdAccessToken"), None, "a list shows no secrets");
    }
    assert!(entries(&daemon.ask("GET", "/v2/sandboxes?state=paused", None).json()).is_empty());

    let mut paged = Vec::new();
    let mut next = String::new();
    loop {
        let page = daemon.ask("GET", &format!("/v2/sandboxes?limit=2&order=asc{next}"), None);
        paged.extend(entries(&page.json()));
        match page.headers.get("x-next-token") {
            Some(token) => next = format!("&nextToken={token}"),
            None => break,
        }
    }
    assert_eq!(paged, ids, "oldest first, each once");
    let newest = daemon.ask("GET", "/v2/sandboxes?limit=1", None);
    assert_eq!(entries(&newest.json()), ids[2..]);
    assert!(daemon.ask("GET", "/v2/sandboxes?limit=0", None).error(400).contains("limit"));
}

#[test]
fn templates_have_every_field_an_sdk_demands() {
    let daemon = Daemon::start();
    daemon.create();
    let list = daemon.ask("GET", "/templates", None).json();
    let template = &list[0];
    assert_eq!(template["names"], json!([TEMPLATE]));
    assert_eq!(template["aliases"], json!([TEMPLATE]));
    assert_eq!(template["buildStatus"], "ready");
    assert_eq!(template["spawnCount"], 1);
    assert!(template["lastSpawnedAt"].is_string());
    for field in [
        "templateID",
        "buildID",
        "cpuCount",
        "memoryMB",
        "diskSizeMB",
        "public",
        "createdAt",
        "updatedAt",
        "createdBy",
        "buildCount",
        "envdVersion",
    ] {
        assert!(template.get(field).is_some(), "{field} is missing in {template}");
    }
    // A template can be named by its id as well.
    let body = json!({ "templateID": template["templateID"], "timeout": 60 });
    assert_eq!(daemon.ask("POST", "/v2/sandboxes", Some(&body)).status, 201);
}

#[test]
fn browsers_may_ask_first() {
    let daemon = Daemon::start();
    let mut connection = daemon.connect();
    connection.send(
        "OPTIONS /v2/sandboxes HTTP/1.1\r\nhost: x\r\norigin: http://page.example\r\n\
         access-control-request-method: POST\r\naccess-control-request-headers: x-api-key\r\n\r\n",
    );
    let reply = connection.reply();
    assert_eq!(reply.status, 204);
    assert_eq!(reply.headers["access-control-allow-origin"], "*");
    assert_eq!(reply.headers["access-control-allow-headers"], "x-api-key");
    assert!(reply.headers["access-control-allow-methods"].contains("POST"));
    let health = daemon.ask("GET", "/health", None);
    assert_eq!(health.headers["access-control-allow-origin"], "*");
}

#[test]
fn a_configured_domain_is_told_to_clients() {
    let daemon = Daemon::start_with(&["--domain", "Sandboxes.Example:8443"]);
    let body = json!({ "templateID": TEMPLATE, "timeout": 60 });
    let created = daemon.ask("POST", "/v2/sandboxes", Some(&body)).json();
    assert_eq!(created["domain"], "sandboxes.example:8443");
}
