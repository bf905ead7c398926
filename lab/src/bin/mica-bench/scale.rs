//! `mica bench scale`: what the daemon itself takes, whatever its sandboxes do.
//!
//! Called by [`crate::run`]. Refuses to run without root, as the daemon does.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use mica_lab::engine::{report, scale};

use crate::engine::beside;
use crate::print;

#[derive(Args, Debug)]
pub struct ScaleArgs {
    /// The daemon. Default: mica beside this program.
    #[arg(long, value_name = "FILE")]
    mica: Option<PathBuf>,
    /// The stand-in. Default: standin-vm beside this program.
    #[arg(long, value_name = "FILE")]
    standin: Option<PathBuf>,
    /// The daemons' `--cpu-latency-us`.
    #[arg(long, value_name = "auto|off|MICROSECONDS")]
    cpu_latency_us: Option<String>,
    /// Write the results to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// A little of everything: shows that it works, and no more.
    #[arg(long)]
    quick: bool,
}

/// Measures, prints, and writes what was asked for.
///
/// # Errors
/// When a daemon does not start, or answers anything but right.
pub fn run(args: &ScaleArgs) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this takes root, as the daemon does");
    let [rounds, requests, creates, pairs] =
        if args.quick { [2, 200, 2, 50] } else { [21, 2000, 10, 1000] };
    let figures = scale::measure(&scale::Config {
        mica: args.mica.clone().map_or_else(|| beside("mica", "--mica"), Ok)?,
        standin: args.standin.clone().map_or_else(|| beside("standin-vm", "--standin"), Ok)?,
        rounds,
        requests,
        creates,
        pairs,
        idle: Duration::from_secs(if args.quick { 2 } else { 20 }),
        cpu_latency: args.cpu_latency_us.clone(),
    })?;
    print(&scale::table(&figures)?)?;
    if let Some(path) = &args.json {
        let host = report::host(Path::new("/"))?;
        let found = serde_json::json!({ "host": host, "results": scale::rows(&figures) });
        let text = serde_json::to_string_pretty(&found)?;
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
