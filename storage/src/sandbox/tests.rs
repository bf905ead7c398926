//! Sandboxes' files through the life of a daemon, and through the next one's start.

use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;
use crate::testing::{TempDir, names_in};
use crate::writer::{BlockingFile, PackedWriter, run_blocking};

fn sandbox(n: u8) -> SandboxId {
    SandboxId::from_random([n; mica_units::SANDBOX_ID_CHARS])
}

fn disk_of(dir: &TempDir, name: &str, content: &[u8]) -> File {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_sandbox_is_made_once_and_removed_whole() {
    let dir = TempDir::new();
    let store = Store::open(&dir.join("store")).unwrap();
    let source = disk_of(&dir, "source", &[1; 8192]);
    let disk = store.create_sandbox(&sandbox(1), Some(&source)).unwrap().unwrap();
    assert_eq!(content(&disk), [1; 8192]);
    assert!(store.create_sandbox(&sandbox(2), None).unwrap().is_none());
    assert!(store.open_sandbox_disk(&sandbox(2)).unwrap().is_none());
    let again = store.create_sandbox(&sandbox(1), None).unwrap_err();
    assert!(matches!(again, StorageError::SandboxExists(_)), "{again}");
    let found = store.open_sandbox_disk(&sandbox(1)).unwrap().unwrap();
    assert_eq!(found.metadata().unwrap().ino(), disk.metadata().unwrap().ino());
    store.remove_sandbox(&sandbox(1)).unwrap();
    store.remove_sandbox(&sandbox(1)).unwrap();
    assert_eq!(names_in(&dir.join("store/sandboxes")), [sandbox(2).as_str()]);
}

#[test]
fn a_disk_is_rolled_back_in_place() {
    let dir = TempDir::new();
    let store = Store::open(&dir.join("store")).unwrap();
    let snapshot = disk_of(&dir, "snapshot", &[0; 1 << 20]);
    snapshot.set_len(0).unwrap();
    snapshot.set_len(1 << 20).unwrap();
    snapshot.write_all_at(&[1; 4096], 4096).unwrap();
    let disk = store.create_sandbox(&sandbox(1), Some(&snapshot)).unwrap().unwrap();
    let inode = disk.metadata().unwrap().ino();
    disk.write_all_at(&[9; 65536], 0).unwrap();
    disk.write_all_at(&[9; 65536], 500_000).unwrap();
    store.reclone_disk(&snapshot, &disk).unwrap();
    assert!(content(&disk) == content(&snapshot), "what was written shows through");
    let now = store.open_sandbox_disk(&sandbox(1)).unwrap().unwrap();
    assert_eq!(now.metadata().unwrap().ino(), inode, "the VM process would write to another file");
    let longer = disk_of(&dir, "longer", &[0; 2 << 20]);
    assert!(store.reclone_disk(&longer, &disk).is_err());
    assert!(content(&disk) == content(&snapshot), "a refusal changes nothing");
}

/// A packed layer of one frame, in a file that is not in the store.
fn layer(dir: &TempDir, id: &str) -> Layer {
    let id: LayerId = id.parse().unwrap();
    let path = dir.join(&id.file_name());
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    let mut writer = PackedWriter::new(BlockingFile::new(file), id, 16);
    let info = run_blocking(async {
        let chunk = writer.reserve().await?;
        writer.push(&[mica_units::FrameRun::new(3, 1).unwrap()], chunk).await?;
        writer.finish().await
    });
    Layer::open_in(dir.path(), &info.unwrap()).unwrap()
}

#[test]
fn layers_stay_while_a_sandbox_runs_on_them() {
    let dir = TempDir::new();
    let store = Store::open(&dir.join("store")).unwrap();
    let all: Vec<Layer> =
        ["1", "2", "3"].map(|digit| layer(&dir, &digit.repeat(20))).into_iter().collect();
    store.create_sandbox(&sandbox(1), None).unwrap();
    store.link_lineage(&sandbox(1), &all[..2]).unwrap();
    store.link_lineage(&sandbox(1), &all[..2]).unwrap();
    for layer in &all {
        std::fs::remove_file(dir.join(&layer.info().id.file_name())).unwrap();
    }
    let infos: Vec<LayerInfo> = all.iter().map(|layer| *layer.info()).collect();
    let found = store.open_lineage(&sandbox(1), &infos[..2]).unwrap();
    assert_eq!(found[1].info(), &infos[1]);
    assert_eq!(found[1].file().metadata().unwrap().ino(), all[1].file().metadata().unwrap().ino());
    assert!(store.open_lineage(&sandbox(1), &infos).is_err(), "the third was never kept");
    let gone = store.link_lineage(&sandbox(1), &all).unwrap_err();
    assert!(matches!(gone, StorageError::LayerGone { id } if id == all[2].info().id), "{gone}");
    let nobody = store.link_lineage(&sandbox(2), &all[..1]).unwrap_err();
    assert!(matches!(nobody, StorageError::Io { .. }), "no such sandbox: {nobody}");
    store.link_lineage(&sandbox(1), &all[..1]).unwrap();
    assert_eq!(all[0].file().metadata().unwrap().nlink(), 1);
    assert_eq!(all[1].file().metadata().unwrap().nlink(), 0, "it was let go");
    store.remove_sandbox(&sandbox(1)).unwrap();
    assert_eq!(all[0].file().metadata().unwrap().nlink(), 0);
}

#[test]
fn records_are_replaced_and_found_by_the_next_daemon() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    for n in 1..=3 {
        store.create_sandbox(&sandbox(n), None).unwrap();
    }
    store.write_record(&sandbox(1), b"one", false).unwrap();
    store.write_record(&sandbox(2), b"two", true).unwrap();
    // A write that was cut off before.
    std::fs::write(dir.join("sandboxes").join(sandbox(1).as_str()).join("record.new"), "x")
        .unwrap();
    store.write_record(&sandbox(1), b"one, longer", true).unwrap();
    let too_long = vec![0; SANDBOX_RECORD_BYTES_MAX + 1];
    assert!(store.write_record(&sandbox(1), &too_long, false).is_err());
    assert!(store.write_record(&sandbox(9), b"nobody", false).is_err());
    drop(store);

    let store = Store::open(dir.path()).unwrap();
    let mut records = store.records().unwrap();
    records.sort();
    assert_eq!(
        records,
        [(sandbox(1), b"one, longer".to_vec()), (sandbox(2), b"two".to_vec())],
        "the third has none"
    );
    std::fs::write(dir.join("sandboxes/rubbish"), "x").unwrap();
    let adopted = std::iter::once(sandbox(2)).collect();
    assert_eq!(store.sweep_sandboxes_but(&adopted).unwrap(), 3);
    assert_eq!(names_in(&dir.join("sandboxes")), [sandbox(2).as_str()]);
    assert_eq!(store.sweep_sandboxes().unwrap(), 1);
}
