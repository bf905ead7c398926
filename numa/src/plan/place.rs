//! The placing itself: what is reserved, what was named, and the rest by number.
//!
//! Called by whoever makes a plan. Refuses to look at the machine: all it knows is in its arguments,
//! and for the same it always gives the same.

use std::collections::BTreeSet;

use mica_units::ShardId;

use super::{Plan, PlanConfig, PlanError, Reserved, ShardSeat, Shards, Siblings, Smt, VcpuCores};
use crate::cpus::CpuList;
use crate::topology::{Core, Node, Topology};

const SHARD_CPUS: &str = "--shard-cpus";
const VCPU_CPUS: &str = "--vcpu-cpus";
const RESERVED_CPUS: &str = "--reserved-cpus";
const RESERVED_PER_NODE: &str = "the cores that --reserved-per-node takes";

/// What [`Shards::Auto`] is.
const AUTO_THOUSANDTHS: u16 = 250;

/// Makes the plan.
///
/// # Errors
/// See [`PlanError`].
pub fn plan(topology: &Topology, config: &PlanConfig) -> Result<Plan, PlanError> {
    let nodes: Vec<&Node> = topology.nodes.iter().filter(|node| !node.cores.is_empty()).collect();
    if nodes.is_empty() {
        return Err(PlanError::NoCores);
    }
    check_named(topology, config)?;
    let reserved = reserved(&nodes, config)?;
    let wishes = Wishes { config, reserved: &reserved };
    let places: Vec<Vec<Place>> = nodes.iter().map(|node| wishes.places(node)).collect();
    let mut chosen = match &config.shards {
        Shards::On(cpus) => wishes.named_places(&nodes, cpus)?,
        other => by_number(other, &nodes, places, config.smt)?,
    };
    for places in &mut chosen {
        places.sort_unstable_by_key(|place| place.cpu);
    }
    let mut plan = Plan { pin: config.pin, memory: config.memory, ..Plan::default() };
    for (node, chosen) in nodes.iter().zip(chosen) {
        let memory_node = topology.memory_near(node);
        let vcpus = wishes.vcpus(node, &chosen, memory_node)?;
        for place in chosen {
            let shard = u16::try_from(plan.seats.len()).map(ShardId::new).map_err(|_| {
                let (asked, free) = (plan.seats.len(), usize::from(u16::MAX));
                PlanError::TooManyShards { asked, free, places: "shard numbers" }
            })?;
            plan.seats.push(ShardSeat { shard, core: place.cpu, node: node.index, memory_node });
            let shared = vcpus.as_ref().is_some_and(|vcpus| vcpus.shared_with_shards);
            if config.smt == Smt::Pair && !shared && !place.siblings.is_empty() {
                plan.blocking.push(Siblings { shard, cpus: place.siblings });
            }
        }
        plan.vcpus.extend(vcpus);
    }
    plan.reserved = reserved.into_iter().collect();
    plan.free = without_role(topology, &plan);
    Ok(plan)
}

fn without_role(topology: &Topology, plan: &Plan) -> Vec<u32> {
    let mut taken: BTreeSet<u32> = plan.reserved.iter().copied().collect();
    taken.extend(plan.seats.iter().map(|seat| seat.core));
    taken.extend(plan.blocking.iter().flat_map(|own| &own.cpus));
    taken.extend(plan.vcpus.iter().flat_map(|vcpus| &vcpus.cpus));
    topology.cpus().cpus().iter().copied().filter(|cpu| !taken.contains(cpu)).collect()
}

/// Every hardware thread that was named is there, and was named once.
fn check_named(topology: &Topology, config: &PlanConfig) -> Result<(), PlanError> {
    let usable = topology.cpus();
    let mut named: Vec<(&'static str, &CpuList)> = Vec::new();
    if let Shards::On(cpus) = &config.shards {
        named.push((SHARD_CPUS, cpus));
    }
    if let Some(cpus) = &config.vcpus {
        named.push((VCPU_CPUS, cpus));
    }
    if let Reserved::On(cpus) = &config.reserved {
        named.push((RESERVED_CPUS, cpus));
    }
    for (at, (option, cpus)) in named.iter().enumerate() {
        if let Some(cpu) = cpus.cpus().iter().copied().find(|cpu| !usable.contains(*cpu)) {
            return Err(PlanError::UnknownCpu { option, cpu, usable });
        }
        for (second, others) in &named[at + 1..] {
            if let Some(cpu) = cpus.cpus().iter().copied().find(|cpu| others.contains(*cpu)) {
                return Err(PlanError::TwoRoles { cpu, first: option, second });
            }
        }
    }
    Ok(())
}

/// The hardware threads that get no role.
fn reserved(nodes: &[&Node], config: &PlanConfig) -> Result<BTreeSet<u32>, PlanError> {
    let each = match &config.reserved {
        Reserved::On(cpus) => return Ok(cpus.cpus().iter().copied().collect()),
        Reserved::PerNode(each) => *each,
    };
    let mut kept = BTreeSet::new();
    for node in nodes {
        let cores = node.cores.len();
        if usize::from(each) >= cores {
            return Err(PlanError::NothingLeft { node: node.index, cores, reserved: each });
        }
        kept.extend(node.cores[..usize::from(each)].iter().flat_map(Core::threads));
    }
    let second = RESERVED_PER_NODE;
    let shards = if let Shards::On(cpus) = &config.shards { Some(cpus) } else { None };
    for (first, cpus) in [(SHARD_CPUS, shards), (VCPU_CPUS, config.vcpus.as_ref())] {
        let cpus = cpus.map(CpuList::cpus).unwrap_or_default();
        if let Some(cpu) = cpus.iter().copied().find(|cpu| kept.contains(cpu)) {
            return Err(PlanError::TwoRoles { cpu, first, second });
        }
    }
    Ok(kept)
}

/// Where a shard can sit.
#[derive(Clone, Debug)]
struct Place {
    /// Its hardware thread.
    cpu: u32,
    /// The others of its core that are its own with it. None where each is a place.
    siblings: Vec<u32>,
}

struct Wishes<'a> {
    config: &'a PlanConfig,
    reserved: &'a BTreeSet<u32>,
}

impl Wishes<'_> {
    fn is_for_vcpus(&self, cpu: u32) -> bool {
        self.config.vcpus.as_ref().is_some_and(|cpus| cpus.contains(cpu))
    }

    /// The threads of a core that can have a role.
    fn open<'c>(&'c self, core: &'c Core) -> impl Iterator<Item = u32> + 'c {
        core.threads().iter().copied().filter(|cpu| !self.reserved.contains(cpu))
    }

    /// Where shards of a node can sit, in the order in which they are taken. Threads of one core follow
    /// one another, so that as few cores as can be have a shard and a guest.
    fn places(&self, node: &Node) -> Vec<Place> {
        let mut places = Vec::new();
        for core in &node.cores {
            let open: Vec<u32> = self.open(core).collect();
            if self.config.smt == Smt::Use {
                let free = open.into_iter().filter(|cpu| !self.is_for_vcpus(*cpu));
                places.extend(free.map(|cpu| Place { cpu, siblings: Vec::new() }));
            } else if let Some((cpu, siblings)) = open.split_first()
                && !open.iter().any(|cpu| self.is_for_vcpus(*cpu))
            {
                places.push(Place { cpu: *cpu, siblings: siblings.to_vec() });
            }
        }
        places
    }

    /// A place for each hardware thread that was named for a shard, by node.
    fn named_places(&self, nodes: &[&Node], cpus: &CpuList) -> Result<Vec<Vec<Place>>, PlanError> {
        if cpus.is_empty() {
            return Err(PlanError::NoShards);
        }
        let mut by_node = Vec::new();
        for node in nodes {
            let mut places = Vec::new();
            for core in &node.cores {
                let open: Vec<u32> = self.open(core).collect();
                for cpu in open.iter().copied().filter(|cpu| cpus.contains(*cpu)) {
                    let others = open.iter().copied().filter(|other| *other != cpu);
                    let siblings: Vec<u32> =
                        if self.config.smt == Smt::Use { Vec::new() } else { others.collect() };
                    for sibling in &siblings {
                        let options = [
                            (SHARD_CPUS, cpus.contains(*sibling)),
                            (VCPU_CPUS, self.is_for_vcpus(*sibling)),
                        ];
                        if let Some((option, _)) = options.into_iter().find(|(_, named)| *named) {
                            return Err(PlanError::SharedCore { cpu, option, sibling: *sibling });
                        }
                    }
                    places.push(Place { cpu, siblings });
                }
            }
            by_node.push(places);
        }
        Ok(by_node)
    }

    /// Where vCPUs of a node run: what was named, else what shards leave, else the shards' own cores.
    fn vcpus(
        &self,
        node: &Node,
        shards: &[Place],
        memory_node: u32,
    ) -> Result<Option<VcpuCores>, PlanError> {
        let of_shards: BTreeSet<u32> =
            shards.iter().flat_map(|p| p.siblings.iter().copied().chain([p.cpu])).collect();
        let open = || node.cores.iter().flat_map(|core| self.open(core));
        let rest = || open().filter(|cpu| !of_shards.contains(cpu));
        let cpus: CpuList = match &self.config.vcpus {
            Some(_) => rest().filter(|cpu| self.is_for_vcpus(*cpu)).collect(),
            None => rest().collect(),
        };
        let (cpus, shared_with_shards) = match (cpus.is_empty(), shards.is_empty()) {
            (false, _) => (cpus, false),
            (true, true) => return Ok(None),
            (true, false) if self.config.vcpus.is_some() => {
                let usable = rest().collect();
                return Err(PlanError::NoVcpuCpus { node: node.index, usable });
            }
            (true, false) => (of_shards.into_iter().collect(), true),
        };
        let (node, cpus) = (node.index, cpus.cpus().to_vec());
        Ok(Some(VcpuCores { node, memory_node, cpus, shared_with_shards }))
    }
}

/// The first places of each node, as many as were asked for.
fn by_number(
    shards: &Shards,
    nodes: &[&Node],
    places: Vec<Vec<Place>>,
    smt: Smt,
) -> Result<Vec<Vec<Place>>, PlanError> {
    let free: Vec<usize> = places.iter().map(Vec::len).collect();
    let kind = if smt == Smt::Use { "hardware threads" } else { "cores" };
    let part = |thousandths: u16| {
        let of = |free: &usize| (free * usize::from(thousandths) / 1000).max(1).min(*free);
        free.iter().map(of).collect()
    };
    let counts: Vec<usize> = match shards {
        Shards::Auto | Shards::On(_) => part(AUTO_THOUSANDTHS),
        Shards::Thousandths(0) => return Err(PlanError::NoShards),
        Shards::Thousandths(thousandths) => part((*thousandths).min(1000)),
        Shards::PerNode(each) => vec![usize::from(*each); free.len()],
        Shards::Total(total) => spread(usize::from(*total), &free, kind)?,
    };
    for ((count, free), node) in counts.iter().zip(&free).zip(nodes) {
        if count > free {
            let (node, asked, free) = (node.index, *count, *free);
            return Err(PlanError::NodeTooSmall { node, asked, free, places: kind });
        }
    }
    let all = free.iter().sum::<usize>();
    match counts.iter().sum::<usize>() {
        0 if all == 0 => Err(PlanError::NoPlace),
        0 => Err(PlanError::NoShards),
        _ => {
            let first = |(places, count): (Vec<Place>, usize)| places.into_iter().take(count);
            Ok(places.into_iter().zip(counts).map(|pair| first(pair).collect()).collect())
        }
    }
}

/// Deals `total` shards out to the nodes, one each a round, skipping those that are full.
fn spread(total: usize, free: &[usize], places: &'static str) -> Result<Vec<usize>, PlanError> {
    let all: usize = free.iter().sum();
    if total > all {
        return Err(PlanError::TooManyShards { asked: total, free: all, places });
    }
    let mut counts = vec![0; free.len()];
    let mut left = total;
    while left > 0 {
        for (count, free) in counts.iter_mut().zip(free) {
            if left > 0 && *count < *free {
                *count += 1;
                left -= 1;
            }
        }
    }
    Ok(counts)
}
