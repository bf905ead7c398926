//! `mica topology`: the plan, and nothing else.
//!
//! Called by operators who try layouts. Refuses to start anything.

use std::io::Write;

use anyhow::{Context, Result};
use mica_numa::{Plan, plan, topology};

use crate::config::PlanArgs;

/// The plan for this machine.
///
/// # Errors
/// When the machine cannot be read or the wishes cannot be met.
pub fn planned(args: &PlanArgs) -> Result<Plan> {
    let topology = topology::read().context("cannot read the machine")?;
    plan(&topology, &args.config()).context("cannot place the shards")
}

/// Prints it.
///
/// # Errors
/// As [`planned`], or when standard output is closed.
pub fn print(args: &PlanArgs) -> Result<()> {
    let plan = planned(args)?;
    write!(std::io::stdout(), "{plan}").context("cannot write to standard output")
}
