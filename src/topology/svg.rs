//! A machine and its plan as a picture: a panel for each node, in it a box for each third-level cache,
//! in that a cell for each core, split into its hardware threads, coloured by role.
//!
//! Called by `mica topology --svg`. Everything is in the file: no script, no font, no other file.
//! Refuses to trust names: whatever came from a file or the system is escaped.

mod paint;

use mica_numa::plan::Role;
use mica_numa::topology::{Core, Device, DeviceKind, Node};

use self::paint::{Canvas, Rect, Text};
use super::Layout;
use super::text::{bytes, counted, distances, headline, second_level};

/// Widths and distances, in the unit of the picture.
const MARGIN: u32 = 24;
const GAP: u32 = 6;
const THREAD_WIDTH: u32 = 31;
const CORE_WIDTH_MIN: u32 = 46;
const CORE_HEIGHT: u32 = 38;
const PANEL_PADDING: u32 = 16;
const PANEL_HEADER: u32 = 58;
const GROUP_PADDING: u32 = 10;
const GROUP_HEADER: u32 = 20;
const CHIP_HEIGHT: u32 = 22;
const TITLE_HEIGHT: u32 = 66;
const LEGEND_HEIGHT: u32 = 30;
/// What a character of the smaller texts takes, and a bit more.
const CHARACTER: u32 = 7;

/// Cores that share a third-level cache, or all of a node that tells of none.
struct Group<'a> {
    label: String,
    cores: Vec<&'a Core>,
}

/// A node and where its parts go.
struct Panel<'a> {
    node: &'a Node,
    groups: Vec<Group<'a>>,
    devices: Vec<&'a Device>,
    /// Cores in a row of a group, and groups in a row.
    cores_across: u32,
    groups_across: u32,
    core_width: u32,
}

/// The whole picture.
pub(super) fn draw(layout: &Layout) -> String {
    let threads = |core: &Core| number(core.threads().len());
    let cores = layout.topology.nodes.iter().flat_map(|node| &node.cores);
    let core_width = cores.map(threads).max().unwrap_or(1) * THREAD_WIDTH;
    let panels: Vec<Panel<'_>> = layout
        .topology
        .nodes
        .iter()
        .map(|node| Panel::new(layout, node, core_width.max(CORE_WIDTH_MIN)))
        .collect();
    let width = panels.iter().map(Panel::width).max().unwrap_or(0);
    let across = panels_across(number(panels.len()), width);
    let mut canvas = Canvas::new();
    let mut y = MARGIN + TITLE_HEIGHT;
    for row in panels.chunks(across as usize) {
        let height = row.iter().map(|panel| panel.height(width)).max().unwrap_or(0);
        for (panel, column) in row.iter().zip(0u32..) {
            let x = MARGIN + column * (width + MARGIN);
            panel.draw(&mut canvas, layout, Rect { x, y, width, height });
        }
        y += height + MARGIN;
    }
    let columns = across.min(number(panels.len()).max(1));
    let inner = (columns * (width + MARGIN) - MARGIN).max(TITLE_WIDTH_MIN);
    y = devices_nowhere(&mut canvas, layout, y, inner);
    y = legend(&mut canvas, layout, y, inner);
    title(&mut canvas, layout);
    canvas.finish(inner + 2 * MARGIN, y + MARGIN - GAP)
}

/// Room for the title above a small machine.
const TITLE_WIDTH_MIN: u32 = 560;

fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn panels_across(panels: u32, width: u32) -> u32 {
    match panels {
        0..=3 => panels.max(1),
        4 => 2,
        _ if width < 330 => 4,
        _ => 2,
    }
}

fn title(canvas: &mut Canvas, layout: &Layout) {
    let plan = &layout.plan;
    canvas.text(Text { size: 19, bold: true, ..Text::at(MARGIN, MARGIN + 18) }, &headline(layout));
    let said = format!(
        "{} · SMT siblings: {} · vCPUs pinned to: {} · memory: {}",
        counted(plan.seats.len(), "shard"),
        layout.smt,
        plan.pin,
        plan.memory
    );
    canvas.text(Text { size: 13, class: "dim", ..Text::at(MARGIN, MARGIN + 42) }, &said);
}

impl<'a> Panel<'a> {
    fn new(layout: &'a Layout, node: &'a Node, core_width: u32) -> Self {
        let groups = groups(node);
        let devices = &layout.topology.devices;
        let devices = devices.iter().filter(|device| device.node == Some(node.index)).collect();
        let largest = groups.iter().map(|group| number(group.cores.len())).max().unwrap_or(1);
        let cores_across = cores_across(largest, groups.len() > 1);
        let groups_across = (8 / cores_across).clamp(1, number(groups.len()).max(1));
        Self { node, groups, devices, cores_across, groups_across, core_width }
    }

    /// Room for a row of cores, and for what is above them.
    fn group_width(&self) -> u32 {
        let cores = self.cores_across * (self.core_width + GAP) - GAP;
        let labels = self.groups.iter().map(|group| number(group.label.chars().count()));
        cores.max(labels.max().unwrap_or(0) * CHARACTER) + 2 * GROUP_PADDING
    }

    fn width(&self) -> u32 {
        let groups = self.groups_across * (self.group_width() + GAP) - GAP;
        (groups + 2 * PANEL_PADDING).max(280)
    }

    /// The tallest group of a row.
    fn row_height(&self, row: &[Group<'_>]) -> u32 {
        let rows = |group: &Group<'_>| number(group.cores.len()).div_ceil(self.cores_across);
        let cores = row.iter().map(rows).max().unwrap_or(0) * (CORE_HEIGHT + GAP);
        cores.saturating_sub(GAP) + GROUP_HEADER + 2 * GROUP_PADDING
    }

    fn height(&self, width: u32) -> u32 {
        let rows = self.groups.chunks(self.groups_across as usize);
        let groups: u32 = rows.map(|row| self.row_height(row) + GAP).sum();
        let chips = chip_rows(&self.devices, width - 2 * PANEL_PADDING).len();
        PANEL_HEADER + groups + number(chips) * (CHIP_HEIGHT + GAP) + PANEL_PADDING
    }

    fn draw(&self, canvas: &mut Canvas, layout: &Layout, at: Rect) {
        canvas.rect(at, 12, "panel", None);
        self.draw_header(canvas, layout, at);
        let mut y = at.y + PANEL_HEADER;
        for row in self.groups.chunks(self.groups_across as usize) {
            let height = self.row_height(row);
            for (group, column) in row.iter().zip(0u32..) {
                let width = self.group_width();
                let x = at.x + PANEL_PADDING + column * (width + GAP);
                self.draw_group(canvas, layout, group, Rect { x, y, width, height });
            }
            y += height + GAP;
        }
        let chips = chip_rows(&self.devices, at.width - 2 * PANEL_PADDING);
        draw_chips(canvas, &chips, at.x + PANEL_PADDING, y + GAP / 2);
    }

    fn draw_header(&self, canvas: &mut Canvas, layout: &Layout, at: Rect) {
        let (x, node) = (at.x + PANEL_PADDING, self.node);
        let name = format!("node {}", node.index);
        canvas.text(Text { size: 16, bold: true, ..Text::at(x, at.y + 26) }, &name);
        let end = at.x + at.width - PANEL_PADDING;
        let memory = bytes(node.memory_bytes);
        canvas.text(Text { size: 14, from_right: true, ..Text::at(end, at.y + 26) }, &memory);
        let mut facts: Vec<String> =
            node.package.map(|p| format!("package {p}")).into_iter().collect();
        facts.push(counted(node.cores.len(), "core"));
        let plan = &layout.plan;
        let shards = plan.seats.iter().filter(|seat| seat.node == node.index).count();
        facts.push(if shards == 0 { "no shard".to_owned() } else { counted(shards, "shard") });
        if let Some(vcpus) = plan.vcpus_of(node.index).filter(|v| v.memory_node != node.index) {
            facts.push(format!("memory on node {}", vcpus.memory_node));
        }
        let line = Text { size: 12, class: "dim", ..Text::at(x, at.y + 45) };
        canvas.text(line, &facts.join(" · "));
        if let Some(far) = distances(node).filter(|_| layout.topology.nodes.len() <= 4) {
            let line =
                Text { size: 12, class: "dim", from_right: true, ..Text::at(end, at.y + 45) };
            canvas.text(line, &format!("distance: {far}"));
        }
    }

    fn draw_group(&self, canvas: &mut Canvas, layout: &Layout, group: &Group<'_>, at: Rect) {
        canvas.rect(at, 8, "group", None);
        let place = Text::at(at.x + GROUP_PADDING, at.y + 19);
        canvas.text(Text { size: 11, class: "dim", ..place }, &group.label);
        for (core, index) in group.cores.iter().zip(0u32..) {
            let (row, column) = (index / self.cores_across, index % self.cores_across);
            let x = at.x + GROUP_PADDING + column * (self.core_width + GAP);
            let y = at.y + GROUP_PADDING + GROUP_HEADER + row * (CORE_HEIGHT + GAP);
            draw_core(
                canvas,
                layout,
                core,
                Rect { x, y, width: self.core_width, height: CORE_HEIGHT },
            );
        }
    }
}

/// As many cores in a row as fill rows evenly.
fn cores_across(cores: u32, beside_others: bool) -> u32 {
    let wishes = if beside_others { [4, 3, 5, 2] } else { [6, 8, 7, 5] };
    let even = wishes.into_iter().find(|across| cores.is_multiple_of(*across));
    even.unwrap_or(wishes[0]).min(cores.max(1))
}

fn groups(node: &Node) -> Vec<Group<'_>> {
    let mut left: Vec<&Core> = node.cores.iter().collect();
    let mut groups = Vec::new();
    for cache in &node.caches {
        let (cores, others) = left.into_iter().partition(|core| cache.cpus.contains(core.cpu()));
        left = others;
        let size = if cache.bytes > 0 { format!(" {}", bytes(cache.bytes)) } else { String::new() };
        groups.push(Group { label: format!("L3{size}"), cores });
    }
    if !left.is_empty() {
        groups.push(Group { label: "cores".to_owned(), cores: left });
    }
    groups.retain(|group| !group.cores.is_empty());
    for group in &mut groups {
        if let Some(second) = second_level(&node.l2, group.cores.iter().copied()) {
            group.label = format!("{} · {second}", group.label);
        }
    }
    groups
}

fn draw_core(canvas: &mut Canvas, layout: &Layout, core: &Core, at: Rect) {
    let count = number(core.threads().len());
    let width = at.width / count.max(1);
    for (cpu, column) in core.threads().iter().zip(0u32..) {
        let role = layout.plan.role(*cpu);
        let x = at.x + column * width;
        let part = Rect { x, width, ..at };
        canvas.thread(part, column == 0, column + 1 == count, class(role), &hint(*cpu, role));
        let middle = x + width / 2;
        let on = format!("on {}", class(role));
        let (mark, cpu) = (mark(role), cpu.to_string());
        let centred = |y| Text { class: &on, centred: true, ..Text::at(middle, y) };
        if mark.is_empty() {
            canvas.text(Text { size: 13, ..centred(at.y + 24) }, &cpu);
        } else {
            canvas.text(Text { size: 10, bold: true, ..centred(at.y + 15) }, &mark);
            canvas.text(Text { size: 12, ..centred(at.y + 30) }, &cpu);
        }
    }
    canvas.rect(at, 5, "core", None);
}

/// Class of a role in the picture's style sheet.
fn class(role: Role) -> &'static str {
    match role {
        Role::Shard(_) => "shard",
        Role::Shared(_) => "shared",
        Role::Blocking(_) => "blocking",
        Role::Vcpus => "vcpus",
        Role::Reserved => "reserved",
        Role::Free => "free",
    }
}

/// What stands above a thread's number: colour alone does not tell everybody. Most run vCPUs, and have
/// only their number.
fn mark(role: Role) -> String {
    match role {
        Role::Shard(shard) | Role::Shared(shard) => format!("S{}", shard.index()),
        Role::Blocking(shard) => format!("B{}", shard.index()),
        Role::Vcpus => String::new(),
        Role::Reserved => "sys".to_owned(),
        Role::Free => "–".to_owned(),
    }
}

fn hint(cpu: u32, role: Role) -> String {
    match role {
        Role::Shard(shard) => format!("cpu {cpu}: shard {}", shard.index()),
        Role::Shared(shard) => format!("cpu {cpu}: shard {} and vCPUs", shard.index()),
        Role::Blocking(shard) => format!("cpu {cpu}: blocking threads of shard {}", shard.index()),
        Role::Vcpus => format!("cpu {cpu}: vCPUs"),
        Role::Reserved => format!("cpu {cpu}: reserved for the system"),
        Role::Free => format!("cpu {cpu}: free"),
    }
}

/// A device and its width, in rows that fit.
fn chip_rows<'d>(devices: &[&'d Device], width: u32) -> Vec<Vec<(&'d Device, u32)>> {
    let mut rows: Vec<Vec<(&Device, u32)>> = Vec::new();
    let mut left = 0;
    for device in devices {
        let chip = number(device.name.len() + kind(device).len() + 1) * CHARACTER + 20;
        match rows.last_mut().filter(|_| chip + GAP <= left) {
            Some(row) => row.push((device, chip)),
            None => {
                rows.push(vec![(device, chip)]);
                left = width + GAP;
            }
        }
        left = left.saturating_sub(chip + GAP);
    }
    rows
}

fn kind(device: &Device) -> &'static str {
    match device.kind {
        DeviceKind::Nvme => "NVMe",
        DeviceKind::Network => "NIC",
    }
}

fn draw_chips(canvas: &mut Canvas, rows: &[Vec<(&Device, u32)>], left: u32, top: u32) {
    for (row, line) in rows.iter().zip(0u32..) {
        let mut x = left;
        let y = top + line * (CHIP_HEIGHT + GAP);
        for (device, width) in row {
            let class = if device.kind == DeviceKind::Nvme { "chip nvme" } else { "chip nic" };
            canvas.rect(Rect { x, y, width: *width, height: CHIP_HEIGHT }, 11, class, None);
            let text =
                Text { size: 11, class: "ink", centred: true, ..Text::at(x + width / 2, y + 15) };
            canvas.text(text, &format!("{} {}", kind(device), device.name));
            x += width + GAP;
        }
    }
}

/// Devices of which no node is told, below the panels.
fn devices_nowhere(canvas: &mut Canvas, layout: &Layout, y: u32, width: u32) -> u32 {
    let devices = layout.topology.devices.iter().filter(|device| device.node.is_none());
    let devices: Vec<&Device> = devices.collect();
    if devices.is_empty() {
        return y;
    }
    let place = Text { size: 12, class: "dim", ..Text::at(MARGIN, y + 4) };
    canvas.text(place, "Devices near no node in particular");
    let rows = chip_rows(&devices, width);
    draw_chips(canvas, &rows, MARGIN, y + 14);
    y + 14 + number(rows.len()) * (CHIP_HEIGHT + GAP) + GAP
}

/// The roles that are there, with how many threads each has.
fn legend(canvas: &mut Canvas, layout: &Layout, top: u32, width: u32) -> u32 {
    let cpus = layout.topology.cpus();
    let roles: Vec<&str> = cpus.cpus().iter().map(|cpu| class(layout.plan.role(*cpu))).collect();
    let names = [
        ("shard", "shard"),
        ("shared", "shard and vCPUs"),
        ("blocking", "blocking threads of a shard"),
        ("vcpus", "vCPUs"),
        ("reserved", "reserved for the system"),
        ("free", "free"),
    ];
    let (mut x, mut y) = (MARGIN, top);
    for (class, name) in names {
        let count = roles.iter().filter(|role| **role == class).count();
        if count == 0 {
            continue;
        }
        let text = format!("{name} ({count})");
        let needs = 34 + number(text.len()) * CHARACTER;
        if x > MARGIN && x + needs > MARGIN + width {
            (x, y) = (MARGIN, y + LEGEND_HEIGHT);
        }
        let swatch = Rect { x, y, width: 22, height: 16 };
        canvas.rect(swatch, 4, &format!("core {class}"), None);
        canvas.text(Text { size: 12, ..Text::at(x + 29, y + 13) }, &text);
        x += needs + 2 * GAP;
    }
    y + LEGEND_HEIGHT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_cores_are_even() {
        let across = [1, 2, 6, 8, 16, 24, 32, 7, 11].map(|cores| cores_across(cores, false));
        assert_eq!(across, [1, 2, 6, 8, 8, 6, 8, 7, 6]);
        assert_eq!([1, 4, 6, 8, 7].map(|cores| cores_across(cores, true)), [1, 4, 3, 4, 4]);
    }

    #[test]
    fn chips_are_in_rows_that_fit() {
        let device =
            |name: &str| Device { kind: DeviceKind::Nvme, name: name.to_owned(), node: None };
        let devices: Vec<Device> = (0..20).map(|n| device(&format!("nvme{n}n1"))).collect();
        let all: Vec<&Device> = devices.iter().collect();
        let rows = chip_rows(&all, 300);
        assert_eq!(rows.iter().map(Vec::len).sum::<usize>(), 20);
        for row in &rows {
            let width: u32 = row.iter().map(|(_, width)| width + GAP).sum();
            assert!(width <= 300 + GAP, "{width}");
        }
        let long = device(&"x".repeat(64));
        assert_eq!(chip_rows(&[&long, &devices[0]], 100).len(), 2);
    }
}
