//! Templates that are built in another size than their base runs in: what they and their sandboxes have then,
//! and what is refused before anything runs.
//!
//! The stand-in VM writes to its console when it boots, and only then. It has no Linux that could count its
//! vCPUs: `tests/e2e/test_sizes.py` has.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::builds::{create, daemon, messages, nothing_runs, once, run, start, step};
use crate::daemon::{Daemon, eventually};
use crate::template::TEMPLATE;

fn announce(daemon: &Daemon, wish: &Value) -> (String, String) {
    let reply = daemon.ask("POST", "/v3/templates", Some(wish));
    assert_eq!(reply.status, 202, "{reply:?}");
    let text = |field: &str| reply.json()[field].as_str().expect("a text").to_owned();
    (text("templateID"), text("buildID"))
}

/// Builds a template of this size on `base`: its id, and what the build said.
fn build(
    daemon: &Daemon,
    name: &str,
    (vcpus, memory): (u32, u32),
    base: &str,
    steps: &Value,
) -> (String, Vec<String>) {
    let wish = json!({ "name": name, "cpuCount": vcpus, "memoryMB": memory });
    let build = announce(daemon, &wish);
    start(daemon, &build, &json!({ "fromTemplate": base, "steps": steps }));
    let done = once(daemon, &build, &["ready"]);
    (build.0, messages(&done))
}

fn size_of(shown: &Value) -> (u64, u64) {
    let number = |field: &str| shown[field].as_u64().expect("a number");
    (number("cpuCount"), number("memoryMB"))
}

/// The size that the list of templates has.
fn listed(daemon: &Daemon, template: &str) -> (u64, u64) {
    let all = daemon.ask("GET", "/templates", None).json();
    let mut all = all.as_array().expect("a list").iter();
    size_of(all.find(|shown| shown["templateID"] == template).expect("it is listed"))
}

fn booted(log: &[String]) -> bool {
    log.iter().any(|line| line.starts_with("Booting"))
}

/// The disks of all snapshots.
fn disks(daemon: &Daemon) -> Vec<PathBuf> {
    let snapshots = std::fs::read_dir(daemon.directory().join("store/snapshots")).expect("a list");
    let disks = snapshots.map(|entry| entry.expect("an entry").path().join("disk"));
    disks.filter(|disk| disk.exists()).collect()
}

#[test]
fn a_build_of_another_size_boots_its_base_in_it() {
    let (daemon, _) = daemon(&[]);
    let before = daemon.snapshots_kept();
    let steps = json!([step("ENV", &["COLOUR", "green"]), run("true")]);
    let (large, log) = build(&daemon, "large", (4, 256), TEMPLATE, &steps);
    assert!(booted(&log), "{log:?}");
    assert_eq!(listed(&daemon, &large), (4, 256));
    nothing_runs(&daemon);
    eventually("nothing is left on the way", || daemon.snapshots_kept() == before + 1);
    let contents: Vec<Vec<u8>> =
        disks(&daemon).iter().map(|disk| std::fs::read(disk).expect("a disk")).collect();
    assert_eq!(contents.len(), 2);
    assert_eq!(contents[0], contents[1], "it has the disk of its base");

    // What was built is a base like any other, also in its own size: then it goes on as it runs.
    let ask = json!([run("echo colour $COLOUR")]);
    let (_, log) = build(&daemon, "same", (4, 256), "large", &ask);
    assert!(!booted(&log) && log.contains(&"colour green".to_owned()), "{log:?}");
    let (small, log) = build(&daemon, "small", (1, 128), "large", &ask);
    assert!(booted(&log) && log.contains(&"colour green".to_owned()), "{log:?}");
    assert_eq!(listed(&daemon, &small), (1, 128));

    for (name, size) in [("large", (4, 256)), ("same", (4, 256)), ("small", (1, 128))] {
        let created = create(&daemon, name);
        assert_eq!(created.status, 201, "{name}: {created:?}");
        let created = created.json();
        let id = created["sandboxID"].as_str().expect("an id");
        assert_eq!(size_of(&daemon.get(id).json()), size, "{name}");
        // The kernel is found through all that it was built on.
        let paused = daemon.act_with(id, "pause", &json!({ "memory": false }));
        assert_eq!(paused.status, 204, "{name}: {paused:?}");
        assert_eq!(daemon.act(id, "resume").status, 201, "{name}");
        assert_eq!(size_of(&daemon.get(id).json()), size, "{name}");
        assert_eq!(daemon.delete(id).status, 204);
    }
    nothing_runs(&daemon);
}

#[test]
fn a_size_that_cannot_be_is_refused_when_it_is_asked_for() {
    let (daemon, _) = daemon(&[]);
    for (wish, said) in [
        (json!({ "cpuCount": 0 }), "1 to 8"),
        (json!({ "cpuCount": 9 }), "1 to 8"),
        (json!({ "memoryMB": 0 }), "128 to 8192"),
        (json!({ "memoryMB": 8193 }), "128 to 8192"),
        (json!({ "minFreeDiskMb": 2 }), "--disk-mib"),
        (json!({ "minFreeDiskMb": "2" }), "minFreeDiskMb"),
    ] {
        let mut wish = wish;
        wish["name"] = json!("app");
        let message = daemon.ask("POST", "/v3/templates", Some(&wish)).error(400);
        assert!(message.contains(said), "{message}");
    }
    announce(&daemon, &json!({ "name": "app", "minFreeDiskMb": 0 }));
}
