//! Watching directories through the real agent: streams and watchers that are asked, their options,
//! and clients that want too much.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

use serde_json::{Value, json};

use crate::required;
use crate::support::{Agent, Answer, PATIENCE, TOKEN, encode};

const WATCH: &str = "filesystem.Filesystem/WatchDir";
const CREATE: &str = "filesystem.Filesystem/CreateWatcher";
const EVENTS: &str = "filesystem.Filesystem/GetWatcherEvents";
const REMOVE: &str = "filesystem.Filesystem/RemoveWatcher";

/// The kernel counts watchers by user, and the test that takes them all leaves none to the others.
static WATCHERS: RwLock<()> = RwLock::new(());

fn some() -> RwLockReadGuard<'static, ()> {
    WATCHERS.read().unwrap_or_else(PoisonError::into_inner)
}

fn watched(agent: &Agent) -> PathBuf {
    let path = agent.directory().join("watched");
    std::fs::create_dir(&path).unwrap();
    path
}

fn about(path: &std::path::Path) -> Value {
    json!({"path": path})
}

/// Kind and name of the next event of a stream.
fn next(answer: &mut Answer) -> (String, String) {
    loop {
        let event = answer.event().unwrap();
        if event.get("keepalive").is_none() {
            return pair(&event["filesystem"]);
        }
    }
}

fn pair(event: &Value) -> (String, String) {
    let kind = event["type"].as_str().unwrap().strip_prefix("EVENT_TYPE_").unwrap();
    (kind.to_owned(), event["name"].as_str().unwrap().to_owned())
}

fn events(wanted: &[(&str, &str)]) -> Vec<(String, String)> {
    wanted.iter().map(|(kind, name)| ((*kind).to_owned(), (*name).to_owned())).collect()
}

fn upload(agent: &Agent, path: &std::path::Path, headers: &str, body: &[u8]) -> Value {
    let head = format!(
        "POST /files?path={} HTTP/1.1\r\nx-access-token: {TOKEN}\r\n\
         content-type: application/octet-stream{headers}",
        path.display()
    );
    let mut answer = agent.request(&head, body);
    let body = answer.body();
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&body));
    serde_json::from_slice(&body).unwrap()
}

#[test]
fn a_stream_starts_and_tells_each_event() {
    let _some = some();
    let agent = Agent::start();
    let path = watched(&agent);
    std::fs::create_dir(path.join("below")).unwrap();
    let mut answer = agent.stream_with(WATCH, "\r\nkeepalive-ping-interval: 1", &about(&path));
    assert_eq!(answer.event(), Some(json!({"start": {}})));
    assert_eq!(answer.event(), Some(json!({"keepalive": {}})), "after a second of silence");
    std::fs::write(path.join("a"), "1").unwrap();
    std::fs::write(path.join("below/b"), "not recursive").unwrap();
    std::fs::rename(path.join("a"), path.join("c")).unwrap();
    std::fs::remove_file(path.join("c")).unwrap();
    let wanted =
        [("CREATE", "a"), ("WRITE", "a"), ("RENAME", "a"), ("CREATE", "c"), ("REMOVE", "c")];
    let told: Vec<_> = wanted.iter().map(|_| next(&mut answer)).collect();
    assert_eq!(told, events(&wanted));
    // As SDKs upload, over what is there and where nothing is.
    upload(&agent, &path.join("up"), "", b"1");
    upload(&agent, &path.join("up"), "", b"2");
    let wanted = [("CREATE", "up"), ("WRITE", "up"), ("WRITE", "up")];
    let told: Vec<_> = wanted.iter().map(|_| next(&mut answer)).collect();
    assert_eq!(told, events(&wanted));
    answer.hang_up();
}

#[test]
fn entries_and_what_is_below_come_when_asked_for() {
    let _some = some();
    let agent = Agent::start();
    let path = watched(&agent);
    let mut message = about(&path);
    message["recursive"] = json!(true);
    message["includeEntry"] = json!(true);
    message["allowNetworkMounts"] = json!(true);
    let mut answer = agent.stream(WATCH, &message);
    answer.event().unwrap();
    std::fs::create_dir(path.join("new")).unwrap();
    let event = answer.event().unwrap()["filesystem"].clone();
    assert_eq!(pair(&event), ("CREATE".to_owned(), "new".to_owned()));
    assert_eq!(event["entry"]["type"], "FILE_TYPE_DIRECTORY");
    assert_eq!(event["entry"]["path"], json!(path.join("new")));
    upload(&agent, &path.join("new/f"), "\r\nx-metadata-who: me", b"abc");
    let event = answer.event().unwrap()["filesystem"].clone();
    assert_eq!(pair(&event), ("CREATE".to_owned(), "new/f".to_owned()));
    assert_eq!((&event["entry"]["name"], &event["entry"]["size"]), (&json!("f"), &json!("3")));
    assert_eq!(pair(&answer.event().unwrap()["filesystem"]).0, "WRITE");
    std::fs::remove_file(path.join("new/f")).unwrap();
    let event = answer.event().unwrap()["filesystem"].clone();
    assert_eq!(pair(&event), ("REMOVE".to_owned(), "new/f".to_owned()));
    assert!(event.get("entry").is_none(), "{event}");
}

#[test]
fn a_watcher_keeps_events_until_it_is_asked() {
    let _some = some();
    let agent = Agent::start();
    let path = watched(&agent);
    let (status, made) = agent.call(CREATE, &about(&path));
    assert_eq!(status, 200, "{made}");
    let id = json!({"watcherId": made["watcherId"]});
    assert_eq!(agent.call(EVENTS, &id), (200, json!({"events": []})));
    std::fs::write(path.join("a"), "1").unwrap();
    std::fs::remove_file(path.join("a")).unwrap();
    let start = Instant::now();
    let mut told = Vec::new();
    while told.len() < 3 {
        assert!(start.elapsed() < PATIENCE, "{told:?}");
        let (status, reply) = agent.call(EVENTS, &id);
        assert_eq!(status, 200);
        told.extend(reply["events"].as_array().unwrap().iter().map(pair));
    }
    assert_eq!(told, events(&[("CREATE", "a"), ("WRITE", "a"), ("REMOVE", "a")]));
    assert_eq!(agent.call(EVENTS, &id), (200, json!({"events": []})), "each is given once");
    assert_eq!(agent.call(REMOVE, &id), (200, json!({})));
    for method in [EVENTS, REMOVE] {
        let (status, error) = agent.call(method, &id);
        assert_eq!((status, &error["code"]), (404, &json!("not_found")), "{method}");
    }
}

#[test]
fn watching_speaks_binary_too() {
    let _some = some();
    let agent = Agent::start();
    let path = watched(&agent);
    let text = path.to_str().unwrap().as_bytes();
    let message = [&[0x0a, u8::try_from(text.len()).unwrap()], text, b"\x10\x01"].concat();
    let mut answer = agent.stream_binary(WATCH, "", &message);
    assert_eq!(answer.raw_frame(), (0, b"\x0a\x00".to_vec()));
    std::fs::write(path.join("a"), "").unwrap();
    // filesystem: { name: "a", type: CREATE }
    assert_eq!(answer.raw_frame(), (0, b"\x12\x05\x0a\x01a\x10\x01".to_vec()));
    let (status, _, made) = agent.call_binary(CREATE, &message);
    assert_eq!((status, made[0]), (200, 0x0a));
    // The answer's field is the request's.
    assert_eq!(agent.call_binary(EVENTS, &made), (200, "application/proto".into(), Vec::new()));
    assert_eq!(agent.call_binary(REMOVE, &made).0, 200);
    assert_eq!(agent.call_binary(EVENTS, &made).0, 404);
}

#[test]
fn what_cannot_be_watched_is_told_so() {
    let _some = some();
    let agent = Agent::start();
    let path = watched(&agent);
    std::fs::write(path.join("file"), "").unwrap();
    for (path, code) in [
        (path.join("missing"), "not_found"),
        (path.join("file"), "invalid_argument"),
        (PathBuf::from("a\0b"), "invalid_argument"),
    ] {
        assert_eq!(agent.stream(WATCH, &about(&path)).error()["code"], code, "{path:?}");
        assert_eq!(agent.call(CREATE, &about(&path)).1["code"], code, "{path:?}");
    }
}

#[test]
fn what_the_user_may_not_read_is_watched_all_the_same() {
    if !rustix::process::geteuid().is_root() {
        return required::skip("ROOT", "only root's agent can work for another user");
    }
    let _some = some();
    let agent = Agent::start();
    let secret = watched(&agent).join("secret");
    std::fs::create_dir_all(secret.join("below")).unwrap();
    for path in [&secret, &secret.join("below")] {
        rustix::fs::chmod(path, rustix::fs::Mode::from(0o700)).unwrap();
    }
    // `nobody:` in base64.
    let nobody = "\r\nauthorization: Basic bm9ib2R5Og==";
    let message =
        json!({"path": secret.display().to_string(), "recursive": true, "includeEntry": true});
    let mut told = agent.stream_with(WATCH, nobody, &message);
    assert_eq!(told.event().unwrap(), json!({"start": {}}));
    std::fs::write(secret.join("below/f"), "").unwrap();
    let event = told.event().unwrap()["filesystem"].clone();
    assert_eq!(pair(&event), ("CREATE".to_owned(), "below/f".to_owned()));
    assert_eq!(event["entry"]["owner"], "root");
}

#[test]
fn thousands_of_watchers_are_refused_and_hurt_nobody() {
    let _all = WATCHERS.write().unwrap_or_else(PoisonError::into_inner);
    let agent = Agent::start();
    let path = watched(&agent);
    let mut made = Vec::new();
    let mut refused = 0;
    for _ in 0..2_000 {
        let (status, reply) = agent.call(CREATE, &about(&path));
        if status == 200 {
            made.push(reply["watcherId"].clone());
        } else {
            assert_eq!((status, &reply["code"]), (429, &json!("resource_exhausted")), "{reply}");
            assert!(reply["message"].as_str().unwrap().contains("remove one first"), "{reply}");
            refused += 1;
        }
    }
    // How many there are is the kernel's limit or ours, whichever is smaller.
    assert!(!made.is_empty() && made.len() <= 256 && refused > 0, "{} were made", made.len());
    let error = agent.stream(WATCH, &about(&path)).error();
    assert_eq!(error["code"], "resource_exhausted");
    let (_, mut other) =
        agent.start_process(&json!({"process": {"cmd": "/bin/echo", "args": ["here"]}}));
    assert_eq!(other.rest().0, "here\n");
    // A place that is given back is free.
    for id in &made {
        assert_eq!(agent.call(REMOVE, &json!({"watcherId": id})).0, 200);
    }
    let start = Instant::now();
    while agent.call(CREATE, &about(&path)).0 != 200 {
        assert!(start.elapsed() < PATIENCE, "no place is free");
    }
}

#[test]
fn a_watcher_that_nobody_asks_says_what_it_lost() {
    let _some = some();
    let agent = Agent::start();
    let path = watched(&agent);
    let (_, made) = agent.call(CREATE, &about(&path));
    let id = json!({"watcherId": made["watcherId"]});
    // At least two events each.
    for _ in 0..12_000 {
        std::fs::write(path.join("a"), "").unwrap();
        std::fs::remove_file(path.join("a")).unwrap();
    }
    let start = Instant::now();
    let error = loop {
        assert!(start.elapsed() < PATIENCE, "nothing was said");
        let (status, reply) = agent.call(EVENTS, &id);
        if status != 200 {
            break reply;
        }
    };
    assert_eq!(error["code"], "resource_exhausted");
    assert!(error["message"].as_str().unwrap().contains("events were lost"), "{error}");
    assert_eq!(agent.call(EVENTS, &id).1, error, "it stays so");
    assert_eq!(agent.call(REMOVE, &id).0, 200);
}

#[test]
fn a_watch_ends_at_its_deadline_and_input_still_flows() {
    let _some = some();
    let agent = Agent::start();
    let path = watched(&agent);
    let mut answer = agent.stream_with(WATCH, "\r\nconnect-timeout-ms: 300", &about(&path));
    let error = answer.error();
    assert_eq!(error["code"], "deadline_exceeded");
    let (pid, mut cat) = agent.start_process(&json!({"process": {"cmd": "/bin/cat"}}));
    let input = json!({"process": {"pid": pid}, "input": {"stdin": encode("x")}});
    assert_eq!(agent.call("SendInput", &input).0, 200);
    assert!(cat.event().is_some());
}
