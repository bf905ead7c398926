//! `create`: sandboxes from a template, by concurrency. CubeSandbox's cube-bench, with its options.
//!
//! The time of one is from before the request is sent until its whole answer is there. With `create-only` everything
//! stays alive until the row is done, as there. Then it is killed, and what all of it took of the processors is in the row,
//! where that is to be seen: a life that runs no code, from its VM process being made for the pool to its end. Refuses to
//! begin where the first warm-up fails.

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::super::host::{Host, Sandbox, Timed};
use super::super::load::{Failures, Round, round};
use super::super::row::{Row, number, tenth, us};
use super::super::table::Table;
use super::super::usage::{Usage, Watch};
use super::{CLIENTS_MAX, Measure, pairs};

/// What is done with each sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// It stays until the row is done.
    CreateOnly,
    /// It is killed at once, and the kills have rows of their own.
    CreateDelete,
}

/// Sandboxes from the template, by concurrency.
#[derive(Args, Debug)]
pub struct Create {
    /// Clients at once; several, separated by commas, are measured one after the other.
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_values_t = [1, 10, 20, 50],
        value_parser = clap::value_parser!(u16).range(1..=i64::from(CLIENTS_MAX)))]
    concurrency: Vec<u16>,
    /// Sandboxes in total: one number, or one for each concurrency. Default: 20, 200, 300 and 500 at 1, 10, 20
    /// and 50 clients, ten times the concurrency at others.
    #[arg(short = 'n', long, value_name = "N", value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    total: Vec<u32>,
    /// Rounds of warm-up, one sandbox for each client, whose results are discarded.
    #[arg(short, long, value_name = "ROUNDS", default_value_t = 3,
        value_parser = clap::value_parser!(u16).range(0..=100))]
    warmup: u16,
    /// What is done with each sandbox.
    #[arg(short, long, value_enum, default_value_t = Mode::CreateOnly)]
    mode: Mode,
}

impl Create {
    fn levels(&self) -> Result<Vec<(u16, u32)>> {
        if !self.total.is_empty() {
            return pairs(&self.concurrency, &self.total, ("-c", "-n"));
        }
        // Those of the report.
        let usual = |clients: u16| match clients {
            1 => 20,
            10 => 200,
            20 => 300,
            50 => 500,
            _ => 10 * u32::from(clients),
        };
        Ok(self.concurrency.iter().map(|clients| (*clients, usual(*clients))).collect())
    }

    /// The published figures are of sandboxes that stay: kills in between are in none of them.
    fn row(&self, clients: usize) -> Row {
        let row = Row::new("create", format!("c={clients}"), clients);
        if self.mode == Mode::CreateOnly { row.beside(clients, 0) } else { row }
    }

    fn level(
        &self,
        host: &Host,
        table: &mut Table,
        watch: Option<&Watch>,
        (clients, total): (usize, u32),
    ) -> Result<()> {
        let template = host.address.template.as_str();
        for _ in 0..self.warmup {
            let warm = round(host, clients, 0..clients, |client, _| host.create(client, template))?;
            kill_all(host, &warm.all("warm up")?)?;
        }
        let create = self.row(clients);
        let before = at_rest(host, watch)?;
        match self.mode {
            Mode::CreateOnly => table.row(host, create, |row| {
                let done =
                    round(host, clients, 0..total, |client, _| host.create(client, template))?;
                let made = row.add(done);
                kill_all(host, &made)?;
                spent(row, before, at_rest(host, watch)?);
                Ok(())
            }),
            Mode::CreateDelete => {
                let mut delete = Row::new("delete", format!("c={clients}"), clients);
                table.row(host, create, |row| {
                    let (made, kills) = both(host, clients, total)?;
                    row.add(made);
                    delete.add(kills);
                    spent(row, before, at_rest(host, watch)?);
                    Ok(())
                })?;
                table.push(delete);
                Ok(())
            }
        }
    }
}

impl Measure for Create {
    fn name(&self) -> &'static str {
        "create"
    }

    fn options(&self) -> Value {
        let mode = self.mode.to_possible_value().map(|value| value.get_name().to_owned());
        json!({
            "concurrency": self.concurrency, "total": self.total, "warmup": self.warmup, "mode": mode,
        })
    }

    fn measure(&self, host: &Host, table: &mut Table) -> Result<()> {
        // To come to rest takes a moment, in which a run of requests alone would measure nothing.
        let watch = if table.is_of_requests_alone() { None } else { Watch::of(host, None, table) };
        for (clients, total) in self.levels()? {
            self.level(host, table, watch.as_ref(), (clients.into(), total))?;
        }
        Ok(())
    }
}

/// What was used until now, once what came before is done.
fn at_rest(host: &Host, watch: Option<&Watch>) -> Result<Option<Usage>> {
    watch.map(|watch| watch.at_rest(host)).transpose()
}

/// What each life took of the processors. One that failed took some too, so that of such rows nothing is said.
fn spent(row: &mut Row, before: Option<Usage>, after: Option<Usage>) {
    let lives = row.times.len();
    if let (Some(before), Some(after), true) =
        (before, after, lives > 0 && row.failures.total() == 0)
    {
        let each = |time| tenth(us(time) / number(lives));
        after.since(before).fields(row, "cpu_us_per_create", each);
    }
}

/// Each sandbox is killed by the client that made it, before it makes the next.
fn both(host: &Host, clients: usize, total: u32) -> Result<(Round<()>, Round<()>)> {
    let template = host.address.template.as_str();
    let done = round(host, clients, 0..total, |client, _| {
        let made = host.create(client, template);
        let killed = made.value.as_ref().ok().map(|sandbox| host.kill(client, &sandbox.id));
        Timed { begun: made.begun, took: made.took, value: made.value.map(|_| killed) }
    })?;
    let (wall, count) = (done.wall, done.values.len());
    let (mut times, mut failures) = (Vec::new(), Failures::default());
    for kill in done.values.into_iter().flatten() {
        match kill.value {
            Ok(()) => times.push(kill.took),
            Err(error) => failures.add(&error),
        }
    }
    let kills = Round { wall, values: vec![(); times.len()], times, failures };
    let values = vec![(); count];
    Ok((Round { wall, values, times: done.times, failures: done.failures }, kills))
}

/// Ends what a row has made.
///
/// # Errors
/// When something stays.
pub fn kill_all(host: &Host, made: &[Sandbox]) -> Result<()> {
    let ids: Vec<String> = made.iter().map(|sandbox| sandbox.id.clone()).collect();
    host.remove(&ids, &[])
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        create: Create,
    }

    fn levels(words: &[&str]) -> Result<Vec<(u16, u32)>> {
        Cli::try_parse_from([&["create"], words].concat())?.create.levels()
    }

    #[test]
    fn what_a_life_took_is_said_of_rows_in_which_none_failed() {
        let us = std::time::Duration::from_micros;
        let before = Usage { daemon: us(500), vms: Some(us(1000)) };
        let after = Usage { daemon: us(2500), vms: Some(us(17_000)) };
        let mut row = Row { times: vec![us(7); 4], ..Row::default() };
        spent(&mut row, Some(before), Some(after));
        let field = |row: &Row, name: &str| row.more.get(name).and_then(Value::as_f64);
        assert_eq!(field(&row, "daemon_cpu_us_per_create"), Some(500.0));
        assert_eq!(field(&row, "vms_cpu_us_per_create"), Some(4000.0));
        assert_eq!(field(&row, "cpu_us_per_create"), Some(4500.0));
        let mut failed = Row { times: vec![us(7); 4], ..Row::default() };
        failed.failures.add(&anyhow::anyhow!("full"));
        spent(&mut failed, Some(before), Some(after));
        let mut unseen = Row { times: vec![us(7); 4], ..Row::default() };
        spent(&mut unseen, None, None);
        assert!(failed.more.is_empty() && unseen.more.is_empty());
    }

    #[test]
    fn creates_between_kills_have_no_figure_beside_them() {
        let row = |mode| Cli::try_parse_from(["create", "-m", mode]).unwrap().create.row(10);
        assert_eq!(row("create-only").seed.unwrap().values[0], 88.7);
        assert_eq!(row("create-delete").seed, None);
    }

    #[test]
    fn without_options_it_is_the_table_of_the_report() {
        assert_eq!(levels(&[]).unwrap(), [(1, 20), (10, 200), (20, 300), (50, 500)]);
        assert_eq!(levels(&["-c", "5,50"]).unwrap(), [(5, 50), (50, 500)]);
        assert_eq!(levels(&["-c", "5,50", "-n", "7"]).unwrap(), [(5, 7), (50, 7)]);
        assert!(levels(&["-c", "1,2,3", "-n", "7,8"]).is_err());
        assert!(levels(&["-c", "0"]).is_err() && levels(&["-c", "2001"]).is_err());
    }
}
