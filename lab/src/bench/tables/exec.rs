//! `exec`: what a client waits for code and for a command in a sandbox that is warm, from one client and from many at
//! once: `1+1` in the code interpreter, `true` through envd. And for the proxy alone: a static server in the sandbox,
//! asked through it, and from beside the server.
//!
//! A table of its own because its clients share sandboxes, each over a connection that it keeps. They connect one after the
//! other, each when the one before was answered: a port that QEMU forwards has room for one connection that nobody has
//! taken yet, and those above it are reset once they have sent something. Refuses every answer but the right one: a
//! call that says something else has failed.

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::super::guest;
use super::super::host::{Host, Sandbox, Timed};
use super::super::inside::{Direct, Server, get};
use super::super::load::{Failures, Round, sum};
use super::super::row::{Row, tenth, us};
use super::super::table::Table;
use super::{CLIENTS_MAX, Measure};
use crate::engine::client::Client;
use crate::engine::series::percentile;

/// What `SoulBox`'s report counts in a second.
const FIBONACCI: &str = "def fibonacci(n):\n    if n <= 1:\n        return n\n    return fibonacci(n-1) + fibonacci(n-2)\n\n\
     result = fibonacci(10)\nprint(f\"Fibonacci(10) = {result}\")";

/// Code and commands in warm sandboxes, by clients.
#[derive(Args, Debug)]
pub struct Exec {
    /// Clients at once; several, separated by commas, are measured one after the other.
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_values_t = [1, 10, 100],
        value_parser = clap::value_parser!(u16).range(1..=i64::from(CLIENTS_MAX)))]
    concurrency: Vec<u16>,
    /// Sandboxes that the clients share. Cells of one sandbox run one after the other.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    sandboxes: u16,
    /// How often everything is done at each number of clients, and at least once by each.
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    calls: u32,
    /// What is done; several, separated by commas. The report that has this table counts fibonacci.
    #[arg(long, value_name = "WORK", value_delimiter = ',', value_enum,
        default_values_t = [Work::RunCode, Work::Command, Work::Get])]
    work: Vec<Work>,
}

/// What is done again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Work {
    /// `1+1` in the code interpreter.
    RunCode,
    /// `true` through envd.
    Command,
    /// A static server in the sandbox, through the proxy and from beside it.
    Get,
    /// `fibonacci(10)` in the code interpreter, as `SoulBox`'s report has it.
    Fibonacci,
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Self::RunCode => "run_code",
            Self::Command => "command",
            Self::Get => "proxy_get",
            Self::Fibonacci => "fibonacci",
        }
    }

    fn open(self, host: &Host, place: &Place) -> Result<Client> {
        let sandbox = &place.sandbox;
        match self {
            Self::RunCode | Self::Fibonacci => guest::interpreter(host, sandbox),
            Self::Command => guest::envd(host, sandbox),
            Self::Get => host.by_name(sandbox, place.server.context("no server")?.port),
        }
    }

    fn once(self, client: &mut Client) -> Timed<()> {
        match self {
            Self::RunCode => guest::code(client, "1+1", "2"),
            Self::Command => guest::command(client, "true"),
            Self::Get => get(client),
            Self::Fibonacci => guest::code(client, FIBONACCI, "Fibonacci(10) = 55\n"),
        }
    }
}

/// A sandbox that clients share, and the server in it if one is asked for.
struct Place {
    sandbox: Sandbox,
    server: Option<Server>,
}

impl Measure for Exec {
    fn name(&self) -> &'static str {
        "exec"
    }

    fn options(&self) -> Value {
        let name = |work: &Work| work.to_possible_value().map(|value| value.get_name().to_owned());
        let work: Vec<_> = self.work.iter().filter_map(name).collect();
        json!({
            "concurrency": self.concurrency, "sandboxes": self.sandboxes, "calls": self.calls,
            "work": work,
        })
    }

    fn measure(&self, host: &Host, table: &mut Table) -> Result<()> {
        let mut control = host.client()?;
        let mut places = Vec::new();
        for _ in 0..self.sandboxes {
            let made = host.create(&mut control, &host.address.template).value;
            let sandbox = made.context("make the sandboxes")?;
            let asked = self.work.contains(&Work::Get);
            let server = asked.then(|| Server::start(host, &sandbox)).transpose()?;
            places.push(Place { sandbox, server });
            host.go_on()?;
        }
        for clients in &self.concurrency {
            for work in &self.work {
                self.rows(host, table, &places, *work, usize::from(*clients))?;
            }
        }
        for Place { sandbox, server } in &places {
            server.map_or(Ok(()), |server| server.stop(host, sandbox))?;
            host.kill(&mut control, &sandbox.id).value?;
        }
        host.give_back(control);
        Ok(())
    }
}

/// A client, and where it asks.
struct Asker<'p> {
    client: Client,
    place: &'p Place,
}

/// Clients whose connections are warm.
fn askers<'p>(
    host: &Host,
    places: &'p [Place],
    work: Work,
    clients: usize,
) -> Result<Vec<Asker<'p>>> {
    let warm = |place| {
        host.go_on()?;
        let mut asker = Asker { client: work.open(host, place)?, place };
        work.once(&mut asker.client).value?;
        Ok(asker)
    };
    places.iter().cycle().take(clients).map(warm).collect()
}

impl Exec {
    /// The row of one work at one number of clients; the proxy's has that of the server alone before it.
    fn rows(
        &self,
        host: &Host,
        table: &mut Table,
        places: &[Place],
        work: Work,
        clients: usize,
    ) -> Result<()> {
        let direct = if work == Work::Get {
            let measure = |row: &mut Row| self.direct(host, row, places, clients);
            Some(table.row(host, row("direct_get", clients), measure)?)
        } else {
            None
        };
        let askers = askers(host, places, work, clients)
            .with_context(|| format!("warm {clients} clients up for {}", work.name()))?;
        table.row(host, row(work.name(), clients), |row| {
            self.level(host, row, work, askers)?;
            if let (Some(direct), false) = (direct, row.times.is_empty()) {
                let added = us(percentile(&row.times, 50)) - us(direct);
                row.set("added_us", tenth(added));
            }
            Ok(())
        })
    }

    /// The servers asked by as many clients, which are where the servers are. Gives the median.
    fn direct<'p>(
        &self,
        host: &Host,
        row: &mut Row,
        places: &'p [Place],
        clients: usize,
    ) -> Result<Duration> {
        let calls = usize::try_from(self.calls)?.div_ceil(clients);
        // As many for each as those that come through the proxy.
        let share = |number| (clients + places.len() - 1 - number) / places.len();
        let shares = places.iter().enumerate().map(|(number, place)| (place, share(number)));
        let found: Vec<Result<Direct>> = thread::scope(|scope| {
            let begin = |(place, share): (&'p Place, usize)| {
                scope.spawn(move || {
                    let server = place.server.context("no server")?;
                    server.direct(host, &place.sandbox, share, calls)
                })
            };
            let threads: Vec<_> = shares.filter(|(_, share)| *share > 0).map(begin).collect();
            let panicked = |_| Err(anyhow!("a client panicked"));
            threads.into_iter().map(|one| one.join().unwrap_or_else(panicked)).collect()
        });
        host.go_on()?;
        let found: Vec<Direct> = found.into_iter().collect::<Result<_>>()?;
        let wall = found.iter().map(|one| one.wall).max().unwrap_or_default();
        let times: Vec<Duration> = found.into_iter().flat_map(|one| one.times).collect();
        row.add(Round { wall, values: Vec::<()>::new(), times, failures: Failures::default() });
        as_before(row, clients);
        Ok(percentile(&row.times, 50))
    }

    /// One row: every client calls as soon as it has its last answer.
    fn level(&self, host: &Host, row: &mut Row, work: Work, askers: Vec<Asker<'_>>) -> Result<()> {
        let clients = askers.len();
        let calls = usize::try_from(self.calls)?.div_ceil(clients);
        let ready = Barrier::new(clients);
        let done: Vec<Result<Vec<Timed<()>>>> = thread::scope(|scope| {
            let begin = |asker| {
                let ready = &ready;
                scope.spawn(move || {
                    ready.wait();
                    again(host, asker, work, calls)
                })
            };
            let threads: Vec<_> = askers.into_iter().map(begin).collect();
            let panicked = |_| Err(anyhow!("a client panicked"));
            threads.into_iter().map(|one| one.join().unwrap_or_else(panicked)).collect()
        });
        host.go_on()?;
        let done: Vec<_> = done.into_iter().collect::<Result<Vec<_>>>()?;
        row.add(sum(done.into_iter().flatten().collect())?);
        as_before(row, clients);
        Ok(())
    }
}

/// The row of a work at a number of clients, with what is published of that.
fn row(name: &str, clients: usize) -> Row {
    Row::new(&format!("{name}_{clients}"), String::new(), clients).beside(clients, 0)
}

/// Two fields as this table's rows called them before there were other tables.
fn as_before(row: &mut Row, clients: usize) {
    row.set("clients", clients);
    row.set("per_s", row.per_s().map(tenth));
}

/// So many calls of one client. One that breaks its connection is counted, and the next has a new one.
fn again(host: &Host, mut asker: Asker<'_>, work: Work, calls: usize) -> Result<Vec<Timed<()>>> {
    let mut done = Vec::with_capacity(calls);
    while done.len() < calls && !host.stopped() {
        if !asker.client.is_open() {
            asker.client = work.open(host, asker.place)?;
        }
        done.push(work.once(&mut asker.client));
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        exec: Exec,
    }

    #[test]
    fn the_command_of_the_documentation_has_a_figure_beside_every_row() {
        let docs = include_str!("../../../../docs/benchmarks.md");
        let line = docs.lines().find(|line| line.starts_with("| 2, throughput by clients |"));
        let command = line.unwrap().split('`').nth(1).unwrap();
        assert!(docs.lines().any(|line| line == format!("$ {command}")), "{command}");
        let words = command.split_whitespace().skip(2);
        let Exec { concurrency, work, .. } = Cli::try_parse_from(words).unwrap().exec;
        for work in &work {
            for clients in concurrency.iter().copied().map(usize::from) {
                assert!(row(work.name(), clients).seed.is_some(), "{work:?} of {clients}");
            }
        }
        assert_eq!(concurrency.len(), 5, "as many rows as the report has");
        assert!(row("run_code", 10).seed.is_none(), "nobody else's work");
    }

    #[test]
    fn the_levels_and_the_work_of_the_report_can_be_asked_for() {
        let words = ["exec", "-c", "1,10,100,500,1000", "--work", "fibonacci"];
        let Exec { concurrency, work, .. } = Cli::try_parse_from(words).unwrap().exec;
        assert_eq!((concurrency, work), (vec![1, 10, 100, 500, 1000], vec![Work::Fibonacci]));
        let usual = Cli::try_parse_from(["exec"]).unwrap().exec;
        assert_eq!(usual.options()["work"], json!(["run-code", "command", "get"]));
        assert!(Cli::try_parse_from(["exec", "--work", "nothing"]).is_err());
    }
}
