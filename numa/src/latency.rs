//! Holds how long a core may take to leave its idle state, while the daemon runs.
//!
//! Called by the binary's `serve`. Whatever crosses cores (a
//! request to another shard, a guest's answer, a vCPU that is kicked) waits for a core that sleeps, and
//! some states take longer to leave than the work takes. The kernel's PM QoS keeps the promise for all
//! cores for as long as the file is open, so a daemon that is killed holds nothing. Refuses to choose: what
//! it saves in time it costs in power, and that is the operator's decision.
//!
//! Source: Documentation/power/pm_qos_interface.rst of the kernel, "cpu latency QoS".

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

/// Where the kernel takes such wishes.
const DEVICE: &str = "/dev/cpu_dma_latency";

/// A wish that holds until it is dropped.
#[derive(Debug)]
pub struct CpuLatency(#[expect(dead_code, reason = "open is what it is for")] File);

impl CpuLatency {
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

    /// The least of what anybody holds now, in microseconds.
    ///
    /// # Errors
    /// When the device cannot be read.
    pub fn held_us() -> io::Result<u32> {
        let mut bytes = [0; 4];
        File::open(DEVICE)?.read_exact(&mut bytes)?;
        Ok(u32::try_from(i32::from_ne_bytes(bytes)).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_holds_it_until_it_is_dropped() {
        // Another process of this machine may hold less: then that is what holds.
        let before = CpuLatency::held_us().expect("CONFIG_CPU_IDLE, and root");
        let held = CpuLatency::hold(before.min(1000) / 2).expect("root");
        assert!(CpuLatency::held_us().expect("root") <= before.min(1000) / 2);
        drop(held);
        assert_eq!(CpuLatency::held_us().expect("root"), before);
    }
}
