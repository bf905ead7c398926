//! `StreamInput`: a request that is a stream, read as it comes, in both codecs.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Agent, Answer, Upstream, encode};

const JSON: &str = "application/connect+json";
const PROTO: &str = "application/connect+proto";

fn cat(agent: &Agent) -> (u64, Answer) {
    agent.start_process(&json!({"process": {"cmd": "/bin/cat"}, "tag": "cat"}))
}

fn say(upstream: &mut Upstream, message: &Value) {
    upstream.send(message.to_string().as_bytes());
}

fn heard(answer: &mut Answer) -> String {
    let event = answer.event().unwrap();
    crate::support::decode(event["event"]["data"]["stdout"].as_str().unwrap())
}

#[test]
fn input_is_written_while_the_stream_is_open() {
    let agent = Agent::start();
    let (pid, mut answer) = cat(&agent);
    let mut upstream = agent.open("StreamInput", JSON);
    say(&mut upstream, &json!({"start": {"process": {"pid": pid}}}));
    for text in ["one", "two", "three"] {
        say(&mut upstream, &json!({"data": {"input": {"stdin": encode(text)}}}));
        assert_eq!(heard(&mut answer), text, "before the stream goes on");
        say(&mut upstream, &json!({"keepalive": {}}));
    }
    let mut reply = upstream.end();
    assert_eq!((reply.status, reply.header("content-type")), (200, Some(JSON)));
    assert_eq!(reply.raw_frame(), (0, b"{}".to_vec()));
    assert_eq!(reply.raw_frame(), (2, b"{}".to_vec()));
    // The stream's end is not the input's.
    let which = json!({"process": {"pid": pid}});
    assert_eq!(agent.call("CloseStdin", &which).0, 200);
    assert_eq!(answer.rest().2["exitCode"], 0);
}

#[test]
fn input_comes_in_binary_and_in_pieces() {
    let agent = Agent::start();
    let (_, mut answer) = cat(&agent);
    let mut upstream = agent.open("StreamInput", PROTO);
    // start: { process: { tag: "cat" } }, keepalive: {}, data: { input: { stdin: "hi" } }
    let start = crate::support::envelope(b"\x0a\x07\x0a\x05\x12\x03cat");
    let keepalive = crate::support::envelope(b"\x1a\x00");
    let data = crate::support::envelope(b"\x12\x06\x12\x04\x0a\x02hi");
    for byte in [start, keepalive, data].concat() {
        upstream.raw(&[byte]).unwrap();
    }
    assert_eq!(heard(&mut answer), "hi");
    let mut reply = upstream.end();
    assert_eq!(reply.header("content-type"), Some(PROTO));
    assert_eq!(reply.raw_frame(), (0, Vec::new()));
    assert_eq!(reply.raw_frame(), (2, b"{}".to_vec()));
}

#[test]
fn a_terminal_takes_a_stream_too() {
    let agent = Agent::start();
    let message = json!({"process": {"cmd": "/bin/sh", "args": ["-c", "read x; echo got $x"]},
        "pty": {"size": {"cols": 80, "rows": 24}}});
    let (pid, mut answer) = agent.start_process(&message);
    let mut upstream = agent.open("StreamInput", JSON);
    say(&mut upstream, &json!({"start": {"process": {"pid": pid}}}));
    say(&mut upstream, &json!({"data": {"input": {"pty": encode("it\n")}}}));
    assert_eq!(upstream.end().event(), Some(json!({})));
    assert!(answer.rest().0.contains("got it"));
}

#[test]
fn what_is_wrong_is_told_while_the_client_still_sends() {
    let agent = Agent::start();
    let (pid, _answer) = cat(&agent);
    let start = json!({"start": {"process": {"pid": pid}}}).to_string();
    let start = crate::support::envelope(start.as_bytes());
    let then = |frame: &[u8]| [&start[..], frame].concat();
    let json = |message: Value| crate::support::envelope(message.to_string().as_bytes());
    for (body, code) in [
        (json(json!({"start": {"process": {"pid": 4_000_000}}})), "not_found"),
        (json(json!({"start": {}})), "invalid_argument"),
        (json(json!({"data": {"input": {"stdin": "aGk="}}})), "invalid_argument"),
        (json(json!({"nothing": {}})), "invalid_argument"),
        (then(&json(json!({"data": {"input": {"stdin": "!"}}}))), "invalid_argument"),
        (then(&json(json!({"data": {"input": {"pty": "aGk="}}}))), "failed_precondition"),
        (then(b"\0\0\0\0\x01{"), "invalid_argument"),
        (then(b"\0\xff\xff\xff\xff"), "resource_exhausted"),
        (then(b"\x01\0\0\0\x02{}"), "unimplemented"),
        (then(b"\x40\0\0\0\x02{}"), "invalid_argument"),
    ] {
        let mut upstream = agent.open("StreamInput", JSON);
        upstream.raw(&body).unwrap();
        let mut reply = upstream.answer();
        assert_eq!((reply.status, &reply.error()["code"]), (200, &json!(code)), "{body:?}");
    }
    // An end inside an envelope's header, and inside a message.
    for cut in [&b"\0\0\0"[..], b"\0\0\0\0\x09{"] {
        let mut upstream = agent.open("StreamInput", JSON);
        upstream.raw(&then(cut)).unwrap();
        assert_eq!(upstream.end().error()["code"], "invalid_argument", "{cut:?}");
    }
    assert_eq!(agent.open("StreamInput", "application/json").end().status, 415);
    let late = format!("{JSON}\r\nconnect-timeout-ms: 200");
    let error = agent.open("StreamInput", &late).answer().error();
    assert_eq!(error["code"], "deadline_exceeded");
}

/// The agent must take no more than it can pass on, or a client could fill its memory.
#[test]
fn a_process_that_does_not_read_holds_its_client_up() {
    let agent = Agent::start();
    let message = json!({"process": {"cmd": "/bin/sleep", "args": ["60"]}});
    let (pid, _answer) = agent.start_process(&message);
    let mut upstream = agent.open("StreamInput", JSON);
    say(&mut upstream, &json!({"start": {"process": {"pid": pid}}}));
    upstream.hurry(Duration::from_millis(500));
    let text = encode(&"x".repeat(100_000));
    let data = json!({"data": {"input": {"stdin": text}}}).to_string();
    let data = crate::support::envelope(data.as_bytes());
    let sent = (0..200).take_while(|_| upstream.raw(&data).is_ok()).count();
    assert!(sent < 50, "{sent} messages of 100 kB went to a process that reads nothing");

    // Its end is the end of the wait.
    let kill = json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"});
    assert_eq!(agent.call("SendSignal", &kill).0, 200);
    assert_eq!(upstream.answer().error()["code"], "failed_precondition");
}

/// A child that keeps the input open must not keep the process's story open with it.
#[test]
fn input_that_nobody_reads_does_not_outlive_its_process() {
    let agent = Agent::start();
    let script = "exec 3<&0; sleep 600 <&3 > /dev/null 2>&1 & echo $!; read x; exit 7";
    let message = json!({"process": {"cmd": "/bin/sh", "args": ["-c", script]}});
    let (pid, mut answer) = agent.start_process(&message);
    let child = heard(&mut answer);
    let mut upstream = agent.open("StreamInput", JSON);
    say(&mut upstream, &json!({"start": {"process": {"pid": pid}}}));
    let text = format!("go\n{}", "x".repeat(1_000_000));
    say(&mut upstream, &json!({"data": {"input": {"stdin": encode(&text)}}}));
    assert_eq!(answer.rest().2["exitCode"], 7);
    let error = upstream.answer().error();
    assert_eq!(error["code"], "failed_precondition", "{error}");
    let stopped = std::process::Command::new("kill").arg(child.trim()).status().unwrap();
    assert!(stopped.success());
}
