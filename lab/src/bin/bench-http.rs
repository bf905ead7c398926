//! `GET /health` throughput of `mica serve` at 1 and at 2 shards, with wrk.
//!
//! Run by `make bench-smoke`, as root. Measures what a request costs before any sandbox is involved:
//! accept, parse, route, answer. wrk runs on the same cores, so on a small machine the figures say
//! how shards compare, not what the daemon can do. Refuses to report a run with failed requests.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Parser;
use mica_lab::served::{Places, Serve, Served, without_limits};

#[derive(Parser, Debug)]
#[command(about = "GET /health throughput at 1 and 2 shards")]
struct Args {
    /// The mica executable.
    #[arg(long)]
    mica: PathBuf,
    /// Seconds of each run.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Connections that wrk keeps open.
    #[arg(long, default_value_t = 64)]
    connections: u32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    for shards in [1, 2] {
        let rate = measure(&args, shards).with_context(|| format!("with {shards} shards"))?;
        println!("GET /health, {shards} shard(s): {rate} requests/s");
    }
    Ok(())
}

fn measure(args: &Args, shards: u32) -> Result<String> {
    let daemon = Daemon::start(&args.mica, shards)?;
    let report = load(args, &daemon)?;
    field(&report, "Requests/sec:").map(str::to_owned)
}

/// One run of wrk, all of whose requests were answered.
fn load(args: &Args, daemon: &Daemon) -> Result<String> {
    let report = Command::new("wrk")
        .args(["-t", "1", "-c", &args.connections.to_string()])
        .args(["-d", &format!("{}s", args.seconds)])
        .arg(format!("http://{}/health", daemon.served.address))
        .output()
        .context("cannot run wrk; it is Debian's package `wrk`")?;
    let report = String::from_utf8_lossy(&report.stdout).into_owned();
    if report.contains("Non-2xx") || report.contains("Socket errors") {
        bail!("requests failed:\n{report}");
    }
    Ok(report)
}

fn field<'r>(report: &'r str, name: &str) -> Result<&'r str> {
    let value = report.lines().find_map(|line| line.strip_prefix(name));
    value.map(str::trim).with_context(|| format!("wrk reported no {name}\n{report}"))
}

/// A daemon without a sandbox.
struct Daemon {
    served: Served,
    /// Goes after the daemon.
    _places: Places,
}

impl Daemon {
    fn start(mica: &Path, shards: u32) -> Result<Self> {
        let name = format!("mica-bench-http-{}-{shards}", std::process::id());
        let places = Places::make(std::env::temp_dir().join(name))?;
        let (store, keys) = (places.path("store"), places.path("keys"));
        let cgroup = &places.cgroup;
        // No sandbox is made, so any program will do, also where there is no KVM.
        let serve = Serve { mica, store: &store, keys: &keys, cgroup, vm_program: mica };
        let shards = shards.to_string();
        let options = ["--shards", &shards].into_iter().chain(without_limits()?);
        Ok(Self { served: Served::start(&serve, options)?, _places: places })
    }
}
