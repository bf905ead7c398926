//! `mica doctor`: what of this machine makes Mica slow, or keeps it from running, and how to mend it.
//!
//! Called by people, before and after they set a host up, and by scripts with `--json`. Reads and changes
//! nothing: the only thing it makes is a file without a name in the store's file system, which is gone when it
//! looks away. Refuses to guess: what cannot be read is said to be unknown.
//!
//! ```text
//! files (`mica_numa::facts`), system calls (probe) ──▶ Seen ──▶ machine, rights, processor, memory, storage, cgroups ──▶ findings ──▶ show
//! ```

mod cgroups;
mod finding;
mod machine;
mod memory;
mod probe;
mod processor;
mod rights;
mod show;
mod storage;
#[cfg(test)]
mod tests;

use std::io::Write;
use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result, bail};
use clap::Args;
use mica_numa::facts::Facts;

use crate::config::VM_PROGRAM;
use crate::helper::beside;
use finding::{Finding, Status};
use probe::{Places, Probed};

/// What to look at.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Print JSON: an array of findings.
    #[arg(long)]
    json: bool,
    /// The store of `mica serve`; where it is not there yet, what holds it will be looked at.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/mica")]
    store: PathBuf,
    /// The cgroup of `mica serve`.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/cgroup/mica")]
    cgroup_root: PathBuf,
    /// The program of `mica serve` that runs one virtual machine. Default: mica-vm beside this executable.
    #[arg(long, value_name = "FILE")]
    vm_program: Option<PathBuf>,
}

/// Looks, judges and prints.
///
/// # Errors
/// When `mica serve` cannot run here; when standard output is closed.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let program = args.vm_program.clone().map_or_else(|| beside(VM_PROGRAM), Ok)?;
    let places = Places {
        store: absolute(&args.store).context("--store")?,
        cgroup: absolute(&args.cgroup_root).context("--cgroup-root")?,
        program: absolute(program).context("--vm-program")?,
    };
    let probed = probe::this_machine(&places);
    let facts = Facts::read(Path::new("/"), &places.store, &places.cgroup, probed.kvm_device);
    let findings = judge(&Seen { facts, probed });
    let text = if args.json { show::json(&findings)? } else { show::text(&findings) };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")?;
    let failing = findings.iter().filter(|finding| finding.status == Status::Fail).count();
    if failing > 0 {
        bail!("`mica serve` cannot run here as it is: {failing} of the checks fail");
    }
    Ok(())
}

/// A machine: what its files say, and what it answered.
#[derive(Debug)]
struct Seen {
    facts: Facts,
    probed: Probed,
}

/// What there is to say about a machine. Depends on what was seen alone.
fn judge(Seen { facts, probed }: &Seen) -> Vec<Finding> {
    let families = [
        machine::judge(facts, probed),
        rights::judge(facts),
        processor::judge(facts),
        memory::judge(facts),
        storage::judge(facts, probed),
        cgroups::judge(facts, probed),
    ];
    families.into_iter().flatten().collect()
}
