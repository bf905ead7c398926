//! `mica bench report RUN.json … --html FILE`: one page of several runs.
//!
//! Called by [`crate::run`]. Refuses files that are no reports.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use mica_lab::bench::document::Document;
use mica_lab::bench::html::page::page;

#[derive(Args, Debug)]
pub struct ReportArgs {
    /// Reports that `-o` wrote.
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// The page to write.
    #[arg(long, value_name = "FILE")]
    html: PathBuf,
}

/// Writes the page.
///
/// # Errors
/// When a report cannot be read, or the page not be written.
pub fn run(args: &ReportArgs) -> Result<()> {
    let documents = args.runs.iter().map(|run| Document::read(run)).collect::<Result<Vec<_>>>()?;
    std::fs::write(&args.html, page(&documents))
        .with_context(|| format!("write {}", args.html.display()))
}
