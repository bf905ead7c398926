//! What the proxy answers when the sandbox does not, in the words that SDKs look for.

use crate::daemon::{Daemon, NO_POOL, eventually, kill};
use crate::upstream::Upstream;

#[test]
fn a_closed_port_and_a_missing_sandbox_are_told_apart() {
    let daemon = Daemon::start();
    let id = daemon.create();
    // Nothing listens on port 1 here, and nobody will start to.
    let reply = daemon.to_sandbox(&id, 1, "GET /").send("\r\n").reply();
    assert_eq!(
        String::from_utf8_lossy(&reply.body),
        format!(
            "{{\"sandboxId\":\"{id}\",\"message\":\"The sandbox is running but port is not \
             open\",\"port\":1,\"code\":502}}"
        )
    );
    assert_eq!((reply.status, reply.headers["should-retry"].as_str()), (502, "false"));
    assert_eq!(reply.headers["content-type"], "application/json; charset=utf-8");

    for (unknown, port) in [("i00000000000000000000", 49983), ("nonexistingsandbox", 49999)] {
        let reply = daemon.to_sandbox(unknown, port, "GET /health").send("\r\n").reply();
        assert_eq!(
            String::from_utf8_lossy(&reply.body),
            format!(
                "{{\"sandboxId\":\"{unknown}\",\"message\":\"The sandbox was not found\",\
                 \"code\":502}}"
            )
        );
    }
}

#[test]
fn a_browser_is_shown_a_page_and_a_program_what_it_matches() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let path = format!("/sandbox/{id}/1/");
    let ask = |target: &str, host: &str, accept: &str| {
        let head = format!("GET {target} HTTP/1.1\r\nhost: {host}\r\naccept: {accept}\r\n\r\n");
        daemon.connect().send(head).reply()
    };
    let own = format!("1-{id}.any.example");
    for (target, host) in [("/", own.as_str()), (path.as_str(), "localhost")] {
        let page = ask(target, host, "text/html,application/xhtml+xml,*/*;q=0.8");
        assert_eq!((page.status, page.headers["should-retry"].as_str()), (502, "false"));
        assert_eq!(page.headers["content-type"], "text/html; charset=utf-8");
        let text = String::from_utf8_lossy(&page.body).into_owned();
        assert!(text.starts_with("<!doctype html>"), "{text}");
        assert!(text.contains("port is not open") && text.contains(&id), "{text}");
        for accept in ["*/*", "application/json", "application/json, text/html"] {
            let reply = ask(target, host, accept);
            assert!(reply.error(502).contains("port is not open"), "{accept}");
            assert_eq!(reply.headers["content-type"], "application/json; charset=utf-8");
        }
    }
    let control = ask("/sandboxes", "localhost", "text/html");
    assert!(control.error(401).contains("API key"), "the control plane has no pages");
}

#[test]
fn a_stopped_vm_process_holds_up_nobody_else_and_dies_when_told() {
    let daemon = Daemon::start_with(&NO_POOL);
    let id = daemon.create();
    kill("STOP", daemon.vm_of(&id));
    let other = daemon.create();
    let mut waits = daemon.connect();
    assert_eq!(waits.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n").reply().status, 200);
    let before = daemon.settled(None)[0];
    waits.send(format!(
        "GET /health HTTP/1.1\r\nhost: x\r\ne2b-sandbox-id: {id}\r\ne2b-sandbox-port: 49983\r\n\r\n"
    ));
    eventually("a stream waits for the stopped process", || daemon.holdings()[0] > before);
    let listed = daemon.ask("GET", "/sandboxes", None);
    assert_eq!(listed.json().as_array().expect("a list").len(), 2);
    daemon.to_sandbox(&other, 1, "GET /").send("\r\n").reply().error(502);
    assert_eq!(daemon.ask("DELETE", &format!("/sandboxes/{id}"), None).status, 204);
    assert_eq!(waits.reply().error(502), "The sandbox was not found");
    assert_eq!(daemon.vm_processes().len(), 1, "the other runs on");
}

#[test]
fn requests_for_a_sandbox_out_of_form() {
    let daemon = Daemon::start();
    let id = daemon.create();
    for (headers, hint) in [
        (format!("e2b-sandbox-id: {id}\r\n"), "missing header"),
        ("e2b-sandbox-port: 80\r\n".to_owned(), "missing header"),
        (format!("e2b-sandbox-id: {id}\r\ne2b-sandbox-port: 0\r\n"), "Invalid sandbox port"),
        (format!("e2b-sandbox-id: {id}\r\ne2b-sandbox-port: 70000\r\n"), "Invalid sandbox port"),
        ("e2b-sandbox-id: ../x\r\ne2b-sandbox-port: 80\r\n".to_owned(), "Invalid sandbox ID"),
    ] {
        let request = format!("GET / HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n");
        let message = daemon.connect().send(request).reply().error(400);
        assert!(message.contains(hint), "{headers:?}: {message}");
    }
}

#[test]
fn routes_between_host_and_agent_are_closed() {
    let daemon = Daemon::start();
    let id = daemon.create();
    for path in ["/init", "/freeze", "//unfreeze", "/%69nit", "/x/../fsthaw", "/upgrade/"] {
        let mut client = daemon.to_sandbox(&id, 49983, &format!("POST {path}"));
        client.send("content-length: 0\r\n\r\n").reply().error(404);
    }
    // On any other port the same path is the sandbox's own business.
    let server = Upstream::start(|mut served| {
        served.head();
        served.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
    });
    let mut client = daemon.to_sandbox(&id, server.port, "POST /init");
    assert_eq!(client.send("content-length: 0\r\n\r\n").reply().status, 200);
    server.join();
}

#[test]
fn a_server_that_answers_nothing_or_nonsense_is_a_502() {
    let daemon = Daemon::start();
    let id = daemon.create();
    for answer in ["", "HTTP/1.1 ", "what?\r\n\r\n", "HTTP/1.1 200 OK\r\nno colon\r\n\r\n"] {
        let server = Upstream::start(move |mut served| {
            served.head();
            served.send(answer);
        });
        let mut client = daemon.to_sandbox(&id, server.port, "GET /");
        let message = client.send("\r\n").reply().error(502);
        assert!(message.contains("closed the connection before it answered"), "{message}");
        server.join();
    }
    let server = Upstream::start(|mut served| {
        served.head();
        let head = format!("HTTP/1.1 200 OK\r\nlong: {}\r\n\r\n", "x".repeat(1 << 20));
        // The proxy may hang up in the middle of this.
        drop(served.try_send(head));
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    client.send("\r\n").reply().error(502);
    server.join();
    daemon.healthy();
}
