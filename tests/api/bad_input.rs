//! What the issue of hostile and careless clients lists: each a 4xx in JSON that says what to
//! change, and nothing else affected.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::{Connection, PATIENCE, Reply};
use crate::daemon::{Daemon, kill};
use crate::template::TEMPLATE;

fn post(daemon: &Daemon, path: &str, body: &str) -> Reply {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\ncontent-length: {}\r\n\r\n",
        daemon.key(),
        body.len()
    );
    daemon.connect().send(head + body).reply()
}

#[test]
fn bodies_out_of_form_say_what_to_change() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let timeout = format!("/sandboxes/{id}/timeout");
    let of = |action: &str| format!("/sandboxes/{id}/{action}");
    let (snapshots, rollback) = (of("snapshots"), of("rollback"));
    let (pause, resume, clone, fork) = (of("pause"), of("resume"), of("clone"), of("fork"));
    let long = format!(r#"{{"name":"{}"}}"#, "x".repeat(129));
    for (path, body, hint) in [
        ("/v2/sandboxes", "{", "JSON"),
        ("/v2/sandboxes", "", "JSON"),
        ("/sandboxes", r#"{"timeout":1}"#, "templateID"),
        ("/v2/sandboxes", r#"{"templateID":["base"]}"#, "expected a string"),
        ("/v2/sandboxes", r#"{"templateID":"base","metadata":{"a":1}}"#, "expected a string"),
        ("/v2/sandboxes", r#"{"templateID":"base","timeout":-2}"#, "at least 1"),
        ("/v2/sandboxes", r#"{"templateID":"base","timeout":0}"#, "at least 1"),
        ("/v2/sandboxes", r#"{"templateID":"base","timeout":86401}"#, "greater than 24 hours"),
        ("/v2/sandboxes", r#"{"templateID":"base/.."}"#, "template name"),
        ("/v2/sandboxes", r#"{"templateID":"../base"}"#, "template name"),
        (timeout.as_str(), r#"{"timeout":-2}"#, "0 or more"),
        (timeout.as_str(), r#"{"timeout":"60"}"#, "`timeout`"),
        (timeout.as_str(), r#"{"timeout":"60"}"#, "expected i64"),
        ("/v2/sandboxes", r#"{"templateID":"base","autoPause":"yes"}"#, "`autoPause`"),
        ("/v2/sandboxes", r#"{"templateID":"base","lifecycle":[]}"#, "`lifecycle`"),
        (snapshots.as_str(), r#"{"name":7}"#, "`name`"),
        (snapshots.as_str(), r#"{"name":""}"#, "`name`"),
        (snapshots.as_str(), &long, "`name`"),
        (snapshots.as_str(), r#"{"memory":1}"#, "`memory`"),
        (snapshots.as_str(), "[]", "JSON"),
        (snapshots.as_str(), "{", "JSON"),
        (rollback.as_str(), "", "JSON"),
        (rollback.as_str(), "{}", "snapshotID"),
        (rollback.as_str(), r#"{"snapshotID":["x"]}"#, "`snapshotID`"),
        (rollback.as_str(), r#"{"snapshotID":""}"#, "`snapshotID`"),
        (pause.as_str(), r#"{"memory":1}"#, "`memory`"),
        (pause.as_str(), r#"{"requireHealthyGuest":"x"}"#, "`requireHealthyGuest`"),
        (pause.as_str(), "null", "JSON"),
        (resume.as_str(), r#"{"timeout":0}"#, "at least 1"),
        (resume.as_str(), r#"{"timeout":86401}"#, "greater than 24 hours"),
        (resume.as_str(), r#"{"autoPause":1}"#, "`autoPause`"),
        (resume.as_str(), r#"{"memory":0}"#, "`memory`"),
        (clone.as_str(), r#"{"count":0}"#, "1 to 1000"),
        (clone.as_str(), r#"{"count":1001}"#, "1 to 1000"),
        (clone.as_str(), r#"{"count":"2"}"#, "`count`"),
        (clone.as_str(), r#"{"count":1,"timeout":0}"#, "at least 1"),
        (fork.as_str(), r#"{"count":21}"#, "1 to 20"),
        (fork.as_str(), r#"{"count":-1}"#, "1 to 20"),
        (fork.as_str(), r#"{"count":1.5}"#, "`count`"),
        (timeout.as_str(), r#"{"timeout":86401}"#, "greater than 24 hours"),
        (timeout.as_str(), "[]", "JSON"),
    ] {
        let message = post(&daemon, path, body).error(400);
        assert!(message.contains(hint), "{path} {body}: {message}");
    }
    let unknown = post(&daemon, "/v2/sandboxes", r#"{"templateID":"no-such-template"}"#).error(404);
    assert!(unknown.contains("no-such-template"), "{unknown}");
    // The one that was there all along is untouched.
    assert_eq!(daemon.state(&id), "running");
    assert_eq!(daemon.vm_processes().len(), 1, "no bad create made a sandbox");
    assert_eq!(daemon.ask("GET", "/snapshots", None).json(), json!([]));
}

#[test]
fn ids_and_paths_out_of_form() {
    let daemon = Daemon::start();
    for (method, path, status) in [
        ("GET", "/sandboxes/..%2f..%2fetc", 400),
        ("DELETE", "/sandboxes/%2e%2e", 400),
        ("GET", "/sandboxes/UPPER", 400),
        ("GET", "/sandboxes/%zz", 400),
        ("GET", "/sandboxes/nonexistingsandbox", 404),
        ("DELETE", "/sandboxes/i00000000000000000000", 404),
        ("GET", "/", 404),
        ("GET", "/sandboxes/", 404),
        ("GET", "/nothing/here", 404),
        ("PUT", "/sandboxes", 405),
        ("DELETE", "/templates", 405),
        ("PUT", "/templates/base", 405),
        ("GET", "/sandboxes/i00000000000000000000/pause", 405),
        ("DELETE", "/snapshots", 405),
        ("POST", "/sandboxes/i00000000000000000000/explode", 404),
        ("POST", "/sandboxes/UPPER/pause", 400),
        ("POST", "/sandboxes/nonexistingsandbox/pause", 404),
        ("POST", "/sandboxes/i00000000000000000000/clone", 404),
        ("BREW", "/health", 405),
    ] {
        let reply = daemon.ask(method, path, Some(&json!({})));
        reply.error(status);
        assert_eq!(reply.headers.contains_key("allow"), status == 405, "{method} {path}");
    }
}

#[test]
fn bodies_over_the_limit_are_refused_with_either_framing() {
    let daemon = Daemon::start();
    let big = json!({ "templateID": TEMPLATE, "metadata": { "a": "x".repeat(1 << 20) } });
    let message = daemon.ask("POST", "/v2/sandboxes", Some(&big)).error(413);
    assert!(message.contains("bytes"), "{message}");

    let mut connection = daemon.connect();
    connection.send(format!(
        "POST /v2/sandboxes HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\n\
         transfer-encoding: chunked\r\n\r\n",
        daemon.key()
    ));
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    for _ in 0..8 {
        connection.send(&chunk);
    }
    connection.send("0\r\n\r\n").reply().error(413);
    assert!(daemon.vm_processes().is_empty());
}

#[test]
fn chunked_bodies_are_welcome() {
    let daemon = Daemon::start();
    let mut connection = daemon.connect();
    connection.send(format!(
        "POST /v2/sandboxes HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\n\
         transfer-encoding: chunked\r\n\r\nd\r\n{{\"templateID\"\r\n8\r\n:\"base\"}}\r\n0\r\n\r\n",
        daemon.key()
    ));
    assert_eq!(connection.reply().status, 201);
}

#[test]
fn what_is_not_http_is_told_so() {
    let daemon = Daemon::start();
    let long = "x".repeat(100_000);
    let many: String = (0..200).map(|n| format!("x-{n}: 1\r\n")).collect();
    for (request, status) in [
        ("hello\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nhost: x\r\nno colon\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nhost: x\r\nspace : 1\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nhost: x\r\nfolded: a\r\n b\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n".into(), 400),
        ("GET / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/9.9\r\nhost: x\r\n\r\n".to_owned(), 400),
        ("PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n".to_owned(), 400),
        ("CONNECT example.com:80 HTTP/1.1\r\nhost: example.com:80\r\n\r\n".to_owned(), 405),
        (format!("GET / HTTP/1.1\r\nhost: x\r\nlong: {long}\r\n\r\n"), 431),
        (format!("GET / HTTP/1.1\r\nhost: x\r\n{many}\r\n"), 431),
    ] {
        let mut connection = daemon.connect();
        let reply = connection.send(&request).reply();
        let shown: String = request.chars().take(80).collect();
        assert_eq!(reply.status, status, "{shown:?}: {reply:?}");
        assert!(!reply.error(status).is_empty());
    }
    daemon.healthy();
}

#[test]
fn a_parse_error_after_a_good_request_is_answered_too() {
    let daemon = Daemon::start();
    let mut connection = daemon.connect();
    assert_eq!(connection.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n").reply().status, 200);
    connection.send("nonsense\r\n\r\n").reply().error(400);
    assert!(connection.rest().is_empty(), "and then the connection ends");
}

#[test]
fn slow_clients_are_told_and_let_go() {
    let daemon = Daemon::start_with(&["--client-timeout", "1"]);
    // A head that never ends.
    let mut head = daemon.connect();
    head.send("GET /health HTTP/1.1\r\nhost: x\r\n");
    // A body that never ends.
    let mut body = daemon.connect();
    body.send(format!(
        "POST /v2/sandboxes HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\ncontent-length: 100\r\n\r\n{{",
        daemon.key()
    ));
    // A connection without a word gets none either.
    let mut silent = daemon.connect();
    daemon.healthy();
    for slow in [&mut head, &mut body] {
        assert!(slow.reply().error(408).contains("in time"));
        assert!(slow.rest().is_empty());
    }
    assert!(silent.rest().is_empty());
    daemon.healthy();
}

#[test]
fn a_second_request_that_stalls_is_told_as_well() {
    let daemon = Daemon::start_with(&["--client-timeout", "1"]);
    let mut connection = daemon.connect();
    assert_eq!(connection.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n").reply().status, 200);
    connection.send("GET /hea");
    connection.reply().error(408);
}

#[test]
fn connections_over_the_limit_are_turned_away() {
    let daemon = Daemon::start_with(&["--connections-max", "2", "--shards", "1"]);
    let held: Vec<Connection> = (0..2).map(|_| admitted(&daemon)).collect();
    let turned_away = daemon.connect().reply();
    turned_away.error(503);
    assert_eq!(turned_away.headers["should-retry"], "true");
    drop(held);
    admitted(&daemon);
}

/// A connection that has a place, once there is one: places come back when the daemon has seen
/// that a connection closed.
fn admitted(daemon: &Daemon) -> Connection {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut connection = daemon.connect();
        // One that is turned away may be closed already; that writing fails is no news then.
        let request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n";
        drop(connection.stream().write_all(request));
        if connection.reply().status == 200 {
            return connection;
        }
        assert!(Instant::now() < deadline, "no place is given back");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_sandbox_whose_process_dies_is_gone_and_the_others_are_not() {
    let daemon = Daemon::start();
    let first = daemon.create();
    let second = daemon.create();
    kill("KILL", daemon.vm_of(&first));
    let deadline = Instant::now() + PATIENCE;
    while daemon.ask("GET", &format!("/sandboxes/{first}"), None).status != 404 {
        assert!(Instant::now() < deadline, "the API still shows it");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(daemon.ask("GET", &format!("/sandboxes/{second}"), None).status, 200);
    assert_eq!(daemon.vm_processes().len(), 1);
}

#[test]
fn an_answer_without_the_body_does_not_cost_the_connection() {
    let daemon = Daemon::start();
    let mut connection = daemon.connect();
    // Some clients send an empty body in chunks, and its end in a packet of its own. Whatever the
    // answer, it must not come with a closed connection.
    for (request, status) in [
        ("DELETE /sandboxes/i00000000000000000000", 404),
        ("GET /health", 200),
        ("PUT /nothing", 404),
        ("GET /x HTTP/1.1\r\ne2b-sandbox-port: 1\r\ne2b-sandbox-id: i00000000000000000000", 502),
    ] {
        let (line, headers) = request.split_once(" HTTP/1.1\r\n").unwrap_or((request, "x: y"));
        connection.send(format!(
            "{line} HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\n{headers}\r\n\
             transfer-encoding: chunked\r\n\r\n",
            daemon.key()
        ));
        thread::sleep(Duration::from_millis(100));
        connection.send("0\r\n\r\n");
        assert_eq!(connection.reply().status, status, "{request:?}");
    }
}
