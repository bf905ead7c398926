//! Memory on demand: for images that are larger than the host wants to hold, pages come when a guest
//! touches them.
//!
//! Called by the driver when it restores such an image, and when it takes such a sandbox over. The VM
//! process made the userfaultfd before it gave its privileges up; the shard takes a duplicate,
//! registers the memory from outside, and answers the faults through its ring. Never on the warm path:
//! mapping a file is quicker. Refuses to let a guest run whose memory cannot be read any more.

use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;

use mica_numa::io::{IoBuf, IoFile, Ring};
use mica_numa::process::RemoteMemory;
use mica_numa::rt;
use mica_numa::userfault::{Content, PageSource, Pager, Userfault};
use mica_storage::{Layer, Piece};
use mica_units::{FrameRun, PAGE_BYTES, frames_len};

use crate::shell::Held;

/// Where the pages of a guest are: its layers, and which piece of memory is in which.
#[derive(Debug)]
struct Layers {
    ring: Rc<Ring>,
    files: Vec<IoFile>,
    pieces: Vec<Piece>,
}

/// Answers the faults of one guest until it is dropped.
#[derive(Debug)]
pub(crate) struct Paging {
    task: rt::Task<()>,
}

impl Drop for Paging {
    fn drop(&mut self) {
        self.task.cancel();
    }
}

/// Registers a guest's memory, all of which is missing, and answers its faults from now on. `failed` is
/// called when a page cannot be had; `first` is brought in before anyone asks.
pub(crate) fn begin(
    held: &Held,
    ring: &Rc<Ring>,
    frames: u32,
    layers: &[Layer],
    pieces: &[Piece],
    first: Vec<FrameRun>,
    failed: impl FnOnce() + 'static,
) -> io::Result<Paging> {
    let (userfault, all) = take_userfault(held, frames)?;
    let tracked = tells_writes(held);
    userfault.catch_missing(all, tracked)?;
    let file = |layer: &Layer| layer.file().as_fd().try_clone_to_owned().map(IoFile::from);
    let files = layers.iter().map(file).collect::<io::Result<Vec<_>>>()?;
    let source = Layers { ring: Rc::clone(ring), files, pieces: pieces.to_vec() };
    let pager = Pager::new(userfault, source, Rc::clone(ring), tracked);
    let task = rt::spawn(async move {
        let serving = Rc::clone(&pager);
        let both = async {
            pager.prefetch(&first).await?;
            std::future::pending::<io::Result<()>>().await
        };
        let ended = futures_lite::future::or(async { serving.serve().await }, both).await;
        if let Err(error) = ended {
            tracing::error!(%error, "the memory of a guest cannot be read any more");
            failed();
        }
    });
    Ok(Paging { task })
}

/// Whether what a guest on demand writes is told apart: pages come protected then, and where the kernel
/// lets a write to such a page through by itself.
pub(crate) fn tells_writes(held: &Held) -> bool {
    held.process.pagemap().can_track_writes()
}

/// Lets a guest's faults be told again whose daemon is gone, and answers them.
pub(crate) fn wake(held: &Held, frames: u32) -> io::Result<()> {
    let (userfault, all) = take_userfault(held, frames)?;
    userfault.wake(all)
}

/// Registers a guest's memory so that its writes can be told apart. Again after each change of its
/// mappings; from outside, because the VM process may not.
pub(crate) fn track(held: &Held, frames: u32) -> io::Result<()> {
    let (userfault, all) = take_userfault(held, frames)?;
    userfault.track(all)
}

/// Ends paging for a frozen guest, all of whose memory is about to be mapped: nobody waits for what is
/// missing from now on.
pub(crate) fn end(held: &Held, frames: u32) -> io::Result<()> {
    let (userfault, all) = take_userfault(held, frames)?;
    userfault.release(all)
}

fn take_userfault(held: &Held, frames: u32) -> io::Result<(Userfault, FrameRun)> {
    let number = held.layout.userfault_fd.ok_or(io::ErrorKind::Unsupported)?;
    let fd = held.process.descriptor(number).map_err(io::Error::other)?;
    let range = || -> Option<(RemoteMemory, FrameRun)> {
        let memory = RemoteMemory::new(held.layout.memory_address, frames)?;
        Some((memory, memory.all()?))
    };
    let (memory, all) = range().ok_or(io::ErrorKind::InvalidInput)?;
    Ok((Userfault::new(fd, memory)?, all))
}

impl PageSource for Layers {
    async fn fill(&self, run: FrameRun, mut buffer: IoBuf) -> (IoBuf, io::Result<Content>) {
        let parts = mica_storage::restrict(&self.pieces, &[run]);
        if parts.is_empty() {
            return (buffer, Ok(Content::Zeroes));
        }
        let mut next = run.first();
        for part in parts {
            buffer.zero_to(frames_len(part.run.first() - run.first()));
            let Some(file) = self.files.get(part.layer) else {
                return (buffer, Err(io::ErrorKind::InvalidData.into()));
            };
            let at = u64::from(part.page) * PAGE_BYTES;
            let length = frames_len(part.run.count());
            let (back, read) = self.ring.read_exact_at(file, buffer, length, at).await;
            buffer = back;
            if let Err(error) = read {
                return (buffer, Err(error));
            }
            next = part.run.end();
        }
        debug_assert!(next <= run.end(), "a piece reaches out of the run it was cut to");
        buffer.zero_to(frames_len(run.count()));
        (buffer, Ok(Content::Bytes))
    }
}
