//! The arithmetic against arrays of frames, and the format against damage.

use std::fs::File;

use mica_units::{FRAMES_MAX, FrameRun};
use proptest::prelude::*;

use super::*;
use crate::testing::TempDir;
use crate::writer::{BlockingFile, FlatWriter, PackedWriter, run_blocking};

fn run(first: u32, count: u32) -> FrameRun {
    FrameRun::new(first, count).unwrap()
}

const FRAMES: u32 = 200;

/// Runs in ascending order without overlap, from lengths of gaps and of runs.
fn runs() -> impl Strategy<Value = Vec<FrameRun>> {
    prop::collection::vec((0u32..9, 1u32..40), 0..12).prop_map(|lengths| {
        let mut at = 0;
        let mut runs = Vec::new();
        for (gap, count) in lengths {
            runs.push(run(at + gap, count));
            at += gap + count;
        }
        runs
    })
}

/// A table whose runs lie in the file in any order.
fn table() -> impl Strategy<Value = RunTable> {
    (runs(), any::<u64>()).prop_map(|(runs, seed)| {
        let mut order: Vec<usize> = (0..runs.len()).collect();
        order.sort_by_key(|index| (*index as u64 + 1).wrapping_mul(seed | 1));
        let mut page = 0;
        let mut extents = Vec::new();
        for index in order {
            extents.push(Extent { run: runs[index], page });
            page += runs[index].count();
        }
        RunTable::new(extents, page).unwrap()
    })
}

/// Where each frame comes from, one by one.
fn model(tables: &[RunTable], frames: u32) -> Vec<Option<(usize, u32)>> {
    let mut array = vec![None; frames as usize];
    for (layer, table) in tables.iter().enumerate() {
        for extent in table.extents() {
            for n in 0..extent.run.count() {
                if let Some(frame) = array.get_mut((extent.run.first() + n) as usize) {
                    *frame = Some((layer, extent.page + n));
                }
            }
        }
    }
    array
}

fn unrolled(pieces: &[Piece], frames: u32) -> Vec<Option<(usize, u32)>> {
    let mut array = vec![None; frames as usize];
    let mut end = 0;
    for piece in pieces {
        assert!(piece.run.first() >= end, "out of order: {pieces:?}");
        end = piece.run.end();
        for n in 0..piece.run.count() {
            array[(piece.run.first() + n) as usize] = Some((piece.layer, piece.page + n));
        }
    }
    array
}

fn assert_joined(pieces: &[Piece]) {
    for pair in pieces.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        let goes_on =
            a.layer == b.layer && a.run.end() == b.run.first() && a.page + a.run.count() == b.page;
        assert!(!goes_on, "{a:?} and {b:?} are one piece");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() })]

    #[test]
    fn merging_is_laying_arrays_over_one_another(
        mut tables in prop::collection::vec(table(), 0..6),
        flat in any::<bool>(),
    ) {
        if flat {
            tables.insert(0, RunTable::flat(FRAMES).unwrap());
        }
        let pieces = merge(&tables.iter().collect::<Vec<_>>(), FRAMES);
        prop_assert_eq!(unrolled(&pieces, FRAMES), model(&tables, FRAMES));
        assert_joined(&pieces);
        if flat {
            prop_assert_eq!(pieces.iter().map(|p| p.run.count()).sum::<u32>(), FRAMES);
        }
    }

    #[test]
    fn restricting_keeps_what_is_in_both(
        tables in prop::collection::vec(table(), 1..5),
        wanted in runs(),
    ) {
        let pieces = merge(&tables.iter().collect::<Vec<_>>(), FRAMES);
        let some = restrict(&pieces, &wanted);
        let mut expected = model(&tables, FRAMES);
        for (frame, source) in (0u32..).zip(expected.iter_mut()) {
            if !wanted.iter().any(|run| (run.first()..run.end()).contains(&frame)) {
                *source = None;
            }
        }
        prop_assert_eq!(unrolled(&some, FRAMES), expected);
    }

    #[test]
    fn coalescing_fills_small_gaps_and_no_others(dirty in runs(), gap in 0u32..20) {
        let out = coalesce(&dirty, gap);
        for pair in out.windows(2) {
            prop_assert!(pair[1].first() - pair[0].end() > gap, "{:?}", pair);
        }
        let mut before = [false; 640];
        let mut filled = before;
        for run in &dirty {
            before[run.first() as usize..run.end() as usize].fill(true);
        }
        for run in &out {
            filled[run.first() as usize..run.end() as usize].fill(true);
        }
        // The rest is filled exactly where the dirty frames around it are near enough.
        let mut last = None;
        for (frame, dirty) in before.iter().enumerate() {
            if *dirty {
                let from: usize = last.map_or(frame, |last| last + 1);
                let near = frame - from <= gap as usize;
                prop_assert!(filled[from..frame].iter().all(|f| *f == near), "before {}", frame);
                prop_assert!(filled[frame]);
                last = Some(frame);
            }
        }
        prop_assert!(filled[last.map_or(0, |last| last + 1)..].iter().all(|f| !f));
    }

    #[test]
    fn groups_are_full_and_lose_nothing(dirty in runs(), pages in 1u32..50) {
        let cut: Vec<Vec<FrameRun>> = groups(&dirty, pages).collect();
        let sizes: Vec<u32> = cut.iter().map(|g| g.iter().map(|r| r.count()).sum()).collect();
        if let Some((last, full)) = sizes.split_last() {
            prop_assert!(full.iter().all(|size| *size == pages));
            prop_assert!((1..=pages).contains(last));
        }
        let frames = |runs: &mut dyn Iterator<Item = FrameRun>| -> Vec<u32> {
            runs.flat_map(|run| run.first()..run.end()).collect()
        };
        prop_assert_eq!(
            frames(&mut cut.into_iter().flatten()),
            frames(&mut dirty.iter().copied())
        );
    }
}

#[test]
fn one_piece_above_hides_many_runs_below() {
    let below: Vec<Extent> = (0..10).map(|n| Extent { run: run(n * 10, 5), page: n * 5 }).collect();
    let below = RunTable::new(below, 50).unwrap();
    let above = RunTable::new(vec![Extent { run: run(3, 80), page: 0 }], 80).unwrap();
    let pieces = merge(&[&below, &above], 1000);
    assert_eq!(
        pieces,
        [
            Piece { run: run(0, 3), layer: 0, page: 0 },
            Piece { run: run(3, 80), layer: 1, page: 0 },
            Piece { run: run(83, 2), layer: 0, page: 43 },
            Piece { run: run(90, 5), layer: 0, page: 45 },
        ]
    );
}

#[test]
fn tables_that_no_writer_makes_are_refused() {
    let extent = |first, count, page| Extent { run: run(first, count), page };
    assert!(RunTable::new(vec![extent(0, 2, 0), extent(1, 2, 2)], 4).is_err(), "overlap");
    assert!(RunTable::new(vec![extent(0, 2, 0)], 1).is_err(), "past the end");
    assert!(RunTable::new(vec![extent(0, 2, u32::MAX)], u32::MAX).is_err(), "wraps");
    assert!(RunTable::checked(vec![extent(4, 1, 0), extent(0, 1, 1)], 2).is_err(), "order");
    assert!(RunTable::flat(0).is_err());
    assert!(RunTable::flat(FRAMES_MAX + 1).is_err());
    let joined = RunTable::new(vec![extent(2, 2, 2), extent(0, 2, 0), extent(4, 1, 9)], 10);
    assert_eq!(joined.unwrap().extents(), [extent(0, 4, 0), extent(4, 1, 9)]);
}

#[test]
fn frames_beyond_the_guest_are_left_out() {
    let table = RunTable::new(vec![Extent { run: run(5, 10), page: 0 }], 10).unwrap();
    assert_eq!(merge(&[&table], 8), [Piece { run: run(5, 3), layer: 0, page: 0 }]);
    assert_eq!(merge(&[&table], 5), []);
    assert_eq!(merge(&[&table], 0), []);
}

fn id(text: &str) -> LayerId {
    text.parse().unwrap()
}

fn create(path: &Path) -> File {
    File::options().read(true).write(true).create_new(true).open(path).unwrap()
}

/// A packed layer of the frames 1, 2, 3, 20 and 21, filled with the frame's number.
fn packed(dir: &TempDir) -> (LayerInfo, std::path::PathBuf) {
    let id = id("packed0packed0packed");
    let path = dir.join(&id.file_name());
    let mut writer = PackedWriter::new(BlockingFile::new(create(&path)), id, 64);
    let info = run_blocking(async {
        let mut chunk = writer.reserve().await?;
        for (page, frame) in [(0usize, 20u8), (1, 21), (2, 1), (3, 2), (4, 3)] {
            chunk.as_mut()[page * 4096..][..4096].fill(frame);
        }
        writer.push(&[run(20, 2), run(1, 3)], chunk).await?;
        writer.finish().await
    });
    (info.unwrap(), path)
}

fn flat(dir: &TempDir) -> (LayerInfo, std::path::PathBuf) {
    let id = id("flat0flat0flat0flat0");
    let path = dir.join(&id.file_name());
    let mut writer = FlatWriter::new(BlockingFile::new(create(&path)), id, 64);
    let info = run_blocking(async {
        let mut bytes = vec![0; 40 * 4096];
        bytes[4096..8192].fill(7);
        bytes[39 * 4096..].fill(8);
        writer.push(&bytes).await?;
        writer.finish().await
    });
    (info.unwrap(), path)
}

#[test]
fn the_golden_files_are_read_and_written_the_same() {
    let goldens = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens"));
    let dir = TempDir::new();
    for ((info, path), name, tail) in [
        (packed(&dir), "layer-packed-v1.bin", 5 * 4096),
        (flat(&dir), "layer-flat-v1.bin", 64 * 4096),
    ] {
        // The pages are not part of the golden file, only what follows them.
        let written = std::fs::read(&path).unwrap();
        assert_eq!(written.len() as u64, info.file_bytes);
        let written = &written[tail..];
        if std::env::var_os("MICA_WRITE_GOLDENS").is_some() {
            std::fs::write(goldens.join(name), written).unwrap();
            continue;
        }
        assert!(written == std::fs::read(goldens.join(name)).unwrap(), "{name}");
        Layer::open_in(dir.path(), &info).unwrap().verify().unwrap();
    }
}

#[test]
fn layers_are_read_as_they_were_written() {
    let dir = TempDir::new();
    let (info, _) = packed(&dir);
    let layer = Layer::open_in(dir.path(), &info).unwrap();
    assert_eq!((info.frames_held, layer.frames()), (5, 64));
    let expected = [Extent { run: run(1, 3), page: 2 }, Extent { run: run(20, 2), page: 0 }];
    assert_eq!(layer.table().extents(), expected);
    for piece in merge(&[layer.table()], 64) {
        let mut byte = [0];
        layer.file().read_exact_at(&mut byte, u64::from(piece.page) * 4096).unwrap();
        assert_eq!(u32::from(byte[0]), piece.run.first());
    }
    let (info, path) = flat(&dir);
    let layer = Layer::open_in(dir.path(), &info).unwrap();
    assert_eq!(info.frames_held, 2);
    assert_eq!(merge(&[layer.table()], 64), [Piece { run: run(0, 64), layer: 0, page: 0 }]);
    let bytes = std::fs::read(path).unwrap();
    assert_eq!((bytes[0], bytes[4096], bytes[39 * 4096], bytes[40 * 4096]), (0, 7, 8, 0));
}

#[test]
fn every_damaged_byte_is_found() {
    let dir = TempDir::new();
    for (info, path) in [packed(&dir), flat(&dir)] {
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let good = std::fs::read(&path).unwrap();
        let step = 97;
        for at in (0..good.len()).step_by(step).chain(good.len() - 4096..good.len() - 4000) {
            file.write_all_at(&[good[at] ^ 0x10], at as u64).unwrap();
            let opened = Layer::open_in(dir.path(), &info);
            let found = opened.and_then(|layer| layer.verify());
            let found = found.expect_err("the damage was not found");
            assert!(matches!(found, StorageError::Layer { .. }), "byte {at}: {found}");
            file.write_all_at(&good[at..=at], at as u64).unwrap();
        }
        file.set_len(good.len() as u64 - 4096).unwrap();
        assert!(matches!(Layer::open_in(dir.path(), &info), Err(StorageError::Layer { .. })));
    }
}

#[test]
fn a_footer_that_lies_is_refused() {
    let good = Footer {
        kind: LayerKind::Packed,
        id: id("packed0packed0packed"),
        frames: 64,
        frames_held: 5,
        data_pages: 5,
        runs: 1,
        tables_crc: 0,
    };
    assert_eq!(Footer::decode(&good.encode()).unwrap(), good);
    for bad in [
        Footer { frames: 0, ..good },
        Footer { frames: FRAMES_MAX + 1, ..good },
        Footer { data_pages: 64 * (ROUNDS_MAX + 1) + 1, ..good },
        Footer { frames_held: 6, ..good },
        Footer { runs: u32::MAX, ..good },
    ] {
        assert!(matches!(Footer::decode(&bad.encode()), Err(LayerError::Mismatch { .. })));
    }
    // Tables with a right checksum and wrong content.
    let table = |words: [u32; 4]| {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.resize(4096, 0);
        Footer { tables_crc: crc32c::crc32c(&bytes), ..good }.decode_tables(&bytes)
    };
    assert!(table([0, 5, 0, 0]).is_ok());
    for words in [[0, 0, 0, 0], [0, 5, 0, 1], [0, 5, 1, 0], [60, 5, 0, 0], [0, 4, 0, 0]] {
        assert!(matches!(table(words), Err(LayerError::Runs(_))), "{words:?}");
    }
}
