//! The hint is read as it was written, or not at all; the plan reads whole blocks of what is there.

use proptest::prelude::*;

use super::*;
use crate::layer::{Extent, RunTable, merge};
use crate::snapshot::tests::{FRAMES, manifest};
use crate::testing::TempDir;
use crate::writer::{BlockingFile, FlatWriter, run_blocking};

fn run(first: u32, count: u32) -> FrameRun {
    FrameRun::new(first, count).unwrap()
}

#[test]
fn a_working_set_is_kept_replaced_and_never_half_read() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let id = "a".repeat(20);
    let staging = store.stage_snapshot(&id).unwrap();
    let (layer, file) = staging.create_layer().unwrap();
    let writer = FlatWriter::new(BlockingFile::new(file), layer, FRAMES);
    let info = run_blocking(writer.finish()).unwrap();
    let snapshot = staging.seal(manifest(&id, vec![info])).unwrap();
    assert_eq!(snapshot.working_set(), None);
    for runs in [vec![], vec![run(0, 1), run(5, 7)], vec![run(3, 200)]] {
        store.write_working_set(&snapshot, &runs).unwrap();
        assert_eq!(snapshot.working_set(), Some(runs));
    }
    let path = dir.join("snapshots").join(&id).join("working-set");
    let good = std::fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&path, bad).unwrap();
        assert_eq!(snapshot.working_set(), None, "byte {at}");
        std::fs::write(&path, &good[..at]).unwrap();
        assert_eq!(snapshot.working_set(), None, "cut at {at}");
    }
    let too_many: Vec<FrameRun> = (0..=65_536).map(|n| run(n * 2, 1)).collect();
    assert!(store.write_working_set(&snapshot, &too_many).is_err());
    assert!(store.write_working_set(&snapshot, &too_many[1..]).is_ok());
    assert_eq!(snapshot.working_set().unwrap().len(), WORKING_SET_RUNS_MAX);
}

#[test]
fn runs_out_of_order_are_none() {
    let bytes = |runs: &[FrameRun]| encode(runs);
    assert!(decode(&bytes(&[run(4, 2), run(6, 1)])).is_some());
    assert!(decode(&bytes(&[run(4, 2), run(5, 1)])).is_none());
    assert!(decode(&bytes(&[run(4, 2), run(0, 1)])).is_none());
    assert!(decode(&[0; 8]).is_none(), "empty");
    assert!(decode(&[0xff; 8]).is_none(), "wraps");
    assert!(decode(&[0; 7]).is_none());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn every_wanted_frame_is_read_once_in_whole_blocks(
        wanted in prop::collection::vec((0u32..30, 1u32..9), 0..12),
        diff in prop::collection::vec((0u32..30, 1u32..20), 0..8),
        frames_max in 1u32..40,
    ) {
        let place = |lengths: &[(u32, u32)]| {
            let mut at = 0;
            let runs = lengths.iter().map(|(gap, count)| {
                at += gap + count;
                run(at - count, *count)
            });
            runs.filter(|run| run.end() <= 500).collect::<Vec<_>>()
        };
        let (wanted, diff) = (place(&wanted), place(&diff));
        let mut page = 0;
        let extents = diff.iter().map(|run| {
            page += run.count();
            Extent { run: *run, page: page - run.count() }
        });
        let top = RunTable::new(extents.collect(), 500).unwrap();
        let pieces = merge(&[&RunTable::flat(500).unwrap(), &top], 500);
        let mut read = vec![0; 500];
        for piece in prefetch_plan(&pieces, &wanted, frames_max) {
            prop_assert!(piece.run.count() <= frames_max);
            for n in 0..piece.run.count() {
                let frame = piece.run.first() + n;
                read[frame as usize] += 1;
                let from = pieces.iter().find(|p| p.run.intersection(run(frame, 1)).is_some());
                let from = from.unwrap();
                prop_assert_eq!(piece.layer, from.layer);
                prop_assert_eq!(piece.page + n, from.page + (frame - from.run.first()));
            }
        }
        for (block, read) in read.chunks(16).enumerate() {
            let first = u32::try_from(block).unwrap() * 16;
            let hit = wanted.iter().any(|w| w.intersection(run(first, 16)).is_some());
            prop_assert!(read.iter().all(|times| *times == i32::from(hit)), "block {}", block);
        }
    }
}
