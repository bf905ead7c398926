//! Replicas: files copied into sealed memory, one for each memory node.
//!
//! Called by `shards` for the memory layers of templates that are hot on its node, so that restores map
//! memory that is near and always there. The file is read by direct I/O through the seat's ring, many
//! pieces at a time, each is checked, and written to the memory; holes stay holes. When all is there
//! the memory is sealed: nobody can change it any more, not even who gets the descriptor.
//!
//! Through a buffer and not straight into mapped memory, whose pages the kernel would have to bring in
//! and clear before the device fills them: reading 256 MiB and writing it to the memory took 130 ms of
//! processor time, reading it into mapped memory 217 (Linux 6.18, 2 cores). The check reads every byte
//! anyway, and sealing need not wait for pages that are still pinned.
//!
//! Refuses files whose length is no multiple of a page.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom, fcntl_add_seals, memfd_create, seek};

use crate::MemoryPolicy;
use crate::arena::Mapping;
use crate::io::{IO_BUF_BYTES, IoFile, Ring};
use crate::placement::is_without_nodes;
use crate::rt::Task;

/// Pieces that are on their way at a time: enough for a drive, and some buffers for others.
const PIECES: usize = 8;
/// What lengths and extents are a multiple of.
const BLOCK: u64 = 4096;

/// Why there is no replica.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// A length or an extent that is no multiple of a page, or outside of the file.
    #[error("the file is not whole pages, or an extent is outside of it")]
    Shape,
    /// The memory.
    #[error("cannot make {bytes} bytes of sealed memory")]
    Memory {
        /// How much.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file.
    #[error("cannot copy the file at {offset}")]
    Copy {
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The check refused.
    #[error("the file is damaged at {offset}")]
    Damaged {
        /// Where the piece starts.
        offset: u64,
    },
}

/// A part of a file that is no hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
}

/// The parts of a file of `bytes` that are not holes, in order. Blocks: call it on a blocking thread.
///
/// # Errors
/// When the file cannot be asked.
pub fn extents(file: impl AsFd, bytes: u64) -> io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut at = 0;
    while at < bytes {
        let offset = match seek(&file, SeekFrom::Data(at)) {
            Ok(offset) => offset,
            // Only a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        at = seek(&file, SeekFrom::Hole(offset))?.min(bytes);
        if at <= offset {
            break;
        }
        extents.push(Extent { offset, bytes: at - offset });
    }
    Ok(extents)
}

/// Cuts extents at multiples of a buffer's length.
fn pieces(extents: &[Extent], bytes: u64) -> Result<Vec<Extent>, ReplicaError> {
    const PIECE: u64 = IO_BUF_BYTES as u64;
    let mut pieces = Vec::new();
    for extent in extents {
        let end = extent.offset.checked_add(extent.bytes).filter(|end| *end <= bytes);
        let whole = extent.offset.is_multiple_of(BLOCK) && extent.bytes.is_multiple_of(BLOCK);
        let end = end.filter(|_| whole).ok_or(ReplicaError::Shape)?;
        let mut offset = extent.offset;
        while offset < end {
            let next = (offset / PIECE + 1) * PIECE;
            pieces.push(Extent { offset, bytes: next.min(end) - offset });
            offset = next;
        }
    }
    Ok(pieces)
}

/// What the tasks of one copy share.
struct Copy<C> {
    ring: Rc<Ring>,
    from: IoFile,
    to: IoFile,
    check: C,
    left: RefCell<std::vec::IntoIter<Extent>>,
    stopped: Cell<bool>,
}

impl<C: Fn(u64, &[u8]) -> bool> Copy<C> {
    /// Copies pieces until none is left, or one fails anywhere.
    async fn run(&self) -> Result<(), ReplicaError> {
        loop {
            let next = self.left.borrow_mut().next().filter(|_| !self.stopped.get());
            let Some(piece) = next else { return Ok(()) };
            let copied = self.one(piece).await;
            if copied.is_err() {
                self.stopped.set(true);
                return copied;
            }
        }
    }

    async fn one(&self, piece: Extent) -> Result<(), ReplicaError> {
        let Extent { offset, bytes } = piece;
        let length = usize::try_from(bytes).map_err(|_| ReplicaError::Shape)?;
        let failed = |source| ReplicaError::Copy { offset, source };
        let buffer = self.ring.buffer().await;
        let (buffer, read) = self.ring.read_exact_at(&self.from, buffer, length, offset).await;
        read.map_err(failed)?;
        if !(self.check)(offset, buffer.bytes()) {
            return Err(ReplicaError::Damaged { offset });
        }
        let (_, wrote) = self.ring.write_all_at(&self.to, buffer, length, offset).await;
        wrote.map_err(failed)
    }
}

/// Stops the tasks of a copy when the future that waits for them is dropped.
struct Stop<C>(Rc<Copy<C>>);

impl<C> Drop for Stop<C> {
    fn drop(&mut self) {
        self.0.stopped.set(true);
    }
}

/// Copies the extents of `file`, which is `bytes` long and open for direct I/O, to new memory that lies as
/// `place` says, and seals it. `check` sees every piece, which crosses no multiple of [`IO_BUF_BYTES`], with its
/// offset, in no order, and says whether it is as it should be.
///
/// # Errors
/// See [`ReplicaError`]. The memory is given back.
pub async fn fill_sealed(
    ring: &Rc<Ring>,
    file: &IoFile,
    bytes: u64,
    extents: &[Extent],
    place: (u32, MemoryPolicy),
    check: impl Fn(u64, &[u8]) -> bool + 'static,
) -> Result<OwnedFd, ReplicaError> {
    if bytes == 0 || !bytes.is_multiple_of(BLOCK) {
        return Err(ReplicaError::Shape);
    }
    let left = RefCell::new(pieces(extents, bytes)?.into_iter());
    let memory = |source| ReplicaError::Memory { bytes, source };
    let replica = empty(bytes, place).map_err(memory)?;
    let to = IoFile::from(replica.try_clone().map_err(memory)?);
    let (ring, from) = (Rc::clone(ring), file.clone());
    let copy = Rc::new(Copy { ring, from, to, check, left, stopped: Cell::new(false) });
    let stop = Stop(Rc::clone(&copy));
    let tasks: Vec<Task<_>> = (0..PIECES)
        .map(|_| {
            let copy = Rc::clone(&copy);
            crate::rt::spawn(async move { copy.run().await })
        })
        .collect();
    let mut first = Ok(());
    for task in tasks {
        let ended = task.join().await.unwrap_or(Err(ReplicaError::Copy {
            offset: 0,
            source: io::Error::other("a task of the copy ended early"),
        }));
        first = first.and(ended);
    }
    drop(stop);
    first?;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&replica, seals).map_err(|errno| memory(errno.into()))?;
    Ok(replica)
}

/// Memory of a length, all zero and none of it there, that will lie on `node`.
fn empty(bytes: u64, (node, policy): (u32, MemoryPolicy)) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know the flag, newer ones want it.
    let memory = memfd_create("mica-replica", flags | MemfdFlags::NOEXEC_SEAL)
        .or_else(|_| memfd_create("mica-replica", flags))?;
    rustix::fs::ftruncate(&memory, bytes)?;
    // A policy of the memory itself and not of a thread: the kernel's own threads write to it.
    let mapping = Mapping::shared(&memory, bytes)?;
    match mapping.place_on(node, policy) {
        // A kernel without nodes has no other.
        Err(error) if policy == MemoryPolicy::Bind && !is_without_nodes(&error) => {
            return Err(error);
        }
        Err(error) => tracing::warn!(%error, node, "a replica may lie on another node"),
        Ok(()) => {}
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_the_extents_and_cross_no_buffer() {
        const MIB: u64 = 1 << 20;
        let extent = |offset, bytes| Extent { offset, bytes };
        let cut = pieces(&[extent(4096, 2 * MIB), extent(5 * MIB, 8192)], 6 * MIB).unwrap();
        let expected = [
            extent(4096, MIB - 4096),
            extent(MIB, MIB),
            extent(2 * MIB, 4096),
            extent(5 * MIB, 8192),
        ];
        assert_eq!(cut, expected);
        for bad in [extent(1, 4096), extent(0, 1), extent(5 * MIB, 2 * MIB), extent(u64::MAX, 4096)]
        {
            assert!(matches!(pieces(&[bad], 6 * MIB), Err(ReplicaError::Shape)), "{bad:?}");
        }
    }
}
