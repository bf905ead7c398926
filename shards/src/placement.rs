//! What of a sandbox is on the wrong node: pages, and time of its vCPUs.
//!
//! Called on the shard that owns it, by `rounds` now and then and by whoever wants the numbers now: the
//! kernel walks the page tables of a VM process for them, on a blocking thread, where everything of a
//! length that the process decides is done. Refuses to guess about pages. Time is what can be known: see
//! [`WrongNode::vcpu_time`].

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use mica_numa::CpuList;
use mica_numa::numa_maps::{self, Mapping};
use mica_numa::rt::time::Instant;
use mica_numa::rt::{self, BlockingError};
use mica_units::SandboxId;
use rustix::process::Pid;

use crate::ShardError;
use crate::sandbox::{Sandbox, chain};
use crate::shard::Shard;
use crate::shell::{Held, vcpu_threads};

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

impl std::iter::Sum for WrongNode {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            pages: sum.pages.saturating_add(one.pages),
            pages_in_memory: sum.pages_in_memory.saturating_add(one.pages_in_memory),
            vcpu_time: sum.vcpu_time.saturating_add(one.vcpu_time),
        })
    }
}

/// What was seen of where a sandbox is. It is the sandbox's, and so goes with it.
#[derive(Debug, Default)]
pub(crate) struct Whereabouts {
    clock: VcpuClock,
    last: Option<Look>,
}

/// Which process: a number alone may be another's later.
pub(crate) type ProcessName = (Pid, u64);

pub(crate) fn name_of(held: &Held) -> ProcessName {
    (held.process.pid(), held.process.start_ticks())
}

/// A look at a process.
#[derive(Clone, Copy, Debug)]
struct Look {
    process: ProcessName,
    at: Instant,
    /// None where it could not be seen.
    found: Option<WrongNode>,
}

impl Whereabouts {
    /// The last look at this process: one of another process of the sandbox says nothing of it.
    fn last(&self, process: ProcessName) -> Option<Look> {
        self.last.filter(|look| look.process == process)
    }

    /// How long ago this process was looked at; none if never.
    pub(crate) fn looked_ago(&self, process: ProcessName) -> Option<Duration> {
        self.last(process).map(|look| look.at.elapsed())
    }

    /// What was found of this process at the last look, where it could be seen.
    pub(crate) fn found(&self, process: ProcessName) -> Option<WrongNode> {
        self.last(process)?.found
    }

    /// Whether the last look at this process failed.
    pub(crate) fn is_hidden(&self, process: ProcessName) -> bool {
        self.last(process).is_some_and(|look| look.found.is_none())
    }

    fn keep(&mut self, process: ProcessName, found: Option<WrongNode>) {
        self.last = Some(Look { process, at: Instant::now(), found });
    }
}

/// What was seen of vCPU threads at the last look.
#[derive(Debug, Default)]
struct VcpuClock {
    /// How long each had run.
    ran: BTreeMap<i32, Duration>,
    /// Of that, on other nodes.
    away: Duration,
}

/// One vCPU thread, as the kernel tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Vcpu {
    thread: i32,
    ran: Duration,
    cpu: u32,
}

impl VcpuClock {
    /// Counts what threads ran since the last look.
    fn look(&mut self, seen: &[Vcpu], near: &CpuList) {
        let mut ran = BTreeMap::new();
        for Vcpu { thread, ran: now, cpu } in seen.iter().copied() {
            let before = self.ran.get(&thread).copied().unwrap_or_default();
            if !near.contains(cpu) {
                self.away += now.saturating_sub(before);
            }
            // Two looks at once may end in the other order.
            ran.insert(thread, now.max(before));
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

/// Why a process was not looked at
#[derive(Debug, thiserror::Error)]
pub(crate) enum LookError {
    /// It has ended, or is about to.
    #[error("it has ended")]
    Gone,
    /// Nothing was tried.
    #[error("no thread had room for it")]
    Busy(#[source] BlockingError),
    /// The kernel does not show it.
    #[error("what the kernel shows of it cannot be read")]
    Proc(#[source] io::Error),
}

/// What one look found, and what of it the shard has to work out.
struct Seen {
    pages: u64,
    pages_in_memory: u64,
    vcpus: Vec<Vcpu>,
}

/// What of a sandbox is on the wrong node now.
pub(crate) async fn wrong_node(shard: &Rc<Shard>, id: SandboxId) -> Result<WrongNode, ShardError> {
    let sandbox = shard.find(id)?;
    let Some(held) = sandbox.held() else {
        return sandbox.info().map(|_| WrongNode::default()).ok_or(ShardError::NoSuchSandbox(id));
    };
    look(shard, &sandbox, &held, true).await.0.map_err(|error| match error {
        LookError::Gone => ShardError::NoSuchSandbox(id),
        error => ShardError::OperationFailed {
            operation: "looking at its placement",
            sandbox: id,
            reason: chain(&error),
        },
    })
}

/// Looks at a process of a sandbox, and keeps what was found; at its pages only if told to. Also says how
/// long the kernel took, whatever came of it.
pub(crate) async fn look(
    shard: &Rc<Shard>,
    sandbox: &Sandbox,
    held: &Rc<Held>,
    at_pages: bool,
) -> (Result<WrongNode, LookError>, Duration) {
    let Some(info) = sandbox.info() else { return (Err(LookError::Gone), Duration::ZERO) };
    let start = held.layout.memory_address;
    let guest = GuestRange { start, end: start.saturating_add(info.memory.to_bytes()) };
    let (pid, node) = (held.process.pid(), shard.pool.placement().memory_node);
    let see = move || {
        let begun = Instant::now();
        (see(pid, at_pages.then_some(guest), node), begun.elapsed())
    };
    let (seen, took) = match rt::blocking(see).await {
        Ok(seen) => seen,
        Err(error) => return (Err(LookError::Busy(error)), Duration::ZERO),
    };
    let mut whereabouts = sandbox.whereabouts();
    // Whose number it was may have ended meanwhile, and another process may have it.
    let seen =
        if held.process.is_alive() { seen.map_err(LookError::Proc) } else { Err(LookError::Gone) };
    let found = seen.map(|Seen { pages, pages_in_memory, vcpus }| {
        whereabouts.clock.look(&vcpus, &shard.pool.placement().near_cpus);
        WrongNode { pages, pages_in_memory, vcpu_time: whereabouts.clock.away }
    });
    whereabouts.keep(name_of(held), found.as_ref().ok().copied());
    (found, took)
}

/// Blocks.
fn see(pid: Pid, guest: Option<GuestRange>, node: u32) -> io::Result<Seen> {
    let (pages, pages_in_memory) = match guest {
        Some(guest) => count(&mappings(pid)?, guest, node),
        None => (0, 0),
    };
    Ok(Seen { pages, pages_in_memory, vcpus: vcpus(pid)? })
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

fn vcpus(pid: Pid) -> io::Result<Vec<Vcpu>> {
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
fn parse_thread(thread: i32, times: &str, stat: &str) -> Option<Vcpu> {
    let ran = Duration::from_nanos(times.split_whitespace().next()?.parse().ok()?);
    let (_, rest) = stat.rsplit_once(") ")?;
    let cpu = rest.split(' ').nth(36)?.trim().parse().ok()?;
    Some(Vcpu { thread, ran, cpu })
}

/// Pages on other nodes, and all.
fn count(mappings: &[Mapping], guest: GuestRange, own: u32) -> (u64, u64) {
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
            if *node != own {
                wrong = wrong.saturating_add(*pages);
            }
        }
    }
    (wrong, all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_the_guest_and_of_the_process_count_and_the_programs_do_not() {
        let text = b"00400000 bind:1 file=/mica-vm mapped=40 N0=40 kernelpagesize_kB=4\n\
            10000000 bind:1 file=/memfd:mica-replica\\040(deleted) mapped=9 N0=2 N1=7 kernelpagesize_kB=4\n\
            10100000 bind:1 file=/layers/x anon=1 mapped=4 N0=1 N1=3 kernelpagesize_kB=4\n\
            20000000 bind:1 file=/memfd:mica-exchange mapped=1 N0=1 kernelpagesize_kB=4\n\
            30000000 bind:1 heap anon=5 N1=5 kernelpagesize_kB=4\n";
        let guest = GuestRange { start: 0x1000_0000, end: 0x2000_0000 };
        assert_eq!(count(&numa_maps::parse(text), guest, 1), (2 + 1 + 1, 9 + 4 + 1 + 5));
    }

    #[test]
    fn what_was_found_is_of_the_process_that_was_looked_at() {
        let (old, new) = ((Pid::INIT, 5), (Pid::INIT, 6));
        let found = WrongNode { pages: 3, ..WrongNode::default() };
        let mut whereabouts = Whereabouts::default();
        assert_eq!((whereabouts.looked_ago(old), whereabouts.found(old)), (None, None));
        whereabouts.keep(old, Some(found));
        assert_eq!(whereabouts.found(old), Some(found));
        assert!(whereabouts.looked_ago(old).is_some() && !whereabouts.is_hidden(old));
        // The same number, started later: the sandbox was resumed in another process.
        assert_eq!((whereabouts.looked_ago(new), whereabouts.found(new)), (None, None));
        // A look that saw nothing leaves no old number standing, and is a look all the same.
        whereabouts.keep(old, None);
        assert_eq!(whereabouts.found(old), None);
        assert!(whereabouts.looked_ago(old).is_some() && whereabouts.is_hidden(old));
    }

    #[test]
    fn time_counts_for_where_a_thread_is_when_it_is_looked_at() {
        let near: CpuList = "4-7".parse().unwrap();
        let seen = |thread, ms, cpu| Vcpu { thread, ran: Duration::from_millis(ms), cpu };
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
