//! One message in, the same message out: framing, hop-by-hop headers, odd requests.

use crate::daemon::Daemon;
use crate::upstream::Upstream;

const EMPTY: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

#[test]
fn a_connection_serves_one_request_after_another() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let mut client = daemon.connect();
    for n in 0..3 {
        let server = Upstream::start(|mut served| {
            let head = served.head();
            served.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-mine: yes\r\n\r\nhi");
            head
        });
        client.send(format!(
            "GET /a%2Fb/%63?q={n}&r=%20 HTTP/1.1\r\nhost: {}-{id}.any.example:99\r\nx-n: {n}\r\n\r\n",
            server.port
        ));
        let reply = client.reply();
        assert_eq!((reply.status, reply.body.as_slice()), (200, b"hi".as_slice()));
        assert_eq!(reply.headers["x-mine"], "yes");
        let head = server.join();
        // The path arrives as it was written: decoding is the server's business.
        assert_eq!(head[0], format!("get /a%2fb/%63?q={n}&r=%20 http/1.1"));
        assert!(head.contains(&format!("x-n: {n}")), "{head:?}");
    }
    client.send("GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n");
    assert_eq!(client.reply().status, 200, "the same connection reaches the control plane");
}

#[test]
fn what_belongs_to_a_connection_stays_on_it() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        let head = served.head();
        served.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nkeep-alive: timeout=1\r\n");
        served.send("connection: keep-alive, x-private\r\nx-private: 1\r\nx-public: 2\r\n\r\n");
        head
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    client.send("connection: x-secret\r\nx-secret: 1\r\nte: trailers\r\nx-access-token: t\r\n");
    let reply = client.send("authorization: Basic dXNlcjo=\r\n\r\n").reply();
    assert!(!reply.headers.contains_key("x-private") && !reply.headers.contains_key("keep-alive"));
    assert_eq!(reply.headers["x-public"], "2");
    let head = server.join();
    assert!(!head.iter().any(|line| line.starts_with("x-secret")), "{head:?}");
    for kept in ["te: trailers", "x-access-token: t", "authorization: basic dxnlcjo="] {
        assert!(head.contains(&kept.to_owned()), "{kept} in {head:?}");
    }
}

#[test]
fn two_lengths_never_reach_a_sandbox() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        let head = served.head();
        let body = served.until("0\r\n\r\n");
        served.send(EMPTY);
        (head, body)
    });
    // One server would see the body end after 4 bytes, another after the last chunk.
    let mut client = daemon.to_sandbox(&id, server.port, "POST /");
    client.send("content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n");
    client.send("5\r\nhello\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n");
    let first = client.reply();
    assert_eq!(first.status, 200);
    let (head, body) = server.join();
    assert!(!head.iter().any(|line| line.starts_with("content-length")), "{head:?}");
    assert!(head.contains(&"transfer-encoding: chunked".to_owned()), "{head:?}");
    assert_eq!(body, "5\r\nhello\r\n0\r\n\r\n", "nothing behind the body");
}

#[test]
fn a_header_that_names_framing_as_its_own_does_not_remove_it() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        let head = served.head();
        let body = served.exactly(5);
        served.send("HTTP/1.1 200 OK\r\nconnection: content-length\r\ncontent-length: 2\r\n\r\nhi");
        (head, body)
    });
    let mut client = daemon.to_sandbox(&id, server.port, "POST /");
    client.send("connection: content-length, host\r\ncontent-length: 5\r\n\r\nhello");
    assert_eq!(client.reply().body, b"hi");
    let (head, body) = server.join();
    assert_eq!(body, b"hello");
    assert!(head.contains(&"content-length: 5".to_owned()), "{head:?}");
    assert_eq!(head.iter().filter(|line| line.starts_with("host: ")).count(), 1, "{head:?}");
    assert_eq!(client.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n").reply().status, 200);
}

#[test]
fn of_two_lengths_of_an_answer_the_chunks_count() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let mut client = daemon.connect();
    for length in [4, 400] {
        let server = Upstream::start(move |mut served| {
            served.head();
            served.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n"));
            served.send("transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n");
        });
        client.send(format!(
            "GET / HTTP/1.1\r\nhost: {}-{id}.any.example\r\n\r\n\
             GET /health HTTP/1.1\r\nhost: x\r\n\r\n",
            server.port
        ));
        let reply = client.reply();
        assert_eq!((reply.status, reply.body.as_slice()), (200, b"hello".as_slice()), "{reply:?}");
        assert_eq!(client.reply().status, 200, "the next answer begins where this one ends");
        server.join();
    }
}

#[test]
fn trailers_pass() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        let head = served.head();
        let body = served.until("\r\n\r\n");
        served.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n");
        served.send("2\r\nok\r\n0\r\nx-sum: 7\r\n\r\n");
        (head, body)
    });
    let mut client = daemon.to_sandbox(&id, server.port, "POST /");
    client.send("te: trailers\r\ntrailer: x-in\r\ntransfer-encoding: chunked\r\n\r\n");
    client.send("2\r\nhi\r\n0\r\nx-in: 5\r\n\r\n");
    assert_eq!(client.head().0, 200);
    assert_eq!(client.chunk().as_deref(), Some(b"ok".as_slice()));
    assert_eq!(client.chunk(), None);
    assert_eq!(client.trailers(), ["x-sum: 7"]);
    let (head, body) = server.join();
    assert!(head.contains(&"trailer: x-in".to_owned()), "{head:?}");
    assert!(body.contains("x-in: 5"), "{body:?}");
}

#[test]
fn head_and_empty_answers_have_no_body() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        assert!(served.head()[0].starts_with("head "));
        served.send("HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n");
    });
    let mut client = daemon.to_sandbox(&id, server.port, "HEAD /");
    let (status, headers) = client.send("\r\n").head();
    assert_eq!((status, headers["content-length"].as_str()), (200, "1234"));
    server.join();
    for answer in ["HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 304 Not Modified\r\n\r\n", EMPTY] {
        let server = Upstream::start(move |mut served| {
            served.head();
            served.send(answer);
        });
        client.send(format!(
            "GET / HTTP/1.1\r\nhost: localhost\r\ne2b-sandbox-id: {id}\r\n\
             e2b-sandbox-port: {}\r\n\r\n",
            server.port
        ));
        let (status, headers) = client.head();
        assert!(answer.contains(&status.to_string()));
        let length = headers.get("content-length").map_or("0", String::as_str);
        assert_eq!(length, "0", "{answer:?}");
        server.join();
    }
}

#[test]
fn an_answer_that_ends_with_its_connection_ends_for_the_client() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        served.head();
        served.send("HTTP/1.0 200 OK\r\n\r\nold style");
    });
    let mut client = daemon.to_sandbox(&id, server.port, "GET /");
    let reply = client.send("\r\n").reply();
    assert_eq!(reply.body, b"old style");
    server.join();
}

#[test]
fn the_client_may_ask_before_it_sends_its_body() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        let head = served.head();
        assert_eq!(served.exactly(5), b"hello");
        served.send(EMPTY);
        head
    });
    let mut client = daemon.to_sandbox(&id, server.port, "PUT /");
    client.send("expect: 100-continue\r\ncontent-length: 5\r\n\r\n");
    assert_eq!(client.head().0, 100);
    assert_eq!(client.send("hello").reply().status, 200);
    server.join();

    // Where nothing listens the answer comes without the body.
    let mut client = daemon.to_sandbox(&id, 1, "PUT /");
    client.send("expect: 100-continue\r\ncontent-length: 5\r\n\r\n");
    client.reply().error(502);
}
