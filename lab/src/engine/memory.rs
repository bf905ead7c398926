//! What sandboxes cost in memory, and whether they leave anything behind.
//!
//! Called by the benchmark's program, on a shard. Counts everything on the machine, because most of what
//! an idle sandbox costs is the kernel's: page tables, stacks, KVM's own. What other programs take or give
//! back meanwhile is taken out of it as far as it is their own anonymous memory. Refuses nothing: who
//! calls says what is too much.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// Memory of the whole machine at one moment, in bytes, by the lines of `/proc/meminfo`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// What could still be had.
    pub available: i64,
    /// Anonymous memory and shared memory of programs that are not ours.
    pub of_others: i64,
    /// Anonymous pages.
    pub anonymous: i64,
    /// Shared memory: memfds.
    pub shared: i64,
    /// Slab that cannot be given back.
    pub slab: i64,
    /// Slab that can.
    pub slab_reclaimable: i64,
    /// Page tables.
    pub page_tables: i64,
    /// Page tables that KVM keeps for guests.
    pub second_page_tables: i64,
    /// Kernel stacks.
    pub stacks: i64,
    /// Memory that there is once for each processor.
    pub per_cpu: i64,
    /// Memory that the kernel allocated by range.
    pub vmalloc: i64,
}

impl Machine {
    /// Looks. `ours` are the processes that count as ours.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn now(ours: &BTreeSet<u32>) -> Result<Self> {
        let text = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
        let line = |name: &str| kib_of(&text, name).unwrap_or(0) << 10;
        Ok(Self {
            available: line("MemAvailable:"),
            of_others: others(ours)?,
            anonymous: line("AnonPages:"),
            shared: line("Shmem:"),
            slab: line("SUnreclaim:"),
            slab_reclaimable: line("SReclaimable:"),
            page_tables: line("PageTables:"),
            second_page_tables: line("SecPageTables:"),
            stacks: line("KernelStack:"),
            per_cpu: line("Percpu:"),
            vmalloc: line("VmallocUsed:"),
        })
    }

    /// What could be had if the others had nothing: goes down by what we take.
    #[must_use]
    pub fn left_to_us(&self) -> i64 {
        self.available + self.of_others
    }

    /// What there is more of now than `before`, for each of `count`.
    #[must_use]
    pub fn each_since(&self, before: &Self, count: u32) -> Self {
        let each = |now: i64, before: i64| (now - before) / i64::from(count.max(1));
        Self {
            available: each(self.available, before.available),
            of_others: each(self.of_others, before.of_others),
            anonymous: each(self.anonymous, before.anonymous),
            shared: each(self.shared, before.shared),
            slab: each(self.slab, before.slab),
            slab_reclaimable: each(self.slab_reclaimable, before.slab_reclaimable),
            page_tables: each(self.page_tables, before.page_tables),
            second_page_tables: each(self.second_page_tables, before.second_page_tables),
            stacks: each(self.stacks, before.stacks),
            per_cpu: each(self.per_cpu, before.per_cpu),
            vmalloc: each(self.vmalloc, before.vmalloc),
        }
    }
}

fn kib_of(text: &str, name: &str) -> Option<i64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB").unwrap_or(line).trim().parse().ok()
}

/// Anonymous and shared memory of every process that is not one of these. One that ends while this
/// looks counts as nothing.
fn others(ours: &BTreeSet<u32>) -> Result<i64> {
    let mut sum = 0;
    for pid in processes()? {
        if !ours.contains(&pid)
            && let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status"))
        {
            let line = |name: &str| kib_of(&status, name).unwrap_or(0) << 10;
            sum += line("RssAnon:") + line("RssShmem:");
        }
    }
    Ok(sum)
}

fn processes() -> Result<Vec<u32>> {
    let entries = fs::read_dir("/proc").context("list /proc")?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// What a VM process has by itself, in bytes: sums of `/proc/PID/smaps` by kind of mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Pages of the guest's memory that are its own.
    pub guest_own: u64,
    /// Its share of guest memory that it has in common with others: its template.
    pub guest_shared: u64,
    /// Its heap, stacks and the like.
    pub private: u64,
    /// Its share of program text and data.
    pub program: u64,
    /// Its share of memfds: exchange and console.
    pub memfds: u64,
    /// Its page tables, as it is charged for them.
    pub page_tables: u64,
    /// Its threads.
    pub threads: u64,
}

impl Process {
    /// Looks at one. The largest mapping is guest memory.
    ///
    /// # Errors
    /// When it is gone.
    pub fn of(pid: u32, guest_memory: u64, memory_bytes: u64) -> Result<Self> {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("read smaps")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("read status")?;
        let guest = guest_memory..guest_memory + memory_bytes;
        let mut found = Self::default();
        for mapping in mappings(&smaps) {
            if guest.contains(&mapping.start) {
                found.guest_own += mapping.anonymous;
                found.guest_shared += mapping.pss.saturating_sub(mapping.anonymous);
            } else if mapping.name.contains("memfd:") {
                found.memfds += mapping.pss;
            } else if mapping.name.starts_with('/') {
                found.program += mapping.pss;
            } else {
                found.private += mapping.pss;
            }
        }
        found.page_tables = u64::try_from(kib_of(&status, "VmPTE:").unwrap_or(0) << 10)?;
        let threads = status.lines().find_map(|line| line.strip_prefix("Threads:"));
        found.threads = threads.and_then(|n| n.trim().parse().ok()).unwrap_or(0);
        Ok(found)
    }
}

/// One mapping, as `smaps` tells of it; sizes in bytes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mapping<'a> {
    start: u64,
    name: &'a str,
    pss: u64,
    anonymous: u64,
}

fn mappings(smaps: &str) -> Vec<Mapping<'_>> {
    let mut all: Vec<Mapping<'_>> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, _)) = first.split_once('-')
            && let Ok(start) = u64::from_str_radix(start, 16)
        {
            let name = words.nth(4).unwrap_or_default();
            all.push(Mapping { start, name, ..Mapping::default() });
            continue;
        }
        let bytes = words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10;
        match (all.last_mut(), first) {
            (Some(mapping), "Pss:") => mapping.pss = bytes,
            (Some(mapping), "Anonymous:") => mapping.anonymous = bytes,
            _ => {}
        }
    }
    all
}

/// Counts that must come back to what they were.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Leftovers {
    /// Live or unreaped children of this process.
    pub children: usize,
    /// Its open descriptors.
    pub descriptors: usize,
    /// Its threads.
    pub threads: usize,
    /// Control groups below its own.
    pub cgroups: usize,
    /// Files and directories in the store.
    pub files: usize,
}

impl Leftovers {
    /// Looks.
    ///
    /// # Errors
    /// When something cannot be listed.
    pub fn now(store: &Path, cgroup: &Path) -> Result<Self> {
        let count = |path: &Path| -> Result<usize> {
            Ok(fs::read_dir(path).with_context(|| format!("list {}", path.display()))?.count())
        };
        let groups = fs::read_dir(cgroup).context("list the control groups")?;
        let is_group = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
        Ok(Self {
            children: children()?.len(),
            descriptors: count(Path::new("/proc/self/fd"))?,
            threads: count(Path::new("/proc/self/task"))?,
            cgroups: groups.flatten().filter(is_group).count(),
            files: tree(store)?,
        })
    }
}

/// Children of all threads of this process.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn children() -> Result<BTreeSet<u32>> {
    let tasks = fs::read_dir("/proc/self/task").context("list the threads")?;
    let lists = tasks.flatten().map(|task| fs::read_to_string(task.path().join("children")));
    // A thread that has ended meanwhile has none.
    let lists: Vec<String> = lists.flatten().collect();
    let numbers = lists.iter().flat_map(|list| list.split_ascii_whitespace());
    Ok(numbers.filter_map(|number| number.parse().ok()).collect())
}

/// This process and its children.
///
/// # Errors
/// As [`children`].
pub fn ours() -> Result<BTreeSet<u32>> {
    let mut all = children()?;
    all.insert(std::process::id());
    Ok(all)
}

fn tree(root: &Path) -> Result<usize> {
    let mut count = 0;
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).context("list the store")? {
            let entry = entry?;
            count += 1;
            if entry.file_type()?.is_dir() {
                open.push(entry.path());
            }
        }
    }
    Ok(count)
}

/// Resident memory of this process that is its own, in bytes.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn own_anonymous() -> Result<i64> {
    let status = fs::read_to_string("/proc/self/status")?;
    Ok(kib_of(&status, "RssAnon:").context("no RssAnon")? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smaps_are_read_by_mapping() {
        let text = "7f00-7f10 rw-p 00000000 00:01 42 /memfd:exchange (deleted)\nSize: 4 kB\n\
                    Rss: 4 kB\nPss: 2 kB\nAnonymous: 1 kB\nVmFlags: rd wr\n\
                    8000-9000 rw-p 00000000 00:00 0 \nPss: 12 kB\nAnonymous: 8 kB\n";
        let found = mappings(text);
        let one = Mapping { start: 0x7f00, name: "/memfd:exchange", pss: 2048, anonymous: 1024 };
        let two = Mapping { start: 0x8000, name: "", pss: 12 << 10, anonymous: 8 << 10 };
        assert_eq!(found, [one, two]);
    }

    #[test]
    fn this_process_and_machine_can_be_looked_at() {
        let machine = Machine::now(&ours().unwrap()).unwrap();
        assert!(machine.available > 0 && machine.anonymous > 0 && machine.slab > 0);
        // All of a sudden everything is ours.
        let all: BTreeSet<u32> = processes().unwrap().into_iter().collect();
        assert!(others(&BTreeSet::new()).unwrap() > others(&all).unwrap());
        assert!(own_anonymous().unwrap() > 0);
        let each = Machine { available: 100, ..machine }
            .each_since(&Machine { available: 300, ..machine }, 2);
        assert_eq!((each.available, each.slab), (-100, 0));
    }

    #[test]
    fn files_of_a_tree_are_counted() {
        let root = std::env::temp_dir().join(format!("mica-tree-{}", std::process::id()));
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/file"), "").unwrap();
        assert_eq!(tree(&root).unwrap(), 3);
        fs::remove_dir_all(&root).unwrap();
    }
}
