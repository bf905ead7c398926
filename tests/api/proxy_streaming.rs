//! The proxy passes both bodies on as they come, and both ends' disappearance at once.

use std::thread;
use std::time::{Duration, Instant};

use crate::daemon::Daemon;
use crate::upstream::{Upstream, gate};

const CHUNKED: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

#[test]
fn both_bodies_stream_without_waiting_for_one_another() {
    let daemon = Daemon::start();
    let id = daemon.create();
    // A server that answers each line as it comes: a proxy that holds anything back hangs here.
    let server = Upstream::start(|mut served| {
        served.head();
        served.until("one");
        served.send(CHUNKED).send("5\r\nfirst\r\n");
        served.until("two");
        served.send("6\r\nsecond\r\n");
        served.until("0\r\n\r\n");
        served.send("0\r\n\r\n");
    });
    let mut client = daemon.to_sandbox(&id, server.port, "POST /stream");
    client.send("transfer-encoding: chunked\r\n\r\n3\r\none\r\n");
    assert_eq!(client.head().0, 200);
    assert_eq!(client.chunk().as_deref(), Some(b"first".as_slice()));
    client.send("3\r\ntwo\r\n");
    assert_eq!(client.chunk().as_deref(), Some(b"second".as_slice()));
    client.send("0\r\n\r\n");
    assert_eq!(client.chunk(), None);
    server.join();
}

#[test]
fn a_client_that_goes_while_it_waits_takes_its_upstream_along() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let (arrived, wait) = gate();
    let server = Upstream::start(|mut served| {
        served.head();
        arrived();
        let began = Instant::now();
        served.until_gone();
        began.elapsed()
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    client.send("\r\n");
    wait.recv().expect("the request");
    drop(client);
    assert!(server.join() < Duration::from_secs(2), "it was noticed late");
}

#[test]
fn a_client_that_goes_in_mid_stream_takes_its_upstream_along() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let (left, gone) = gate();
    let server = Upstream::start(move |mut served| {
        served.head();
        served.send(CHUNKED).send("5\r\nfirst\r\n");
        gone.recv().expect("the client");
        let began = Instant::now();
        served.until_gone();
        began.elapsed()
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    client.send("\r\n");
    client.head();
    client.chunk();
    drop(client);
    left();
    assert!(server.join() < Duration::from_secs(2), "it was noticed late");
}

#[test]
fn a_client_that_goes_in_mid_upload_takes_its_upstream_along() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let (arrived, wait) = gate();
    let server = Upstream::start(|mut served| {
        served.head();
        served.exactly(5);
        arrived();
        served.until_gone();
    });
    let mut client = daemon.to_sandbox(&id, server.port, "PUT /");
    client.send("content-length: 100\r\n\r\nhello");
    wait.recv().expect("the first bytes");
    drop(client);
    server.join();
    daemon.healthy();
}

#[test]
fn a_server_that_goes_in_mid_stream_ends_the_client_short() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        served.head();
        served.send(CHUNKED).send("5\r\nfirst\r\n");
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    client.send("\r\n");
    client.head();
    assert_eq!(client.chunk().as_deref(), Some(b"first".as_slice()));
    server.join();
    // No last chunk: the client can tell a cut stream from a finished one.
    assert!(client.rest().is_empty());
}

#[test]
fn killing_the_sandbox_cuts_its_streams_and_the_next_request_says_why() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        served.head();
        served.send(CHUNKED).send("5\r\nfirst\r\n");
        served.until_gone();
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    client.send("\r\n");
    client.head();
    client.chunk();
    assert_eq!(daemon.ask("DELETE", &format!("/sandboxes/{id}"), None).status, 204);
    assert!(client.rest().is_empty());
    server.join();
    let mut next = daemon.to_sandbox(&id, 49983, "GET /health");
    let message = next.send("\r\n").reply().error(502);
    assert_eq!(message, "The sandbox was not found");
}

#[test]
fn a_large_body_comes_back_whole() {
    const BYTES: usize = 16 << 20;
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        served.head();
        let body = served.exactly(BYTES);
        served.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {BYTES}\r\n\r\n")).send(body);
        served.until_gone();
    });
    // A byte pattern with a period that no buffer size shares.
    let body: Vec<u8> = (0..BYTES).map(|n| u8::try_from(n % 251).expect("below 256")).collect();
    let mut client = daemon.to_sandbox(&id, server.port, "POST /");
    client.send(format!("content-length: {BYTES}\r\n\r\n")).send(&body);
    let reply = client.reply();
    assert_eq!(reply.status, 200);
    assert!(reply.body == body, "16 MiB came back changed");
    drop(client);
    server.join();
}

/// Longer than a connection has to be silent to be taken from hyper.
const SILENCE: Duration = Duration::from_millis(2500);

#[test]
fn an_answer_goes_on_after_a_long_silence_and_so_does_its_connection() {
    let daemon = Daemon::start();
    let id = daemon.create();
    for (head, pieces) in [
        (CHUNKED, ["5\r\nfirst\r\n", "6\r\nsecond\r\n", "2\r\n..\r\n0\r\n\r\n"]),
        ("HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n", ["first", "second", ".."]),
        ("HTTP/1.1 200 OK\r\n\r\n", ["first", "second", ".."]),
    ] {
        let server = Upstream::start(move |mut served| {
            served.head();
            served.send(head).send(pieces[0]);
            thread::sleep(SILENCE);
            served.send(pieces[1]);
            thread::sleep(Duration::from_millis(100));
            served.send(pieces[2]);
        });
        let mut client = daemon.to_sandbox(&id, server.port, "GET /");
        // The next request is there before the answer to this one is.
        client.send("\r\nGET /health HTTP/1.1\r\nhost: x\r\n\r\n");
        let reply = client.reply();
        assert_eq!(String::from_utf8_lossy(&reply.body), "firstsecond..", "{head:?}");
        assert_eq!(client.reply().status, 200, "the next answer begins where this one ends");
        server.join();
        // And one that comes after a rest.
        thread::sleep(SILENCE);
        assert_eq!(client.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n").reply().status, 200);
    }
}

#[test]
fn an_end_that_goes_in_a_long_silence_takes_the_other_along() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let (left, gone) = gate();
    let server = Upstream::start(move |mut served| {
        served.head();
        served.send(CHUNKED).send("5\r\nfirst\r\n");
        gone.recv().expect("the client");
        let began = Instant::now();
        served.until_gone();
        began.elapsed()
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    client.send("\r\n");
    client.head();
    client.chunk();
    thread::sleep(SILENCE);
    drop(client);
    left();
    assert!(server.join() < Duration::from_secs(2), "it was noticed late");

    let server = Upstream::start(|mut served| {
        served.head();
        served.send(CHUNKED).send("5\r\nfirst\r\n");
        thread::sleep(SILENCE);
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    client.send("\r\n");
    client.head();
    client.chunk();
    server.join();
    assert!(client.rest().is_empty(), "no last chunk: it was cut");
}
