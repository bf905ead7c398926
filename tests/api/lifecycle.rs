//! How long sandboxes live in each spelling, what extends that, and requests that wake the paused ones.
//!
//! Each test has its own daemon. Times are real and short.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::Reply;
use crate::control_plane::lifetime;
use crate::daemon::{Daemon, eventually};
use crate::template::TEMPLATE;

/// What `endAt` says of a sandbox without an end.
const WITHOUT_END: &str = "9999-12-30T00:00:00.000Z";

/// A port where nothing listens: a running sandbox says so, and others say something else.
const CLOSED_PORT: u16 = 1;

fn create(daemon: &Daemon, path: &str, wish: &Value) -> String {
    let mut body = json!({ "templateID": TEMPLATE });
    for (key, value) in wish.as_object().expect("an object") {
        body[key] = value.clone();
    }
    let created = daemon.ask("POST", path, Some(&body));
    assert_eq!(created.status, 201, "{created:?}");
    created.json()["sandboxID"].as_str().expect("an id").to_owned()
}

fn visit(daemon: &Daemon, id: &str) -> Reply {
    daemon.to_sandbox(id, CLOSED_PORT, "GET /").send("\r\n").reply()
}

/// Whether a request gets into the guest.
fn takes_visitors(daemon: &Daemon, id: &str) -> bool {
    visit(daemon, id).error(502).contains("port is not open")
}

#[test]
fn a_request_wakes_a_paused_sandbox_where_that_was_wished_for() {
    let daemon = Daemon::start();
    let deaf = create(&daemon, "/v2/sandboxes", &json!({ "autoPause": true }));
    daemon.pause(&deaf);
    assert!(visit(&daemon, &deaf).error(502).contains("was not found"));
    assert_eq!(daemon.state(&deaf), "paused");
    for wish in [
        json!({ "timeout": 1, "autoPause": true, "autoResume": { "enabled": true } }),
        json!({ "timeout": 1, "lifecycle": { "on_timeout": "pause", "auto_resume": true } }),
    ] {
        let id = create(&daemon, "/v2/sandboxes", &wish);
        let shown = daemon.get(&id).json();
        assert_eq!(shown["lifecycle"], json!({ "autoResume": true, "onTimeout": "pause" }));
        eventually("its time is over", || daemon.state(&id) == "paused");
        let mut at_once: Vec<_> =
            (0..8).map(|_| daemon.to_sandbox(&id, CLOSED_PORT, "GET /")).collect();
        for connection in &mut at_once {
            connection.send("\r\n");
        }
        for connection in &mut at_once {
            let message = connection.reply().error(502);
            assert!(message.contains("port is not open"), "{message}");
        }
        assert_eq!(daemon.state(&id), "running");
        let logs = daemon.ask("GET", &format!("/v2/sandboxes/{id}/logs?search=resumed"), None);
        assert_eq!(logs.json()["logs"].as_array().map(Vec::len), Some(1), "one resume for all");
        // What the host itself asks does not.
        daemon.pause(&id);
        let metrics = daemon.ask("GET", &format!("/sandboxes/{id}/metrics"), None);
        assert_eq!((metrics.status, daemon.state(&id)), (200, "paused".to_owned()));
        assert_eq!(daemon.delete(&id).status, 204);
    }
}

#[test]
fn a_sandbox_that_cannot_be_woken_is_an_answer_that_says_when_to_come_back() {
    let daemon =
        Daemon::start_with(&["--sandboxes-max", "1", "--pool-min", "0", "--pool-max", "0"]);
    let wish = json!({ "autoPause": true, "autoResume": true, "timeout": 300 });
    let id = create(&daemon, "/v2/sandboxes", &wish);
    daemon.pause(&id);
    // Its process goes, and another sandbox takes the only place.
    crate::daemon::kill("KILL", daemon.vm_of(&id));
    let body = json!({ "templateID": TEMPLATE });
    eventually("there is room for another", || {
        daemon.ask("POST", "/v2/sandboxes", Some(&body)).status == 201
    });
    let reply = visit(&daemon, &id);
    assert!(reply.error(503).contains("could not be resumed"), "{reply:?}");
    assert_eq!(reply.headers["retry-after"], "1");
    assert_eq!(daemon.state(&id), "paused");
}

#[test]
fn lives_without_an_end_and_at_once_in_cubesandboxs_spelling() {
    let daemon = Daemon::start();
    let kill = json!({ "onTimeout": "kill" });
    for wish in [
        json!({ "timeout": -1 }),
        json!({ "lifecycle": kill }),
        json!({ "timeout": -1, "lifecycle": kill }),
    ] {
        let id = create(&daemon, "/sandboxes", &wish);
        // It is there all the same: E2B's SDKs fail on an entry without it.
        let end = || daemon.get(&id).json()["endAt"].clone();
        assert_eq!(end(), WITHOUT_END, "{wish}");
        for path in ["/v2/sandboxes", "/sandboxes"] {
            let listed = daemon.ask("GET", path, None).json();
            assert_eq!(listed[0]["endAt"], WITHOUT_END, "{wish}");
        }
        assert_eq!(daemon.act(&id, "refreshes").status, 204);
        assert_eq!(end(), WITHOUT_END, "{wish}");
        let set = |timeout: i64| daemon.act_with(&id, "timeout", &json!({ "timeout": timeout }));
        assert_eq!(set(60).status, 204);
        assert!(end().as_str().is_some_and(|end| end < WITHOUT_END), "{}", end());
        assert_eq!(set(-1).status, 204);
        assert_eq!(end(), WITHOUT_END, "{wish}");
        assert_eq!(daemon.delete(&id).status, 204);
    }
    let id = create(&daemon, "/sandboxes", &json!({ "timeout": 0, "lifecycle": kill }));
    eventually("it ends at once", || daemon.get(&id).status == 404);
}

/// A request as E2B's SDKs send it: they say who made them.
fn of_e2b(daemon: &Daemon, path: &str, body: &Value) -> Reply {
    let (key, body) = (daemon.key(), body.to_string());
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {key}\r\npublisher: e2b\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    daemon.connect().send(head + &body).reply()
}

#[test]
fn in_e2bs_spelling_nothing_is_without_an_end_and_less_than_no_time_is_none() {
    let daemon = Daemon::start();
    let wish = json!({ "templateID": TEMPLATE, "timeout": -1 });
    assert!(of_e2b(&daemon, "/v2/sandboxes", &wish).error(400).contains("`timeout` is -1"));
    for seconds in [-1, -7] {
        let id = create(&daemon, "/v2/sandboxes", &json!({ "timeout": 60 }));
        let path = |action: &str| format!("/sandboxes/{id}/{action}");
        let wish = json!({ "timeout": seconds });
        of_e2b(&daemon, &path("connect"), &wish).error(400);
        let set = of_e2b(&daemon, &path("timeout"), &wish);
        assert_eq!(set.status, 204, "{set:?}");
        eventually("its time is over", || daemon.get(&id).status == 404);
    }
}

#[test]
fn one_that_lives_by_its_requests_ends_when_they_stay_away_also_after_a_restart() {
    let mut daemon = Daemon::start();
    let wish = json!({ "timeout": 6, "lifecycle": { "onTimeout": "kill" } });
    let id = create(&daemon, "/sandboxes", &wish);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(2) {
        assert!(takes_visitors(&daemon, &id));
    }
    daemon.crash();
    daemon.restart();
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(7) {
        assert!(takes_visitors(&daemon, &id), "the next daemon knows");
    }
    let used = Instant::now();
    eventually("it ends", || daemon.get(&id).status == 404);
    let late = used.elapsed();
    let seconds = Duration::from_secs;
    assert!(late > seconds(5) && late < seconds(7), "{late:?} after its last request");
}

#[test]
fn ends_are_met_to_the_second_also_after_a_restart() {
    let mut daemon = Daemon::start();
    let short = create(&daemon, "/v2/sandboxes", &json!({ "timeout": 5 }));
    let waking = json!({ "timeout": 5, "autoPause": true, "autoResume": true });
    let waking = create(&daemon, "/v2/sandboxes", &waking);
    let never = create(&daemon, "/v2/sandboxes", &json!({ "timeout": -1 }));
    let began = Instant::now();
    daemon.crash();
    daemon.restart();
    eventually("its time is over", || daemon.get(&short).status == 404);
    let took = began.elapsed();
    let seconds = Duration::from_secs;
    assert!(took > seconds(4) && took < seconds(6), "{took:?}");
    eventually("its time is over", || daemon.state(&waking) == "paused");
    assert!(began.elapsed() < seconds(7));
    assert!(takes_visitors(&daemon, &waking), "and the wish to be woken is kept");
    assert_eq!(daemon.state(&waking), "running");
    assert_eq!(daemon.get(&never).json()["endAt"], WITHOUT_END);
}

#[test]
fn a_resume_that_names_no_time_is_for_as_long_as_the_create_asked_for() {
    let daemon = Daemon::start_with(&["--sandbox-timeout-default", "700"]);
    for (wish, least) in [(json!({}), 700), (json!({ "timeout": 600 }), 600)] {
        let id = create(&daemon, "/sandboxes", &wish);
        // What was set since is not what the create asked for.
        let set = daemon.act_with(&id, "timeout", &json!({ "timeout": 60 }));
        assert_eq!(set.status, 204, "{set:?}");
        for body in [None, Some(json!({})), Some(json!({ "autoPause": true }))] {
            daemon.pause(&id);
            let path = format!("/sandboxes/{id}/resume");
            assert_eq!(daemon.ask("POST", &path, body.as_ref()).status, 201, "{wish} {body:?}");
            let life = lifetime(&daemon.get(&id).json());
            assert!((least..least + 60).contains(&life), "{wish} {body:?}: {life} s");
        }
    }
    let id = create(&daemon, "/sandboxes", &json!({ "timeout": 9 }));
    daemon.pause(&id);
    assert_eq!(daemon.act(&id, "resume").status, 201);
    let life = lifetime(&daemon.get(&id).json());
    assert!((15..60).contains(&life), "15 seconds at the least: {life} s");
    let id = create(&daemon, "/sandboxes", &json!({ "timeout": -1 }));
    daemon.pause(&id);
    assert_eq!(daemon.act(&id, "resume").status, 201);
    assert_eq!(daemon.get(&id).json()["endAt"], WITHOUT_END);
}

#[test]
fn a_connect_for_no_time_is_refused_and_wakes_nothing() {
    let daemon = Daemon::start();
    let id = create(&daemon, "/v2/sandboxes", &json!({}));
    for state in ["running", "paused"] {
        if state == "paused" {
            daemon.pause(&id);
        }
        for version in ["", "/v2"] {
            let path = format!("{version}/sandboxes/{id}/connect");
            let refused = daemon.ask("POST", &path, Some(&json!({ "timeout": 0 }))).error(400);
            assert!(refused.contains("`timeout` is 0"), "{refused}");
            assert_eq!(daemon.state(&id), state);
        }
    }
}

#[test]
fn refreshes_only_extend() {
    let daemon = Daemon::start();
    let id = create(&daemon, "/v2/sandboxes", &json!({ "timeout": 5 }));
    let end = || daemon.get(&id).json()["endAt"].as_str().expect("an end").to_owned();
    let first = end();
    assert_eq!(daemon.act(&id, "refreshes").status, 204);
    let second = end();
    assert!(second > first, "15 seconds at the least: {first}, then {second}");
    let refresh =
        |duration: i64| daemon.act_with(&id, "refreshes", &json!({ "duration": duration }));
    let long = refresh(3600);
    assert_eq!((long.status, long.body.len()), (204, 0));
    let third = end();
    assert!(third > second);
    assert_eq!(refresh(0).status, 204);
    assert_eq!(end(), third, "it never shortens");
    assert!(refresh(3601).error(400).contains("`duration`"));
    assert!(refresh(-1).error(400).contains("`duration`"));
    let nobody = "/sandboxes/i00000000000000000000/refreshes";
    daemon.ask("POST", nobody, None).error(404);
}
