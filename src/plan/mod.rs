//! `mica plan`: how many hosts a load needs, and what runs out first.
//!
//! Called by people who buy machines. Reads a description of the host and, if there are any, figures that
//! `mica bench` measured on one; the arithmetic is `mica_shards::capacity`. Refuses to look at the machine it runs on.

mod files;
mod measured;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use mica_shards::capacity::{CapacityPlan, Demand, Headroom, HostShape, Resource, plan_capacity};
use serde_json::{Value, json};

use files::read_host;
use measured::Measured;

/// What is planned for.
#[derive(Args, Debug)]
pub struct CapacityArgs {
    /// Sandboxes made in a second, on all hosts together.
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    rps: f64,
    /// Sandboxes alive at one time.
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    live: f64,
    /// JSON file that describes one host; see docs/capacity.md.
    #[arg(long, value_name = "FILE")]
    host: PathBuf,
    /// How often code is run in each sandbox during its life.
    #[arg(long, allow_negative_numbers = true, value_name = "N", default_value_t = 10.0)]
    execs: f64,
    /// How many of a hundred live sandboxes have run code.
    #[arg(long, allow_negative_numbers = true, value_name = "PERCENT", default_value_t = 100.0)]
    used: f64,
    /// Snapshots taken in an hour, pauses included, on all hosts together.
    #[arg(long, allow_negative_numbers = true, value_name = "N", default_value_t = 0.0)]
    snapshots_per_hour: f64,
    /// Hours that a snapshot is kept.
    #[arg(long, allow_negative_numbers = true, value_name = "HOURS", default_value_t = 24.0)]
    keep: f64,
    /// Take unit costs from this file: one that `mica bench` wrote with engine, scale, create, density or dirty, or an
    /// object of unit costs; see docs/capacity.md. May be given several times. Later files win.
    #[arg(long, value_name = "FILE")]
    measured: Vec<PathBuf>,
    /// Snapshots are like those that `mica bench dirty` took after so many MB were written; needed where its report
    /// has several.
    #[arg(long, value_name = "MB")]
    dirty_mb: Option<u32>,
    /// Memory to have for each byte that is used.
    #[arg(long, allow_negative_numbers = true, value_name = "FACTOR", default_value_t = Headroom::default().memory)]
    memory_headroom: f64,
    /// Processor time to have for each that is used.
    #[arg(long, allow_negative_numbers = true, value_name = "FACTOR", default_value_t = Headroom::default().cpu)]
    cpu_headroom: f64,
    /// Room and bandwidth of the drive to have for each that is used.
    #[arg(long, allow_negative_numbers = true, value_name = "FACTOR", default_value_t = Headroom::default().drive)]
    drive_headroom: f64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Plans, and prints.
///
/// # Errors
/// When a file cannot be read, a number means nothing, or a host could not hold one sandbox.
pub fn run(args: &CapacityArgs) -> Result<()> {
    let host = read_host(&args.host)?;
    let measured = Measured::read(&args.measured, args.dirty_mb)?;
    let demand = Demand {
        creates_per_s: args.rps,
        live: args.live,
        execs_per_create: args.execs,
        used_percent: args.used,
        snapshots_per_hour: args.snapshots_per_hour,
        kept_hours: args.keep,
    };
    let headroom = Headroom {
        memory: args.memory_headroom,
        cpu: args.cpu_headroom,
        drive: args.drive_headroom,
    };
    let plan =
        plan_capacity(&demand, &measured.costs, &host, &headroom).context("there is no plan")?;
    let text = if args.json {
        let report = report(&demand, &measured, &host, &headroom, &plan);
        format!("{}\n", serde_json::to_string_pretty(&report)?)
    } else {
        table(&demand, &measured, &plan)?
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")
}

/// A number of the unit that a resource is shown in.
fn shown(resource: Resource, value: f64) -> (f64, &'static str) {
    const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
    match resource {
        Resource::Memory | Resource::DriveBytes => (value / GIB, "GiB"),
        Resource::DriveWrites => (value / 1e6, "MB/s"),
        Resource::VmCores | Resource::ShardCores => (value, "cores"),
        Resource::Sandboxes => (value, ""),
    }
}

fn table(demand: &Demand, measured: &Measured, plan: &CapacityPlan) -> Result<String> {
    let mut text = format!(
        "{:<18} {:>12} {:>12} {:<5} {:>7}   {}\n",
        "", "needed", "one host has", "", "hosts", "one host carries"
    );
    for line in &plan.lines {
        let (need, unit) = shown(line.resource, line.need);
        let (has, _) = shown(line.resource, line.host_has);
        let carries = if line.need > 0.0 {
            format!("{:.0} %", (line.one_host_carries * 100.0).floor())
        } else {
            "not needed".to_owned()
        };
        let first = if line.resource == plan.first { "  runs out first" } else { "" };
        writeln!(
            text,
            "{:<18} {need:>12.1} {has:>12.1} {unit:<5} {:>7}   {carries}{first}",
            line.resource, line.hosts
        )?;
    }
    writeln!(
        text,
        "\n{} live sandboxes, {} made in a second: each lives {:.1} s on average.",
        demand.live, demand.creates_per_s, plan.mean_life_s
    )?;
    let hosts = if plan.hosts == 1 { "host is" } else { "hosts are" };
    writeln!(text, "{} {hosts} needed, headroom included.", plan.hosts)?;
    if let Some(line) = plan.tightest() {
        let share = line.one_host_carries;
        writeln!(
            text,
            "On one host {} would run out first, at {:.1} creates/s with {:.0} alive.",
            line.resource,
            demand.creates_per_s * share,
            (demand.live * share).floor()
        )?;
    }
    if let Some(note) = measured.note() {
        writeln!(text, "{note}")?;
    }
    Ok(text)
}

fn report(
    demand: &Demand,
    measured: &Measured,
    host: &HostShape,
    headroom: &Headroom,
    plan: &CapacityPlan,
) -> Value {
    let lines = plan.lines.iter().map(|line| {
        json!({
            "resource": line.resource.to_string(),
            "need": line.need,
            "one_host_has": line.host_has,
            "hosts": line.hosts,
            // Of what is not needed there is always enough.
            "one_host_carries": line.one_host_carries.is_finite().then_some(line.one_host_carries),
        })
    });
    json!({
        "hosts": plan.hosts,
        "runs_out_first": plan.first.to_string(),
        "mean_life_s": plan.mean_life_s,
        "resources": lines.collect::<Vec<_>>(),
        "demand": {
            "creates_per_s": demand.creates_per_s,
            "live": demand.live,
            "execs_per_create": demand.execs_per_create,
            "used_percent": demand.used_percent,
            "snapshots_per_hour": demand.snapshots_per_hour,
            "kept_hours": demand.kept_hours,
        },
        "costs": measured.costs_json(),
        "cost_sources": measured.sources_json(),
        "host": files::host_json(host),
        "headroom": { "memory": headroom.memory, "cpu": headroom.cpu, "drive": headroom.drive },
    })
}
