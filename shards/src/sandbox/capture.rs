//! Makes a snapshot of a frozen guest: its memory through the shard's ring, its disk as a clone.
//!
//! Called by the driver, a step at a time, as the state machine says. What is made is a directory in
//! the store that exists for others only when [`commit`] has returned; dropped before, it goes.
//! Refuses to keep a guest standing still for longer than copying into buffers takes: with more than
//! that to copy it says so, and the most is copied while the guest runs, where the kernel tells writes.
//!
//! ```text
//!   freeze ─▶ copy: scan ─▶ clone disk ∥ make room ∥ pages into buffers, the first ones written
//!          ─▶ thaw ─▶ commit: write the rest ∥ write and sync the manifest ─▶ rename
//!                │ too much, and writes can be told
//!                └─▶ thaw ─▶ precopy: pages into the file ─▶ freeze ─▶ copy what changed since
//! ```

mod disk;

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use futures_lite::future::zip;
use mica_numa::io::{IoBuf, Ring};
use mica_numa::process::ProcessError;
use mica_numa::rt;
use mica_storage::{
    COALESCE_GAP, Closing, LAYERS_MAX, Layer, LayerId, LayerInfo, PackedWriter, ROUNDS_MAX,
    Snapshot, SnapshotManifest, SnapshotStaging, StorageError, Store, SyncJob, Synced, coalesce,
    groups,
};
use mica_units::{FrameRun, PAGE_BYTES};
use mica_wire::vm::EXCHANGE_PART_BYTES_MAX;
use tracing::Span;

use super::chain;
use super::memory::{Memory, Place, difference, pages, union};
use super::ring_file::{Chunk, RingFile};
use crate::metrics::{Phase, Stopwatch};
pub(crate) use disk::DiskCapture;

/// Times a guest is let run while the most is copied. One that writes faster than it is copied is
/// stopped for what is left then.
const PRECOPIES_MAX: u32 = 3;

/// Layers of a live guest's memory above which the next capture folds them into one. Background
/// flattening keeps snapshots shorter; this keeps what lives on.
const CHAIN_MAX: usize = 12;

const _: () = assert!(PRECOPIES_MAX <= ROUNDS_MAX);
const _: () = assert!(CHAIN_MAX < LAYERS_MAX);

/// Buffers of one capture that wait for the guest to go on before they are written.
const HELD_MAX: usize = 16;

/// Writes that are under way while the guest stands still. They keep the device busy; each costs the
/// checksum of its bytes before, which for all others is worked out once the guest goes on.
const AHEAD_MAX: usize = 2;

/// Where fewer buffers than this are free, none is held back: they go round among all captures. So none
/// ever waits for a buffer while it holds one that is not being written.
const FREE_MIN: usize = 2;

/// Why there is no snapshot. Nothing of it is left, and the guest can go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaptureError {
    /// The store.
    #[error("the store failed")]
    Storage(#[from] StorageError),
    /// The memory of the process.
    #[error("its memory could not be looked at")]
    Process(#[from] ProcessError),
    /// Its state.
    #[error("its state could not be taken: {0}")]
    State(String),
    /// A blocking thread.
    #[error("a blocking thread did not do its part")]
    Blocking(#[from] rt::BlockingError),
    /// Our mistake: a piece of it is still being worked on.
    #[error("the snapshot is still being written")]
    Shared,
}

/// A snapshot in the making.
#[derive(Debug)]
pub(crate) struct Capture {
    ring: Rc<Ring>,
    staging: Staged,
    layer: LayerId,
    /// What the new layer will lie on.
    under: Vec<Layer>,
    /// Frames that are captured whether they changed or not: the chain they were in ends.
    folded: Vec<FrameRun>,
    writer: Option<PackedWriter<RingFile>>,
    held: VecDeque<(Vec<FrameRun>, Chunk)>,
    state: Vec<u8>,
    /// Everything that was found changed, over all rounds.
    found: Vec<FrameRun>,
    /// Of the last round.
    round: Vec<FrameRun>,
    precopies: u32,
    allocated: bool,
    /// Whether the guest's pages come when they are touched.
    on_demand: bool,
    watch: Stopwatch,
}

/// The directory. Thrown away on a blocking thread: that removes files.
#[derive(Debug)]
struct Staged(Option<Arc<SnapshotStaging>>);

impl Staged {
    fn id(&self) -> Option<String> {
        self.0.as_ref().map(|staging| staging.id().to_owned())
    }

    fn share(&self) -> Result<Arc<SnapshotStaging>, CaptureError> {
        self.0.clone().ok_or(CaptureError::Shared)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(staging) = self.0.take() {
            rt::spawn(async move {
                if let Err(error) = rt::blocking(move || drop(staging)).await {
                    tracing::debug!(%error, "the next start removes a snapshot that was given up");
                }
            })
            .detach();
        }
    }
}

/// How a copy came out.
#[derive(Debug)]
pub(crate) enum Copied {
    /// All is in buffers or in the file.
    All(Capture),
    /// It is too much for a guest that stands still.
    TooMuch(Capture),
}

/// What a capture works on.
#[derive(Debug)]
pub(crate) struct Source<'a> {
    pub(crate) place: Place<'a>,
    pub(crate) exchange: &'a std::os::fd::OwnedFd,
    pub(crate) state_bytes: u64,
    pub(crate) disk: Option<Arc<File>>,
    /// Pages that may be copied while the guest stands still.
    pub(crate) budget_pages: u64,
}

impl Capture {
    /// Makes the directory, with the layers that the memory lies on already. Blocks a thread, not the
    /// shard.
    pub(crate) async fn begin(
        store: &Store,
        ring: &Rc<Ring>,
        layers: Vec<Layer>,
        frames: u32,
        watch: Stopwatch,
    ) -> Result<Self, CaptureError> {
        let store = store.clone();
        let (under, folded) = fold(layers);
        let make = move || {
            let staging = store.stage_snapshot(&store.new_snapshot_id()?)?;
            staging.link_layers(&under)?;
            let layer = staging.create_layer()?;
            Ok::<_, StorageError>((staging, layer, under))
        };
        let (staging, (layer, file), under) = rt::blocking(make).await??;
        let file = RingFile::new(Rc::clone(ring), file);
        Ok(Self {
            ring: Rc::clone(ring),
            staging: Staged(Some(Arc::new(staging))),
            layer,
            under,
            folded,
            writer: Some(PackedWriter::new(file, layer, frames)),
            held: VecDeque::new(),
            state: Vec::new(),
            found: Vec::new(),
            round: Vec::new(),
            precopies: 0,
            allocated: false,
            on_demand: false,
            watch,
        })
    }

    /// Copies what changed, while the guest stands still.
    pub(crate) async fn copy(
        mut self,
        source: Source<'_>,
        memory: &mut Memory,
    ) -> Result<Copied, CaptureError> {
        let dirty = memory.changed(source.place, true).await?;
        self.watch.lap(Phase::Scan);
        let dirty = union(&dirty, &std::mem::take(&mut self.folded));
        // What is missing is not brought in for the sake of longer runs.
        let gap = if memory.on_demand { 0 } else { COALESCE_GAP };
        self.on_demand = memory.on_demand;
        self.round = coalesce(&dirty, gap);
        self.found = union(&self.found, &self.round);
        let too_much = pages(&self.round) > source.budget_pages;
        if too_much && memory.tracked && self.precopies < PRECOPIES_MAX {
            // What this round finds is in the file when the next one begins.
            return Ok(Copied::TooMuch(self));
        }
        self.state = read_state(source.exchange, source.state_bytes)?;
        let staging = self.staging.share()?;
        let cloning = source
            .disk
            .map(|disk| rt::spawn(rt::blocking(move || staging.clone_disk(&disk).map(drop))));
        self.begin_allocate();
        self.read_pages(source.place).await?;
        if let Some(cloning) = cloning {
            cloning.join().await.unwrap_or(Err(rt::BlockingError::NoSeat))??;
        }
        self.watch.lap(Phase::Copy);
        Ok(Copied::All(self))
    }

    /// Copies what the last round found, while the guest runs. What it writes over meanwhile the next
    /// round finds.
    pub(crate) async fn precopy(
        mut self,
        place: Place<'_>,
        memory: &mut Memory,
    ) -> Result<Self, CaptureError> {
        self.precopies += 1;
        self.begin_allocate();
        self.read_pages(place).await?;
        self.write_held().await?;
        if let Some(writer) = &mut self.writer {
            writer.begin_round();
        }
        memory.precopied();
        self.watch.lap_to(Phase::Copy, Some(Phase::Freeze));
        Ok(self)
    }

    async fn read_pages(&mut self, place: Place<'_>) -> Result<(), CaptureError> {
        let round = std::mem::take(&mut self.round);
        let per_buffer = u32::try_from(mica_numa::io::IO_BUF_BYTES as u64 / PAGE_BYTES);
        for group in groups(&round, per_buffer.unwrap_or(1)) {
            if self.held.len() >= HELD_MAX || self.ring.free_buffers() < FREE_MIN {
                self.write_held().await?;
            }
            let Some(writer) = &mut self.writer else { return Ok(()) };
            // At once, or with nothing held.
            let mut chunk = writer.reserve().await?;
            chunk.0.clear();
            let group = match self.on_demand {
                true => read_on_demand(place, group, &mut chunk.0).await?,
                false => {
                    place.process.process().read_frames(place.memory, &group, &mut chunk.0)?;
                    group
                }
            };
            self.held.push_back((group, chunk));
            self.write_ahead().await?;
            // Others have their turn after each MiB, and the ring its own: it gives the kernel what was
            // started.
            rt::yield_now().await;
        }
        Ok(())
    }

    async fn write_held(&mut self) -> Result<(), CaptureError> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        if self.held.is_empty() {
            return Ok(());
        }
        for (runs, chunk) in self.held.drain(..) {
            writer.push(&runs, chunk).await?;
        }
        Ok(())
    }

    /// Starts to make room for all that was found, once: whether it fits is known before any of it is
    /// written. The guest does not wait for it.
    fn begin_allocate(&mut self) {
        let Some(writer) = &mut self.writer else { return };
        if self.found.is_empty() || std::mem::replace(&mut self.allocated, true) {
            return;
        }
        let count = u32::try_from(pages(&self.found)).unwrap_or(u32::MAX);
        let runs = u32::try_from(self.found.len()).unwrap_or(u32::MAX);
        writer.begin_allocate(count, runs);
    }

    /// Starts a write where the device has too little to do.
    async fn write_ahead(&mut self) -> Result<(), CaptureError> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        if writer.has_room().await?
            && writer.in_flight().await? < AHEAD_MAX
            && let Some((runs, chunk)) = self.held.pop_front()
        {
            writer.push(&runs, chunk).await?;
        }
        Ok(())
    }

    /// The id of what it makes.
    pub(crate) fn id(&self) -> Option<String> {
        self.staging.id()
    }

    /// Brings everything to the device and makes the snapshot exist. `describe` makes its manifest of
    /// the new layer, if there is one, and the state. `keep` is given what was committed and its layers,
    /// on the same blocking thread, and can ask whether this future was dropped meanwhile: then nobody
    /// will know of the snapshot.
    pub(crate) async fn commit<T: Send + 'static>(
        mut self,
        describe: impl FnOnce(String, Vec<LayerInfo>, Vec<u8>) -> SnapshotManifest,
        keep: impl FnOnce(Snapshot, OpenedLayers, &dyn Fn() -> bool) -> Result<T, CaptureError>
        + Send
        + 'static,
    ) -> Result<T, CaptureError> {
        self.write_held().await?;
        // From here on two phases may go on at once.
        let writing = self.watch.lap_on(Phase::Write);
        let Self { mut staging, layer, under, writer, state, found, watch, .. } = self;
        let closing = match writer {
            Some(writer) if !found.is_empty() => Some((writer.close().await?, writing)),
            // Nothing was written: the layers below say it all.
            _ => None,
        };
        let shared = staging.share()?;
        let info = closing.as_ref().map(|(closing, _)| *closing.written().info());
        let layers = under.iter().map(|layer| *layer.info()).chain(info).collect();
        let manifest = describe(shared.id().to_owned(), layers, state);
        let preparing = Arc::clone(&shared);
        let prepare = move || {
            if info.is_none() {
                preparing.remove_layer(layer)?;
            }
            preparing.prepare(&manifest).map(|jobs| (jobs, manifest))
        };
        // Of two things at once, the one that ends later has the time from the end of the other on.
        let complete = async |(closing, writing): (Closing<RingFile>, Option<Span>)| {
            let written = closing.complete().await;
            watch.lap_to(Phase::Write, None);
            drop(writing);
            written
        };
        let synced = async {
            let syncing = watch.beside(Phase::Sync);
            let synced = sync(prepare).await;
            watch.lap_to(Phase::Sync, None);
            drop(syncing);
            synced
        };
        let (written, (manifest, synced)) = match closing {
            // Everything is in the directory, and as long as it will be.
            Some(closing) if closing.0.has_its_length() => {
                let (written, prepared) = zip(complete(closing), synced).await;
                (Some(written?), prepared?)
            }
            Some(closing) => (Some(complete(closing).await?), synced.await?),
            None => (None, synced.await?),
        };
        watch.turn(Some(Phase::Commit));
        drop(shared);
        let whole = staging.0.take().and_then(Arc::into_inner).ok_or(CaptureError::Shared)?;
        // Lives as long as this future.
        let heard = Arc::new(());
        let hearing = Arc::downgrade(&heard);
        let commit = move || {
            let snapshot = whole.commit(manifest, synced)?;
            let layers = snapshot.open_layers_on(&under, written);
            keep(snapshot, layers, &|| hearing.strong_count() == 0)
        };
        let kept = rt::blocking(commit).await;
        drop(heard);
        kept?
    }
}

/// Copies a group of a guest whose pages come on demand. It may have given back what was just found there;
/// then reading waits for this shard to bring it, and the shard must not be what waits.
async fn read_on_demand(
    place: Place<'_>,
    group: Vec<FrameRun>,
    buffer: &mut IoBuf,
) -> Result<Vec<FrameRun>, CaptureError> {
    let (process, memory) = (place.process.process().try_clone()?, place.memory);
    let copy = move || process.copy_frames(memory, &group).map(|bytes| (bytes, group));
    let (bytes, group) = rt::blocking(copy).await??;
    match buffer.put(&bytes) == bytes.len() {
        true => Ok(group),
        false => Err(ProcessError::Range.into()),
    }
}

/// The layers of what was committed, if they could be opened.
pub(crate) type OpenedLayers = Result<Vec<Layer>, StorageError>;

/// Prepares a snapshot and makes durable what it takes, all at once: the file system brings it to the
/// device together.
async fn sync(
    prepare: impl FnOnce() -> Result<(Vec<SyncJob>, SnapshotManifest), StorageError> + Send + 'static,
) -> Result<(SnapshotManifest, Vec<Synced>), CaptureError> {
    let (jobs, manifest) = rt::blocking(prepare).await??;
    let jobs: Vec<_> =
        jobs.into_iter().map(|job| rt::spawn(rt::blocking(move || job.run()))).collect();
    let mut synced = Vec::with_capacity(jobs.len());
    for job in jobs {
        synced.push(job.join().await.unwrap_or(Err(rt::BlockingError::NoSeat))??);
    }
    Ok((manifest, synced))
}

/// What the next layer lies on. A chain that has grown long ends here: the base stays, and what the
/// others hold is captured anew.
fn fold(mut layers: Vec<Layer>) -> (Vec<Layer>, Vec<FrameRun>) {
    if layers.len() < CHAIN_MAX {
        return (layers, Vec::new());
    }
    let folded = difference(&layers, &layers[..1]);
    layers.truncate(1);
    (layers, folded)
}

/// Takes the state out of the exchange, once: the process may write it again at any time.
pub(crate) fn read_state(exchange: &impl AsFd, bytes: u64) -> Result<Vec<u8>, CaptureError> {
    if bytes == 0 || bytes > EXCHANGE_PART_BYTES_MAX {
        return Err(CaptureError::State(format!("it has {bytes} bytes")));
    }
    let mut state = vec![0; usize::try_from(bytes).unwrap_or(0)];
    let mut done = 0;
    while done < state.len() {
        let read = rustix::io::pread(exchange, &mut state[done..], done as u64);
        match read.map_err(|errno| CaptureError::State(chain(&errno)))? {
            0 => return Err(CaptureError::State("the exchange is too short".to_owned())),
            more => done += more,
        }
    }
    Ok(state)
}
