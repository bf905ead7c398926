//! Clones, which all come up or none, and forks, each of which may fail for itself.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::daemon::{Daemon, eventually};
use crate::template::TEMPLATE;

const NOBODY: &str = "i00000000000000000000";

fn id_of(sandbox: &Value) -> String {
    sandbox["sandboxID"].as_str().expect("an id").to_owned()
}

fn all(daemon: &Daemon) -> BTreeSet<String> {
    let list = daemon.ask("GET", "/v2/sandboxes", None).json();
    list.as_array().expect("a list").iter().map(id_of).collect()
}

fn snapshots(daemon: &Daemon) -> Value {
    daemon.ask("GET", "/snapshots", None).json()
}

#[test]
fn clones_are_sandboxes_of_their_own() {
    let daemon = Daemon::start();
    let body = json!({ "templateID": TEMPLATE, "timeout": 600, "metadata": { "a": "b" } });
    let source = daemon.ask("POST", "/v2/sandboxes", Some(&body)).json();
    let id = id_of(&source);
    let reply = daemon.act_with(&id, "clone", &json!({ "count": 5, "timeout": 100 }));
    assert_eq!(reply.status, 201, "{reply:?}");
    let clones = reply.json();
    let clones = clones.as_array().expect("a list");
    let mut ids: BTreeSet<String> = clones.iter().map(id_of).collect();
    assert_eq!(ids.len(), 5);
    let mut tokens = BTreeSet::from([source["envdAccessToken"].clone().to_string()]);
    for clone in clones {
        for field in ["templateID", "clientID", "envdVersion", "envdAccessToken"] {
            assert!(clone[field].is_string(), "{field} is missing in {clone}");
        }
        tokens.insert(clone["envdAccessToken"].to_string());
        let got = daemon.get(&id_of(clone)).json();
        assert_eq!((&got["state"], &got["metadata"]), (&json!("running"), &json!({ "a": "b" })));
        let mut client = daemon.to_sandbox(&id_of(clone), 1, "GET /");
        let message = client.send("\r\n").reply().error(502);
        assert!(message.contains("port is not open"), "its agent answers: {message}");
    }
    assert_eq!(tokens.len(), 6, "a token opens one sandbox");
    ids.insert(id.clone());
    assert_eq!(all(&daemon), ids, "the first one goes on");
    assert_eq!(snapshots(&daemon), json!([]), "what they were made from is nobody's");
    eventually("it does not stay", || daemon.snapshots_kept() == 1);
    let one = daemon.act(&id, "clone");
    assert_eq!((one.status, one.json().as_array().map(Vec::len)), (201, Some(1)));
    // A clone of a clone, after the first is gone.
    assert_eq!(daemon.delete(&id).status, 204);
    let next = daemon.act_with(&id_of(&clones[0]), "clone", &json!({ "count": 2 }));
    assert_eq!((next.status, next.json().as_array().map(Vec::len)), (201, Some(2)));
}

#[test]
fn a_clone_that_does_not_come_up_whole_does_not_come_up() {
    let daemon = Daemon::start_with(&["--sandboxes-max", "8"]);
    let id = daemon.create();
    let before = all(&daemon);
    let reply = daemon.act_with(&id, "clone", &json!({ "count": 20 }));
    assert!(reply.error(503).contains("sandboxes_max"), "{reply:?}");
    assert_eq!(all(&daemon), before);
    assert_eq!(daemon.state(&id), "running");
    assert_eq!(snapshots(&daemon), json!([]));
    eventually("nothing of the others is left", || daemon.vm_processes().len() == 1);
    // There is room for these, also because nothing stayed.
    let reply = daemon.act_with(&id, "clone", &json!({ "count": 3 }));
    assert_eq!(reply.status, 201, "{reply:?}");
    assert_eq!(all(&daemon).len(), 4);
}

#[test]
fn forks_come_up_or_say_why_not() {
    let daemon = Daemon::start_with(&["--sandboxes-max", "8"]);
    let id = daemon.create();
    let reply = daemon.act_with(&id, "fork", &json!({ "count": 2, "timeout": 60 }));
    assert_eq!(reply.status, 201, "{reply:?}");
    let forks = reply.json();
    let forks = forks.as_array().expect("a list").clone();
    assert_eq!(forks.len(), 2);
    for fork in &forks {
        assert_eq!(fork.get("error"), None, "{fork}");
        assert_eq!(daemon.state(&id_of(&fork["sandbox"])), "running");
    }
    let reply = daemon.act_with(&id, "fork", &json!({ "count": 20 }));
    assert_eq!(reply.status, 201, "{reply:?}");
    let forks = reply.json();
    let forks = forks.as_array().expect("a list").clone();
    assert_eq!(forks.len(), 20);
    let (up, down): (Vec<_>, Vec<_>) = forks.iter().partition(|fork| fork.get("error").is_none());
    assert!(!up.is_empty() && !down.is_empty(), "{} of 20 came up", up.len());
    for fork in down {
        assert_eq!(fork["error"]["code"], 503, "{fork}");
        assert!(fork["error"]["message"].as_str().is_some_and(|text| !text.is_empty()), "{fork}");
        assert_eq!(fork.get("sandbox"), None);
    }
    for fork in up {
        assert_eq!(daemon.state(&id_of(&fork["sandbox"])), "running");
    }
    assert_eq!(daemon.state(&id), "running");
    assert_eq!(snapshots(&daemon), json!([]));
    let one = daemon.ask("POST", &format!("/sandboxes/{id}/fork"), Some(&json!({})));
    assert_eq!(one.json().as_array().map(Vec::len), Some(1), "one, unless more are asked for");
}

#[test]
fn copies_of_what_is_not_there() {
    let daemon = Daemon::start();
    for action in ["clone", "fork"] {
        daemon.act_with(NOBODY, action, &json!({ "count": 1 })).error(404);
    }
    assert!(all(&daemon).is_empty());
}
