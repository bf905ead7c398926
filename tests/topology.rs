//! `mica topology` as an operator runs it, for machines that are not here.
//!
//! Called by `cargo test`. Refuses a picture in `docs` that is not what the program draws now;
//! `MICA_BLESS=1` draws it anew.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

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
