//! Pauses and snapshots that keep the disk alone: who may ask for one, what it is while it lasts, and that
//! what comes of it has booted.
//!
//! The stand-in VM writes to its console when it boots, and only then: so a boot shows in the logs.

use serde_json::{Value, json};

use crate::daemon::{Daemon, eventually};
use crate::template::TEMPLATE;

/// What the stand-in writes when it boots.
const BOOTED: &str = "stand-in VM: no guest, no isolation";

fn create(daemon: &Daemon, wish: &Value) -> Value {
    let mut body = json!({
        "templateID": TEMPLATE, "timeout": 60, "metadata": { "a": "b" }, "envVars": { "X": "1" },
    });
    for (key, value) in wish.as_object().expect("an object") {
        body[key] = value.clone();
    }
    let created = daemon.ask("POST", "/v2/sandboxes", Some(&body));
    assert_eq!(created.status, 201, "{created:?}");
    created.json()
}

fn id_of(created: &Value) -> &str {
    created["sandboxID"].as_str().expect("an id")
}

fn has_booted(daemon: &Daemon, id: &str) -> bool {
    let logs = daemon.ask("GET", &format!("/v2/sandboxes/{id}/logs"), None);
    assert_eq!(logs.status, 200, "{logs:?}");
    String::from_utf8_lossy(&logs.body).contains(BOOTED)
}

/// The names below a directory of the store.
fn stored(daemon: &Daemon, below: &str) -> Vec<String> {
    let entries = std::fs::read_dir(daemon.directory().join("store").join(below)).expect(below);
    entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("text")).collect()
}

fn pause_to_disk(daemon: &Daemon, id: &str) {
    let paused = daemon.act_with(id, "pause", &json!({ "memory": false }));
    assert_eq!((paused.status, paused.body.len()), (204, 0), "{paused:?}");
    assert_eq!(daemon.state(id), "paused", "at the first look");
    assert_eq!(daemon.get(id).json()["pauseMode"], "filesystem");
}

#[test]
fn what_is_paused_without_memory_boots_when_it_is_resumed_or_connected_to() {
    let daemon = Daemon::start();
    let created = create(&daemon, &json!({ "autoResume": true }));
    let id = id_of(&created);
    for (way, expected) in [("resume", 201), ("connect", 201), ("v2", 201)] {
        let before = daemon.vm_of(id);
        pause_to_disk(&daemon, id);
        eventually("its process is gone", || !daemon.vm_processes().contains(&before));
        let kept = stored(&daemon, &format!("sandboxes/{id}"));
        assert!(!kept.iter().any(|name| name.starts_with("memory.")), "{kept:?}");
        let visit = daemon.to_sandbox(id, 8000, "GET /").send("\r\n").reply();
        assert_eq!(visit.error(502), "The sandbox was not found", "no request wakes it");
        for action in ["snapshots", "clone", "fork"] {
            assert!(daemon.act(id, action).error(409).contains("paused"), "{action}");
        }
        let again = daemon.act_with(id, "pause", &json!({ "memory": false })).error(409);
        assert!(again.contains("already paused"), "{again}");
        let body = json!({ "timeout": 300 });
        let reply = match way {
            "v2" => daemon.ask("POST", &format!("/v2/sandboxes/{id}/connect"), Some(&body)),
            way => daemon.act_with(id, way, &body),
        };
        // Id, tokens and all.
        assert_eq!((reply.status, reply.json()), (expected, created.clone()), "{way}");
        let got = daemon.get(id).json();
        assert_eq!((&got["state"], &got["metadata"]), (&json!("running"), &json!({ "a": "b" })));
        assert_eq!(got.get("pauseMode"), None, "of one that runs");
        assert!(has_booted(&daemon, id), "{way}");
        assert_ne!(daemon.vm_of(id), before, "{way}");
        let message = daemon.to_sandbox(id, 1, "GET /").send("\r\n").reply().error(502);
        assert!(message.contains("port is not open"), "its agent answers: {message}");
    }
    let snapshot = daemon.snapshot(id);
    let back = daemon.act_with(id, "rollback", &json!({ "snapshotID": snapshot }));
    assert_eq!(back.status, 200, "{back:?}");
    daemon.pause(id);
    assert_eq!(daemon.get(id).json()["pauseMode"], "full");
    assert_eq!(daemon.act(id, "resume").status, 201);
    assert_eq!(daemon.delete(id).status, 204);
    eventually("nothing of it is left", || daemon.holdings()[1..] == [0, 0, 0]);
}

#[test]
fn the_memory_of_a_paused_sandbox_is_dropped_for_who_does_not_want_it() {
    let daemon = Daemon::start();
    for path in ["resume", "connect"] {
        let id = daemon.create();
        daemon.pause(&id);
        let before = daemon.vm_of(&id);
        let reply = daemon.act_with(&id, path, &json!({ "memory": false, "timeout": 60 }));
        assert_eq!(reply.status, 201, "{reply:?}");
        assert!(has_booted(&daemon, &id), "{path}");
        assert_ne!(daemon.vm_of(&id), before, "{path}");
        // The template's own stays.
        eventually("its memory is dropped", || daemon.snapshots_kept() == 1);
        // One that runs is not booted again.
        let there = daemon.act_with(&id, "connect", &json!({ "memory": false, "timeout": 60 }));
        assert_eq!(there.status, 200, "{there:?}");
    }
    let kept = daemon.create();
    daemon.pause(&kept);
    assert_eq!(daemon.act_with(&kept, "connect", &json!({ "memory": true })).status, 201);
    assert!(!has_booted(&daemon, &kept));
}

#[test]
fn a_time_that_is_over_ends_in_a_pause_without_memory_if_that_was_wished_for() {
    let daemon = Daemon::start();
    let wish = json!({ "autoPause": true, "autoPauseMemory": false, "timeout": 1 });
    let created = create(&daemon, &wish);
    let id = id_of(&created);
    eventually("it is paused", || daemon.state(id) == "paused");
    assert_eq!(daemon.get(id).json()["pauseMode"], "filesystem");
    assert_eq!(daemon.get(id).json()["lifecycle"]["onTimeout"], "pause");
    assert_eq!(daemon.act_with(id, "connect", &json!({ "timeout": 60 })).status, 201);
    assert!(has_booted(&daemon, id));
    for (wish, about) in [
        (json!({ "autoPauseMemory": false }), "without `autoPause`"),
        (json!({ "autoPause": false, "autoPauseMemory": false }), "without `autoPause`"),
        (
            json!({ "autoPause": true, "autoPauseMemory": false, "autoResume": { "enabled": true } }),
            "`autoResume`",
        ),
    ] {
        let mut body = wish;
        body["templateID"] = json!(TEMPLATE);
        let message = daemon.ask("POST", "/v2/sandboxes", Some(&body)).error(400);
        assert!(message.contains(about), "{message}");
    }
}

#[test]
fn what_is_paused_without_memory_outlives_a_daemon_that_is_killed_and_its_template() {
    let mut daemon = Daemon::start();
    let wish = json!({ "autoPause": true, "autoPauseMemory": false });
    let created = create(&daemon, &wish);
    let id = id_of(&created);
    pause_to_disk(&daemon, id);
    daemon.crash();
    let store = mica_storage::Store::open(&daemon.directory().join("store")).expect("a store");
    assert!(store.delete_template(&TEMPLATE.parse().expect("a name")).expect("a deletion"));
    drop(store);
    daemon.restart();
    let got = daemon.get(id).json();
    assert_eq!((&got["state"], &got["pauseMode"]), (&json!("paused"), &json!("filesystem")));
    let reply = daemon.act(id, "resume");
    assert_eq!((reply.status, reply.json()), (201, created.clone()), "{reply:?}");
    assert!(has_booted(&daemon, id));
    // From here on there is no kernel to boot it with: so it keeps its memory.
    let refused = daemon.act_with(id, "pause", &json!({ "memory": false })).error(400);
    assert!(refused.contains("cannot go on from its disk alone"), "{refused}");
    assert_eq!(daemon.state(id), "running");
    // What was wished for at its create outlives daemons, too.
    daemon.crash();
    daemon.restart();
    assert_eq!(daemon.get(id).json()["lifecycle"]["onTimeout"], "pause");
    assert_eq!(daemon.delete(id).status, 204);
}

/// A snapshot of the disk alone.
fn snapshot_disk(daemon: &Daemon, id: &str) -> String {
    let made = daemon.act_with(id, "snapshots", &json!({ "memory": false }));
    assert_eq!(made.status, 201, "{made:?}");
    made.json()["snapshotID"].as_str().expect("an id").to_owned()
}

#[test]
fn what_is_made_from_a_snapshot_without_memory_boots() {
    let mut daemon = Daemon::start();
    let id = daemon.create();
    let before = daemon.vm_of(&id);
    let named = json!({ "memory": false, "name": "of-its-disk" });
    let made = daemon.act_with(&id, "snapshots", &named);
    assert_eq!(made.status, 201, "{made:?}");
    let snapshot = made.json()["snapshotID"].as_str().expect("an id").to_owned();
    let kept = stored(&daemon, &format!("snapshots/{snapshot}"));
    assert!(kept.iter().any(|name| name == "kernel"), "{kept:?}");
    assert!(!kept.iter().any(|name| name.starts_with("memory.")), "{kept:?}");
    // A template's name is none for it, whatever it keeps.
    for memory in [true, false] {
        let taken = json!({ "memory": memory, "name": TEMPLATE });
        let refused = daemon.act_with(&id, "snapshots", &taken).error(409);
        assert!(refused.contains("another name"), "{refused}");
    }
    // What it was made of goes on as it was, and is not to be put back to it.
    assert_eq!((daemon.state(&id).as_str(), daemon.vm_of(&id)), ("running", before));
    let refused = daemon.act_with(&id, "rollback", &json!({ "snapshotID": snapshot }));
    assert!(refused.error(409).contains("make a sandbox from it"), "{refused:?}");
    let memory = daemon.snapshot(&id);
    let back = daemon.act_with(&id, "rollback", &json!({ "snapshotID": memory }));
    assert_eq!(back.status, 200, "{back:?}");
    assert!(!has_booted(&daemon, &id));
    // Another daemon knows it, and its template need not be there.
    daemon.crash();
    let store = mica_storage::Store::open(&daemon.directory().join("store")).expect("a store");
    assert!(store.delete_template(&TEMPLATE.parse().expect("a name")).expect("a deletion"));
    drop(store);
    daemon.restart();
    let listed = daemon.ask("GET", &format!("/snapshots?sandboxID={id}"), None).json();
    let ids: Vec<_> =
        listed.as_array().expect("a list").iter().map(|one| &one["snapshotID"]).collect();
    assert_eq!(ids, [&json!(memory), &json!(snapshot)]);
    for name in [snapshot.as_str(), "of-its-disk"] {
        let created = create(&daemon, &json!({ "templateID": name }));
        let copy = id_of(&created);
        assert!(has_booted(&daemon, copy), "{name}");
        let got = daemon.get(copy).json();
        assert_eq!((&got["state"], &got["metadata"]), (&json!("running"), &json!({ "a": "b" })));
        // It is one like any other: it is forked, and goes on from its memory and from its disk.
        assert_eq!(daemon.act(copy, "fork").status, 201);
        daemon.pause(copy);
        assert_eq!(daemon.act(copy, "resume").status, 201);
        pause_to_disk(&daemon, copy);
        assert_eq!(daemon.act(copy, "resume").status, 201);
        snapshot_disk(&daemon, copy);
        assert_eq!(daemon.delete(copy).status, 204);
    }
    let deleted = daemon.ask("DELETE", &format!("/templates/{snapshot}"), None);
    assert_eq!(deleted.status, 204, "{deleted:?}");
    let gone = json!({ "templateID": snapshot });
    assert_eq!(daemon.ask("POST", "/v2/sandboxes", Some(&gone)).status, 404);
}

#[test]
fn a_snapshot_that_could_not_boot_is_not_made() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let store = mica_storage::Store::open(&daemon.directory().join("store")).expect("a store");
    assert!(store.delete_template(&TEMPLATE.parse().expect("a name")).expect("a deletion"));
    let refused = daemon.act_with(&id, "snapshots", &json!({ "memory": false })).error(400);
    assert!(refused.contains("cannot go on from its disk alone"), "{refused}");
    assert_eq!(daemon.ask("GET", "/snapshots", None).json(), json!([]), "none was made");
    assert_eq!(daemon.state(&id), "running");
    daemon.snapshot(&id);
}
