//! What keeps the disk alone depends on nothing but itself, and an empty memory is one.

use std::io::Read;

use mica_units::{Mebibytes, SANDBOX_ID_CHARS};

use super::*;
use crate::snapshot::SnapshotKind;
use crate::snapshot::tests::{FRAMES, base, image, manifest, memory_of};
use crate::testing::{TempDir, names_in, put};

const KEPT: &str = "pppppppppppppppppppp";
const MADE: &str = "mmmmmmmmmmmmmmmmmmmm";

fn read(mut file: File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// What is kept of a sandbox of this template: its disk alone.
fn kept(store: &Store, template: &Template, kind: SnapshotKind) -> Snapshot {
    let files = template.open_boot().unwrap();
    let staging = store.stage_snapshot(KEPT).unwrap();
    staging.clone_disk(&template.open_disk().unwrap().unwrap()).unwrap();
    staging.link_boot(&files).unwrap();
    let manifest = SnapshotManifest {
        kind,
        memory: Mebibytes::new(1),
        disk_bytes: 4096,
        state: Vec::new(),
        record: files.cmdline.into_bytes(),
        ..manifest(KEPT, Vec::new())
    };
    staging.seal(manifest).unwrap()
}

#[test]
fn a_disk_that_is_kept_outlives_its_template_and_a_start() {
    for kind in [SnapshotKind::Pause, SnapshotKind::Snapshot] {
        outlives_its_template_and_a_start(kind);
    }
}

fn outlives_its_template_and_a_start(kind: SnapshotKind) {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let template = put(&store, "base", 7, false).unwrap();
    let cmdline = template.manifest().cmdline.clone();
    kept(&store, &template, kind);
    assert!(store.delete_template(&template.manifest().name).unwrap());
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    let open = store.open_snapshot(KEPT).unwrap().unwrap();
    assert!(!open.snapshot.manifest().has_memory());
    assert!(open.layers.is_empty());
    let files = open.snapshot.open_boot().unwrap();
    assert_eq!(files.cmdline, cmdline);
    for file in [files.kernel, files.initramfs.unwrap()] {
        assert!(read(file) == [7; 4096]);
    }
    std::fs::remove_file(open.snapshot.dir().join("kernel")).unwrap();
    let error = open.snapshot.open_boot().unwrap_err();
    assert!(matches!(error, StorageError::Part { part: "kernel", .. }), "{error}");
    assert!(store.delete_snapshot(KEPT).unwrap());
    let error = open.snapshot.open_boot().unwrap_err();
    assert!(matches!(error, StorageError::SnapshotGone { .. }), "{error}");
}

#[test]
fn a_kernel_is_found_through_what_a_sandbox_was_made_from() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let template = put(&store, "base", 1, false).unwrap();
    let id = template.manifest().id.clone();
    let found = |ids: &[&str]| {
        let ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
        store.find_boot(&ids).unwrap().map(|files| read(files.kernel)[0])
    };
    assert_eq!(found(&[&id]), Some(1));
    assert_eq!(found(&[MADE]), None);
    let made = base(&store, MADE, &image(1), None);
    assert_eq!(found(&[MADE]), None, "it has no parent");
    // As one of a template that a client built, or of a client's snapshot.
    store.delete_snapshot(MADE).unwrap();
    let staging = store.stage_snapshot(MADE).unwrap();
    let (layer, file) = staging.create_layer().unwrap();
    let info =
        run_blocking(FlatWriter::new(BlockingFile::new(file), layer, FRAMES).finish()).unwrap();
    let manifest = SnapshotManifest {
        parent: Some(id.clone()),
        layers: vec![info],
        ..made.manifest().clone()
    };
    staging.seal(manifest).unwrap();
    assert_eq!(found(&["gone", MADE]), Some(1));
    // What has a kernel with it is as good as its template, and stays when that goes.
    let of_disk = put(&store, "other", 2, false).unwrap();
    kept(&store, &of_disk, SnapshotKind::Snapshot);
    for name in [&template.manifest().name, &of_disk.manifest().name] {
        assert!(store.delete_template(name).unwrap());
    }
    assert_eq!(found(&[MADE]), None, "its template is gone");
    assert_eq!(found(&[MADE, KEPT]), Some(2));
}

#[test]
fn an_empty_memory_is_a_base_of_zeros_that_takes_no_room() {
    use std::os::unix::fs::MetadataExt;
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let sandbox = SandboxId::from_random([3; SANDBOX_ID_CHARS]);
    store.create_sandbox(&sandbox, None).unwrap();
    let layer = store.make_empty_layer(&sandbox, FRAMES).unwrap();
    layer.verify().unwrap();
    let memory = memory_of(std::slice::from_ref(&layer));
    assert!(memory.iter().all(|byte| *byte == 0));
    let metadata = layer.file().metadata().unwrap();
    assert!(metadata.len() > u64::from(FRAMES) * 4096);
    assert!(metadata.blocks() * 512 <= 64 * 1024, "{} blocks", metadata.blocks());
    // The sandbox has a name for it already, and keeps it.
    store.link_layers(&sandbox, std::slice::from_ref(&layer)).unwrap();
    let kept = names_in(&dir.path().join("sandboxes").join(sandbox.as_str()));
    assert_eq!(kept, [layer.info().id.file_name()]);
}
