//! What the host shows of itself: `GET /metrics` and `GET /ui/state`.
//!
//! The exposition is read by `exposition`, which knows no family: what it finds is then held against what was
//! done. What of it is each shard's own is in `series`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::daemon::{Daemon, NO_POOL, eventually};
use crate::exposition::{Exposition, scrape, scrape_at};
use crate::template::TEMPLATE;

const OPERATIONS: [(&str, &[&str]); 8] = [
    ("create", &["route", "layers", "pool", "state", "run", "ready"]),
    ("restore", &["route", "layers", "pool", "state", "run", "ready"]),
    ("snapshot", &["freeze", "scan", "copy", "write", "sync", "commit"]),
    ("pause", &["freeze", "scan", "copy", "write", "sync", "commit"]),
    ("resume", &["layers", "pool", "state", "run", "ready"]),
    ("rollback", &["freeze", "plan", "state", "run", "ready"]),
    ("clone", &["snapshot", "copies"]),
    ("kill", &[]),
];

/// Checks the counts of operations that succeeded, and that their phases add up to them.
fn check_operations(exposition: &Exposition, expected: &[(&str, u32)]) {
    for (operation, phases) in OPERATIONS {
        let expected = expected.iter().find(|(name, _)| *name == operation).map_or(0, |(_, n)| *n);
        let of = |result| [("operation", operation), ("result", result)];
        let ok = exposition.get("mica_operations_total", &of("ok"));
        assert_eq!(ok, f64::from(expected), "{operation}");
        assert_eq!(exposition.get("mica_operations_total", &of("error")), 0.0, "{operation}");
        let own = [("operation", operation)];
        assert_eq!(exposition.get("mica_operation_seconds_count", &own), ok, "{operation}");
        let total = exposition.get("mica_operation_seconds_sum", &own);
        let mut sum = 0.0;
        for phase in phases {
            let own = [("operation", operation), ("phase", *phase)];
            let count = exposition.get("mica_operation_phase_seconds_count", &own);
            assert_eq!(count, ok, "{operation} {phase}");
            sum += exposition.get("mica_operation_phase_seconds_sum", &own);
        }
        // What no phase had is the last one's.
        let is_all = phases.is_empty() || (sum - total).abs() <= 1e-6 * ok;
        assert!(is_all, "{operation}: the phases took {sum} s of {total} s");
        assert_eq!(total > 0.0, expected > 0, "{operation}");
    }
}

/// Checks that each phase of the operations that were done took some time, but for these.
fn check_phases_take_time(exposition: &Exposition, done: &[(&str, u32)], idle: &[(&str, &str)]) {
    let was_done = |name: &str| done.iter().any(|(done, _)| *done == name);
    for (operation, phases) in OPERATIONS.into_iter().filter(|(name, _)| was_done(name)) {
        for phase in phases {
            let own = [("operation", operation), ("phase", *phase)];
            let took = exposition.get("mica_operation_phase_seconds_sum", &own);
            let is_idle = idle.contains(&(operation, *phase));
            assert_eq!(took == 0.0, is_idle, "{operation} {phase} took {took} s");
        }
    }
}

/// Numbers that are looked at only when somebody asks: one sandbox runs, the other was killed.
fn check_the_rest(exposition: &Exposition) {
    let one = |name: &str| exposition.get(name, &[]);
    assert_eq!(exposition.get("mica_sandboxes", &[("state", "running")]), 1.0);
    // Every start made its own process: there is no pool. The resume had kept its own.
    assert_eq!((one("mica_pool_hits_total"), one("mica_pool_misses_total")), (0.0, 2.0));
    assert_eq!(one("mica_pool_spawn_seconds_count"), 2.0);
    assert!(exposition.get("mica_vm_page_faults", &[("kind", "minor")]) > 0.0);
    assert!(one("mica_vm_cow_bytes") > 0.0 && one("mica_vm_resident_bytes") > 0.0);
    // Two captures went through the rings: each wrote at least its layer.
    for kind in ["write", "sync", "allocate"] {
        let of = |part: &str| {
            exposition.get(&format!("mica_ring_operation_seconds_{part}"), &[("kind", kind)])
        };
        assert!(of("count") >= 2.0 && of("sum") > 0.0, "{kind}: {} in {}", of("count"), of("sum"));
    }
    assert!(one("mica_ring_submissions_total") >= 2.0);
    assert_eq!(one("mica_ring_depth"), 0.0);
    assert!(one("mica_executor_busy_seconds_total") > one("mica_executor_task_seconds_total"));
    assert!(one("mica_executor_idle_seconds_total") > 0.0);
    assert!(one("mica_mailbox_taken_total") > 0.0, "a scrape itself crosses shards");
    assert!(one("mica_mailbox_depth") <= 1.0 && one("mica_mailbox_full_total") == 0.0);
    assert!(one("mica_uptime_seconds") > 0.0);
    let created = |mode, success| {
        let labels = [("mode", mode), ("success", success)];
        exposition.get("fastpath_create_sandbox_duration_seconds_count", &labels)
    };
    assert_eq!((created("strong", "true"), created("strong", "false")), (2.0, 0.0));
    assert_eq!((created("fast", "true"), created("fast", "false")), (0.0, 0.0));
    let bounds: BTreeSet<&str> = exposition
        .samples
        .keys()
        .filter(|(name, _)| name == "fastpath_create_sandbox_duration_seconds_bucket")
        .map(|(_, labels)| labels["le"].as_str())
        .collect();
    let expected = ["0.001", "0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1", "+Inf"];
    assert_eq!(bounds, BTreeSet::from(expected));
}

#[test]
fn operations_are_counted_once_and_their_phases_add_up_to_them() {
    let daemon = Daemon::start_with(&NO_POOL);
    check_operations(&scrape(&daemon), &[]);
    let id = daemon.create();
    let snapshot = daemon.snapshot(&id);
    daemon.pause(&id);
    assert_eq!(daemon.act(&id, "resume").status, 201);
    let back = json!({ "snapshotID": snapshot });
    assert_eq!(daemon.act_with(&id, "rollback", &back).status, 200);
    let body = json!({ "templateID": snapshot, "timeout": 300 });
    assert_eq!(daemon.ask("POST", "/v2/sandboxes", Some(&body)).status, 201);
    assert_eq!(daemon.act(&id, "resume").status, 409, "it runs");
    assert_eq!(daemon.delete(&id).status, 204);
    // Processes are looked at once a second at most, and the first scrape found none.
    eventually("processes are looked at again", || {
        scrape(&daemon).get("mica_vm_page_faults", &[("kind", "minor")]) > 0.0
    });
    let exposition = scrape(&daemon);
    let one = |operation| (operation, 1);
    let done = ["create", "restore", "snapshot", "pause", "resume", "rollback", "kill"].map(one);
    check_operations(&exposition, &done);
    // Its process was kept.
    let idle = ["layers", "pool", "state"].map(|phase| ("resume", phase));
    check_phases_take_time(&exposition, &done, &idle);
    let refused = [("operation", "resume"), ("result", "refused")];
    assert_eq!(exposition.get("mica_operations_total", &refused), 1.0);
    let created = [("method", "POST"), ("route", "/v2/sandboxes"), ("status", "2xx")];
    assert_eq!(exposition.get("mica_http_requests_total", &created), 2.0);
    let conflict =
        [("method", "POST"), ("route", "/sandboxes/{sandboxID}/resume"), ("status", "4xx")];
    assert_eq!(exposition.get("mica_http_requests_total", &conflict), 1.0);
    assert_eq!(exposition.kinds["mica_operation_phase_seconds"], "histogram");
    assert_eq!(daemon.threads().iter().filter(|name| *name == "watchdog").count(), 1);
    check_the_rest(&exposition);
}

#[test]
fn the_state_is_in_pages_and_says_what_was_done() {
    let daemon = Daemon::start();
    let ids: BTreeSet<String> = (0..3).map(|_| daemon.create()).collect();
    let paused = ids.first().expect("one").clone();
    daemon.pause(&paused);
    let whole = daemon.ask("GET", "/ui/state", None);
    assert_eq!(whole.status, 200, "{whole:?}");
    assert_eq!(whole.headers.get("x-next-token"), None);
    let whole = whole.json();
    let host = &whole["host"];
    assert_eq!(host["version"], env!("CARGO_PKG_VERSION"));
    assert!(host["uptime_s"].as_f64().is_some_and(|s| s > 0.0), "{host}");
    assert!(host["nodes"][0]["memory_bytes"].as_u64() > host["nodes"][0]["free_bytes"].as_u64());
    let shards = host["shards"].as_array().expect("shards");
    assert_eq!(shards.len(), 2);
    let sum = |pick: fn(&Value) -> &Value| -> u64 {
        shards.iter().map(|shard| pick(shard).as_u64().expect("a number")).sum()
    };
    assert_eq!(sum(|shard| &shard["sandboxes"]), 3);
    assert_eq!(sum(|shard| &shard["ops"]["create"]["count"]), 3);
    assert_eq!(sum(|shard| &shard["ops"]["pause"]["count"]), 1);
    for shard in shards {
        assert!(shard["busy_fraction"].as_f64().is_some_and(|share| (0.0..=1.0).contains(&share)));
        let create = &shard["ops"]["create"];
        if create["count"] != 0 {
            let of = |what: &Value| what["p50_us"].as_u64().expect("a time");
            assert!(of(&create["phases"]["ready"]) <= create["p99_us"].as_u64().expect("a time"));
        }
    }
    let shown = whole["sandboxes"].as_array().expect("sandboxes");
    let found: BTreeSet<String> =
        shown.iter().map(|s| s["id"].as_str().expect("an id").to_owned()).collect();
    assert_eq!((found, &whole["sandboxes_total"]), (ids.clone(), &json!(3)));
    for sandbox in shown {
        let wanted = if sandbox["id"] == paused.as_str() { "paused" } else { "running" };
        assert_eq!((&sandbox["state"], &sandbox["template"]), (&json!(wanted), &json!(TEMPLATE)));
        assert_eq!(sandbox["tenant"], "default");
        assert!(sandbox["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{sandbox}");
    }

    let mut paged = Vec::new();
    let mut query = "limit=2".to_owned();
    for page in 0..2 {
        let reply = daemon.ask("GET", &format!("/ui/state?{query}"), None);
        let json = reply.json();
        paged.extend(
            json["sandboxes"].as_array().expect("sandboxes").iter().map(|s| s["id"].clone()),
        );
        assert_eq!(json["sandboxes_total"], 3);
        match reply.headers.get("x-next-token") {
            Some(token) => query = format!("limit=2&nextToken={token}"),
            None => assert_eq!(page, 1),
        }
    }
    let all: Vec<Value> = shown.iter().map(|sandbox| sandbox["id"].clone()).collect();
    assert_eq!(paged, all);
    daemon.ask("GET", "/ui/state?limit=0", None).error(400);
}

#[test]
fn what_is_on_a_wrong_node_is_known_of_each_sandbox_and_of_all() {
    let daemon = Daemon::start();
    let sums = |exposition: &Exposition| {
        let sum = |name: &str| exposition.samples.get(&(name.to_owned(), BTreeMap::new())).copied();
        (sum("mica_vm_wrong_node_pages"), sum("mica_vm_wrong_node_cpu_seconds"))
    };
    assert_eq!(sums(&scrape(&daemon)), (Some(0.0), Some(0.0)), "of nobody it is known");
    let ids: Vec<String> = (0..2).map(|_| daemon.create()).collect();
    // With several memory nodes it is known after a first look, with one at once.
    eventually("what is on a wrong node is known", || {
        let state = daemon.ask("GET", "/ui/state", None).json();
        let sandboxes = state["sandboxes"].as_array().expect("sandboxes").clone();
        assert_eq!(sandboxes.len(), 2);
        sandboxes.iter().all(|one| {
            let (pages, time) = (&one["wrong_node_pages"], &one["wrong_node_cpu_s"]);
            assert_eq!(pages.is_u64(), time.is_f64(), "{one}");
            pages.is_u64()
        })
    });
    let (pages, time) = sums(&scrape(&daemon));
    assert!(pages.is_some() && time.is_some_and(|time| time >= 0.0), "{pages:?} {time:?}");
    let nodes = std::fs::read_to_string("/sys/devices/system/node/has_memory");
    if nodes.is_ok_and(|nodes| nodes.trim() == "0") {
        assert_eq!(pages, Some(0.0), "there is no other node");
    }
    let each = scrape_at(&daemon, "/metrics/sandboxes");
    for id in &ids {
        let own = [("sandbox", id.as_str()), ("template", TEMPLATE), ("tenant", "default")];
        assert!(each.get("mica_sandbox_memory_bytes", &own) > 0.0);
        assert!(each.get("mica_sandbox_wrong_node_pages", &own) >= 0.0);
        assert!(each.get("mica_sandbox_wrong_node_cpu_seconds", &own) >= 0.0);
    }
    for id in ids {
        assert_eq!(daemon.delete(&id).status, 204);
    }
    assert!(scrape_at(&daemon, "/metrics/sandboxes").samples.is_empty());
    assert_eq!(sums(&scrape(&daemon)), (Some(0.0), Some(0.0)), "their counts went with them");
}

#[test]
fn without_metrics_nothing_is_counted_and_the_state_is_there() {
    let daemon = Daemon::start_with(&["--metrics", "off"]);
    let id = daemon.create();
    daemon.ask("GET", "/metrics", None).error(404);
    daemon.ask("GET", "/metrics/sandboxes", None).error(404);
    assert!(!daemon.threads().iter().any(|name| name == "watchdog"));
    let state = daemon.ask("GET", "/ui/state", None).json();
    assert_eq!(
        (&state["host"]["metrics"], &state["sandboxes"][0]["id"]),
        (&json!(false), &json!(id))
    );
    for shard in state["host"]["shards"].as_array().expect("shards") {
        assert_eq!(
            (&shard["ops"]["create"]["count"], &shard["ops"]["create"]["p50_us"]),
            (&json!(0), &Value::Null)
        );
    }
}

#[test]
fn a_line_for_each_operation_says_where_the_time_went() {
    let mut log = std::path::PathBuf::new();
    let daemon = Daemon::start_as(
        &["-v", "2"],
        |directory| log = directory.join("log"),
        |command| {
            let directory = command.get_args().skip_while(|word| *word != "--store").nth(1);
            let log = std::path::Path::new(directory.expect("a store")).with_file_name("log");
            command.stderr(std::fs::File::create(log).expect("a log"));
        },
    );
    let id = daemon.create();
    daemon.pause(&id);
    assert_eq!(daemon.delete(&id).status, 204);
    let log = std::fs::read_to_string(log).expect("the log");
    for (operation, phases) in OPERATIONS {
        let line = log.lines().find(|line| line.contains(&format!(": {operation} {id} ok ")));
        if !["create", "pause", "kill"].contains(&operation) {
            assert!(line.is_none(), "{line:?}");
            continue;
        }
        let line = line.unwrap_or_else(|| panic!("no {operation} in {log}"));
        let (head, spent) = line.split_once(" µs").expect("a time");
        let total: u64 = head.rsplit_once(' ').expect("a time").1.parse().expect("a number");
        let mut sum = 0;
        for (phase, spent) in phases.iter().zip(spent.trim_start_matches(": ").split(", ")) {
            let us = spent.strip_prefix(&format!("{phase} ")).expect("phases in order");
            sum += us.parse::<u64>().expect("a number");
        }
        // Each is cut down to whole microseconds.
        let cut = phases.len() as u64;
        assert!(sum <= total && (phases.is_empty() || total <= sum + cut), "{line}");
        assert_eq!(spent.is_empty(), phases.is_empty(), "{line}");
    }
}
