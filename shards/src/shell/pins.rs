//! One hardware thread for each vCPU, where the plan wants that.
//!
//! Called by the pool when a shell is taken, and when a process of an earlier daemon is taken over.
//! Counted across the shards of a host: each vCPU gets the hardware thread of its node that has the
//! fewest. Refuses to hold a guest up: what cannot be pinned runs on its node's cores.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mica_numa::placement::pin_thread;
use mica_numa::{CpuList, Plan};
use rustix::process::Pid;

/// Most threads of a VM process that are looked at: what its cgroup lets it have.
const THREADS_MAX: usize = 64;

/// How many vCPUs each hardware thread has. Clones count together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pins(Arc<BTreeMap<u32, AtomicU32>>);

/// Hardware threads that were handed out, one for each vCPU. Taken back when dropped.
#[derive(Debug)]
pub(crate) struct Pinned {
    pins: Pins,
    cpus: Vec<u32>,
}

impl Pins {
    /// For the hardware threads that run vCPUs.
    pub(crate) fn new(plan: &Plan) -> Self {
        let cpus = plan.vcpus.iter().flat_map(|vcpus| &vcpus.cpus);
        Self(Arc::new(cpus.map(|cpu| (*cpu, AtomicU32::new(0))).collect()))
    }

    /// So many of these, the least used first. Two shards that ask at once may take the same one: it is
    /// then counted twice, and the next one is another.
    fn hand_out(&self, among: &CpuList, count: usize) -> Pinned {
        let mut cpus = Vec::with_capacity(count);
        for _ in 0..count {
            let counted = among.cpus().iter().filter_map(|cpu| Some((cpu, self.0.get(cpu)?)));
            let least = counted.min_by_key(|(_, count)| count.load(Ordering::Relaxed));
            let Some((cpu, count)) = least else { break };
            count.fetch_add(1, Ordering::Relaxed);
            cpus.push(*cpu);
        }
        Pinned { pins: self.clone(), cpus }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for cpu in &self.cpus {
            if let Some(count) = self.pins.0.get(cpu) {
                count.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

impl Pinned {
    /// The hardware threads.
    fn cpus(&self) -> &[u32] {
        &self.cpus
    }
}

/// The vCPU threads of a VM process, in the order of vCPUs. Blocks.
///
/// # Errors
/// When the process is gone.
pub(crate) fn vcpu_threads(pid: Pid) -> io::Result<Vec<Pid>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero()))?.take(THREADS_MAX) {
        let entry = entry?;
        // One that ends meanwhile is none.
        let Ok(name) = fs::read_to_string(entry.path().join("comm")) else { continue };
        let number = name.trim_end().strip_prefix("vcpu-").and_then(|n| n.parse::<u16>().ok());
        let thread = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let (Some(number), Some(thread)) = (number, thread.and_then(Pid::from_raw)) {
            found.insert(number, thread);
        }
    }
    Ok(found.into_values().collect())
}

/// Binds the vCPU threads of a process to hardware threads among these, one each. Blocks.
///
/// # Errors
/// When the process is gone, or a thread cannot be bound.
pub(super) fn pin_vcpus(pins: &Pins, among: &CpuList, pid: Pid) -> io::Result<Pinned> {
    let threads = vcpu_threads(pid)?;
    let pinned = pins.hand_out(among, threads.len());
    for (thread, cpu) in threads.iter().zip(pinned.cpus()) {
        pin_thread(*thread, *cpu).map_err(io::Error::other)?;
    }
    Ok(pinned)
}

#[cfg(test)]
mod tests {
    use mica_numa::plan::VcpuCores;

    use super::*;

    fn list(text: &str) -> CpuList {
        text.parse().unwrap()
    }

    #[test]
    fn the_least_used_is_handed_out_and_taken_back() {
        let vcpus = [VcpuCores::new(0, vec![4, 5, 6], false), VcpuCores::new(1, vec![8], false)];
        let pins = Pins::new(&Plan { vcpus: vcpus.into(), ..Plan::default() });
        let near = list("4-6");
        let first = pins.hand_out(&near, 2);
        assert_eq!(first.cpus(), [4, 5]);
        let second = pins.clone().hand_out(&near, 2);
        assert_eq!(second.cpus(), [6, 4], "then those that have one");
        drop(first);
        assert_eq!(pins.hand_out(&near, 1).cpus(), [5]);
        drop(second);
        assert_eq!(pins.hand_out(&near, 3).cpus(), [4, 5, 6]);
        assert!(pins.hand_out(&list("9"), 2).cpus().is_empty(), "no vCPU runs there");
        assert!(pins.0.values().all(|count| count.load(Ordering::Relaxed) == 0), "{pins:?}");
    }

    #[test]
    fn threads_are_found_by_name_and_bound() {
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (go, may_go) = std::sync::mpsc::channel::<()>();
        let vcpu = std::thread::Builder::new().name("vcpu-0".to_owned()).spawn(move || {
            ready.send(rustix::thread::gettid()).unwrap();
            may_go.recv().unwrap_err();
            let set = rustix::thread::sched_getaffinity(None).unwrap();
            (0..1024).filter(|cpu| set.is_set(*cpu)).collect::<Vec<usize>>()
        });
        let vcpu = vcpu.unwrap();
        let thread = is_ready.recv().unwrap();
        let me = rustix::process::getpid();
        assert_eq!(vcpu_threads(me).unwrap(), [thread]);
        let all = rustix::thread::sched_getaffinity(None).unwrap();
        let last = (0u32..1024).rfind(|cpu| all.is_set(*cpu as usize)).unwrap();
        let vcpus = VcpuCores::new(0, vec![last], false);
        let pins = Pins::new(&Plan { vcpus: vec![vcpus], ..Plan::default() });
        let pinned = pin_vcpus(&pins, &[last].into_iter().collect(), me).unwrap();
        assert_eq!(pinned.cpus(), [last]);
        drop(go);
        assert_eq!(vcpu.join().unwrap(), [last as usize]);
    }
}
