//! The requests: in turns, timed one by one; and streams that stay.
//!
//! Called by the benchmark. Refuses an answer that is not the server's.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mica_lab::engine::standin::Daemon;

use crate::server::{BODY, Server};

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the daemon's memory is given to come to rest.
const REST: Duration = Duration::from_secs(2);

/// Sorted times.
pub struct Times {
    /// Of one connection to the server.
    pub direct: Vec<Duration>,
    /// Of a connection for each request.
    pub anew: Vec<Duration>,
    /// Through the daemon, on one connection to it.
    pub proxied: Vec<Duration>,
}

/// Asks the same thing in three ways, one after the other.
pub fn interleaved(daemon: &Daemon, server: &Server, id: &str, requests: usize) -> Result<Times> {
    let mut direct = connect(server.address)?;
    let mut through = connect(daemon.address)?;
    let to_server = get("/", "localhost", "");
    let to_daemon = get("/", &host(server, id), "");
    let mut times = Times { direct: Vec::new(), anew: Vec::new(), proxied: Vec::new() };
    for round in 0..requests {
        let mut taken = [Duration::ZERO; 3];
        taken[0] = timed(|| ask(&mut direct, &to_server, BODY))?;
        taken[1] = timed(|| ask(&mut connect(server.address)?, &to_server, BODY))?;
        taken[2] = timed(|| ask(&mut through, &to_daemon, BODY))?;
        if round >= requests / 10 {
            times.direct.push(taken[0]);
            times.anew.push(taken[1]);
            times.proxied.push(taken[2]);
        }
    }
    for series in [&mut times.direct, &mut times.anew, &mut times.proxied] {
        series.sort_unstable();
    }
    Ok(times)
}

/// What kind of stream stays.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// No stream: a client's connection between two requests of the API.
    KeptAlive,
    /// A response that has begun.
    Response,
    /// A WebSocket.
    Switched,
}

/// Resident bytes of the daemon.
pub struct Held {
    /// Before the streams.
    pub before: u64,
    /// While they are open.
    pub with: u64,
}

impl Held {
    /// What all streams take.
    pub fn taken(&self) -> u64 {
        self.with.saturating_sub(self.before)
    }

    /// What one stream takes.
    pub fn each(&self, streams: u64) -> u64 {
        self.taken() / streams.max(1)
    }
}

/// Opens streams that say something once, and looks at the daemon.
pub fn idle(
    daemon: &Daemon,
    server: &Server,
    ids: &[String],
    kind: Kind,
    streams: usize,
) -> Result<Held> {
    let before = daemon.resident_bytes()?.1;
    let mut open = Vec::new();
    for id in ids.iter().cycle().take(streams) {
        let (path, more) = match kind {
            Kind::KeptAlive => ("/health", ""),
            Kind::Response => ("/stream", ""),
            Kind::Switched => ("/socket", "connection: upgrade\r\nupgrade: websocket\r\n"),
        };
        let mut stream = connect(daemon.address)?;
        let (host, end) = match kind {
            Kind::KeptAlive => ("localhost".to_owned(), "}"),
            _ => (host(server, id), "hi"),
        };
        ask(&mut stream, &get(path, &host, more), end)
            .with_context(|| format!("of {streams} streams, {} are open", open.len()))?;
        open.push(stream);
    }
    thread::sleep(REST);
    let with = daemon.resident_bytes()?.1;
    drop(open);
    server.release();
    thread::sleep(REST);
    Ok(Held { before, with })
}

fn host(server: &Server, id: &str) -> String {
    format!("{}-{id}.sandbox.example", server.address.port())
}

fn get(path: &str, host: &str, more: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n{more}\r\n")
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address).context("cannot connect")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Sends a request and reads until its answer has come as far as `end`.
fn ask(stream: &mut TcpStream, request: &str, end: &str) -> Result<()> {
    stream.write_all(request.as_bytes())?;
    let (mut buffer, mut filled) = ([0; 4096], 0);
    loop {
        let count = stream.read(&mut buffer[filled..])?;
        filled += count;
        let text = String::from_utf8_lossy(&buffer[..filled]);
        ensure!(count > 0 && filled < buffer.len(), "not the server's answer: {text}");
        if text.trim_end().ends_with(end) {
            let good = text.starts_with("HTTP/1.1 200") || text.starts_with("HTTP/1.1 101");
            ensure!(good, "not the server's answer: {text}");
            return Ok(());
        }
    }
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let began = Instant::now();
    work()?;
    Ok(began.elapsed())
}
