//! `mica kvm-kind`: whether this machine's KVM can run a Linux guest, and what to do when it cannot.
//!
//! Called by people and by scripts. Refuses to try: a guest that crawls or hangs tells less than a sentence.

use anyhow::{Context, Result, bail};
use mica_numa::facts::KvmKind;

/// Prints the kind, and fails where no Linux guest runs.
///
/// # Errors
/// When this machine's KVM cannot run Linux, with the reason and what to do instead.
pub fn print() -> Result<()> {
    let kind = KvmKind::detect().context("cannot read /proc/cpuinfo")?;
    if !kind.runs_linux() {
        bail!("{kind}. `mica lab up` boots an emulated host instead");
    }
    println!("{kind}");
    Ok(())
}
