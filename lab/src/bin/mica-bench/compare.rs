//! `mica bench compare A.json B.json`: a gate for CI.
//!
//! Called by [`crate::run`]. Ends with 1 where the second run is worse than the thresholds, or lacks a row.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use mica_lab::bench::compare::{Thresholds, compare};
use mica_lab::bench::document::Document;

use crate::print;

#[derive(Args, Debug)]
pub struct CompareArgs {
    /// The report that is good enough.
    before: PathBuf,
    /// The report in question.
    after: PathBuf,
    /// How much longer the 95th percentile may be.
    #[arg(long, value_name = "RATIO", default_value_t = 1.2, value_parser = ratio)]
    p95: f64,
    /// How much more memory it may be.
    #[arg(long, value_name = "RATIO", default_value_t = 1.5, value_parser = ratio)]
    memory: f64,
    /// How much less throughput it may be.
    #[arg(long, value_name = "RATIO", default_value_t = 0.8, value_parser = ratio)]
    throughput: f64,
}

fn ratio(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if value.is_finite() && value > 0.0 {
        return Ok(value);
    }
    Err("a ratio above 0".to_owned())
}

/// Compares and prints.
///
/// # Errors
/// When the second report is not good enough.
pub fn run(args: &CompareArgs) -> Result<()> {
    let (before, after) = (Document::read(&args.before)?, Document::read(&args.after)?);
    let limits =
        Thresholds { p95_max: args.p95, memory_max: args.memory, throughput_min: args.throughput };
    let verdict = compare(&before, &after, limits)?;
    print(&verdict.text())?;
    if !verdict.reasons.is_empty() {
        bail!("{} is worse than {}", args.after.display(), args.before.display());
    }
    Ok(())
}
