//! The gateway of the real agent: preambles, verdicts, identity, access, and other ports.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener};

use mica_wire::guest::{ENVD_VERSION, Verdict};

use crate::required;
use crate::support::{Agent, TOKEN};

#[test]
fn nothing_but_control_before_the_identity() {
    let agent = Agent::start_bare();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for port in [49983, 49999, listener.local_addr().unwrap().port()] {
        assert_eq!(agent.port(port).1, Some(Verdict::Refused), "{port}");
    }
    let reply = agent.init("first");
    assert_eq!((reply.envd_version.as_str(), reply.error), (ENVD_VERSION, None));
    assert_eq!(agent.init("first").error, None);
    assert_eq!(agent.port(49983).1, Some(Verdict::Open));
}

#[test]
fn a_preamble_out_of_form_is_told_so() {
    let agent = Agent::start();
    for bad in [b"GET / HT", b"MICA\x09\x01\x3f\xc3", b"MICA\x01\x01\0\0"] {
        let (mut stream, verdict) = agent.gateway(bad);
        assert_eq!(verdict, Some(Verdict::BadPreamble));
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn other_ports_are_carried_with_half_close() {
    let agent = Agent::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut sent = Vec::new();
        stream.read_to_end(&mut sent).unwrap();
        stream.write_all(&sent.repeat(2)).unwrap();
        sent.len()
    });
    let (mut stream, verdict) = agent.port(port);
    assert_eq!(verdict, Some(Verdict::Open));
    let sent: Vec<u8> = (0..=u8::MAX).cycle().take(1_000_000).collect();
    stream.write_all(&sent).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    assert_eq!(server.join().unwrap(), sent.len());
    assert_eq!(back, sent.repeat(2));
    // The listener is gone with its thread.
    assert_eq!(agent.port(port).1, Some(Verdict::Refused));
}

#[test]
fn a_server_on_the_other_family_is_reached_too() {
    let Ok(listener) = TcpListener::bind("[::1]:0") else {
        return required::skip("IPV6", "this machine has no IPv6 loopback");
    };
    let agent = Agent::start();
    assert_eq!(agent.port(listener.local_addr().unwrap().port()).1, Some(Verdict::Open));
}

#[test]
fn the_token_opens_what_is_closed() {
    let agent = Agent::start();
    let mut health = agent.request("GET /health HTTP/1.1", b"");
    assert_eq!((health.status, health.body().len()), (204, 0));
    assert_eq!(health.header("access-control-allow-origin"), Some("*"));
    let unauthorised = r#"{"code":401,"message":"unauthorized access, please provide a valid access token or method signing if supported"}"#;
    let list = "POST /process.Process/List HTTP/1.1\r\ncontent-type: application/json";
    for head in ["GET /envs HTTP/1.1", list, "GET /metrics HTTP/1.1\r\nx-access-token: wrong"] {
        let mut answer = agent.request(head, b"{}");
        assert_eq!(answer.status, 401, "{head}");
        assert_eq!(String::from_utf8(answer.body()).unwrap(), unauthorised);
    }
    let authorised = |path: &str| {
        let mut answer =
            agent.request(&format!("GET {path} HTTP/1.1\r\nx-access-token: {TOKEN}"), b"");
        assert_eq!(answer.status, 200, "{path}");
        serde_json::from_slice::<serde_json::Value>(&answer.body()).unwrap()
    };
    assert_eq!(authorised("/envs")["OF_THE_SANDBOX"], "1");
    assert!(authorised("/metrics")["mem_total"].as_u64().unwrap() > 0);
}

#[test]
fn paths_and_methods_that_are_not_there() {
    let agent = Agent::start();
    for (head, status, text) in [
        ("GET /nothing HTTP/1.1", 404, r#"{"code":404,"message":"there is nothing at /nothing"}"#),
        (
            "DELETE /health HTTP/1.1",
            405,
            r#"{"code":405,"message":"/health does not take the method DELETE"}"#,
        ),
        ("POST /init HTTP/1.1", 404, r#"{"code":404,"message":"there is nothing at /init"}"#),
    ] {
        let mut answer = agent.request(head, b"");
        assert_eq!(answer.status, status, "{head}");
        assert_eq!(String::from_utf8(answer.body()).unwrap(), text);
    }
    let preflight = "OPTIONS /process.Process/Start HTTP/1.1\r\n\
                     access-control-request-headers: x-access-token";
    let answer = agent.request(preflight, b"");
    assert_eq!(answer.status, 204);
    assert_eq!(answer.header("access-control-allow-headers"), Some("x-access-token"));
}
