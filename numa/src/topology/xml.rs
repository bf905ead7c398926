//! Another machine, from the XML that hwloc's `lstopo machine.xml` writes there.
//!
//! Called by `mica topology --xml`. Read here and not by hwloc: the file comes from elsewhere, and
//! hwloc's reader takes it for its own (2.9 ends with SIGSEGV where `complete_cpuset` is missing).
//! Refuses what is no export of hwloc 2, names numbers
//! that no machine has, or is larger than any machine's; entities, which no export holds; and says
//! where in the file it stopped.

use std::collections::{BTreeMap, BTreeSet};

use roxmltree::{Document, ParsingOptions};

use super::{Cache, Device, DeviceKind, NODES_MAX, NodePart, Parts, Topology, printable};
use crate::cpus::{CPUS_MAX, CpuList};

/// Largest file: an export of a machine with a thousand hardware threads has about one MiB.
pub const XML_BYTES_MAX: usize = 8 << 20;

/// Most elements and texts of a file.
const XML_NODES_MAX: u32 = 400_000;

/// Longest element or text between two: the sets of a thousand threads have 350 bytes each.
const ELEMENT_BYTES_MAX: usize = 64 << 10;

/// Most devices that are taken.
const DEVICES_MAX: usize = 1024;

/// Why a file is not taken for a machine.
#[derive(Debug, thiserror::Error)]
pub enum XmlError {
    /// Above [`XML_BYTES_MAX`].
    #[error("the file is larger than {} MiB; no machine's export is", XML_BYTES_MAX >> 20)]
    TooLarge,
    /// Bytes that are no text.
    #[error("the file is not text; write it with `lstopo machine.xml`")]
    NotText(#[from] std::str::Utf8Error),
    /// Declarations that could make the file larger than it is.
    #[error("the file declares entities, which no export of hwloc does")]
    Entities,
    /// Not well formed.
    #[error("the file is not XML")]
    NotXml(#[from] roxmltree::Error),
    /// Something else, or a version that is not known.
    #[error("the file is not an export of hwloc 2 ({0}); write it with `lstopo machine.xml`")]
    NotHwloc(String),
    /// An attribute that cannot be.
    #[error("line {line}: {element} has {attribute}={value:?}: {problem}")]
    Attribute {
        /// Where.
        line: u32,
        /// The kind of object.
        element: String,
        /// Of it.
        attribute: &'static str,
        /// What it says, shortened.
        value: String,
        /// What is wrong with that.
        problem: &'static str,
    },
    /// An object that is there more than once, or too many of one kind.
    #[error("line {line}: {problem}")]
    Object {
        /// Where.
        line: u32,
        /// What is wrong.
        problem: String,
    },
    /// A machine on which nothing runs.
    #[error("the file names no {0} that may be used")]
    Nothing(&'static str),
}

type Element<'a, 'input> = roxmltree::Node<'a, 'input>;

/// Reads an export. What its machine forbids (`allowed_cpuset`, `allowed_nodeset`) is left out.
///
/// # Errors
/// See [`XmlError`].
pub fn from_xml(bytes: &[u8]) -> Result<Topology, XmlError> {
    if bytes.len() > XML_BYTES_MAX {
        return Err(XmlError::TooLarge);
    }
    let text = std::str::from_utf8(bytes)?;
    if text.contains("<!ENTITY") {
        return Err(XmlError::Entities);
    }
    check_lengths(text)?;
    // Every export names hwloc's DTD, which is not read.
    let options =
        ParsingOptions { allow_dtd: true, nodes_limit: XML_NODES_MAX, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options)?;
    let root = document.root_element();
    if root.tag_name().name() != "topology" {
        let name = printable(root.tag_name().name());
        return Err(XmlError::NotHwloc(format!("its root is <{name}>")));
    }
    let version = root.attribute("version").unwrap_or("1");
    if !version.starts_with("2.") && !version.starts_with("3.") {
        return Err(XmlError::NotHwloc(format!("its version is {:?}", printable(version))));
    }
    let mut reader = Reader::default();
    reader.walk(root)?;
    reader.finish()
}

/// Refuses long elements before the parser sees them: it compares each attribute of an element with
/// all others of it.
fn check_lengths(text: &str) -> Result<(), XmlError> {
    let mut line = 1;
    for piece in text.split('<') {
        if piece.len() > ELEMENT_BYTES_MAX {
            let problem = format!("an element longer than {} KiB", ELEMENT_BYTES_MAX >> 10);
            return Err(XmlError::Object { line, problem });
        }
        line = piece.bytes().filter(|byte| *byte == b'\n').fold(line, |line: u32, _| line + 1);
    }
    Ok(())
}

/// What objects were met so far.
#[derive(Debug, Default)]
struct Reader {
    cpus: BTreeSet<u32>,
    in_cores: BTreeSet<u32>,
    allowed_cpus: Option<CpuList>,
    allowed_nodes: Option<CpuList>,
    /// By the operating system's index; the cpus are not yet limited to the allowed ones.
    nodes: BTreeMap<u32, NodePart>,
    parts: Parts,
}

/// What an object inherits from those around it.
#[derive(Clone, Copy)]
struct Around {
    /// The one node that the nearest object with cpus is near to.
    node: Option<u32>,
    /// Class of the PCI device it is on.
    pci_class: Option<u16>,
}

impl Reader {
    fn walk(&mut self, root: Element<'_, '_>) -> Result<(), XmlError> {
        let mut open = vec![(root, Around { node: None, pci_class: None })];
        while let Some((element, around)) = open.pop() {
            let around = match element.tag_name().name() {
                "object" => self.object(element, around)?,
                "distances2" => {
                    self.distances(element)?;
                    around
                }
                _ => around,
            };
            let name = |child: &Element<'_, '_>| {
                matches!(child.tag_name().name(), "object" | "distances2")
            };
            // The last is taken first, so that objects are met in the file's order.
            let children: Vec<_> = element.children().filter(name).collect();
            open.extend(children.into_iter().rev().map(|child| (child, around)));
        }
        Ok(())
    }

    fn object(&mut self, at: Element<'_, '_>, around: Around) -> Result<Around, XmlError> {
        let kind = at.attribute("type").unwrap_or_default();
        match kind {
            "Machine" => {
                self.allowed_cpus = set(at, "allowed_cpuset", CPUS_MAX)?;
                self.allowed_nodes = set(at, "allowed_nodeset", NODES_MAX)?;
            }
            "Package" => {
                let cpus = set(at, "cpuset", CPUS_MAX)?.unwrap_or_default();
                // Virtual machines may tell of packages that have no number.
                let met = u64::try_from(self.parts.packages.len()).unwrap_or(u64::MAX);
                let index = optional(at, "os_index")?.unwrap_or(met);
                let index = u32::try_from(index).map_err(|_| wrong(at, "os_index", "too large"))?;
                self.parts.packages.push((index, cpus));
                self.parts.model = self.parts.model.take().or_else(|| info(at, "CPUModel"));
            }
            "NUMANode" => self.node(at)?,
            "L3Cache" => self.parts.caches.push(cache(at)?),
            "L2Cache" => self.parts.l2.push(cache(at)?),
            "Core" => self.core(at)?,
            "PU" => {
                let cpu = number(at, "os_index", CPUS_MAX - 1)?;
                if !self.cpus.insert(cpu) {
                    return Err(object(at, format!("there are two PUs with os_index {cpu}")));
                }
            }
            "PCIDev" => {
                // `0108 [8086:0a54 ...]`: the class, then the ids.
                let class = at.attribute("pci_type").and_then(|text| text.get(..4));
                let pci_class = class.and_then(|class| u16::from_str_radix(class, 16).ok());
                return Ok(Around { pci_class, ..around });
            }
            "OSDev" => self.device(at, around)?,
            _ => {}
        }
        let near = set(at, "nodeset", NODES_MAX)?;
        let node = near.map_or(around.node, |near| match near.cpus() {
            [node] => Some(*node),
            _ => None,
        });
        Ok(Around { node, ..around })
    }

    fn node(&mut self, at: Element<'_, '_>) -> Result<(), XmlError> {
        let index = number(at, "os_index", NODES_MAX - 1)?;
        let memory_bytes = optional(at, "local_memory")?.unwrap_or(0);
        let cpus = set(at, "cpuset", CPUS_MAX)?.unwrap_or_default();
        let part = NodePart { memory_bytes, cpus, distances: BTreeMap::new() };
        if self.nodes.insert(index, part).is_some() {
            return Err(object(at, format!("there are two NUMANodes with os_index {index}")));
        }
        Ok(())
    }

    fn core(&mut self, at: Element<'_, '_>) -> Result<(), XmlError> {
        let threads = set(at, "cpuset", CPUS_MAX)?.unwrap_or_default();
        if let Some(cpu) = threads.cpus().iter().find(|cpu| !self.in_cores.insert(**cpu)) {
            return Err(object(at, format!("cpu {cpu} is in two cores")));
        }
        self.parts.cores.push(threads.cpus().to_vec());
        Ok(())
    }

    /// Drives and interfaces, told by the class of their PCI device: the numbers of hwloc's own kinds
    /// differ between its versions.
    fn device(&mut self, at: Element<'_, '_>, around: Around) -> Result<(), XmlError> {
        let kind = match around.pci_class {
            Some(0x0108) => DeviceKind::Nvme,
            Some(class) if class >> 8 == 0x02 => DeviceKind::Network,
            _ => return Ok(()),
        };
        let name = printable(at.attribute("name").unwrap_or_default());
        // An adapter for InfiniBand is there as an interface too.
        if name.is_empty() || at.attribute("osdev_type") == Some("3") {
            return Ok(());
        }
        if self.parts.devices.len() >= DEVICES_MAX {
            return Err(object(at, format!("there are more than {DEVICES_MAX} devices")));
        }
        self.parts.devices.push(Device { kind, name, node: around.node });
        Ok(())
    }

    /// The matrix of latencies between nodes: row by row, in the order of `indexes`.
    fn distances(&mut self, at: Element<'_, '_>) -> Result<(), XmlError> {
        let latency = at.attribute("name").is_none_or(|name| name == "NUMALatency");
        if at.attribute("type") != Some("NUMANode") || !latency {
            return Ok(());
        }
        if at.attribute("indexing") != Some("os") {
            return Ok(());
        }
        let indices = numbers(at, "indexes")?;
        let values = numbers(at, "u64values")?;
        let count = indices.len();
        if count > NODES_MAX as usize || values.len() != count * count {
            let problem = format!("{} distances between {count} nodes", values.len());
            return Err(object(at, problem));
        }
        for (from, row) in indices.iter().zip(values.chunks(count.max(1))) {
            if let Some(node) = self.nodes.get_mut(from) {
                node.distances = indices.iter().copied().zip(row.iter().copied()).collect();
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Topology, XmlError> {
        let (cpus, allowed) = (self.cpus, self.allowed_cpus);
        let usable = |cpu: &u32| {
            cpus.contains(cpu) && allowed.as_ref().is_none_or(|allowed| allowed.contains(*cpu))
        };
        for core in &mut self.parts.cores {
            core.retain(usable);
        }
        // A virtual machine may tell of hardware threads and of no cores.
        let alone = cpus.iter().filter(|cpu| !self.in_cores.contains(cpu) && usable(cpu));
        self.parts.cores.extend(alone.map(|cpu| vec![*cpu]));
        if !self.parts.cores.iter().any(|core| !core.is_empty()) {
            return Err(XmlError::Nothing("hardware thread"));
        }
        if self.nodes.is_empty() {
            return Err(XmlError::Nothing("memory node"));
        }
        for (index, node) in &mut self.nodes {
            if self.allowed_nodes.as_ref().is_some_and(|allowed| !allowed.contains(*index)) {
                node.memory_bytes = 0;
            }
        }
        Ok(Parts { nodes: self.nodes, ..self.parts }.assemble())
    }
}

fn cache(at: Element<'_, '_>) -> Result<Cache, XmlError> {
    let cpus = set(at, "cpuset", CPUS_MAX)?.unwrap_or_default();
    Ok(Cache { bytes: optional(at, "cache_size")?.unwrap_or(0), cpus })
}

fn line(at: Element<'_, '_>) -> u32 {
    at.document().text_pos_at(at.range().start).row
}

fn object(at: Element<'_, '_>, problem: String) -> XmlError {
    XmlError::Object { line: line(at), problem }
}

fn wrong(at: Element<'_, '_>, attribute: &'static str, problem: &'static str) -> XmlError {
    let kind = at.attribute("type").unwrap_or_else(|| at.tag_name().name());
    let value = printable(at.attribute(attribute).unwrap_or_default());
    XmlError::Attribute { line: line(at), element: printable(kind), attribute, value, problem }
}

/// A number that must be there, up to `most`.
fn number(at: Element<'_, '_>, attribute: &'static str, most: u32) -> Result<u32, XmlError> {
    let value =
        optional(at, attribute)?.ok_or_else(|| wrong(at, attribute, "a number is missing"))?;
    let small = u32::try_from(value).ok().filter(|value| *value <= most);
    small
        .ok_or_else(|| wrong(at, attribute, "no machine that this program knows has such a number"))
}

fn optional(at: Element<'_, '_>, attribute: &'static str) -> Result<Option<u64>, XmlError> {
    let text = at.attribute(attribute);
    let parsed = text.map(|text| text.parse().map_err(|_| wrong(at, attribute, "not a number")));
    parsed.transpose()
}

/// A set as hwloc writes it: 32 bits each, the highest first, `0xf...f` in front when all higher ones
/// are in it, and nothing between commas for a zero.
fn set(
    at: Element<'_, '_>,
    attribute: &'static str,
    end: u32,
) -> Result<Option<CpuList>, XmlError> {
    let Some(text) = at.attribute(attribute) else { return Ok(None) };
    let error = || wrong(at, attribute, "not a set such as 0x0000ffff,0x00000000");
    let mut words = Vec::new();
    let mut full_above = false;
    for (place, word) in text.split(',').enumerate() {
        if place == 0 && word == "0xf...f" {
            full_above = true;
            continue;
        }
        let digits = word.strip_prefix("0x").unwrap_or(word);
        let hexadecimal = digits.len() <= 8 && digits.bytes().all(|b| b.is_ascii_hexdigit());
        if !hexadecimal || words.len() > 4096 {
            return Err(error());
        }
        words.push(if digits.is_empty() { 0 } else { parse_hex(digits).ok_or_else(error)? });
    }
    words.reverse();
    let mut found = Vec::new();
    for (base, word) in (0u32..).step_by(32).zip(&words) {
        found.extend((0..32).filter(|bit| word >> bit & 1 == 1).map(|bit| base + bit));
    }
    if full_above {
        let first = u32::try_from(words.len()).unwrap_or(end).saturating_mul(32);
        found.extend(first..end.max(first));
    } else if found.iter().any(|member| *member >= end) {
        return Err(wrong(at, attribute, "it holds numbers that this program cannot name"));
    }
    Ok(Some(found.into_iter().filter(|member| *member < end).collect()))
}

fn parse_hex(digits: &str) -> Option<u32> {
    u32::from_str_radix(digits, 16).ok()
}

/// The numbers in all children of this name. hwloc splits long lists.
fn numbers(at: Element<'_, '_>, name: &'static str) -> Result<Vec<u32>, XmlError> {
    let mut found = Vec::new();
    for child in at.children().filter(|child| child.tag_name().name() == name) {
        for word in child.text().unwrap_or_default().split_whitespace() {
            let error = || object(child, format!("{name} holds {:?}", printable(word)));
            found.push(word.parse().map_err(|_| error())?);
        }
    }
    Ok(found)
}

/// What `<info name="…" value="…">` of an object says.
fn info(at: Element<'_, '_>, name: &str) -> Option<String> {
    let named = |child: &Element<'_, '_>| {
        child.tag_name().name() == "info" && child.attribute("name") == Some(name)
    };
    at.children().find(named)?.attribute("value").map(printable)
}
