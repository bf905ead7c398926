//! `mica bench registry`: what choosing a host costs, beside Fast Sandbox's published figures.
//!
//! Called by [`crate::run`]. Needs neither root nor KVM. Refuses to count allocations itself: the program beside it does.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;
use mica_lab::engine::machine;
use mica_lab::engine::registry_report::{self, Allocations};
use serde_json::json;

use crate::engine::beside;
use crate::print;

#[derive(Args, Debug)]
pub struct RegistryArgs {
    /// Batches of each benchmark; a figure is of one batch.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    batches: u16,
    /// Rounds that the batches are shared out to: all benchmarks take turns, and a limit is judged on the median of the
    /// rounds.
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// The program that counts allocations. Default: bench-allocations beside this program.
    #[arg(long, value_name = "FILE")]
    allocations: Option<PathBuf>,
    /// Write the report to this file, as JSON.
    #[arg(short, long, alias = "json", value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Measures, prints, and writes what was asked for.
///
/// # Errors
/// When allocations cannot be counted, or the file cannot be written.
pub fn run(args: &RegistryArgs) -> Result<()> {
    let found = registry_report::measure_all(args.batches.into(), args.rounds.into())?;
    let counter = args.allocations.clone();
    let counter = counter.map_or_else(|| beside("bench-allocations", "--allocations"), Ok)?;
    let allocations = count(&counter)?;
    // It writes nothing, so there is no store.
    let host = machine::host(None)?;
    print(&format!("{}\n{}", registry_report::table(&found, &allocations), machine::text(&host)))?;
    if let Some(path) = &args.output {
        let options = json!({ "batches": args.batches, "rounds": args.rounds });
        registry_report::document(&found, &allocations, &options, host).write(path)?;
    }
    Ok(())
}

fn count(program: &Path) -> Result<Allocations> {
    let ran = Command::new(program).output();
    let ran = ran.with_context(|| format!("run {}", program.display()))?;
    let said = String::from_utf8_lossy(&ran.stderr);
    ensure!(ran.status.success(), "{}: {}", program.display(), said.trim());
    serde_json::from_slice(&ran.stdout).with_context(|| format!("what {} says", program.display()))
}
