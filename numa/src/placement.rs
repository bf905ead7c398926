//! Where a process that is started runs, and where its memory comes from.
//!
//! Called by `shards` for VM processes, and by `seat` for its own threads. Both are given to the
//! thread that starts the process, which inherits them before its first instruction; then the thread
//! takes its own back. Refuses to start anything where a bound policy cannot be set. Where the kernel
//! knows no nodes there is but one, and nothing to set.

use std::io;

use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::CpuSet;

use crate::cpus::{CPUS_MAX, CpuList};
use crate::plan::{MemoryPolicy, Plan, VcpuPin};
use crate::sys::ThreadMemory;

/// Where a VM process belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Its node.
    pub node: u32,
    /// The hardware threads that it may run on.
    pub cpus: CpuList,
    /// Those of its own node.
    pub near_cpus: CpuList,
    /// Where its memory comes from.
    pub memory_node: u32,
    /// Whether from there only.
    pub memory: MemoryPolicy,
    /// Whether each vCPU has a hardware thread.
    pub pin: VcpuPin,
}

/// Why something cannot be placed
#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    /// The kernel refused the hardware threads.
    #[error("cannot run on cpus {cpus}; are they online and in the cpuset?")]
    Cpus {
        /// Which.
        cpus: CpuList,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// The kernel refused the memory node.
    #[error(
        "cannot bind memory to node {node}; is it in cpuset.mems? --memory preferred does without"
    )]
    Memory {
        /// Which.
        node: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl Placement {
    /// Where the sandboxes of a node's shards belong.
    #[must_use]
    pub fn of_node(plan: &Plan, node: u32) -> Self {
        let own = plan.vcpus_of(node);
        let near_cpus: CpuList = own.iter().flat_map(|own| own.cpus.iter().copied()).collect();
        let all = || plan.vcpus.iter().flat_map(|vcpus| vcpus.cpus.iter().copied()).collect();
        let cpus = if plan.pin == VcpuPin::None { all() } else { near_cpus.clone() };
        let memory_node = own.map_or(node, |own| own.memory_node);
        Self { node, cpus, near_cpus, memory_node, memory: plan.memory, pin: plan.pin }
    }

    /// Runs `start` with this thread placed so. What it starts is placed from the beginning.
    ///
    /// # Errors
    /// When this thread cannot be placed; then `start` was not run.
    pub fn start<T>(&self, start: impl FnOnce() -> T) -> Result<T, PlacementError> {
        let cpus = self.cpus.clone();
        let failed = |source| PlacementError::Cpus { cpus, source };
        let before = rustix::thread::sched_getaffinity(None).map_err(failed.clone())?;
        let memory_before = match ThreadMemory::of_this_thread() {
            Ok(before) => Some(before),
            Err(error) if is_without_nodes(&error) => None,
            Err(source) => return Err(PlacementError::Memory { node: self.memory_node, source }),
        };
        let _back = TakeBack { cpus: before, memory: memory_before };
        if !self.cpus.is_empty() {
            rustix::thread::sched_setaffinity(None, &set_of(&self.cpus)).map_err(failed)?;
        }
        if memory_before.is_some() {
            let bound = self.memory == MemoryPolicy::Bind;
            let set = ThreadMemory::on(self.memory_node, bound).and_then(|policy| policy.apply());
            match set {
                Err(source) if bound => {
                    return Err(PlacementError::Memory { node: self.memory_node, source });
                }
                Err(error) => tracing::debug!(%error, "a process starts with no memory node"),
                Ok(()) => {}
            }
        }
        Ok(start())
    }
}

/// Puts the thread back where it was.
struct TakeBack {
    cpus: CpuSet,
    memory: Option<ThreadMemory>,
}

impl Drop for TakeBack {
    fn drop(&mut self) {
        if let Err(error) = rustix::thread::sched_setaffinity(None, &self.cpus) {
            tracing::warn!(%error, "a thread stays on the cores of what it started");
        }
        if let Some(Err(error)) = self.memory.map(|memory| memory.apply()) {
            tracing::warn!(%error, "a thread keeps the memory policy of what it started");
        }
    }
}

/// Has what this thread asks for come from `node` while that has room, and from others then.
pub(crate) fn prefer_memory(node: u32) {
    let set = ThreadMemory::on(node, false).and_then(|policy| policy.apply());
    match set {
        Err(error) if !is_without_nodes(&error) => {
            tracing::warn!(%error, node, "the memory of a thread may come from another node");
        }
        _ => {}
    }
}

/// Whether the kernel was built without memory nodes.
pub(crate) fn is_without_nodes(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOSYS)
}

/// Binds a thread of another process to one hardware thread.
///
/// # Errors
/// When it is gone, or the hardware thread is not there.
pub fn pin_thread(thread: Pid, cpu: u32) -> Result<(), PlacementError> {
    let cpus: CpuList = [cpu].into_iter().collect();
    rustix::thread::sched_setaffinity(Some(thread), &set_of(&cpus))
        .map_err(|source| PlacementError::Cpus { cpus, source })
}

/// As the kernel wants it. What does not fit is no cpu of this process's.
pub(crate) fn set_of(cpus: &CpuList) -> CpuSet {
    let mut set = CpuSet::new();
    for cpu in cpus.cpus().iter().filter(|cpu| **cpu < CPUS_MAX) {
        set.set(*cpu as usize);
    }
    set
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::plan::VcpuCores;

    fn here(cpu: u32, memory: MemoryPolicy) -> Placement {
        let cpus: CpuList = [cpu].into_iter().collect();
        let near_cpus = cpus.clone();
        Placement { node: 0, cpus, near_cpus, memory_node: 0, memory, pin: VcpuPin::Node }
    }

    fn allowed() -> String {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        line.unwrap().trim().to_owned()
    }

    #[test]
    fn what_is_started_is_placed_and_who_starts_it_is_as_before() {
        // A thread of its own, so that no other test sees it placed.
        let checked = std::thread::spawn(|| {
            let before = allowed();
            let cpu = *before.parse::<CpuList>().unwrap().cpus().last().unwrap();
            for (memory, policy) in
                [(MemoryPolicy::Bind, "bind:0"), (MemoryPolicy::Preferred, "prefer")]
            {
                let script = "grep Cpus_allowed_list /proc/self/status; cat /proc/self/numa_maps";
                let run = || Command::new("sh").args(["-c", script]).output().unwrap();
                let said = here(cpu, memory).start(run).unwrap();
                let said = String::from_utf8(said.stdout).unwrap();
                assert!(said.contains(&format!("Cpus_allowed_list:\t{cpu}\n")), "{said}");
                if std::path::Path::new("/proc/self/numa_maps").exists() {
                    let heap = said.lines().find(|line| line.contains(" stack ")).unwrap();
                    assert!(heap.contains(policy), "{heap}");
                    let own = std::fs::read_to_string("/proc/thread-self/numa_maps").unwrap();
                    let policy = |line: &str| line.split(' ').nth(1) == Some("default");
                    assert!(own.lines().all(policy), "{own}");
                }
                assert_eq!(allowed(), before);
            }
        });
        checked.join().unwrap();
    }

    #[test]
    fn what_cannot_be_placed_is_not_started() {
        let nowhere = here(1023, MemoryPolicy::Preferred);
        assert!(matches!(nowhere.start(|| ()), Err(PlacementError::Cpus { .. })));
        let cpu = *allowed().parse::<CpuList>().unwrap().cpus().first().unwrap();
        let bound = Placement { memory_node: 1000, ..here(cpu, MemoryPolicy::Bind) };
        if std::path::Path::new("/proc/self/numa_maps").exists() {
            assert!(matches!(bound.start(|| ()), Err(PlacementError::Memory { .. })));
        }
        let preferred = Placement { memory: MemoryPolicy::Preferred, ..bound };
        assert!(preferred.start(|| ()).is_ok());
    }

    #[test]
    fn pinning_decides_which_cores() {
        let vcpus = [VcpuCores::new(0, vec![1, 2], false), VcpuCores::new(1, vec![5], false)];
        let mut plan = Plan { vcpus: vcpus.into(), ..Plan::default() };
        plan.vcpus[1].memory_node = 0;
        let placed = Placement::of_node(&plan, 1);
        assert_eq!((placed.cpus.to_string(), placed.memory_node), ("5".to_owned(), 0));
        plan.pin = VcpuPin::None;
        let placed = Placement::of_node(&plan, 0);
        assert_eq!(placed.cpus.to_string(), "1-2,5");
        assert_eq!(placed.near_cpus.to_string(), "1-2");
    }
}
