//! `mica template warm`: boots a template once and keeps it as a running snapshot, from which every
//! sandbox is restored.
//!
//! Called after a build, an import and an add, and by people. Works beside a daemon: with a control
//! group and user ids of its own. Refuses where KVM cannot run Linux, unless it is told that the
//! template is not Linux.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use mica_numa::facts::KvmKind;
use mica_numa::{PlanConfig, Shards, plan, topology};
use mica_shards::{HostConfig, StopSignal};
use mica_storage::FlattenLimits;

use crate::helper::beside;
use crate::signals;

/// First user id of the VM process: below those of the daemon's.
const UID_FIRST: u32 = 90_000;

/// How a template is warmed up.
#[derive(Args, Debug, Clone)]
pub struct WarmArgs {
    /// Seconds that the guest may take to boot, and its services to start.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    warm_deadline: u32,
    /// Program that runs one virtual machine. Default: mica-vm beside this executable.
    #[arg(long, value_name = "FILE")]
    vm_program: Option<PathBuf>,
    /// A cgroup v2 directory for this command alone. Made when it is not there.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/cgroup/mica-warm")]
    cgroup_root: PathBuf,
    /// Run the guest without memory and process limits where cgroup v2 has no such controllers.
    #[arg(long)]
    without_cgroup_limits: bool,
    /// Start the guest although KVM here cannot run Linux: for templates of the tests.
    #[arg(long)]
    accept_unusable_kvm: bool,
}

/// Whether a guest can be started here at all.
///
/// # Errors
/// When the machine cannot be looked at.
pub fn is_possible(args: &WarmArgs) -> Result<bool> {
    let kind = KvmKind::detect().context("cannot read /proc/cpuinfo")?;
    Ok(kind.runs_linux() || args.accept_unusable_kvm || args.vm_program.is_some())
}

/// Warms a template up.
///
/// # Errors
/// Says what went wrong, with the end of the guest's console where there is one.
pub fn run(store: &Path, name: &str, args: &WarmArgs) -> Result<()> {
    if !is_possible(args)? {
        let kind = KvmKind::detect().context("cannot read /proc/cpuinfo")?;
        bail!("{kind}; warm the template up on the host that runs its sandboxes");
    }
    let vm_program = match &args.vm_program {
        Some(program) => program.clone(),
        None => beside("mica-vm")?,
    };
    let config = HostConfig {
        store_root: std::path::absolute(store).context("--store")?,
        vm_program: std::path::absolute(vm_program).context("--vm-program")?,
        cgroup_root: std::path::absolute(&args.cgroup_root).context("--cgroup-root")?,
        cgroup_limits_required: !args.without_cgroup_limits,
        uid_first: UID_FIRST,
        sandboxes_max: 1,
        console_bytes: 64 * 1024,
        boot_deadline: Duration::from_secs(u64::from(args.warm_deadline)),
        pool_floor: 0,
        pool_ceiling: 0,
        keep_sandboxes: false,
        capture_budget_mib: 1,
        io_buffers: 32,
        replica_budget_mib: 0,
        on_demand_over_mib: 0,
        log_writes: false,
        flatten: FlattenLimits::default(),
        memory_reserve_mib: 0,
        accounts: mica_shards::Accounts::new(),
        metrics: false,
        dense_latency_us: None,
    };
    let wish = PlanConfig { shards: Shards::Total(1), ..PlanConfig::default() };
    let machine = topology::read().context("cannot read the machine")?;
    let plan = plan(&machine, &wish).context("cannot place the guest")?;
    let stop = StopSignal::new().context("cannot make the stop signal")?;
    signals::stop_on_signals(stop.clone())?;
    let started = Instant::now();
    mica_shards::warm(&plan, config, stop, name)
        .with_context(|| format!("template `{name}` was not warmed up"))?;
    println!("template `{name}` is warm, after {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}
