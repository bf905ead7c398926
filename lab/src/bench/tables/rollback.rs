//! `rollback`: so many sandboxes at once go back, each to a snapshot of its own that was made before.
//!
//! In the time is the rollback alone, as in CubeSandbox's script. Refuses nothing of its own.

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use super::super::guest;
use super::super::host::Host;
use super::super::load::round;
use super::super::row::Row;
use super::super::table::Table;
use super::Measure;
use super::dirty::MEGABYTES_MAX;
use super::rounds::{Rounds, checkpoint, ids, make};

/// Rollbacks, by concurrency.
#[derive(Args, Debug)]
pub struct Rollback {
    #[command(flatten)]
    rounds: Rounds,
    /// Megabytes that each sandbox writes to its memory after its snapshot.
    #[arg(short, long, value_name = "MB", default_value_t = 0,
        value_parser = clap::value_parser!(u32).range(0..=MEGABYTES_MAX))]
    dirty: u32,
}

impl Rollback {
    /// The published figures are of guests that wrote nothing.
    fn row(&self, clients: usize) -> Row {
        match self.dirty {
            0 => Row::new("rollback", format!("c={clients}"), clients).beside(clients, 0),
            megabytes => Row::new("rollback", format!("c={clients} d={megabytes}"), clients),
        }
    }
}

impl Measure for Rollback {
    fn name(&self) -> &'static str {
        "rollback"
    }

    fn options(&self) -> Value {
        let mut options = self.rounds.json();
        options["dirty_mb"] = json!(self.dirty);
        options
    }

    fn measure(&self, host: &Host, table: &mut Table) -> Result<()> {
        for (clients, rounds) in self.rounds.levels(&[1, 5, 10], 5)? {
            table.row(host, self.row(clients), |row| {
                self.rounds.each(host, rounds, |counts| {
                    let sandboxes = make(host, &host.address.template, clients)?;
                    let points = checkpoint(host, &sandboxes)?;
                    if self.dirty > 0 {
                        sandboxes.iter().try_for_each(|one| guest::fill(host, one, self.dirty))?;
                    }
                    let done = round(host, clients, &points, |client, (sandbox, snapshot)| {
                        host.rollback(client, &sandbox.id, snapshot)
                    })?;
                    if self.dirty > 0 {
                        sandboxes.iter().try_for_each(|one| guest::empty(host, one))?;
                    }
                    if counts {
                        row.add(done);
                    } else {
                        done.all("warm up")?;
                    }
                    let snapshots: Vec<String> =
                        points.into_iter().map(|(_, snapshot)| snapshot).collect();
                    host.remove(&ids(&sandboxes), &snapshots)
                })
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        rollback: Rollback,
    }

    #[test]
    fn guests_that_wrote_something_have_no_figure_beside_them() {
        let row = |words: &[&str]| {
            let words = [&["rollback"], words].concat();
            Cli::try_parse_from(words).unwrap().rollback.row(5)
        };
        assert_eq!(row(&[]).seed.unwrap().values[0], 189.6);
        let written = row(&["-d", "64"]);
        assert_eq!((written.case.as_str(), written.seed), ("c=5 d=64", None));
    }
}
