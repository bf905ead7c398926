//! Random histories of the store against a model, with the machine stopping at every step.
//!
//! Called by tests only. The model is a map from name to content. Whatever the step at which the
//! machine stops, opening the store again must show the map as it was before the operation or as
//! it is after it, whole, and nothing else may lie in the directories.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use crate::crashsafe::Disk;
use crate::crashsafe::crash::Crash;
use crate::testing::{TempDir, names_in, put};
use crate::{Result, Store};

type Model = BTreeMap<String, u8>;

#[derive(Clone, Debug)]
enum Op {
    Put { name: &'static str, content: u8 },
    Delete { name: &'static str },
}

fn op() -> impl Strategy<Value = Op> {
    let name = || prop_oneof![Just("a"), Just("b"), Just("c")];
    prop_oneof![
        3 => (name(), any::<u8>()).prop_map(|(name, content)| Op::Put { name, content }),
        1 => name().prop_map(|name| Op::Delete { name }),
    ]
}

fn run(store: &Store, op: &Op) -> Result<()> {
    match op {
        Op::Put { name, content } => put(store, name, *content, true).map(drop),
        Op::Delete { name } => store.delete_template(&name.parse().unwrap()).map(drop),
    }
}

fn apply(model: &mut Model, op: &Op) {
    match op {
        Op::Put { name, content } => drop(model.insert((*name).to_owned(), *content)),
        Op::Delete { name } => drop(model.remove(*name)),
    }
}

/// What the store holds, every byte of every file looked at.
fn observe(root: &Path) -> Model {
    let store = Store::open(root).unwrap();
    let templates = store.templates().unwrap();
    assert_eq!(names_in(&root.join("templates")).len(), templates.len(), "rubbish was left");
    assert_eq!(names_in(&root.join("names")).len(), templates.len(), "a half name was left");
    let mut model = Model::new();
    for template in templates {
        let manifest = template.manifest();
        let content = u8::from_str_radix(&manifest.inputs_hash, 16).unwrap();
        let kernel = template.open_kernel().unwrap();
        let initramfs = template.open_initramfs().unwrap().unwrap();
        let disk = template.open_disk().unwrap().unwrap();
        for mut file in [kernel, initramfs, disk] {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes, [content; 4096]);
        }
        model.insert(manifest.name.to_string(), content);
    }
    model
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_stop_at_any_step_leaves_the_old_or_the_new(
        history in prop::collection::vec(op(), 0..4),
        last in op(),
    ) {
        // Stop at step 0, then 1, ... until the operation gets through.
        for stop in 0.. {
            let dir = TempDir::in_memory();
            let mut model = Model::new();
            let store = Store::open(dir.path()).unwrap();
            for op in &history {
                run(&store, op).unwrap();
                apply(&mut model, op);
            }
            let mut after = model.clone();
            apply(&mut after, &last);

            let crash = Arc::new(Crash::after(stop));
            let dying = Store::open_on(dir.path(), Disk::crashing(&crash));
            let result = dying.and_then(|store| run(&store, &last));
            let found = observe(dir.path());
            if result.is_ok() {
                prop_assert_eq!(&found, &after, "acknowledged, and lost, at step {}", stop);
            } else {
                prop_assert!(found == model || found == after, "at step {}: {:?}", stop, found);
            }
            prop_assert_eq!(observe(dir.path()), found, "opening again changed something");
            if !crash.happened() {
                break;
            }
        }
    }
}

#[test]
fn a_stop_while_the_store_is_made_leaves_it_makeable() {
    for stop in 0.. {
        let dir = TempDir::in_memory();
        let crash = Arc::new(Crash::after(stop));
        let made = Store::open_on(dir.path(), Disk::crashing(&crash));
        assert_eq!(observe(dir.path()), Model::new(), "step {stop}");
        assert_eq!(fs::read_to_string(dir.join("mica-store")).unwrap(), "mica store 1\n");
        if !crash.happened() {
            made.unwrap();
            assert!(stop > 4, "the stops did not reach the steps");
            return;
        }
    }
}

#[test]
fn everything_is_on_the_device_before_the_name_points_at_it() {
    let dir = TempDir::in_memory();
    Store::open(dir.path()).unwrap();
    let crash = Arc::new(Crash::after(u32::MAX));
    let store = Store::open_on(dir.path(), Disk::crashing(&crash)).unwrap();
    let template = put(&store, "base", 1, false).unwrap();
    let home = dir.join("templates").join(&template.manifest().id);
    let log = crash.log();
    let at = |operation: &str, path: &Path| {
        log.iter()
            .position(|(op, p)| *op == operation && p == path)
            .unwrap_or_else(|| panic!("no `{operation}` of {} in {log:#?}", path.display()))
    };
    let commit = at("rename to", &dir.join("names/base"));
    for part in ["kernel", "initramfs", "disk", "manifest"] {
        assert!(at("sync", &home.join(part)) < commit, "{part}");
    }
    assert!(at("write", &home.join("manifest")) < at("sync", &home.join("manifest")));
    assert!(at("sync directory", &home) < commit);
    assert!(at("sync directory", &dir.join("templates")) < commit);
    assert!(at("sync directory", &dir.join("names")) > commit);
}

#[test]
fn a_disk_that_is_not_made_says_why() {
    let dir = TempDir::in_memory();
    let mut store = Store::open(dir.path()).unwrap();
    let template = put(&store, "base", 1, false).unwrap();
    let sandbox = mica_units::SandboxId::from_random([1; mica_units::SANDBOX_ID_CHARS]);
    // The directory is the one step that happens: neither the disk nor its removal does.
    store.disk = Disk::crashing(&Arc::new(Crash::after(1)));
    let error = store.create_disk(&template, &sandbox).unwrap_err();
    assert!(error.to_string().contains("create"), "{error}");
}
