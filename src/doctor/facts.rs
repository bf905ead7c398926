//! What there is to know about a machine, and the only place that reads it.
//!
//! Called by [`super::run`] and, over made-up trees, by tests: every file is below a root that the caller
//! names. What only a system call tells comes in as [`Probed`]. Refuses to judge, and to fail: what is not
//! there is `None`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mica_numa::idle::IdleStates;

use super::probe::Probed;
use crate::kvm_kind::KvmKind;

/// The bit of the right to go above hard limits: linux/capability.h.
const CAP_SYS_RESOURCE: u32 = 24;

/// A machine, as far as Mica cares.
#[derive(Debug)]
pub struct Facts {
    pub kvm: KvmKind,
    /// As `uname -r` has it.
    pub kernel: Option<String>,
    pub is_root: Option<bool>,
    /// Whether it has CAP_SYS_RESOURCE: what root of a container may lack.
    pub may_raise_limits: Option<bool>,
    pub io_uring_disabled: Option<u64>,
    pub memlock: Option<Limit>,
    pub open_files: Option<Limit>,
    pub nr_open: Option<u64>,
    pub nx_huge_pages: Option<String>,
    pub smt_active: Option<bool>,
    /// How many processors each governor has.
    pub governors: BTreeMap<String, usize>,
    pub idle: IdleStates,
    /// Whether this is a virtual machine.
    pub is_guest: bool,
    pub cpus: usize,
    pub nodes: usize,
    pub numa_balancing: Option<u64>,
    /// The word in brackets.
    pub huge_pages: Option<String>,
    pub ksm_run: Option<u64>,
    /// Names of swap areas in use.
    pub swaps: Vec<String>,
    pub store: Store,
    pub cgroup: Cgroup,
    pub probed: Probed,
}

/// A resource limit in bytes or files; `None` is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    pub soft: Option<u64>,
    pub hard: Option<u64>,
}

/// The file system below the store.
#[derive(Debug, Default)]
pub struct Store {
    pub path: PathBuf,
    pub file_system: Option<String>,
    pub disk: Option<Disk>,
}

/// The device that it is on.
#[derive(Debug, PartialEq, Eq)]
pub struct Disk {
    pub name: String,
    pub queues: usize,
    pub scheduler: Option<String>,
    pub is_rotational: Option<bool>,
    /// The file that a loop device reads.
    pub backing_file: Option<String>,
}

/// Where control groups of sandboxes would be.
#[derive(Debug, Default)]
pub struct Cgroup {
    pub path: PathBuf,
    /// What is mounted there: `cgroup2`, or something else.
    pub file_system: Option<String>,
    pub controllers: Vec<String>,
    pub favors_dynamic_moves: bool,
}

/// A line of `/proc/self/mountinfo`.
#[derive(Debug)]
struct Mount {
    device: String,
    point: PathBuf,
    file_system: String,
    source: String,
    options: String,
}

impl Facts {
    /// Reads the machine whose files are below `root`.
    #[must_use]
    pub fn read(root: &Path, store: &Path, cgroup: &Path, probed: Probed) -> Self {
        let tree = Tree(root);
        let status = tree.text("proc/self/status");
        let mounts = tree.text("proc/self/mountinfo").map(|text| mounts(&text)).unwrap_or_default();
        let limits = tree.text("proc/self/limits").unwrap_or_default();
        let cpuinfo = tree.text("proc/cpuinfo").unwrap_or_default();
        let governors = tree.governors();
        Self {
            kvm: KvmKind::from(&cpuinfo, probed.kvm_device),
            kernel: tree.text("proc/sys/kernel/osrelease"),
            is_root: status.as_deref().and_then(is_root),
            may_raise_limits: status.as_deref().and_then(may_raise_limits),
            io_uring_disabled: tree.number("proc/sys/kernel/io_uring_disabled"),
            memlock: limit(&limits, "Max locked memory"),
            open_files: limit(&limits, "Max open files"),
            nr_open: tree.number("proc/sys/fs/nr_open"),
            nx_huge_pages: tree.text("sys/module/kvm/parameters/nx_huge_pages"),
            smt_active: tree.number("sys/devices/system/cpu/smt/active").map(|active| active != 0),
            governors,
            idle: IdleStates::read(tree.0),
            is_guest: cpuinfo.split_whitespace().any(|flag| flag == "hypervisor"),
            cpus: cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
            nodes: tree.nodes(),
            numa_balancing: tree.number("proc/sys/kernel/numa_balancing"),
            huge_pages: tree.chosen("sys/kernel/mm/transparent_hugepage/enabled"),
            ksm_run: tree.number("sys/kernel/mm/ksm/run"),
            swaps: tree.swaps(),
            store: tree.store(store, &mounts),
            cgroup: tree.cgroup(cgroup, &mounts),
            probed,
        }
    }
}

/// The files below a root.
struct Tree<'t>(&'t Path);

impl Tree<'_> {
    fn text(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.0.join(path)).ok()?;
        Some(text.trim().to_owned())
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// The names in a directory, in order.
    fn names(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.0.join(path)).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// The word in brackets of a file that shows all choices.
    fn chosen(&self, path: &str) -> Option<String> {
        let text = self.text(path)?;
        let words = text.split_whitespace();
        let mut chosen = words.filter_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
        chosen.next().map(str::to_owned)
    }

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

    fn store(&self, path: &Path, mounts: &[Mount]) -> Store {
        let mount = mount_of(path, mounts);
        Store {
            path: path.to_owned(),
            file_system: mount.map(|mount| mount.file_system.clone()),
            disk: mount.and_then(|mount| self.disk(mount)),
        }
    }

    /// The whole disk that a mounted device is on.
    fn disk(&self, mount: &Mount) -> Option<Disk> {
        let source = mount.source.rsplit('/').next().unwrap_or_default();
        let name = self.names("sys/block").into_iter().find(|disk| {
            let at = format!("sys/block/{disk}");
            let is = |dir: &str| self.text(&format!("{dir}/dev")).as_ref() == Some(&mount.device);
            let parts = self.names(&at);
            // Btrfs has a device of its own, which is no disk: there its source says which.
            let by_name = mount.device.starts_with("0:") && !source.is_empty();
            is(&at)
                || parts.iter().any(|part| is(&format!("{at}/{part}")))
                || by_name && (disk == source || parts.iter().any(|part| part == source))
        })?;
        let at = format!("sys/block/{name}");
        Some(Disk {
            queues: self.names(&format!("{at}/mq")).len(),
            scheduler: self.chosen(&format!("{at}/queue/scheduler")),
            is_rotational: self.number(&format!("{at}/queue/rotational")).map(|spins| spins != 0),
            backing_file: self.text(&format!("{at}/loop/backing_file")),
            name,
        })
    }

    fn cgroup(&self, path: &Path, mounts: &[Mount]) -> Cgroup {
        let Some(mount) = mount_of(path, mounts) else {
            return Cgroup { path: path.to_owned(), ..Cgroup::default() };
        };
        // The daemon makes its own, and what it may hand out is what the one above has.
        let above = path.parent().unwrap_or(path).join("cgroup.controllers");
        let above = above.strip_prefix("/").unwrap_or(&above).to_owned();
        let controllers = self.text(&above.to_string_lossy()).unwrap_or_default();
        Cgroup {
            path: path.to_owned(),
            file_system: Some(mount.file_system.clone()),
            controllers: controllers.split_whitespace().map(str::to_owned).collect(),
            favors_dynamic_moves: mount.options.split(',').any(|option| option == "favordynmods"),
        }
    }
}

fn is_numbered(name: &str, prefix: &str) -> bool {
    let number = name.strip_prefix(prefix).unwrap_or_default();
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

fn mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (front, back) = line.split_once(" - ")?;
        let (front, mut back): (Vec<&str>, _) = (front.split(' ').collect(), back.split(' '));
        Some(Mount {
            device: (*front.get(2)?).to_owned(),
            // A space in a name is written so.
            point: PathBuf::from(front.get(4)?.replace("\\040", " ")),
            file_system: back.next()?.to_owned(),
            source: back.next()?.to_owned(),
            options: back.next()?.to_owned(),
        })
    };
    text.lines().filter_map(mount).collect()
}

/// The mount that a path is below: the longest, and of several at one place the last.
fn mount_of<'m>(path: &Path, mounts: &'m [Mount]) -> Option<&'m Mount> {
    let over = mounts.iter().filter(|mount| path.starts_with(&mount.point));
    over.max_by_key(|mount| mount.point.components().count())
}

fn limit(limits: &str, name: &str) -> Option<Limit> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    let mut values = line.split_whitespace();
    let mut value = || match values.next()? {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    };
    Some(Limit { soft: value()?, hard: value()? })
}

fn may_raise_limits(status: &str) -> Option<bool> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    let effective = u64::from_str_radix(effective.trim(), 16).ok()?;
    Some(effective >> CAP_SYS_RESOURCE & 1 == 1)
}

fn is_root(status: &str) -> Option<bool> {
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    ids.split_whitespace().nth(1).map(|effective| effective == "0")
}
