//! Ports that are not public take the sandbox's traffic token, and servers see the host they are to see.

use serde_json::{Value, json};

use crate::client::Reply;
use crate::daemon::Daemon;
use crate::template::TEMPLATE;
use crate::upstream::Upstream;

const EMPTY: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

fn create(daemon: &Daemon, network: &Value) -> (String, Option<String>) {
    let body = json!({ "templateID": TEMPLATE, "timeout": 300, "network": network });
    let reply = daemon.ask("POST", "/v2/sandboxes", Some(&body));
    assert_eq!(reply.status, 201, "{reply:?}");
    let json = reply.json();
    let text = |name: &str| json[name].as_str().map(str::to_owned);
    (text("sandboxID").expect("an id"), text("trafficAccessToken"))
}

/// What the proxy says about a sandbox itself.
fn refused(reply: &Reply, id: &str, why: &str) {
    assert_eq!(reply.status, 403, "{reply:?}");
    assert_eq!(
        String::from_utf8_lossy(&reply.body),
        format!(
            "{{\"sandboxId\":\"{id}\",\"message\":\"Sandbox is secured with traffic access token. \
             {why}\",\"code\":403}}"
        )
    );
}

const MISSING: &str = "Token header 'e2b-traffic-access-token' is missing";
const INVALID: &str = "Provided token is invalid.";

#[test]
fn a_token_opens_the_ports_and_goes_no_further() {
    let daemon = Daemon::start();
    let (id, token) = create(&daemon, &json!({ "allowPublicTraffic": false }));
    let token = token.expect("a token");
    let (_, of_another) = create(&daemon, &json!({ "allowPublicTraffic": false }));
    let of_another = of_another.expect("a token");
    // Nothing listens on port 1: whoever gets that far is told so.
    let ask = |port: u16, headers: &str| {
        daemon.to_sandbox(&id, port, "GET /").send(format!("{headers}\r\n")).reply()
    };
    refused(&ask(1, ""), &id, MISSING);
    refused(&ask(49999, ""), &id, MISSING);
    refused(&ask(1, "e2b-traffic-access-token: \r\n"), &id, MISSING);
    for wrong in [&of_another, &token[1..], &token.to_uppercase(), "\u{e9}"] {
        refused(&ask(1, &format!("e2b-traffic-access-token: {wrong}\r\n")), &id, INVALID);
    }
    refused(&ask(1, "connection: upgrade\r\nupgrade: websocket\r\n"), &id, MISSING);
    let by_path = format!("GET /sandbox/{id}/1/ HTTP/1.1\r\nhost: x\r\n\r\n");
    refused(&daemon.connect().send(by_path).reply(), &id, MISSING);
    // envd has a token of its own.
    assert!(ask(49983, "").error(502).contains("port is not open"));

    for name in ["e2b-traffic-access-token", "cube-traffic-access-token"] {
        let server = Upstream::start(|mut served| {
            let head = served.head();
            served.send(EMPTY);
            head
        });
        let reply = ask(server.port, &format!("{name}: {token}\r\nx-other: 1\r\n"));
        assert_eq!(reply.status, 200, "{name}");
        let head = server.join();
        assert!(head.contains(&"x-other: 1".to_owned()), "{head:?}");
        let leaked = head.iter().find(|line| line.contains("traffic") || line.contains(&token));
        assert_eq!(leaked, None, "a server in the sandbox sees it");
    }

    let public = json!({ "allowPublicTraffic": true });
    let path = format!("/sandboxes/{id}/network");
    assert_eq!(daemon.ask("PUT", &path, Some(&public)).status, 204);
    assert!(ask(1, "").error(502).contains("port is not open"), "the next request is let in");
}

#[test]
fn a_public_sandbox_has_no_token_and_passes_none_on() {
    let daemon = Daemon::start();
    let (id, token) = create(&daemon, &json!({}));
    assert_eq!(token, None);
    let server = Upstream::start(|mut served| {
        let head = served.head();
        served.send(EMPTY);
        head
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    assert_eq!(client.send("e2b-traffic-access-token: any\r\n\r\n").reply().status, 200);
    assert!(!server.join().iter().any(|line| line.contains("traffic")));
}

#[test]
fn servers_see_the_host_that_they_are_to_see() {
    let daemon = Daemon::start();
    let (id, _) = create(&daemon, &json!({ "maskRequestHost": "app.internal:${PORT}" }));
    for upgrade in ["", "connection: upgrade\r\nupgrade: websocket\r\n"] {
        let server = Upstream::start(|mut served| {
            let head = served.head();
            served.send(EMPTY);
            head
        });
        let port = server.port;
        let host = format!("{port}-{id}.any.example:99");
        let request = format!("GET / HTTP/1.1\r\nhost: {host}\r\n{upgrade}\r\n");
        assert_eq!(daemon.connect().send(request).reply().status, 200);
        let head = server.join();
        let hosts: Vec<_> = head.iter().filter(|line| line.starts_with("host:")).collect();
        assert_eq!(hosts, [&format!("host: app.internal:{port}")]);
    }
}
