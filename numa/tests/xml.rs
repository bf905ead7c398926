//! Machines from XML: what a real export holds, and hostile files.
//!
//! Called by `cargo test`. The files in `tests/machines` are exports of `lstopo`.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use mica_numa::Topology;
use mica_numa::topology::{DeviceKind, XML_BYTES_MAX, XmlError, from_xml};
use proptest::prelude::*;

const TWO_SOCKETS: &str = include_str!("machines/2x24x2.xml");

fn two_sockets() -> Topology {
    from_xml(TWO_SOCKETS.as_bytes()).unwrap()
}

/// A small machine, into which tests put what is wrong.
fn small(machine: &str, objects: &str) -> Result<Topology, XmlError> {
    let text = format!(
        "<?xml version=\"1.0\"?>\n<!DOCTYPE topology SYSTEM \"hwloc2.dtd\">\n<topology version=\"2.0\">\n\
         <object type=\"Machine\" cpuset=\"0x0000000f\" nodeset=\"0x3\" {machine}>\n{objects}\n</object>\n\
         </topology>\n"
    );
    from_xml(text.as_bytes())
}

const NODE: &str =
    "<object type=\"NUMANode\" os_index=\"0\" cpuset=\"0x3\" local_memory=\"4096\"/>";
const PU: &str = "<object type=\"PU\" os_index=\"0\" cpuset=\"0x1\"/>";

#[test]
fn an_export_of_lstopo_is_read() {
    let topology = two_sockets();
    let nodes: Vec<_> = topology
        .nodes
        .iter()
        .map(|node| (node.index, node.package, node.cpus().to_string(), node.cores.len()))
        .collect();
    let expected =
        [(0, Some(0), "0-23,48-71".to_owned(), 24), (1, Some(1), "24-47,72-95".to_owned(), 24)];
    assert_eq!(nodes, expected);
    let node = &topology.nodes[1];
    assert_eq!(node.cores[0].threads(), [24, 72]);
    assert_eq!(node.memory_bytes, 192 << 30);
    assert_eq!(node.distances, [(0, 21), (1, 10)].into());
    assert_eq!((node.caches.len(), node.caches[0].bytes), (1, 36 << 20));
    let second = &node.l2[1];
    assert_eq!((node.l2.len(), second.bytes, second.cpus.cpus()), (24, 1 << 20, &[25, 73][..]));
    let devices: Vec<_> =
        topology.devices.iter().map(|d| (d.kind, &d.name[..], d.node.unwrap())).collect();
    let expected = [
        (DeviceKind::Nvme, "nvme0n1", 0),
        (DeviceKind::Nvme, "nvme1n1", 0),
        (DeviceKind::Nvme, "nvme2n1", 1),
        (DeviceKind::Nvme, "nvme3n1", 1),
        (DeviceKind::Network, "ens1f0", 0),
        (DeviceKind::Network, "ens2f0", 1),
    ];
    assert_eq!(devices, expected);
}

#[test]
fn what_the_machine_forbids_is_left_out() {
    let cores = "<object type=\"Core\" cpuset=\"0x00000003\"/><object type=\"PU\" os_index=\"0\"/>\
                 <object type=\"PU\" os_index=\"1\"/><object type=\"PU\" os_index=\"2\"/>";
    let allowed = "allowed_cpuset=\"0x5\" allowed_nodeset=\"0x2\"";
    let other = "<object type=\"NUMANode\" os_index=\"1\" cpuset=\"0xc\" local_memory=\"8192\"/>";
    let topology = small(allowed, &format!("{NODE}{other}{cores}")).unwrap();
    let shown: Vec<_> = topology
        .nodes
        .iter()
        .map(|node| (node.index, node.memory_bytes, node.cpus().to_string()))
        .collect();
    assert_eq!(shown, [(0, 0, "0".to_owned()), (1, 8192, "2".to_owned())]);
}

#[test]
fn what_virtual_machines_leave_out_is_not_missed() {
    // No number of the package, no cores, no cache, no sizes.
    let package =
        |objects: &str| format!("<object type=\"Package\" cpuset=\"0xf\">{objects}</object>");
    let node = "<object type=\"NUMANode\" os_index=\"4\" cpuset=\"0xf\"/>";
    let pus = "<object type=\"PU\" os_index=\"0\"/><object type=\"PU\" os_index=\"3\"/>";
    let topology = small("", &package(&format!("{node}{pus}"))).unwrap();
    let [node] = &topology.nodes[..] else { panic!("{topology:?}") };
    assert_eq!((node.index, node.package, node.memory_bytes), (4, Some(0), 0));
    assert_eq!(
        node.cores.iter().map(|core| core.threads().to_vec()).collect::<Vec<_>>(),
        [[0], [3]]
    );
    let said = small("", &format!("{PU}<object type=\"Package\" os_index=\"4294967296\"/>"));
    assert!(said.unwrap_err().to_string().contains("too large"));
}

#[test]
fn sets_are_read_as_hwloc_writes_them() {
    let cpus = |cpuset: &str| {
        let pus: String = [0, 31, 32, 64, 100]
            .map(|n| format!("<object type=\"PU\" os_index=\"{n}\"/>"))
            .concat();
        small(&format!("allowed_cpuset=\"{cpuset}\""), &format!("{NODE}{pus}"))
            .map(|topology| topology.cpus().to_string())
    };
    assert_eq!(cpus("0x00000001").unwrap(), "0");
    assert_eq!(cpus("0x1,0x80000001").unwrap(), "0,31-32");
    assert_eq!(cpus("0x1,,0x0").unwrap(), "64");
    assert_eq!(cpus("0xf...f,0x00000001").unwrap(), "0,32,64,100");
    assert_eq!(cpus("0xf...f").unwrap(), "0,31-32,64,100");
    for bad in ["", "x", "0x", "0x123456789", "0x1;0x2", "-1", "0xf...f,0xf...f"] {
        let set = cpus(bad);
        // An empty set is a set, and then no cpu is left.
        assert!(set.is_err(), "{bad}: {set:?}");
    }
    let far = format!("0x1{}", ",".repeat(32));
    assert!(cpus(&far).unwrap_err().to_string().contains("cannot name"));
}

#[test]
fn hostile_files_are_refused_with_the_place() {
    let refused = |objects: &str, with: &str| {
        let said = small("", objects).unwrap_err().to_string();
        assert!(said.contains(with), "{objects:.80}: {said}");
    };
    refused(&format!("{NODE}\n{PU}\n{PU}"), "line 7: there are two PUs with os_index 0");
    refused(&format!("{NODE}\n{NODE}{PU}"), "line 6: there are two NUMANodes");
    refused(&format!("{NODE}<object type=\"PU\" os_index=\"1024\"/>"), "os_index=\"1024\"");
    refused(&format!("{NODE}<object type=\"PU\" os_index=\"-1\"/>"), "not a number");
    refused(&format!("{NODE}<object type=\"PU\"/>"), "a number is missing");
    refused("<object type=\"NUMANode\" os_index=\"4294967295\"/>", "no machine");
    refused(
        &format!(
            "{NODE}<object type=\"Core\" cpuset=\"0x1\"/><object type=\"Core\" cpuset=\"0x3\"/>{PU}"
        ),
        "cpu 0 is in two cores",
    );
    refused(PU, "names no memory node");
    refused(NODE, "names no hardware thread");
    let bad = "<distances2 type=\"NUMANode\" nbobjs=\"9\" name=\"NUMALatency\" indexing=\"os\">\
               <indexes>0 1</indexes><u64values>10 21 21</u64values></distances2>";
    refused(&format!("{NODE}{PU}{bad}"), "3 distances between 2 nodes");
    refused(&format!("<object type=\"Misc\" name=\"{}\"/>", "x".repeat(100_000)), "longer than");
    let deep = "<object type=\"Group\">".repeat(200_000) + &"</object>".repeat(200_000);
    assert!(small("", &format!("{NODE}{PU}{deep}")).is_ok(), "depth is no danger");
    refused(&format!("{NODE}{PU}{}", "<a/>".repeat(500_000)), "not XML");
}

#[test]
fn what_is_no_export_is_refused() {
    let refused = |bytes: &[u8], with: &str| {
        let error = from_xml(bytes).unwrap_err();
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        let said = format!("{error}: {cause}");
        assert!(said.contains(with), "{said}");
    };
    refused(b"", "not XML");
    refused(b"<topology", "not XML");
    refused(&[0xff, 0xfe, 0], "not text");
    refused(b"<html/>", "its root is <html>");
    refused(b"<topology><object type=\"System\"/></topology>", "its version is \"1\"");
    refused(b"<topology version=\"9\"/>", "its version is \"9\"");
    refused(
        b"<!DOCTYPE t [<!ENTITY a \"b\">]><topology version=\"2.0\">&a;</topology>",
        "entities",
    );
    refused(&vec![b' '; XML_BYTES_MAX + 1], "larger than");
}

#[test]
fn names_in_a_file_cannot_do_harm() {
    let device = "<object type=\"PCIDev\" pci_type=\"0200 [1:2]\"><object type=\"OSDev\" \
                  name=\"a&#x85;&#x202e;&lt;script&gt;\" osdev_type=\"2\"/></object>";
    let topology = small("", &format!("{NODE}{PU}{device}")).unwrap();
    // What draws it has to escape the rest.
    assert_eq!(topology.devices[0].name, "a <script>");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A piece cut out, or bytes changed: an answer, and a machine within bounds if it is one.
    #[test]
    fn a_damaged_file_is_refused_or_bounded(
        at in 0..TWO_SOCKETS.len(),
        cut in 0usize..400,
        with in "[0-9a-fx\"<>/&= ]{0,6}",
    ) {
        let mut bytes = TWO_SOCKETS.as_bytes().to_vec();
        let end = (at + cut).min(bytes.len());
        bytes.splice(at..end, with.bytes());
        if let Ok(topology) = from_xml(&bytes) {
            let cpus = topology.cpus();
            prop_assert!(!cpus.is_empty());
            prop_assert!(cpus.cpus().iter().all(|cpu| *cpu < 1024));
            let cores: usize =
                topology.nodes.iter().flat_map(|n| &n.cores).map(|c| c.threads().len()).sum();
            prop_assert_eq!(cores, cpus.cpus().len(), "a thread is in one core");
        }
    }
}
