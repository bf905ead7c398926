//! Profiles of the daemon while it is at work: they come, one at a time, and break nothing.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use serde_json::json;

use crate::daemon::Daemon;
use crate::template::TEMPLATE;

/// Threads that ask, each on a connection that stays.
const CLIENTS: usize = 4;

/// What the daemon did while `work` ran: every request must have been answered as always.
fn under_load<T>(daemon: &Daemon, work: impl FnOnce() -> T) -> (T, u32) {
    let (done, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let request = format!(
        "GET /v2/sandboxes?limit=1 HTTP/1.1\r\nhost: localhost\r\nx-api-key: {}\r\n\r\n",
        daemon.key()
    );
    let client = |_| {
        let (done, answered) = (Arc::clone(&done), Arc::clone(&answered));
        let (mut connection, request) = (daemon.connect(), request.clone());
        thread::spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let reply = connection.send(&request).reply();
                assert_eq!(reply.status, 200, "{reply:?}");
                answered.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let clients: Vec<_> = (0..CLIENTS).map(client).collect();
    let result = work();
    done.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().expect("every answer was right");
    }
    (result, answered.load(Ordering::Relaxed))
}

#[test]
fn a_profile_is_taken_under_load_and_names_what_ran() {
    let daemon = Daemon::start();
    let kept = daemon.create();
    let ((profile, second, made), answered) = under_load(&daemon, || {
        let first = daemon.begin("GET", "/debug/pprof/profile?seconds=10", None);
        // What blocks in the kernel meanwhile is interrupted by the samples, too.
        let body = json!({ "templateID": TEMPLATE, "timeout": 300 });
        // By the time that this one is made, the profile is being taken.
        daemon.create();
        let second = daemon.ask("GET", "/debug/flamegraph?seconds=1", None);
        let mut made = 0;
        while !first.is_finished() {
            let reply = daemon.ask("POST", "/v2/sandboxes", Some(&body));
            assert_eq!(reply.status, 201, "{reply:?}");
            let id = reply.json()["sandboxID"].as_str().expect("an id").to_owned();
            daemon.snapshot(&id);
            assert_eq!(daemon.delete(&id).status, 204);
            made += 1;
        }
        (first.join().expect("a reply"), second, made)
    });
    assert!(made > 0 && answered > 0);
    assert_eq!(second.status, 409, "while the first is taken");
    assert!(second.error(409).contains("a profile"));
    assert_eq!(profile.status, 200, "{profile:?}");
    let mut decoded = Vec::new();
    flate2::read::GzDecoder::new(&profile.body[..]).read_to_end(&mut decoded).expect("gzip");
    let text = String::from_utf8_lossy(&decoded);
    assert!(text.contains("mica_http::"), "the names of functions are in it");
    assert_eq!(daemon.state(&kept), "running");
    daemon.healthy();
}

#[test]
fn a_flame_graph_is_a_picture_and_a_profile_has_its_bounds() {
    let daemon = Daemon::start();
    let (picture, _) =
        under_load(&daemon, || daemon.ask("GET", "/debug/flamegraph?seconds=2", None));
    assert_eq!((picture.status, &*picture.headers["content-type"]), (200, "image/svg+xml"));
    let text = String::from_utf8_lossy(&picture.body);
    assert!(text.contains("<svg") && text.contains("mica"), "{}", &text[..text.len().min(500)]);
    for bad in ["seconds=0", "seconds=61", "seconds=x"] {
        let said = daemon.ask("GET", &format!("/debug/pprof/profile?{bad}"), None).error(400);
        assert!(said.contains("`seconds`"), "{said}");
    }
}
