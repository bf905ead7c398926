//! HTTP/2 from clients, gRPC into sandboxes, and clients that abuse either.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Version};

use crate::client::PATIENCE;
use crate::daemon::{Daemon, NO_POOL};
use crate::h2_client::{Echo, H2};
use crate::upstream::{Upstream, gate};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

fn open(daemon: &Daemon) -> H2 {
    H2::open(TcpStream::connect(daemon.address()).expect("connect"))
}

fn get(uri: &str) -> Request<()> {
    Request::builder().version(Version::HTTP_2).uri(uri).body(()).expect("a request")
}

#[test]
fn the_control_plane_and_sandboxes_answer_on_one_connection() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Upstream::start(|mut served| {
        let head = served.head();
        served.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: x-hop\r\n");
        served.send("x-hop: 1\r\n\r\n2\r\nhi\r\n0\r\nx-sum: 7\r\n\r\n");
        head
    });
    let mut client = open(&daemon);
    let health = client.ask(get("http://localhost/health"), Vec::new());
    assert_eq!(health.status, 200);
    let mut list = get("http://localhost/sandboxes");
    list.headers_mut().insert("x-api-key", daemon.key().parse().expect("a key"));
    let list = client.ask(list, Vec::new());
    assert_eq!(list.status, 200);
    assert!(String::from_utf8_lossy(&list.body).contains(&id));
    assert!(client.streams_max() <= 100, "{}", client.streams_max());

    let host = format!("{}-{id}.any.example:99", server.port);
    let mut request = get(&format!("http://{host}/a?b"));
    for cookie in ["a=1", "b=2"] {
        request.headers_mut().append("cookie", cookie.parse().expect("a value"));
    }
    request.headers_mut().insert("te", "trailers".parse().expect("a value"));
    let reply = client.ask(request, Vec::new());
    assert_eq!((reply.status.as_u16(), reply.body.as_slice()), (200, b"hi".as_slice()));
    assert!(!reply.headers.contains_key("x-hop") && !reply.headers.contains_key("connection"));
    assert_eq!(reply.trailers.expect("trailers")["x-sum"], "7");
    let head = server.join();
    assert_eq!(head[0], "get /a?b http/1.1");
    for line in [format!("host: {host}"), "cookie: a=1; b=2".to_owned(), "te: trailers".to_owned()]
    {
        assert_eq!(head.iter().filter(|l| **l == line).count(), 1, "{line} in {head:?}");
    }
}

#[test]
fn requests_of_one_connection_do_not_wait_for_one_another() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let (open_gate, opened) = gate();
    let slow = Upstream::start(move |mut served| {
        served.head();
        opened.recv().expect("the gate");
        served.send("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nslow");
    });
    let quick = Upstream::start(|mut served| {
        served.head();
        let body = served.exactly(5);
        served.send("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n").send(body);
        open_gate();
    });
    let to = |port: u16| get(&format!("http://{port}-{id}.any.example/"));
    let mut post = to(quick.port);
    *post.method_mut() = http::Method::POST;
    post.headers_mut().insert("content-length", "5".parse().expect("a value"));
    let requests = vec![
        (to(slow.port), Vec::new()),
        (post, vec![Bytes::from_static(b"he"), Bytes::from_static(b"llo")]),
    ];
    let replies = open(&daemon).ask_all(requests);
    let bodies: Vec<_> = replies.iter().map(|reply| reply.body.as_slice()).collect();
    assert_eq!(bodies, [b"slow".as_slice(), b"hello".as_slice()]);
    slow.join();
    quick.join();
}

#[test]
fn a_grpc_call_is_http_2_to_the_end() {
    let daemon = Daemon::start();
    let id = daemon.create();
    let server = Echo::start();
    let host = format!("{}-{id}.any.example", server.port);
    let mut call = get(&format!("http://{host}/pkg.Service/Call"));
    *call.method_mut() = http::Method::POST;
    for (name, value) in
        [("content-type", "application/grpc+proto"), ("te", "trailers"), ("x-meta", "1")]
    {
        call.headers_mut().insert(name, value.parse().expect("a value"));
    }
    let messages = vec![Bytes::from_static(b"one"), Bytes::from(vec![b'x'; 300_000])];
    let mut client = open(&daemon);
    let reply = client.ask(call, messages);
    assert_eq!((reply.status.as_u16(), reply.body.len()), (200, 300_003));
    assert_eq!(reply.headers["content-type"], "application/grpc");
    let trailers = reply.trailers.expect("trailers");
    assert_eq!(
        (&trailers["grpc-status"], &trailers["grpc-message"]),
        (&"0".parse().expect("v"), &"fine".parse().expect("v"))
    );
    let (seen, _) = server.join();
    assert_eq!(seen.uri().path(), "/pkg.Service/Call");
    assert_eq!(seen.uri().host(), Some(host.as_str()));
    assert_eq!(
        (&seen.headers()["te"], &seen.headers()["x-meta"]),
        (&"trailers".parse().expect("v"), &"1".parse().expect("v"))
    );

    // Where nobody listens, and where nobody speaks it, the call has an answer, too.
    let server = Upstream::start(|mut served| drop(served.some()));
    for (port, hint) in [(1, "port is not open"), (server.port, "closed the connection")] {
        let mut call = get(&format!("http://{port}-{id}.any.example/pkg.Service/Call"));
        *call.method_mut() = http::Method::POST;
        call.headers_mut().insert("content-type", "application/grpc".parse().expect("a value"));
        let reply = client.ask(call, Vec::new());
        assert_eq!(reply.status, 502);
        assert!(String::from_utf8_lossy(&reply.body).contains(hint), "{reply:?}");
    }
    server.join();
}

#[test]
fn a_connection_that_leaves_and_a_daemon_that_stops_end_what_runs() {
    let mut daemon = Daemon::start_with(&["--pool-min", "0", "--pool-max", "0", "--drain", "20"]);
    let id = daemon.create();
    let before = daemon.settled(None);
    let (arrived, wait) = gate();
    let server = Upstream::start(|mut served| {
        served.head();
        arrived();
        served.until_gone();
    });
    let mut raw = handshaken(&daemon);
    raw.write_all(&request(1, &format!("{}-{id}.any.example", server.port))).expect("a request");
    wait.recv().expect("the request");
    drop(raw);
    server.join();
    assert_eq!(daemon.settled(Some(before)), before);

    let mut idle = handshaken(&daemon);
    let began = Instant::now();
    daemon.signal("TERM");
    until_closed(&mut idle);
    assert!(daemon.wait().success());
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// A connection on which only settings were said.
fn handshaken(daemon: &Daemon) -> TcpStream {
    let mut stream = TcpStream::connect(daemon.address()).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.write_all(&[PREFACE, SETTINGS].concat()).expect("a preface");
    let mut answer = [0; 9];
    stream.read_exact(&mut answer).expect("settings");
    assert_eq!(answer[3], 4, "{answer:?}");
    stream
}

fn until_closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => rest,
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => rest,
        Err(error) => panic!("the connection did not end: {error}"),
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a length").to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// `GET /` without a body.
fn request(stream: u32, host: &str) -> Vec<u8> {
    // From HPACK's table: :method GET, :scheme http, :path /, and :authority with a value.
    let mut block = vec![0x82, 0x86, 0x84, 0x01, u8::try_from(host.len()).expect("a length")];
    block.extend(host.as_bytes());
    frame(1, 0x5, stream, &block)
}

#[test]
fn floods_end_their_own_connection_alone() {
    let daemon = Daemon::start_with(&NO_POOL);
    let before = daemon.settled(None);
    let streams = || (0u32..).map(|n| 2 * n + 1);
    let resets = streams()
        .take(5_000)
        .flat_map(|n| [request(n, "localhost"), frame(3, 0, n, &[0, 0, 0, 8])].concat());
    let window_of_nothing = streams()
        .take(5_000)
        .flat_map(|n| [request(n, "localhost"), frame(8, 0, n, &[0, 0, 0, 0])].concat());
    let endless_head = std::iter::once(frame(1, 0, 1, &[0x82]))
        .chain((0..20_000).map(|_| frame(9, 0, 1, &[0x40, 1, b'a', 1, b'b'])))
        .flatten();
    let floods: [(&str, Vec<u8>); 4] = [
        ("resets", resets.collect()),
        ("mistakes", window_of_nothing.collect()),
        ("a head that never ends", endless_head.collect()),
        ("nonsense", vec![0xff; 100_000]),
    ];
    for (name, flood) in floods {
        let mut stream = handshaken(&daemon);
        // The other end may hang up in the middle of this.
        let sent = stream.write_all(&flood).and_then(|()| stream.shutdown(Shutdown::Write));
        drop(sent);
        let rest = until_closed(&mut stream);
        assert!(rest.len() < 1 << 20, "{name}: {} bytes of answers", rest.len());
        daemon.healthy();
    }
    assert_eq!(daemon.settled(Some(before)), before, "nothing is left of them");
}

#[test]
fn a_head_may_not_be_too_large_and_a_preface_not_too_slow() {
    let daemon = Daemon::start_with(&["--client-timeout", "1"]);
    let mut client = open(&daemon);
    let mut large = get("http://localhost/health");
    large.headers_mut().insert("x-long", "x".repeat(60_000).parse().expect("a value"));
    large.headers_mut().insert("x-longer", "x".repeat(60_000).parse().expect("a value"));
    let reply = client.ask(large, Vec::new());
    assert_eq!(reply.status, 431);

    let mut slow = TcpStream::connect(daemon.address()).expect("connect");
    slow.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    slow.write_all(&PREFACE[..20]).expect("a part");
    assert!(until_closed(&mut slow).starts_with(b"HTTP/1.1 408 "));
    let mut silent = handshaken(&daemon);
    until_closed(&mut silent);
    daemon.healthy();
}
