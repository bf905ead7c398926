//! What the tables of rounds have in common: so many operations at once, so many rounds, a rest in between.
//!
//! Called by the tables of snapshots, rollbacks and pauses. A round more warms up, and is discarded. Refuses to
//! let one round run into the next.

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use super::super::host::{Host, Sandbox};
use super::super::load::round;
use super::{CLIENTS_MAX, pairs, seconds};

/// Clients that make what is not measured.
const MAKERS: usize = 8;

/// Options of a table of rounds.
#[derive(Args, Clone, Debug)]
pub struct Rounds {
    /// Operations at once, each on a sandbox of its own; several, separated by commas, are measured one after
    /// the other. Default: those of CubeSandbox's report.
    #[arg(short, long, value_name = "N", value_delimiter = ',',
        value_parser = clap::value_parser!(u16).range(1..=i64::from(CLIENTS_MAX)))]
    concurrency: Vec<u16>,
    /// Rounds: one number, or one for each concurrency. Default: those of the report.
    #[arg(short = 'n', long, value_name = "N", value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: Vec<u32>,
    /// Rest after each round.
    #[arg(short, long, value_name = "SECONDS", default_value = "0.2", value_parser = seconds)]
    settle: Duration,
}

impl Rounds {
    /// Concurrency and rounds of each row.
    ///
    /// # Errors
    /// When there are neither one nor as many numbers of rounds.
    pub fn levels(&self, usual: &[u16], rounds: u32) -> Result<Vec<(usize, u32)>> {
        let levels = if self.concurrency.is_empty() { usual } else { &self.concurrency };
        let rounds = if self.rounds.is_empty() { &[rounds] } else { self.rounds.as_slice() };
        let found = pairs(levels, rounds, ("-c", "-n"))?;
        Ok(found.into_iter().map(|(clients, rounds)| (usize::from(clients), rounds)).collect())
    }

    /// The warm-up and the rounds, with a rest after each: `act` is told whether its round counts.
    ///
    /// # Errors
    /// When `act` gives up, or the run is to end.
    pub fn each(
        &self,
        host: &Host,
        rounds: u32,
        mut act: impl FnMut(bool) -> Result<()>,
    ) -> Result<()> {
        for number in 0..=rounds {
            host.go_on()?;
            act(number > 0)?;
            host.rest(self.settle);
        }
        Ok(())
    }

    /// For the report.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "concurrency": self.concurrency, "rounds": self.rounds,
            "settle_s": self.settle.as_secs_f64(),
        })
    }
}

/// Makes so many sandboxes that are not measured.
///
/// # Errors
/// When one does not come up.
pub fn make(host: &Host, of: &str, count: usize) -> Result<Vec<Sandbox>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    round(host, MAKERS, 0..count, |client, _| host.create(client, of))?.all("make the sandboxes")
}

/// Makes a snapshot of each, not measured: sandboxes with what they can go back to.
///
/// # Errors
/// When one fails.
pub fn checkpoint(host: &Host, sandboxes: &[Sandbox]) -> Result<Vec<(Sandbox, String)>> {
    let done = round(host, MAKERS, sandboxes, |client, sandbox| {
        let made = host.snapshot(client, &sandbox.id);
        made.and_then(|snapshot| Ok((sandbox.clone(), snapshot)))
    })?;
    done.all("make the snapshots")
}

/// Names of sandboxes.
#[must_use]
pub fn ids(sandboxes: &[Sandbox]) -> Vec<String> {
    sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect()
}
