//! Guest memory without a guest: address space that a shard can scan and read from outside.
//!
//! Called by [`crate::machine`]. Refuses to hold anything but a mark of each stop.

use anyhow::{Context, Result};
use mica_units::Mebibytes;

const PAGE_BYTES: usize = 4096;

/// Pages that a stop writes to. They lie apart, so that a snapshot finds several runs.
const MARKED_PAGES: [usize; 4] = [1, 2, 40, 200];

/// Zeros of which nothing is there until it is written: the allocator maps so much by itself.
#[derive(Debug)]
pub struct Memory {
    bytes: Vec<u8>,
    /// Where the first whole page starts.
    start: usize,
}

impl Memory {
    /// Room for a guest.
    pub fn new(size: Mebibytes) -> Result<Self> {
        let length = usize::try_from(size.to_bytes()).context("so much memory")?;
        let bytes = vec![0; length + PAGE_BYTES];
        let start = bytes.as_ptr().align_offset(PAGE_BYTES);
        Ok(Self { bytes, start })
    }

    /// Where frame 0 is in this process.
    pub fn address(&self) -> Result<u64> {
        Ok(u64::try_from(self.bytes.as_ptr().addr() + self.start)?)
    }

    /// Number of frames.
    pub fn frames(&self) -> Result<u32> {
        Ok(u32::try_from((self.bytes.len() - PAGE_BYTES) / PAGE_BYTES)?)
    }

    /// Leaves a mark that differs with every stop.
    pub fn mark(&mut self, stop: u64) {
        for page in MARKED_PAGES {
            let at = self.start + page * PAGE_BYTES;
            if let Some(place) = self.bytes.get_mut(at..at + 8) {
                place.copy_from_slice(&stop.to_le_bytes());
            }
        }
    }
}
