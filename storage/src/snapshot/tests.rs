//! Snapshots as shards see them, on a real file system. What a power cut does to them is in
//! `simulation.rs`.

use std::os::unix::fs::{FileExt, MetadataExt};

use mica_units::{FrameRun, Mebibytes};

use super::*;
use crate::layer::{LayerInfo, LayerKind, merge};
use crate::testing::{TempDir, names_in, put};
use crate::writer::{BlockingFile, FlatWriter, PackedWriter, run_blocking};

/// Memory of the small guests of tests: 1 MiB.
pub(crate) const FRAMES: u32 = 256;

pub(crate) fn manifest(id: &str, layers: Vec<LayerInfo>) -> SnapshotManifest {
    SnapshotManifest {
        id: id.to_owned(),
        kind: SnapshotKind::Snapshot,
        name: None,
        parent: None,
        sandbox: None,
        tenant: None,
        memory: Mebibytes::new(1),
        layers,
        disk_bytes: 0,
        ..manifest::tests::sample()
    }
}

/// All of a guest's memory as these layers have it.
pub(crate) fn memory_of(layers: &[Layer]) -> Vec<u8> {
    let mut memory = vec![0; FRAMES as usize * 4096];
    let tables: Vec<_> = layers.iter().map(|layer| layer.table().as_ref()).collect();
    for piece in merge(&tables, FRAMES) {
        let at = piece.run.first() as usize * 4096;
        let bytes = &mut memory[at..at + piece.run.count() as usize * 4096];
        layers[piece.layer].file().read_exact_at(bytes, u64::from(piece.page) * 4096).unwrap();
    }
    memory
}

pub(crate) fn base(store: &Store, id: &str, memory: &[u8], disk: Option<&File>) -> Snapshot {
    let staging = store.stage_snapshot(id).unwrap();
    let (layer, file) = staging.create_layer().unwrap();
    let mut writer = FlatWriter::new(BlockingFile::new(file), layer, FRAMES);
    let info = run_blocking(async {
        writer.push(memory).await?;
        writer.finish().await
    });
    let mut manifest = manifest(id, vec![info.unwrap()]);
    if let Some(disk) = disk {
        staging.clone_disk(disk).unwrap();
        manifest.disk_bytes = disk.metadata().unwrap().len();
    }
    staging.seal(manifest).unwrap()
}

/// A snapshot over another, in which these frames are full of a byte.
pub(crate) fn diff(
    store: &Store,
    id: &str,
    below: &[Layer],
    frames: &[(u32, u32, u8)],
) -> Snapshot {
    let staging = store.stage_snapshot(id).unwrap();
    staging.link_layers(below).unwrap();
    let (layer, file) = staging.create_layer().unwrap();
    let mut writer = PackedWriter::new(BlockingFile::new(file), layer, FRAMES);
    let info = run_blocking(async {
        for (first, count, byte) in frames {
            let mut chunk = writer.reserve().await?;
            chunk.as_mut().fill(*byte);
            writer.push(&[FrameRun::new(*first, *count).unwrap()], chunk).await?;
        }
        writer.finish().await
    });
    let mut layers: Vec<LayerInfo> = below.iter().map(|layer| *layer.info()).collect();
    layers.push(info.unwrap());
    staging.seal(manifest(id, layers)).unwrap()
}

pub(crate) fn image(byte: u8) -> Vec<u8> {
    let mut memory = vec![0; FRAMES as usize * 4096];
    memory[4096..5 * 4096].fill(byte);
    memory[200 * 4096..210 * 4096].fill(byte ^ 0xff);
    memory
}

const A: &str = "aaaaaaaaaaaaaaaaaaaa";
const B: &str = "bbbbbbbbbbbbbbbbbbbb";
const C: &str = "cccccccccccccccccccc";

#[test]
fn a_chain_is_found_read_and_outlives_what_it_was_made_from() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let a = base(&store, A, &image(1), None);
    let layers = a.open_layers().unwrap();
    let b = diff(&store, B, &layers, &[(2, 5, 7), (255, 1, 8)]);
    let c = diff(&store, C, &b.open_layers().unwrap(), &[(4, 1, 9)]);
    let mut expected = image(1);
    expected[2 * 4096..7 * 4096].fill(7);
    expected[255 * 4096..].fill(8);
    expected[4 * 4096..5 * 4096].fill(9);

    let ids = |store: &Store| -> Vec<String> {
        store.select_snapshots(|manifest| Some(manifest.id.clone())).unwrap()
    };
    assert_eq!(ids(&store), [A, B, C]);
    let open = store.open_snapshot(C).unwrap().unwrap();
    assert!(memory_of(&open.layers) == expected);
    assert!(open.disk.is_none());
    // One inode for all that share a layer.
    assert_eq!(layers[0].file().metadata().unwrap().nlink(), 3);
    assert_eq!(
        layers[0].file().metadata().unwrap().ino(),
        open.layers[0].file().metadata().unwrap().ino()
    );

    assert!(store.delete_snapshot(A).unwrap());
    assert!(!store.delete_snapshot(A).unwrap());
    assert!(store.delete_snapshot(B).unwrap());
    assert!(matches!(b.open_layers(), Err(StorageError::SnapshotGone { .. })));
    assert!(store.open_snapshot(B).unwrap().is_none());
    assert_eq!(names_in(&dir.join("snapshots")), [C]);
    assert!(memory_of(&c.open_layers().unwrap()) == expected);
    assert!(store.delete_snapshot(C).unwrap());
    assert_eq!(layers[0].file().metadata().unwrap().nlink(), 0);
    // Open files are not affected, but nothing can be built on a layer that nobody has.
    assert!(memory_of(&open.layers) == expected);
    let staging = store.stage_snapshot(A).unwrap();
    assert!(matches!(staging.link_layers(&layers), Err(StorageError::LayerGone { .. })));
}

#[test]
fn ids_and_names_that_are_none_find_nothing() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    base(&store, A, &image(1), None);
    for key in ["", "..", "a/b", "nobody", B, "base\0", "../snapshots/aaaaaaaaaaa"] {
        assert!(store.find_snapshot(key).unwrap().is_none(), "{key:?}");
        assert!(!store.delete_snapshot(key).unwrap(), "{key:?}");
    }
    assert!(store.stage_snapshot("..").is_err());
    assert!(matches!(store.stage_snapshot(A), Err(StorageError::SnapshotExists { .. })));
    let being_made = store.stage_snapshot(B).unwrap();
    assert!(matches!(store.stage_snapshot(B), Err(StorageError::SnapshotExists { .. })));
    assert!(!store.delete_snapshot(B).unwrap(), "what is not committed is not there");
    drop(being_made);
    assert_eq!(names_in(&dir.join("snapshots")), [A]);
}

#[test]
fn disks_are_clones_of_one_instant() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let path = dir.join("disk");
    std::fs::write(&path, [5; 8192]).unwrap();
    let disk = File::options().read(true).write(true).open(&path).unwrap();
    base(&store, A, &image(1), Some(&disk));
    disk.write_all_at(&[6; 8192], 0).unwrap();
    let open = store.open_snapshot(A).unwrap().unwrap();
    let mut bytes = [0; 8192];
    open.disk.unwrap().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [5; 8192]);
    File::options()
        .write(true)
        .open(dir.join("snapshots").join(A).join("disk"))
        .unwrap()
        .set_len(512)
        .unwrap();
    assert!(matches!(store.open_snapshot(A), Err(StorageError::Part { .. })));
}

#[test]
fn a_running_snapshot_goes_with_its_template() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let running = |content| {
        let template = put(&store, "base", content, true).unwrap();
        let id = template.manifest().id.clone();
        let staging = store.stage_snapshot(&id).unwrap();
        let (layer, file) = staging.create_layer().unwrap();
        let writer = FlatWriter::new(BlockingFile::new(file), layer, FRAMES);
        let info = run_blocking(writer.finish()).unwrap();
        let kind = SnapshotKind::Template;
        let template_id = id.clone();
        let manifest = SnapshotManifest { kind, template_id, ..manifest(&id, vec![info]) };
        staging.seal(manifest).unwrap();
        id
    };
    assert!(store.find_snapshot("base").unwrap().is_none());
    let first = running(1);
    for key in ["base", &first] {
        assert_eq!(store.find_snapshot(key).unwrap().unwrap().manifest().id, first);
    }
    let second = running(2);
    assert_eq!(names_in(&dir.join("snapshots")), [second.as_str()]);
    assert_eq!(store.find_snapshot("base").unwrap().unwrap().manifest().id, second);
    assert!(store.delete_template(&"base".parse().unwrap()).unwrap());
    assert!(names_in(&dir.join("snapshots")).is_empty());
    assert!(store.find_snapshot("base").unwrap().is_none());
}

#[test]
fn a_start_removes_what_was_not_committed_but_not_what_is_being_made() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    base(&store, A, &image(1), None);
    let staging = store.stage_snapshot(B).unwrap();
    staging.create_layer().unwrap();
    Store::open(dir.path()).unwrap();
    assert_eq!(names_in(&dir.join("snapshots")), [A, B], "another process is making it");
    // The process ends without a chance to clean up.
    staging.cut_off();
    std::fs::create_dir(dir.join("snapshots/.gone-cccccccccccccccccccc")).unwrap();
    std::fs::write(dir.join("snapshots/rubbish"), "x").unwrap();
    let home = dir.join("snapshots").join(A);
    let before = names_in(&home);
    for name in ["manifest.new", "memory.zzzzzzzzzzzzzzzzzzzz", "working-set.new"] {
        std::fs::write(home.join(name), "x").unwrap();
    }
    Store::open(dir.path()).unwrap();
    assert_eq!(names_in(&dir.join("snapshots")), [A]);
    assert_eq!(names_in(&home), before);
}

#[test]
fn damage_is_told_and_touches_nothing_else() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    base(&store, A, &image(1), None);
    base(&store, B, &image(2), None);
    let path = dir.join("snapshots").join(A).join("manifest");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.select_snapshots(|_| Some(())).unwrap().len(), 1);
    assert!(matches!(store.find_snapshot(A), Err(StorageError::Manifest { .. })));
    std::fs::copy(dir.join("snapshots").join(B).join("manifest"), &path).unwrap();
    assert!(matches!(store.find_snapshot(A), Err(StorageError::Manifest { .. })));
    assert!(store.delete_snapshot(A).unwrap(), "it can be got rid of");
}

#[test]
fn what_is_not_whole_is_not_committed() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let a = base(&store, A, &image(1), None);
    let layers = a.open_layers().unwrap();
    let good = manifest(B, vec![*layers[0].info()]);
    let refused = |manifest: &SnapshotManifest, link: bool| {
        let staging = store.stage_snapshot(B).unwrap();
        if link {
            staging.link_layers(&layers).unwrap();
        }
        staging.prepare(manifest).unwrap_err()
    };
    assert!(refused(&good, false).is_not_found(), "a layer is missing");
    let other = LayerInfo { file_bytes: 1 << 20, ..good.layers[0] };
    refused(&SnapshotManifest { layers: vec![other], ..good.clone() }, true);
    refused(&SnapshotManifest { id: C.to_owned(), ..good.clone() }, true);
    refused(&SnapshotManifest { disk_bytes: 512, ..good.clone() }, true);
    refused(&SnapshotManifest { memory: Mebibytes::new(2), ..good.clone() }, true);
    let packed = LayerInfo { kind: LayerKind::Packed, ..good.layers[0] };
    refused(&SnapshotManifest { layers: vec![packed], ..good.clone() }, true);

    // A sync left out.
    let staging = store.stage_snapshot(B).unwrap();
    staging.link_layers(&layers).unwrap();
    let mut jobs = staging.prepare(&good).unwrap();
    assert_eq!(jobs.len(), 3);
    drop(jobs.pop());
    let done = jobs.into_iter().map(|job| job.run().unwrap()).collect();
    assert!(matches!(staging.commit(good, done), Err(StorageError::Describe { .. })));
    assert_eq!(names_in(&dir.join("snapshots")), [A]);
}
