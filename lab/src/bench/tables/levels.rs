//! `load-levels`: requests that come at a fixed rate, whatever became of those before; and what the daemon and its VM
//! processes take of the processors meanwhile.
//!
//! A request is due at its place in the rate, and its time begins then: one that waits because the host is slow counts with
//! its wait (no coordinated omission). Where all clients wait for answers, requests are sent late, and the row says
//! how many. Processor time is this machine's, where the host runs on it. Refuses to guess it elsewhere.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::super::guest;
use super::super::host::{Host, Sandbox, Timed, timed};
use super::super::load::{Failures, Round};
use super::super::row::{Row, number, tenth, us};
use super::super::table::Table;
use super::super::usage::{Usage, Watch};
use super::rounds::{ids, make};
use super::{CLIENTS_MAX, Measure, seconds};
use crate::engine::client::Client;
use crate::engine::series::percentile;

/// A request that is sent so long after it was due was late.
const LATE: Duration = Duration::from_millis(1);
/// Longest sleep before the next look whether the run is to end.
const NAP: Duration = Duration::from_millis(100);
/// Processor time without load is taken over so long.
const IDLE: Duration = Duration::from_secs(1);

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Request {
    /// `fibonacci(10)` in Python, in the code interpreter of a sandbox.
    Execute,
    /// `true` through envd.
    Command,
    /// `GET /sandboxes/{id}`: the control plane alone.
    Get,
    /// `GET /health`: the least that the daemon can be asked.
    Health,
}

/// Processor time of the daemon and of its VM processes, by requests in a second.
#[derive(Args, Debug)]
pub struct Levels {
    /// Requests in a second; several, separated by commas, are measured one after the other.
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_values_t = [10, 100, 500, 1000],
        value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rates: Vec<u32>,
    /// How long each rate is kept.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    seconds: Duration,
    /// What is asked for.
    #[arg(long, value_enum, default_value_t = Request::Execute)]
    request: Request,
    /// Sandboxes that share the requests.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    sandboxes: u16,
    /// Clients that share the requests: more than one waits for at once.
    #[arg(short, long, value_name = "N", default_value_t = 64,
        value_parser = clap::value_parser!(u16).range(1..=i64::from(CLIENTS_MAX)))]
    concurrency: u16,
    /// The daemon, where it cannot be found by its port.
    #[arg(long, value_name = "PID")]
    daemon_pid: Option<u32>,
}

impl Measure for Levels {
    fn name(&self) -> &'static str {
        "load-levels"
    }

    fn options(&self) -> Value {
        let request = self.request.to_possible_value().map(|value| value.get_name().to_owned());
        json!({
            "rates": self.rates, "seconds": self.seconds.as_secs_f64(), "request": request,
            "sandboxes": self.sandboxes, "concurrency": self.concurrency,
        })
    }

    fn measure(&self, host: &Host, table: &mut Table) -> Result<()> {
        let watch = Watch::of(host, self.daemon_pid, table);
        let needs_none = self.request == Request::Health;
        let count = if needs_none { 0 } else { usize::from(self.sandboxes) };
        let sandboxes = make(host, &host.address.template, count)?;
        let idle = watch.as_ref().map(|watch| idle(host, watch)).transpose()?;
        for rate in &self.rates {
            let clients = self.clients(host, &sandboxes)?;
            let sees_all = watch.as_ref().is_some_and(Watch::sees_all);
            table.row(host, self.row(*rate, sees_all), |row| {
                if let Some((used, wall)) = idle {
                    used.fields(row, "idle_percent", |time| percent(time, wall));
                }
                self.level(host, row, *rate, watch.as_ref(), clients)
            })?;
        }
        host.remove(&ids(&sandboxes), &[])
    }
}

/// A client, and the sandbox that it asks for.
struct Asker {
    client: Client,
    sandbox: Option<Sandbox>,
}

impl Levels {
    /// The published figures are of code that is run, and of all that it takes of the host.
    fn row(&self, rate: u32, sees_all: bool) -> Row {
        let row = Row::new("load", format!("{rate}/s"), self.concurrency.into());
        match self.request {
            Request::Execute if sees_all => {
                row.beside(usize::try_from(rate).unwrap_or(usize::MAX), 0)
            }
            _ => row,
        }
    }

    /// Clients whose connections are warm.
    fn clients(&self, host: &Host, sandboxes: &[Sandbox]) -> Result<Vec<Asker>> {
        let mut askers = Vec::new();
        for index in 0..usize::from(self.concurrency) {
            let sandbox = sandboxes.get(index % sandboxes.len().max(1)).cloned();
            let mut asker = Asker { client: self.open(host, sandbox.as_ref())?, sandbox };
            self.ask(&mut asker).value?;
            askers.push(asker);
            host.go_on()?;
        }
        Ok(askers)
    }

    fn open(&self, host: &Host, sandbox: Option<&Sandbox>) -> Result<Client> {
        match (self.request, sandbox) {
            (Request::Execute, Some(sandbox)) => guest::interpreter(host, sandbox),
            (Request::Command, Some(sandbox)) => guest::envd(host, sandbox),
            _ => host.client(),
        }
    }

    fn ask(&self, asker: &mut Asker) -> Timed<()> {
        let client = &mut asker.client;
        match (self.request, &asker.sandbox) {
            (Request::Execute, _) => {
                let code =
                    "def f(n):\n    return n if n <= 1 else f(n - 1) + f(n - 2)\nprint(f(10))";
                guest::cell_that_says(client, "python", code, "55")
            }
            (Request::Command, _) => guest::command(client, "true"),
            (Request::Get, Some(sandbox)) => {
                let path = format!("/sandboxes/{}", sandbox.id);
                timed(client, "GET", &path, &Value::Null, &[200]).and_then(|_| Ok(()))
            }
            (Request::Get | Request::Health, _) => {
                let begun = Instant::now();
                let value = client.call("GET", "/health", b"", 200).map(drop);
                Timed { begun, took: begun.elapsed(), value }
            }
        }
    }

    /// One rate.
    fn level(
        &self,
        host: &Host,
        row: &mut Row,
        rate: u32,
        watch: Option<&Watch>,
        askers: Vec<Asker>,
    ) -> Result<()> {
        let total = (f64::from(rate) * self.seconds.as_secs_f64()).ceil().max(1.0);
        let next = AtomicU64::new(0);
        let before = watch.map(Watch::now).transpose()?;
        let begun = Instant::now();
        let due = |index: u64| {
            let index = f64::from(u32::try_from(index).unwrap_or(u32::MAX));
            (index < total).then(|| begun + Duration::from_secs_f64(index / f64::from(rate)))
        };
        let done: Vec<Result<Vec<Sent>>> = thread::scope(|scope| {
            let (next, due) = (&next, &due);
            let begin = |asker| scope.spawn(move || self.client(host, asker, next, due));
            let threads: Vec<_> = askers.into_iter().map(begin).collect();
            let panicked = |_| Err(anyhow!("a client panicked"));
            threads.into_iter().map(|one| one.join().unwrap_or_else(panicked)).collect()
        });
        let wall = begun.elapsed();
        let after = watch.map(Watch::now).transpose()?;
        host.go_on()?;
        let sent: Vec<Sent> =
            done.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        let count = sent.len();
        row.set("rate_per_s", rate);
        row.set("sent_late", sent.iter().filter(|one| one.late > LATE).count());
        let service: Vec<Duration> = sent.iter().map(|one| one.service).collect();
        row.set("service_p50_us", us(percentile(&service, 50)));
        row.set("service_p99_us", us(percentile(&service, 99)));
        if let (Some(before), Some(after)) = (before, after) {
            let used = after.since(before);
            used.fields(row, "cpu_percent", |time| percent(time, wall));
            used.fields(row, "cpu_us_per_request", |time| tenth(us(time) / number(count.max(1))));
        }
        row.add(round_of(sent, wall));
        Ok(())
    }

    /// Takes the next request that is due, until there are no more.
    fn client(
        &self,
        host: &Host,
        mut asker: Asker,
        next: &AtomicU64,
        due: &(impl Fn(u64) -> Option<Instant> + Sync),
    ) -> Result<Vec<Sent>> {
        let mut sent = Vec::new();
        while let Some(due) = due(next.fetch_add(1, Ordering::Relaxed)) {
            while let Some(left) = due.checked_duration_since(Instant::now()) {
                if host.stopped() {
                    return Ok(sent);
                }
                thread::sleep(left.min(NAP));
            }
            if !asker.client.is_open() {
                asker.client = self.open(host, asker.sandbox.as_ref())?;
            }
            let asked = self.ask(&mut asker);
            let end = asked.begun + asked.took;
            sent.push(Sent {
                late: asked.begun.saturating_duration_since(due),
                service: asked.took,
                took: end.saturating_duration_since(due),
                error: asked.value.err(),
            });
        }
        Ok(sent)
    }
}

/// One request.
struct Sent {
    /// How long after it was due it was sent.
    late: Duration,
    /// From then to its answer.
    service: Duration,
    /// From when it was due to its answer.
    took: Duration,
    error: Option<anyhow::Error>,
}

fn round_of(sent: Vec<Sent>, wall: Duration) -> Round<()> {
    let (mut times, mut failures) = (Vec::new(), Failures::default());
    for one in sent {
        match one.error {
            None => times.push(one.took),
            Some(error) => failures.add(&error),
        }
    }
    Round { wall, values: Vec::new(), times, failures }
}

/// Of all processors of the machine, as reports say it.
fn percent(used: Duration, wall: Duration) -> f64 {
    let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let all = wall.as_secs_f64() * number(cores);
    (used.as_secs_f64() / all.max(f64::EPSILON) * 1e4).round() / 1e2
}

/// What is used while nobody asks for anything, and for how long that was looked at.
fn idle(host: &Host, watch: &Watch) -> Result<(Usage, Duration)> {
    let (begun, before) = (Instant::now(), watch.now()?);
    host.rest(IDLE);
    Ok((watch.now()?.since(before), begun.elapsed()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        levels: Levels,
    }

    #[test]
    fn requests_that_run_no_code_have_no_figure_beside_them() {
        let row = |request, sees_all| {
            let words = ["load-levels", "--request", request];
            Cli::try_parse_from(words).unwrap().levels.row(10, sees_all)
        };
        assert_eq!(row("execute", true).seed.unwrap().values, [8.0]);
        assert_eq!(row("execute", false).seed, None, "without the guests' part");
        for request in ["command", "get", "health"] {
            assert_eq!(row(request, true).seed, None, "{request}");
        }
    }
}
