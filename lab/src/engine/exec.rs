//! What a client waits for code and for a command in a sandbox that is warm: `1+1` in the code interpreter,
//! `true` through envd, from one client and from many at once.
//!
//! Called by `mica bench exec` against any host that runs. The clients share sandboxes, each over a connection
//! of its own. Refuses every answer but the right one: a benchmark of errors is fast.

use std::fmt::Write as _;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Barrier, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use super::client::Client;
use super::report::row;
use super::series::{Series, percentile};

/// How many clients at once, and what the operations are called then.
const LEVELS: [(usize, &str, &str); 3] = [
    (1, "run_code_1", "command_1"),
    (10, "run_code_10", "command_10"),
    (100, "run_code_100", "command_100"),
];
/// Life of the sandboxes, should they not be killed.
const LIFE_S: u32 = 3600;
/// The flag of the frame that ends a stream, in Connect's protocol.
const END_OF_STREAM: u8 = 2;
/// Flag and length, before each frame.
const FRAME_HEAD_BYTES: usize = 5;

/// What is measured, and where.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address and port of the host, after `http://`.
    pub url: String,
    /// Its key.
    pub api_key: String,
    /// The template of the sandboxes; it must have a code interpreter.
    pub template: String,
    /// How many sandboxes the clients share.
    pub sandboxes: usize,
    /// How often each operation is done, at each number of clients.
    pub calls: usize,
}

/// One operation from so many clients.
#[derive(Clone, Debug)]
pub struct Load {
    /// The times.
    pub series: Series,
    /// How many clients there were.
    pub clients: usize,
    /// From the first call to the last answer.
    pub took: Duration,
}

/// A request that is done again and again, and what its answer must say.
#[derive(Clone, Copy, Debug)]
struct Work {
    port: &'static str,
    content_type: &'static str,
    path: &'static str,
    body: fn() -> Vec<u8>,
    check: fn(&[u8]) -> Result<()>,
}

const RUN_CODE: Work = Work {
    port: "49999",
    content_type: "application/json",
    path: "/execute",
    body: || br#"{"code":"1+1"}"#.to_vec(),
    check: executed,
};

const COMMAND: Work = Work {
    port: "49983",
    content_type: "application/connect+json",
    path: "/process.Process/Start",
    body: || frame(br#"{"process":{"cmd":"/bin/bash","args":["-l","-c","true"]},"stdin":false}"#),
    check: ended_well,
};

/// Measures everything on sandboxes that are made for it and killed afterwards.
///
/// # Errors
/// When the host does not answer, or anything but right.
pub fn measure(config: &Config) -> Result<Vec<Load>> {
    let address = address(&config.url)?;
    let mut control = Client::open(
        address,
        &[("X-API-Key", &config.api_key), ("Content-Type", "application/json")],
    )?;
    let mut sandboxes = Vec::new();
    let measured = make(&mut control, config, &mut sandboxes)
        .and_then(|()| all_levels(address, &sandboxes, config.calls));
    for (id, _) in &sandboxes {
        let killed = control.call("DELETE", &format!("/sandboxes/{id}"), b"", 204);
        if measured.is_ok() {
            killed.context("kill a sandbox of the benchmark")?;
        }
    }
    measured
}

fn address(url: &str) -> Result<SocketAddr> {
    let host = url.strip_prefix("http://").context("--url must begin with http://")?;
    let host = host.trim_end_matches('/');
    let found = host.to_socket_addrs().with_context(|| format!("--url: find {host}"))?.next();
    found.with_context(|| format!("--url: {host} has no address"))
}

/// Id and access token of a sandbox.
type Sandbox = (String, String);

fn make(control: &mut Client, config: &Config, made: &mut Vec<Sandbox>) -> Result<()> {
    let body = json!({ "templateID": config.template, "timeout": LIFE_S }).to_string();
    while made.len() < config.sandboxes {
        let answer = control.call("POST", "/v2/sandboxes", body.as_bytes(), 201)?;
        let answer: Value = serde_json::from_slice(&answer)?;
        let id = answer["sandboxID"].as_str().context("an answer without an id")?;
        let token = answer["envdAccessToken"].as_str().unwrap_or_default();
        made.push((id.to_owned(), token.to_owned()));
    }
    Ok(())
}

fn all_levels(address: SocketAddr, sandboxes: &[Sandbox], calls: usize) -> Result<Vec<Load>> {
    let mut loads = Vec::new();
    for (clients, run_code, command) in LEVELS {
        for (op, work) in [(run_code, RUN_CODE), (command, COMMAND)] {
            let load = load(address, sandboxes, op, work, clients, calls.div_ceil(clients));
            loads.push(load.with_context(|| format!("{op} with {clients} clients"))?);
        }
    }
    Ok(loads)
}

/// `clients` threads, each with `calls` calls after one that warms its connection. They connect one after the
/// other, each when the one before was answered: a port that QEMU forwards has room for one connection that
/// nobody has taken yet, and those above it are reset once they have sent something.
fn load(
    address: SocketAddr,
    sandboxes: &[Sandbox],
    op: &'static str,
    work: Work,
    clients: usize,
    calls: usize,
) -> Result<Load> {
    let (ready, door) = (Barrier::new(clients), Mutex::new(()));
    let results: Vec<Result<(Instant, Vec<Duration>, Instant)>> = thread::scope(|scope| {
        let threads: Vec<_> = sandboxes
            .iter()
            .cycle()
            .take(clients)
            .map(|sandbox| {
                let (ready, door) = (&ready, &door);
                scope.spawn(move || {
                    let warm = {
                        // What is guarded is nothing that a panic could have broken.
                        let _turn = door.lock().unwrap_or_else(PoisonError::into_inner);
                        warm(address, sandbox, work)
                    };
                    // Also one that failed lets the others begin.
                    ready.wait();
                    let mut client = warm?;
                    let begun = Instant::now();
                    let mut times = Vec::with_capacity(calls);
                    for _ in 0..calls {
                        times.push(once(&mut client, work)?);
                    }
                    Ok((begun, times, Instant::now()))
                })
            })
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|_| Err(anyhow!("a client panicked")))
        };
        threads.into_iter().map(join).collect()
    });
    let results: Vec<_> = results.into_iter().collect::<Result<_>>()?;
    let begun = results.iter().map(|result| result.0).min().context("no client")?;
    let ended = results.iter().map(|result| result.2).max().context("no client")?;
    let times = results.into_iter().flat_map(|result| result.1).collect();
    let series = Series { op, times, floor: Vec::new() };
    Ok(Load { series, clients, took: ended - begun })
}

fn warm(address: SocketAddr, (id, token): &Sandbox, work: Work) -> Result<Client> {
    let headers = [
        ("E2b-Sandbox-Id", id.as_str()),
        ("E2b-Sandbox-Port", work.port),
        ("X-Access-Token", token.as_str()),
        ("Content-Type", work.content_type),
        ("Connect-Protocol-Version", "1"),
    ];
    let mut client = Client::open(address, &headers)?;
    once(&mut client, work)?;
    Ok(client)
}

fn once(client: &mut Client, work: Work) -> Result<Duration> {
    let body = (work.body)();
    let begun = Instant::now();
    let answer = client.call("POST", work.path, &body, 200)?;
    let took = begun.elapsed();
    (work.check)(&answer)
        .with_context(|| format!("{} said {}", work.path, String::from_utf8_lossy(&answer)))?;
    Ok(took)
}

/// The lines of an execution must hold the result 2.
fn executed(answer: &[u8]) -> Result<()> {
    for line in answer.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let event: Value = serde_json::from_slice(line).context("a line that is not JSON")?;
        if event["type"] == "result" && event["text"] == "2" {
            return Ok(());
        }
    }
    bail!("there is no result 2")
}

/// One frame of Connect's streams.
#[must_use]
pub fn frame(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    [&[0], length.to_be_bytes().as_slice(), message].concat()
}

/// The frames of a process must end with exit code 0, and the stream without an error.
///
/// # Errors
/// When they do not.
pub fn ended_well(mut answer: &[u8]) -> Result<()> {
    let mut exited = false;
    loop {
        let (head, rest) = answer.split_at_checked(FRAME_HEAD_BYTES).context("no last frame")?;
        let [flag, length @ ..] = <[u8; FRAME_HEAD_BYTES]>::try_from(head)?;
        let length = usize::try_from(u32::from_be_bytes(length))?;
        let (message, rest) = rest.split_at_checked(length).context("a frame is cut off")?;
        let message: Value = serde_json::from_slice(message).context("a frame is not JSON")?;
        if flag & END_OF_STREAM != 0 {
            ensure!(message["error"].is_null(), "the stream ended with an error");
            ensure!(exited, "the process did not end with 0");
            return Ok(());
        }
        let end = &message["event"]["end"];
        // Zero is left out.
        exited |= end["exited"] == true && end["exitCode"].as_i64().unwrap_or(0) == 0;
        answer = rest;
    }
}

/// The rows, each as those of `bench engine`, with how many clients there were and what they got done.
#[must_use]
pub fn rows(loads: &[Load]) -> Vec<Value> {
    loads
        .iter()
        .map(|load| {
            let mut row = row(&load.series);
            row["clients"] = json!(load.clients);
            row["per_s"] = json!((load.per_s() * 10.0).round() / 10.0);
            row
        })
        .collect()
}

/// A table for people.
#[must_use]
pub fn table(loads: &[Load]) -> String {
    let mut text = format!(
        "{:<14} {:>7} {:>6} {:>10} {:>10} {:>9}\n",
        "ms", "clients", "n", "p50", "p95", "per s"
    );
    for load in loads {
        let Series { op, times, .. } = &load.series;
        let [p50, p95] = [50, 95].map(|percent| percentile(times, percent).as_secs_f64() * 1e3);
        let (clients, n, per_s) = (load.clients, times.len(), load.per_s());
        let line =
            writeln!(text, "{op:<14} {clients:>7} {n:>6} {p50:>10.2} {p95:>10.2} {per_s:>9.1}");
        if line.is_err() {
            unreachable!("a string takes what is written to it");
        }
    }
    text
}

impl Load {
    /// Calls that were answered in a second, by all clients together.
    #[must_use]
    pub fn per_s(&self) -> f64 {
        let calls = u32::try_from(self.series.times.len()).unwrap_or(u32::MAX);
        f64::from(calls) / self.took.as_secs_f64().max(f64::EPSILON)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_result_of_code_counts() {
        let right = "{\"type\":\"number_of_executions\",\"execution_count\":1}\n\
                     {\"type\":\"result\",\"text\":\"2\"}\n{\"type\":\"end_of_execution\"}\n";
        executed(right.as_bytes()).unwrap();
        for wrong in ["", "{\"type\":\"result\",\"text\":\"3\"}\n", "{\"type\":\"error\"}\n", "2\n"]
        {
            assert!(executed(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_a_command_that_ended_with_0_counts() {
        let last = |text: &[u8]| {
            let mut bytes = frame(text);
            bytes[0] = END_OF_STREAM;
            bytes
        };
        let stream = |end: &[u8], finish: &[u8]| {
            [frame(br#"{"event":{"start":{"pid":7}}}"#), frame(end), last(finish)].concat()
        };
        let good = br#"{"event":{"end":{"exited":true,"status":"exit status 0"}}}"#;
        ended_well(&stream(good, b"{}")).unwrap();
        let failed = br#"{"event":{"end":{"exited":true,"exitCode":3}}}"#;
        assert!(ended_well(&stream(failed, b"{}")).is_err());
        assert!(ended_well(&stream(good, br#"{"error":{"code":"internal"}}"#)).is_err());
        let whole = stream(good, b"{}");
        for end in 0..whole.len() {
            assert!(ended_well(&whole[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn rows_are_those_of_the_engine_and_more() {
        let series =
            Series { op: "run_code_10", times: vec![Duration::from_millis(2); 20], floor: vec![] };
        let load = Load { series, clients: 10, took: Duration::from_millis(10) };
        let row = &rows(std::slice::from_ref(&load))[0];
        let expected = json!({"op": "run_code_10", "n": 20, "p50_us": 2000.0, "p95_us": 2000.0,
            "p99_us": 2000.0, "max_us": 2000.0, "floor_p50_us": null, "clients": 10, "per_s": 2000.0});
        assert_eq!(*row, expected);
        let table = table(&[load]);
        let last: Vec<&str> = table.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(last, ["run_code_10", "10", "20", "2.00", "2.00", "2000.0"]);
    }

    #[test]
    fn addresses_are_checked() {
        assert_eq!(address("http://127.0.0.1:3000/").unwrap().port(), 3000);
        for bad in ["127.0.0.1:3000", "https://127.0.0.1:3000", "http://127.0.0.1"] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }
}
