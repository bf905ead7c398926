//! `/files` of the real agent: who may, conditions, codings, metadata, putting files together.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read as _, Write as _};

use base64::Engine as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::required;
use crate::support::{Agent, Answer, TOKEN};

/// A request to a path below `/files`, with the token.
fn ask(agent: &Agent, line: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let mut head = format!("{line} HTTP/1.1\r\nx-access-token: {TOKEN}");
    for (name, value) in headers {
        head.push_str(&format!("\r\n{name}: {value}"));
    }
    agent.request(&head, body)
}

fn json_of(answer: &mut Answer) -> Value {
    serde_json::from_slice(&answer.body()).unwrap()
}

const OCTETS: (&str, &str) = ("content-type", "application/octet-stream");

fn at(agent: &Agent, name: &str) -> String {
    agent.directory().join(name).display().to_string()
}

fn put(agent: &Agent, name: &str, body: &[u8]) {
    let line = format!("POST /files?path={}", at(agent, name));
    assert_eq!(ask(agent, &line, &[OCTETS], body).status, 200);
}

#[test]
fn signatures_open_one_file_and_refusals_have_e2bs_words() {
    let agent = Agent::start();
    put(&agent, "f", b"signed");
    let path = at(&agent, "f");
    let sign = |action: &str, expiration: Option<i64>| {
        let tail = expiration.map_or_else(String::new, |at| format!(":{at}"));
        let hash = Sha256::digest(format!("{path}:{action}::{TOKEN}{tail}"));
        let text = base64::engine::general_purpose::STANDARD_NO_PAD.encode(hash);
        format!("v1_{}", text.replace('+', "%2B").replace('/', "%2F"))
    };
    let get = |more: &str| {
        let mut answer = agent.request(&format!("GET /files?path={path}{more} HTTP/1.1"), b"");
        let body = answer.body();
        (answer.status, String::from_utf8(body).unwrap())
    };
    let signature = |action, expiration| format!("&signature={}", sign(action, expiration));
    assert_eq!(get(&signature("read", None)), (200, "signed".to_owned()));
    let far = 99_999_999_999;
    let until = format!("{}&signature_expiration={far}", signature("read", Some(far)));
    assert_eq!(get(&until).0, 200);
    let over = format!("{}&signature_expiration=1", signature("read", Some(1)));
    for (more, message) in [
        (String::new(), "missing signature query parameter"),
        (signature("write", None), "invalid signature"),
        (format!("{}&username=root", signature("read", None)), "invalid signature"),
        ("&signature=v1_x".to_owned(), "invalid signature"),
        (over, "signature is already expired"),
    ] {
        let wanted = format!(r#"{{"code":401,"message":"{message}"}}"#);
        assert_eq!(get(&more), (401, wanted), "{more}");
    }
    let (status, _) = get(&format!("{}&signature_expiration=soon", signature("read", None)));
    assert_eq!(status, 400);
    let head = format!("GET /files?path={path} HTTP/1.1\r\nx-access-token: wrong");
    let mut answer = agent.request(&head, b"");
    let wanted = r#"{"code":401,"message":"access token present in header but does not match"}"#;
    assert_eq!((answer.status, answer.body()), (401, wanted.as_bytes().to_vec()));

    let line = format!("POST /files?path={path}{} HTTP/1.1", signature("write", None));
    let head = format!("{line}\r\ncontent-type: application/octet-stream");
    assert_eq!(agent.request(&head, b"written").status, 200);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "written");
    // What is put together is not signed for.
    let head = "POST /files/compose HTTP/1.1\r\ncontent-type: application/json";
    assert_eq!(agent.request(head, b"{}").status, 401);
}

#[test]
fn a_file_is_sent_only_when_its_conditions_hold() {
    let agent = Agent::start();
    put(&agent, "f", b"0123456789");
    let line = format!("GET /files?path={}", at(&agent, "f"));
    let mut whole = ask(&agent, &line, &[], b"");
    assert_eq!((whole.status, whole.body()), (200, b"0123456789".to_vec()));
    let etag = whole.header("etag").unwrap().to_owned();
    let modified = whole.header("last-modified").unwrap().to_owned();
    assert_eq!(whole.header("accept-ranges"), Some("bytes"));
    let get = |headers: &[(&str, &str)]| {
        let mut answer = ask(&agent, &line, headers, b"");
        let body = answer.body();
        (answer.status, body)
    };
    for headers in [
        &[("if-none-match", etag.as_str())][..],
        &[("if-modified-since", modified.as_str())],
        &[("if-none-match", etag.as_str()), ("accept-encoding", "gzip")],
    ] {
        assert_eq!(get(headers), (304, Vec::new()), "{headers:?}");
    }
    let part = ("range", "bytes=2-4");
    assert_eq!(get(&[part, ("if-range", &etag)]), (206, b"234".to_vec()));
    assert_eq!(get(&[part, ("if-range", "\"other\"")]).0, 200);
    assert_eq!(get(&[part, ("accept-encoding", "gzip")]), (206, b"234".to_vec()));
    assert_eq!(get(&[("if-match", "\"other\"")]).0, 412);
    let beyond = ask(&agent, &line, &[("range", "bytes=10-")], b"");
    assert_eq!((beyond.status, beyond.header("content-range")), (416, Some("bytes */10")));
    let refused = ask(&agent, &line, &[("accept-encoding", "br, identity;q=0")], b"");
    assert_eq!(refused.status, 406);
    put(&agent, "f", b"other bytes");
    assert_eq!(get(&[("if-none-match", &etag)]).1, b"other bytes");
    put(&agent, "empty", b"");
    let line = format!("GET /files?path={}", at(&agent, "empty"));
    for coding in ["identity", "gzip"] {
        let answer = ask(&agent, &line, &[("accept-encoding", coding)], b"");
        assert_eq!((answer.status, answer.header("content-length")), (200, Some("0")));
    }
}

/// A client sends all of its body before it reads: closing early would take the answer from it.
#[test]
fn a_small_file_that_is_written_anew_all_the_time_is_read_whole() {
    let agent = Agent::start();
    let path = agent.directory().join("beat");
    let shown = path.display().to_string();
    std::fs::write(&path, "the first").unwrap();
    // It ends with the test, also where that fails.
    let (goes_on, ended) = std::sync::mpsc::channel::<()>();
    let writer = std::thread::spawn(move || {
        // As a shell writes it: cut to nothing first.
        while ended.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            std::fs::write(&path, "the same words over and over again").unwrap();
        }
    });
    for _ in 0..500 {
        let line = format!("GET /files?path={shown}");
        let mut answer = ask(&agent, &line, &[], b"");
        assert_eq!(answer.status, 200);
        // It panics where the answer breaks off.
        answer.body();
    }
    drop(goes_on);
    writer.join().unwrap();
}

#[test]
fn an_upload_that_is_refused_at_once_is_answered_all_the_same() {
    let agent = Agent::start();
    let body = vec![b'x'; 3_000_000];
    let line = format!("POST /files?path={}", at(&agent, "f"));
    let unknown = format!("{line}&username=no-one");
    assert_eq!(ask(&agent, &unknown, &[OCTETS], &body).status, 401);
    assert_eq!(ask(&agent, &line, &[OCTETS, ("content-encoding", "br")], &body).status, 400);
    assert_eq!(ask(&agent, &line, &[("content-type", "text/plain")], &body).status, 400);
    let head = format!("{line} HTTP/1.1\r\nx-access-token: wrong");
    assert_eq!(agent.request(&head, &body).status, 401);
    assert_eq!(agent.request("POST /nothing HTTP/1.1", &body).status, 404);
    let kind = ("content-type", "application/json");
    let large = vec![b' '; 9_000_000];
    let list = "POST /process.Process/List";
    assert_eq!(ask(&agent, list, &[kind], &large).status, 429, "over the limit of a message");
    assert_eq!(ask(&agent, list, &[OCTETS], &body).status, 415);
    assert!(!std::fs::exists(at(&agent, "f")).unwrap());
}

#[test]
fn gzip_goes_both_ways() {
    let agent = Agent::start();
    let plain = b"again and ".repeat(10_000);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(&plain).unwrap();
    let line = format!("POST /files?path={}", at(&agent, "f"));
    let coded = [OCTETS, ("content-encoding", "gzip")];
    assert_eq!(ask(&agent, &line, &coded, &encoder.finish().unwrap()).status, 200);
    assert_eq!(std::fs::read(at(&agent, "f")).unwrap(), plain);
    let line = format!("GET /files?path={}", at(&agent, "f"));
    let mut answer = ask(&agent, &line, &[("accept-encoding", "gzip")], b"");
    assert_eq!(answer.header("content-encoding"), Some("gzip"));
    let body = answer.body();
    let mut decoded = Vec::new();
    flate2::read::GzDecoder::new(&body[..]).read_to_end(&mut decoded).unwrap();
    assert!(decoded == plain && body.len() < plain.len() / 10);
}

#[test]
fn metadata_stays_with_its_file_until_the_next_upload() {
    let agent = Agent::start();
    let line = format!("POST /files?path={}", at(&agent, "f"));
    let mut written = ask(&agent, &line, &[OCTETS, ("X-Metadata-Author", "me")], b"x");
    let reply = json_of(&mut written);
    if written.status == 400 && reply["message"].as_str().unwrap().contains("keeps no metadata") {
        return required::skip("XATTRS", "the temporary directory keeps no attributes");
    }
    assert_eq!(reply[0]["metadata"], json!({"author": "me"}));
    let stat = || {
        let message = json!({"path": at(&agent, "f")});
        agent.call("filesystem.Filesystem/Stat", &message).1["entry"].clone()
    };
    assert_eq!(stat()["metadata"], json!({"author": "me"}));
    let moved = json!({"source": at(&agent, "f"), "destination": at(&agent, "g")});
    let (_, reply) = agent.call("filesystem.Filesystem/Move", &moved);
    assert_eq!(reply["entry"]["metadata"], json!({"author": "me"}));
    std::fs::rename(at(&agent, "g"), at(&agent, "f")).unwrap();

    let form = format!(
        "--XX\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{}\"\r\n\r\n1\r\n\
         --XX\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{}\"\r\n\r\n2\r\n--XX--",
        at(&agent, "f"),
        at(&agent, "h")
    );
    let kind = ("content-type", "multipart/form-data; boundary=XX");
    let mut written =
        ask(&agent, "POST /files", &[kind, ("x-metadata-team", "a b")], form.as_bytes());
    let reply = json_of(&mut written);
    assert_eq!(reply.as_array().unwrap().len(), 2);
    assert_eq!(reply[1]["metadata"], json!({"team": "a b"}));
    assert_eq!(stat()["metadata"], json!({"team": "a b"}), "what was there before is gone");
    put(&agent, "f", b"y");
    assert!(stat().get("metadata").is_none());
    let large = "v".repeat(5_000);
    for (name, value) in [("x-metadata-a", large.as_str()), ("x-metadata-a", "é")] {
        assert_eq!(ask(&agent, &line, &[OCTETS, (name, value)], b"x").status, 400);
    }
    assert_eq!(std::fs::read_to_string(at(&agent, "f")).unwrap(), "y");
}

#[test]
fn files_are_put_together_and_their_sources_go() {
    let agent = Agent::start();
    for (name, body) in [("1", &b"one "[..]), ("2", b"two "), ("3", b"three")] {
        put(&agent, name, body);
    }
    let compose = |message: &Value| {
        let kind = ("content-type", "application/json");
        let body = message.to_string();
        let mut answer = ask(&agent, "POST /files/compose", &[kind], body.as_bytes());
        let body = json_of(&mut answer);
        (answer.status, body)
    };
    let sources = |names: &[&str]| names.iter().map(|name| at(&agent, name)).collect::<Vec<_>>();
    for (names, destination, status, words) in [
        (&["1", "missing"][..], "all", 404, "source file not found: "),
        (&["1", "."], "all", 400, "source path is not a regular file: "),
        (&["1", "all"], "all", 400, "cannot be the same as destination"),
        (&[], "all", 400, "source_paths must not be empty"),
    ] {
        let message =
            json!({"source_paths": sources(names), "destination": at(&agent, destination)});
        let (found, error) = compose(&message);
        assert_eq!((found, &error["code"]), (status, &json!(status)));
        assert!(error["message"].as_str().unwrap().contains(words), "{error}");
    }
    assert_eq!(compose(&json!({"source_paths": ["x"]})).1["message"], "destination is required");
    let message = json!({"source_paths": ["x"], "destination": "y", "username": "no-one"});
    assert_eq!(compose(&message).0, 401);
    assert!(!std::fs::exists(at(&agent, "all")).unwrap());

    let message =
        json!({"source_paths": sources(&["1", "2", "3"]), "destination": at(&agent, "new/all")});
    let wanted = json!({"path": at(&agent, "new/all"), "name": "all", "type": "file"});
    assert_eq!(compose(&message), (200, wanted));
    assert_eq!(std::fs::read_to_string(at(&agent, "new/all")).unwrap(), "one two three");
    for name in ["1", "2", "3"] {
        assert!(!std::fs::exists(at(&agent, name)).unwrap(), "{name} is still there");
    }
}

#[test]
fn the_figures_have_every_field_that_sdks_read() {
    let agent = Agent::start();
    let mut answer = ask(&agent, "GET /metrics", &[], b"");
    let figures = json_of(&mut answer);
    let number = |name: &str| figures[name].as_f64().unwrap_or_else(|| panic!("{name}"));
    for name in ["ts", "cpu_count", "mem_total", "mem_used", "mem_total_mib", "disk_total"] {
        assert!(number(name) > 0.0, "{name}: {figures}");
    }
    assert!((0.0..=100.0).contains(&number("cpu_used_pct")));
    assert!(number("disk_used") <= number("disk_total"));
    assert!(number("mem_cache") <= number("mem_total"));
    assert!((number("mem_total_mib") - number("mem_total") / 1_048_576.0).abs() < 1.0);
    let envs = json_of(&mut ask(&agent, "GET /envs", &[], b""));
    assert_eq!(envs["OF_THE_SANDBOX"], "1");
    assert_eq!(envs["E2B_SANDBOX"], "true");
}
