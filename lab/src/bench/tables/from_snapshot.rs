//! `from-snapshot`: so many sandboxes at once from one snapshot.
//!
//! The snapshot is made, and started from once, before anything is measured. Refuses nothing of its own.

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use super::super::host::Host;
use super::super::load::round;
use super::super::row::Row;
use super::super::table::Table;
use super::Measure;
use super::rounds::{Rounds, checkpoint, ids, make};

/// Sandboxes from a snapshot, by concurrency.
#[derive(Args, Debug)]
pub struct FromSnapshot {
    #[command(flatten)]
    rounds: Rounds,
}

impl Measure for FromSnapshot {
    fn name(&self) -> &'static str {
        "from-snapshot"
    }

    fn options(&self) -> Value {
        self.rounds.json()
    }

    fn measure(&self, host: &Host, table: &mut Table) -> Result<()> {
        let source = make(host, &host.address.template, 1)?;
        let made = checkpoint(host, &source)?;
        let (_, snapshot) = made.first().context("no snapshot")?;
        for (clients, rounds) in self.rounds.levels(&[1, 10, 20, 50], 3)? {
            let row = Row::new("from_snapshot", format!("c={clients}"), clients);
            table.row(host, row.beside(clients, 0), |row| {
                self.rounds.each(host, rounds, |counts| {
                    let done = round(host, clients, 0..clients, |client, _| {
                        host.create(client, snapshot)
                    })?;
                    let made = if counts { row.add(done) } else { done.all("warm up")? };
                    host.remove(&ids(&made), &[])
                })
            })?;
        }
        host.remove(&ids(&source), std::slice::from_ref(snapshot))
    }
}
