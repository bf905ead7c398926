//! The command line of `mica serve`, parsed once into types.
//!
//! Called by `main`. Refuses what cannot work while there is still somebody to read why.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use mica_http::{HttpConfig, Keys, Limits};
use mica_shards::{Accounts, HostConfig, NEVER};
use mica_storage::FlattenLimits;

use crate::awake::CoreLatency;
use crate::helper::beside;
use crate::key::book::KeyPlaces;
use crate::layout::PlanArgs;
use crate::tls::TlsArgs;

/// What is beside this executable, and runs one virtual machine.
pub const VM_PROGRAM: &str = "mica-vm";

/// Everything `mica serve` can be told.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// Address and port of the API and of the sandbox proxy. Port 0 takes a free one.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:3000")]
    listen: SocketAddr,
    /// Domain under which `{port}-{id}.DOMAIN` reaches a sandbox; clients are told it.
    #[arg(long, value_name = "DOMAIN")]
    domain: Option<String>,
    /// Directory of templates and sandbox disks. XFS with reflink, or btrfs, makes it fast.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/mica")]
    store: PathBuf,
    /// File of plain API keys of the default tenant, one on each line. Made with one key when there is
    /// no key anywhere.
    #[arg(long, value_name = "FILE", default_value = "/etc/mica/api-keys")]
    key_file: PathBuf,
    /// Database of the keys that `mica key` makes. Default: keys.json beside the key file.
    #[arg(long, value_name = "FILE")]
    key_db: Option<PathBuf>,
    /// Serve without a key whoever can connect, as the default tenant. Only on a loopback address.
    #[arg(long)]
    open: bool,
    /// Program that runs one virtual machine. Default: mica-vm beside this executable.
    #[arg(long, value_name = "FILE")]
    pub vm_program: Option<PathBuf>,
    /// A cgroup v2 directory that is the daemon's alone. Made when it is not there.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/cgroup/mica")]
    cgroup_root: PathBuf,
    /// Run sandboxes without memory and process limits where cgroup v2 has no such controllers.
    /// For development only.
    #[arg(long)]
    without_cgroup_limits: bool,
    /// Serve although KVM here cannot run a Linux guest. Only templates made for it start: the
    /// tiny guest of the tests.
    #[arg(long)]
    accept_unusable_kvm: bool,
    /// First user id of VM processes; each sandbox has its own.
    #[arg(long, value_name = "UID", default_value_t = 100_000)]
    uid_first: u32,
    /// Most sandboxes at one time.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    sandboxes_max: u32,
    /// How much of each sandbox's console is kept, in KiB.
    #[arg(long, value_name = "KIB", default_value_t = 64)]
    console_kib: u32,
    /// Seconds that a sandbox, or one step of an operation on one, may take to become ready.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    boot_deadline: u32,
    /// VM processes that each shard holds ready for each size of template.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pool_min: u32,
    /// Most that it holds ready when much is asked for.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pool_max: u32,
    /// Leave running sandboxes to the next daemon when this one is told to stop. Paused ones always
    /// wait for it.
    #[arg(long)]
    keep_sandboxes: bool,
    /// Guest memory that a snapshot copies while the guest stands still, in MiB. More is copied while
    /// it runs, and what it wrote meanwhile once more.
    #[arg(long, value_name = "MIB", default_value_t = 16)]
    capture_budget_mib: u32,
    /// Buffers of 1 MiB of each shard, for snapshots. Half of them are pinned from the start.
    #[arg(long, value_name = "N", default_value_t = 32)]
    io_buffers: u16,
    /// Memory of each node that holds copies of templates' memory, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    replica_budget_mib: u32,
    /// Bring the memory of images larger than this in when a guest touches it, instead of mapping them.
    /// 0: none.
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    on_demand_over_mib: u32,
    /// Have VM processes tell what was written to memory, also where the kernel shows it (6.7 and newer).
    #[arg(long)]
    log_writes: bool,
    /// Layers of a snapshot above which it is flattened in the background.
    #[arg(long, value_name = "N", default_value_t = FlattenLimits::default().layers_max)]
    flatten_layers: usize,
    /// Pieces of a snapshot's memory above which it is flattened in the background.
    #[arg(long, value_name = "N", default_value_t = FlattenLimits::default().runs_max)]
    flatten_runs: usize,
    /// Memory of each node that is to stay free, in MiB: below it, paused sandboxes leave memory.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory_reserve_mib: u32,
    /// Longest life a client may give a sandbox, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 86_400)]
    sandbox_timeout_max: u32,
    /// Life of a sandbox whose create says nothing of it: seconds, or `never`. Clients of E2B that read an
    /// end of every sandbox do not know what to make of one without.
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = life)]
    sandbox_timeout_default: Duration,
    /// Most client connections of one shard.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    connections_max: u32,
    /// Seconds that requests and streams may still take after SIGTERM.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    drain: u32,
    /// Seconds that a client may take to send a request head, or the body of an API request.
    #[arg(long, value_name = "SECONDS", default_value_t = 15)]
    client_timeout: u32,
    /// Largest file that a client may upload for the build of a template, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    upload_mib: u32,
    /// Most that such files of one tenant take together, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 8192)]
    uploads_mib: u32,
    /// Builds of templates that one tenant may run at once.
    #[arg(long, value_name = "N", default_value_t = 2)]
    builds_at_once: u16,
    /// Most memory that a build of a template may ask for, in MiB, unless one of the operator's templates has more.
    #[arg(long, value_name = "MIB", default_value_t = 8192)]
    build_memory_mib: u32,
    /// Whether operations and requests are counted and timed, and stuck shards noticed.
    #[arg(long, value_name = "off|on", value_enum, default_value_t = Switch::On)]
    metrics: Switch,
    /// How much is logged. 2: a line for each operation, with microseconds for each of its phases; 3:
    /// whatever helps to find a mistake.
    #[arg(short, long, value_name = "LEVEL", default_value_t = 0)]
    verbosity: u8,
    /// Most microseconds that a core may take to leave its idle state. auto: as few as the machine's shallow
    /// states take, while a shard hands much work over; off: what the machine is set to; a number: always,
    /// and with 0 cores do not sleep. See docs/tuning.md.
    #[arg(long, value_name = "auto|off|MICROSECONDS", default_value_t = CoreLatency::Auto)]
    cpu_latency_us: CoreLatency,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    plan: PlanArgs,
}

/// Something that can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Switch {
    Off,
    On,
}

impl Switch {
    fn is_on(self) -> bool {
        self == Self::On
    }
}

/// What the command line meant.
#[derive(Debug)]
pub struct ServeConfig {
    /// Of the front end, but for its keys.
    pub http: HttpConfig,
    /// Of the shards.
    pub host: HostConfig,
    /// Where its certificate is.
    pub tls: TlsArgs,
    /// Where shards sit.
    pub plan: PlanArgs,
    /// Where the keys are.
    pub keys: KeyPlaces,
    /// Whether requests need none.
    pub open: bool,
    /// Whether KVM has to be able to run Linux.
    pub needs_usable_kvm: bool,
    /// How long a core may take to wake.
    pub cpu_latency: CoreLatency,
}

impl ServeArgs {
    /// How much is to be logged.
    pub fn verbosity(&self) -> u8 {
        self.verbosity
    }

    /// Checks and converts everything.
    ///
    /// # Errors
    /// Says which option to change.
    pub fn parse(self) -> Result<ServeConfig> {
        let built_in = beside(VM_PROGRAM)?;
        let vm_program = self.vm_program.clone().unwrap_or_else(|| built_in.clone());
        if !vm_program.is_file() {
            bail!("--vm-program: there is no file {}", vm_program.display());
        }
        let needs_usable_kvm = vm_program == built_in && !self.accept_unusable_kvm;
        let limits = Limits {
            connections_max: usize::try_from(self.connections_max)?,
            drain_timeout: seconds(self.drain),
            head_timeout: at_least_one("--client-timeout", self.client_timeout)?,
            body_timeout: at_least_one("--client-timeout", self.client_timeout)?,
            sandbox_timeout_max: at_least_one("--sandbox-timeout-max", self.sandbox_timeout_max)?,
            sandbox_timeout_default: self.sandbox_timeout_default,
            upload_bytes_max: u64::from(self.upload_mib) << 20,
            upload_tenant_bytes_max: u64::from(self.uploads_mib) << 20,
            builds_at_once: usize::from(self.builds_at_once.max(1)),
            build_memory_mib_max: self.build_memory_mib,
            ..Limits::default()
        };
        if limits.sandbox_timeout_default > limits.sandbox_timeout_max
            && limits.sandbox_timeout_default != NEVER
        {
            bail!("--sandbox-timeout-default must not be more than --sandbox-timeout-max");
        }
        let host = HostConfig {
            // The daemon may not keep its working directory, so paths are made absolute here.
            store_root: std::path::absolute(&self.store).context("--store")?,
            vm_program: std::path::absolute(vm_program).context("--vm-program")?,
            cgroup_root: std::path::absolute(&self.cgroup_root).context("--cgroup-root")?,
            cgroup_limits_required: !self.without_cgroup_limits,
            uid_first: self.uid_first,
            sandboxes_max: self.sandboxes_max,
            console_bytes: u64::from(self.console_kib) * 1024,
            boot_deadline: at_least_one("--boot-deadline", self.boot_deadline)?,
            pool_floor: self.pool_min,
            pool_ceiling: self.pool_max.max(self.pool_min),
            keep_sandboxes: self.keep_sandboxes,
            capture_budget_mib: self.capture_budget_mib,
            io_buffers: self.io_buffers,
            replica_budget_mib: self.replica_budget_mib,
            on_demand_over_mib: self.on_demand_over_mib,
            log_writes: self.log_writes,
            flatten: FlattenLimits {
                layers_max: self.flatten_layers,
                runs_max: self.flatten_runs,
                ..FlattenLimits::default()
            },
            memory_reserve_mib: self.memory_reserve_mib,
            // The keys' file says whose there are.
            accounts: Accounts::new(),
            metrics: self.metrics.is_on(),
            // See `CoreLatency::hold`.
            dense_latency_us: None,
        };
        host.check()?;
        let domain = self.domain.map(|domain| checked_domain(&domain)).transpose()?;
        if self.open {
            refuse_open(&[("--listen", Some(self.listen)), ("--tls-listen", self.tls.listen())])?;
        }
        let keys = Keys::new(self.open);
        let metrics = self.metrics.is_on();
        let http = HttpConfig { listen: self.listen, tls: None, domain, keys, limits, metrics };
        let database = self.key_db.unwrap_or_else(|| self.key_file.with_file_name("keys.json"));
        let keys = KeyPlaces { file: self.key_file, database };
        let (tls, plan) = (self.tls, self.plan);
        let (open, cpu_latency) = (self.open, self.cpu_latency_us);
        Ok(ServeConfig { http, tls, host, plan, keys, open, needs_usable_kvm, cpu_latency })
    }
}

/// A host that asks for no key serves its own machine.
fn refuse_open(addresses: &[(&str, Option<SocketAddr>)]) -> Result<()> {
    for (option, address) in addresses {
        if let Some(address) = address.filter(|address| !address.ip().is_loopback()) {
            bail!(
                "--open serves whoever can connect, so {option} must be a loopback address such as \
                 127.0.0.1:3000, not {address}; leave --open out to serve others, who then need a key"
            );
        }
    }
    Ok(())
}

fn seconds(count: u32) -> Duration {
    Duration::from_secs(u64::from(count))
}

/// Seconds, or `never`.
fn life(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(0) => Err("a sandbox lives for at least 1 second".to_owned()),
        Ok(count) => Ok(seconds(count)),
        Err(_) if text == "never" => Ok(NEVER),
        Err(_) => Err("write seconds, or `never`".to_owned()),
    }
}

fn at_least_one(option: &str, count: u32) -> Result<Duration> {
    if count == 0 {
        bail!("{option} must be at least 1");
    }
    Ok(seconds(count))
}

/// A host name, with a port or without.
///
/// # Errors
/// Says what a domain looks like.
pub fn checked_domain(text: &str) -> Result<String> {
    let (name, port) = text.split_once(':').map_or((text, None), |(n, p)| (n, Some(p)));
    let label = |label: &str| {
        matches!(label.len(), 1..=63)
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if !name.split('.').all(label) || port.is_some_and(|port| port.parse::<u16>().is_err()) {
        bail!("--domain must be a host name such as sandboxes.example, with a port or without");
    }
    Ok(text.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_host_is_its_own_machines_on_every_port() {
        let at = |text: &str| Some(text.parse().unwrap());
        let check = |plain, tls| refuse_open(&[("--listen", plain), ("--tls-listen", tls)]);
        assert!(check(at("127.0.0.1:3000"), None).is_ok());
        assert!(check(at("127.0.0.1:3000"), at("[::1]:443")).is_ok());
        let error = check(at("127.0.0.1:3000"), at("0.0.0.0:443")).unwrap_err().to_string();
        assert!(error.contains("--tls-listen"), "{error}");
        let error = check(at("10.0.0.1:3000"), None).unwrap_err().to_string();
        assert!(error.contains("--listen"), "{error}");
    }

    #[test]
    fn a_life_is_seconds_or_never() {
        assert_eq!(life("15"), Ok(Duration::from_secs(15)));
        assert_eq!(life("never"), Ok(NEVER));
        for bad in ["0", "-1", "", "1h", "4294967296"] {
            assert!(life(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn domains() {
        assert_eq!(checked_domain("Sbx.Example:8443").unwrap(), "sbx.example:8443");
        for bad in ["", ".", "a..b", "http://x", "a b", "x:y", "x:70000"] {
            assert!(checked_domain(bad).is_err(), "{bad}");
        }
    }
}
