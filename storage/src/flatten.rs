//! Flattening: a snapshot with many layers gets fewer that hold the same memory.
//!
//! Called by shards in the background, on a thread that may block. Refuses to copy pages whose
//! checksum is wrong, so that damage is never sealed under a new one. Whoever has the old layers open
//! or linked (sandboxes, children) is not affected: they keep them.
//!
//! ```text
//!   new layer written and synced            beside the old ones, under a name of its own
//!   manifest.new written and synced
//!   directory synced                        now every name the new manifest needs is there
//!   manifest.new → manifest                 the commit; before it the old layers count, after it the new
//!   directory synced
//!   old layers' names removed               a start removes what a stop leaves of them
//! ```

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use mica_units::{FrameRun, PAGE_BYTES};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::error::{Result, StorageError};
use crate::layer::{Layer, LayerId, LayerInfo, LayerKind, PAGE, Piece, merge, restrict};
use crate::snapshot::{MANIFEST_NEW, Snapshot, SnapshotManifest};
use crate::store::{Store, chain};
use crate::template::MANIFEST_FILE;
use crate::writer::{BlockingFile, FlatWriter, PackedWriter, run_blocking};

/// Frames that are copied at once: 1 MiB.
const WINDOW_FRAMES: u32 = 256;

/// When a snapshot is flattened, and into what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlattenLimits {
    /// Most layers of a snapshot, the base included.
    pub layers_max: usize,
    /// Most runs that a restore has to map or copy over the base.
    pub runs_max: usize,
    /// From this share of its memory being over the base on, a snapshot gets a base of its own.
    pub flat_percent: u32,
}

impl Default for FlattenLimits {
    /// A restore with these costs little more than one from a single layer.
    fn default() -> Self {
        Self { layers_max: 6, runs_max: 8192, flat_percent: 50 }
    }
}

/// What a chain of layers looks like to a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Layers, the base included.
    pub layers: usize,
    /// Runs over the base, once what is hidden is left out.
    pub runs: usize,
    /// Frames in those runs.
    pub frames_over_base: u32,
    /// Frames of the guest.
    pub frames: u32,
}

/// What to make of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlattenStep {
    /// Nothing.
    Keep,
    /// The base as it is, and one packed layer.
    Packed,
    /// One flat layer.
    Flat,
}

/// What [`Store::flatten`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flattened {
    /// It is within its limits.
    NotNeeded,
    /// Somebody else is flattening it just now.
    Busy,
    /// There is no such snapshot, or it was deleted meanwhile.
    Gone,
    /// It has this many layers now.
    Done {
        /// Layers, the base included.
        layers: usize,
    },
}

impl Shape {
    /// The shape of these layers, the base first.
    #[must_use]
    pub fn of(layers: &[Layer]) -> Self {
        let over = over_base(layers);
        Self {
            layers: layers.len(),
            runs: over.len(),
            frames_over_base: over.iter().map(|piece| piece.run.count()).sum(),
            frames: layers.first().map_or(0, Layer::frames),
        }
    }
}

impl FlattenLimits {
    /// What is to be done with a chain of this shape.
    #[must_use]
    pub fn step(&self, shape: &Shape) -> FlattenStep {
        if shape.layers <= 1 || (shape.layers <= self.layers_max && shape.runs <= self.runs_max) {
            return FlattenStep::Keep;
        }
        let share = u64::from(shape.frames_over_base) * 100;
        let large = share >= u64::from(shape.frames) * u64::from(self.flat_percent);
        // Packing joins no runs that are apart, so too many stay too many.
        if large || shape.runs > self.runs_max || shape.layers == 2 {
            return FlattenStep::Flat;
        }
        FlattenStep::Packed
    }
}

/// What lies over the base. The pieces name layers as `layers` does.
fn over_base(layers: &[Layer]) -> Vec<Piece> {
    let Some((base, diffs)) = layers.split_first() else { return Vec::new() };
    let tables: Vec<_> = diffs.iter().map(|layer| layer.table().as_ref()).collect();
    let mut pieces = merge(&tables, base.frames());
    for piece in &mut pieces {
        piece.layer += 1;
    }
    pieces
}

impl Store {
    /// Flattens a snapshot if it is over its limits. Takes as long as copying what it changes.
    ///
    /// # Errors
    /// When a layer is damaged or the file system fails; the snapshot is as it was then.
    pub fn flatten(&self, id: &str, limits: &FlattenLimits) -> Result<Flattened> {
        // Keeps a start of another process from taking the new layer for a leftover.
        let _lock = self.snapshots_lock(FlockOperation::LockShared)?;
        match self.flatten_found(id, limits) {
            Err(StorageError::SnapshotGone { .. }) => Ok(Flattened::Gone),
            Err(error) if error.is_not_found() => Ok(Flattened::Gone),
            other => other,
        }
    }

    fn flatten_found(&self, id: &str, limits: &FlattenLimits) -> Result<Flattened> {
        let dir = self.snapshots_dir().join(id);
        let opened = File::open(&dir).map_err(|e| StorageError::io("open", &dir, e))?;
        match rustix::fs::flock(&opened, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(Flattened::Busy),
            Err(error) => return Err(StorageError::io("lock", &dir, error.into())),
        }
        let Some(snapshot) = self.read_snapshot(id)? else { return Ok(Flattened::Gone) };
        let layers = snapshot.open_layers()?;
        let step = limits.step(&Shape::of(&layers));
        if step == FlattenStep::Keep {
            return Ok(Flattened::NotNeeded);
        }
        for layer in &layers {
            // The base is copied into a flat layer only.
            if step == FlattenStep::Flat || layer.info().kind == LayerKind::Packed {
                layer.verify()?;
            }
        }
        self.replace_layers(&snapshot, &layers, step)
    }

    fn replace_layers(
        &self,
        snapshot: &Snapshot,
        layers: &[Layer],
        step: FlattenStep,
    ) -> Result<Flattened> {
        let dir = snapshot.dir();
        let id = LayerId::random().map_err(|e| StorageError::io("draw a random id in", dir, e))?;
        let prepared = self.write_layer(dir, id, layers, step).and_then(|info| {
            let mut kept: Vec<LayerInfo> = match step {
                FlattenStep::Packed => layers.iter().take(1).map(|base| *base.info()).collect(),
                FlattenStep::Flat | FlattenStep::Keep => Vec::new(),
            };
            kept.push(info);
            let manifest = SnapshotManifest { layers: kept, ..snapshot.manifest().clone() };
            self.write_new_manifest(dir, &manifest)?;
            Ok(manifest)
        });
        let manifest = match prepared {
            Ok(manifest) => manifest,
            Err(error) => {
                self.remove_quietly(&dir.join(id.file_name()));
                self.remove_quietly(&dir.join(MANIFEST_NEW));
                return Err(error);
            }
        };
        // From here on both manifests may be the one on the device, so both sets of layers stay until
        // the new one is known to be.
        self.disk.replace(dir, &dir.join(MANIFEST_NEW), &dir.join(MANIFEST_FILE))?;
        let needed: BTreeSet<LayerId> = manifest.layers.iter().map(|info| info.id).collect();
        for layer in layers.iter().filter(|layer| !needed.contains(&layer.info().id)) {
            self.remove_quietly(&dir.join(layer.info().id.file_name()));
        }
        Ok(Flattened::Done { layers: manifest.layers.len() })
    }

    fn write_new_manifest(&self, dir: &Path, manifest: &SnapshotManifest) -> Result<()> {
        let bytes = manifest.encode().map_err(|source| StorageError::Describe { source })?;
        let path = dir.join(MANIFEST_NEW);
        self.disk.remove_file_if_there(&path)?;
        self.disk.write_file(&path, &bytes)?;
        self.disk.sync_dir(dir)
    }

    fn write_layer(
        &self,
        dir: &Path,
        id: LayerId,
        layers: &[Layer],
        step: FlattenStep,
    ) -> Result<LayerInfo> {
        let path = dir.join(id.file_name());
        let file = BlockingFile::on(self.disk.clone(), self.disk.create_direct(&path)?, path);
        let frames = layers.first().map_or(0, Layer::frames);
        match step {
            FlattenStep::Flat => {
                let tables: Vec<_> = layers.iter().map(|layer| layer.table().as_ref()).collect();
                let pieces = merge(&tables, frames);
                run_blocking(write_flat(FlatWriter::new(file, id, frames), layers, &pieces, frames))
            }
            FlattenStep::Packed | FlattenStep::Keep => {
                let writer = PackedWriter::new(file, id, frames);
                run_blocking(write_packed(writer, layers, &over_base(layers)))
            }
        }
    }

    fn remove_quietly(&self, path: &Path) {
        if let Err(error) = self.disk.remove_file_if_there(path) {
            tracing::warn!(error = %chain(&error), "the next start will try to remove it again");
        }
    }
}

async fn write_packed(
    mut writer: PackedWriter<BlockingFile>,
    layers: &[Layer],
    pieces: &[Piece],
) -> Result<LayerInfo> {
    let pages = pieces.iter().map(|piece| piece.run.count()).sum();
    writer.allocate(pages, u32::try_from(pieces.len()).unwrap_or(u32::MAX)).await?;
    for group in windows(pieces) {
        let mut chunk = writer.reserve().await?;
        let mut rest = chunk.as_mut();
        for piece in &group {
            let (now, later) = rest.split_at_mut(piece.run.count() as usize * PAGE);
            read_piece(layers, piece, now)?;
            rest = later;
        }
        let runs: Vec<FrameRun> = group.iter().map(|piece| piece.run).collect();
        writer.push(&runs, chunk).await?;
    }
    writer.finish().await
}

async fn write_flat(
    mut writer: FlatWriter<BlockingFile>,
    layers: &[Layer],
    pieces: &[Piece],
    frames: u32,
) -> Result<LayerInfo> {
    let mut buffer = vec![0; WINDOW_FRAMES as usize * PAGE];
    let mut first = 0;
    while let Some(window) = FrameRun::new(first, WINDOW_FRAMES.min(frames - first)) {
        let bytes = &mut buffer[..window.count() as usize * PAGE];
        bytes.fill(0);
        // Only what can reach into the window is looked at.
        let from = pieces.partition_point(|piece| piece.run.end() <= first);
        let to = pieces.partition_point(|piece| piece.run.first() < window.end());
        for piece in restrict(&pieces[from..to], &[window]) {
            let at = (piece.run.first() - first) as usize * PAGE;
            read_piece(layers, &piece, &mut bytes[at..at + piece.run.count() as usize * PAGE])?;
        }
        writer.push(bytes).await?;
        first = window.end();
    }
    writer.finish().await
}

fn read_piece(layers: &[Layer], piece: &Piece, into: &mut [u8]) -> Result<()> {
    let Some(layer) = layers.get(piece.layer) else { return Ok(()) };
    let path = layer.info().id.file_name();
    layer
        .file()
        .read_exact_at(into, u64::from(piece.page) * PAGE_BYTES)
        .map_err(|e| StorageError::io("read", Path::new(&path), e))
}

/// Cuts pieces into groups of exactly [`WINDOW_FRAMES`] frames each, but for the last.
fn windows(pieces: &[Piece]) -> impl Iterator<Item = Vec<Piece>> {
    let mut pieces = pieces.iter().copied();
    let mut rest: Option<Piece> = None;
    std::iter::from_fn(move || {
        let mut group = Vec::new();
        let mut room = WINDOW_FRAMES;
        while room > 0 {
            let Some(piece) = rest.take().or_else(|| pieces.next()) else { break };
            let taken = piece.run.count().min(room);
            let now = FrameRun::new(piece.run.first(), taken);
            group.extend(now.map(|run| Piece { run, ..piece }));
            let later = FrameRun::new(piece.run.first() + taken, piece.run.count() - taken);
            rest = later.map(|run| Piece { run, page: piece.page + taken, ..piece });
            room -= taken;
        }
        (!group.is_empty()).then_some(group)
    })
}

#[cfg(test)]
mod tests;
