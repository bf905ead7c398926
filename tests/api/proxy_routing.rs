//! Which requests reach which sandbox: host names, headers, paths, and signatures.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::client::Reply;
use crate::daemon::Daemon;
use crate::template::TEMPLATE;
use crate::upstream::Upstream;

const EMPTY: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

#[test]
fn a_path_names_a_sandbox_and_the_sandbox_sees_the_rest() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let mut client = daemon.connect();
    for (rest, seen) in
        [("", "/"), ("/", "/"), ("/a%2fb/./c?d=/e", "/a%2fb/./c?d=/e"), ("//x", "//x")]
    {
        let server = Upstream::start(|mut served| {
            let head = served.head();
            served.send("HTTP/1.1 302 Found\r\nlocation: /next\r\ncontent-length: 0\r\n\r\n");
            head
        });
        let path = format!("/sandbox/{id}/{}{rest}", server.port);
        client.send(format!("GET {path} HTTP/1.1\r\nhost: any.example:3000\r\n\r\n"));
        let reply = client.reply();
        assert_eq!((reply.status, reply.headers["location"].as_str()), (302, "/next"));
        let head = server.join();
        assert_eq!(head[0], format!("get {seen} http/1.1"));
        assert!(head.contains(&"host: any.example:3000".to_owned()), "{head:?}");
    }
}

#[test]
fn guarded_routes_are_guarded_in_every_form() {
    let daemon = Daemon::start();
    let id = daemon.create();
    for rest in ["/init", "//init", "/x/../init", "/%69nit", "/init/", "/%2e/freeze"] {
        for (path, host) in [
            (format!("/sandbox/{id}/49983{rest}"), "localhost".to_owned()),
            (format!("/sandbox/{id}-client/49983{rest}"), "localhost".to_owned()),
            (format!("http://49983-{id}.any.example{rest}"), "localhost".to_owned()),
            (rest.to_owned(), format!("49983-{id}.any.example")),
        ] {
            let request =
                format!("POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 0\r\n\r\n");
            let reply = daemon.connect().send(request).reply();
            let message = reply.error(404);
            assert!(message.contains("not open to clients"), "{path}: {message}");
        }
    }
}

#[test]
fn paths_out_of_form_say_so() {
    let daemon = Daemon::start();
    let id = daemon.create();
    for (path, status, hint) in [
        (format!("/sandbox/{id}/0/"), 400, "Invalid sandbox port"),
        (format!("/sandbox/{id}/http/"), 400, "Invalid sandbox port"),
        ("/sandbox/../49983/".to_owned(), 400, "Invalid sandbox ID"),
        ("/sandbox/i00000000000000000000/80/".to_owned(), 502, "was not found"),
        (format!("/sandbox/{id}/1/"), 502, "port is not open"),
        (format!("/sandbox/{id}"), 404, "serves nothing"),
    ] {
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {}\r\n\r\n",
            daemon.key()
        );
        let message = daemon.connect().send(request).reply().error(status);
        assert!(message.contains(hint), "{path}: {message}");
    }
}

#[test]
fn headers_count_under_names_of_this_host_alone() {
    let daemon = Daemon::start_with(&["--domain", "sbx.test:3944"]);
    let id = daemon.create();
    for (host, status) in [
        ("localhost:1", 502),
        ("127.0.0.1", 502),
        ("[::1]:3000", 502),
        ("sandbox.sbx.test", 502),
        ("sbx.test:3944", 502),
        ("evil.example", 400),
        ("sandbox.evil.example", 400),
    ] {
        let request = format!(
            "GET / HTTP/1.1\r\nhost: {host}\r\ne2b-sandbox-id: {id}\r\ne2b-sandbox-port: 1\r\n\r\n"
        );
        let message = daemon.connect().send(request).reply().error(status);
        let hint = if status == 400 { "Invalid host" } else { "port is not open" };
        assert!(message.contains(hint), "{host}: {message}");
    }
}

#[test]
fn a_target_that_names_its_host_overrides_the_header() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        let head = served.head();
        served.send(EMPTY);
        head
    });
    let host = format!("{}-{id}.any.example:99", server.port);
    let request = format!("GET http://{host}/a HTTP/1.1\r\nhost: other.example\r\n\r\n");
    assert_eq!(daemon.connect().send(request).reply().status, 200);
    let head = server.join();
    let hosts: Vec<_> = head.iter().filter(|line| line.starts_with("host:")).collect();
    assert_eq!(hosts, [&format!("host: {host}")]);
}

fn signature(path: &str, action: &str, user: &str, token: &str) -> String {
    let hash = Sha256::digest(format!("{path}:{action}:{user}:{token}"));
    format!("v1_{}", STANDARD_NO_PAD.encode(hash)).replace('+', "%2B").replace('/', "%2F")
}

#[test]
fn a_signed_file_is_found_by_whose_token_signed_it() {
    let daemon = Daemon::start();
    let secure = || {
        let body = json!({ "templateID": TEMPLATE, "timeout": 300, "secure": true });
        let reply = daemon.ask("POST", "/v2/sandboxes", Some(&body));
        let json = reply.json();
        let text = |name: &str| json[name].as_str().expect("a text").to_owned();
        (text("sandboxID"), text("envdAccessToken"))
    };
    // Several, so that the owner is not the only one there is.
    let made: Vec<_> = (0..3).map(|_| secure()).collect();
    let get = |host: &str, signature: &str| {
        let path = format!("/files?path=/nothing-here&username=root&signature={signature}");
        daemon.connect().send(format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n")).reply()
    };
    for (id, token) in &made {
        // The stand-in has no agent behind its port, and says so in its own name.
        let reached = |reply: Reply| {
            assert!(reply.error(502).contains("port is not open"), "{reply:?}");
            reply.json()["sandboxId"].as_str().expect("an id").to_owned()
        };
        let good = signature("/nothing-here", "read", "root", token);
        assert_eq!(reached(get("localhost", &good)), *id);
        let other_action = signature("/nothing-here", "write", "root", token);
        let message = get("localhost", &other_action).error(400);
        assert!(message.contains("signature"), "{message}");
        // Under its own name the agent says what is wrong.
        assert_eq!(reached(get(&format!("49983-{id}.any.example"), &other_action)), *id);
    }
    let (id, token) = &made[0];
    assert_eq!(daemon.delete(id).status, 204);
    get("localhost", &signature("/nothing-here", "read", "root", token)).error(400);
    get("localhost", "v1_").error(400);
    get("localhost", "%zz").error(400);
}

#[test]
fn a_signed_file_wakes_the_sandbox_that_signed_it_where_that_was_wished_for() {
    let daemon = Daemon::start();
    for wakes in [true, false] {
        let body = json!({
            "templateID": TEMPLATE, "timeout": 300, "secure": true, "autoPause": true,
            "autoResume": { "enabled": wakes },
        });
        let made = daemon.ask("POST", "/v2/sandboxes", Some(&body)).json();
        let text = |name: &str| made[name].as_str().expect("a text");
        let (id, token) = (text("sandboxID"), text("envdAccessToken"));
        daemon.pause(id);
        let signature = signature("/nothing-here", "read", "root", token);
        let path = format!("/files?path=/nothing-here&username=root&signature={signature}");
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
        let reply = daemon.connect().send(request).reply();
        if wakes {
            assert!(reply.error(502).contains("port is not open"), "{reply:?}");
            assert_eq!(reply.json()["sandboxId"], id);
            assert_eq!(daemon.state(id), "running");
        } else {
            assert!(reply.error(400).contains("signature"), "{reply:?}");
            assert_eq!(daemon.state(id), "paused");
        }
    }
}

#[test]
fn an_agent_is_found_by_the_token_that_the_client_shows() {
    let daemon = Daemon::start();
    let secure = || {
        let body = json!({ "templateID": TEMPLATE, "timeout": 300, "secure": true });
        let json = daemon.ask("POST", "/v2/sandboxes", Some(&body)).json();
        let text = |name: &str| json[name].as_str().expect("a text").to_owned();
        (text("sandboxID"), text("envdAccessToken"))
    };
    let made: Vec<_> = (0..3).map(|_| secure()).collect();
    let ask = |path: &str, token: &str| {
        let length = "content-length: 0";
        let head = format!("host: any.example\r\nx-access-token: {token}\r\n{length}");
        daemon.connect().send(format!("POST {path} HTTP/1.1\r\n{head}\r\n\r\n")).reply()
    };
    for (id, token) in &made {
        // Twice: looked for, and remembered. The stand-in says in its own name that it has no agent.
        for path in ["/filesystem.Filesystem/Stat", "/process.Process/List", "/files", "/health"] {
            let reply = ask(path, token);
            assert!(reply.error(502).contains("port is not open"), "{path}: {reply:?}");
            assert_eq!(reply.json()["sandboxId"], **id);
        }
        // The control plane does not become the agent's.
        ask("/sandboxes", token).error(401);
    }
    let (id, token) = &made[0];
    assert_eq!(daemon.delete(id).status, 204);
    for wrong in [token.as_str(), &token[1..], &"0".repeat(64), ""] {
        let message = ask("/filesystem.Filesystem/Stat", wrong).error(502);
        assert!(message.contains("The sandbox was not found"), "{wrong}: {message}");
    }
}
