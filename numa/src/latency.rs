//! Holds how long a core may take to leave its idle state, while the daemon runs.
//!
//! Called by the binary's `serve`. Whatever crosses cores (a request to another shard, a guest's answer, a
//! vCPU that is kicked) waits for a core that sleeps, and some states take longer to leave than the work
//! takes. The kernel's PM QoS keeps the promise for all cores for as long as the file is open, so a daemon
//! that is killed holds nothing. Refuses to choose: what it saves in time it costs in power, and that is the
//! operator's decision.
//!
//! Source: Documentation/power/pm_qos_interface.rst of the kernel, "cpu latency QoS".

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// Who chooses idle states: without one, cores halt whatever is held.
const DRIVER: &str = "/sys/devices/system/cpu/cpuidle/current_driver";

/// Where the kernel takes such wishes.
const DEVICE: &str = "/dev/cpu_dma_latency";

/// A wish that holds until it is dropped.
#[derive(Debug)]
pub struct CpuLatency(#[expect(dead_code, reason = "open is what it is for")] File);

impl CpuLatency {
    /// Whether it makes a difference here: a kernel without a driver for idle states takes the wish, and
    /// halts its cores all the same.
    #[must_use]
    pub fn has_effect() -> bool {
        std::fs::read_to_string(DRIVER).is_ok_and(|driver| driver.trim() != "none")
    }

    /// From now on no core is in a state that takes longer to leave, in microseconds. With zero, cores do
    /// not sleep at all: they poll.
    ///
    /// # Errors
    /// When the device is not there, or not this user's to write.
    pub fn hold(limit_us: u32) -> io::Result<Self> {
        // The kernel takes a signed number, of which more than this says nothing.
        let limit_us = i32::try_from(limit_us).unwrap_or(i32::MAX);
        let mut file = OpenOptions::new().write(true).open(Path::new(DEVICE))?;
        file.write_all(&limit_us.to_ne_bytes())?;
        Ok(Self(file))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// The least of what anybody holds now, in microseconds.
    fn held_us() -> i32 {
        let mut bytes = [0; 4];
        let mut file = File::open(DEVICE).expect("CONFIG_CPU_IDLE, and root");
        file.read_exact(&mut bytes).expect("a number");
        i32::from_ne_bytes(bytes)
    }

    #[test]
    fn the_kernel_holds_it_until_it_is_dropped() {
        assert!(held_us() > 7, "somebody holds less already");
        let held = CpuLatency::hold(7).expect("root");
        assert!(held_us() <= 7);
        drop(held);
        assert!(held_us() > 7);
    }
}
