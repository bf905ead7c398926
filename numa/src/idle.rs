//! How the machine's cores idle, and how long they take to be there again.
//!
//! Called by [`crate::latency`], which lets shards keep cores from deep states, and by `mica doctor`, which
//! explains them. Reads the first core: the others have the same. Refuses to believe a virtual
//! machine: what halts there waits for the hypervisor, whatever the table says.
//!
//! Source: Documentation/admin-guide/pm/cpuidle.rst and Documentation/virt/guest-halt-polling.rst of the kernel.

use std::fs;
use std::path::Path;

/// Leaving an idle state costs no more than what is done then.
pub const LATENCY_US_MAX: u64 = 10;

/// What C1 of Intel's and AMD's server processors is left in, by the tables of intel_idle and the ACPI of most.
pub const C1_LATENCY_US: u32 = 2;

/// How processors idle.
#[derive(Debug, Default)]
pub struct IdleStates {
    /// Who chooses them, if anybody does.
    driver: Option<String>,
    /// The state that takes longest to leave, of those that are on, and how long in microseconds.
    pub deepest: Option<(String, u64)>,
    /// For how long a guest polls before it halts, in nanoseconds, where the halting is the hypervisor's.
    pub halt_poll_ns: Option<u64>,
}

impl IdleStates {
    /// Reads `sys` below `root`.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let base = "sys/devices/system/cpu/cpu0/cpuidle";
        let states = names(root, base).into_iter().filter_map(|state| {
            let of = |name: &str| text(root, &format!("{base}/{state}/{name}"));
            let is_off = of("disable").is_some_and(|disable| disable == "1");
            let latency_us = of("latency")?.parse().ok()?;
            let name = of("name").unwrap_or_else(|| state.clone());
            (!is_off).then_some((name, latency_us))
        });
        let deepest = states.max_by_key(|(_, latency_us)| *latency_us);
        let driver = text(root, "sys/devices/system/cpu/cpuidle/current_driver");
        let polled = "sys/module/haltpoll/parameters/guest_halt_poll_ns";
        let halt_poll_ns = driver
            .as_deref()
            .filter(|driver| *driver == "haltpoll")
            .and_then(|_| text(root, polled)?.parse().ok());
        Self { driver: driver.filter(|driver| driver != "none"), deepest, halt_poll_ns }
    }

    /// Whether a wish for a latency makes a difference: a kernel without a driver for idle states takes
    /// it, and halts its cores all the same.
    #[must_use]
    pub fn has_driver(&self) -> bool {
        self.driver.is_some()
    }

    /// What to hold so that a hand-over costs no more than what is done then; `None` where it costs no
    /// more already, or nothing is known.
    #[must_use]
    pub fn limit_us(&self) -> Option<u32> {
        match (&self.deepest, self.halt_poll_ns) {
            // It polls first, and is given back when nothing came.
            (_, Some(polled_ns)) if polled_ns > 0 => None,
            // The table of haltpoll says 1 µs, which is not what a hypervisor takes.
            (_, Some(_)) => Some(0),
            (Some((_, latency_us)), None) if *latency_us > LATENCY_US_MAX => Some(C1_LATENCY_US),
            (_, None) => None,
        }
    }
}

fn text(root: &Path, path: &str) -> Option<String> {
    let text = fs::read_to_string(root.join(path)).ok()?;
    Some(text.trim().to_owned())
}

/// The names in a directory, if there is one.
fn names(root: &Path, path: &str) -> Vec<String> {
    let entries = fs::read_dir(root.join(path)).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(
        driver: Option<&str>,
        deepest_us: Option<u64>,
        halt_poll_ns: Option<u64>,
    ) -> IdleStates {
        let deepest = deepest_us.map(|us| ("its name".to_owned(), us));
        IdleStates { driver: driver.map(str::to_owned), deepest, halt_poll_ns }
    }

    #[test]
    fn the_limit_is_c1_where_cores_sleep_deeper_and_nothing_where_they_halt_to_a_hypervisor() {
        let deep = states(Some("intel_idle"), Some(170), None);
        assert_eq!(deep.limit_us(), Some(2));
        assert_eq!(
            states(Some("intel_idle"), Some(10), None).limit_us(),
            None,
            "C1E at the deepest"
        );
        assert_eq!(states(Some("haltpoll"), Some(1), Some(0)).limit_us(), Some(0));
        assert_eq!(states(Some("haltpoll"), Some(1), Some(200_000)).limit_us(), None);
        assert_eq!(states(None, None, None).limit_us(), None);
    }

    #[test]
    fn a_machine_without_a_driver_says_none() {
        let root = std::env::temp_dir().join(format!("mica-idle-{}", std::process::id()));
        let base = root.join("sys/devices/system/cpu/cpuidle");
        fs::create_dir_all(&base).unwrap();
        fs::write(base.join("current_driver"), "none\n").unwrap();
        assert!(!IdleStates::read(&root).has_driver());
        fs::write(base.join("current_driver"), "acpi_idle\n").unwrap();
        assert!(IdleStates::read(&root).has_driver());
        fs::remove_dir_all(&root).unwrap();
    }
}
