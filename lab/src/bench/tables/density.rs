//! `density`: what one more sandbox costs the machine, by how many live: idle ones, or such as have run code.
//!
//! `MemAvailable` is read before the first and after each batch, of the machine that this runs on; the report says
//! whether that is the host's. Refuses to run the machine out of memory: it stops when what a few more would take
//! is not there, and says so.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::super::daemon::{Daemon, is_local};
use super::super::guest;
use super::super::host::{Host, Sandbox};
use super::super::load::round;
use super::super::row::Row;
use super::super::table::Table;
use super::{CLIENTS_MAX, Measure, seconds};
use crate::engine::client::Client;

/// Memory counts as at rest when it has moved by no more than this.
const REST_BYTES: u64 = 2 << 20;
/// Looks that must agree.
const LOOKS: usize = 5;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// What a sandbox is thought to take before one was seen, in bytes.
const FIRST_GUESS_BYTES: u64 = 64 << 20;

/// What a sandbox has done when memory is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum After {
    /// Nothing.
    None,
    /// It has run a cell in the code interpreter, at once with the others of its batch.
    Code,
}

/// Memory by live sandboxes.
#[derive(Args, Debug)]
pub struct Density {
    /// Sandboxes that live when memory is looked at, growing.
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_values_t = [100, 300, 500, 1000],
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    live: Vec<u32>,
    /// Clients at once that make them.
    #[arg(short, long, value_name = "N", default_value_t = 50,
        value_parser = clap::value_parser!(u16).range(1..=i64::from(CLIENTS_MAX)))]
    concurrency: u16,
    /// Memory that is to stay available, in MiB. Default: a tenth of the machine.
    #[arg(long, value_name = "MIB")]
    reserve: Option<u32>,
    /// Longest wait for memory to come to rest.
    #[arg(short, long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    settle: Duration,
    /// What each sandbox has done when memory is looked at.
    #[arg(long, value_enum, default_value_t = After::None)]
    after: After,
}

impl Measure for Density {
    fn name(&self) -> &'static str {
        "density"
    }

    fn options(&self) -> Value {
        let after = self.after.to_possible_value().map(|value| value.get_name().to_owned());
        json!({
            "after": after, "live": self.live, "concurrency": self.concurrency, "reserve_mib": self.reserve,
            "settle_s": self.settle.as_secs_f64(),
        })
    }

    fn measure(&self, host: &Host, table: &mut Table) -> Result<()> {
        ensure!(self.live.is_sorted(), "--live must grow: {:?}", self.live);
        let local = is_local(host.socket.ip());
        if !local {
            table.note("memory is that of the clients' machine, and the host is another: it says nothing of it");
        } else if let Err(error) = Daemon::find(host.socket) {
            table.note(format!(
                "memory is that of this machine; whether the host is, is not sure: {error}"
            ));
        }
        // The first sandbox makes what all of them share.
        let first = super::rounds::make(host, &host.address.template, 1)?;
        self.have_it_work(host, &first)?;
        host.remove(&super::rounds::ids(&first), &[])?;
        let empty = self.at_rest(host)?;
        let op = match self.after {
            After::None => "density",
            After::Code => "density_after_code",
        };
        let row = |live: u32| Row::new(op, format!("live={live}"), self.concurrency.into());
        let mut base = row(0);
        set(&mut base, 0, empty, empty);
        table.push(base);
        let mut live = 0;
        for wanted in &self.live {
            let mut batch = row(*wanted).beside(usize::try_from(*wanted)?, 0);
            let begun = Instant::now();
            let full = self.grow(host, &mut batch, &mut live, *wanted, empty)?;
            // What runs in them is no part of how fast they are made.
            if self.after == After::None {
                batch.walls = vec![begun.elapsed()];
            }
            let now = self.at_rest(host)?;
            if full {
                batch.case = format!("live={live}");
                batch.seed = None;
            }
            set(&mut batch, live, empty, now);
            table.push(batch);
            if full {
                table.note(format!(
                    "stopped at {live} sandboxes of {wanted}: {} MiB are available and {} are to stay",
                    now >> 20,
                    self.reserve()? >> 20
                ));
                break;
            }
        }
        Ok(())
    }
}

impl Density {
    /// Makes sandboxes until so many live, a few at a time. Whether it stopped because memory is short.
    fn grow(
        &self,
        host: &Host,
        row: &mut Row,
        live: &mut u32,
        wanted: u32,
        empty: u64,
    ) -> Result<bool> {
        let template = host.address.template.as_str();
        while *live < wanted {
            host.go_on()?;
            let few = (wanted - *live).min(self.concurrency.into());
            let now = available()?;
            let each = match *live {
                0 => FIRST_GUESS_BYTES,
                some => empty.saturating_sub(now) / u64::from(some),
            };
            if now.saturating_sub(each * u64::from(few)) < self.reserve()? {
                return Ok(true);
            }
            let clients = usize::from(self.concurrency);
            let done = round(host, clients, 0..few, |client, _| host.create(client, template))?;
            let failed = done.failures.total();
            let made = row.add(done);
            *live += u32::try_from(made.len())?;
            self.have_it_work(host, &made)?;
            // A host that has no more room would be asked for ever.
            if failed > 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Has each of these do what it is to have done, all at once.
    fn have_it_work(&self, host: &Host, sandboxes: &[Sandbox]) -> Result<()> {
        if self.after == After::None || sandboxes.is_empty() {
            return Ok(());
        }
        // One after the other: a port that QEMU forwards has room for one that waits.
        let connect = |sandbox| guest::interpreter(host, sandbox);
        let connections = sandboxes.iter().map(connect).collect::<Result<Vec<_>>>()?;
        let clients = connections.len();
        let run = |_: &mut Client, mut own: Client| guest::code(&mut own, "1+1", "2");
        round(host, clients, connections, run)?.all("run code in the sandboxes")?;
        Ok(())
    }

    fn reserve(&self) -> Result<u64> {
        match self.reserve {
            Some(mebibytes) => Ok(u64::from(mebibytes) << 20),
            None => Ok(meminfo("MemTotal:")? / 10),
        }
    }

    /// What is available once that has come to rest, or the wait is over.
    fn at_rest(&self, host: &Host) -> Result<u64> {
        let deadline = Instant::now() + self.settle;
        let mut looks = Vec::new();
        loop {
            looks.push(available()?);
            let last = &looks[looks.len().saturating_sub(LOOKS)..];
            let (low, high) = (last.iter().min().copied(), last.iter().max().copied());
            let moved = high.unwrap_or(0) - low.unwrap_or(0);
            let now = last.last().copied().context("no look")?;
            if (last.len() == LOOKS && moved <= REST_BYTES) || Instant::now() > deadline {
                return Ok(now);
            }
            host.go_on()?;
            std::thread::sleep(LOOK);
        }
    }
}

fn set(row: &mut Row, live: u32, empty: u64, now: u64) {
    // Memory of others may come free meanwhile: then the difference is below zero.
    let taken = i128::from(empty) - i128::from(now);
    let taken = i64::try_from(taken).unwrap_or(i64::MAX);
    row.set("sandboxes", live);
    row.set("mem_available_bytes", now);
    row.set("bytes_taken", taken);
    if live > 0 {
        row.set("bytes_per_sandbox", taken / i64::from(live));
    }
}

fn available() -> Result<u64> {
    meminfo("MemAvailable:")
}

fn meminfo(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(kib.with_context(|| format!("/proc/meminfo has no {name}"))? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_takes_is_what_all_took_shared_out() {
        let mut row = Row::default();
        set(&mut row, 10, 1000, 400);
        assert_eq!(
            (&row.more["bytes_taken"], &row.more["bytes_per_sandbox"]),
            (&json!(600), &json!(60))
        );
        set(&mut row, 10, 400, 1000);
        assert_eq!(row.more["bytes_per_sandbox"], json!(-60));
        let mut base = Row::default();
        set(&mut base, 0, 5, 5);
        assert!(!base.more.contains_key("bytes_per_sandbox"));
        assert!(available().unwrap() > 0 && available().unwrap() <= meminfo("MemTotal:").unwrap());
    }
}
