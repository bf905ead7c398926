//! Plans for machines that are not here: what each looks like, and what holds of all.
//!
//! Called by `cargo test`. The plans are in `tests/goldens`; `MICA_BLESS=1` writes them anew, and then
//! they are read before they are committed.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use mica_numa::topology::{Core, Node, from_xml};
use mica_numa::{
    CpuList, MemoryPolicy, Plan, PlanConfig, PlanError, Reserved, Shards, Smt, Topology, VcpuPin,
    plan,
};
use proptest::prelude::*;

/// Nodes with so many cores each. Siblings are numbered after all first threads, as Linux does.
fn machine(cores_by_node: &[u32], threads_per_core: u32) -> Topology {
    let total: u32 = cores_by_node.iter().sum();
    let mut first = 0..total;
    let mut node = |(index, cores): (u32, &u32)| {
        let cores = first.by_ref().take(*cores as usize);
        let threads = |cpu| (0..threads_per_core).map(|t| cpu + t * total).collect();
        let cores = cores.filter_map(|cpu| Core::new(threads(cpu))).collect();
        Node { index, memory_bytes: 64 << 30, cores, ..Node::default() }
    };
    Topology { nodes: (0..).zip(cores_by_node).map(&mut node).collect(), ..Topology::default() }
}

fn two_sockets() -> Topology {
    from_xml(include_bytes!("machines/2x24x2.xml")).unwrap()
}

/// Two packages of four nodes each, 16 cores a node, two threads a core.
fn epyc_nps4() -> Topology {
    let mut topology = machine(&[16; 8], 2);
    for node in &mut topology.nodes {
        node.package = Some(node.index / 4);
    }
    topology
}

/// What a container sees whose cpuset is a part of a machine: some cores whole, of some one thread.
fn limited_container() -> Topology {
    let mut topology = two_sockets();
    let allowed: CpuList = "2-6,50-53".parse().unwrap();
    for node in &mut topology.nodes {
        let part = |core: &Core| {
            Core::new(core.threads().iter().copied().filter(|cpu| allowed.contains(*cpu)).collect())
        };
        node.cores = node.cores.iter().filter_map(part).collect();
    }
    topology
}

fn without_node_0() -> Topology {
    let mut topology = machine(&[4, 4], 1);
    topology.nodes[0].index = 1;
    topology.nodes[1].index = 3;
    topology
}

/// Node 1 has cores and no memory; of the two that have, node 2 is nearer. Node 3 is memory only.
fn memoryless_node() -> Topology {
    let mut topology = machine(&[4, 4, 4, 0], 1);
    topology.nodes[1].memory_bytes = 0;
    topology.nodes[1].distances = [(0, 31), (1, 10), (2, 12), (3, 17)].into();
    topology
}

fn list(text: &str) -> CpuList {
    text.parse().unwrap()
}

fn on(cpus: &str) -> Shards {
    Shards::On(list(cpus))
}

fn wish(shards: Shards) -> PlanConfig {
    PlanConfig { shards, ..PlanConfig::default() }
}

/// Compares the plans for each wish with a file.
fn golden(name: &str, topology: &Topology, wishes: &[(&str, PlanConfig)]) {
    let mut text = String::new();
    for (options, config) in wishes {
        writeln!(text, "$ {}", format!("mica topology {options}").trim_end()).unwrap();
        match plan(topology, config) {
            Ok(plan) => writeln!(text, "{plan}").unwrap(),
            Err(error) => writeln!(text, "error: {error}\n").unwrap(),
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/goldens/{name}.txt"));
    if std::env::var_os("MICA_BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "{}: if it is right, MICA_BLESS=1 keeps it", path.display());
}

#[test]
fn two_sockets_of_24_cores() {
    let smt = |smt| PlanConfig { smt, ..PlanConfig::default() };
    let named = PlanConfig {
        vcpus: Some(list("4-23,28-47,52-71,76-95")),
        reserved: Reserved::On(list("0,24,48,72")),
        pin: VcpuPin::Core,
        memory: MemoryPolicy::Bind,
        smt: Smt::Pair,
        ..wish(on("1-3,25-27"))
    };
    let reserved = PlanConfig {
        reserved: Reserved::PerNode(1),
        pin: VcpuPin::None,
        ..wish(Shards::Thousandths(125))
    };
    let one_node = PlanConfig { smt: Smt::Use, ..wish(on("0,48,1,49")) };
    golden(
        "2x24x2",
        &two_sockets(),
        &[
            ("", PlanConfig::default()),
            ("--smt pair", smt(Smt::Pair)),
            ("--smt use", smt(Smt::Use)),
            ("--shard-fraction 0.125 --reserved-per-node 1 --vcpu-pin none", reserved),
            (
                "--smt pair --shard-cpus 1-3,25-27 --vcpu-cpus 4-23,28-47,52-71,76-95 \
                 --reserved-cpus 0,24,48,72 --vcpu-pin core --memory bind",
                named,
            ),
            ("--smt use --shard-cpus 0,48,1,49", one_node),
            ("--shards 3", wish(Shards::Total(3))),
        ],
    );
}

#[test]
fn eight_nodes_of_an_epyc() {
    let config = PlanConfig { smt: Smt::Pair, ..wish(Shards::PerNode(2)) };
    golden(
        "epyc-nps4",
        &epyc_nps4(),
        &[("", PlanConfig::default()), ("--shards-per-node 2 --smt pair", config)],
    );
}

#[test]
fn one_socket() {
    golden("1x8x2", &machine(&[8], 2), &[("", PlanConfig::default())]);
}

#[test]
fn a_virtual_machine_of_two_cores() {
    let all = wish(Shards::Total(2));
    let pair = PlanConfig { smt: Smt::Pair, ..wish(Shards::Thousandths(1000)) };
    golden("vm-2", &machine(&[2], 1), &[("", PlanConfig::default()), ("--shards 2", all)]);
    golden("vm-1x1x2", &machine(&[1], 2), &[("--shard-fraction 1 --smt pair", pair)]);
}

#[test]
fn a_container_with_a_part_of_a_machine() {
    let outside = PlanConfig { smt: Smt::Pair, ..wish(on("2,24")) };
    golden(
        "container",
        &limited_container(),
        &[("", PlanConfig::default()), ("--smt pair --shard-cpus 2,24", outside)],
    );
}

#[test]
fn clusters_within_a_socket() {
    let mut topology = machine(&[6, 6, 6, 6], 2);
    for node in &mut topology.nodes {
        node.package = Some(node.index / 2);
    }
    let total = PlanConfig { reserved: Reserved::PerNode(1), ..wish(Shards::Total(6)) };
    golden(
        "sub-numa",
        &topology,
        &[("", PlanConfig::default()), ("--shards 6 --reserved-per-node 1", total)],
    );
}

#[test]
fn nodes_without_a_node_0() {
    golden("without-node-0", &without_node_0(), &[("", PlanConfig::default())]);
}

#[test]
fn a_node_without_memory() {
    golden("memoryless", &memoryless_node(), &[("", PlanConfig::default())]);
}

#[test]
fn wishes_that_contradict_each_other_say_what_to_change() {
    let two = two_sockets();
    let with = |shards, vcpus: Option<&str>, reserved| PlanConfig {
        vcpus: vcpus.map(list),
        reserved,
        ..wish(shards)
    };
    let none = || Reserved::PerNode(0);
    let cases = [
        ("--shards 0", with(Shards::Total(0), None, none())),
        ("--shards-per-node 0", with(Shards::PerNode(0), None, none())),
        ("--shards 49", with(Shards::Total(49), None, none())),
        ("--shards-per-node 25", with(Shards::PerNode(25), None, none())),
        ("--shard-cpus ''", with(on(""), None, none())),
        ("--reserved-per-node 24", with(Shards::Auto, None, Reserved::PerNode(24))),
        ("--reserved-cpus 0-95", with(Shards::Auto, None, Reserved::On(list("0-95")))),
        ("--shard-cpus 96", with(on("96"), None, none())),
        ("--vcpu-cpus 5,200", with(Shards::Auto, Some("5,200"), none())),
        ("--shard-cpus 0-3 --vcpu-cpus 3-23", with(on("0-3"), Some("3-23"), none())),
        ("--shard-cpus 0 --reserved-cpus 0", with(on("0"), None, Reserved::On(list("0")))),
        ("--shard-cpus 0 --reserved-per-node 1", with(on("0"), None, Reserved::PerNode(1))),
        (
            "--vcpu-cpus 24-30 --reserved-per-node 1",
            with(Shards::Auto, Some("24-30"), Reserved::PerNode(1)),
        ),
        ("--shard-cpus 0,48", with(on("0,48"), None, none())),
        ("--shard-cpus 0 --vcpu-cpus 48-71", with(on("0"), Some("48-71"), none())),
        ("--vcpu-cpus 12-23", with(Shards::Auto, Some("12-23"), none())),
        ("--vcpu-cpus 0-95", with(Shards::Auto, Some("0-95"), none())),
    ];
    for (options, config) in &cases {
        assert!(plan(&two, config).is_err(), "{options} has a plan");
    }
    golden("contradictions", &two, &cases);
    assert_eq!(plan(&Topology::default(), &PlanConfig::default()), Err(PlanError::NoCores));
}

fn some_topology() -> impl Strategy<Value = Topology> {
    let node = (0u32..9, 0u64..3, 0u32..5);
    (prop::collection::vec(node, 1..6), 1u32..4, any::<u32>()).prop_map(
        |(nodes, threads, holes)| {
            let cores: Vec<u32> = nodes.iter().map(|(cores, ..)| *cores).collect();
            let mut topology = machine(&cores, threads);
            let mut index = 0;
            let numbered = (0u32..).zip(topology.nodes.iter_mut().zip(&nodes));
            for (at, (node, (_, memory, gap))) in numbered {
                // Indices with gaps, nodes without memory, and cores of which some threads are forbidden.
                index += 1 + gap;
                node.index = index;
                node.memory_bytes = *memory;
                let allowed = |cpu: &u32| holes.rotate_left(*cpu) & 7 != at;
                let part = |core: &Core| {
                    Core::new(core.threads().iter().copied().filter(allowed).collect())
                };
                node.cores = node.cores.iter().filter_map(part).collect();
            }
            topology
        },
    )
}

fn some_cpus() -> impl Strategy<Value = CpuList> {
    prop::collection::vec(0u32..40, 0..12).prop_map(|cpus| cpus.into_iter().collect())
}

fn some_config() -> impl Strategy<Value = PlanConfig> {
    let shards = prop_oneof![
        Just(Shards::Auto),
        (0u16..9).prop_map(Shards::PerNode),
        (0u16..40).prop_map(Shards::Total),
        (0u16..1200).prop_map(Shards::Thousandths),
        some_cpus().prop_map(Shards::On),
    ];
    let smt = prop_oneof![Just(Smt::Avoid), Just(Smt::Pair), Just(Smt::Use)];
    let reserved = prop_oneof![
        4 => (0u16..3).prop_map(Reserved::PerNode),
        1 => some_cpus().prop_map(Reserved::On),
    ];
    let vcpus = prop_oneof![3 => Just(None), 1 => some_cpus().prop_map(Some)];
    let pin = prop_oneof![Just(VcpuPin::Node), Just(VcpuPin::Core), Just(VcpuPin::None)];
    let memory = prop_oneof![Just(MemoryPolicy::Bind), Just(MemoryPolicy::Preferred)];
    (shards, smt, reserved, vcpus, pin, memory).prop_map(
        |(shards, smt, reserved, vcpus, pin, memory)| PlanConfig {
            shards,
            smt,
            reserved,
            vcpus,
            pin,
            memory,
        },
    )
}

/// The node and the core (by its first thread) of a usable hardware thread.
fn home(topology: &Topology, cpu: u32) -> Option<(u32, u32)> {
    let cores = topology.nodes.iter().flat_map(|n| n.cores.iter().map(|core| (n.index, core)));
    let mut owners = cores.filter(|(_, core)| core.threads().contains(&cpu));
    owners.next().map(|(node, core)| (node, core.cpu()))
}

fn check_roles(topology: &Topology, config: &PlanConfig, plan: &Plan) -> Result<(), TestCaseError> {
    let mut taken = BTreeSet::new();
    for (index, seat) in plan.seats.iter().enumerate() {
        prop_assert_eq!(usize::from(seat.shard.index()), index);
        prop_assert_eq!(home(topology, seat.core).map(|home| home.0), Some(seat.node));
        prop_assert!(taken.insert(seat.core), "two shards on cpu {}", seat.core);
        let vcpus = plan.vcpus_of(seat.node);
        prop_assert!(vcpus.is_some_and(|v| !v.cpus.is_empty()), "guests of a shard have no core");
    }
    prop_assert!(plan.seats.is_sorted_by_key(|seat| seat.node), "a node's shards follow another");
    for own in &plan.blocking {
        prop_assert_eq!(config.smt, Smt::Pair);
        let seat = plan.seats[usize::from(own.shard.index())];
        for cpu in &own.cpus {
            prop_assert_eq!(home(topology, *cpu), home(topology, seat.core), "another core");
            prop_assert!(taken.insert(*cpu), "cpu {} has two roles", cpu);
        }
    }
    for vcpus in &plan.vcpus {
        for cpu in &vcpus.cpus {
            prop_assert_eq!(home(topology, *cpu).map(|home| home.0), Some(vcpus.node));
            let alone = taken.insert(*cpu);
            prop_assert!(alone || vcpus.shared_with_shards, "cpu {} has two roles", cpu);
        }
    }
    for cpu in plan.reserved.iter().chain(&plan.free) {
        prop_assert!(taken.insert(*cpu), "cpu {} has a role and has none", cpu);
    }
    let all: CpuList = taken.into_iter().collect();
    prop_assert_eq!(all, topology.cpus(), "what may be used, and only that, is in the plan");
    Ok(())
}

/// So many shards on each node that has cores, and none elsewhere.
fn check_per_node(topology: &Topology, each: u16, plan: &Plan) -> Result<(), TestCaseError> {
    let with_cores = topology.nodes.iter().filter(|node| !node.cores.is_empty());
    let mut nodes = 0;
    for node in with_cores {
        let here = plan.seats.iter().filter(|seat| seat.node == node.index).count();
        prop_assert_eq!(here, usize::from(each), "on node {}", node.index);
        nodes += 1;
    }
    prop_assert_eq!(plan.seats.len(), nodes * usize::from(each));
    Ok(())
}

/// A shard has its core to itself, but where guests and shards share all.
fn check_cores(topology: &Topology, config: &PlanConfig, plan: &Plan) -> Result<(), TestCaseError> {
    if config.smt == Smt::Use {
        return Ok(());
    }
    let shared = |node| plan.vcpus_of(node).is_some_and(|vcpus| vcpus.shared_with_shards);
    for seat in plan.seats.iter().filter(|seat| !shared(seat.node)) {
        let core = home(topology, seat.core);
        let others = plan.seats.iter().filter(|other| home(topology, other.core) == core);
        prop_assert_eq!(others.count(), 1, "two shards on a core");
        let guests = plan.vcpus.iter().flat_map(|vcpus| &vcpus.cpus);
        prop_assert!(
            guests.into_iter().all(|cpu| home(topology, *cpu) != core),
            "guests beside a shard"
        );
    }
    Ok(())
}

/// Memory is a node's own, or the nearest with memory.
fn check_memory(topology: &Topology, plan: &Plan) -> Result<(), TestCaseError> {
    let any = topology.nodes.iter().any(|node| node.memory_bytes > 0);
    let seats = plan.seats.iter().map(|seat| (seat.node, seat.memory_node));
    let vcpus = plan.vcpus.iter().map(|vcpus| (vcpus.node, vcpus.memory_node));
    for (node, memory) in seats.chain(vcpus) {
        let find = |index| topology.nodes.iter().find(|node| node.index == index).unwrap();
        prop_assert!(!any || find(memory).memory_bytes > 0, "memory of a node without any");
        prop_assert!(memory == node || find(node).memory_bytes == 0, "another node's memory");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn what_holds_of_every_plan(topology in some_topology(), config in some_config()) {
        let made = plan(&topology, &config);
        prop_assert_eq!(&made, &plan(&topology, &config), "the same gives the same");
        let Ok(made) = made else { return Ok(()) };
        prop_assert!(!made.seats.is_empty());
        match &config.shards {
            Shards::Total(total) => prop_assert_eq!(made.seats.len(), usize::from(*total)),
            Shards::On(cpus) => {
                let seated: CpuList = made.seats.iter().map(|seat| seat.core).collect();
                prop_assert_eq!(&seated, cpus);
            }
            Shards::PerNode(each) => check_per_node(&topology, *each, &made)?,
            Shards::Auto | Shards::Thousandths(_) => {}
        }
        check_roles(&topology, &config, &made)?;
        check_cores(&topology, &config, &made)?;
        check_memory(&topology, &made)?;
    }

    /// So many shards on each node, or a reason that is true.
    #[test]
    fn each_node_gets_its_number_or_there_is_no_plan(
        topology in some_topology(),
        (each, smt, reserved) in (0u16..9, 0usize..3, 0u16..3),
    ) {
        let smt = [Smt::Avoid, Smt::Pair, Smt::Use][smt];
        let reserved_cores = usize::from(reserved);
        let reserved = Reserved::PerNode(reserved);
        let config = PlanConfig { smt, reserved, ..wish(Shards::PerNode(each)) };
        // Where a shard could sit on each node that has cores; none where all are to be reserved.
        let places: BTreeMap<u32, Option<usize>> = topology
            .nodes
            .iter()
            .filter(|node| !node.cores.is_empty())
            .map(|node| (node.index, node.cores.get(reserved_cores..).filter(|left| !left.is_empty())))
            .map(|(node, left)| (node, left.map(|left| match smt {
                Smt::Use => left.iter().map(|core| core.threads().len()).sum(),
                Smt::Avoid | Smt::Pair => left.len(),
            })))
            .collect();
        let fits = |places: &Option<usize>| places.is_some_and(|places| places >= usize::from(each));
        match plan(&topology, &config) {
            Ok(made) => {
                prop_assert!(each > 0 && places.values().all(fits), "{:?}", places);
                check_per_node(&topology, each, &made)?;
            }
            Err(PlanError::NoCores) => prop_assert!(places.is_empty()),
            Err(PlanError::NoShards) => prop_assert_eq!(each, 0),
            Err(PlanError::NothingLeft { node, cores, reserved }) => {
                prop_assert_eq!(places.get(&node), Some(&None));
                prop_assert!(cores <= usize::from(reserved));
            }
            Err(PlanError::NodeTooSmall { node, asked, free, .. }) => {
                prop_assert_eq!((asked, places.get(&node)), (usize::from(each), Some(&Some(free))));
                prop_assert!(free < asked);
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    /// What is simple is never refused.
    #[test]
    fn a_machine_with_a_core_has_a_plan(topology in some_topology(), smt in 0usize..3) {
        let smt = [Smt::Avoid, Smt::Pair, Smt::Use][smt];
        let made = plan(&topology, &PlanConfig { smt, ..PlanConfig::default() });
        prop_assert_eq!(made.is_ok(), !topology.cpus().is_empty(), "{:?}", made);
    }
}
