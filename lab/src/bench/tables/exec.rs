//! `exec`: what a client waits for code and for a command in a sandbox that is warm, from one client and from many at
//! once: `1+1` in the code interpreter, `true` through envd.
//!
//! A table of its own because its clients share sandboxes, each over a connection that it keeps. They connect one after the
//! other, each when the one before was answered: a port that QEMU forwards has room for one connection that nobody has
//! taken yet, and those above it are reset once they have sent something. Refuses every answer but the right one: a
//! call that says something else has failed.

use std::sync::Barrier;
use std::thread;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use serde_json::{Value, json};

use super::super::guest;
use super::super::host::{Host, Sandbox, Timed};
use super::super::load::sum;
use super::super::row::{Row, tenth};
use super::super::table::Table;
use super::{CLIENTS_MAX, Measure};
use crate::engine::client::Client;

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
}

/// What is done again and again.
#[derive(Clone, Copy, Debug)]
enum Work {
    RunCode,
    Command,
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Self::RunCode => "run_code",
            Self::Command => "command",
        }
    }

    fn open(self, host: &Host, sandbox: &Sandbox) -> Result<Client> {
        match self {
            Self::RunCode => guest::interpreter(host, sandbox),
            Self::Command => guest::envd(host, sandbox),
        }
    }

    fn once(self, client: &mut Client) -> Timed<()> {
        match self {
            Self::RunCode => guest::code(client, "1+1", "2"),
            Self::Command => guest::command(client, "true"),
        }
    }
}

impl Measure for Exec {
    fn name(&self) -> &'static str {
        "exec"
    }

    fn options(&self) -> Value {
        json!({ "concurrency": self.concurrency, "sandboxes": self.sandboxes, "calls": self.calls })
    }

    fn measure(&self, host: &Host, table: &mut Table) -> Result<()> {
        let mut control = host.client()?;
        let mut sandboxes = Vec::new();
        for _ in 0..self.sandboxes {
            let made = host.create(&mut control, &host.address.template).value;
            sandboxes.push(made.context("make the sandboxes")?);
            host.go_on()?;
        }
        for clients in &self.concurrency {
            for work in [Work::RunCode, Work::Command] {
                let clients = usize::from(*clients);
                let row = Row::new(&format!("{}_{clients}", work.name()), String::new(), clients);
                let askers = askers(host, &sandboxes, work, clients)
                    .with_context(|| format!("warm {clients} clients up for {}", work.name()))?;
                table
                    .row(host, row.beside(clients, 0), |row| self.level(host, row, work, askers))?;
            }
        }
        for sandbox in &sandboxes {
            host.kill(&mut control, &sandbox.id).value?;
        }
        host.give_back(control);
        Ok(())
    }
}

/// A client, and the sandbox that it asks.
struct Asker<'s> {
    client: Client,
    sandbox: &'s Sandbox,
}

/// Clients whose connections are warm.
fn askers<'s>(
    host: &Host,
    sandboxes: &'s [Sandbox],
    work: Work,
    clients: usize,
) -> Result<Vec<Asker<'s>>> {
    let warm = |sandbox| {
        host.go_on()?;
        let mut asker = Asker { client: work.open(host, sandbox)?, sandbox };
        work.once(&mut asker.client).value?;
        Ok(asker)
    };
    sandboxes.iter().cycle().take(clients).map(warm).collect()
}

impl Exec {
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
        // As its rows called them before there were other tables.
        row.set("clients", clients);
        row.set("per_s", row.per_s().map(tenth));
        Ok(())
    }
}

/// So many calls of one client. One that breaks its connection is counted, and the next has a new one.
fn again(host: &Host, mut asker: Asker<'_>, work: Work, calls: usize) -> Result<Vec<Timed<()>>> {
    let mut done = Vec::with_capacity(calls);
    while done.len() < calls && !host.stopped() {
        if !asker.client.is_open() {
            asker.client = work.open(host, asker.sandbox)?;
        }
        done.push(work.once(&mut asker.client));
    }
    Ok(done)
}
