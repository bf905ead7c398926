//! SIGTERM: what runs may end, what is new is refused, and it does not take for ever.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::daemon::{Daemon, eventually, patiently};
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

#[test]
fn paused_sandboxes_wait_for_the_next_daemon_and_running_ones_if_told() {
    for (options, runs_on) in [(&[][..], false), (&["--keep-sandboxes"][..], true)] {
        let mut daemon = Daemon::start_with(options);
        let (running, paused) = (daemon.create(), daemon.create());
        daemon.pause(&paused);
        let process = daemon.vm_of(&running);
        daemon.signal("TERM");
        assert!(daemon.wait().success());
        let left = daemon.vm_processes();
        assert_eq!(left.contains(&process), runs_on, "{options:?}: {left:?}");
        daemon.restart();
        assert_eq!(daemon.get(&running).status, if runs_on { 200 } else { 404 }, "{options:?}");
        if runs_on {
            assert_eq!(daemon.vm_of(&running), process, "it was not touched");
            daemon.snapshot(&running);
            assert_eq!(daemon.delete(&running).status, 204);
        }
        assert_eq!(daemon.state(&paused), "paused", "{options:?}");
        let resume = || daemon.act_with(&paused, "resume", &json!({ "timeout": 60 }));
        // The daemon may still be taking it over.
        let reply = patiently(resume);
        assert_eq!(reply.status, 201, "{options:?}: {reply:?}");
        assert_eq!(daemon.delete(&paused).status, 204);
        eventually("nothing of them is left", || daemon.holdings()[1..] == [0, 0, 0]);
    }
}
