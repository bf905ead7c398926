//! `mica bench scale`: what the daemon itself takes, whatever its sandboxes do.
//!
//! Called by [`crate::run`]. Refuses to run without root, as the daemon does.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use mica_lab::engine::{machine, scale, standin};
use serde_json::json;

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
    /// Rounds. A limit is judged on the median of them. Default: 5, and 2 where it is quick.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: Option<u16>,
    /// Write the report to this file, as JSON.
    #[arg(short, long, alias = "json", value_name = "FILE")]
    output: Option<PathBuf>,
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
    let config = args.config()?;
    let found = scale::measure(&config)?;
    let host = machine::host(Some(&standin::directory()))?;
    print(&format!("{}\n{}", found.table()?, machine::text(&host)))?;
    if let Some(path) = &args.output {
        let options = json!({
            "rounds": config.rounds, "quick": args.quick, "cpu_latency_us": args.cpu_latency_us,
        });
        found.document(&options, host).write(path)?;
    }
    Ok(())
}

impl ScaleArgs {
    fn config(&self) -> Result<scale::Config> {
        let [rounds, turns, requests, create_turns, creates, pairs] =
            if self.quick { [2, 2, 200, 2, 2, 20] } else { [5, 21, 2000, 9, 10, 200] };
        Ok(scale::Config {
            mica: self.mica.clone().map_or_else(|| beside("mica", "--mica"), Ok)?,
            standin: self.standin.clone().map_or_else(|| beside("standin-vm", "--standin"), Ok)?,
            rounds: self.rounds.map_or(rounds, usize::from),
            turns,
            requests,
            create_turns,
            creates,
            pairs,
            idle: Duration::from_secs(if self.quick { 1 } else { 5 }),
            cpu_latency: self.cpu_latency_us.clone(),
        })
    }
}
