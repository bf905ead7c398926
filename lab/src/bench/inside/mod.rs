//! A static server inside a sandbox, and a client beside it: what the proxy adds is the difference between asking it
//! from outside and from there.
//!
//! Called by the table `exec`. Both are a few lines of Python, which the guest must have. Refuses every answer but the
//! server's, and takes the server away again.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::guest;
use super::host::{Host, Sandbox, Timed};
use crate::engine::client::Client;

const SERVER: &str = include_str!("server.py");
const CLIENT: &str = include_str!("client.py");
/// What the server says.
const BODY: &[u8] = b"hello from a sandbox";
/// Times that one run of the client prints at most: more would be no answer that [`Client`] reads.
const TIMES_MAX: usize = 100_000;

/// A server that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Server {
    /// Where it listens. Guests of a stand-in share a machine, so each has a port of its own.
    pub port: u16,
    process: u32,
}

/// What the client beside it found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Direct {
    /// From the first request to the last answer.
    pub wall: Duration,
    /// How long each answer took.
    pub times: Vec<Duration>,
}

impl Server {
    /// Starts it, and gives it back when it listens.
    ///
    /// # Errors
    /// When the guest has no Python, or cannot.
    pub fn start(host: &Host, sandbox: &Sandbox) -> Result<Self> {
        let mut envd = guest::envd(host, sandbox)?;
        let said = guest::python(&mut envd, SERVER, &[])
            .context("start a server in the sandbox; has it python3? --work leaves it out")?;
        let (port, process) = said.trim().split_once(' ').context("a server without a port")?;
        Ok(Self { port: port.parse()?, process: process.parse()? })
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn stop(self, host: &Host, sandbox: &Sandbox) -> Result<()> {
        let line = format!("kill {}", self.process);
        guest::command(&mut guest::envd(host, sandbox)?, &line).value
    }

    /// Asks it from inside, from so many clients, each so often.
    ///
    /// # Errors
    /// When a request fails.
    pub fn direct(
        self,
        host: &Host,
        sandbox: &Sandbox,
        clients: usize,
        calls: usize,
    ) -> Result<Direct> {
        let calls = calls.min(TIMES_MAX / clients.max(1)).max(1);
        let args = [usize::from(self.port), clients, calls].map(|number| number.to_string());
        let args = args.each_ref().map(String::as_str);
        let said = guest::python(&mut guest::envd(host, sandbox)?, CLIENT, &args)
            .context("ask the server in the sandbox")?;
        let found = direct_of(&said)?;
        let wanted = clients * calls;
        ensure!(found.times.len() == wanted, "{} answers of {wanted}", found.times.len());
        Ok(found)
    }
}

/// Asks a server over a connection to its port.
pub fn get(client: &mut Client) -> Timed<()> {
    let (begun, answer) = (Instant::now(), client.call("GET", "/", b"", 200));
    let took = begun.elapsed();
    let value = answer.and_then(|body| {
        let said = || String::from_utf8_lossy(&body).into_owned();
        ensure!(body == BODY, "not the server's answer: {}", said());
        Ok(())
    });
    Timed { begun, took, value }
}

/// What the client prints: how long all of it took, and each.
fn direct_of(said: &str) -> Result<Direct> {
    let mut numbers = said.split_whitespace().map(|one| Ok(Duration::from_nanos(one.parse()?)));
    let wall = numbers.next().context("a client that says nothing")??;
    Ok(Direct { wall, times: numbers.collect::<Result<_>>()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_client_prints_is_read() {
        let ns = Duration::from_nanos;
        let found = direct_of("900\n300 200\n400\n").unwrap();
        assert_eq!(found, Direct { wall: ns(900), times: vec![ns(300), ns(200), ns(400)] });
        for bad in ["", "900\nx", "-1\n"] {
            assert!(direct_of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn both_programs_know_what_the_server_says() {
        let body = std::str::from_utf8(BODY).unwrap();
        for program in [SERVER, CLIENT] {
            assert!(program.contains(&format!("BODY = b\"{body}\"\n")));
        }
    }
}
