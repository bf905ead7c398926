//! The shape of the emulated machine, as given on the command line and kept in the state.
//!
//! `up` takes it; qemu.rs turns it into arguments. It refuses shapes that QEMU or the topology
//! code could not use.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// One NUMA node per socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    pub sockets: u32,
    pub cores_per_socket: u32,
    pub memory_mib: u32,
    pub drive_gib: u32,
}

impl Shape {
    pub fn check(&self) -> Result<()> {
        ensure!((1..=8).contains(&self.sockets), "--sockets must be from 1 to 8");
        ensure!((1..=64).contains(&self.cores_per_socket), "--cores must be from 1 to 64");
        ensure!(
            self.memory_mib / self.sockets >= 512,
            "--memory must be at least 512 MiB for each of {} sockets",
            self.sockets
        );
        ensure!((1..=4096).contains(&self.drive_gib), "--drive must be from 1 to 4096 GiB");
        Ok(())
    }

    pub fn cpus(&self) -> u32 {
        self.sockets * self.cores_per_socket
    }

    /// The memory of one node; what does not divide evenly is left out.
    pub fn node_memory_mib(&self) -> u32 {
        self.memory_mib / self.sockets
    }
}

/// A lab's name becomes a directory and a part of QEMU's arguments.
pub fn check_name(name: &str) -> Result<()> {
    ensure!(
        (1..=32).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !name.starts_with('-'),
        "--name must be 1 to 32 characters of a-z, 0-9 and -, and not begin with -: {name:?}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_directory_or_split_an_argument_are_refused() {
        assert!(check_name("default").is_ok());
        assert!(check_name("ci-2").is_ok());
        for bad in ["", "..", "a/b", "a,b", "-a", "A", &"x".repeat(33)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_shape_without_memory_for_each_node_is_refused() {
        let good = Shape { sockets: 2, cores_per_socket: 2, memory_mib: 8192, drive_gib: 32 };
        assert!(good.check().is_ok());
        assert_eq!((good.cpus(), good.node_memory_mib()), (4, 4096));
        assert!(Shape { sockets: 0, ..good }.check().is_err());
        assert!(Shape { memory_mib: 1000, ..good }.check().is_err());
        assert!(Shape { cores_per_socket: 65, ..good }.check().is_err());
    }
}
