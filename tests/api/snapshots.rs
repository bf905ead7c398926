//! Snapshots: made, listed, started from by id and by name, gone back to, deleted while others live on them.

use serde_json::{Value, json};

use crate::client::Reply;
use crate::daemon::{Daemon, patiently};
use crate::template::TEMPLATE;

const NOBODY: &str = "i00000000000000000000";

fn ids(list: &Reply) -> Vec<String> {
    let id = |entry: &Value| entry["snapshotID"].as_str().expect("an id").to_owned();
    assert_eq!(list.status, 200, "{list:?}");
    list.json().as_array().expect("a list").iter().map(id).collect()
}

fn delete(daemon: &Daemon, snapshot: &str) -> Reply {
    daemon.ask("DELETE", &format!("/templates/{snapshot}"), None)
}

fn create_from(daemon: &Daemon, template: &str) -> Reply {
    let body = json!({ "templateID": template, "timeout": 60 });
    daemon.ask("POST", "/v2/sandboxes", Some(&body))
}

#[test]
fn a_snapshot_is_made_and_sandboxes_start_from_it() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let reply = daemon.act_with(&id, "snapshots", &json!({ "name": "before the test" }));
    assert_eq!(reply.status, 201, "{reply:?}");
    let made = reply.json();
    assert_eq!(made["names"], json!(["before the test"]));
    let snapshot = made["snapshotID"].as_str().expect("an id");
    assert_eq!(daemon.state(&id), "running", "it goes on");
    daemon.to_sandbox(&id, 1, "GET /").send("\r\n").reply().error(502);

    let created = create_from(&daemon, snapshot);
    assert_eq!(created.status, 201, "{created:?}");
    let other = created.json()["sandboxID"].as_str().expect("an id").to_owned();
    assert_ne!(other, id);
    assert_eq!(daemon.state(&other), "running");
    let message = daemon.to_sandbox(&other, 1, "GET /").send("\r\n").reply().error(502);
    assert!(message.contains("port is not open"), "its agent answers: {message}");
    // A chain: from a sandbox that was made from a snapshot, and of one that has one already.
    for source in [&id, &other] {
        let next = daemon.snapshot(source);
        assert_eq!(create_from(&daemon, &next).status, 201);
    }
    for body in [None, Some(json!({})), Some(json!({ "name": null, "memory": true }))] {
        let reply = daemon.ask("POST", &format!("/sandboxes/{id}/snapshots"), body.as_ref());
        assert_eq!((reply.status, &reply.json()["names"]), (201, &json!([])), "{body:?}");
    }
    daemon.act(NOBODY, "snapshots").error(404);
}

/// Makes a snapshot of this name, and gives its id and what it is listed as.
fn named(daemon: &Daemon, key: &str, id: &str, name: &str) -> (String, String) {
    let path = format!("/sandboxes/{id}/snapshots");
    let body = json!({ "name": name });
    let reply = patiently(|| daemon.ask_as(key, "POST", &path, Some(&body)));
    assert_eq!(reply.status, 201, "{name}: {reply:?}");
    let (made, text) = (reply.json(), |value: &Value| value.as_str().expect("a text").to_owned());
    (text(&made["snapshotID"]), text(&made["names"][0]))
}

/// A sandbox of what this stands for.
fn sandbox_of(daemon: &Daemon, key: &str, template: &str) -> Reply {
    let body = json!({ "templateID": template, "timeout": 60 });
    daemon.ask_as(key, "POST", "/v2/sandboxes", Some(&body))
}

#[test]
fn a_name_of_a_snapshot_stands_for_it_in_every_form() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let key = daemon.key();
    let (app, listed) = named(&daemon, key, &id, "App");
    assert_eq!(listed, "default/app:default");
    let (tagged, listed) = named(&daemon, key, &id, "default/app:v1");
    assert_eq!(listed, "default/app:v1");
    let (label, listed) = named(&daemon, key, &id, "before the test");
    assert_eq!(listed, "before the test");
    let all = ids(&daemon.ask("GET", "/snapshots", None));
    assert_eq!(all, [label.as_str(), tagged.as_str(), app.as_str()]);
    let one = |template: &str| {
        let made = sandbox_of(&daemon, key, template);
        assert_eq!(made.status, 201, "{template}: {made:?}");
    };
    let forms = [
        (&app, &["app", "APP", "default/app", "app:default", "default/app:default"][..]),
        (&tagged, &["app:v1", "default/app:v1"]),
        (&label, &["before the test"]),
    ];
    for (snapshot, names) in forms {
        one(snapshot);
        names.iter().for_each(|name| one(name));
        let list = |name: &str| {
            let name = name.replace(' ', "%20").replace('/', "%2F");
            ids(&daemon.ask("GET", &format!("/snapshots?name={name}"), None))
        };
        names.iter().for_each(|name| assert_eq!(list(name), [snapshot.as_str()], "{name}"));
        // What a name stands for goes with the snapshot.
        assert_eq!(delete(&daemon, snapshot).status, 204);
        for name in names {
            sandbox_of(&daemon, key, name).error(404);
        }
    }
    for unknown in ["app:v2", "other/app", "before"] {
        sandbox_of(&daemon, key, unknown).error(404);
    }
}

#[test]
fn of_several_snapshots_of_a_name_the_newest_is_meant() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let key = daemon.key();
    let first = named(&daemon, key, &id, "app").0;
    let second = named(&daemon, key, &id, "app:default").0;
    // Which one a sandbox began at shows when that one is damaged.
    // Without its memory nothing starts from the second, and so nothing by that name.
    let directory = daemon.directory().join("store/snapshots").join(&second);
    let files = std::fs::read_dir(&directory).expect("a directory").flatten();
    for file in files.filter(|file| file.file_name().to_string_lossy().starts_with("memory.")) {
        std::fs::remove_file(file.path()).expect("a file of its memory");
    }
    let reply = sandbox_of(&daemon, key, "app");
    assert!(reply.status >= 500, "{reply:?}");
    assert_eq!(delete(&daemon, &second).status, 204);
    assert_eq!(sandbox_of(&daemon, key, "app").status, 201, "the one before it");
    assert_eq!(delete(&daemon, &first).status, 204);
    sandbox_of(&daemon, key, "app").error(404);
}

#[test]
fn a_snapshot_is_deleted_by_any_of_its_names_the_newest_first() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let key = daemon.key();
    let other = daemon.make_key(&["--tenant", "other"]);
    let first = named(&daemon, key, &id, "app:v1").0;
    for (name, asked) in [
        ("app:v1", "default%2Fapp%3Av1"),
        ("App", "app"),
        ("app", "default%2Fapp%3Adefault"),
        ("before the test", "before%20the%20test"),
    ] {
        named(&daemon, key, &id, name);
        let path = format!("/templates/{asked}");
        daemon.ask_as(&other, "DELETE", &path, None).error(404);
        assert_eq!(delete(&daemon, asked).status, 204, "{name}");
        assert_eq!(ids(&daemon.ask("GET", "/snapshots", None)), std::slice::from_ref(&first));
    }
    assert_eq!(delete(&daemon, "default%2Fapp%3Av1").status, 204, "the one before it");
    for gone in ["default%2Fapp%3Av1", "app", "other%2Fapp"] {
        delete(&daemon, gone).error(404);
    }
}

#[test]
fn names_of_snapshots_are_their_tenants_own_and_no_templates() {
    let daemon = Daemon::start();
    let (one, two) = (daemon.make_key(&["--tenant", "one"]), daemon.make_key(&["--tenant", "two"]));
    let sandbox = |key: &str| {
        let made = sandbox_of(&daemon, key, TEMPLATE);
        assert_eq!(made.status, 201, "{made:?}");
        made.json()["sandboxID"].as_str().expect("an id").to_owned()
    };
    let (ours, theirs) = (sandbox(&one), sandbox(&two));
    let (_, listed) = named(&daemon, &one, &ours, "app");
    assert_eq!(listed, "one/app:default");
    named(&daemon, &one, &ours, "a label");
    for name in ["app", "one/app", "one/app:default", "a label"] {
        assert_eq!(sandbox_of(&daemon, &one, name).status, 201, "{name}");
        sandbox_of(&daemon, &two, name).error(404);
    }
    // The same name of another tenant's is another's.
    let (id, listed) = named(&daemon, &two, &theirs, "app");
    assert_eq!(listed, "two/app:default");
    assert_eq!(sandbox_of(&daemon, &two, "app").status, 201);
    let path = format!("/templates/{id}");
    assert_eq!(daemon.ask_as(&two, "DELETE", &path, None).status, 204);
    sandbox_of(&daemon, &two, "app").error(404);
    assert_eq!(sandbox_of(&daemon, &one, "app").status, 201);

    let path = format!("/sandboxes/{theirs}/snapshots");
    let refused = |name: &str| daemon.ask_as(&two, "POST", &path, Some(&json!({ "name": name })));
    for bad in ["one/app", "a/b/c", "a b:c", "two/a b"] {
        refused(bad).error(400);
    }
    for taken in [TEMPLATE, &format!("two/{TEMPLATE}:latest")] {
        assert!(refused(taken).error(409).contains(TEMPLATE), "{taken}");
    }
    // A template of the operator's has no other tag, so that is free.
    let (_, listed) = named(&daemon, &two, &theirs, &format!("{TEMPLATE}:v1"));
    assert_eq!(sandbox_of(&daemon, &two, &listed).status, 201);
}

#[test]
fn lists_show_each_snapshot_once_newest_first() {
    let daemon = Daemon::start();
    let (id, other) = (daemon.create(), daemon.create());
    let mut made: Vec<String> = (0..5).map(|_| daemon.snapshot(&id)).collect();
    made.reverse();
    let named = daemon.act_with(&other, "snapshots", &json!({ "name": "a b" })).json();
    let named = named["snapshotID"].as_str().expect("an id").to_owned();

    let list = |query: &str| daemon.ask("GET", &format!("/snapshots{query}"), None);
    let of_one = format!("?sandboxID={id}");
    assert_eq!(ids(&list("")).len(), 6);
    assert_eq!(ids(&list("?name=a%20b")), std::slice::from_ref(&named));
    assert_eq!(ids(&list(&format!("?sandboxID={other}"))), std::slice::from_ref(&named));
    assert_eq!(ids(&list(&of_one)), made);
    let entry = &list(&of_one).json()[0];
    assert_eq!(entry["originSandboxID"], *id);
    assert_eq!(entry["status"], "READY");
    assert!(entry["createdAt"].as_str().is_some_and(|time| time.ends_with('Z')), "{entry}");

    let (mut paged, mut next) = (Vec::new(), String::new());
    loop {
        let page = list(&format!("{of_one}&limit=2{next}"));
        paged.extend(ids(&page));
        let Some(token) = page.headers.get("x-next-token") else { break };
        next = format!("&nextToken={token}");
    }
    assert_eq!(paged, made);
    // They outlive their sandbox, and are listed under it.
    assert_eq!(daemon.delete(&id).status, 204);
    assert_eq!(ids(&list(&of_one)), made);
    assert!(ids(&list(&format!("?sandboxID={NOBODY}"))).is_empty());
    assert!(ids(&list("?sandboxID=nonexistingsandbox")).is_empty());
    for bad in ["?limit=0", "?limit=101", "?nextToken=zz", "?sandboxID=..", "?limit=%zz"] {
        list(bad).error(400);
    }
}

#[test]
fn a_snapshot_can_be_deleted_while_sandboxes_of_it_live() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let (first, second) = (daemon.snapshot(&id), daemon.snapshot(&id));
    let clone = create_from(&daemon, &first).json()["sandboxID"].clone();
    let clone = clone.as_str().expect("an id");
    let reply = delete(&daemon, &first);
    assert_eq!((reply.status, reply.body.len()), (204, 0), "{reply:?}");
    assert!(delete(&daemon, &first).error(404).contains(&first));
    create_from(&daemon, &first).error(404);
    let gone = json!({ "snapshotID": first });
    patiently(|| daemon.act_with(&id, "rollback", &gone)).error(404);
    assert_eq!(ids(&daemon.ask("GET", "/snapshots", None)), std::slice::from_ref(&second));
    // What was made from it, and what was made after it, goes on.
    assert_eq!(daemon.state(clone), "running");
    let of_clone = daemon.snapshot(clone);
    assert_eq!(create_from(&daemon, &of_clone).status, 201);
    assert_eq!(create_from(&daemon, &second).status, 201);
    let back = json!({ "snapshotID": second });
    let back = patiently(|| daemon.act_with(&id, "rollback", &back));
    assert_eq!(back.status, 200, "{back:?}");
}

#[test]
fn templates_are_not_deleted_by_clients() {
    let daemon = Daemon::start();
    let template = daemon.ask("GET", "/templates", None).json()[0]["templateID"].clone();
    for name in [TEMPLATE, template.as_str().expect("an id")] {
        let message = delete(&daemon, name).error(403);
        assert!(message.contains("mica template delete"), "{message}");
    }
    for unknown in ["00000000000000000000", "no-such", "..%2f..%2fetc", "a%2Fb", "UPPER"] {
        delete(&daemon, unknown).error(404);
    }
    daemon.create();
}

#[test]
fn a_rollback_keeps_the_sandbox_and_goes_to_its_own_snapshots_alone() {
    let daemon = Daemon::start();
    let (id, other) = (daemon.create(), daemon.create());
    let (first, second) = (daemon.snapshot(&id), daemon.snapshot(&id));
    let before = daemon.get(&id).json();
    let process = daemon.vm_of(&id);
    let back = |to: &str| {
        let to = json!({ "snapshotID": to });
        patiently(|| daemon.act_with(&id, "rollback", &to))
    };
    let mut operations = std::collections::BTreeSet::new();
    // Back, further back, and forth again.
    for to in [&second, &first, &second] {
        let reply = back(to);
        assert_eq!(reply.status, 200, "{reply:?}");
        let done = reply.json();
        assert_eq!((&done["sandboxID"], &done["snapshotID"]), (&json!(id), &json!(to)));
        assert_eq!(done["status"], "READY");
        operations.insert(done["operationID"].as_str().expect("an id").to_owned());
    }
    assert_eq!(operations.len(), 3, "each has an id of its own");
    assert_eq!(daemon.get(&id).json(), before, "the same sandbox, with the same end");
    assert_eq!(daemon.vm_of(&id), process, "in the same process");
    let message = daemon.to_sandbox(&id, 1, "GET /").send("\r\n").reply().error(502);
    assert!(message.contains("port is not open"), "its agent answers: {message}");

    let foreign = daemon.snapshot(&other);
    let message = back(&foreign).error(409);
    assert!(message.contains(&foreign) && message.contains(&id), "{message}");
    assert!(back("00000000000000000000").error(404).contains("snapshot"));
    let template = before["templateID"].as_str().expect("an id");
    assert!((400..500).contains(&back(template).status), "a template is nobody's snapshot");
    daemon.act_with(NOBODY, "rollback", &json!({ "snapshotID": first })).error(404);
    assert_eq!(daemon.state(&id), "running");
}
