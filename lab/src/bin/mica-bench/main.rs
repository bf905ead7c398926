//! `mica-bench`, run as `mica bench`: what the engine's operations cost on this machine, beside the same
//! work as bare system calls; and what a client of a host that runs waits for.
//!
//! Called by people, by `make bench`, and briefly by tests. Each subcommand is a module. Refuses to leave anything
//! behind.

#![forbid(unsafe_code)]

mod ab;
mod check;
mod compare;
mod engine;
mod registry;
mod report;
mod scale;
mod tables;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use mica_lab::bench::tables::Measure;
use mica_lab::bench::tables::clone::Clones;
use mica_lab::bench::tables::create::Create;
use mica_lab::bench::tables::density::Density;
use mica_lab::bench::tables::dirty::Dirty;
use mica_lab::bench::tables::exec::Exec;
use mica_lab::bench::tables::from_snapshot::FromSnapshot;
use mica_lab::bench::tables::languages::Languages;
use mica_lab::bench::tables::levels::Levels;
use mica_lab::bench::tables::pause::PauseResume;
use mica_lab::bench::tables::rollback::Rollback;
use mica_lab::bench::tables::snapshot::Snapshot;
use tracing_subscriber::EnvFilter;

/// Measures Mica.
#[derive(Parser, Debug)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Every operation on sandboxes, at the shard and over HTTP, with a tiny guest of 2 vCPUs and 2 GiB.
    Engine(engine::EngineArgs),
    /// Code and commands in warm sandboxes of a host that runs, from 1, 10 and 100 clients at once.
    Exec(One<Exec>),
    /// Sandboxes from a template, by concurrency: cube-bench's table, with its options.
    Create(One<Create>),
    /// What one more idle sandbox costs the machine, by how many live.
    Density(One<Density>),
    /// Snapshots of running sandboxes, by concurrency.
    Snapshot(One<Snapshot>),
    /// Snapshots by how much was written to memory before, and creates from them.
    Dirty(One<Dirty>),
    /// Sandboxes from a snapshot, by concurrency.
    FromSnapshot(One<FromSnapshot>),
    /// Sandboxes put back to a snapshot of their own, by concurrency.
    Rollback(One<Rollback>),
    /// Copies of a running sandbox.
    Clone(One<Clones>),
    /// Pauses and resumes, by concurrency.
    PauseResume(One<PauseResume>),
    /// Code in every language of the template: cold, first and warm.
    Languages(One<Languages>),
    /// Requests at a fixed rate, and what the daemon takes of the processors meanwhile.
    LoadLevels(One<Levels>),
    /// What the daemon itself takes: processor time of a request at one and at two shards, what a second shard
    /// adds to a request, and what it takes idle. With a stand-in for VMs.
    Scale(scale::ScaleArgs),
    /// Choosing a host among 100 and 1,000, under the names of Fast Sandbox's benchmarks, in ns.
    Registry(registry::RegistryArgs),
    /// Whether the second report is worse than the first: ends with 1 if it is.
    Compare(compare::CompareArgs),
    /// Whether the figures that the project promises are kept in these reports: ends with 1 if one is not.
    Check(check::CheckArgs),
    /// One HTML page, with plots, of the reports of several runs.
    Report(report::ReportArgs),
    /// Two programs, or one with two configurations, in turns: ratios, with how sure they are.
    Ab(ab::AbArgs),
}

/// A table of its own, against a host that runs.
#[derive(Args, Debug)]
struct One<M: Args> {
    #[command(flatten)]
    measure: M,
    #[command(flatten)]
    common: tables::Common,
}

fn main() -> ExitCode {
    // `MICA_LOG=mica_shards=trace` shows every step of every sandbox, at some cost.
    let logs = EnvFilter::try_from_env("MICA_LOG").unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(logs).with_writer(std::io::stderr).init();
    match run(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mica-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> Result<()> {
    if let Some((measure, common)) = command.table() {
        return tables::run(measure, common);
    }
    match command {
        Command::Engine(args) => engine::engine(args),
        Command::Scale(args) => scale::run(args),
        Command::Registry(args) => registry::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Check(args) => check::run(args),
        Command::Report(args) => report::run(args),
        Command::Ab(args) => ab::run(args),
        _ => unreachable!("every other one is a table"),
    }
}

impl Command {
    /// What measures a host, if this is a table.
    fn table(&self) -> Option<(&dyn Measure, &tables::Common)> {
        Some(match self {
            Self::Exec(one) => (&one.measure, &one.common),
            Self::Create(one) => (&one.measure, &one.common),
            Self::Density(one) => (&one.measure, &one.common),
            Self::Snapshot(one) => (&one.measure, &one.common),
            Self::Dirty(one) => (&one.measure, &one.common),
            Self::FromSnapshot(one) => (&one.measure, &one.common),
            Self::Rollback(one) => (&one.measure, &one.common),
            Self::Clone(one) => (&one.measure, &one.common),
            Self::PauseResume(one) => (&one.measure, &one.common),
            Self::Languages(one) => (&one.measure, &one.common),
            Self::LoadLevels(one) => (&one.measure, &one.common),
            _ => return None,
        })
    }
}

fn print(text: &str) -> Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("print the table")
}
