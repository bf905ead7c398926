//! `mica bench check REGISTRY.json SCALE.json`: whether the figures that the project promises are kept.
//!
//! Called by [`crate::run`], and at the end of `make bench`. Ends with 1 where one is not, and says which.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use mica_lab::bench::document::Document;
use mica_lab::bench::promises::{judge, text};

use crate::print;

#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Reports that `registry -o` and `scale -o` wrote.
    #[arg(required = true)]
    reports: Vec<PathBuf>,
}

/// Judges and prints.
///
/// # Errors
/// When a report cannot be read, nothing is promised of any, or a promise is broken.
pub fn run(args: &CheckArgs) -> Result<()> {
    let documents =
        args.reports.iter().map(|report| Document::read(report)).collect::<Result<Vec<_>>>()?;
    let all = judge(&documents)?;
    print(&text(&all))?;
    let is_checked = |document: &&Document| document.0["host"]["assertions"] == true;
    for document in documents.iter().filter(is_checked) {
        let command = document.0["command"].as_str().unwrap_or_default();
        print(&format!(
            "note: {command} was built with assertions: promises are of a release build\n"
        ))?;
    }
    let broken: Vec<_> =
        all.iter().filter(|one| !one.is_kept()).map(|one| one.promise.op).collect();
    if !broken.is_empty() {
        bail!("{} of {} promises are broken: {}", broken.len(), all.len(), broken.join(", "));
    }
    Ok(())
}
