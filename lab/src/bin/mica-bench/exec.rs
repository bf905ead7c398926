//! `mica bench exec`: code and commands in warm sandboxes of a host that runs.
//!
//! Called by [`crate::run`]. Refuses a template without a code interpreter, by what its sandboxes answer.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use mica_lab::bench::document::{FORMAT, VERSION};
use mica_lab::engine::{exec, report};

use crate::print;

#[derive(Args, Debug)]
pub struct ExecArgs {
    /// The host.
    #[arg(long, value_name = "URL", env = "E2B_API_URL")]
    url: String,
    /// One of its keys.
    #[arg(long, value_name = "KEY", env = "E2B_API_KEY", hide_env_values = true)]
    api_key: String,
    /// What the sandboxes are made of; it must have a code interpreter.
    #[arg(long, value_name = "NAME", default_value = "code-interpreter-v1")]
    template: String,
    /// Sandboxes that the clients share, at most one for each client. Cells of one sandbox run one after the
    /// other.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    sandboxes: u16,
    /// How often everything is done at each number of clients, and at least once by each.
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    calls: u32,
    /// Write the results to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Measures, prints, and writes what was asked for.
///
/// # Errors
/// When the host answers anything but right.
pub fn measure(args: &ExecArgs) -> Result<()> {
    let loads = exec::measure(&exec::Config {
        url: args.url.clone(),
        api_key: args.api_key.clone(),
        template: args.template.clone(),
        sandboxes: args.sandboxes.into(),
        calls: usize::try_from(args.calls)?,
    })?;
    print(&exec::table(&loads))?;
    if let Some(path) = &args.json {
        // The machine of the clients; the host may be another.
        let host = report::host(Path::new("/"))?;
        let results = exec::rows(&loads);
        let found = serde_json::json!({
            "format": FORMAT, "version": VERSION, "command": "exec", "host": host, "url": args.url, "sandboxes": args.sandboxes, "results": results,
        });
        let text = serde_json::to_string_pretty(&found)?;
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
