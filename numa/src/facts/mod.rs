//! What there is to know about a machine, and the only place that reads it.
//!
//! Called by `mica doctor`, which judges it, by the benchmarks, whose reports say what their figures are of,
//! and, over made-up trees, by tests: every file is below a root that the caller names. Refuses to judge, and
//! to fail: what is not there is `None`. What only a system call tells is the caller's to ask.

mod kvm;
mod mounts;
mod process;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::Path;

pub use kvm::KvmKind;
pub use mounts::{Cgroup, Disk, Store};
pub use process::Limit;

use crate::idle::IdleStates;
use process::{capabilities, is_root, limit};
use tree::{Tree, is_numbered};

/// The bit of the right to go above hard limits: linux/capability.h.
const CAP_SYS_RESOURCE: u32 = 24;

/// A machine, as far as Mica cares.
#[derive(Debug)]
pub struct Facts {
    /// What `/dev/kvm` is good for.
    pub kvm: KvmKind,
    /// As `uname -r` has it.
    pub kernel: Option<String>,
    /// Whether this process is root's.
    pub is_root: Option<bool>,
    /// What this process may, a bit for each of linux/capability.h. Root of a container may lack some.
    pub capabilities: Option<u64>,
    /// `kernel.io_uring_disabled`.
    pub io_uring_disabled: Option<u64>,
    /// Memory that cannot be moved out.
    pub memlock: Option<Limit>,
    /// Descriptors of this process.
    pub open_files: Option<Limit>,
    /// The most of them that anybody may have.
    pub nr_open: Option<u64>,
    /// Whether KVM splits the pages that guests run code from.
    pub nx_huge_pages: Option<String>,
    /// Whether hardware threads share cores.
    pub smt_active: Option<bool>,
    /// How many processors each governor has.
    pub governors: BTreeMap<String, usize>,
    /// How they sleep.
    pub idle: IdleStates,
    /// Whether this is a virtual machine.
    pub is_guest: bool,
    /// Hardware threads.
    pub cpus: usize,
    /// Memory nodes.
    pub nodes: usize,
    /// Processor packages; 0 where the processors do not tell theirs.
    pub packages: usize,
    /// `kernel.numa_balancing`.
    pub numa_balancing: Option<u64>,
    /// The word in brackets.
    pub huge_pages: Option<String>,
    /// Whether equal pages are looked for.
    pub ksm_run: Option<u64>,
    /// Names of swap areas in use.
    pub swaps: Vec<String>,
    /// Where the store is.
    pub store: Store,
    /// Where control groups are.
    pub cgroup: Cgroup,
}

impl Facts {
    /// Reads the machine whose files are below `root`, and whose `/dev/kvm` opened so.
    #[must_use]
    pub fn read(
        root: &Path,
        store: &Path,
        cgroup: &Path,
        kvm_device: Result<(), ErrorKind>,
    ) -> Self {
        let tree = Tree(root);
        let status = tree.text("proc/self/status");
        let mounts = tree.text("proc/self/mountinfo");
        let mounts = mounts.map(|text| mounts::mounts(&text)).unwrap_or_default();
        let limits = tree.text("proc/self/limits").unwrap_or_default();
        let cpuinfo = tree.text("proc/cpuinfo").unwrap_or_default();
        Self {
            kvm: KvmKind::from(&cpuinfo, kvm_device),
            kernel: tree.text("proc/sys/kernel/osrelease"),
            is_root: status.as_deref().and_then(is_root),
            capabilities: status.as_deref().and_then(capabilities),
            io_uring_disabled: tree.number("proc/sys/kernel/io_uring_disabled"),
            memlock: limit(&limits, "Max locked memory"),
            open_files: limit(&limits, "Max open files"),
            nr_open: tree.number("proc/sys/fs/nr_open"),
            nx_huge_pages: tree.text("sys/module/kvm/parameters/nx_huge_pages"),
            smt_active: tree.number("sys/devices/system/cpu/smt/active").map(|active| active != 0),
            governors: tree.governors(),
            idle: IdleStates::read(tree.0),
            is_guest: cpuinfo.split_whitespace().any(|flag| flag == "hypervisor"),
            cpus: cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
            nodes: tree.nodes(),
            packages: packages(&cpuinfo),
            numa_balancing: tree.number("proc/sys/kernel/numa_balancing"),
            huge_pages: tree.chosen("sys/kernel/mm/transparent_hugepage/enabled"),
            ksm_run: tree.number("sys/kernel/mm/ksm/run"),
            swaps: tree.swaps(),
            store: tree.store(store, &mounts),
            cgroup: tree.cgroup(cgroup, &mounts),
        }
    }

    /// Whether this process may, by the bit of linux/capability.h; `None` where that is unknown.
    #[must_use]
    pub fn is_capable(&self, bit: u32) -> Option<bool> {
        self.capabilities.map(|capabilities| capabilities >> bit & 1 == 1)
    }

    /// Whether this process may go above hard limits.
    #[must_use]
    pub fn may_raise_limits(&self) -> Option<bool> {
        self.is_capable(CAP_SYS_RESOURCE)
    }
}

fn packages(cpuinfo: &str) -> usize {
    let ids = cpuinfo.lines().filter(|line| line.starts_with("physical id"));
    ids.collect::<BTreeSet<_>>().len()
}

impl Tree<'_> {
    fn governors(&self) -> BTreeMap<String, usize> {
        let mut governors = BTreeMap::new();
        let base = "sys/devices/system/cpu";
        for name in self.names(base).iter().filter(|name| is_numbered(name, "cpu")) {
            if let Some(governor) = self.text(&format!("{base}/{name}/cpufreq/scaling_governor")) {
                *governors.entry(governor).or_default() += 1;
            }
        }
        governors
    }

    fn nodes(&self) -> usize {
        let names = self.names("sys/devices/system/node");
        names.iter().filter(|name| is_numbered(name, "node")).count()
    }

    fn swaps(&self) -> Vec<String> {
        let text = self.text("proc/swaps").unwrap_or_default();
        let names = text.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        names.map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_counted_once() {
        let cpuinfo = "processor\t: 0\nphysical id\t: 0\n\nprocessor\t: 1\nphysical id\t: 1\n\n\
                       processor\t: 2\nphysical id\t: 0\n";
        assert_eq!((packages(cpuinfo), packages("processor\t: 0\n")), (2, 0));
    }
}
