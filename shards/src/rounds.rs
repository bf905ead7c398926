//! Goes round the sandboxes of a shard and counts what of them is on the wrong node.
//!
//! Run on each shard as its own task; `view` and the metrics read what was found last. Refuses to look
//! where nothing can be on a wrong node, at more than one sandbox at a time, and for more than a hundredth
//! of the time: the kernel walks every page table of a process for its pages, and holds off that process's
//! changes to its mappings meanwhile.

use std::fs;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use mica_numa::rt::time;
use mica_numa::{CpuList, Placement, StopSignal};

use crate::WrongNode;
use crate::placement::{self, LookError, name_of};
use crate::sandbox::{Sandbox, chain};
use crate::shard::Shard;
use crate::shell::Held;

/// No sandbox is looked at more often.
const EACH_MIN: Duration = Duration::from_secs(30);

/// The longest time without a look at who is there: how long a new sandbox waits at most where nobody is
/// before it. A shard without sandboxes does nothing else.
const NEWCOMER_MAX: Duration = Duration::from_secs(5);

/// After a look, so many times its length passes before the next.
const RESTS: u32 = 100;

/// And no less than this, so that a shard with many small sandboxes is not woken for each at once.
const REST_MIN: Duration = Duration::from_millis(100);

/// The nodes of the machine; none of what is not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MachineNodes {
    memory: Option<Vec<u32>>,
    cpus: Option<Vec<u32>>,
}

impl MachineNodes {
    /// Asks the kernel. A plan does not do: it may leave nodes out, and without `--memory bind`, or in a
    /// file that another process read, a guest's pages may be on those too.
    pub(crate) fn read() -> Self {
        let list = |name: &str| {
            let text = fs::read_to_string(format!("/sys/devices/system/node/{name}"));
            let listed = parse(text);
            listed
                .inspect_err(|error| {
                    tracing::warn!(name, error = chain(error), "the nodes are not known");
                })
                .ok()
        };
        Self { memory: list("has_memory"), cpus: list("has_cpu") }
    }
}

/// The kernel writes nodes as it writes cpus. One that was built without nodes has none: no wrong ones.
fn parse(text: io::Result<String>) -> io::Result<Vec<u32>> {
    match text {
        Ok(text) => {
            let list: CpuList = text.parse().map_err(io::Error::other)?;
            Ok(list.cpus().to_vec())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// What a machine has on other nodes than a sandbox's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Elsewhere {
    memory: bool,
    cpus: bool,
}

impl Elsewhere {
    fn of(machine: &MachineNodes, placement: &Placement) -> Self {
        let other = |nodes: &Option<Vec<u32>>, own: u32| {
            nodes.as_ref().is_none_or(|nodes| nodes.iter().any(|node| *node != own))
        };
        Self {
            memory: other(&machine.memory, placement.memory_node),
            cpus: other(&machine.cpus, placement.node),
        }
    }

    fn is_nothing(self) -> bool {
        !self.memory && !self.cpus
    }
}

/// A sandbox, and the process that it has now.
type Candidate = (Rc<Sandbox>, Rc<Held>);

impl Shard {
    fn elsewhere(&self) -> Elsewhere {
        Elsewhere::of(&self.workshop.machine, self.pool.placement())
    }

    /// What of a sandbox that has a process is on the wrong node, where that is known. Where there is no
    /// other node it is known without a look to be nothing, and said: an absent number would read as a
    /// count that does not work, and whoever adds up hosts would have to know which of them have nodes.
    pub(crate) fn wrong_node_of(&self, sandbox: &Sandbox) -> Option<WrongNode> {
        let held = sandbox.held()?;
        let nothing = self.elsewhere().is_nothing().then(WrongNode::default);
        nothing.or_else(|| sandbox.whereabouts().found(name_of(&held)))
    }

    /// The same of all of them together.
    pub(crate) fn wrong_node_of_all(&self) -> Option<WrongNode> {
        let all = self.all();
        total(all.values().filter(|one| one.held().is_some()).map(|one| self.wrong_node_of(one)))
    }

    /// Those that can be looked at, with how long ago they were.
    fn in_turn(&self) -> Vec<(Candidate, Option<Duration>)> {
        let can = |sandbox: &&Rc<Sandbox>| sandbox.is_shown() && !sandbox.is_ending();
        let with_age = |sandbox: &Rc<Sandbox>| {
            let held = sandbox.held()?;
            let ago = sandbox.whereabouts().looked_ago(name_of(&held));
            Some(((Rc::clone(sandbox), held), ago))
        };
        self.all().values().filter(can).filter_map(with_age).collect()
    }
}

/// A sum of what is known; none where there is something and nothing of it is known.
fn total(all: impl Iterator<Item = Option<WrongNode>>) -> Option<WrongNode> {
    let all: Vec<_> = all.collect();
    let is_known = all.is_empty() || all.iter().any(Option::is_some);
    is_known.then(|| all.into_iter().flatten().sum())
}

/// What is done next.
#[derive(Debug, PartialEq, Eq)]
enum Turn<T> {
    Look(T),
    Wait(Duration),
}

/// Whose turn it is, of these that were looked at so long ago: the one that has waited longest.
fn turn<T>(all: Vec<(T, Option<Duration>)>) -> Turn<T> {
    let ago = |looked_ago: Option<Duration>| looked_ago.unwrap_or(Duration::MAX);
    let Some((one, looked_ago)) = all.into_iter().max_by_key(|one| ago(one.1)) else {
        return Turn::Wait(NEWCOMER_MAX);
    };
    match EACH_MIN.saturating_sub(ago(looked_ago)) {
        Duration::ZERO => Turn::Look(one),
        left => Turn::Wait(left.min(NEWCOMER_MAX)),
    }
}

/// How long after a look that took so long the next may be.
fn rest(took: Duration) -> Duration {
    took.saturating_mul(RESTS).max(REST_MIN)
}

/// Goes round until `stop`.
pub(crate) async fn keep(shard: Rc<Shard>, stop: StopSignal) {
    if shard.elsewhere().is_nothing() {
        return;
    }
    loop {
        let pause = match turn(shard.in_turn()) {
            Turn::Look((sandbox, held)) => look(&shard, &sandbox, &held).await,
            Turn::Wait(pause) => pause,
        };
        if time::timeout(pause, stop.stopped()).await.is_ok() {
            return;
        }
    }
}

/// Looks at one, and says how long nobody is looked at then.
async fn look(shard: &Rc<Shard>, sandbox: &Sandbox, held: &Rc<Held>) -> Duration {
    let id = sandbox.id;
    let was_hidden = sandbox.whereabouts().is_hidden(name_of(held));
    let (found, took) = placement::look(shard, sandbox, held, shard.elsewhere().memory).await;
    match found {
        Ok(found) => tracing::trace!(%id, ?found, ?took, "looked for what is on a wrong node"),
        Err(error @ LookError::Busy(_)) => {
            tracing::debug!(%id, error = chain(&error), "what is on a wrong node is looked at later");
            return NEWCOMER_MAX;
        }
        // Told once for each process: what it maps is the guest's to decide.
        Err(error @ LookError::Proc(_)) if !was_hidden => {
            tracing::warn!(%id, error = chain(&error), "what is on a wrong node is not known");
        }
        Err(error) => {
            tracing::debug!(%id, error = chain(&error), "what is on a wrong node is not known");
        }
    }
    rest(took)
}

#[cfg(test)]
mod tests {
    use mica_numa::{MemoryPolicy, VcpuPin};

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn found(pages: u64, ms: u64) -> Option<WrongNode> {
        let vcpu_time = Duration::from_millis(ms);
        Some(WrongNode { pages, pages_in_memory: pages + 1, vcpu_time })
    }

    #[test]
    fn who_has_waited_longest_is_next_and_nobody_sooner_than_allowed() {
        let ago = |s: u32| Some(S * s);
        assert_eq!(turn(vec![('a', ago(31)), ('b', ago(40)), ('c', ago(2))]), Turn::Look('b'));
        assert_eq!(turn(vec![('a', ago(3600)), ('b', None)]), Turn::Look('b'), "a new one first");
        assert_eq!(turn(vec![('a', ago(28)), ('b', ago(1))]), Turn::Wait(S * 2));
        // Whoever comes meanwhile is seen before those are due again.
        assert_eq!(turn(vec![('a', ago(1))]), Turn::Wait(NEWCOMER_MAX));
        assert_eq!(turn::<char>(vec![]), Turn::Wait(NEWCOMER_MAX));
    }

    /// A clock that looks move on: sandboxes whose walks take so long, over an hour. How often each was
    /// looked at, how often the task woke, and the time that went into walks.
    fn an_hour(walks: &[Duration]) -> (Vec<u32>, u32, Duration) {
        let (mut now, mut spent, mut woke) = (Duration::ZERO, Duration::ZERO, 0);
        let mut looked: Vec<Option<Duration>> = vec![None; walks.len()];
        let mut times = vec![0; walks.len()];
        while now < S * 3600 {
            woke += 1;
            let all = looked.iter().enumerate();
            match turn(all.map(|(index, at)| (index, at.map(|at| now - at))).collect()) {
                Turn::Look(index) => {
                    now += walks[index];
                    spent += walks[index];
                    looked[index] = Some(now);
                    times[index] += 1;
                    now += rest(walks[index]);
                }
                Turn::Wait(pause) => now += pause,
            }
        }
        (times, woke, spent)
    }

    #[test]
    fn walks_take_a_hundredth_of_the_time_at_most_and_each_sandbox_has_its_turn() {
        for walks in [vec![S / 1000], vec![S * 2; 3], vec![S / 50; 400], vec![S * 60, S / 1000]] {
            let (times, _, spent) = an_hour(&walks);
            // The last walk may begin before the hour is over, and its rest end after.
            let last = *walks.iter().max().expect("some");
            assert!(spent <= S * 36 + last, "{walks:?}: {spent:?}");
            assert!(times.iter().all(|times| (1..=120).contains(times)), "{walks:?}: {times:?}");
        }
        assert_eq!(an_hour(&[S / 1000]).0, [120], "as often as it may");
    }

    #[test]
    fn a_shard_without_sandboxes_looks_at_nothing_and_hardly_wakes() {
        let (_, woke, spent) = an_hour(&[]);
        assert_eq!((woke, spent), (720, Duration::ZERO));
    }

    #[test]
    fn a_sum_is_of_what_is_known() {
        let all = [found(3, 5), None, found(4, 6)];
        let sum = total(all.into_iter()).expect("some are known");
        assert_eq!((sum.pages, sum.vcpu_time), (7, Duration::from_millis(11)));
        assert_eq!(total([None, None].into_iter()), None);
        assert_eq!(total([].into_iter()), Some(WrongNode::default()), "nobody is nowhere");
    }

    #[test]
    fn only_other_nodes_than_its_own_are_elsewhere() {
        let cpus: CpuList = "4-7".parse().unwrap();
        let placement = Placement {
            node: 1,
            cpus: cpus.clone(),
            near_cpus: cpus,
            memory_node: 0,
            memory: MemoryPolicy::Preferred,
            pin: VcpuPin::Node,
        };
        let elsewhere = |memory: &[u32], cpus: &[u32]| {
            let (memory, cpus) = (Some(memory.to_vec()), Some(cpus.to_vec()));
            let Elsewhere { memory, cpus } =
                Elsewhere::of(&MachineNodes { memory, cpus }, &placement);
            (memory, cpus)
        };
        assert_eq!(elsewhere(&[0], &[1]), (false, false));
        assert_eq!(elsewhere(&[0], &[0, 1]), (false, true), "a node without memory");
        assert_eq!(elsewhere(&[0, 1], &[1]), (true, false));
        assert_eq!(elsewhere(&[], &[]), (false, false), "a kernel without nodes");
        assert!(!Elsewhere::of(&MachineNodes::default(), &placement).is_nothing(), "not known");
    }

    #[test]
    fn nodes_are_read_as_the_kernel_lists_them() {
        assert_eq!(parse(Ok("0-1,3\n".to_owned())).unwrap(), [0, 1, 3]);
        assert_eq!(parse(Err(io::ErrorKind::NotFound.into())).unwrap(), [0; 0]);
        assert!(parse(Ok("zero".to_owned())).is_err());
        assert!(parse(Err(io::ErrorKind::PermissionDenied.into())).is_err());
    }
}
