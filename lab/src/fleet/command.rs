//! `mica lab simulate`, from the command line to the table.
//!
//! Called by `mica-lab`. Refuses what the parts of the simulator refuse, and says which.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::planned::{self, Planned, SANDBOX_MIB};
use super::trace::MEMORY_MIB;
use super::{HostShape, Load, Policy, Scenario, Service, Trace, report, simulate};

/// What a host has where nobody says it.
const SLOTS: u32 = 120;
const SHARDS: u32 = 4;

/// A fleet, a load, and the policies to compare.
#[derive(Args, Debug)]
pub struct SimulateArgs {
    /// Hosts of the fleet.
    #[arg(long, value_name = "N", default_value_t = 100)]
    hosts: usize,
    /// Take slots, memory and shards of a host from this file, which is that of `mica plan --host`; what is given
    /// beside it wins. See docs/capacity.md.
    #[arg(long, value_name = "FILE")]
    host: Option<PathBuf>,
    /// Sandboxes that a host can hold. Default: those of --host, or 120.
    #[arg(long, value_name = "N")]
    slots: Option<u32>,
    /// Memory of a host for sandboxes, in MiB. Default: that of --host, or as much as its slots can have.
    #[arg(long, value_name = "MIB")]
    memory_mib: Option<u64>,
    /// Shards of a host: creates that it works on at one time. Default: those of --host, or 4.
    #[arg(long, value_name = "N")]
    shards: Option<u32>,
    /// What a sandbox takes of it where a trace does not say, in MiB. Default: 2048; with --host 24, as `mica plan`
    /// has it of one that has run code.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    sandbox_mib: Option<u32>,
    /// VM processes that a host keeps ready.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pool: u32,
    /// Templates that a host keeps at hand.
    #[arg(long, value_name = "N", default_value_t = 16)]
    templates_per_host: usize,
    /// Milliseconds to bring a template in.
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    cold_ms: u32,
    /// Replay this file, lines of time_s,template,life_s[,memory_mib], instead of making a load.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["arrivals", "rate", "life", "burst", "templates"])]
    trace: Option<PathBuf>,
    /// Sandboxes that are asked for.
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    arrivals: usize,
    /// In a second, on average.
    #[arg(long, allow_negative_numbers = true, value_name = "N", default_value_t = 500.0)]
    rate: f64,
    /// Seconds that one lives, on average.
    #[arg(long, allow_negative_numbers = true, value_name = "SECONDS", default_value_t = 20.0)]
    life: f64,
    /// A tenth of the time, this many times the average rate come; 1: always the same.
    #[arg(long, allow_negative_numbers = true, value_name = "FACTOR", default_value_t = 1.0)]
    burst: f64,
    /// Templates that are asked for.
    #[arg(long, value_name = "N", default_value_t = 50)]
    templates: usize,
    /// What settles all that is drawn.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Only these policies, separated by commas.
    #[arg(long, value_name = "POLICY", value_delimiter = ',', value_enum)]
    policy: Vec<Policy>,
    /// Take the times of creates from this file, which `mica bench engine --json` wrote.
    #[arg(long, value_name = "FILE")]
    measured: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Simulates; the text to print.
///
/// # Errors
/// When a file cannot be read or a number means nothing.
pub fn run(args: &SimulateArgs) -> Result<String> {
    let planned = args.host.as_deref().map(Planned::read).transpose()?;
    let usual_mib = if planned.is_some() { SANDBOX_MIB } else { MEMORY_MIB };
    let sandbox_mib = args.sandbox_mib.unwrap_or(usual_mib);
    let service = args.measured.as_ref().map_or_else(|| Ok(Service::default()), measured)?;
    let trace = match &args.trace {
        Some(path) => {
            let file =
                File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            Trace::read(BufReader::new(file), sandbox_mib)
                .with_context(|| path.display().to_string())?
        }
        None => Trace::make(
            &Load {
                arrivals: args.arrivals,
                per_s: args.rate,
                life_s: args.life,
                burst: args.burst,
                templates: args.templates,
                memory_mib: sandbox_mib,
            },
            args.seed,
        )?,
    };
    let shape = shape(args, planned, &trace);
    let scenario = Scenario { hosts: args.hosts, shape, service, seed: args.seed };
    let all = Policy::value_variants();
    let policies = if args.policy.is_empty() { all } else { &args.policy };
    let outcomes = policies.iter().map(|policy| simulate(&scenario, &trace, *policy));
    let outcomes = outcomes.collect::<Result<Vec<_>>>()?;
    if args.json {
        let found = json!({
            "seed": args.seed, "hosts": args.hosts, "host": planned::json(&shape),
            "results": report::json(&outcomes),
        });
        return Ok(format!("{}\n", serde_json::to_string_pretty(&found)?));
    }
    Ok(report::table(&outcomes))
}

/// What each host is: as it is told, as the file has it, or the usual.
fn shape(args: &SimulateArgs, planned: Option<Planned>, trace: &Trace) -> HostShape {
    let slots = args.slots.or(planned.map(|host| host.slots)).unwrap_or(SLOTS);
    let most_mib = trace.arrivals.iter().map(|arrival| arrival.memory_mib).max().unwrap_or(1);
    let memory_mib = args.memory_mib.or(planned.map(|host| host.memory_mib));
    HostShape {
        slots,
        memory_mib: memory_mib.unwrap_or(u64::from(slots) * u64::from(most_mib)),
        shards: args.shards.or(planned.map(|host| host.shards)).unwrap_or(SHARDS),
        pool: args.pool,
        templates: args.templates_per_host,
        cold_ns: u64::from(args.cold_ms) * 1_000_000,
    }
}

fn measured(path: &PathBuf) -> Result<Service> {
    let name = || path.display().to_string();
    let file = File::open(path).with_context(|| format!("cannot open {}", name()))?;
    let report: Value = serde_json::from_reader(BufReader::new(file))
        .with_context(|| format!("{} is not JSON", name()))?;
    Service::read(&report).with_context(name)
}
