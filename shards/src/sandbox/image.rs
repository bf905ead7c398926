//! Snapshots as shards restore from them: opened once, with the plan worked out.
//!
//! Called when a sandbox is prepared and when one is rolled back. Kept by each shard for as many
//! names as [`IMAGES_MAX`]; what is open stays usable when the snapshot is deleted. Refuses to
//! decide what a name stands for without asking the store: a template may have been replaced.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use mica_numa::memfd::extents;
use mica_storage::{
    Layer, LayerKind, OpenSnapshot, Piece, RunTable, Snapshot, SnapshotKind, SnapshotManifest,
    Stamp, merge,
};
use mica_units::{FrameRun, Mebibytes, PAGE_BYTES, frames_of};
use mica_wire::vm::plan::{self, Entry, PlanError, Source};

use super::memory::overlay;
use crate::shell::Size;

/// Names whose snapshots one shard keeps open.
const IMAGES_MAX: usize = 64;

/// Above so many mappings, small runs are copied instead: each mapping costs the kernel a structure
/// and every fault a longer search, and a process may have 65,530.
const MAPPINGS_MAX: usize = 4096;

/// Holes below this many pages are mapped with what is around them.
const SMALL_HOLE_PAGES: u32 = 64;

/// Runs below this many pages count as small.
const SMALL_RUN_PAGES: u32 = 16;

/// A snapshot, open.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) snapshot: Snapshot,
    pub(crate) manifest: SnapshotManifest,
    pub(crate) layers: Vec<Layer>,
    pub(crate) disk: Option<Arc<File>>,
    /// What its memory consists of.
    pub(crate) pieces: Vec<Piece>,
    /// What of that a shell maps, or shows the same as if it did. The rest lies copied over it.
    pub(crate) mapped: Vec<Piece>,
    /// The plan for a shell.
    pub(crate) plan: Vec<u8>,
    /// What guests of it touch first, where that is known.
    pub(crate) working_set: Option<Vec<FrameRun>>,
    /// The node's copy of the base, once it is there; none once it is known that there will be none.
    pub(crate) replica: OnceLock<Option<OwnedFd>>,
    /// Whether it was begun to be brought into memory.
    pub(crate) brought_in: AtomicBool,
    /// Whether somebody notes its working set.
    pub(crate) noted: AtomicBool,
}

impl Opened {
    /// Works the plan of a snapshot out.
    pub(crate) fn new(opened: OpenSnapshot) -> Result<Self, PlanError> {
        let OpenSnapshot { snapshot, layers, disk } = opened;
        let manifest = snapshot.manifest().clone();
        let pieces = pieces_of(&layers, frames_of(manifest.memory));
        let entries = lay_out(&pieces, frames_of(manifest.memory));
        let mapped = mapped_by(&entries);
        let plan =
            plan::encode(&without_holes(entries, &data_of(layers.first(), manifest.memory)))?;
        let working_set = snapshot.working_set();
        Ok(Self {
            snapshot,
            manifest,
            layers,
            disk,
            pieces,
            mapped,
            plan,
            working_set,
            replica: OnceLock::new(),
            brought_in: AtomicBool::new(false),
            noted: AtomicBool::new(false),
        })
    }

    /// The shell it needs.
    pub(crate) fn size(&self) -> Size {
        let SnapshotManifest { vcpus, memory, .. } = self.manifest;
        Size { vcpus, memory, disk: self.disk.is_some() }
    }

    /// The layers, as they go beside a restore.
    pub(crate) fn layer_fds(&self) -> Vec<BorrowedFd<'_>> {
        let mut fds: Vec<BorrowedFd<'_>> =
            self.layers.iter().map(|layer| layer.file().as_fd()).collect();
        if let (Some(base), Some(Some(replica))) = (fds.first_mut(), self.replica.get()) {
            *base = replica.as_fd();
        }
        fds
    }

    /// Bytes of the files of its memory, a rough measure of what it takes to hold it.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.info().file_bytes).sum()
    }
}

/// What memory on these layers consists of.
pub(crate) fn pieces_of(layers: &[Layer], frames: u32) -> Vec<Piece> {
    let tables: Vec<&RunTable> = layers.iter().map(|layer| &**layer.table()).collect();
    merge(&tables, frames)
}

/// A plan for a shell: the base as one mapping where it is one, and what lies over it.
fn lay_out(pieces: &[Piece], frames: u32) -> Vec<Entry> {
    let is_base = |piece: &&Piece| piece.layer == 0 && piece.page == piece.run.first();
    let flat_base = pieces.iter().any(|piece| is_base(&piece));
    let mut entries = Vec::new();
    if let Some(run) = FrameRun::new(0, frames).filter(|_| flat_base) {
        entries.push(Entry { run, source: Source::Map { layer: 0, page: 0 } });
    }
    let over = pieces.iter().filter(|piece| !(flat_base && is_base(piece)));
    entries.extend(over.filter_map(|piece| {
        let layer = u8::try_from(piece.layer).ok()?;
        Some(Entry { run: piece.run, source: Source::Map { layer, page: piece.page } })
    }));
    spare_mappings(0, &mut entries);
    entries
}

/// The runs of a flat base that hold something. Empty where that cannot be told.
fn data_of(base: Option<&Layer>, memory: Mebibytes) -> Vec<FrameRun> {
    let bytes = u64::from(frames_of(memory)) * PAGE_BYTES;
    let flat = base.filter(|base| base.info().kind == LayerKind::Flat);
    let extents = flat.map(|base| extents(base.file(), bytes)).transpose().unwrap_or_default();
    let mut runs: Vec<FrameRun> = Vec::new();
    for extent in extents.unwrap_or_default() {
        let (Ok(first), Ok(end)) = (
            u32::try_from(extent.offset / PAGE_BYTES),
            u32::try_from((extent.offset + extent.bytes).div_ceil(PAGE_BYTES)),
        ) else {
            return Vec::new();
        };
        match runs.last_mut().filter(|last| first.saturating_sub(last.end()) < SMALL_HOLE_PAGES) {
            Some(last) => *last = FrameRun::new(last.first(), end - last.first()).unwrap_or(*last),
            None => runs.extend(FrameRun::new(first, end.saturating_sub(first))),
        }
    }
    runs
}

/// A plan whose base is mapped only where it holds something: what it lies on is zero, too. A page of a hole
/// is one more page of the file's once a guest touches it, and it is the guest that pays for both.
fn without_holes(entries: Vec<Entry>, data: &[FrameRun]) -> Vec<Entry> {
    let Some((base, over)) = entries.split_first() else { return entries };
    let whole = Source::Map { layer: 0, page: 0 };
    if base.source != whole || base.run.first() != 0 || data.is_empty() {
        return entries;
    }
    if data.len() + over.len() > MAPPINGS_MAX {
        return entries;
    }
    let map =
        |run: &FrameRun| Entry { run: *run, source: Source::Map { layer: 0, page: run.first() } };
    data.iter().map(map).chain(over.iter().copied()).collect()
}

/// What a plan of [`lay_out`] maps: a base, and over it what is in order.
fn mapped_by(entries: &[Entry]) -> Vec<Piece> {
    let mut maps = entries.iter().filter_map(|entry| match entry.source {
        Source::Map { layer, page } => Some(Piece { run: entry.run, layer: layer.into(), page }),
        _ => None,
    });
    let first: Vec<Piece> = maps.next().into_iter().collect();
    overlay(&first, maps.collect())
}

/// Where these and the mappings that are there are too many, small runs are copied.
pub(crate) fn spare_mappings(there: usize, entries: &mut [Entry]) {
    if there + entries.len() <= MAPPINGS_MAX {
        return;
    }
    for entry in entries {
        if let Source::Map { layer, page } = entry.source
            && entry.run.count() < SMALL_RUN_PAGES
        {
            entry.source = Source::Copy { layer, page };
        }
    }
}

/// An image under the name that it was asked for by.
#[derive(Debug)]
struct Kept {
    name: String,
    image: Arc<Opened>,
    /// Tells that the name still stands for it.
    stamp: Option<Stamp>,
}

/// The images of one shard by what clients asked for, the last used ones at the end.
#[derive(Debug, Default)]
pub(crate) struct Images(RefCell<Vec<Kept>>);

impl Images {
    /// What was last found for this name or id. The store has to say whether it still is.
    pub(crate) fn get(&self, asked: &str) -> Option<Arc<Opened>> {
        let mut images = self.0.borrow_mut();
        let at = images.iter().position(|kept| kept.name == asked)?;
        let kept = images.remove(at);
        let image = Arc::clone(&kept.image);
        images.push(kept);
        Some(image)
    }

    /// The same, where the store need not be asked: nothing has changed since. Does not wait for a
    /// device.
    pub(crate) fn get_unchanged(&self, asked: &str) -> Option<Arc<Opened>> {
        let images = self.0.borrow();
        let kept = images.iter().find(|kept| kept.name == asked)?;
        let holds = kept.stamp.as_ref().is_some_and(Stamp::holds);
        drop(images);
        if holds { self.get(asked) } else { None }
    }

    /// Keeps what was found. What a paused sandbox waits in is started from once.
    pub(crate) fn keep(&self, asked: &str, image: &Arc<Opened>, stamp: Option<Stamp>) {
        if image.manifest.kind == SnapshotKind::Pause {
            return;
        }
        let mut images = self.0.borrow_mut();
        images.retain(|kept| kept.name != asked);
        if images.len() >= IMAGES_MAX {
            images.remove(0);
        }
        images.push(Kept { name: asked.to_owned(), image: Arc::clone(image), stamp });
    }

    /// Lets a deleted snapshot go: its files take room on the disk as long as they are open.
    pub(crate) fn forget(&self, id: &str) {
        self.0.borrow_mut().retain(|kept| kept.image.manifest.id != id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(first: u32, count: u32, layer: usize, page: u32) -> Piece {
        Piece { run: FrameRun::new(first, count).unwrap(), layer, page }
    }

    #[test]
    fn a_flat_base_is_one_mapping_and_the_rest_lies_on_it() {
        let pieces = [piece(0, 10, 0, 0), piece(10, 2, 1, 0), piece(12, 88, 0, 12)];
        let entries = lay_out(&pieces, 100);
        let map = |layer, page| Source::Map { layer, page };
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0], Entry { run: FrameRun::new(0, 100).unwrap(), source: map(0, 0) });
        assert_eq!(entries[1], Entry { run: FrameRun::new(10, 2).unwrap(), source: map(1, 0) });
    }

    #[test]
    fn where_there_are_too_many_runs_small_ones_are_copied() {
        let frames = 4 * 5000;
        let mut pieces: Vec<Piece> = (0..5000).map(|n| piece(4 * n, 1, 1, n)).collect();
        pieces.push(piece(frames, 20, 1, 5000));
        let entries = lay_out(&pieces, frames + 20);
        let copies =
            entries.iter().filter(|entry| matches!(entry.source, Source::Copy { .. })).count();
        assert_eq!(copies, 5000);
        let last = entries.last().unwrap();
        assert_eq!(last.source, Source::Map { layer: 1, page: 5000 });
    }

    #[test]
    fn holes_of_a_base_are_not_mapped() {
        let map = |first: u32, count: u32, layer: u8, page: u32| Entry {
            run: FrameRun::new(first, count).unwrap(),
            source: Source::Map { layer, page },
        };
        let data = [FrameRun::new(3, 4).unwrap(), FrameRun::new(90, 10).unwrap()];
        let planned = without_holes(vec![map(0, 100, 0, 0), map(50, 1, 1, 9)], &data);
        assert_eq!(planned, [map(3, 4, 0, 3), map(90, 10, 0, 90), map(50, 1, 1, 9)]);
        let packed = vec![map(4, 2, 0, 0), map(50, 1, 1, 9)];
        assert_eq!(without_holes(packed.clone(), &data), packed);
    }

    #[test]
    fn what_is_copied_is_not_taken_for_what_is_mapped() {
        let base = |first, count| piece(first, count, 0, first);
        let few = [base(0, 4), piece(4, 1, 1, 7), base(5, 5)];
        assert_eq!(mapped_by(&lay_out(&few, 10)), few);
        let many: Vec<Piece> =
            (0..5000).flat_map(|n| [base(4 * n, 3), piece(4 * n + 3, 1, 1, n)]).collect();
        assert_eq!(mapped_by(&lay_out(&many, 20_000)), [base(0, 20_000)]);
    }
}
