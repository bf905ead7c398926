//! Pause and resume: what a paused sandbox is, what it answers, and what wakes it.

use serde_json::{Value, json};

use crate::daemon::{Daemon, eventually, patiently};
use crate::template::TEMPLATE;

fn listed(daemon: &Daemon, query: &str) -> Vec<String> {
    let reply = daemon.ask("GET", query, None);
    assert_eq!(reply.status, 200, "{reply:?}");
    let id = |entry: &Value| entry["sandboxID"].as_str().expect("an id").to_owned();
    reply.json().as_array().expect("a list").iter().map(id).collect()
}

#[test]
fn a_paused_sandbox_says_so_and_does_nothing_else() {
    let daemon = Daemon::start();
    let (id, other) = (daemon.create(), daemon.create());
    let snapshot = daemon.snapshot(&id);
    daemon.pause(&id);
    assert_eq!(daemon.state(&id), "paused", "at the first look");
    let again = daemon.act(&id, "pause").error(409);
    assert_eq!(again, format!("Error pausing sandbox - sandbox '{id}' is already paused"));
    let back = daemon.act_with(&id, "rollback", &json!({ "snapshotID": snapshot }));
    for reply in
        [daemon.act(&id, "snapshots"), daemon.act(&id, "clone"), daemon.act(&id, "fork"), back]
    {
        let message = reply.error(409);
        assert!(message.contains("paused"), "{message}");
        assert!(!reply.headers.contains_key("should-retry"), "waiting does not help");
    }
    for port in [49983, 8000] {
        let reply = daemon.to_sandbox(&id, port, "GET /health").send("\r\n").reply();
        assert_eq!(reply.error(502), "The sandbox was not found");
        assert_eq!(reply.json()["sandboxId"], *id);
    }
    for (query, expected) in [
        ("/v2/sandboxes?state=paused", vec![&id]),
        ("/v2/sandboxes?state=running", vec![&other]),
        ("/v2/sandboxes?order=asc", vec![&id, &other]),
        ("/v2/sandboxes?order=asc&state=running%2Cpaused", vec![&id, &other]),
        ("/sandboxes", vec![&other]),
    ] {
        let expected: Vec<String> = expected.into_iter().cloned().collect();
        assert_eq!(listed(&daemon, query), expected, "{query}");
        let total = daemon.ask("GET", query, None).headers["x-total-running"].clone();
        assert_eq!(total, if query.ends_with("=paused") { "0" } else { "1" }, "{query}");
    }
}

#[test]
fn a_resume_brings_it_back_as_it_was() {
    let daemon = Daemon::start();
    let body = json!({ "templateID": TEMPLATE, "timeout": 60, "metadata": { "a": "b" } });
    let created = daemon.ask("POST", "/v2/sandboxes", Some(&body)).json();
    let id = created["sandboxID"].as_str().expect("an id");
    assert!(daemon.act(id, "resume").error(409).contains("already running"));
    for round in 0..3 {
        daemon.pause(id);
        let reply = daemon.act_with(id, "resume", &json!({ "timeout": 300 }));
        assert_eq!((reply.status, reply.json()), (201, created.clone()), "round {round}");
        let got = daemon.get(id).json();
        assert_eq!((&got["state"], &got["metadata"]), (&json!("running"), &json!({ "a": "b" })));
        let message = daemon.to_sandbox(id, 1, "GET /").send("\r\n").reply().error(502);
        assert!(message.contains("port is not open"), "its agent answers: {message}");
    }
    daemon.pause(id);
    let snapshot = daemon.act(id, "resume");
    assert_eq!(snapshot.status, 201, "the body may be absent: {snapshot:?}");
    daemon.snapshot(id);
    daemon.act("i00000000000000000000", "pause").error(404);
    daemon.act("i00000000000000000000", "resume").error(404);
}

#[test]
fn connecting_wakes_it_and_says_whether_it_had_to() {
    let daemon = Daemon::start();
    let id = daemon.create();
    for path in ["/sandboxes", "/v2/sandboxes"] {
        let path = format!("{path}/{id}/connect");
        let body = json!({ "timeout": 100 });
        daemon.pause(&id);
        let woken = daemon.ask("POST", &path, Some(&body));
        assert_eq!((woken.status, &woken.json()["sandboxID"]), (201, &json!(id)), "{woken:?}");
        assert_eq!(daemon.state(&id), "running");
        let there = daemon.ask("POST", &path, Some(&body));
        assert_eq!((there.status, there.json()), (200, woken.json()));
    }
    daemon.pause(&id);
    let message = daemon.act_with(&id, "connect", &json!({ "memory": "no", "timeout": 9 }));
    assert!(message.error(400).contains("`memory`"));
    assert_eq!(daemon.state(&id), "paused");
}

#[test]
fn a_paused_sandbox_can_be_killed() {
    let daemon = Daemon::start();
    let id = daemon.create();
    daemon.pause(&id);
    let reply = daemon.delete(&id);
    assert_eq!((reply.status, reply.body.len()), (204, 0), "{reply:?}");
    daemon.get(&id).error(404);
    daemon.act(&id, "resume").error(404);
    daemon.delete(&id).error(404);
    assert!(listed(&daemon, "/v2/sandboxes").is_empty());
    eventually("nothing of it is left", || daemon.holdings()[1..] == [0, 0, 0]);
    // Its own state is no snapshot that anybody could see.
    assert_eq!(daemon.ask("GET", "/snapshots", None).json(), json!([]));
}

#[test]
fn a_sandbox_whose_time_is_over_is_paused_if_that_was_wished_for() {
    let daemon = Daemon::start();
    for wish in [json!({ "autoPause": true }), json!({ "lifecycle": { "on_timeout": "pause" } })] {
        let mut body = json!({ "templateID": TEMPLATE, "timeout": 1 });
        for (key, value) in wish.as_object().expect("an object") {
            body[key] = value.clone();
        }
        let created = daemon.ask("POST", "/v2/sandboxes", Some(&body));
        assert_eq!(created.status, 201, "{created:?}");
        let id = created.json()["sandboxID"].as_str().expect("an id").to_owned();
        eventually("it is paused", || daemon.state(&id) == "paused");
        let resumed = daemon.act_with(&id, "resume", &json!({ "timeout": 60 }));
        assert_eq!(resumed.status, 201, "{resumed:?}");
        assert_eq!(daemon.state(&id), "running");
        // The wish is kept: the next end is a pause again.
        assert_eq!(daemon.act_with(&id, "timeout", &json!({ "timeout": 0 })).status, 204);
        eventually("it is paused again", || daemon.state(&id) == "paused");
        // Until a resume says otherwise.
        let last = daemon.act_with(&id, "resume", &json!({ "timeout": 1, "autoPause": false }));
        assert_eq!(last.status, 201, "{last:?}");
        eventually("it is gone", || daemon.get(&id).status == 404);
    }
}

#[test]
fn a_pause_can_demand_a_guest_that_answers() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let healthy = json!({ "requireHealthyGuest": true });
    let process = daemon.vm_of(&id);
    for wish in [&healthy, &json!({ "memory": false })] {
        crate::daemon::kill("STOP", process);
        let reply = daemon.act_with(&id, "pause", wish);
        crate::daemon::kill("CONT", process);
        // SDKs take a 409 for "already paused", and this word for a resume that was refused.
        assert!(reply.error(503).contains("does not answer"), "{wish}");
        assert_eq!(reply.json().get("error_code"), None);
        assert_eq!(reply.headers["should-retry"], "false");
        assert_eq!(daemon.state(&id), "running");
    }
    assert_eq!(daemon.act_with(&id, "pause", &healthy).status, 204);
}

/// The second of the day of a time; tests do not run over midnight twice.
fn seconds(time: Value) -> u32 {
    let time = time.as_str().expect("a time").to_owned();
    let number = |range| time.get(range).and_then(|digits: &str| digits.parse::<u32>().ok());
    let [hour, minute, second] = [11..13, 14..16, 17..19].map(|at| number(at).expect("digits"));
    hour * 3600 + minute * 60 + second
}

#[test]
fn paused_and_running_sandboxes_outlive_a_daemon_that_is_killed() {
    let mut daemon = Daemon::start();
    let (running, paused) = (daemon.create(), daemon.create());
    let snapshot = daemon.snapshot(&running);
    daemon.pause(&paused);
    let longer = daemon.act_with(&running, "timeout", &json!({ "timeout": 900 }));
    assert_eq!(longer.status, 204, "{longer:?}");
    let show = |daemon: &Daemon| [&running, &paused].map(|id| daemon.get(id).json());
    let before = show(&daemon);
    let process = daemon.vm_of(&running);
    daemon.crash();
    daemon.restart();
    for (mut before, mut after) in before.into_iter().zip(show(&daemon)) {
        for field in ["startedAt", "endAt"] {
            let [was, is] = [&mut before, &mut after].map(|shown| seconds(shown[field].take()));
            assert!(was.abs_diff(is) <= 1, "{field}: {was} s and {is} s of the day");
        }
        assert_eq!(after, before);
    }
    assert_eq!(daemon.vm_of(&running), process, "it was not touched");
    let message = daemon.to_sandbox(&running, 1, "GET /").send("\r\n").reply().error(502);
    assert!(message.contains("port is not open"), "its agent answers: {message}");
    let back = json!({ "snapshotID": snapshot });
    let back = patiently(|| daemon.act_with(&running, "rollback", &back));
    assert_eq!(back.status, 200, "{back:?}");
    assert_eq!(daemon.act(&paused, "resume").status, 201);
    daemon.snapshot(&running);
    for id in [&running, &paused] {
        assert_eq!(daemon.delete(id).status, 204);
    }
    eventually("nothing of them is left", || daemon.holdings()[1..] == [0, 0, 0]);
}
