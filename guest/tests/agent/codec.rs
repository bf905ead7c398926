//! Both codecs of the real agent over its gateway, and what the protocol refuses.
//!
//! The messages are written here once more, from the public field numbers, so that a number that is
//! wrong in the agent is not wrong here as well.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use prost::Message;
use serde_json::{Value, json};

use crate::support::{Agent, TOKEN};

#[derive(Clone, PartialEq, Message)]
struct Config {
    #[prost(string, tag = "1")]
    cmd: String,
    #[prost(string, repeated, tag = "2")]
    args: Vec<String>,
    #[prost(btree_map = "string, string", tag = "3")]
    envs: std::collections::BTreeMap<String, String>,
    #[prost(string, optional, tag = "4")]
    cwd: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Start {
    #[prost(message, optional, tag = "1")]
    process: Option<Config>,
    #[prost(string, optional, tag = "3")]
    tag: Option<String>,
    #[prost(bool, optional, tag = "4")]
    stdin: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
struct Selector {
    #[prost(uint32, optional, tag = "1")]
    pid: Option<u32>,
    #[prost(string, optional, tag = "2")]
    tag: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Input {
    #[prost(bytes = "vec", optional, tag = "1")]
    stdin: Option<Vec<u8>>,
}

/// Any request that names a process.
#[derive(Clone, PartialEq, Message)]
struct About {
    #[prost(message, optional, tag = "1")]
    process: Option<Selector>,
    #[prost(message, optional, tag = "2")]
    input: Option<Input>,
}

#[derive(Clone, PartialEq, Message)]
struct Signal {
    #[prost(message, optional, tag = "1")]
    process: Option<Selector>,
    #[prost(int32, tag = "2")]
    signal: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Pid {
    #[prost(uint32, tag = "1")]
    pid: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Data {
    #[prost(bytes = "vec", optional, tag = "1")]
    stdout: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "2")]
    stderr: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct End {
    #[prost(sint32, tag = "1")]
    exit_code: i32,
    #[prost(bool, tag = "2")]
    exited: bool,
    #[prost(string, tag = "3")]
    status: String,
    #[prost(string, optional, tag = "4")]
    error: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(message, optional, tag = "1")]
    start: Option<Pid>,
    #[prost(message, optional, tag = "2")]
    data: Option<Data>,
    #[prost(message, optional, tag = "3")]
    end: Option<End>,
    #[prost(message, optional, tag = "4")]
    keepalive: Option<Nothing>,
}

#[derive(Clone, PartialEq, Message)]
struct Told {
    #[prost(message, optional, tag = "1")]
    event: Option<Event>,
}

#[derive(Clone, PartialEq, Message)]
struct Listed {
    #[prost(message, optional, tag = "1")]
    config: Option<Config>,
    #[prost(uint32, tag = "2")]
    pid: u32,
    #[prost(string, optional, tag = "3")]
    tag: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct List {
    #[prost(message, repeated, tag = "1")]
    processes: Vec<Listed>,
}

fn shell(script: &str) -> Start {
    let args = vec!["-c".to_owned(), script.to_owned()];
    let envs = [("WHO".to_owned(), "me".to_owned())].into();
    let config = Config { cmd: "/bin/sh".into(), args, envs, cwd: Some("/tmp".into()) };
    Start { process: Some(config), tag: Some("t".into()), stdin: None }
}

fn by_tag() -> Option<Selector> {
    Some(Selector { pid: None, tag: Some("t".into()) })
}

fn event(frame: (u8, Vec<u8>)) -> Event {
    assert_eq!(frame.0, 0, "{frame:?}");
    Told::decode(&frame.1[..]).unwrap().event.unwrap()
}

#[test]
fn a_process_is_driven_in_binary() {
    let agent = Agent::start();
    let start = shell("pwd; echo $WHO; read x; echo got $x; echo err >&2; exit 3");
    let headers = "\r\nkeepalive-ping-interval: 1";
    let mut answer = agent.stream_binary("Start", headers, &start.encode_to_vec());
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("application/connect+proto"));
    let pid = event(answer.raw_frame()).start.unwrap().pid;

    let (status, kind, body) = agent.call_binary("List", b"");
    assert_eq!((status, kind.as_str()), (200, "application/proto"));
    let listed = List::decode(&body[..]).unwrap().processes;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].pid, listed[0].tag.as_deref()), (pid, Some("t")));
    assert_eq!(listed[0].config, start.process);

    // Nothing happens for a second after the first lines.
    let mut out = Vec::new();
    let mut all = loop {
        let event = event(answer.raw_frame());
        if event.keepalive.is_some() {
            break out;
        }
        out.extend(event.data.unwrap().stdout.unwrap());
    };
    let input = Input { stdin: Some(b"it\n".to_vec()) };
    let message = About { process: by_tag(), input: Some(input) }.encode_to_vec();
    assert_eq!(agent.call_binary("SendInput", &message).0, 200);
    let mut err = Vec::new();
    let end = loop {
        let event = event(answer.raw_frame());
        if let Some(end) = event.end {
            break end;
        }
        let Some(data) = event.data else { continue };
        all.extend(data.stdout.unwrap_or_default());
        err.extend(data.stderr.unwrap_or_default());
    };
    assert_eq!(String::from_utf8(all).unwrap(), "/tmp\nme\ngot it\n");
    assert_eq!(err, b"err\n");
    assert_eq!((end.exit_code, end.exited, end.status.as_str()), (3, true, "exit status 3"));
    assert_eq!(end.error.as_deref(), Some("exit status 3"));
    assert_eq!(answer.raw_frame(), (2, b"{}".to_vec()), "the end is JSON in every codec");
}

#[test]
fn a_killed_process_is_told_in_binary_and_its_exit_is_kept() {
    let agent = Agent::start();
    let mut answer = agent.stream_binary("Start", "", &shell("exec sleep 60").encode_to_vec());
    event(answer.raw_frame()).start.unwrap();
    let kill = Signal { process: by_tag(), signal: 9 }.encode_to_vec();
    assert_eq!(agent.call_binary("SendSignal", &kill).0, 200);
    let killed = |end: &End| {
        (end.exit_code, end.exited, end.status.as_str()) == (-1, false, "signal: killed")
            && end.error.as_deref() == Some("signal: killed")
    };
    assert!(killed(&event(answer.raw_frame()).end.unwrap()));
    // By its tag, after its end.
    let which = About { process: by_tag(), input: None }.encode_to_vec();
    let mut late = agent.stream_binary("Connect", "", &which);
    event(late.raw_frame()).start.unwrap();
    assert!(killed(&event(late.raw_frame()).end.unwrap()));
    let other = Signal { process: by_tag(), signal: 1 }.encode_to_vec();
    assert_eq!(agent.call_binary("SendSignal", &other).0, 400, "only TERM and KILL can be sent");
}

#[test]
fn errors_are_json_in_every_codec() {
    let agent = Agent::start();
    let missing =
        About { process: Some(Selector { pid: Some(4_000_000), tag: None }), input: None };
    let (status, kind, body) = agent.call_binary("CloseStdin", &missing.encode_to_vec());
    assert_eq!((status, kind.as_str()), (404, "application/json"));
    let error: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        error,
        json!({"code": "not_found", "message": "process with pid 4000000 not found"})
    );
    let mut answer = agent.stream_binary("Connect", "", &missing.encode_to_vec());
    assert_eq!(answer.status, 200);
    assert_eq!(answer.error()["code"], "not_found");

    for malformed in [&b"\x0a"[..], b"\x0a\xff\xff\xff\xff\x0f", b"\xff\xff", b"\x0a\x02\x08"] {
        let (status, kind, body) = agent.call_binary("CloseStdin", malformed);
        assert_eq!((status, kind.as_str()), (400, "application/json"), "{malformed:?}");
        let error: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(error["code"], "invalid_argument");
        let mut answer = agent.stream_binary("Start", "", malformed);
        assert_eq!(answer.error()["code"], "invalid_argument", "{malformed:?}");
    }
    // A field that nobody knows is let through.
    let known = [&missing.encode_to_vec()[..], b"\xfa\x01\x03abc"].concat();
    assert_eq!(agent.call_binary("CloseStdin", &known).0, 404);
    assert_eq!(agent.call("List", &json!({})).0, 200);
}

#[test]
fn compression_and_other_versions_are_refused_with_a_reason() {
    let agent = Agent::start();
    let mut answer = agent.call_with("List", "\r\ncontent-encoding: gzip", &json!({}));
    let error: Value = serde_json::from_slice(&answer.body()).unwrap();
    assert_eq!((answer.status, &error["code"]), (501, &json!("unimplemented")));
    assert!(error["message"].as_str().unwrap().contains("identity"), "{error}");
    let coded = "\r\nconnect-content-encoding: gzip";
    let error = agent.stream_with("Start", coded, &json!({})).error();
    assert_eq!(error["code"], "unimplemented");
    let ours = "\r\nconnect-protocol-version: 1\r\nconnect-content-encoding: identity";
    let command = json!({"process": {"cmd": "/bin/true"}});
    assert!(agent.stream_with("Start", ours, &command).event().is_some());

    let answer = agent.call_with("List", "\r\nconnect-protocol-version: 2", &json!({}));
    assert_eq!(answer.status, 400);
    for timeout in ["soon", "-5", "12345678901"] {
        let headers = format!("\r\nconnect-timeout-ms: {timeout}");
        assert_eq!(agent.call_with("List", &headers, &json!({})).status, 400, "{timeout}");
    }
}

#[test]
fn a_unary_call_ends_at_its_deadline() {
    let agent = Agent::start();
    let start = json!({"process": {"cmd": "/bin/sleep", "args": ["60"]}});
    let (pid, _answer) = agent.start_process(&start);
    // More than the pipe takes: the call waits for a process that reads nothing.
    let input = crate::support::encode(&"x".repeat(1_000_000));
    let message = json!({"process": {"pid": pid}, "input": {"stdin": input}});
    let mut answer = agent.call_with("SendInput", "\r\nconnect-timeout-ms: 300", &message);
    let error: Value = serde_json::from_slice(&answer.body()).unwrap();
    assert_eq!(answer.status, 504);
    let wanted = json!({"code": "deadline_exceeded", "message": "context deadline exceeded"});
    assert_eq!(error, wanted);
}

#[test]
fn the_old_python_client_is_told_only_what_it_knows() {
    let agent = Agent::start();
    let message = json!({"path": "/etc/passwd"});
    let of = |agent_name: &str| {
        let headers = format!("\r\nuser-agent: {agent_name}");
        let mut answer = agent.call_with("filesystem.Filesystem/Stat", &headers, &message);
        let marked = answer.header("x-e2b-legacy-sdk").map(str::to_owned);
        let entry: Value = serde_json::from_slice(&answer.body()).unwrap();
        (marked, entry["entry"].as_object().unwrap().keys().cloned().collect::<Vec<_>>())
    };
    let (marked, keys) = of("connect-python");
    assert_eq!(
        (marked.as_deref(), keys),
        (Some("true"), ["name", "path", "type"].map(String::from).to_vec())
    );
    let (marked, keys) = of("connectrpc/0.12.1");
    assert_eq!(marked, None);
    assert!(keys.contains(&"modifiedTime".to_owned()), "{keys:?}");
}

#[test]
fn without_the_token_no_codec_helps() {
    let agent = Agent::start();
    for kind in ["application/proto", "application/connect+proto", "application/connect+json"] {
        let head = format!(
            "POST /process.Process/List HTTP/1.1\r\nx-access-token: {TOKEN}x\r\ncontent-type: {kind}"
        );
        assert_eq!(agent.request(&head, b"").status, 401, "{kind}");
    }
}
