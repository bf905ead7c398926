//! WebSockets and other upgrades: HTTP ends on both sides at once, and bytes go on.

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use crate::client::Connection;
use crate::daemon::Daemon;
use crate::upstream::{Served, Upstream, gate};

const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\n\
                      upgrade: websocket\r\nsec-websocket-accept: yes\r\n\r\n";
const EMPTY: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
const ASK: &str = "connection: keep-alive, Upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-key: k\r\n\r\n";

fn has(head: &[String], line: &str) -> bool {
    head.iter().any(|given| given == line)
}

/// A switched connection to a server that goes on with `handle`.
fn switched<T: Send + 'static>(
    daemon: &Daemon,
    id: &str,
    handle: impl FnOnce(Served) -> T + Send + 'static,
) -> (Connection, Upstream<T>) {
    let server = Upstream::start(|mut served| {
        served.head();
        served.send(SWITCH);
        handle(served)
    });
    let mut client = daemon.to_sandbox(id, server.port, "GET /socket");
    client.send(ASK);
    assert_eq!(client.head().0, 101);
    (client, server)
}

fn read(client: &mut Connection, wanted: &[u8]) {
    let mut got = vec![0; wanted.len()];
    client.exactly(&mut got);
    assert_eq!(got, wanted);
}

#[test]
fn a_websocket_is_passed_through() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        let head = served.head();
        // What comes right behind the switch belongs to what follows it.
        served.send([SWITCH.as_bytes(), b"\x81\x05early"].concat());
        assert_eq!(served.exactly(7), b"\x81\x05first");
        served.send(b"\x81\x03one");
        assert_eq!(served.exactly(8), b"\x00binary\xff");
        served.send(b"\x88\x00");
        served.finish();
        served.until_gone();
        head
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /socket?x=1");
    // Also of the client what comes right behind the request.
    client.send([ASK.as_bytes(), b"\x81\x05first"].concat());
    let (status, headers) = client.head();
    assert_eq!((status, headers["connection"].as_str()), (101, "upgrade"));
    assert_eq!(
        (headers["upgrade"].as_str(), headers["sec-websocket-accept"].as_str()),
        ("websocket", "yes")
    );
    read(&mut client, b"\x81\x05early");
    read(&mut client, b"\x81\x03one");
    client.send(b"\x00binary\xff");
    assert_eq!(client.rest(), b"\x88\x00");
    drop(client);
    let head = server.join();
    assert_eq!(head[0], "get /socket?x=1 http/1.1");
    for line in ["connection: upgrade", "upgrade: websocket", "sec-websocket-key: k"] {
        assert!(has(&head, line), "{line} in {head:?}");
    }
}

#[test]
fn each_direction_closes_alone() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let (mut client, server) = switched(&daemon, &id, |mut served| {
        let mut sent = Vec::new();
        while let part @ [_, ..] = served.some().as_slice() {
            sent.extend_from_slice(part);
        }
        served.send(sent.repeat(2));
        sent.len()
    });
    client.send(vec![b'x'; 100_000]);
    client.stream().shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(client.rest().len(), 200_000);
    assert_eq!(server.join(), 100_000);
}

#[test]
fn an_end_that_goes_takes_the_other_along_at_once() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let (left, gone) = gate();
    let (client, server) = switched(&daemon, &id, move |mut served| {
        gone.recv().expect("the client");
        let began = Instant::now();
        served.until_gone();
        began.elapsed()
    });
    drop(client);
    left();
    assert!(server.join() < Duration::from_secs(2), "it was noticed late");

    let (mut client, server) = switched(&daemon, &id, drop);
    assert!(client.rest().is_empty());
    server.join();

    let (mut client, server) = switched(&daemon, &id, |mut served| served.until_gone());
    assert_eq!(daemon.delete(&id).status, 204);
    assert!(client.rest().is_empty());
    server.join();
    daemon.healthy();
}

#[test]
fn a_side_that_does_not_read_holds_the_other_back() {
    const BOUND: usize = 64 << 20;
    let daemon = Daemon::start();
    let id = daemon.create();
    let (open, opened) = gate();
    let (mut client, server) = switched(&daemon, &id, move |mut served| {
        opened.recv().expect("the gate");
        let mut count = 0;
        while let part @ [_, ..] = served.some().as_slice() {
            count += part.len();
        }
        count
    });
    let mut stream = client.stream();
    stream.set_write_timeout(Some(Duration::from_millis(500))).expect("a timeout");
    let piece = [7; 64 * 1024];
    let mut sent = 0;
    let stuck = loop {
        match stream.write(&piece) {
            Ok(count) => sent += count,
            Err(error) => break error.kind(),
        }
        assert!(sent < BOUND, "somebody takes everything");
    };
    assert!(matches!(stuck, ErrorKind::WouldBlock | ErrorKind::TimedOut), "{stuck:?}");
    open();
    client.stream().shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(server.join(), sent, "all of it arrives, once it is read");
    assert!(client.rest().is_empty());
}

#[test]
fn a_server_may_refuse_to_switch() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        served.head();
        served.send(EMPTY);
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    assert_eq!(client.send(ASK).reply().status, 200);
    client.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n");
    assert_eq!(client.reply().status, 200, "it is still HTTP");
    server.join();
}

#[test]
fn what_may_not_leave_http_goes_on_as_a_plain_request() {
    let daemon = Daemon::start();
    let id = daemon.create();
    for (line, rest) in [
        // Requests inside would pass unseen.
        (
            "GET /",
            "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: x\r\n\r\n",
        ),
        ("GET /", "connection: upgrade\r\nupgrade: websocket, h2c\r\n\r\n"),
        ("GET /", "connection: upgrade\r\nupgrade: websocket\r\nupgrade: tcp\r\n\r\n"),
        // Only named as a header of this hop, or only there.
        ("GET /", "upgrade: websocket\r\n\r\n"),
        ("GET /", "connection: upgrade\r\n\r\n"),
        // A body: where it ends and the new protocol begins, two servers may see differently.
        ("POST /", "connection: upgrade\r\nupgrade: websocket\r\ncontent-length: 5\r\n\r\nhello"),
        (
            "POST /",
            "connection: upgrade\r\nupgrade: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
    ] {
        let server = Upstream::start(|mut served| {
            let head = served.head();
            served.send(EMPTY);
            head
        });
        let mut client = daemon.to_sandbox(&id, server.port, line);
        assert_eq!(client.send(rest).reply().status, 200, "{rest:?}");
        let head = server.join();
        let hop = ["upgrade", "connection", "http2-settings"];
        let left = head.iter().find(|l| hop.iter().any(|name| l.starts_with(&format!("{name}:"))));
        assert_eq!(left, None, "{rest:?}");
    }
    // The routes of the agent stay guarded.
    let mut client = daemon.to_sandbox(&id, 49983, "GET /init");
    client.send(ASK).reply().error(404);
}

#[test]
fn a_switch_that_nobody_asked_for_is_a_502() {
    let daemon = Daemon::start();
    let id = daemon.create();
    for rest in ["\r\n", "connection: upgrade\r\nupgrade: h2c\r\n\r\n"] {
        let server = Upstream::start(|mut served| {
            served.head();
            served.send(SWITCH);
            served.until_gone();
        });
        let mut client = daemon.to_sandbox(&id, server.port, "POST /");
        let message = client.send(rest).reply().error(502);
        assert!(message.contains("closed the connection"), "{message}");
        client.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n");
        assert_eq!(client.reply().status, 200, "it is still HTTP");
        server.join();
    }
}

#[test]
fn a_daemon_that_stops_does_not_wait_for_them() {
    let mut daemon = Daemon::start_with(&["--drain", "20"]);
    let id = daemon.create();
    let (mut client, server) = switched(&daemon, &id, |mut served| served.until_gone());
    let began = Instant::now();
    daemon.signal("TERM");
    assert!(client.rest().is_empty());
    drop(client);
    assert!(daemon.wait().success());
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    server.join();
}

#[test]
fn nothing_is_left_of_many() {
    let daemon = Daemon::start_with(&crate::daemon::NO_POOL);
    let id = daemon.create();
    let before = daemon.settled(None);
    let open: Vec<_> =
        (0..20).map(|_| switched(&daemon, &id, |mut served| served.until_gone())).collect();
    let servers: Vec<_> = open.into_iter().map(|(_, server)| server).collect();
    servers.into_iter().for_each(Upstream::join);
    assert_eq!(daemon.settled(Some(before)), before);
}
