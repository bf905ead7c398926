//! A stream into a sandbox serves one request after another of the same client, and only as long as
//! that changes nothing but the time it takes.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::{Connection, PATIENCE};
use crate::daemon::{Daemon, patiently};
use crate::upstream::{Upstream, gate};

/// A server that answers each request with the number of its connection and its number on that.
struct Server {
    port: u16,
    /// Numbers of connections that have ended.
    ended: Receiver<usize>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (ends, ended) = channel();
        thread::spawn(move || {
            for (number, stream) in listener.incoming().flatten().enumerate() {
                let ends = ends.clone();
                thread::spawn(move || serve(stream, number, &ends));
            }
        });
        Self { port, ended }
    }
}

fn serve(stream: TcpStream, connection: usize, ends: &Sender<usize>) {
    let mut reader = BufReader::new(stream);
    for number in 0.. {
        let Some((line, host)) = request(&mut reader) else { break };
        let path = line.split(' ').nth(1).expect("a path").to_owned();
        let body = format!("{connection}:{number} {host}");
        let length = body.len();
        let more = if path == "/close" { "connection: close\r\n" } else { "" };
        let answer = match path.as_str() {
            "/open" => format!("HTTP/1.1 200 OK\r\n\r\n{body}"),
            "/chunks" => {
                format!(
                    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{length:x}\r\n{body}\r\n0\r\n\r\n"
                )
            }
            "/both" => {
                format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n{length:x}\r\n{body}\r\n0\r\n\r\n"
                )
            }
            "/hang-up" if number > 0 => break,
            _ => format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n{more}\r\n{body}"),
        };
        let said_behind = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong";
        let answer = if path == "/more" { answer + said_behind } else { answer };
        let answer = if line.starts_with("HEAD") {
            format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n")
        } else {
            answer
        };
        if reader.get_mut().write_all(answer.as_bytes()).is_err() || path == "/open" {
            break;
        }
    }
    if ends.send(connection).is_err() {
        // The test is over.
    }
}

/// The request line and the host of the next request, with its body read; `None` at the end.
fn request(reader: &mut BufReader<TcpStream>) -> Option<(String, String)> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let value = |name: &str| lines.iter().find_map(|line| line.strip_prefix(name));
    let length = value("content-length: ").map_or(0, |length| length.parse().expect("a length"));
    let mut body = vec![0; length];
    std::io::Read::read_exact(reader, &mut body).ok()?;
    Some((lines[0].clone(), value("host: ").expect("a host").to_owned()))
}

fn send(client: &mut Connection, id: &str, port: u16, line: &str, rest: &str) {
    client.send(format!("{line} HTTP/1.1\r\nhost: {port}-{id}.any.example\r\n{rest}"));
}

/// On which connection it was, and as which request of that.
fn asked(client: &mut Connection, id: &str, port: u16, line: &str) -> String {
    send(client, id, port, line, "\r\n");
    let reply = client.reply();
    assert_eq!(reply.status, 200, "{reply:?}");
    let text = String::from_utf8(reply.body).expect("text");
    text.split(' ').next().expect("numbers").to_owned()
}

/// One client of one server.
struct Client {
    client: Connection,
    id: String,
    port: u16,
}

impl Client {
    /// Which of the server's connections its next request comes on.
    fn connection(&mut self) -> usize {
        let numbers = asked(&mut self.client, &self.id, self.port, "GET /");
        numbers.split(':').next().expect("a number").parse().expect("a number")
    }

    fn refused(&mut self) -> String {
        send(&mut self.client, &self.id, self.port, "GET /", "\r\n");
        self.client.reply().error(502)
    }
}

#[test]
fn a_client_has_its_stream_to_itself_and_uses_it_again() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Server::start();
    let (mut one, mut other) = (daemon.connect(), daemon.connect());
    for number in 0..4 {
        let path = if number % 2 == 0 { "GET /" } else { "GET /chunks" };
        assert_eq!(asked(&mut one, &id, server.port, path), format!("0:{number}"));
        // Also the host's own answers come between.
        one.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n");
        assert_eq!(one.reply().status, 200);
    }
    assert_eq!(asked(&mut other, &id, server.port, "GET /"), "1:0");
    assert_eq!(asked(&mut one, &id, server.port, "DELETE /"), "0:4");
    // Another sandbox is another server, whoever is behind it.
    let another = daemon.create();
    assert_eq!(asked(&mut one, &another, server.port, "GET /"), "2:0");
    assert_eq!(asked(&mut one, &id, server.port, "GET /"), "0:5");
    drop(one);
    let first = server.ended.recv_timeout(PATIENCE).expect("an end");
    let second = server.ended.recv_timeout(PATIENCE).expect("an end");
    assert_eq!(first.min(second)..=first.max(second), 0..=2, "they go with their client");
}

#[test]
fn a_stream_whose_answer_has_no_clear_end_is_not_used_again() {
    let daemon = Daemon::start();
    let id = daemon.create();
    for line in ["GET /close", "GET /open", "GET /more", "GET /both"] {
        let server = Server::start();
        let mut client = daemon.connect();
        send(&mut client, &id, server.port, line, "\r\n");
        let (status, headers) = client.head();
        assert_eq!(status, 200, "{line}");
        if headers.contains_key("content-length") {
            let mut body = vec![0; headers["content-length"].parse().expect("a length")];
            client.exactly(&mut body);
        } else {
            while client.chunk().is_some() {}
            client.trailers();
        }
        assert_eq!(asked(&mut client, &id, server.port, "GET /"), "1:0", "{line}");
    }
    let server = Server::start();
    let mut client = daemon.connect();
    send(&mut client, &id, server.port, "HEAD /", "\r\n");
    assert_eq!(client.head().0, 200);
    assert_eq!(asked(&mut client, &id, server.port, "GET /"), "1:0", "a HEAD");
}

#[test]
fn a_request_that_cannot_be_repeated_has_a_new_stream() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Server::start();
    let mut client = daemon.connect();
    assert_eq!(asked(&mut client, &id, server.port, "GET /"), "0:0");
    send(&mut client, &id, server.port, "POST /", "content-length: 2\r\n\r\nhi");
    assert!(client.reply().body.starts_with(b"1:0"));
    // What it leaves is as good as any.
    assert_eq!(asked(&mut client, &id, server.port, "GET /"), "1:1");
}

#[test]
fn a_stream_that_its_server_closed_is_not_missed() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Server::start();
    let mut client = daemon.connect();
    // It closes when the second request is there, without a word.
    for connection in 0..5 {
        let expected = format!("{connection}:0");
        assert_eq!(asked(&mut client, &id, server.port, "GET /hang-up"), expected);
    }
    // It is closed before anybody asks again.
    let quits = Upstream::start(|mut served| {
        served.head();
        served.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi");
    });
    let port = quits.port;
    send(&mut client, &id, port, "GET /", "\r\n");
    assert_eq!(client.reply().body, b"hi");
    quits.join();
    send(&mut client, &id, port, "GET /", "\r\n");
    assert!(client.reply().error(502).contains("port is not open"), "nobody listens any more");
}

#[test]
fn a_stream_is_not_kept_for_long_and_not_after_its_client() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Server::start();
    let mut client = daemon.connect();
    assert_eq!(asked(&mut client, &id, server.port, "GET /"), "0:0");
    let began = Instant::now();
    assert_eq!(server.ended.recv_timeout(PATIENCE), Ok(0));
    assert!(began.elapsed() >= Duration::from_secs(2), "it was of no use");
    assert_eq!(asked(&mut client, &id, server.port, "GET /"), "1:0");
}

#[test]
fn who_may_not_visit_any_more_is_refused_on_a_kept_stream_too() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Server::start();
    let mut client = daemon.connect();
    assert_eq!(asked(&mut client, &id, server.port, "GET /"), "0:0");
    let network = |policy| {
        let path = format!("/sandboxes/{id}/network");
        assert_eq!(daemon.ask("PUT", &path, Some(&policy)).status, 204);
    };
    network(json!({ "allowPublicTraffic": false }));
    send(&mut client, &id, server.port, "GET /", "\r\n");
    let message = client.reply().error(403);
    assert!(message.contains("secured with traffic access token"), "{message}");
    network(json!({ "allowPublicTraffic": true, "maskRequestHost": "app.internal" }));
    assert_eq!(asked(&mut client, &id, server.port, "GET /"), "1:0", "refused means closed");
    send(&mut client, &id, server.port, "GET /", "\r\n");
    assert_eq!(client.reply().body, b"1:1 app.internal");
    network(json!({ "maskRequestHost": "other.internal:${PORT}" }));
    send(&mut client, &id, server.port, "GET /", "\r\n");
    let expected = format!("1:2 other.internal:{}", server.port);
    assert_eq!(
        String::from_utf8_lossy(&client.reply().body),
        expected,
        "what is seen is as of now"
    );
}

#[test]
fn a_pause_a_rollback_and_an_end_leave_no_stream_behind() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Server::start();
    let client = daemon.connect();
    let snapshot = daemon.snapshot(&id);
    let mut client = Client { client, id: id.clone(), port: server.port };
    // One that takes long on a busy machine takes longer than a stream is kept.
    assert!((0..10).any(|_| {
        let before = client.connection();
        daemon.snapshot(&id);
        client.connection() == before
    }));
    let before = client.connection();
    let back = json!({ "snapshotID": snapshot });
    let reply = patiently(|| daemon.act_with(&id, "rollback", &back));
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(client.connection(), before + 1);
    daemon.pause(&id);
    assert_eq!(client.refused(), "The sandbox was not found");
    assert_eq!(daemon.act_with(&id, "resume", &json!({ "timeout": 60 })).status, 201);
    assert_eq!(client.connection(), before + 2);
    assert_eq!(daemon.delete(&id).status, 204);
    assert_eq!(client.refused(), "The sandbox was not found");
}

#[test]
fn what_is_left_of_an_upload_does_not_reach_the_next_request() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let (open, opened) = gate();
    let server = Upstream::start(move |mut served| {
        served.head();
        served.exactly(5);
        // An answer before the request is over.
        served.send("HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig");
        opened.recv().expect("the client");
        served.until_gone();
    });
    let mut client = daemon.to_sandbox(&id, server.port, "PUT /");
    client.send("content-length: 100\r\n\r\nhello");
    let reply = client.reply();
    assert_eq!((reply.status, reply.body.as_slice()), (413, b"big".as_slice()));
    open();
    server.join();
    daemon.healthy();
}
