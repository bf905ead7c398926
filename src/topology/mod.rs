//! `mica topology`: a machine and the plan for it, as text, JSON or a picture.
//!
//! Called by operators who try layouts, also for machines that are not there. Refuses to start
//! anything.

mod json;
mod svg;
mod text;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use mica_numa::topology::{self, XML_BYTES_MAX};
use mica_numa::{Plan, Topology, plan};

use crate::layout::PlanArgs;

/// Which machine, which wishes, and how to show them.
#[derive(Args, Debug)]
pub struct TopologyArgs {
    /// Another machine than this one: what `lstopo FILE.xml` (hwloc 2) wrote there.
    #[arg(long, value_name = "FILE")]
    xml: Option<PathBuf>,
    /// Print JSON. Its form is in docs/tuning.md.
    #[arg(long)]
    json: bool,
    /// Draw into this file too.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    plan: PlanArgs,
}

/// What is shown.
struct Layout {
    topology: Topology,
    plan: Plan,
    smt: mica_numa::Smt,
}

/// The plan for this machine.
///
/// # Errors
/// When the machine cannot be read or the wishes cannot be met.
pub fn planned(args: &PlanArgs) -> Result<Plan> {
    let topology = topology::read().context("cannot read the machine")?;
    plan(&topology, &args.config()).context("cannot place the shards")
}

/// Shows machine and plan.
///
/// # Errors
/// As [`planned`], when the other machine's file is not one, or when something cannot be written.
pub fn print(args: &TopologyArgs) -> Result<()> {
    let topology = match &args.xml {
        Some(file) => other_machine(file)?,
        None => topology::read().context("cannot read the machine")?,
    };
    let config = args.plan.config();
    let plan = plan(&topology, &config).context("cannot place the shards")?;
    let layout = Layout { topology, plan, smt: config.smt };
    if let Some(file) = &args.svg {
        let write = std::fs::write(file, svg::draw(&layout));
        write.with_context(|| format!("cannot write {}", file.display()))?;
    }
    let shown = if args.json { json::show(&layout)? } else { text::show(&layout) };
    write!(std::io::stdout(), "{shown}").context("cannot write to standard output")
}

fn other_machine(file: &Path) -> Result<Topology> {
    let reading = || format!("cannot read {}", file.display());
    let mut bytes = Vec::new();
    // One byte more than is taken, so that a file without an end is refused and not read.
    let most = u64::try_from(XML_BYTES_MAX)?.saturating_add(1);
    File::open(file)
        .and_then(|file| file.take(most).read_to_end(&mut bytes))
        .with_context(reading)?;
    topology::from_xml(&bytes).with_context(reading)
}
