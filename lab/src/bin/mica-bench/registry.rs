//! `mica bench registry`: what choosing a host costs.
//!
//! Called by `main`. Refuses nothing: it needs no host and no root.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use mica_lab::engine::{registry, report};
use serde_json::json;

use crate::print;

#[derive(Args, Debug)]
pub struct RegistryArgs {
    /// Batches of each benchmark; a figure is of one batch.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    batches: u16,
    /// Write the report to this file, as JSON.
    #[arg(short, long, alias = "json", value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Measures, prints, and writes what was asked for.
///
/// # Errors
/// When the file cannot be written.
pub fn run(args: &RegistryArgs) -> Result<()> {
    let measure = |work| registry::measure(work, args.batches.into());
    let found = registry::ALL.into_iter().map(measure).collect::<Result<Vec<_>>>()?;
    print(&registry::table(&found))?;
    if let Some(path) = &args.output {
        let (options, host) = (json!({ "batches": args.batches }), report::host(Path::new("/"))?);
        registry::document(&found, &options, host).write(path)?;
    }
    Ok(())
}
