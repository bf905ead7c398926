//! What the operator decides about a host.
//!
//! Called by the binary, which parses it. Refuses numbers that cannot work ([`HostConfig::check`]).

use std::path::PathBuf;
use std::time::Duration;

use mica_storage::FlattenLimits;
use mica_wire::vm::console;

use crate::{Accounts, RunError};

/// Most bytes of one sandbox's console ring.
const CONSOLE_BYTES_MAX: u64 = 16 << 20;

/// Most sandboxes one host may be told to run. Sized so that ids of users stay far below 2^31.
const SANDBOXES_MAX: u32 = 100_000;

/// Longest boot that is waited for. Emulated hosts are slow; a client waits no longer than this.
const BOOT_DEADLINE_MAX: Duration = Duration::from_secs(3600);

/// First user id that may be given to a VM process: below are people and system services.
const UID_FIRST_MIN: u32 = 10_000;

/// One host.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Root of the template store and of sandbox disks.
    pub store_root: PathBuf,
    /// The `mica-vm` executable.
    pub vm_program: PathBuf,
    /// A directory of a cgroup v2 file system that belongs to this daemon alone, such as
    /// `/sys/fs/cgroup/mica`. Made if it is not there. What runs in it at start is taken over where a
    /// record says that it is a sandbox, and killed where none does.
    pub cgroup_root: PathBuf,
    /// Whether the memory and pids controllers must be there. Off only for development on machines
    /// that bind them to cgroup v1: sandboxes then run without those limits, and the log says so.
    pub cgroup_limits_required: bool,
    /// VM processes run under uids from `uid_first` on, each under its own: one for each sandbox and
    /// for each process that is held ready.
    pub uid_first: u32,
    /// Most sandboxes at one time, those being made included.
    pub sandboxes_max: u32,
    /// Length of each sandbox's console ring.
    pub console_bytes: u64,
    /// How long a create, or one step of an operation, may take before it is given up.
    pub boot_deadline: Duration,
    /// VM processes that each shard holds ready for each size of template, however quiet it is.
    pub pool_floor: u32,
    /// Most that it holds ready when much is asked for.
    pub pool_ceiling: u32,
    /// Whether running sandboxes go on when the daemon is told to stop, for the next one to take over.
    /// Paused ones always wait for it.
    pub keep_sandboxes: bool,
    /// Guest memory that is copied while the guest stands still, in MiB. More than that is copied while
    /// it runs, and what it wrote meanwhile once more.
    pub capture_budget_mib: u32,
    /// Buffers of 1 MiB that each shard pins for reading and writing files.
    pub io_buffers: u16,
    /// Memory of each node that holds copies of base images, in MiB. What does not fit is mapped from
    /// its file.
    pub replica_budget_mib: u32,
    /// Images whose memory takes more than so many MiB of files are not mapped: their pages come when
    /// a guest touches them. 0: none.
    pub on_demand_over_mib: u32,
    /// Whether VM processes tell what was written to memory also where the kernel shows it (6.7 and newer):
    /// to compare the two.
    pub log_writes: bool,
    /// When a snapshot's chain of layers is made shorter.
    pub flatten: FlattenLimits,
    /// Memory of each node that is to stay free: below it, frozen processes of paused sandboxes go, the
    /// longest paused first.
    pub memory_reserve_mib: u32,
    /// Accounts that sandboxes of an earlier daemon are counted in again.
    pub accounts: Accounts,
    /// Whether anything is counted and timed.
    pub metrics: bool,
    /// Most microseconds that a core of the machine may take to wake while a shard hands work over densely.
    /// `None`: what the machine is set to.
    pub dense_latency_us: Option<u32>,
}

/// Most VM processes that one shard may hold ready for one size.
const POOL_MAX: u32 = 4096;

/// Bytes of a page of guest memory times those in a MiB.
const PAGES_PER_MIB: u64 = (1 << 20) / mica_units::PAGE_BYTES;

impl HostConfig {
    /// A host in these places, with everything else as it is where nobody decides otherwise.
    #[must_use]
    pub fn new(store_root: PathBuf, vm_program: PathBuf, cgroup_root: PathBuf) -> Self {
        Self {
            store_root,
            vm_program,
            cgroup_root,
            cgroup_limits_required: true,
            uid_first: 100_000,
            sandboxes_max: 4096,
            console_bytes: 64 * 1024,
            boot_deadline: Duration::from_secs(60),
            pool_floor: 4,
            pool_ceiling: 64,
            keep_sandboxes: false,
            capture_budget_mib: 16,
            io_buffers: 32,
            replica_budget_mib: 4096,
            on_demand_over_mib: 0,
            log_writes: false,
            flatten: FlattenLimits::default(),
            memory_reserve_mib: 1024,
            accounts: Accounts::new(),
            metrics: true,
            dense_latency_us: None,
        }
    }

    /// Checks every bound.
    ///
    /// # Errors
    /// Names the field that is out of bounds and the bound.
    pub fn check(&self) -> Result<(), RunError> {
        let problem = if !(1..=SANDBOXES_MAX).contains(&self.sandboxes_max) {
            Some(format!("sandboxes_max is {}, not 1 to {SANDBOXES_MAX}", self.sandboxes_max))
        } else if !(console::BYTES_MIN..=CONSOLE_BYTES_MAX).contains(&self.console_bytes) {
            let (low, high) = (console::BYTES_MIN, CONSOLE_BYTES_MAX);
            Some(format!("console_bytes is {}, not {low} to {high}", self.console_bytes))
        } else if self.uid_first < UID_FIRST_MIN || self.uid_first > u32::MAX / 2 {
            Some(format!("uid_first is {}, not {UID_FIRST_MIN} to 2^31", self.uid_first))
        } else if self.boot_deadline.is_zero() || self.boot_deadline > BOOT_DEADLINE_MAX {
            let most = BOOT_DEADLINE_MAX.as_secs();
            Some(format!("boot_deadline is {:?}, not up to {most} s", self.boot_deadline))
        } else if self.pool_ceiling < self.pool_floor || self.pool_ceiling > POOL_MAX {
            let (floor, ceiling) = (self.pool_floor, self.pool_ceiling);
            Some(format!("pool_ceiling is {ceiling}, not {floor} (the floor) to {POOL_MAX}"))
        } else if self.capture_budget_mib == 0 {
            Some("capture_budget_mib is 0; a guest has at least one page to copy".to_owned())
        } else if !(4..=mica_numa::io::IO_BUFS_MAX).contains(&self.io_buffers) {
            let most = mica_numa::io::IO_BUFS_MAX;
            Some(format!("io_buffers is {}, not 4 to {most}", self.io_buffers))
        } else {
            None
        };
        problem.map_or(Ok(()), |problem| Err(RunError::Config(problem)))
    }

    /// Bytes of copies of base images on one node.
    pub(crate) fn replica_budget_bytes(&self) -> u64 {
        u64::from(self.replica_budget_mib) << 20
    }

    /// Whether memory in files of so many bytes comes on demand.
    pub(crate) fn is_on_demand(&self, file_bytes: u64) -> bool {
        self.on_demand_over_mib > 0 && file_bytes > u64::from(self.on_demand_over_mib) << 20
    }

    /// Pages that may be copied while a guest stands still.
    pub(crate) fn capture_budget_pages(&self) -> u64 {
        u64::from(self.capture_budget_mib) * PAGES_PER_MIB
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_out_of_bounds_are_named() {
        let good = HostConfig {
            store_root: "/s".into(),
            vm_program: "/v".into(),
            cgroup_root: "/c".into(),
            cgroup_limits_required: true,
            uid_first: 100_000,
            sandboxes_max: 1000,
            console_bytes: 65_536,
            boot_deadline: Duration::from_secs(60),
            pool_floor: 2,
            pool_ceiling: 8,
            keep_sandboxes: false,
            capture_budget_mib: 16,
            io_buffers: 8,
            replica_budget_mib: 0,
            on_demand_over_mib: 0,
            log_writes: false,
            flatten: FlattenLimits::default(),
            memory_reserve_mib: 256,
            accounts: Accounts::new(),
            metrics: true,
            dense_latency_us: None,
        };
        assert!(good.check().is_ok());
        let bad = [
            ("sandboxes_max", HostConfig { sandboxes_max: 0, ..good.clone() }),
            ("console_bytes", HostConfig { console_bytes: 1 << 40, ..good.clone() }),
            ("uid_first", HostConfig { uid_first: 0, ..good.clone() }),
            ("uid_first", HostConfig { uid_first: u32::MAX, ..good.clone() }),
            ("boot_deadline", HostConfig { boot_deadline: Duration::ZERO, ..good.clone() }),
            ("boot_deadline", HostConfig { boot_deadline: Duration::MAX, ..good.clone() }),
            ("pool_ceiling", HostConfig { pool_ceiling: 1, ..good.clone() }),
            ("capture_budget_mib", HostConfig { capture_budget_mib: 0, ..good.clone() }),
            ("io_buffers", HostConfig { io_buffers: 0, ..good }),
        ];
        for (name, config) in bad {
            let said = config.check().unwrap_err().to_string();
            assert!(said.contains(name), "{said}");
        }
    }
}
