//! Who sits where: a pure function from machine and wishes to seats.
//!
//! Called by the binary, for the daemon and for `mica topology`. Refuses to seat more shards than
//! there are cores. A core has one role, except on a node with too few cores for two roles: there
//! vCPUs share the shards' cores, and the plan says so.

use std::fmt;

use mica_units::{ShardCount, ShardId};

use crate::Topology;
use crate::topology::{Core, Node};

/// How many shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shards {
    /// A quarter of the cores of each node, at least one.
    Auto,
    /// So many on each node.
    PerNode(u16),
    /// So many altogether, spread over the nodes.
    Total(u16),
}

/// Cores left to the operating system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserved {
    /// So many of each node, from its lowest core on.
    PerNode(u16),
}

/// What the operator wishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanConfig {
    /// How many shards.
    pub shards: Shards,
    /// Cores that get no role.
    pub reserved: Reserved,
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
}

/// Cores of one node that run vCPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuCores {
    /// The node.
    pub node: u32,
    /// Every hardware thread of those cores.
    pub cpus: Vec<u32>,
    /// Whether shards sit on the same cores, because the node has no others.
    pub shared_with_shards: bool,
}

/// Who sits where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Seats, in shard order: seat `i` is shard `i`. Never empty.
    pub seats: Vec<ShardSeat>,
    /// Where vCPUs run, in node order.
    pub vcpus: Vec<VcpuCores>,
    /// Hardware threads without a role, in order.
    pub reserved: Vec<u32>,
}

/// Why there is no such plan
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Not even one shard.
    #[error("asked for no shard at all; ask for at least one")]
    NoShards,
    /// More shards than cores.
    #[error("asked for {asked} shards where {cores} cores are free; ask for fewer")]
    TooManyShards {
        /// What was asked for.
        asked: usize,
        /// Cores that could take one.
        cores: usize,
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
}

impl Plan {
    /// How many shards there are.
    #[must_use]
    pub fn shard_count(&self) -> ShardCount {
        let count = u16::try_from(self.seats.len()).ok().and_then(ShardCount::new);
        count.unwrap_or(ShardCount::MIN)
    }
}

/// Makes the plan.
///
/// # Errors
/// See [`PlanError`].
pub fn plan(topology: &Topology, config: &PlanConfig) -> Result<Plan, PlanError> {
    let Reserved::PerNode(reserved) = config.reserved;
    let mut free: Vec<(&Node, &[Core])> = Vec::new();
    let mut left_alone = Vec::new();
    for node in &topology.nodes {
        let cores = node.cores.len();
        let kept = usize::from(reserved);
        if kept >= cores {
            return Err(PlanError::NothingLeft { node: node.index, cores, reserved });
        }
        left_alone.extend(node.cores[..kept].iter().flat_map(Core::threads));
        free.push((node, &node.cores[kept..]));
    }
    let counts = shards_by_node(config.shards, &free)?;
    let mut seats = Vec::new();
    let mut vcpus = Vec::new();
    for ((node, cores), count) in free.iter().zip(counts) {
        for core in &cores[..count] {
            let shard = u16::try_from(seats.len()).map(ShardId::new).map_err(|_| {
                PlanError::TooManyShards { asked: seats.len(), cores: usize::from(u16::MAX) }
            })?;
            seats.push(ShardSeat { shard, core: core.cpu(), node: node.index });
        }
        let shared_with_shards = count == cores.len();
        let for_vcpus = if shared_with_shards { cores } else { &cores[count..] };
        let cpus = for_vcpus.iter().flat_map(Core::threads).copied().collect();
        vcpus.push(VcpuCores { node: node.index, cpus, shared_with_shards });
    }
    left_alone.sort_unstable();
    Ok(Plan { seats, vcpus, reserved: left_alone })
}

/// How many shards each node gets: never more than it has free cores.
fn shards_by_node(shards: Shards, free: &[(&Node, &[Core])]) -> Result<Vec<usize>, PlanError> {
    let all: usize = free.iter().map(|(_, cores)| cores.len()).sum();
    if all == 0 {
        return Err(PlanError::NoCores);
    }
    let counts: Vec<usize> = match shards {
        Shards::Auto => free.iter().map(|(_, cores)| (cores.len() / 4).max(1)).collect(),
        Shards::PerNode(each) => vec![usize::from(each); free.len()],
        Shards::Total(total) => spread(usize::from(total), free)?,
    };
    let asked = counts.iter().sum();
    if asked == 0 {
        return Err(PlanError::NoShards);
    }
    for (count, (_, cores)) in counts.iter().zip(free) {
        if *count > cores.len() {
            return Err(PlanError::TooManyShards { asked, cores: all });
        }
    }
    Ok(counts)
}

/// Deals `total` shards out to the nodes, one each a round, skipping those that are full.
fn spread(total: usize, free: &[(&Node, &[Core])]) -> Result<Vec<usize>, PlanError> {
    let cores: usize = free.iter().map(|(_, cores)| cores.len()).sum();
    if total > cores {
        return Err(PlanError::TooManyShards { asked: total, cores });
    }
    let mut counts = vec![0; free.len()];
    let mut left = total;
    while left > 0 {
        for (count, (_, cores)) in counts.iter_mut().zip(free) {
            if left > 0 && *count < cores.len() {
                *count += 1;
                left -= 1;
            }
        }
    }
    Ok(counts)
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for vcpus in &self.vcpus {
            writeln!(f, "node {}", vcpus.node)?;
            for seat in self.seats.iter().filter(|seat| seat.node == vcpus.node) {
                writeln!(f, "  shard {:<4} core {}", seat.shard.index(), seat.core)?;
            }
            let note = if vcpus.shared_with_shards { "  (shared with shards)" } else { "" };
            writeln!(f, "  vcpus      cores {}{note}", ranges(&vcpus.cpus))?;
        }
        if self.reserved.is_empty() {
            return Ok(());
        }
        writeln!(f, "reserved     cores {}", ranges(&self.reserved))
    }
}

/// `0-3,8,10-11`, as the kernel writes sets of cores.
fn ranges(cpus: &[u32]) -> String {
    let mut sorted = cpus.to_vec();
    sorted.sort_unstable();
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for cpu in sorted {
        match parts.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(cpu) => *last = cpu,
            _ => parts.push((cpu, cpu)),
        }
    }
    let text = |(first, last): &(u32, u32)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    parts.iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn machine(nodes: &[u32], threads_per_core: u32) -> Topology {
        let total: u32 = nodes.iter().sum();
        let mut next = 0;
        let node = |(index, cores): (usize, &u32)| {
            let cores = (0..*cores)
                .map(|_| {
                    let first = next;
                    next += 1;
                    // Siblings are numbered after all first threads, as Linux does.
                    Core::new((0..threads_per_core).map(|t| first + t * total).collect()).unwrap()
                })
                .collect();
            Node { index: u32::try_from(index).unwrap(), memory_bytes: 1 << 30, cores }
        };
        Topology { nodes: nodes.iter().enumerate().map(node).collect() }
    }

    fn config(shards: Shards, reserved: u16) -> PlanConfig {
        PlanConfig { shards, reserved: Reserved::PerNode(reserved) }
    }

    #[test]
    fn two_nodes_are_shown_as_seated() {
        let plan = plan(&machine(&[4, 4], 1), &config(Shards::PerNode(1), 1)).unwrap();
        let expected = "node 0\n  shard 0    core 1\n  vcpus      cores 2-3\n\
                        node 1\n  shard 1    core 5\n  vcpus      cores 6-7\n\
                        reserved     cores 0,4\n";
        assert_eq!(plan.to_string(), expected);
        assert_eq!(plan.shard_count().get(), 2);
    }

    #[test]
    fn one_core_does_everything() {
        let plan = plan(&machine(&[1], 2), &config(Shards::Auto, 0)).unwrap();
        assert_eq!(plan.seats.len(), 1);
        assert!(plan.vcpus[0].shared_with_shards);
        assert_eq!(plan.vcpus[0].cpus, [0, 1]);
    }

    #[test]
    fn impossible_wishes_are_refused() {
        let two = machine(&[2, 2], 1);
        assert_eq!(plan(&two, &config(Shards::Total(0), 0)), Err(PlanError::NoShards));
        assert_eq!(plan(&two, &config(Shards::PerNode(0), 0)), Err(PlanError::NoShards));
        let too_many = Err(PlanError::TooManyShards { asked: 5, cores: 4 });
        assert_eq!(plan(&two, &config(Shards::Total(5), 0)), too_many);
        let too_many = Err(PlanError::TooManyShards { asked: 6, cores: 4 });
        assert_eq!(plan(&two, &config(Shards::PerNode(3), 0)), too_many);
        let nothing = Err(PlanError::NothingLeft { node: 0, cores: 2, reserved: 2 });
        assert_eq!(plan(&two, &config(Shards::Auto, 2)), nothing);
        assert_eq!(
            plan(&Topology { nodes: vec![] }, &config(Shards::Auto, 0)),
            Err(PlanError::NoCores)
        );
    }

    fn wishes() -> impl Strategy<Value = Shards> {
        prop_oneof![
            Just(Shards::Auto),
            (0u16..9).prop_map(Shards::PerNode),
            (0u16..40).prop_map(Shards::Total),
        ]
    }

    proptest! {
        #[test]
        fn every_core_has_at_most_one_role(
            nodes in prop::collection::vec(1u32..9, 1..5),
            threads in 1u32..3,
            shards in wishes(),
            reserved in 0u16..3,
        ) {
            let topology = machine(&nodes, threads);
            let Ok(plan) = plan(&topology, &config(shards, reserved)) else { return Ok(()) };
            let node_of = |cpu: u32| {
                let owns = |core: &Core| core.threads().contains(&cpu);
                topology.nodes.iter().find(|n| n.cores.iter().any(owns)).map(|n| n.index)
            };
            let mut taken = BTreeSet::new();
            for (index, seat) in plan.seats.iter().enumerate() {
                prop_assert_eq!(usize::from(seat.shard.index()), index);
                prop_assert_eq!(node_of(seat.core), Some(seat.node));
                prop_assert!(taken.insert(seat.core), "two shards on core {}", seat.core);
            }
            for vcpus in &plan.vcpus {
                prop_assert!(!vcpus.cpus.is_empty());
                for cpu in &vcpus.cpus {
                    prop_assert_eq!(node_of(*cpu), Some(vcpus.node));
                    let alone = vcpus.shared_with_shards || taken.insert(*cpu);
                    prop_assert!(alone, "core {} has two roles", cpu);
                }
            }
            for cpu in &plan.reserved {
                prop_assert!(!taken.contains(cpu), "core {} is reserved and has a role", cpu);
            }
            let usable: usize = topology.nodes.iter().map(|n| n.cores.len()).sum();
            prop_assert!((1..=usable).contains(&plan.seats.len()));
            if let Shards::Total(total) = shards {
                prop_assert_eq!(plan.seats.len(), usize::from(total));
            }
        }
    }
}
