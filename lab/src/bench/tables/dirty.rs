//! `dirty`: one snapshot at a time, by how much was written to the guest's memory before; and a create from it.
//!
//! The write goes to `/dev/shm`, by a command through envd, before the time begins. The first create from a snapshot
//! is discarded, as in CubeSandbox's script, so that the second finds its pages in memory. Refuses a write that
//! the guest has no room for: there it failed unnoticed, and less was written than the table said.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use mica_storage::SnapshotManifest;
use mica_units::PAGE_BYTES;
use serde_json::{Value, json};

use super::super::guest;
use super::super::host::{Host, Sandbox};
use super::super::load::round;
use super::super::row::Row;
use super::super::table::Table;
use super::rounds::{ids, make};
use super::{Measure, seconds};

/// Megabytes that are written at most.
pub const MEGABYTES_MAX: i64 = 65_536;

/// Snapshots by how much was written to memory before.
#[derive(Args, Debug)]
pub struct Dirty {
    /// Megabytes (MiB) that are written before the snapshot; several, separated by commas, are measured one
    /// after the other.
    #[arg(short, long, value_name = "MB", value_delimiter = ',',
        default_values_t = [0, 10, 50, 100, 200, 500, 800, 1024],
        value_parser = clap::value_parser!(u32).range(0..=MEGABYTES_MAX))]
    dirty: Vec<u32>,
    /// Rounds.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 3,
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,
    /// Rest after each round.
    #[arg(short, long, value_name = "SECONDS", default_value = "0.2", value_parser = seconds)]
    settle: Duration,
    /// The host's store, if it is on this machine: then the report says how much each snapshot holds.
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
}

impl Measure for Dirty {
    fn name(&self) -> &'static str {
        "dirty"
    }

    fn options(&self) -> Value {
        json!({
            "dirty_mb": self.dirty, "rounds": self.rounds, "settle_s": self.settle.as_secs_f64(),
            "store": self.store,
        })
    }

    fn measure(&self, host: &Host, table: &mut Table) -> Result<()> {
        if self.store.is_none() {
            table.note("dirty_mb is what was written; --store DIR says what a snapshot holds");
        }
        for megabytes in &self.dirty {
            let by = usize::try_from(*megabytes)?;
            let row = |op| {
                let mut row = Row::new(op, format!("d={megabytes}"), 1).beside(by, 0);
                row.set("dirty_mb", *megabytes);
                row
            };
            let both = [row("snapshot_dirty"), row("create_from_dirty")];
            table.rows(host, both, |[snapshot, create]| {
                let mut held = Vec::new();
                for number in 0..=self.rounds {
                    host.go_on()?;
                    let counts = number > 0;
                    let bytes = self.once(host, *megabytes, counts, snapshot, create)?;
                    held.extend(bytes.filter(|_| counts));
                    host.rest(self.settle);
                }
                if let Some(most) = held.iter().max() {
                    snapshot.set("snapshot_bytes", *most);
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl Dirty {
    /// One sandbox: written to, kept, started from. Gives what the snapshot holds of memory, if that can be seen.
    fn once(
        &self,
        host: &Host,
        megabytes: u32,
        counts: bool,
        snapshots: &mut Row,
        creates: &mut Row,
    ) -> Result<Option<u64>> {
        let source = make(host, &host.address.template, 1)?;
        let sandbox = source.first().context("no sandbox")?;
        if megabytes > 0 {
            guest::fill(host, sandbox, megabytes)?;
        }
        let done = round(host, 1, [sandbox], |client, one| host.snapshot(client, &one.id));
        if megabytes > 0 {
            guest::empty(host, sandbox)?;
        }
        let made = if counts { snapshots.add(done?) } else { done?.all("warm up")? };
        // What failed is counted: there is nothing to start from.
        let Some(snapshot) = made.first() else {
            host.remove(&ids(&source), &[])?;
            return Ok(None);
        };
        let held = self.store.as_deref().map(|store| held(store, snapshot)).transpose()?;
        let mut started = create(host, snapshot)?.all("the first create from the snapshot")?;
        let second = create(host, snapshot)?;
        started.extend(if counts { creates.add(second) } else { second.all("warm up")? });
        started.extend(source);
        host.remove(&ids(&started), std::slice::from_ref(snapshot))?;
        Ok(held)
    }
}

fn create(host: &Host, snapshot: &str) -> Result<super::super::load::Round<Sandbox>> {
    round(host, 1, [snapshot], |client, of| host.create(client, of))
}

/// Bytes of memory in the newest layer of a snapshot: what it wrote.
fn held(store: &Path, snapshot: &str) -> Result<u64> {
    let path = store.join("snapshots").join(snapshot).join("manifest");
    let bytes = fs::read(&path).with_context(|| format!("--store: read {}", path.display()))?;
    let manifest = SnapshotManifest::decode(&bytes).map_err(|error| anyhow!("{error}"))?;
    let newest = manifest.layers.last().context("a snapshot without memory")?;
    Ok(u64::from(newest.frames_held) * PAGE_BYTES)
}
