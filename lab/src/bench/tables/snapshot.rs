//! `snapshot`: so many snapshots at once, each of a fresh sandbox of its own.
//!
//! In the time is the request alone. Refuses nothing of its own.

use anyhow::Result;
use clap::Args;
use serde_json::Value;

use super::super::host::Host;
use super::super::load::round;
use super::super::row::Row;
use super::super::table::Table;
use super::Measure;
use super::rounds::{Rounds, ids, make};

/// Snapshots of running sandboxes, by concurrency.
#[derive(Args, Debug)]
pub struct Snapshot {
    #[command(flatten)]
    rounds: Rounds,
}

impl Measure for Snapshot {
    fn name(&self) -> &'static str {
        "snapshot"
    }

    fn options(&self) -> Value {
        self.rounds.json()
    }

    fn measure(&self, host: &Host, table: &mut Table) -> Result<()> {
        for (clients, rounds) in self.rounds.levels(&[1, 5, 10], 5)? {
            let row = Row::new("snapshot", format!("c={clients}"), clients).beside(clients, 0);
            table.row(host, row, |row| {
                self.rounds.each(host, rounds, |counts| {
                    let sandboxes = ids(&make(host, &host.address.template, clients)?);
                    let done =
                        round(host, clients, &sandboxes, |client, id| host.snapshot(client, id))?;
                    let snapshots = if counts { row.add(done) } else { done.all("warm up")? };
                    host.remove(&sandboxes, &snapshots)
                })
            })?;
        }
        Ok(())
    }
}
