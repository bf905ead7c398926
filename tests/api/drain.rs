//! SIGTERM: what runs may end, what is new is refused, and it does not take for ever.

use std::time::{Duration, Instant};

use crate::daemon::Daemon;
use crate::upstream::{Upstream, gate};

#[test]
fn a_request_in_flight_is_answered_before_the_daemon_goes() {
    let mut daemon = Daemon::start();
    let id = daemon.create();
    let (open, opened) = gate();
    let server = Upstream::start(move |mut served| {
        served.head();
        served.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n");
        opened.recv().expect("the gate");
        served.send("4\r\nlast\r\n0\r\n\r\n");
        served.until_gone();
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    client.send("\r\n");
    assert_eq!(client.head().0, 200);
    assert_eq!(client.chunk().as_deref(), Some(b"first".as_slice()));
    let mut idle = daemon.connect();
    idle.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n");
    assert_eq!(idle.reply().status, 200);
    daemon.signal("TERM");
    assert!(idle.rest().is_empty(), "an idle connection closes at once");
    open();
    assert_eq!(client.chunk().as_deref(), Some(b"last".as_slice()));
    assert_eq!(client.chunk(), None);
    server.join();
    assert!(daemon.wait().success());
}

#[test]
fn draining_is_bounded() {
    let mut daemon = Daemon::start_with(&["--drain", "1"]);
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        served.head();
        served.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n");
        served.until_gone();
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    client.send("\r\n");
    client.head();
    client.chunk();
    let began = Instant::now();
    daemon.signal("TERM");
    assert!(daemon.wait().success());
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    server.join();
}
