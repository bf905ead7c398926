//! What the daemon holds for a stream that says nothing.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use crate::client::Connection;
use crate::daemon::Daemon;

/// So many streams: what they take is more than what else comes and goes. Some at a time: what begins takes
/// more for a moment, and what was silent for that long has let go of it.
const AT_A_TIME: usize = 100;
const TIMES: usize = 5;

/// Longer than the daemon waits before it takes a connection for silent.
const SILENCE: Duration = Duration::from_millis(2500);

/// Streams that are opened before it is counted: their memory is there for the next ones as well.
const BEFORE: usize = 20;

/// Ten thousand of them are 200 MB. With hyper's buffers it was a little more.
const BYTES_MAX: u64 = 20_000;

/// A server that begins an answer and says no more until its client goes.
fn silent(answer: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    thread::spawn(move || {
        let mut held = Vec::new();
        for mut stream in listener.incoming().flatten() {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).expect("a head");
                head.push(byte[0]);
            }
            stream.write_all(answer.as_bytes()).expect("an answer");
            held.push(stream);
        }
    });
    port
}

/// Opens streams until their answers have begun.
fn open(daemon: &Daemon, id: &str, port: u16, count: usize, end: &str) -> Vec<Connection> {
    let streams = (0..count).map(|_| {
        let mut client = daemon.to_sandbox(id, port, "GET /");
        client.send("connection: upgrade\r\nupgrade: websocket\r\n\r\n");
        client.head();
        let mut said = vec![0; end.len()];
        client.exactly(&mut said);
        assert_eq!(said, end.as_bytes());
        client
    });
    streams.collect()
}

#[test]
fn a_silent_stream_costs_less_than_20_kilobytes() {
    let daemon = Daemon::start();
    let ids: Vec<_> = (0..4).map(|_| daemon.create()).collect();
    // They stay open: what one kind takes is not to be hidden in what another leaves.
    let mut held = Vec::new();
    for (answer, end) in [
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n", "2\r\nhi\r\n"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhi", "hi"),
        ("HTTP/1.1 101 Go\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhi", "hi"),
    ] {
        let port = silent(answer);
        held.extend(open(&daemon, &ids[0], port, BEFORE, end));
        // Of several batches the one in the middle: what else the daemon does meanwhile falls into one.
        let mut batches: Vec<u64> = Vec::new();
        for id in ids.iter().cycle().take(TIMES) {
            let before = daemon.resident_bytes();
            held.extend(open(&daemon, id, port, AT_A_TIME, end));
            thread::sleep(SILENCE);
            let streams = u64::try_from(AT_A_TIME).expect("a number");
            batches.push(daemon.resident_bytes().saturating_sub(before) / streams);
        }
        batches.sort_unstable();
        let each = batches[TIMES / 2];
        assert!(each > 500, "{each} bytes are nothing: {answer:?}");
        assert!(each <= BYTES_MAX, "{each} bytes for each: {answer:?}");
    }
}
