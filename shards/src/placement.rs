//! What of a sandbox is on the wrong node: pages, and time of its vCPUs.
//!
//! Called on the shard that owns it, when somebody wants the numbers: the kernel walks the page tables
//! of a VM process for them, on a blocking thread. Refuses to guess about pages. Time is what can be
//! known: see [`WrongNode::vcpu_time`].

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use mica_numa::numa_maps::{self, Mapping};
use mica_numa::{CpuList, Placement, rt};
use mica_units::SandboxId;
use rustix::process::Pid;

use crate::ShardError;
use crate::sandbox::{Sandbox, chain};
use crate::shard::Shard;
use crate::shell::vcpu_threads;

/// What of a sandbox is not where it belongs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WrongNode {
    /// Pages in memory that are not on the sandbox's memory node: its guest's, whatever they show (its
    /// own, a template's copy, a file), and its process's own. Not the pages of the program itself,
    /// which all sandboxes share.
    pub pages: u64,
    /// All such pages, wherever they are.
    pub pages_in_memory: u64,
    /// Time that its vCPUs ran on other nodes. The kernel tells how long a thread ran and where it ran
    /// last, so between two looks all of a thread's time counts for where it is at the second. Exactly
    /// 0 where threads may only run on their node.
    pub vcpu_time: Duration,
}

/// What was seen of vCPU threads at the last look.
#[derive(Debug, Default)]
pub(crate) struct VcpuClock {
    /// How long each had run.
    ran: BTreeMap<i32, Duration>,
    /// Of that, on other nodes.
    away: Duration,
}

/// One vCPU thread, as the kernel tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    thread: i32,
    ran: Duration,
    cpu: u32,
}

impl VcpuClock {
    /// Counts what threads ran since the last look.
    fn look(&mut self, seen: &[Seen], near: &CpuList) {
        let mut ran = BTreeMap::new();
        for Seen { thread, ran: now, cpu } in seen.iter().copied() {
            let before = self.ran.get(&thread).copied().unwrap_or_default();
            if !near.contains(cpu) {
                self.away += now.saturating_sub(before);
            }
            ran.insert(thread, now);
        }
        self.ran = ran;
    }
}

/// Where guest memory is in the address space of its process.
#[derive(Clone, Copy, Debug)]
struct GuestRange {
    start: u64,
    end: u64,
}

/// Looks at a sandbox that has a process.
pub(crate) async fn wrong_node(
    shard: &Rc<Shard>,
    sandbox: &Rc<Sandbox>,
) -> Result<WrongNode, ShardError> {
    let id = sandbox.id;
    let gone = ShardError::NoSuchSandbox(id);
    let info = sandbox.info().ok_or(gone)?;
    let Some(held) = sandbox.held() else { return Ok(WrongNode::default()) };
    let start = held.layout.memory_address;
    let guest = GuestRange { start, end: start.saturating_add(info.memory.to_bytes()) };
    let pid = held.process.pid();
    let look = move || -> io::Result<_> { Ok((mappings(pid)?, vcpus(pid)?)) };
    let looked = rt::blocking(look).await.map_err(|error| failed(id, error.to_string()))?;
    // Whose number it was may have ended meanwhile, and another process may have it.
    if !held.process.is_alive() {
        return Err(ShardError::NoSuchSandbox(id));
    }
    let (mappings, seen) = looked.map_err(|error| failed(id, chain(&error)))?;
    let placement = shard.pool.placement();
    let mut clock = sandbox.vcpu_clock();
    clock.look(&seen, &placement.near_cpus);
    let (pages, pages_in_memory) = count(&mappings, guest, placement);
    Ok(WrongNode { pages, pages_in_memory, vcpu_time: clock.away })
}

fn failed(sandbox: SandboxId, reason: String) -> ShardError {
    ShardError::OperationFailed { operation: "looking at its placement", sandbox, reason }
}

/// None where the kernel knows no nodes: then there is no wrong one.
fn mappings(pid: Pid) -> io::Result<Vec<Mapping>> {
    match numa_maps::read(pid) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // The process is gone, or the file is not there for any.
            let own = fs::exists("/proc/self/numa_maps")?;
            if own { Err(error) } else { Ok(Vec::new()) }
        }
        other => other,
    }
}

fn vcpus(pid: Pid) -> io::Result<Vec<Seen>> {
    let mut all = Vec::new();
    for thread in vcpu_threads(pid)? {
        let thread = thread.as_raw_nonzero().get();
        let dir = format!("/proc/{}/task/{thread}", pid.as_raw_nonzero());
        let times = fs::read_to_string(format!("{dir}/schedstat"));
        let stat = fs::read_to_string(format!("{dir}/stat"));
        // A kernel without schedstat tells no time, and a thread that ended has none to tell.
        if let (Ok(times), Ok(stat)) = (times, stat) {
            all.extend(parse_thread(thread, &times, &stat));
        }
    }
    Ok(all)
}

/// The first field of schedstat is the time on a cpu in nanoseconds; field 39 of stat is the cpu. The
/// second field of stat may hold anything, so what counts comes after its last parenthesis.
fn parse_thread(thread: i32, times: &str, stat: &str) -> Option<Seen> {
    let ran = Duration::from_nanos(times.split_whitespace().next()?.parse().ok()?);
    let (_, rest) = stat.rsplit_once(") ")?;
    let cpu = rest.split(' ').nth(36)?.trim().parse().ok()?;
    Some(Seen { thread, ran, cpu })
}

/// Pages on other nodes, and all.
fn count(mappings: &[Mapping], guest: GuestRange, placement: &Placement) -> (u64, u64) {
    let (mut wrong, mut all) = (0u64, 0u64);
    for mapping in mappings {
        let of_guest = (guest.start..guest.end).contains(&mapping.start);
        // Memory with a name is a file too.
        let plain_file = mapping.file.as_ref().is_some_and(|name| !name.starts_with("/memfd:"));
        if plain_file && !of_guest {
            continue;
        }
        for (node, pages) in &mapping.pages {
            all = all.saturating_add(*pages);
            if *node != placement.memory_node {
                wrong = wrong.saturating_add(*pages);
            }
        }
    }
    (wrong, all)
}

#[cfg(test)]
mod tests {
    use mica_numa::{MemoryPolicy, VcpuPin};

    use super::*;

    fn on_node_1() -> Placement {
        let near_cpus: CpuList = "4-7".parse().unwrap();
        Placement {
            node: 1,
            cpus: near_cpus.clone(),
            near_cpus,
            memory_node: 1,
            memory: MemoryPolicy::Bind,
            pin: VcpuPin::Node,
        }
    }

    #[test]
    fn pages_of_the_guest_and_of_the_process_count_and_the_programs_do_not() {
        let text = b"00400000 bind:1 file=/mica-vm mapped=40 N0=40 kernelpagesize_kB=4\n\
            10000000 bind:1 file=/memfd:mica-replica\\040(deleted) mapped=9 N0=2 N1=7 kernelpagesize_kB=4\n\
            10100000 bind:1 file=/layers/x anon=1 mapped=4 N0=1 N1=3 kernelpagesize_kB=4\n\
            20000000 bind:1 file=/memfd:mica-exchange mapped=1 N0=1 kernelpagesize_kB=4\n\
            30000000 bind:1 heap anon=5 N1=5 kernelpagesize_kB=4\n";
        let guest = GuestRange { start: 0x1000_0000, end: 0x2000_0000 };
        assert_eq!(count(&numa_maps::parse(text), guest, &on_node_1()), (2 + 1 + 1, 9 + 4 + 1 + 5));
    }

    #[test]
    fn time_counts_for_where_a_thread_is_when_it_is_looked_at() {
        let near: CpuList = "4-7".parse().unwrap();
        let seen = |thread, ms, cpu| Seen { thread, ran: Duration::from_millis(ms), cpu };
        let mut clock = VcpuClock::default();
        clock.look(&[seen(10, 5, 4), seen(11, 7, 0)], &near);
        assert_eq!(clock.away, Duration::from_millis(7));
        clock.look(&[seen(10, 9, 1), seen(11, 8, 5)], &near);
        assert_eq!(clock.away, Duration::from_millis(7 + 4));
        // Thread 11 is gone, and its number is another's now, which ran less.
        clock.look(&[seen(11, 2, 0)], &near);
        assert_eq!(clock.away, Duration::from_millis(7 + 4));
    }

    #[test]
    fn threads_are_read_whatever_they_call_themselves() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("7 (a) R 9 (b) {}\n", fields.join(" "));
        let seen = parse_thread(7, "1500000 20 3\n", &stat).unwrap();
        assert_eq!((seen.ran, seen.cpu), (Duration::from_micros(1500), 39));
        assert_eq!(parse_thread(7, "", &stat), None);
        assert_eq!(parse_thread(7, "1 2 3", "7 (a) R 1"), None);
    }
}
