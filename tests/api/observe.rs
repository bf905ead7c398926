//! What clients can see of a sandbox beyond its state, its network, templates, and what this host does
//! not offer.

use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::template::TEMPLATE;

#[test]
fn logs_hold_the_console_and_what_happened() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let snapshot = daemon.snapshot(&id);
    daemon.pause(&id);
    assert_eq!(daemon.act(&id, "resume").status, 201);
    let logs = |query: &str| {
        let reply = daemon.ask("GET", &format!("/sandboxes/{id}/logs{query}"), None);
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()
    };
    let first = logs("");
    let entries = first["logEntries"].as_array().expect("entries");
    let messages: Vec<&str> =
        entries.iter().map(|entry| entry["message"].as_str().expect("text")).collect();
    assert!(messages[0].starts_with("created from template "), "{messages:?}");
    let expected = [&format!("snapshot {snapshot} made"), "paused", "resumed"];
    assert_eq!(messages[1..4], expected);
    let lines = first["logs"].as_array().expect("lines");
    assert_eq!(lines.len(), entries.len());
    for (line, entry) in lines.iter().zip(entries) {
        assert_eq!(line["timestamp"], entry["timestamp"]);
        // As E2B's command line reads it.
        let parsed: Value =
            serde_json::from_str(line["line"].as_str().expect("text")).expect("JSON");
        assert_eq!((&parsed["level"], &parsed["message"]), (&json!("info"), &entry["message"]));
    }
    assert_eq!(logs("?limit=2")["logEntries"].as_array().map(Vec::len), Some(2));
    assert_eq!(logs("?start=99999999999999")["logEntries"], json!([]));
    let newer = |query: &str| daemon.ask("GET", &format!("/v2/sandboxes/{id}/logs?{query}"), None);
    let back = newer("direction=backward&search=snapshot").json();
    assert_eq!(back["logs"].as_array().map(Vec::len), Some(1), "{back}");
    assert_eq!(back["logs"][0]["fields"]["source"], "host");
    assert_eq!(newer("level=error").json(), json!({ "logs": [] }));
    assert!(newer("limit=1001").error(400).contains("`limit`"));
    daemon.ask("GET", "/v2/sandboxes/i00000000000000000000/logs", None).error(404);
}

#[test]
fn metrics_are_what_the_agent_says() {
    use crate::upstream::Upstream;
    let daemon = Daemon::start();
    let id = daemon.create();
    let path = format!("/sandboxes/{id}/metrics");
    // Nobody answers on envd's port.
    let none = daemon.ask("GET", &path, None);
    assert_eq!((none.status, none.json()), (200, json!([])));
    let token = daemon.get(&id).json()["envdAccessToken"].as_str().expect("a token").to_owned();
    for (number, path) in [(1, path.clone()), (2, format!("/sandboxes/metrics?sandbox_ids={id}"))] {
        let agent = Upstream::start_on_port(49983, move |mut served| {
            let head = served.head();
            let body = format!(
                r#"{{"ts":{number},"cpu_count":2,"cpu_used_pct":12.5,"mem_total":4,"mem_used":3,
                    "mem_cache":2,"disk_total":6,"disk_used":5}}"#
            );
            let length = body.len();
            served.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}"));
            head
        });
        let reply = daemon.ask("GET", &path, None);
        let head = agent.join();
        assert_eq!(head[0], "get /metrics http/1.1");
        assert!(head.contains(&format!("x-access-token: {token}")), "{head:?}");
        assert_eq!(reply.status, 200, "{reply:?}");
        let json = reply.json();
        let metric = if number == 1 { &json[0] } else { &json["sandboxes"][&id] };
        assert_eq!(metric["timestampUnix"], number);
        assert_eq!(metric["timestamp"], format!("1970-01-01T00:00:0{number}.000Z"));
        for (field, value) in [
            ("cpuCount", json!(2)),
            ("cpuUsedPct", json!(12.5)),
            ("memTotal", json!(4)),
            ("memUsed", json!(3)),
            ("memCache", json!(2)),
            ("diskTotal", json!(6)),
            ("diskUsed", json!(5)),
        ] {
            assert_eq!(metric[field], value, "{field}");
        }
    }
    let kept = daemon.ask("GET", &format!("{path}?start=2"), None).json();
    assert_eq!(
        kept.as_array().map(Vec::len),
        Some(1),
        "one of the two that were asked for: {kept}"
    );
    assert!(
        daemon.ask("GET", &format!("{path}?start=2&end=1"), None).error(400).contains("`start`")
    );
    daemon.ask("GET", "/sandboxes/metrics", None).error(400);
    let nobody = daemon.ask("GET", "/sandboxes/metrics?sandbox_ids=i00000000000000000000", None);
    assert_eq!(nobody.json(), json!({ "sandboxes": {} }));
}

#[test]
fn networks_are_kept_shown_and_replaced() {
    let mut daemon = Daemon::start();
    let body = json!({
        "templateID": TEMPLATE, "timeout": 300, "allow_internet_access": false,
        "network": { "allowPublicTraffic": false, "allowOut": ["1.1.1.1", "a.dev"] },
    });
    let created = daemon.ask("POST", "/v2/sandboxes", Some(&body));
    assert_eq!(created.status, 201, "{created:?}");
    let created = created.json();
    assert!(created["trafficAccessToken"].as_str().is_some_and(|token| !token.is_empty()));
    let id = created["sandboxID"].as_str().expect("an id").to_owned();
    let shown = daemon.get(&id).json();
    assert_eq!(shown["allowInternetAccess"], false);
    let expected = json!({ "allowPublicTraffic": false, "allowOut": ["1.1.1.1", "a.dev"] });
    assert_eq!(shown["network"], expected);
    assert_eq!(shown["lifecycle"], json!({ "autoResume": false, "onTimeout": "kill" }));

    let path = format!("/sandboxes/{id}/network");
    let update = json!({ "deny_out": ["10.0.0.0/8"], "maskRequestHost": "x.dev:${PORT}" });
    let updated = daemon.ask("PUT", &path, Some(&update));
    assert_eq!((updated.status, updated.body.len()), (204, 0), "{updated:?}");
    let expected = json!({
        "allowPublicTraffic": false, "denyOut": ["10.0.0.0/8"], "maskRequestHost": "x.dev:${PORT}",
    });
    let before = daemon.get(&id).json();
    assert_eq!(before["network"], expected);
    daemon.act_with(&id, "timeout", &json!({ "timeout": 1234 }));
    let wanted = daemon.get(&id).json()["endAt"].clone();
    assert_ne!(wanted, before["endAt"]);
    daemon.crash();
    daemon.restart();
    let shown = daemon.get(&id).json();
    assert_eq!(shown["endAt"], wanted, "what was answered is not lost");
    assert_eq!((&shown["network"], &shown["allowInternetAccess"]), (&expected, &json!(true)));
    let bad = daemon.ask("PUT", &path, Some(&json!({ "allowOut": ["a.dev"] })));
    assert!(bad.error(400).contains("`allowOut`"));
    daemon.pause(&id);
    assert!(daemon.ask("PUT", &path, Some(&update)).error(409).contains("paused"));
    let public = daemon.create();
    let plain = daemon.act_with(&public, "connect", &json!({ "timeout": 9 })).json();
    assert_eq!(plain.get("trafficAccessToken"), None);
}

#[test]
fn templates_by_id_by_name_and_in_pages() {
    let daemon = Daemon::start();
    let ask = |path: &str| daemon.ask("GET", path, None);
    let all = ask("/templates").json();
    let id = all[0]["templateID"].as_str().expect("an id").to_owned();
    assert_eq!(ask("/v2/templates?limit=1").json(), all);
    assert_eq!(ask(&format!("/v2/templates?nextToken={id}")).json(), json!([]));
    for name in [TEMPLATE, &id] {
        let alias = ask(&format!("/templates/aliases/{name}"));
        assert_eq!(alias.status, 200, "{alias:?}");
        assert_eq!(alias.json(), json!({ "templateID": id, "public": true }));
        let one = ask(&format!("/templates/{name}")).json();
        assert_eq!(one["templateID"], id);
        assert_eq!(one["builds"][0]["buildID"], all[0]["buildID"]);
        assert_eq!(one["builds"][0]["status"], "ready");
    }
    for unknown in ["/templates/aliases/nobody", "/templates/aliases/a%2Fb%3Ac", "/templates/x"] {
        ask(unknown).error(404);
    }
    assert!(ask("/default-templates").json().is_array());
    let path = format!("/templates/{id}/alias");
    let same = daemon.ask("PUT", &path, Some(&json!({ "alias": TEMPLATE })));
    assert_eq!((same.status, &same.json()["templateID"]), (200, &json!(id)));
    daemon.ask("PUT", &path, Some(&json!({ "alias": "other" }))).error(403);
    for path in [format!("/templates/{id}"), format!("/v2/templates/{id}")] {
        let public = daemon.ask("PATCH", &path, Some(&json!({ "public": true })));
        assert_eq!((public.status, public.json()), (200, json!({ "names": [TEMPLATE] })));
        daemon.ask("PATCH", &path, Some(&json!({ "public": false }))).error(403);
    }
    daemon.ask("DELETE", &format!("/templates/{id}"), None).error(403);
}

#[test]
fn what_is_not_offered_says_so_and_not_to_try_again() {
    let daemon = Daemon::start();
    for (method, path, what) in [
        ("GET", "/volumes", "volumes"),
        ("PUT", "/volumecontent/x/file", "volumes"),
        ("POST", "/secrets", "secrets"),
        ("DELETE", "/secrets/x", "secrets"),
        ("GET", "/teams", "teams"),
        ("POST", "/templates", "building templates"),
    ] {
        let reply = daemon.ask(method, path, None);
        assert!(reply.error(501).contains(what), "{method} {path}: {reply:?}");
        assert_eq!(reply.headers["should-retry"], "false", "{method} {path}");
    }
}
