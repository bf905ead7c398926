//! An agent that goes on as another sandbox, as it does after a restore: tokens, environment,
//! connections and processes of the former one, and the machine the test runs on, which is not a
//! guest.

#![expect(clippy::unwrap_used, reason = "a test's helper fails its test by panicking")]

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;

use mica_wire::guest::{ControlRequest, InitRequest, Verdict};
use serde_json::json;

use crate::support::{Agent, TOKEN, identity};

/// The second sandbox: another token, other variables.
fn other() -> InitRequest {
    InitRequest {
        access_token: Some("another-token".to_owned()),
        env_vars: [("OF_THE_OTHER".to_owned(), "2".to_owned())].into(),
        new_sandbox: true,
        ..identity("other")
    }
}

fn envs(agent: &Agent, token: &str) -> (u16, String) {
    let head = format!("GET /envs HTTP/1.1\r\nx-access-token: {token}");
    let mut answer = agent.request(&head, b"");
    let body = answer.body();
    (answer.status, String::from_utf8(body).unwrap())
}

#[test]
fn the_former_token_opens_nothing() {
    let agent = Agent::start();
    assert_eq!(envs(&agent, TOKEN).0, 200);
    assert_eq!(agent.control(&ControlRequest::Init(other())).error, None);
    assert_eq!(envs(&agent, TOKEN).0, 401);
    let (status, body) = envs(&agent, "another-token");
    assert_eq!(status, 200);
    assert!(body.contains(r#""OF_THE_OTHER":"2""#) && !body.contains("OF_THE_SANDBOX"), "{body}");
    assert!(body.contains(r#""E2B_SANDBOX_ID":"other""#), "{body}");
    // Back again: the last one counts, whatever came before.
    assert_eq!(agent.init("itest").error, None);
    assert_eq!(envs(&agent, "another-token").0, 401);
    assert_eq!(envs(&agent, TOKEN).0, 200);
}

#[test]
fn a_kept_connection_does_not_keep_its_token() {
    let agent = Agent::start();
    let (mut stream, verdict) = agent.port(49983);
    assert_eq!(verdict, Some(Verdict::Open));
    let request = format!("GET /envs HTTP/1.1\r\nhost: x\r\nx-access-token: {TOKEN}\r\n\r\n");
    let mut status = |wanted: &str| {
        stream.write_all(request.as_bytes()).unwrap();
        let mut bytes = vec![0; 4096];
        let count = stream.read(&mut bytes).unwrap();
        let head = String::from_utf8_lossy(&bytes[..count]).into_owned();
        assert!(head.starts_with(&format!("HTTP/1.1 {wanted}")), "{head}");
    };
    status("200");
    // The same sandbox goes on, with its connections; a new token holds for them too.
    let renewed = InitRequest { access_token: Some("renewed".to_owned()), ..identity("itest") };
    assert_eq!(agent.control(&ControlRequest::Init(renewed)).error, None);
    status("401");
}

#[test]
fn connections_of_the_former_sandbox_end_and_its_processes_go_on() {
    let agent = Agent::start();
    // `cat` says what it is told, and so can show that it is still there.
    let command = json!({"process": {"cmd": "/bin/cat", "args": [], "envs": {}}, "tag": "kept"});
    let (pid, mut watching) = agent.start_process(&command);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (mut carried, verdict) = agent.port(listener.local_addr().unwrap().port());
    assert_eq!(verdict, Some(Verdict::Open));
    let (mut server, _) = listener.accept().unwrap();

    // The same sandbox: all goes on.
    assert_eq!(agent.init("itest").error, None);
    server.write_all(b"x").unwrap();
    carried.read_exact(&mut [0]).unwrap();
    let say = |text: &str, token: &str| {
        let message =
            json!({"process": {"pid": pid}, "input": {"stdin": crate::support::encode(text)}});
        let head = format!(
            "POST /process.Process/SendInput HTTP/1.1\r\nx-access-token: {token}\r\n\
             content-type: application/json"
        );
        agent.request(&head, message.to_string().as_bytes()).status
    };
    assert_eq!(say("one", TOKEN), 200);
    let heard = watching.event().unwrap();
    assert_eq!(heard["event"]["data"]["stdout"], crate::support::encode("one"));

    // Another sandbox: connections end, the process does not.
    assert_eq!(agent.control(&ControlRequest::Init(other())).error, None);
    assert_eq!(carried.read(&mut [0]).unwrap(), 0);
    assert_eq!(server.read(&mut [0]).unwrap(), 0);
    assert!(watching.is_cut_off());
    assert_eq!(say("two", TOKEN), 401);
    let selector = json!({"process": {"pid": pid}});
    let mut again = agent.stream_as("another-token", "Connect", "", &selector);
    assert_eq!(again.event().unwrap()["event"]["start"]["pid"], pid);
    assert_eq!(say("two", "another-token"), 200);
    let heard = again.event().unwrap();
    assert_eq!(heard["event"]["data"]["stdout"], crate::support::encode("two"));
}

#[test]
fn processes_have_the_environment_of_the_sandbox_they_start_in() {
    let agent = Agent::start();
    assert_eq!(agent.control(&ControlRequest::Init(other())).error, None);
    let command = json!({"process": {"cmd": "/usr/bin/env", "args": [], "envs": {}}});
    let mut answer = agent.stream_as("another-token", "Start", "", &command);
    assert!(answer.event().unwrap()["event"]["start"]["pid"].is_u64());
    let (out, _, _) = answer.rest();
    assert!(out.contains("OF_THE_OTHER=2\n") && !out.contains("OF_THE_SANDBOX"), "{out}");
    assert!(out.contains("E2B_SANDBOX_ID=other\n"), "{out}");
}

#[test]
fn a_machine_that_is_no_guest_is_left_alone() {
    let files = ["/etc/hosts", "/etc/machine-id", "/proc/sys/kernel/hostname"];
    let read = || files.map(|path| std::fs::read(path).ok());
    let held = (read(), Path::new("/run/e2b").exists());
    let before = std::time::SystemTime::now();
    let agent = Agent::start();
    assert_eq!(agent.control(&ControlRequest::Warm { deadline_ms: 1000 }).error, None);
    assert_eq!(agent.control(&ControlRequest::Init(other())).error, None);
    assert_eq!((read(), Path::new("/run/e2b").exists()), held);
    // The identities are of 1970.
    assert!(std::time::SystemTime::now() >= before);
}

#[test]
fn a_template_without_services_is_warm_at_once() {
    let agent = Agent::start_bare();
    assert_eq!(agent.control(&ControlRequest::Warm { deadline_ms: 1000 }).error, None);
    assert_eq!(agent.port(49983).1, Some(Verdict::Refused), "warm is not an identity");
}
