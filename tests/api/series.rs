//! What of `GET /metrics` is each shard's own, and what the host's.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use serde_json::{Value, json};

use crate::builds;
use crate::daemon::{Daemon, eventually};
use crate::exposition::{Exposition, scrape, scrape_at};

/// What the whole host has, which no shard counts.
fn check_the_host(daemon: &Daemon, exposition: &Exposition) {
    let state = daemon.ask("GET", "/ui/state", None).json();
    let [(info, one)] = exposition.series("mica_build_info")[..] else { panic!("one build") };
    assert_eq!((info["version"].as_str(), one), (env!("CARGO_PKG_VERSION"), 1.0));
    assert_eq!(state["host"]["kernel"], info["kernel"].as_str());
    let nodes = state["host"]["nodes"].as_array().expect("nodes");
    let (all, free) =
        (exposition.series("mica_node_memory_bytes"), exposition.series("mica_node_free_bytes"));
    assert_eq!((all.len(), free.len()), (nodes.len(), nodes.len()));
    for (node, ((of, memory), (of_free, free))) in nodes.iter().zip(all.into_iter().zip(free)) {
        let wanted = BTreeMap::from([("node".to_owned(), node["node"].to_string())]);
        assert_eq!((of, of_free), (&wanted, &wanted));
        assert_eq!(node["memory_bytes"].as_f64(), Some(memory));
        assert!(0.0 < free && free < memory, "{free} of {memory}");
    }
    let store = daemon.directory().join("store");
    let doctor = std::process::Command::new(env!("CARGO_BIN_EXE_mica"))
        .args(["doctor", "--json", "--store"])
        .arg(&store)
        .output()
        .expect("mica doctor");
    let rows: Vec<Value> = serde_json::from_slice(&doctor.stdout).expect("rows");
    let clones = rows.iter().any(|row| row["check"] == "reflink" && row["status"] == "ok");
    let copies = exposition.get("mica_disk_copies_total", &[]);
    assert_eq!(copies == 0.0, clones, "{copies} copies where files are cloned: {clones}");
}

#[test]
fn each_shard_has_a_series_of_its_own_and_the_host_has_its() {
    let daemon = Daemon::start_with(&["--pool-min", "2", "--pool-max", "2"]);
    let ids: Vec<String> = (0..2).map(|_| daemon.create()).collect();
    eventually("each shard's pool is full, and processes were looked at", || {
        let found = scrape(&daemon);
        let depths: Vec<f64> = found.series("mica_pool_depth").iter().map(|(_, n)| *n).collect();
        let one = |name: &str, labels: &[(&str, &str)]| found.get(name, labels);
        let (building, faults) =
            (one("mica_pool_building", &[]), one("mica_vm_page_faults", &[("kind", "minor")]));
        println!("depths {depths:?}, {building} in the making, {faults} faults");
        depths.iter().all(|depth| *depth == 2.0) && building == 0.0 && faults > 0.0
    });
    let exposition = scrape(&daemon);
    let state = daemon.ask("GET", "/ui/state", None).json();
    let shards = state["host"]["shards"].as_array().expect("shards");
    let wanted: BTreeSet<(String, String)> =
        shards.iter().map(|one| (one["shard"].to_string(), one["node"].to_string())).collect();
    assert_eq!(wanted.len(), 2);
    for name in [
        "mica_pool_depth",
        "mica_pool_building",
        "mica_ring_free_buffers",
        "mica_vm_cpu_seconds",
        "mica_executor_stalled_seconds_total",
        "mica_mailbox_depth",
    ] {
        let series = exposition.series(name);
        let of: BTreeSet<(String, String)> =
            series.iter().map(|(of, _)| (of["shard"].clone(), of["node"].clone())).collect();
        assert_eq!((series.len(), &of), (2, &wanted), "{name}");
    }
    // Whose sandboxes these are is known from elsewhere.
    for shard in shards {
        let own = |(of, _): &&(&BTreeMap<String, String>, f64)| {
            of["shard"].parse().ok() == shard["shard"].as_u64()
        };
        let of_it =
            |name: &str| exposition.series(name).iter().filter(own).map(|(_, n)| n).sum::<f64>();
        assert_eq!(Some(of_it("mica_sandboxes")), shard["sandboxes"].as_f64(), "{shard}");
        assert!(of_it("mica_ring_free_buffers") > 0.0, "{shard}");
        // Stalls that are over have lasted: at least as long as the watchdog is patient, but for the one at hand.
        let (stalls, stalled) =
            (of_it("mica_executor_stalls_total"), of_it("mica_executor_stalled_seconds_total"));
        assert!(stalled >= (stalls - 1.0).max(0.0) * 0.005 && (stalls > 0.0 || stalled == 0.0));
    }
    check_the_host(&daemon, &exposition);
    // Each pool has what a create wants.
    let pool = |of: &Exposition| {
        (of.get("mica_pool_hits_total", &[]), of.get("mica_pool_misses_total", &[]))
    };
    let (hits, misses) = pool(&exposition);
    daemon.create();
    assert_eq!(pool(&scrape(&daemon)), (hits + 1.0, misses), "it found a process that was ready");
    // They have had no more than there was, and what one of them used is whole ticks of 10 ms.
    let (cpu, uptime) =
        (exposition.get("mica_vm_cpu_seconds", &[]), exposition.get("mica_uptime_seconds", &[]));
    let cores = std::thread::available_parallelism().expect("cores").get();
    let ticks = cpu * 100.0;
    assert!((0.0..=uptime * cores as f64 + 1.0).contains(&cpu), "{cpu} s of {uptime} s");
    assert!((ticks - ticks.round()).abs() < 1e-6, "{cpu} s");
    // What one used is known from the second look on.
    eventually("it is known what each sandbox uses", || {
        let each = scrape_at(&daemon, "/metrics/sandboxes");
        let uses = each.series("mica_sandbox_processors");
        assert!(uses.iter().all(|(of, used)| *used >= 0.0 && ids.contains(&of["sandbox"])));
        uses.len() == ids.len()
    });
}

#[test]
fn a_request_to_a_sandbox_is_counted_by_the_status_that_its_client_got() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = server.local_addr().expect("an address").port();
    let answers = thread::spawn(move || {
        for answer in ["204 No Content", "404 Not Found"] {
            let (mut stream, _) = server.accept().expect("a connection");
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).expect("a head");
                head.push(byte[0]);
            }
            let answer =
                format!("HTTP/1.1 {answer}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            stream.write_all(answer.as_bytes()).expect("an answer");
        }
    });
    let ask = |port| {
        let mut client = daemon.to_sandbox(&id, port, "GET /");
        client.send("\r\n");
        client.head().0
    };
    assert_eq!((ask(port), ask(port)), (204, 404));
    answers.join().expect("a server");
    // Its listener is gone with it.
    assert_eq!(ask(port), 502);
    let exposition = scrape(&daemon);
    let counted = ["2xx", "3xx", "4xx", "5xx"]
        .map(|status| exposition.get("mica_proxied_requests_total", &[("status", status)]));
    assert_eq!(counted, [1.0, 0.0, 1.0, 1.0]);
    assert_eq!(exposition.get("mica_proxied_request_seconds_count", &[]), 3.0);
    assert!(exposition.get("mica_proxied_request_seconds_sum", &[]) > 0.0);
}

#[test]
fn a_create_of_a_template_that_is_not_there_counts_as_failed() {
    let daemon = Daemon::start();
    daemon.create();
    let body = json!({ "templateID": "no-such-template", "timeout": 300 });
    daemon.ask("POST", "/v2/sandboxes", Some(&body)).error(404);
    let exposition = scrape(&daemon);
    let created = |mode, success| {
        let labels = [("mode", mode), ("success", success)];
        exposition.get("fastpath_create_sandbox_duration_seconds_count", &labels)
    };
    assert_eq!((created("strong", "true"), created("strong", "false")), (1.0, 1.0));
    assert_eq!((created("fast", "true"), created("fast", "false")), (0.0, 0.0));
    let failed = [("operation", "create"), ("result", "error")];
    assert_eq!(exposition.get("mica_operations_total", &failed), 1.0);
    let took = [("operation", "create")];
    assert_eq!(
        exposition.get("mica_operation_seconds_count", &took),
        1.0,
        "the other is not timed"
    );
}

#[test]
fn a_create_of_a_template_that_a_tenant_built_counts_once() {
    let (daemon, _site) = builds::daemon(&[]);
    let (_, done) = builds::build(&daemon, "app", &json!([builds::step("ENV", &["A", "1"])]));
    assert_eq!(done["status"], "ready", "{done}");
    let counts = || {
        let exposition = scrape(&daemon);
        let fastpath = |success| {
            let labels = [("mode", "strong"), ("success", success)];
            exposition.get("fastpath_create_sandbox_duration_seconds_count", &labels)
        };
        let operations = |operation, result| {
            let labels = [("operation", operation), ("result", result)];
            exposition.get("mica_operations_total", &labels)
        };
        [
            fastpath("true"),
            fastpath("false"),
            operations("restore", "ok"),
            operations("create", "ok"),
            operations("create", "error"),
        ]
    };
    let before = counts();
    let made = builds::create(&daemon, "app");
    assert_eq!(made.status, 201, "{made:?}");
    let [ok, failed, restored, created, errors] = before;
    assert_eq!(counts(), [ok + 1.0, failed, restored, created + 1.0, errors]);
    // One without a build of the tag fails once, too.
    builds::create(&daemon, "app:none").error(404);
    assert_eq!(counts(), [ok + 1.0, failed + 1.0, restored, created + 1.0, errors + 1.0]);
}
