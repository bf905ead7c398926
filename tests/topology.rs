//! `mica topology` as an operator runs it, for machines that are not here.
//!
//! Called by `cargo test`. Refuses a picture in `docs` that is not what the program draws now;
//! `MICA_BLESS=1` draws it anew.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const TWO_SOCKETS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/numa/tests/machines/2x24x2.xml");

fn topology(options: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mica")).arg("topology").args(options).output().unwrap()
}

fn printed(options: &[&str]) -> String {
    let ran = topology(options);
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap()
}

/// A file of this test, in a directory that goes with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("mica-topology-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

#[test]
fn this_machine_is_shown() {
    let text = printed(&["--shards", "1"]);
    for part in ["machine ", "node 0", "shard 0 ", "vcpus ", "memory "] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn another_machine_is_shown() {
    let text = printed(&["--xml", TWO_SOCKETS, "--smt", "pair"]);
    let expected = "\
machine         Example: 2 x 24 cores of 2 threads, 2 nodes, 48 cores, 96 hardware threads
  node 0        192 GiB, package 0, cpus 0-23,48-71, L3 36 MiB, L2 1 MiB a core, node 1 at 21
                siblings 0/48, 1/49, … 23/71
                nvme0n1, nvme1n1, ens1f0
  node 1        192 GiB, package 1, cpus 24-47,72-95, L3 36 MiB, L2 1 MiB a core, node 0 at 21
                siblings 24/72, 25/73, … 47/95
                nvme2n1, nvme3n1, ens2f0
plan            12 shards, --smt pair
node 0
  shards 0-5    cpus 0-5
  blocking      cpus 48-53
  vcpus         cpus 6-23,54-71
node 1
  shards 6-11   cpus 24-29
  blocking      cpus 72-77
  vcpus         cpus 30-47,78-95
vcpu pin        node
memory          preferred
";
    assert_eq!(text, expected);
}

#[test]
fn json_is_what_the_document_says() {
    let options = ["--xml", TWO_SOCKETS, "--json", "--smt", "pair", "--memory", "bind"];
    let shown: serde_json::Value = serde_json::from_str(&printed(&options)).unwrap();
    assert_eq!(shown["version"], 1);
    let node = &shown["machine"]["nodes"][1];
    assert_eq!((&node["node"], &node["package"]), (&1.into(), &1.into()));
    assert_eq!(node["memory_bytes"], 206_158_430_208u64);
    assert_eq!(node["cores"][0], serde_json::json!([24, 72]));
    assert_eq!(node["distances"], serde_json::json!({"0": 21, "1": 10}));
    assert_eq!(node["l3"][0]["bytes"], 37_748_736);
    let l2 = serde_json::json!({"bytes": 1_048_576, "cpus": [24, 72]});
    assert_eq!((node["l2"].as_array().map(Vec::len), &node["l2"][0]), (Some(24), &l2));
    let device = serde_json::json!({"kind": "nvme", "name": "nvme0n1", "node": 0});
    assert_eq!(shown["machine"]["devices"][0], device);
    let plan = &shown["plan"];
    let shard = serde_json::json!(
        {"shard": 6, "cpu": 24, "node": 1, "memory_node": 1, "blocking_cpus": [72]}
    );
    assert_eq!(plan["shards"][6], shard);
    assert_eq!(plan["vcpus"][0]["cpus"][0], 6);
    assert_eq!(plan["vcpus"][0]["shared_with_shards"], false);
    let policies = (&plan["smt"], &plan["vcpu_pin"], &plan["memory"]);
    assert_eq!(policies, (&"pair".into(), &"node".into(), &"bind".into()));
    // Every field is in the document.
    let document = std::fs::read_to_string(document("docs/tuning.md")).unwrap();
    let mut names = Vec::new();
    field_names(&shown, &mut names);
    for name in names {
        assert!(
            document.contains(&format!("`{name}`")),
            "docs/tuning.md does not say what {name} is"
        );
    }
}

fn document(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn field_names(value: &serde_json::Value, names: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(fields) => {
            for (name, value) in fields.iter().filter(|(n, _)| n.parse::<u32>().is_err()) {
                names.push(name.clone());
                field_names(value, names);
            }
        }
        serde_json::Value::Array(values) => values.iter().for_each(|v| field_names(v, names)),
        _ => {}
    }
}

#[test]
fn the_pictures_in_the_documents_are_what_is_drawn() {
    let scratch = Scratch::new("pictures");
    for (name, options) in [
        ("layout-2x24x2.svg", &[][..]),
        (
            "layout-2x24x2-reserved.svg",
            &["--smt", "pair", "--shards-per-node", "4", "--reserved-per-node", "1"][..],
        ),
    ] {
        let drawn = scratch.file(name);
        let mut line = vec!["--xml", TWO_SOCKETS, "--svg", &drawn];
        line.extend(options);
        printed(&line);
        let drawn = std::fs::read_to_string(drawn).unwrap();
        let kept = document("docs").join(name);
        if std::env::var_os("MICA_BLESS").is_some() {
            std::fs::write(&kept, &drawn).unwrap();
        }
        let kept = std::fs::read_to_string(kept).unwrap_or_default();
        assert!(drawn == kept, "docs/{name} is not what is drawn; MICA_BLESS=1 draws it anew");
        assert_eq!(drawn.matches("<title>cpu ").count(), 96, "each hardware thread is drawn once");
        assert!(
            !drawn.contains("http://") || drawn.matches("http://").count() == 1,
            "only the namespace"
        );
    }
}

/// A machine as `lstopo` writes it: nodes with so much memory, each with so many cores of two threads, four nodes
/// a package. Siblings are numbered after all first threads.
fn export(memory_gib: &[u64], cores: u32, distances: &str) -> String {
    let nodes = u32::try_from(memory_gib.len()).unwrap();
    let total = nodes * cores;
    let set = |cpus: &[u32]| -> String {
        let mut words = vec![0u32; (total as usize * 2).div_ceil(32)];
        cpus.iter().for_each(|cpu| words[(cpu / 32) as usize] |= 1 << (cpu % 32));
        words.iter().rev().map(|word| format!("0x{word:08x}")).collect::<Vec<_>>().join(",")
    };
    let all: Vec<u32> = (0..total * 2).collect();
    let mut text = format!(
        "<?xml version=\"1.0\"?>\n<!DOCTYPE topology SYSTEM \"hwloc2.dtd\">\n<topology version=\"2.0\">\n\
         <object type=\"Machine\" cpuset=\"{}\" nodeset=\"0x{:x}\">\n",
        set(&all),
        (1u64 << nodes) - 1
    );
    for (node, gib) in (0..nodes).zip(memory_gib) {
        let firsts: Vec<u32> = (node * cores..(node + 1) * cores).collect();
        let cpus = set(&firsts.iter().flat_map(|cpu| [*cpu, cpu + total]).collect::<Vec<_>>());
        let (package, bytes) = (node / 4, gib << 30);
        writeln!(
            text,
            "<object type=\"Package\" os_index=\"{package}\" cpuset=\"{cpus}\">\n\
             <object type=\"NUMANode\" os_index=\"{node}\" cpuset=\"{cpus}\" local_memory=\"{bytes}\"/>"
        )
        .unwrap();
        for cpu in firsts {
            let (sibling, core) = (cpu + total, set(&[cpu, cpu + total]));
            writeln!(
                text,
                "<object type=\"Core\" cpuset=\"{core}\"><object type=\"PU\" os_index=\"{cpu}\"/>\
                 <object type=\"PU\" os_index=\"{sibling}\"/></object>"
            )
            .unwrap();
        }
        text += "</object>\n";
    }
    text + "</object>\n" + distances + "</topology>\n"
}

/// Where a rectangle of a picture is: x, y, and where it ends.
type Place = [u32; 4];

/// The rectangles of a class.
fn rectangles(picture: &str, class: &str) -> Vec<Place> {
    let begin = format!("<rect class=\"{class}\" ");
    let number = |tag: &str, name: &str| -> u32 {
        let (_, rest) = tag.split_once(&format!(" {name}=\"")).unwrap_or(("", "0\""));
        rest.split_once('"').unwrap().0.parse().unwrap()
    };
    let place = |rest: &str| {
        let tag = format!(" {}", rest.split_once('>').unwrap().0);
        let [x, y, width, height] = ["x", "y", "width", "height"].map(|name| number(&tag, name));
        [x, y, x + width, y + height]
    };
    picture.split(&begin).skip(1).map(place).collect()
}

fn is_inside(inner: &Place, outer: &Place) -> bool {
    inner[0] >= outer[0] && inner[1] >= outer[1] && inner[2] <= outer[2] && inner[3] <= outer[3]
}

fn overlap(a: &Place, b: &Place) -> bool {
    a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]
}

/// Checks that each of `inner` is inside one of `outer`, and over none of its own kind.
fn lie_inside(inner: &[Place], outer: &[Place]) {
    for (at, place) in inner.iter().enumerate() {
        let holders = outer.iter().filter(|outer| is_inside(place, outer)).count();
        assert_eq!(holders, 1, "{place:?} is not inside one of {outer:?}");
        let other = inner[at + 1..].iter().find(|other| overlap(place, other));
        assert_eq!(other, None, "{place:?} is drawn over");
    }
}

/// The picture of a machine, after checks that hold of all: every node, core and thread is drawn once, inside of
/// what it is a part of, and nothing over anything else.
fn drawn_whole(name: &str, export: &str, nodes: usize, cores: usize) -> String {
    let scratch = Scratch::new(name);
    let (xml, svg) = (scratch.file("machine.xml"), scratch.file("machine.svg"));
    std::fs::write(&xml, export).unwrap();
    printed(&["--xml", &xml, "--svg", &svg]);
    let picture = std::fs::read_to_string(svg).unwrap();
    let [page, panels, groups, drawn] =
        ["page", "panel", "group", "core"].map(|class| rectangles(&picture, class));
    assert_eq!((page.len(), panels.len(), drawn.len()), (1, nodes, cores));
    lie_inside(&panels, &page);
    lie_inside(&groups, &panels);
    lie_inside(&drawn, &groups);
    for node in 0..nodes {
        assert_eq!(picture.matches(&format!(">node {node}</text>")).count(), 1, "node {node}");
    }
    for cpu in 0..cores * 2 {
        assert_eq!(picture.matches(&format!("<title>cpu {cpu}: ")).count(), 1, "cpu {cpu}");
    }
    picture
}

#[test]
#[should_panic(expected = "is drawn over")]
fn what_lies_over_something_is_found() {
    lie_inside(&[[0, 0, 5, 5], [4, 4, 9, 9]], &[[0, 0, 10, 10]]);
}

#[test]
#[should_panic(expected = "is not inside one")]
fn what_sticks_out_is_found() {
    let picture =
        "<rect class=\"panel\" x=\"1\" y=\"1\" width=\"8\" height=\"10\" rx=\"2\"></rect>";
    lie_inside(&rectangles(picture, "panel"), &[[0, 0, 10, 10]]);
}

#[test]
fn eight_nodes_are_drawn_whole() {
    let picture = drawn_whole("eight-nodes", &export(&[64; 8], 8, ""), 8, 64);
    for package in 0..2 {
        let said = format!(">package {package} · 8 cores · 2 shards</text>");
        assert_eq!(picture.matches(&said).count(), 4, "{said}");
    }
}

#[test]
fn a_node_without_memory_is_drawn_with_where_it_takes_it_from() {
    let distances = "<distances2 type=\"NUMANode\" nbobjs=\"3\" kind=\"5\" name=\"NUMALatency\" indexing=\"os\">\n\
                     <indexes length=\"6\">0 1 2 </indexes>\n\
                     <u64values length=\"27\">10 31 31 31 10 12 31 12 10 </u64values>\n</distances2>\n";
    let picture = drawn_whole("memoryless", &export(&[64, 0, 64], 4, distances), 3, 12);
    let said = ">package 0 · 4 cores · 1 shard · memory on node 2</text>";
    assert_eq!(picture.matches(said).count(), 1, "{picture}");
    assert_eq!(picture.matches("memory on node").count(), 1);
}

#[test]
fn what_cannot_be_says_what_to_change() {
    let scratch = Scratch::new("refusals");
    let not_xml = scratch.file("x.xml");
    std::fs::write(&not_xml, "<topology version=\"1.0\"/>").unwrap();
    let missing = scratch.file("missing.xml");
    let nowhere = scratch.file("no/such/dir.svg");
    let cases: &[(&[&str], &str)] = &[
        (&["--xml", &not_xml], "write it with `lstopo machine.xml`"),
        (&["--xml", &missing], "cannot read"),
        (&["--xml", "/dev/zero"], "larger than"),
        (&["--svg", &nowhere], "cannot write"),
        (&["--xml", TWO_SOCKETS, "--shards", "500"], "ask for fewer"),
        (&["--xml", TWO_SOCKETS, "--shard-cpus", "0,48"], "--smt use"),
        (&["--shard-fraction", "2"], "at most 1"),
        (&["--shards", "1", "--shard-cpus", "0"], "cannot be used with"),
    ];
    for (options, with) in cases {
        let ran = topology(options);
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(!ran.status.success() && said.contains(with), "{options:?}: {said}");
    }
}
