//! What the operator decides about a host.
//!
//! Called by the binary, which parses it. Refuses numbers that cannot work ([`HostConfig::check`]).

use std::path::PathBuf;
use std::time::Duration;

use mica_wire::vm::console;

use crate::RunError;

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
    /// `/sys/fs/cgroup/mica`. Made if it is not there; every child of it is killed at start.
    pub cgroup_root: PathBuf,
    /// Whether the memory and pids controllers must be there. Off only for development on machines
    /// that bind them to cgroup v1: sandboxes then run without those limits, and the log says so.
    pub cgroup_limits_required: bool,
    /// VM processes run as `uid_first` to `uid_first + sandboxes_max - 1`, each as its own.
    pub uid_first: u32,
    /// Most sandboxes at one time, those being made included.
    pub sandboxes_max: u32,
    /// Length of each sandbox's console ring.
    pub console_bytes: u64,
    /// How long a create may take before it is given up.
    pub boot_deadline: Duration,
}

impl HostConfig {
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
        } else {
            None
        };
        problem.map_or(Ok(()), |problem| Err(RunError::Config(problem)))
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
        };
        assert!(good.check().is_ok());
        let bad = [
            ("sandboxes_max", HostConfig { sandboxes_max: 0, ..good.clone() }),
            ("console_bytes", HostConfig { console_bytes: 1 << 40, ..good.clone() }),
            ("uid_first", HostConfig { uid_first: 0, ..good.clone() }),
            ("uid_first", HostConfig { uid_first: u32::MAX, ..good.clone() }),
            ("boot_deadline", HostConfig { boot_deadline: Duration::ZERO, ..good.clone() }),
            ("boot_deadline", HostConfig { boot_deadline: Duration::MAX, ..good }),
        ];
        for (name, config) in bad {
            let said = config.check().unwrap_err().to_string();
            assert!(said.contains(name), "{said}");
        }
    }
}
