//! `mica bench ab -- create -c 1 -n 50`: two daemons in turns, and how much one differs from the other.
//!
//! Called by [`crate::run`]. A machine that others use is fast in one minute and slow in the next: two runs after each other say
//! little, and runs in turns (A B B A) say what differs. Refuses tables that are no table.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser};
use mica_lab::bench::bootstrap::{Block, Estimate};
use mica_lab::bench::document::Document;
use mica_lab::bench::host::Address;
use mica_lab::bench::row::number;
use mica_lab::bench::side::{Guest, Side};
use mica_lab::bench::tables::Measure;
use mica_lab::engine::machine;
use serde_json::{Value, json};

use crate::engine::beside;
use crate::tables::{quietly, stop_flag};
use crate::{Cli, print};

/// What the daemon's processor time is called among the rows.
const CPU: &str = "daemon_cpu_per_request";

#[derive(Args, Debug)]
pub struct AbArgs {
    /// The first daemon. Default: mica beside this program.
    #[arg(long, value_name = "FILE")]
    a: Option<PathBuf>,
    /// The second one. Default: the first.
    #[arg(long, value_name = "FILE")]
    b: Option<PathBuf>,
    /// More options of the first one's `mica serve`, separated by spaces.
    #[arg(
        long,
        visible_alias = "a-args",
        value_name = "OPTIONS",
        default_value = "",
        allow_hyphen_values = true
    )]
    a_serve_args: String,
    /// More options of the second one's.
    #[arg(
        long,
        visible_alias = "b-args",
        value_name = "OPTIONS",
        default_value = "",
        allow_hyphen_values = true
    )]
    b_serve_args: String,
    /// The program of the VMs, which needs --template-args. Default: the stand-in, which isolates nothing and
    /// shows the daemon alone.
    #[arg(long, value_name = "FILE", requires = "template_args")]
    vm_program: Option<PathBuf>,
    /// What `mica template add` is told of the guest, as "--kernel FILE --disk FILE --ready agent".
    #[arg(long, value_name = "OPTIONS", allow_hyphen_values = true, requires = "vm_program")]
    template_args: Option<String>,
    /// Have the stand-in run this agent, for tables that run commands or code.
    #[arg(long, value_name = "FILE", conflicts_with = "vm_program")]
    agent: Option<PathBuf>,
    /// Blocks of A B B A, or B A A B in turn.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    blocks: u32,
    /// What the intervals are drawn with.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// A directory for the two stores, to be made and removed.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Write the ratios to this file, as JSON.
    #[arg(short, long, alias = "json", value_name = "FILE")]
    output: Option<PathBuf>,
    /// The table and its options, after `--`: what each run is.
    #[arg(required = true, last = true, value_name = "TABLE")]
    table: Vec<String>,
}

/// Which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    A,
    B,
}

/// Samples by operation and case.
type Samples = BTreeMap<String, Vec<Block>>;

/// Runs both in turns.
///
/// # Errors
/// When a daemon does not come up, or a request fails.
pub fn run(args: &AbArgs) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this takes root, as the daemon does");
    let words = ["mica-bench"].into_iter().chain(args.table.iter().map(String::as_str));
    let cli = Cli::try_parse_from(words)?;
    let Some((measure, _)) = cli.command.table() else { bail!("{} is no table", args.table[0]) };
    let root = args
        .directory
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("/var/tmp/mica-bench-ab-{}", std::process::id())));
    std::fs::create_dir(&root).with_context(|| format!("make {}", root.display()))?;
    // As long as the stores are there.
    let host = machine::host(Some(&root));
    let done = in_turns(args, measure, &root);
    let removed = std::fs::remove_dir(&root).with_context(|| format!("{} stays", root.display()));
    let (samples, turns) = done?;
    removed?;
    let results = estimates(&samples, args.seed);
    let host = host?;
    print(&format!("{}\n{}", text(&results), machine::text(&host)))?;
    if let Some(path) = &args.output {
        let options = json!({
            "table": args.table, "blocks": args.blocks, "seed": args.seed,
            "a_serve_args": args.a_serve_args, "b_serve_args": args.b_serve_args,
        });
        let mut document = Document::new("ab", &options, &[]);
        document.0["host"] = host;
        document.0["turns"] = turns.into();
        document.0["results"] = results.iter().map(json_of).collect();
        document.write(path)?;
    }
    Ok(())
}

/// The samples, and whose turn it was, in order.
fn in_turns(
    args: &AbArgs,
    measure: &dyn Measure,
    root: &std::path::Path,
) -> Result<(Samples, Vec<Value>)> {
    let stop = stop_flag()?;
    let first = args.a.clone().map_or_else(|| beside("mica", "--a"), Ok)?;
    let second = args.b.clone().unwrap_or_else(|| first.clone());
    let guest = guest(args)?;
    let words =
        |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
    // The name is also that of its control group.
    let place = |name: &str| root.join(format!("mica-ab-{}-{name}", std::process::id()));
    let a = Side::start(&first, &words(&args.a_serve_args), &guest, &place("a"))?;
    let b = Side::start(&second, &words(&args.b_serve_args), &guest, &place("b"))?;
    // What the first run of each finds cold is no difference between them.
    for side in [&a, &b] {
        quietly(measure, &side.address, &stop)?;
    }
    let (mut samples, mut turns) = (Samples::new(), Vec::new());
    for block in 0..args.blocks {
        let order = if block.is_multiple_of(2) {
            [Which::A, Which::B, Which::B, Which::A]
        } else {
            [Which::B, Which::A, Which::A, Which::B]
        };
        for which in order {
            let side = if which == Which::A { &a } else { &b };
            slot(measure, side, which, &stop, usize::try_from(block)?, &mut samples)?;
            let name = format!("{which:?}");
            turns.push(json!({ "side": name, "daemon_pid": side.daemon.pid }));
        }
    }
    Ok((samples, turns))
}

/// One run on one side.
fn slot(
    measure: &dyn Measure,
    side: &Side,
    which: Which,
    stop: &Arc<AtomicBool>,
    block: usize,
    samples: &mut Samples,
) -> Result<()> {
    let address: &Address = &side.address;
    let before = side.daemon.cpu()?;
    let table = quietly(measure, address, stop)?;
    let used = side.daemon.cpu()?.saturating_sub(before);
    let failed = table.failed();
    ensure!(failed == 0, "{failed} requests of {which:?} failed: their times would mean nothing");
    let mut add = |name: String, values: Vec<f64>| {
        let blocks = samples.entry(name).or_default();
        blocks.resize(blocks.len().max(block + 1), Block::default());
        match which {
            Which::A => blocks[block].a.extend(values),
            Which::B => blocks[block].b.extend(values),
        }
    };
    let mut requests = 0;
    for row in &table.rows {
        requests += row.times.len();
        let micros = row.times.iter().map(|time| time.as_secs_f64() * 1e6).collect();
        add(format!("{} {}", row.op, row.case).trim_end().to_owned(), micros);
    }
    // Warm-up and removal are in it too, on both sides alike.
    add(CPU.to_owned(), vec![used.as_secs_f64() * 1e6 / number(requests.max(1))]);
    Ok(())
}

fn guest(args: &AbArgs) -> Result<Guest> {
    match (&args.vm_program, &args.template_args) {
        (Some(program), Some(words)) => Ok(Guest::Vm {
            program: program.clone(),
            template_args: words.split_whitespace().map(str::to_owned).collect(),
        }),
        _ => Ok(Guest::StandIn {
            program: beside("standin-vm", "--vm-program")?,
            agent: args.agent.clone(),
        }),
    }
}

fn estimates(samples: &Samples, seed: u64) -> Vec<(String, Option<Estimate>)> {
    let of = |(name, blocks): (&String, &Vec<Block>)| (name.clone(), Estimate::of(blocks, seed));
    samples.iter().map(of).collect()
}

fn text(results: &[(String, Option<Estimate>)]) -> String {
    let mut text = format!(
        "{:<32} {:>12} {:>12} {:>8}  {:<18}\n",
        "median", "A, us", "B, us", "B/A", "95 % interval"
    );
    for (name, estimate) in results {
        let Some(Estimate { a, b, ratio, low, high }) = *estimate else {
            text += &format!("{name:<32} has no samples\n");
            continue;
        };
        let verdict = match estimate {
            Some(found) if found.differs() => "differs",
            _ => "no difference seen",
        };
        let interval = format!("{low:.3} to {high:.3}");
        text += &format!("{name:<32} {a:>12.1} {b:>12.1} {ratio:>8.3}  {interval:<18} {verdict}\n");
    }
    text
}

fn json_of((name, estimate): &(String, Option<Estimate>)) -> Value {
    json!({
        "op": name,
        "a_median_us": estimate.map(|found| found.a),
        "b_median_us": estimate.map(|found| found.b),
        "ratio": estimate.map(|found| found.ratio),
        "ci95_low": estimate.map(|found| found.low),
        "ci95_high": estimate.map(|found| found.high),
        "differs": estimate.map(|found| found.differs()),
    })
}
