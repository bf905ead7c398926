//! The working set of a snapshot: the frames a sandbox of it touches first.
//!
//! Called by shards after a first run and before a cold restore. Refuses to be more than a hint: it is
//! not part of the commit, is written without a sync, and one that is missing, torn or wrong reads as
//! none at all.

use std::io::Read;

use mica_units::FrameRun;

use crate::envelope::{Envelope, HEADER_BYTES};
use crate::error::{Result, StorageError};
use crate::layer::{Piece, restrict};
use crate::snapshot::Snapshot;
use crate::store::{Store, chain};
use crate::template::open_read;

pub(crate) const WORKING_SET_FILE: &str = "working-set";
const WORKING_SET_NEW: &str = "working-set.new";
/// Most runs of one working set.
pub const WORKING_SET_RUNS_MAX: usize = 65_536;
/// Frames that are read at once when a working set is prefetched: 64 KiB.
pub const PREFETCH_FRAMES: u32 = 16;
const RUN_BYTES: usize = 8;
const ENVELOPE: Envelope = Envelope {
    magic: b"MICAWSET",
    version: 1,
    bytes_max: HEADER_BYTES + WORKING_SET_RUNS_MAX * RUN_BYTES,
};

/// The reads that bring a working set into the page cache: the frames of `runs`, widened to whole
/// 64 KiB of the guest's memory, each where `pieces` say it is, in ascending order of frames and no
/// read longer than `frames_max`. Runs must be in ascending order.
#[must_use]
pub fn prefetch_plan(pieces: &[Piece], runs: &[FrameRun], frames_max: u32) -> Vec<Piece> {
    let mut wide: Vec<FrameRun> = Vec::with_capacity(runs.len());
    for run in runs {
        let first = run.first() - run.first() % PREFETCH_FRAMES;
        let end = run.end().next_multiple_of(PREFETCH_FRAMES);
        match wide.last_mut() {
            Some(last) if first <= last.end() => {
                *last = FrameRun::new(last.first(), end.max(last.end()) - last.first())
                    .unwrap_or(*last);
            }
            _ => wide.extend(FrameRun::new(first, end - first)),
        }
    }
    let frames_max = frames_max.max(1);
    let mut reads = Vec::new();
    for piece in restrict(pieces, &wide) {
        let mut done = 0;
        while done < piece.run.count() {
            let count = frames_max.min(piece.run.count() - done);
            let run = FrameRun::new(piece.run.first() + done, count);
            reads.extend(run.map(|run| Piece { run, page: piece.page + done, ..piece }));
            done += count;
        }
    }
    reads
}

fn encode(runs: &[FrameRun]) -> Vec<u8> {
    let words = runs.iter().flat_map(|run| [run.first(), run.count()]);
    words.flat_map(u32::to_le_bytes).collect()
}

/// `None` for runs that are empty, out of order or out of bounds.
fn decode(bytes: &[u8]) -> Option<Vec<FrameRun>> {
    let (words, rest) = bytes.as_chunks::<RUN_BYTES>();
    if !rest.is_empty() {
        return None;
    }
    let mut end = 0;
    words
        .iter()
        .map(|word| {
            let [a, b, c, d, e, f, g, h] = *word;
            let run =
                FrameRun::new(u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))?;
            let ordered = run.first() >= end;
            end = run.end();
            ordered.then_some(run)
        })
        .collect()
}

impl Snapshot {
    /// The frames to read first; none when nobody has found out yet.
    #[must_use]
    pub fn working_set(&self) -> Option<Vec<FrameRun>> {
        let file = open_read(&self.dir().join(WORKING_SET_FILE)).ok()?;
        let mut bytes = Vec::new();
        file.take(ENVELOPE.bytes_max as u64 + 1).read_to_end(&mut bytes).ok()?;
        decode(ENVELOPE.open(&bytes).ok()?)
    }
}

impl Store {
    /// Keeps the frames to read first, in ascending order, in place of what was kept before.
    ///
    /// # Errors
    /// When they are too many, or the file system fails. The snapshot is as good as before then.
    pub fn write_working_set(&self, snapshot: &Snapshot, runs: &[FrameRun]) -> Result<()> {
        let bytes =
            ENVELOPE.seal(&encode(runs)).map_err(|source| StorageError::Describe { source })?;
        let new = snapshot.dir().join(WORKING_SET_NEW);
        self.disk.remove_file_if_there(&new)?;
        let written = self
            .disk
            .write_new(&new, &bytes)
            .and_then(|_| self.disk.rename(&new, &snapshot.dir().join(WORKING_SET_FILE)));
        if written.is_err()
            && let Err(error) = self.disk.remove_file_if_there(&new)
        {
            tracing::warn!(error = %chain(&error), "the next start will remove it");
        }
        written
    }
}

#[cfg(test)]
mod tests;
