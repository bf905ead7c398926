//! `pause-resume`: so many sandboxes at once are paused, and then resumed.
//!
//! In the time of a pause is also the look whether it is one, as CubeSandbox's client does it. Refuses nothing of
//! its own.

use anyhow::Result;
use clap::Args;
use serde_json::Value;

use super::super::host::Host;
use super::super::load::round;
use super::super::row::Row;
use super::super::table::Table;
use super::Measure;
use super::rounds::{Rounds, ids, make};

/// Pauses and resumes, by concurrency.
#[derive(Args, Debug)]
pub struct PauseResume {
    #[command(flatten)]
    rounds: Rounds,
}

impl Measure for PauseResume {
    fn name(&self) -> &'static str {
        "pause-resume"
    }

    fn options(&self) -> Value {
        self.rounds.json()
    }

    fn measure(&self, host: &Host, table: &mut Table) -> Result<()> {
        for (clients, rounds) in self.rounds.levels(&[1, 5, 10], 5)? {
            let row = |op| Row::new(op, format!("c={clients}"), clients).beside(clients, 0);
            table.rows(host, [row("pause"), row("resume")], |[pause, resume]| {
                self.rounds.each(host, rounds, |counts| {
                    let sandboxes = ids(&make(host, &host.address.template, clients)?);
                    let paused =
                        round(host, clients, &sandboxes, |client, id| host.pause(client, id))?;
                    let resumed =
                        round(host, clients, &sandboxes, |client, id| host.resume(client, id))?;
                    if counts {
                        pause.add(paused);
                        resume.add(resumed);
                    } else {
                        paused.all("warm up")?;
                        resumed.all("warm up")?;
                    }
                    host.remove(&sandboxes, &[])
                })
            })?;
        }
        Ok(())
    }
}
