//! `clone`: so many copies of a running sandbox.
//!
//! In two ways. `client` is how CubeSandbox's SDK does it: a snapshot, so many creates from it from so many
//! clients, and the snapshot is deleted; all of that is the time of a round. `request` is the one request that this host
//! offers, which all copies come from. Refuses more copies than one request may ask for.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::super::guest;
use super::super::host::{Host, Sandbox};
use super::super::load::{Round, round};
use super::super::row::Row;
use super::super::table::Table;
use super::dirty::MEGABYTES_MAX;
use super::rounds::{ids, make};
use super::{CLIENTS_MAX, Measure, pairs, seconds};

/// Who makes a clone of its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// The client, as CubeSandbox's SDK.
    Client,
    /// The host, asked once.
    Request,
}

/// Copies of a running sandbox.
#[derive(Args, Debug)]
pub struct Clones {
    /// Copies: several, separated by commas, are measured one after the other.
    #[arg(short = 'n', long, value_name = "N", value_delimiter = ',',
        default_values_t = [1, 100, 100, 100], value_parser = clap::value_parser!(u16).range(1..=1000))]
    count: Vec<u16>,
    /// Clients at once, where the client makes a clone of its parts: one number, or one for each count.
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_values_t = [1, 10, 20, 50],
        value_parser = clap::value_parser!(u16).range(1..=i64::from(CLIENTS_MAX)))]
    concurrency: Vec<u16>,
    /// Rounds: one number, or one for each count. Default: 5 of one copy, 2 of more.
    #[arg(long, value_name = "N", value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: Vec<u32>,
    /// Megabytes that the sandbox writes to its memory before.
    #[arg(short, long, value_name = "MB", default_value_t = 0,
        value_parser = clap::value_parser!(u32).range(0..=MEGABYTES_MAX))]
    dirty: u32,
    /// Who makes a clone of its parts.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Way::Client, Way::Request])]
    way: Vec<Way>,
    /// Rest after each round.
    #[arg(short, long, value_name = "SECONDS", default_value = "0.2", value_parser = seconds)]
    settle: Duration,
}

/// One row to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Case {
    way: Way,
    count: usize,
    clients: usize,
    rounds: u32,
}

impl Clones {
    fn cases(&self) -> Result<Vec<Case>> {
        // One option alone is no pair: then the other is for all of it.
        let clients = match (self.count.len(), self.concurrency.len()) {
            (1, many) if many > 1 => {
                let counts = self.count.iter().copied().cycle().take(many);
                counts.zip(self.concurrency.iter().copied()).collect()
            }
            _ => pairs(&self.count, &self.concurrency, ("-n", "-c"))?,
        };
        let usual: Vec<u32> =
            clients.iter().map(|(count, _)| if *count == 1 { 5 } else { 2 }).collect();
        let rounds = if self.rounds.is_empty() { &usual } else { &self.rounds };
        let mut cases: Vec<Case> = Vec::new();
        for ((count, clients), rounds) in pairs(&clients, rounds, ("-n", "--rounds"))? {
            for way in &self.way {
                // One request has no clients: the same number of copies is one case.
                let clients = if *way == Way::Request { 1 } else { usize::from(clients) };
                let case = Case { way: *way, count: usize::from(count), clients, rounds };
                if !cases.contains(&case) {
                    cases.push(case);
                }
            }
        }
        Ok(cases)
    }

    /// The published figures are of a sandbox that wrote nothing.
    fn row(&self, case: Case) -> Row {
        let Case { way, count, clients, .. } = case;
        let written = match self.dirty {
            0 => String::new(),
            megabytes => format!(" d={megabytes}"),
        };
        let row = match way {
            Way::Client => Row::new("clone", format!("n={count} c={clients}{written}"), clients),
            Way::Request => Row::new("clone_request", format!("n={count}{written}"), 1),
        };
        let mut row = if self.dirty == 0 { row.beside(count, clients) } else { row };
        row.set("copies", count);
        row
    }

    fn case(&self, host: &Host, table: &mut Table, case: Case) -> Result<()> {
        let Case { way, count, clients, rounds } = case;
        table.row(host, self.row(case), |row| {
            for number in 0..=rounds {
                host.go_on()?;
                let source = make(host, &host.address.template, 1)?;
                let sandbox = source.first().context("no sandbox")?;
                if self.dirty > 0 {
                    guest::fill(host, sandbox, self.dirty)?;
                }
                let done = match way {
                    Way::Client => by_client(host, sandbox, count, clients),
                    Way::Request => by_request(host, sandbox, count),
                };
                if self.dirty > 0 {
                    guest::empty(host, sandbox)?;
                }
                let done = done?;
                let made = if number > 0 { row.add(done) } else { done.all("warm up")? };
                let mut left: Vec<String> =
                    made.concat().iter().map(|one| one.id.clone()).collect();
                left.extend(ids(&source));
                host.remove(&left, &[])?;
                host.rest(self.settle);
            }
            Ok(())
        })
    }
}

impl Measure for Clones {
    fn name(&self) -> &'static str {
        "clone"
    }

    fn options(&self) -> Value {
        json!({
            "count": self.count, "concurrency": self.concurrency, "rounds": self.rounds,
            "dirty_mb": self.dirty, "settle_s": self.settle.as_secs_f64(),
        })
    }

    fn measure(&self, host: &Host, table: &mut Table) -> Result<()> {
        ensure!(!self.way.is_empty(), "--way takes client, request, or both");
        for case in self.cases()? {
            self.case(host, table, case)?;
        }
        Ok(())
    }
}

/// A snapshot, the creates, and its end: the times are those of the creates, the round is all of it.
fn by_client(
    host: &Host,
    sandbox: &Sandbox,
    count: usize,
    clients: usize,
) -> Result<Round<Vec<Sandbox>>> {
    let mut client = host.client()?;
    let begun = Instant::now();
    let snapshot = host.snapshot(&mut client, &sandbox.id).value?;
    let made = round(host, clients, 0..count, |client, _| {
        host.create(client, &snapshot).and_then(|copy| Ok(vec![copy]))
    });
    let deleted = host.delete_snapshot(&mut client, &snapshot).value;
    let wall = begun.elapsed();
    host.give_back(client);
    let mut made = made?;
    made.wall = wall;
    if let Err(error) = deleted {
        made.failures.add(&error.context("delete the snapshot"));
    }
    Ok(made)
}

fn by_request(host: &Host, sandbox: &Sandbox, count: usize) -> Result<Round<Vec<Sandbox>>> {
    round(host, 1, [sandbox], |client, one| host.clone_in_one(client, &one.id, count))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        clones: Clones,
    }

    fn cases(words: &[&str]) -> Vec<(Way, usize, usize, u32)> {
        let clones = Cli::try_parse_from([&["clone"], words].concat()).unwrap().clones;
        let all = clones.cases().unwrap().into_iter();
        all.map(|case| (case.way, case.count, case.clients, case.rounds)).collect()
    }

    #[test]
    fn without_options_it_is_the_table_of_the_report_and_the_one_request() {
        let (client, request) = (Way::Client, Way::Request);
        assert_eq!(
            cases(&[]),
            [
                (client, 1, 1, 5),
                (request, 1, 1, 5),
                (client, 100, 10, 2),
                (request, 100, 1, 2),
                (client, 100, 20, 2),
                (client, 100, 50, 2),
            ]
        );
        // As CubeSandbox's script is called.
        let one = cases(&["-n", "100", "-c", "10", "--rounds", "3", "--way", "client"]);
        assert_eq!(one, [(client, 100, 10, 3)]);
    }

    #[test]
    fn copies_of_one_that_wrote_something_have_no_figure_beside_them() {
        let row = |words: &[&str]| {
            let words = [&["clone", "-n", "100", "-c", "50"], words].concat();
            let clones = Cli::try_parse_from(words).unwrap().clones;
            clones.row(clones.cases().unwrap()[0])
        };
        assert_eq!(row(&[]).seed.unwrap().values[0], 540.9);
        let written = row(&["-d", "64"]);
        assert_eq!((written.case.as_str(), written.seed), ("n=100 c=50 d=64", None));
    }
}
