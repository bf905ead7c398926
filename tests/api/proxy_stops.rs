//! The proxy over a guest that stands still, goes back in time, or is paused.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use serde_json::json;

use crate::client::{PATIENCE, Reply};
use crate::daemon::{Daemon, NO_POOL, eventually, kill, patiently};
use crate::upstream::{Upstream, gate};

const CHUNKED: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

/// A server of which a test takes the connections itself.
struct Server {
    listener: TcpListener,
    port: u16,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        Self { listener, port }
    }

    /// The next connection, and the request line on it.
    fn next(&self) -> (TcpStream, String) {
        let (stream, _) = self.listener.accept().expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut reader = BufReader::new(stream.try_clone().expect("a duplicate"));
        let mut first = String::new();
        reader.read_line(&mut first).expect("a request line");
        let mut line = String::from("x");
        while !line.trim().is_empty() {
            line.clear();
            reader.read_line(&mut line).expect("a header");
        }
        (stream, first.trim().to_owned())
    }

    /// Whether a connection came that nobody took yet.
    fn has_more(&self) -> bool {
        self.listener.set_nonblocking(true).expect("a mode");
        self.listener.accept().is_ok()
    }
}

fn rollback(daemon: &Daemon, id: &str, snapshot: &str) {
    let back = json!({ "snapshotID": snapshot });
    let reply = patiently(|| daemon.act_with(id, "rollback", &back));
    assert_eq!(reply.status, 200, "{reply:?}");
}

fn send(daemon: &Daemon, id: &str, port: u16, line: &str, rest: &str) -> thread::JoinHandle<Reply> {
    let mut client = daemon.to_sandbox(id, port, line);
    client.send(rest);
    thread::spawn(move || client.reply())
}

#[test]
fn a_request_that_may_be_repeated_survives_a_rollback() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let snapshot = daemon.snapshot(&id);
    for line in ["GET /a?b", "DELETE /a", "PUT /a", "OPTIONS /a"] {
        let server = Server::start();
        let reply = send(&daemon, &id, server.port, line, "x-mark: 1\r\ncontent-length: 0\r\n\r\n");
        let (mut first, asked) = server.next();
        rollback(&daemon, &id, &snapshot);
        assert_eq!(first.read(&mut [0; 16]).expect("the end"), 0, "the old stream is closed");
        let (mut second, again) = server.next();
        assert_eq!(again, asked);
        second.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").expect("an answer");
        let reply = reply.join().expect("a reply");
        assert_eq!((reply.status, reply.body.as_slice()), (200, b"ok".as_slice()), "{line}");
        assert!(!server.has_more());
    }
}

#[test]
fn a_request_that_may_have_had_an_effect_is_not_sent_twice() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let snapshot = daemon.snapshot(&id);
    for (line, rest) in [
        ("POST /a", "content-length: 0\r\n\r\n"),
        ("POST /a", "content-length: 5\r\n\r\nhello"),
        ("PUT /a", "content-length: 5\r\n\r\nhello"),
        ("GET /a", "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"),
    ] {
        let server = Server::start();
        let reply = send(&daemon, &id, server.port, line, rest);
        let _first = server.next();
        rollback(&daemon, &id, &snapshot);
        let reply = reply.join().expect("a reply");
        let message = reply.error(502);
        assert!(message.contains("closed the connection before it answered"), "{message}");
        assert_eq!(reply.headers["should-retry"], "false");
        assert!(!server.has_more(), "{line} came twice");
    }
}

#[test]
fn an_answer_that_has_begun_is_cut_by_a_rollback() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let snapshot = daemon.snapshot(&id);
    let server = Server::start();
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    client.send("\r\n");
    let (mut served, _) = server.next();
    served.write_all(CHUNKED.as_bytes()).expect("a head");
    served.write_all(b"5\r\nfirst\r\n").expect("a chunk");
    assert_eq!(client.head().0, 200);
    assert_eq!(client.chunk().as_deref(), Some(b"first".as_slice()));
    rollback(&daemon, &id, &snapshot);
    assert!(client.rest().is_empty(), "cut, and not ended");
    assert!(!server.has_more());
    // The next one finds the sandbox as before.
    let reply = send(&daemon, &id, server.port, "GET /", "\r\n");
    server.listener.set_nonblocking(false).expect("a mode");
    let (mut served, _) = server.next();
    served.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").expect("an answer");
    assert_eq!(reply.join().expect("a reply").status, 204);
}

#[test]
fn a_server_that_hangs_up_by_itself_gets_no_endless_repeats() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Server::start();
    let reply = send(&daemon, &id, server.port, "GET /", "\r\n");
    for _ in 0..2 {
        drop(server.next());
    }
    let message = reply.join().expect("a reply").error(502);
    assert!(message.contains("closed the connection before it answered"), "{message}");
    assert!(!server.has_more());
}

#[test]
fn streams_stay_open_over_a_snapshot_and_requests_wait_for_its_end() {
    let daemon = Daemon::start_with(&NO_POOL);
    let id = daemon.create();
    let (open, opened) = gate();
    let server = Upstream::start(move |mut served| {
        served.head();
        served.send(CHUNKED).send("5\r\nfirst\r\n");
        opened.recv().expect("the gate");
        served.send("6\r\nsecond\r\n0\r\n\r\n");
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    client.send("\r\n");
    assert_eq!(client.head().0, 200);
    assert_eq!(client.chunk().as_deref(), Some(b"first".as_slice()));

    // The guest stands still for as long as this test wants.
    let process = daemon.vm_of(&id);
    kill("STOP", process);
    let snapshot = daemon.begin("POST", &format!("/sandboxes/{id}/snapshots"), None);
    eventually("the snapshot has begun", || daemon.act(&id, "resume").error(409).contains("busy"));
    let late = Server::start();
    let before = daemon.settled(None)[0];
    let waiting = send(&daemon, &id, late.port, "GET /late", "\r\n");
    eventually("its stream is open", || daemon.holdings()[0] > before);
    open();
    kill("CONT", process);
    assert_eq!(snapshot.join().expect("a reply").status, 201);
    assert_eq!(client.chunk().as_deref(), Some(b"second".as_slice()));
    assert_eq!(client.chunk(), None);
    server.join();
    let (mut served, asked) = late.next();
    assert_eq!(asked, "GET /late HTTP/1.1");
    served.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").expect("an answer");
    assert_eq!(waiting.join().expect("a reply").status, 204);
}

#[test]
fn a_request_meets_a_pause() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let process = daemon.vm_of(&id);
    // On its way: not for long, so this one is told to come again.
    kill("STOP", process);
    let pause = daemon.begin("POST", &format!("/sandboxes/{id}/pause"), None);
    eventually("the pause has begun", || daemon.act(&id, "resume").error(409).contains("busy"));
    let reply = daemon.to_sandbox(&id, 8000, "GET /").send("\r\n").reply();
    let expected = "The sandbox is still transitioning. Try again in a moment.";
    assert_eq!(reply.error(409), expected);
    assert_eq!(reply.json()["sandboxId"], *id);
    assert_eq!(reply.headers["should-retry"], "true");
    kill("CONT", process);
    assert_eq!(pause.join().expect("a reply").status, 204);
    let reply = daemon.to_sandbox(&id, 8000, "GET /").send("\r\n").reply();
    assert_eq!(reply.error(502), "The sandbox was not found");
}

#[test]
fn a_request_that_a_pause_caught_goes_on_after_the_resume() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Server::start();
    let reply = send(&daemon, &id, server.port, "POST /slow", "content-length: 2\r\n\r\nhi");
    let (mut served, _) = server.next();
    daemon.pause(&id);
    assert_eq!(daemon.act_with(&id, "resume", &json!({ "timeout": 60 })).status, 201);
    served.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").expect("an answer");
    assert_eq!(reply.join().expect("a reply").body, b"ok");
}
