//! Writing layers: pages come in as buffers, go out as writes, and are copied once.
//!
//! Called by shards while a snapshot is made (through their ring), and by `flatten` and template
//! builds (through [`BlockingFile`]). Refuses pages that do not fit the runs they come with.
//!
//! How a shard hands pages over, for a packed layer:
//!
//! ```text
//!   runs = coalesce(dirty, COALESCE_GAP)
//!   writer.allocate(frames of runs)                      space is there, or NoSpace is known now
//!   for group in groups(runs, pages of a buffer)         a group fills one buffer
//!       chunk = writer.reserve().await                   a registered buffer, waits for a free one
//!       process_vm_readv(group → chunk)                  the only copy
//!       writer.push(&group, chunk).await                 checksum, then the write is under way
//!   info = writer.finish().await                         tables, footer, all writes, one sync
//! ```
//! `begin_allocate` and `has_room` are for who has something to do while room is made, `close` and
//! [`Closing::complete`] for who has something to do between the last write's start and the sync.
//!
//! Pages lie in the file in the order of the pushes, and groups may come in any order. The shard may
//! hold filled buffers back and push them once the guest runs again. How many writes are in flight is
//! bounded by how many buffers [`LayerFile::reserve`] gives out. When `finish` has returned, the
//! content of the file is on the device; its name is not, that is the commit's work.

mod blocking;
mod queue;
#[cfg(test)]
mod tests;

use std::fmt;
use std::future::Future;
use std::future::poll_fn;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::Poll;

use mica_units::{FrameRun, PAGE_BYTES};

/// Times that frames may be pushed again.
pub use crate::layer::ROUNDS_MAX;
pub use blocking::{Aligned, BlockingFile, run_blocking};

use crate::error::{Result, StorageError};
use crate::layer::{
    CHUNK_BYTES, COALESCE_GAP, Extent, Footer, LayerError, LayerId, LayerInfo, LayerKind, PAGE,
    RunTable, Written, coalesce, data_pages_max, merge, tail,
};
use crate::sparse::is_zero;
use queue::Queue;

/// An operation under way. It borrows nothing, so that many can be kept.
pub type Pending<T> = Pin<Box<dyn Future<Output = io::Result<T>>>>;

/// The file a layer is written to, as its owner's ring offers it. All offsets and lengths are
/// multiples of 4096, as `O_DIRECT` wants them; so must the addresses of chunks be.
///
/// A writer that fails or is dropped drops its futures. An operation that the kernel has then must
/// still keep its buffer until it is done: that is the owner's work.
///
/// A future may start its operation when it is made or when it is first polled; a writer polls each
/// as soon as it has it, and polls all whenever it waits.
pub trait LayerFile {
    /// A buffer. All are equally long: a multiple of 64 KiB.
    type Chunk: AsRef<[u8]> + AsMut<[u8]>;

    /// Waits for a free buffer. Its content does not matter.
    fn reserve(&self) -> Pending<Self::Chunk>;

    /// Makes room for a file of this length, and may leave it that long (`fallocate`). Called at most
    /// once, before any write.
    fn allocate(&self, bytes: u64) -> Pending<()>;

    /// Writes the first `len` bytes of a buffer, all of them, and takes the buffer back.
    fn write_at(&self, chunk: Self::Chunk, len: usize, offset: u64) -> Pending<()>;

    /// Gives the file exactly this length. Called after all writes are done, and only when the file
    /// could be longer or shorter.
    fn set_len(&self, bytes: u64) -> Pending<()>;

    /// Makes what was written durable, with the file's length. Called after all writes are done.
    fn sync(&self) -> Pending<()>;
}

/// What both kinds of writer do: writes in flight, and the end of the file.
struct Output<F: LayerFile> {
    file: F,
    queue: Queue,
    /// Room that is being made. No write is started before it is there.
    making_room: Option<Pending<()>>,
    footer: Footer,
    /// For messages: the file's name in whatever directory it is.
    path: PathBuf,
}

impl<F: LayerFile> Output<F> {
    fn new(file: F, kind: LayerKind, id: LayerId, frames: u32) -> Self {
        let footer =
            Footer { kind, id, frames, frames_held: 0, data_pages: 0, runs: 0, tables_crc: 0 };
        Self {
            file,
            queue: Queue::default(),
            making_room: None,
            footer,
            path: PathBuf::from(id.file_name()),
        }
    }

    fn failed(&self, operation: &'static str) -> impl FnOnce(io::Error) -> StorageError {
        let path = self.path.clone();
        move |error| StorageError::io(operation, &path, error)
    }

    /// Waits until there is room.
    async fn room(&mut self) -> Result<()> {
        let Some(making_room) = self.making_room.take() else { return Ok(()) };
        making_room.await.map_err(self.failed("make room for"))
    }

    /// Whether there is room.
    async fn has_room(&mut self) -> Result<bool> {
        let Some(making_room) = &mut self.making_room else { return Ok(true) };
        let made = poll_fn(|cx| Poll::Ready(making_room.as_mut().poll(cx))).await;
        let Poll::Ready(made) = made else { return Ok(false) };
        self.making_room = None;
        made.map(|()| true).map_err(self.failed("make room for"))
    }

    async fn reserve(&mut self) -> Result<F::Chunk> {
        let free = self.file.reserve();
        self.queue.race(free).await.map_err(self.failed("write"))
    }

    async fn write(&mut self, chunk: F::Chunk, len: usize, offset: u64) -> Result<()> {
        self.room().await?;
        let write = self.file.write_at(chunk, len, offset);
        self.queue.start(write).await.map_err(self.failed("write"))
    }

    /// Copies `bytes` into buffers and writes them.
    async fn write_bytes(&mut self, mut bytes: &[u8], mut offset: u64) -> Result<()> {
        while !bytes.is_empty() {
            let mut chunk = self.reserve().await?;
            let len = bytes.len().min(chunk.as_mut().len());
            let (now, later) = bytes.split_at(len);
            chunk.as_mut()[..len].copy_from_slice(now);
            self.write(chunk, len, offset).await?;
            offset += len as u64;
            bytes = later;
        }
        Ok(())
    }

    /// Starts to write what follows the pages.
    async fn close(
        mut self,
        table: RunTable,
        checksums: Vec<u32>,
        allocated: Option<u64>,
    ) -> Result<Closing<F>> {
        let (footer, bytes) = tail(self.footer, &table, &checksums);
        self.write_bytes(&bytes, footer.data_bytes()).await?;
        let file_bytes = footer.file_bytes();
        let Footer { id, kind, frames, frames_held, .. } = footer;
        let info = LayerInfo { id, kind, frames_held, file_bytes };
        let written = Written { info, frames, table, checksums };
        Ok(Closing { output: self, written, allocated })
    }

    fn refuse(&self, why: &'static str) -> StorageError {
        StorageError::Layer { path: self.path.clone(), source: LayerError::Runs(why) }
    }
}

/// A layer of which every write is under way, and what it will be.
pub struct Closing<F: LayerFile> {
    output: Output<F>,
    written: Written,
    allocated: Option<u64>,
}

impl<F: LayerFile> Closing<F> {
    /// What it will be.
    #[must_use]
    pub const fn written(&self) -> &Written {
        &self.written
    }

    /// Whether the file is as long already as it will be.
    #[must_use]
    pub fn has_its_length(&self) -> bool {
        self.allocated == Some(self.written.info.file_bytes)
    }

    /// Waits for every write, and makes the file durable.
    ///
    /// # Errors
    /// When a step failed. The layer is lost then.
    pub async fn complete(self) -> Result<Written> {
        let Self { mut output, written, allocated } = self;
        output.queue.all().await.map_err(output.failed("write"))?;
        let file_bytes = written.info.file_bytes;
        if allocated.is_some_and(|allocated| allocated > file_bytes) {
            output.file.set_len(file_bytes).await.map_err(output.failed("cut"))?;
        }
        output.file.sync().await.map_err(output.failed("sync"))?;
        Ok(written)
    }
}

impl<F: LayerFile> fmt::Debug for Closing<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Closing").field("written", &self.written).finish_non_exhaustive()
    }
}

/// Writes a packed layer: see the module's text.
pub struct PackedWriter<F: LayerFile> {
    output: Output<F>,
    /// What was pushed, and before that what was pushed in earlier rounds.
    extents: Vec<Extent>,
    rounds: Vec<Vec<Extent>>,
    checksums: Checksums,
    pages: u32,
    allocated: Option<u64>,
}

impl<F: LayerFile> PackedWriter<F> {
    /// Starts layer `id` in a new, empty file, for a guest of `frames` frames.
    #[must_use]
    pub fn new(file: F, id: LayerId, frames: u32) -> Self {
        Self {
            output: Output::new(file, LayerKind::Packed, id, frames),
            extents: Vec::new(),
            rounds: Vec::new(),
            checksums: Checksums::default(),
            pages: 0,
            allocated: None,
        }
    }

    /// Makes room for `pages` pages in `runs` runs, so that the device's space is known to be enough
    /// and the file is contiguous. At most once, before the first push.
    ///
    /// # Errors
    /// [`StorageError::NoSpace`] when it is not there.
    pub async fn allocate(&mut self, pages: u32, runs: u32) -> Result<()> {
        self.begin_allocate(pages, runs);
        self.output.room().await
    }

    /// As [`Self::allocate`], without waiting: the first push does, and says what it came to.
    pub fn begin_allocate(&mut self, pages: u32, runs: u32) {
        let sized = Footer { data_pages: pages, runs, ..self.output.footer };
        let bytes = sized.file_bytes();
        self.output.making_room = Some(self.output.file.allocate(bytes));
        self.allocated = Some(bytes);
    }

    /// Whether the room that was asked for is there, so that a push does not wait. Starts to make it.
    ///
    /// # Errors
    /// [`StorageError::NoSpace`] when it will not be there.
    pub async fn has_room(&mut self) -> Result<bool> {
        self.output.has_room().await
    }

    /// Writes that are not done.
    ///
    /// # Errors
    /// When one failed. The layer is lost then.
    pub async fn in_flight(&mut self) -> Result<usize> {
        self.output.queue.in_flight().await.map_err(self.output.failed("write"))
    }

    /// From now on frames may be pushed again: the last time counts. For a guest that runs while most
    /// of it is copied. At most [`ROUNDS_MAX`] times.
    pub fn begin_round(&mut self) {
        self.rounds.push(std::mem::take(&mut self.extents));
    }

    /// A buffer to fill. Waits until one is free, and looks after the writes in flight meanwhile.
    ///
    /// # Errors
    /// When a write failed. The layer is lost then.
    pub async fn reserve(&mut self) -> Result<F::Chunk> {
        self.output.reserve().await
    }

    /// Takes a buffer that holds the pages of `runs`, one after the other from its start, and starts
    /// writing it. All but the last should be full.
    ///
    /// # Errors
    /// When the runs do not fit the buffer or the guest, or a write failed. The layer is lost then.
    pub async fn push(&mut self, runs: &[FrameRun], chunk: F::Chunk) -> Result<()> {
        let offset = u64::from(self.pages) * PAGE_BYTES;
        let mut pages = self.pages;
        for run in runs {
            if run.end() > self.output.footer.frames {
                return Err(self.output.refuse("a run leaves the guest's memory"));
            }
            self.extents.push(Extent { run: *run, page: pages });
            pages = pages
                .checked_add(run.count())
                .filter(|pages| *pages <= data_pages_max(self.output.footer.frames))
                .ok_or_else(|| self.output.refuse("more pages than the guest has frames"))?;
        }
        let bytes = u64::from(pages - self.pages) * PAGE_BYTES;
        let data = usize::try_from(bytes).ok().and_then(|len| chunk.as_ref().get(..len));
        let Some(data) = data else {
            return Err(self.output.refuse("more pages than the buffer holds"));
        };
        self.checksums.extend(data);
        let len = data.len();
        self.pages = pages;
        if len == 0 {
            return Ok(());
        }
        self.output.write(chunk, len, offset).await
    }

    /// Writes the tables, waits for every write, and makes the file durable.
    ///
    /// # Errors
    /// When runs of one round overlap or a step failed. The layer is lost then.
    pub async fn finish(self) -> Result<LayerInfo> {
        Ok(self.close().await?.complete().await?.info)
    }

    /// Starts to write the tables. Every write is under way then, and what the layer will be is known.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub async fn close(mut self) -> Result<Closing<F>> {
        self.begin_round();
        let table = self
            .table()
            .map_err(|source| StorageError::Layer { path: self.output.path.clone(), source })?;
        self.output.footer.frames_held = table.frames();
        let checksums = self.checksums.finish();
        self.output.close(table, checksums, self.allocated).await
    }

    /// The runs of all rounds, the last ones over the others.
    fn table(&self) -> std::result::Result<RunTable, LayerError> {
        if self.rounds.len() > ROUNDS_MAX as usize + 1 {
            return Err(LayerError::Runs("frames were pushed again in too many rounds"));
        }
        let rounds = self.rounds.iter().map(|round| RunTable::new(round.clone(), self.pages));
        let rounds: Vec<RunTable> = rounds.collect::<std::result::Result<_, _>>()?;
        let rounds: Vec<&RunTable> = rounds.iter().collect();
        let extent = |piece: crate::Piece| Extent { run: piece.run, page: piece.page };
        let merged = merge(&rounds, self.output.footer.frames);
        RunTable::new(merged.into_iter().map(extent).collect(), self.pages)
    }
}

impl<F: LayerFile> fmt::Debug for PackedWriter<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.output.footer.id;
        f.debug_struct("PackedWriter").field("id", &id).field("pages", &self.pages).finish()
    }
}

/// Checksums of each 64 KiB of a stream of bytes.
#[derive(Default)]
struct Checksums {
    whole: Vec<u32>,
    /// The checksum of a chunk that is not full yet, and its bytes so far.
    open: Option<(u32, usize)>,
}

impl Checksums {
    fn extend(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (crc, have) = self.open.take().unwrap_or_default();
            let (now, later) = bytes.split_at(bytes.len().min(CHUNK_BYTES - have));
            let (crc, have) = (crc32c::crc32c_append(crc, now), have + now.len());
            if have == CHUNK_BYTES {
                self.whole.push(crc);
            } else {
                self.open = Some((crc, have));
            }
            bytes = later;
        }
    }

    fn finish(mut self) -> Vec<u32> {
        self.whole.extend(self.open.map(|(crc, _)| crc));
        self.whole
    }
}

/// Writes a flat layer: all of a guest's memory, zeros left out. For base images, which are made once,
/// so the pages are copied into buffers here.
pub struct FlatWriter<F: LayerFile> {
    output: Output<F>,
    checksums: Checksums,
    /// The next frame that is expected.
    next: u32,
}

impl<F: LayerFile> FlatWriter<F> {
    /// Starts layer `id` in a new, empty file, for a guest of `frames` frames.
    #[must_use]
    pub fn new(file: F, id: LayerId, frames: u32) -> Self {
        let output = Output::new(file, LayerKind::Flat, id, frames);
        Self { output, checksums: Checksums::default(), next: 0 }
    }

    /// Takes the next frames, in order: `bytes` is a whole number of pages.
    ///
    /// # Errors
    /// When they are more than the guest has, or a write failed. The layer is lost then.
    pub async fn push(&mut self, bytes: &[u8]) -> Result<()> {
        let (pages, rest) = bytes.as_chunks::<{ PAGE }>();
        let first = self.next;
        let next = u32::try_from(pages.len()).ok().and_then(|count| first.checked_add(count));
        let next = next.filter(|next| *next <= self.output.footer.frames && rest.is_empty());
        self.next = next.ok_or_else(|| self.output.refuse("not the frames of this guest"))?;
        self.checksums.extend(bytes);
        let runs: Vec<FrameRun> = (0..)
            .zip(pages)
            .filter(|(_, page)| !is_zero(page.as_slice()))
            .filter_map(|(index, _)| FrameRun::new(index, 1))
            .collect();
        let held = u32::try_from(runs.len()).unwrap_or(u32::MAX);
        self.output.footer.frames_held += held;
        for run in coalesce(&runs, COALESCE_GAP) {
            let data = pages[run.first() as usize..run.end() as usize].as_flattened();
            let offset = u64::from(first + run.first()) * PAGE_BYTES;
            self.output.write_bytes(data, offset).await?;
        }
        Ok(())
    }

    /// Writes the tables, waits for every write, and makes the file durable. Frames that were not
    /// pushed are zero.
    ///
    /// # Errors
    /// When a step failed. The layer is lost then.
    pub async fn finish(mut self) -> Result<LayerInfo> {
        let frames = self.output.footer.frames;
        let zeros = [0; PAGE];
        for _ in self.next..frames {
            self.checksums.extend(&zeros);
        }
        let path: &Path = &self.output.path;
        let table = RunTable::flat(frames)
            .map_err(|source| StorageError::Layer { path: path.to_path_buf(), source })?;
        let checksums = self.checksums.finish();
        Ok(self.output.close(table, checksums, None).await?.complete().await?.info)
    }
}

impl<F: LayerFile> fmt::Debug for FlatWriter<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.output.footer.id;
        f.debug_struct("FlatWriter").field("id", &id).field("next", &self.next).finish()
    }
}
