//! What sysfs and procfs say of this machine that hwloc's Rust crate cannot: memory nodes, their
//! distances, and where devices are.
//!
//! Called by `machine`. A file that is not there is an answer (the kernel tells of no such thing);
//! refuses nothing, because all of it is optional. Every function takes the root, so that tests can
//! show it another machine.
//!
//! hwloc 2 keeps memory nodes and devices at virtual depths, which the hwloc2 crate panics on.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::{Device, DeviceKind, NODES_MAX, NodePart, printable};
use crate::cpus::CpuList;

/// Most devices that are looked at.
const DEVICES_MAX: usize = 256;

/// Memory nodes, with the memory that this process may use.
pub(super) fn nodes(root: &Path) -> BTreeMap<u32, NodePart> {
    let dir = root.join("sys/devices/system/node");
    let text = |path: &str| fs::read_to_string(dir.join(path)).ok();
    let allowed = allowed_nodes(root);
    let online: CpuList = text("online").and_then(|text| text.parse().ok()).unwrap_or_default();
    let mut nodes = BTreeMap::new();
    for index in online.cpus().iter().copied().filter(|index| *index < NODES_MAX) {
        let cpus = text(&format!("node{index}/cpulist")).and_then(|text| text.parse().ok());
        let memory = text(&format!("node{index}/meminfo"))
            .and_then(|text| meminfo_total_bytes(&text))
            .filter(|_| allowed.as_ref().is_none_or(|allowed| allowed.contains(index)));
        // The kernel writes one distance for each online node, in their order.
        let distances = text(&format!("node{index}/distance")).unwrap_or_default();
        let distances = distances.split_whitespace().filter_map(|number| number.parse().ok());
        let part = NodePart {
            memory_bytes: memory.unwrap_or(0),
            cpus: cpus.unwrap_or_default(),
            distances: online.cpus().iter().copied().zip(distances).collect(),
        };
        nodes.insert(index, part);
    }
    nodes
}

/// The nodes whose memory this process may use, as its cpuset has it.
fn allowed_nodes(root: &Path) -> Option<CpuList> {
    let status = fs::read_to_string(root.join("proc/self/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Mems_allowed_list:"))?;
    line.parse().ok()
}

/// Finds `Node 0 MemTotal:  123 kB` and gives it in bytes.
fn meminfo_total_bytes(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.contains(" MemTotal:"))?;
    let kib: u64 = line.split_whitespace().nth(3)?.parse().ok()?;
    kib.checked_mul(1024)
}

/// NVMe drives and network interfaces that are devices, not only names.
pub(super) fn devices(root: &Path) -> Vec<Device> {
    let mut found = Vec::new();
    for (class, kind) in [("nvme", DeviceKind::Nvme), ("net", DeviceKind::Network)] {
        let dir = root.join("sys/class").join(class);
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for entry in entries.filter_map(Result::ok).take(DEVICES_MAX) {
            let device = entry.path().join("device");
            if device.exists() {
                let name = printable(&entry.file_name().to_string_lossy());
                found.push(Device { kind, name, node: node_of(&device) });
            }
        }
    }
    found
}

/// The node of a device, or of the device it hangs on: an interface of virtio is on a PCI device.
fn node_of(device: &Path) -> Option<u32> {
    let at = fs::canonicalize(device).ok()?;
    let above = at.ancestors().take_while(|path| path.file_name().is_some_and(|n| n != "devices"));
    let text = above.filter_map(|path| fs::read_to_string(path.join("numa_node")).ok()).next()?;
    // -1 where the firmware does not tell.
    text.trim().parse().ok()
}

/// What the processors call themselves.
pub(super) fn model(root: &Path) -> Option<String> {
    let text = fs::read_to_string(root.join("proc/cpuinfo")).ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    line.split_once(':').map(|(_, name)| printable(name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::*;

    /// A directory that goes when the test does.
    struct Root(PathBuf);

    impl Root {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let root =
                std::env::temp_dir().join(format!("mica-sysfs-{name}-{}", std::process::id()));
            for (path, text) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Self(root)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn nodes_are_read_and_forbidden_memory_counts_as_none() {
        let node = "sys/devices/system/node";
        let root = Root::new(
            "nodes",
            &[
                ("proc/self/status", "Name:\tx\nMems_allowed_list:\t1-2\n"),
                (&format!("{node}/online"), "1,3\n"),
                (&format!("{node}/node1/cpulist"), "0-3,8\n"),
                (
                    &format!("{node}/node1/meminfo"),
                    "Node 1 MemTotal:  16 kB\nNode 1 MemFree: 5 kB\n",
                ),
                (&format!("{node}/node1/distance"), "10 21\n"),
                (&format!("{node}/node3/cpulist"), "4-7\n"),
                (&format!("{node}/node3/meminfo"), "Node 3 MemTotal:  64 kB\n"),
            ],
        );
        let nodes = nodes(&root.0);
        assert_eq!(nodes.keys().copied().collect::<Vec<_>>(), [1, 3]);
        assert_eq!(nodes[&1].memory_bytes, 16 << 10);
        assert_eq!(nodes[&1].cpus.to_string(), "0-3,8");
        assert_eq!(nodes[&1].distances, [(1, 10), (3, 21)].into());
        assert_eq!(nodes[&3].memory_bytes, 0, "not in Mems_allowed_list");
        assert!(nodes[&3].distances.is_empty());
        assert!(super::nodes(Path::new("/nowhere")).is_empty());
    }

    #[test]
    fn devices_are_at_the_node_of_what_they_hang_on() {
        let pci = "sys/devices/pci0000:00";
        let root = Root::new(
            "devices",
            &[
                ("proc/cpuinfo", "processor\t: 0\nmodel name\t: A  CPU\n"),
                (&format!("{pci}/0000:00:03.0/numa_node"), "1\n"),
                (&format!("{pci}/0000:00:03.0/virtio0/net/eth0/mtu"), "1500\n"),
                (&format!("{pci}/0000:00:04.0/numa_node"), "-1\n"),
                (&format!("{pci}/0000:00:04.0/nvme/nvme0/model"), "x\n"),
                ("sys/devices/virtual/net/lo/mtu", "65536\n"),
                ("sys/class/net/.keep", ""),
                ("sys/class/nvme/.keep", ""),
            ],
        );
        let link = |from: &str, to: String| symlink(to, root.0.join(from)).unwrap();
        link("sys/class/net/eth0", format!("../../../{pci}/0000:00:03.0/virtio0/net/eth0"));
        link(&format!("{pci}/0000:00:03.0/virtio0/net/eth0/device"), "../../../virtio0".to_owned());
        link("sys/class/net/lo", "../../devices/virtual/net/lo".to_owned());
        link("sys/class/nvme/nvme0", format!("../../../{pci}/0000:00:04.0/nvme/nvme0"));
        link(&format!("{pci}/0000:00:04.0/nvme/nvme0/device"), "../../../0000:00:04.0".to_owned());
        let found: Vec<_> =
            devices(&root.0).into_iter().map(|d| (d.name, d.kind, d.node)).collect();
        let nvme = ("nvme0".to_owned(), DeviceKind::Nvme, None);
        assert_eq!(found, [nvme, ("eth0".to_owned(), DeviceKind::Network, Some(1))]);
        assert_eq!(model(&root.0).as_deref(), Some("A CPU"));
    }

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "Node 1 MemTotal:       16384 kB\nNode 1 MemFree:  5 kB\n";
        assert_eq!(meminfo_total_bytes(text), Some(16_777_216));
        assert_eq!(meminfo_total_bytes("Node 0 MemFree: 1 kB\n"), None);
        assert_eq!(meminfo_total_bytes("Node 0 MemTotal: lots kB\n"), None);
    }
}
