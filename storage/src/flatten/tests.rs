//! Flattened chains hold the same memory, and nobody who has the old layers notices.

use std::os::unix::fs::MetadataExt;

use super::*;
use crate::snapshot::tests::{FRAMES, base, diff, image, memory_of};
use crate::testing::{TempDir, names_in};

const LIMITS: FlattenLimits = FlattenLimits { layers_max: 3, runs_max: 20, flat_percent: 50 };

fn shape(layers: usize, runs: usize, frames_over_base: u32) -> Shape {
    Shape { layers, runs, frames_over_base, frames: 1000 }
}

#[test]
fn the_policy_keeps_its_limits() {
    let cases = [
        (shape(1, 0, 0), FlattenStep::Keep),
        (shape(3, 20, 900), FlattenStep::Keep),
        (shape(4, 20, 499), FlattenStep::Packed),
        (shape(4, 1, 500), FlattenStep::Flat),
        (shape(3, 21, 21), FlattenStep::Flat),
        (shape(2, 21, 21), FlattenStep::Flat),
        (shape(1, 9999, 0), FlattenStep::Keep),
    ];
    for (shape, step) in cases {
        assert_eq!(LIMITS.step(&shape), step, "{shape:?}");
    }
    // Whatever the shape, what comes out needs nothing more.
    for layers in 1..20 {
        for runs in 0..40 {
            for over in [0, 1, 499, 500, 1000] {
                let after = match LIMITS.step(&shape(layers, runs, over)) {
                    FlattenStep::Keep => continue,
                    FlattenStep::Packed => shape(2, runs, over),
                    FlattenStep::Flat => shape(1, 0, 0),
                };
                assert_eq!(LIMITS.step(&after), FlattenStep::Keep, "{layers} {runs} {over}");
            }
        }
    }
}

fn name(n: u32) -> String {
    format!("{n:020}")
}

/// A base and snapshots over it, each of which changes these frames.
fn chain_of(store: &Store, changes: &[(u32, u32, u8)]) -> (Vec<u8>, String) {
    let mut memory = image(1);
    let mut snapshot = base(store, &name(0), &memory, None);
    for (n, change) in (1..).zip(changes) {
        snapshot = diff(store, &name(n), &snapshot.open_layers().unwrap(), &[*change]);
        let (first, count, byte) = *change;
        memory[first as usize * 4096..][..count as usize * 4096].fill(byte);
    }
    (memory, snapshot.manifest().id.clone())
}

#[test]
fn a_long_chain_becomes_two_layers_and_the_old_ones_stay_where_they_are_used() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let changes = [(3, 10, 2), (8, 20, 3), (0, 1, 4), (250, 6, 5), (9, 2, 6)];
    let (memory, id) = chain_of(&store, &changes);
    let before = store.open_snapshot(&id).unwrap().unwrap();
    assert_eq!(before.layers.len(), 6);
    assert_eq!(store.flatten(&id, &FlattenLimits::default()).unwrap(), Flattened::NotNeeded);
    assert_eq!(store.flatten(&id, &LIMITS).unwrap(), Flattened::Done { layers: 2 });
    assert_eq!(store.flatten(&id, &LIMITS).unwrap(), Flattened::NotNeeded);

    let after = store.open_snapshot(&id).unwrap().unwrap();
    assert!(memory_of(&after.layers) == memory);
    for layer in &after.layers {
        layer.verify().unwrap();
    }
    assert_eq!(after.layers[1].info().frames_held, 32);
    let inode = |layer: &Layer| layer.file().metadata().unwrap().ino();
    assert_eq!(inode(&before.layers[0]), inode(&after.layers[0]), "the base is shared as before");
    assert!(memory_of(&before.layers) == memory, "open layers");
    assert!(matches!(before.snapshot.open_layers(), Err(StorageError::SnapshotGone { .. })));
    // The parents have their links, the last diff was this snapshot's own.
    let links = |n: usize| before.layers[n].file().metadata().unwrap().nlink();
    assert_eq!((links(1), links(4), links(5)), (4, 1, 0));
    let home = dir.join("snapshots").join(&id);
    assert_eq!(names_in(&home).len(), 3, "manifest and two layers");
    for n in 1..5 {
        store.open_snapshot(&name(n)).unwrap().unwrap();
    }
}

#[test]
fn much_change_or_many_runs_become_a_base() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let (memory, id) = chain_of(&store, &[(0, 100, 2), (50, 100, 0), (140, 60, 3)]);
    assert_eq!(store.flatten(&id, &LIMITS).unwrap(), Flattened::Done { layers: 1 });
    let after = store.open_snapshot(&id).unwrap().unwrap();
    assert!(memory_of(&after.layers) == memory);
    assert_eq!(after.layers[0].info().kind, LayerKind::Flat);
    after.layers[0].verify().unwrap();
    // Frames that became zero are holes.
    assert!(after.layers[0].info().frames_held < FRAMES - 40);
    assert_eq!(store.flatten(&id, &LIMITS).unwrap(), Flattened::NotNeeded);
}

#[test]
fn damage_is_not_copied_and_what_is_not_there_is_told() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let (_, id) = chain_of(&store, &[(1, 2, 2), (3, 4, 3), (5, 6, 4)]);
    let open = store.open_snapshot(&id).unwrap().unwrap();
    let path = open.snapshot.dir().join(open.layers[2].info().id.file_name());
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(b"x", 4097).unwrap();
    let names = names_in(open.snapshot.dir());
    let error = store.flatten(&id, &LIMITS).unwrap_err();
    assert!(matches!(error, StorageError::Layer { .. }), "{error}");
    assert_eq!(names_in(open.snapshot.dir()), names);
    assert_eq!(store.flatten(&name(9), &LIMITS).unwrap(), Flattened::Gone);
    let held = File::open(open.snapshot.dir()).unwrap();
    rustix::fs::flock(&held, FlockOperation::LockExclusive).unwrap();
    assert_eq!(store.flatten(&id, &LIMITS).unwrap(), Flattened::Busy);
}
