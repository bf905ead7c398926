//! What a sandbox may say under a name of this host, where it shares the control plane's origin.

use crate::daemon::Daemon;
use crate::upstream::Upstream;

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 0\r\n\
    content-security-policy: sandbox allow-same-origin allow-scripts\r\n\
    clear-site-data: \"*\"\r\nservice-worker-allowed: /\r\nstrict-transport-security: max-age=9\r\n\
    set-cookie: a=1; Path=/; Domain=any.example\r\nx-own: 1\r\n\r\n";

const POLICY: &str = "sandbox allow-downloads allow-forms allow-modals allow-popups allow-scripts";

/// The head of a page of a sandbox as the client gets it, in lower case. `request` is made of the port that
/// serves it.
fn page(daemon: &Daemon, request: impl FnOnce(u16) -> String) -> (u16, String) {
    let server = Upstream::start(|mut served| {
        served.head();
        served.send(HEAD);
    });
    let port = server.port;
    let answer = daemon.connect().send(request(port)).rest();
    server.join();
    let text = String::from_utf8(answer).expect("text").to_ascii_lowercase();
    assert!(text.starts_with("http/1.1 200 "), "{text}");
    (port, text)
}

#[test]
fn a_page_by_path_is_confined_and_one_under_its_own_name_is_not() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let (port, text) = page(&daemon, |port| {
        format!(
            "GET /sandbox/{id}/{port}/ HTTP/1.1\r\nhost: any.example\r\nconnection: close\r\n\r\n"
        )
    });
    assert!(text.contains(&format!("content-security-policy: {POLICY}\r\n")), "{text}");
    let cookie = format!("set-cookie: a=1; path=/sandbox/{id}/{port}/\r\n");
    assert!(text.contains(&cookie), "{text}");
    for gone in ["clear-site-data", "service-worker-allowed", "strict-transport", "any.example"] {
        assert!(!text.contains(gone), "{gone}: {text}");
    }
    assert!(text.contains("x-own: 1"), "{text}");

    let (_, text) = page(&daemon, |port| {
        format!("GET / HTTP/1.1\r\nhost: {port}-{id}.any.example\r\nconnection: close\r\n\r\n")
    });
    assert!(!text.contains(POLICY), "{text}");
    for kept in ["clear-site-data", "service-worker-allowed", "path=/; domain=any.example"] {
        assert!(text.contains(kept), "{kept}: {text}");
    }

    let (_, text) = page(&daemon, |port| {
        let named = format!("e2b-sandbox-id: {id}\r\ne2b-sandbox-port: {port}");
        format!("GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{named}\r\n\r\n")
    });
    assert!(text.contains(POLICY) && !text.contains("clear-site-data"), "{text}");
    assert!(text.contains("set-cookie: a=1; path=/\r\n"), "{text}");
}

#[test]
fn a_service_worker_is_installed_under_its_own_name_alone() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let ask = |target: &str, host: &str| {
        let request =
            format!("GET {target} HTTP/1.1\r\nhost: {host}\r\nservice-worker: script\r\n\r\n");
        daemon.connect().send(request).reply()
    };
    let message = ask(&format!("/sandbox/{id}/1/sw.js"), "localhost").error(403);
    assert!(message.contains("service worker"), "{message}");
    let message = ask("/sw.js", &format!("1-{id}.any.example")).error(502);
    assert!(message.contains("port is not open"), "{message}");
}
