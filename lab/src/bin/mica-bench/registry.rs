//! `mica bench registry`: what choosing a host costs.
//!
//! Called by `main`. Refuses nothing: it needs no host and no root.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use mica_lab::engine::{registry, report};

use crate::print;

#[derive(Args, Debug)]
pub struct RegistryArgs {
    /// Batches of each benchmark; a figure is of one batch.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    batches: u16,
    /// Write the results to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Measures, prints, and writes what was asked for.
///
/// # Errors
/// When the file cannot be written.
pub fn run(args: &RegistryArgs) -> Result<()> {
    let measure = |work| registry::measure(work, args.batches.into());
    let found = registry::ALL.into_iter().map(measure).collect::<Result<Vec<_>>>()?;
    print(&registry::table(&found))?;
    if let Some(path) = &args.json {
        let host = report::host(Path::new("/"))?;
        let found = serde_json::json!({ "host": host, "results": registry::rows(&found) });
        let text = serde_json::to_string_pretty(&found)?;
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
