//! Who sits where: a pure function from machine and wishes to seats.
//!
//! Called by the binary, for the daemon and for `mica topology`. Refuses to seat more shards than
//! there is room for, and wishes that contradict one another. A hardware thread has one role, except
//! on a node with too few cores for two: there vCPUs share the shards' cores, and the plan says so.

mod place;

use std::fmt;

use mica_units::{ShardCount, ShardId};

use crate::cpus::CpuList;

pub use place::plan;

/// How many shards, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Shards {
    /// A quarter of each node, at least one.
    #[default]
    Auto,
    /// So many on each node.
    PerNode(u16),
    /// So many altogether, spread over the nodes.
    Total(u16),
    /// So many thousandths of each node, at least one.
    Thousandths(u16),
    /// One on each of these hardware threads.
    On(CpuList),
}

/// What the hardware threads of one core do together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Smt {
    /// A shard has a core of its own; its siblings do nothing.
    #[default]
    Avoid,
    /// A shard has a core of its own; its blocking threads run on the siblings.
    Pair,
    /// Each hardware thread is a place of its own, for a shard or for vCPUs.
    Use,
}

/// What is left to the operating system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reserved {
    /// So many cores of each node, from its lowest on.
    PerNode(u16),
    /// These hardware threads.
    On(CpuList),
}

/// Where the threads of a VM process may run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VcpuPin {
    /// On the vCPUs' cores of its node.
    #[default]
    Node,
    /// Each vCPU on one hardware thread of its node, the one that has the fewest.
    Core,
    /// On the vCPUs' cores of any node.
    None,
}

/// Where the memory of a VM process may lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryPolicy {
    /// On its node only: a node that is full ends what asks for more.
    Bind,
    /// On its node while that has room, then on others.
    #[default]
    Preferred,
}

/// What the operator wishes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanConfig {
    /// How many shards, and where.
    pub shards: Shards,
    /// What siblings do.
    pub smt: Smt,
    /// What gets no role.
    pub reserved: Reserved,
    /// Hardware threads for vCPUs. `None`: what is left.
    pub vcpus: Option<CpuList>,
    /// Where vCPUs may run.
    pub pin: VcpuPin,
    /// Where guests' memory may lie.
    pub memory: MemoryPolicy,
}

impl Default for Reserved {
    fn default() -> Self {
        Self::PerNode(0)
    }
}

/// One shard's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardSeat {
    /// The shard.
    pub shard: ShardId,
    /// The hardware thread its executor is pinned to.
    pub core: u32,
    /// The memory node of that core.
    pub node: u32,
    /// Where its memory lies: that node, or the nearest with memory.
    pub memory_node: u32,
}

impl ShardSeat {
    /// A seat whose memory is on its own node.
    #[must_use]
    pub fn new(shard: ShardId, core: u32, node: u32) -> Self {
        Self { shard, core, node, memory_node: node }
    }
}

/// Hardware threads of one node that run vCPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuCores {
    /// The node.
    pub node: u32,
    /// Where the memory of guests there lies: that node, or the nearest with memory.
    pub memory_node: u32,
    /// The hardware threads, in order.
    pub cpus: Vec<u32>,
    /// Whether shards sit on the same cores, because the node has no others.
    pub shared_with_shards: bool,
}

impl VcpuCores {
    /// Such threads on a node with memory.
    #[must_use]
    pub fn new(node: u32, cpus: Vec<u32>, shared_with_shards: bool) -> Self {
        Self { node, memory_node: node, cpus, shared_with_shards }
    }
}

/// Where a shard's blocking threads run that have a place of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Siblings {
    /// The shard.
    pub shard: ShardId,
    /// The other hardware threads of its core.
    pub cpus: Vec<u32>,
}

/// Who sits where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Seats, in shard order: seat `i` is shard `i`. A node's shards follow one another. Never empty.
    pub seats: Vec<ShardSeat>,
    /// Where blocking threads run, of those shards that have siblings for them: see [`Smt::Pair`].
    pub blocking: Vec<Siblings>,
    /// Where vCPUs run, in node order. A node that has shards has these.
    pub vcpus: Vec<VcpuCores>,
    /// Usable hardware threads that nothing runs on, in order.
    pub free: Vec<u32>,
    /// Hardware threads that are left to the operating system, in order.
    pub reserved: Vec<u32>,
    /// Where vCPUs may run.
    pub pin: VcpuPin,
    /// Where guests' memory may lie.
    pub memory: MemoryPolicy,
}

/// What a hardware thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A shard's executor.
    Shard(ShardId),
    /// A shard's executor and vCPUs.
    Shared(ShardId),
    /// The blocking threads of a shard.
    Blocking(ShardId),
    /// vCPUs.
    Vcpus,
    /// Left to the operating system.
    Reserved,
    /// Nothing.
    Free,
}

/// Why there is no such plan
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Not even one shard.
    #[error("asked for no shard at all; ask for at least one")]
    NoShards,
    /// Everything is taken already.
    #[error(
        "every usable core is reserved or runs vCPUs; take some out of --reserved-cpus or --vcpu-cpus, \
         so that a shard has one"
    )]
    NoPlace,
    /// More shards than places.
    #[error(
        "asked for {asked} shards where {free} {places} are free; ask for fewer, reserve fewer, or \
         let each hardware thread be a place with --smt use"
    )]
    TooManyShards {
        /// What was asked for.
        asked: usize,
        /// Places that could take one.
        free: usize,
        /// What a place is.
        places: &'static str,
    },
    /// A node cannot take as many shards as each shall.
    #[error(
        "asked for {asked} shards on each node, and node {node} has {free} free {places}; ask for \
         fewer, or say how many altogether with --shards"
    )]
    NodeTooSmall {
        /// The node.
        node: u32,
        /// What was asked for.
        asked: usize,
        /// Places that could take one.
        free: usize,
        /// What a place is.
        places: &'static str,
    },
    /// A node would keep no core.
    #[error(
        "node {node} has {cores} usable cores and {reserved} are to be reserved; reserve fewer"
    )]
    NothingLeft {
        /// The node.
        node: u32,
        /// Its usable cores.
        cores: usize,
        /// What was asked for.
        reserved: u16,
    },
    /// No node, or no core in a node.
    #[error("the machine has no usable core")]
    NoCores,
    /// A hardware thread that is not there, or not for this process.
    #[error(
        "{option} names cpu {cpu}, which this process may not use or which is not there; it may use \
         {usable}"
    )]
    UnknownCpu {
        /// Where it is named.
        option: &'static str,
        /// The hardware thread.
        cpu: u32,
        /// What could be named.
        usable: CpuList,
    },
    /// A hardware thread that is asked for twice.
    #[error("cpu {cpu} is in {first} and in {second}; take it out of one")]
    TwoRoles {
        /// The hardware thread.
        cpu: u32,
        /// One role.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// A shard whose core would not be its own.
    #[error(
        "--shard-cpus names cpu {cpu}, and {option} its sibling {sibling} on the same core; with --smt \
         use they may be apart, else take one out"
    )]
    SharedCore {
        /// The shard's hardware thread.
        cpu: u32,
        /// Where the sibling is named.
        option: &'static str,
        /// The sibling.
        sibling: u32,
    },
    /// Shards whose guests would have no core.
    #[error(
        "node {node} has shards, and --vcpu-cpus names none of its cpus; add some of {usable}, or name \
         the shards' cpus with --shard-cpus and leave this node out"
    )]
    NoVcpuCpus {
        /// The node.
        node: u32,
        /// What could be named.
        usable: CpuList,
    },
}

impl Plan {
    /// How many shards there are.
    #[must_use]
    pub fn shard_count(&self) -> ShardCount {
        let count = u16::try_from(self.seats.len()).ok().and_then(ShardCount::new);
        count.unwrap_or(ShardCount::MIN)
    }

    /// Where vCPUs run on a node.
    #[must_use]
    pub fn vcpus_of(&self, node: u32) -> Option<&VcpuCores> {
        self.vcpus.iter().find(|vcpus| vcpus.node == node)
    }

    /// Where the blocking threads of a shard run: its siblings, or with the vCPUs of its node.
    #[must_use]
    pub fn blocking_cpus(&self, seat: ShardSeat) -> Vec<u32> {
        let own = self.blocking.iter().find(|siblings| siblings.shard == seat.shard);
        let near = || self.vcpus_of(seat.node).map(|vcpus| vcpus.cpus.clone());
        own.map(|own| own.cpus.clone()).or_else(near).unwrap_or_else(|| vec![seat.core])
    }

    /// What a hardware thread is for.
    #[must_use]
    pub fn role(&self, cpu: u32) -> Role {
        let runs_vcpus = self.vcpus.iter().any(|vcpus| vcpus.cpus.contains(&cpu));
        if let Some(seat) = self.seats.iter().find(|seat| seat.core == cpu) {
            return if runs_vcpus { Role::Shared(seat.shard) } else { Role::Shard(seat.shard) };
        }
        if let Some(own) = self.blocking.iter().find(|own| own.cpus.contains(&cpu)) {
            return Role::Blocking(own.shard);
        }
        match (runs_vcpus, self.reserved.contains(&cpu)) {
            (true, _) => Role::Vcpus,
            (false, true) => Role::Reserved,
            (false, false) => Role::Free,
        }
    }
}

fn list(cpus: &[u32]) -> CpuList {
    cpus.iter().copied().collect()
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut nodes: Vec<u32> = self.seats.iter().map(|seat| seat.node).collect();
        nodes.extend(self.vcpus.iter().map(|vcpus| vcpus.node));
        nodes.sort_unstable();
        nodes.dedup();
        for node in nodes {
            writeln!(f, "node {node}")?;
            self.fmt_node(f, node)?;
        }
        if !self.free.is_empty() {
            writeln!(f, "free            cpus {}", list(&self.free))?;
        }
        if !self.reserved.is_empty() {
            writeln!(f, "reserved        cpus {}", list(&self.reserved))?;
        }
        writeln!(f, "vcpu pin        {}", self.pin)?;
        writeln!(f, "memory          {}", self.memory)
    }
}

impl Plan {
    fn fmt_node(&self, f: &mut fmt::Formatter<'_>, node: u32) -> fmt::Result {
        let seats: Vec<_> = self.seats.iter().filter(|seat| seat.node == node).collect();
        if let (Some(first), Some(last)) = (seats.first(), seats.last()) {
            let (first, last) = (first.shard.index(), last.shard.index());
            let name = if first == last {
                format!("shard {first}")
            } else {
                format!("shards {first}-{last}")
            };
            writeln!(
                f,
                "  {name:<13} cpus {}",
                list(&seats.iter().map(|s| s.core).collect::<Vec<_>>())
            )?;
        }
        let ours = |own: &&Siblings| seats.iter().any(|seat| seat.shard == own.shard);
        let blocking: CpuList =
            self.blocking.iter().filter(ours).flat_map(|own| own.cpus.iter().copied()).collect();
        if !blocking.is_empty() {
            writeln!(f, "  blocking      cpus {blocking}")?;
        }
        let Some(vcpus) = self.vcpus_of(node) else { return Ok(()) };
        let note = match (vcpus.shared_with_shards, seats.is_empty()) {
            (true, _) => "  (shared with shards)",
            (false, true) if self.pin != VcpuPin::None => "  (idle: no shard is here)",
            _ => "",
        };
        writeln!(f, "  vcpus         cpus {}{note}", list(&vcpus.cpus))?;
        if vcpus.memory_node != node {
            writeln!(f, "  memory        node {}  (this node has none)", vcpus.memory_node)?;
        }
        Ok(())
    }
}

impl fmt::Display for VcpuPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Node => "node",
            Self::Core => "core",
            Self::None => "none",
        })
    }
}

impl fmt::Display for MemoryPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bind => "bind",
            Self::Preferred => "preferred",
        })
    }
}

impl fmt::Display for Smt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Avoid => "avoid",
            Self::Pair => "pair",
            Self::Use => "use",
        })
    }
}
