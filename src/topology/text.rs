//! A machine and its plan as text.
//!
//! Called by `mica topology`. Refuses nothing; what comes from a file was made printable when it was
//! read.

use mica_numa::topology::{Cache, Core, Device, Node};

use super::Layout;

/// First the machine, then who sits where.
pub(super) fn show(layout: &Layout) -> String {
    let Layout { topology, plan, smt } = layout;
    let mut text = format!("machine         {}\n", headline(layout));
    for node in &topology.nodes {
        let mut facts = vec![bytes(node.memory_bytes)];
        facts.extend(node.package.map(|package| format!("package {package}")));
        facts.push(format!(
            "cpus {}",
            if node.cores.is_empty() { "none".to_owned() } else { node.cpus().to_string() }
        ));
        facts.extend(third_level(node));
        facts.extend(second_level(&node.l2, &node.cores));
        facts.extend(distances(node));
        add(&mut text, &format!("  node {}", node.index), &facts.join(", "));
        if let Some(siblings) = siblings(node.cores.iter().map(Core::threads)) {
            add(&mut text, "", &format!("siblings {siblings}"));
        }
        let here = names(topology.devices.iter().filter(|device| device.node == Some(node.index)));
        if !here.is_empty() {
            add(&mut text, "", &here);
        }
    }
    let nowhere = names(topology.devices.iter().filter(|device| device.node.is_none()));
    if !nowhere.is_empty() {
        add(&mut text, "  near no node", &nowhere);
    }
    add(&mut text, "plan", &format!("{}, --smt {smt}", counted(plan.seats.len(), "shard")));
    text.push_str(&plan.to_string());
    text
}

fn add(text: &mut String, name: &str, value: &str) {
    text.push_str(&format!("{name:<16}{value}\n"));
}

/// Model and counts.
pub(super) fn headline(layout: &Layout) -> String {
    let nodes = &layout.topology.nodes;
    let cores: usize = nodes.iter().map(|node| node.cores.len()).sum();
    let mut facts: Vec<String> = layout.topology.model.iter().cloned().collect();
    facts.push(counted(nodes.len(), "node"));
    facts.push(counted(cores, "core"));
    facts.push(counted(layout.topology.cpus().cpus().len(), "hardware thread"));
    facts.join(", ")
}

/// `1 core`, `2 cores`.
pub(super) fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

/// Bytes in the largest unit of which there is one.
pub(super) fn bytes(count: u64) -> String {
    let (unit, name) = match count {
        0 => return "no memory".to_owned(),
        1..0x10_0000 => (1 << 10, "KiB"),
        0x10_0000..0x4000_0000 => (1 << 20, "MiB"),
        _ => (1 << 30, "GiB"),
    };
    // Rounded to tenths.
    let tenths = (count.saturating_mul(10) + unit / 2) / unit;
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} {name}"),
        (whole, tenth) => format!("{whole}.{tenth} {name}"),
    }
}

fn third_level(node: &Node) -> Option<String> {
    let first = node.caches.first()?;
    let same = node.caches.iter().all(|cache| cache.bytes == first.bytes);
    let count = node.caches.len();
    Some(match (count, same && first.bytes > 0) {
        (1, true) => format!("L3 {}", bytes(first.bytes)),
        (_, true) => format!("{count} L3 of {}", bytes(first.bytes)),
        (_, false) => format!("{count} L3"),
    })
}

/// The second-level caches of these cores: `L2 1 MiB a core`, `L2 4 MiB for 4 cores`, and only how many
/// where they differ or do not tell their size.
pub(super) fn second_level<'c>(
    caches: &[Cache],
    cores: impl IntoIterator<Item = &'c Core>,
) -> Option<String> {
    let cores: Vec<u32> = cores.into_iter().map(Core::cpu).collect();
    let of = |cache: &Cache| cores.iter().filter(|cpu| cache.cpus.contains(**cpu)).count();
    let own: Vec<(u64, usize)> = caches.iter().map(|cache| (cache.bytes, of(cache))).collect();
    let own: Vec<(u64, usize)> = own.into_iter().filter(|(_, cores)| *cores > 0).collect();
    let (size, each) = *own.first()?;
    let same = own.iter().all(|one| *one == (size, each));
    Some(match (each, same && size > 0) {
        (1, true) => format!("L2 {} a core", bytes(size)),
        (_, true) => format!("L2 {} for {each} cores", bytes(size)),
        (_, false) => format!("{} L2", own.len()),
    })
}

/// Cores of which only the ends are shown, where they are numbered evenly.
const EVEN_MIN: usize = 4;

/// The hardware threads that share a core: `0/48, 1/49, … 23/71`. Nothing of cores of one thread.
fn siblings<'c>(cores: impl Iterator<Item = &'c [u32]>) -> Option<String> {
    let cores: Vec<&[u32]> = cores.filter(|threads| threads.len() > 1).collect();
    let name = |core: &[u32]| core.iter().map(u32::to_string).collect::<Vec<_>>().join("/");
    let mut shown = Vec::new();
    let mut left = cores.as_slice();
    while let [first, ..] = left {
        let (even, rest) = left.split_at(even(left));
        match even {
            [_, second, .., last] if even.len() >= EVEN_MIN => {
                shown.push(format!("{}, {}, … {}", name(first), name(second), name(last)));
            }
            few => shown.extend(few.iter().map(|core| name(core))),
        }
        left = rest;
    }
    (!shown.is_empty()).then(|| shown.join(", "))
}

/// How many of these, from the first on, have numbers that all grow by the same from one core to the next.
fn even(cores: &[&[u32]]) -> usize {
    let step = |a: &[u32], b: &[u32]| -> Option<u32> {
        let mut steps = a.iter().zip(b).map(|(a, b)| b.wrapping_sub(*a));
        let first = steps.next().filter(|_| a.len() == b.len())?;
        steps.all(|step| step == first).then_some(first)
    };
    let first = cores.first().zip(cores.get(1)).and_then(|(a, b)| step(a, b));
    let pairs =
        cores.windows(2).take_while(|pair| first.is_some() && step(pair[0], pair[1]) == first);
    pairs.count() + 1
}

/// How far other nodes are.
pub(super) fn distances(node: &Node) -> Option<String> {
    let others = node.distances.iter().filter(|(other, _)| **other != node.index);
    let far: Vec<String> = others.map(|(other, far)| format!("{other} at {far}")).collect();
    (!far.is_empty()).then(|| format!("node {}", far.join(", ")))
}

fn names<'d>(devices: impl Iterator<Item = &'d Device>) -> String {
    devices.map(|device| device.name.as_str()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_are_shown_by_core_and_even_ones_by_their_ends() {
        let shown = |cores: &[&[u32]]| siblings(cores.iter().copied());
        let far: Vec<[u32; 2]> = (0..24).map(|core| [core, core + 48]).collect();
        let far: Vec<&[u32]> = far.iter().map(<[u32; 2]>::as_slice).collect();
        assert_eq!(shown(&far).unwrap(), "0/48, 1/49, … 23/71");
        let near: [&[u32]; 4] = [&[0, 1], &[2, 3], &[4, 5], &[6, 7]];
        assert_eq!(shown(&near).unwrap(), "0/1, 2/3, … 6/7");
        assert_eq!(shown(&near[..3]).unwrap(), "0/1, 2/3, 4/5");
        let mixed: [&[u32]; 6] = [&[0, 9], &[1, 10], &[4, 5, 6, 7], &[8], &[11, 12], &[15, 14]];
        assert_eq!(
            shown(&mixed).unwrap(),
            "0/9, 1/10, 4/5/6/7, 11/12, 15/14",
            "one alone has none"
        );
        assert_eq!(shown(&[&[0], &[1]]), None);
    }

    #[test]
    fn second_level_caches_are_of_a_core_or_of_some() {
        let cores: Vec<Core> = (0..8).filter_map(|cpu| Core::new(vec![cpu, cpu + 8])).collect();
        let cache = |bytes: u64, cpus: &str| Cache { bytes, cpus: cpus.parse().unwrap() };
        let own = |cpu: u32| cache(1 << 20, &format!("{cpu},{}", cpu + 8));
        let each: Vec<Cache> = (0..8).map(own).collect();
        let shown = |caches: &[Cache], cores: &[Core]| second_level(caches, cores);
        assert_eq!(shown(&each, &cores).unwrap(), "L2 1 MiB a core");
        let clusters = [cache(4 << 20, "0-3,8-11"), cache(4 << 20, "4-7,12-15")];
        assert_eq!(shown(&clusters, &cores).unwrap(), "L2 4 MiB for 4 cores");
        // Of the cores that are asked about.
        assert_eq!(shown(&clusters, &cores[..2]).unwrap(), "L2 4 MiB for 2 cores");
        let mixed = [own(0), own(1), cache(2 << 20, "2-3,10-11")];
        assert_eq!(shown(&mixed, &cores).unwrap(), "3 L2");
        assert_eq!(shown(&mixed, &cores[..2]).unwrap(), "L2 1 MiB a core");
        assert_eq!(shown(&[cache(0, "0-7")], &cores).unwrap(), "1 L2", "its size is not told");
        assert_eq!(shown(&[], &cores), None);
    }

    #[test]
    fn bytes_are_rounded_to_tenths() {
        let shown = [0, 4096, 36 << 20, (187 << 30) + (1 << 29), 1 << 40].map(bytes);
        assert_eq!(shown, ["no memory", "4 KiB", "36 MiB", "187.5 GiB", "1024 GiB"]);
    }
}
