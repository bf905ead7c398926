//! Guest memory as frames: pages counted without the hole below 4 GiB.
//!
//! Called by whoever talks about parts of a guest's memory: layers, plans, scans. Frame `n` is the
//! `n`-th page of guest memory in ascending guest-physical order. In the VM process all of guest
//! memory is one contiguous range of addresses, so frame `n` lies at its start plus `n` pages.
//! Refuses ranges that wrap.

use crate::{Mebibytes, PAGE_BYTES};

/// Frames of a guest with this much memory.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "at most FRAMES_MAX where it is cast")]
pub const fn frames_of(memory: Mebibytes) -> u32 {
    // 2^32 - 1 MiB would be 2^40 frames; a guest that large cannot be made, see FRAMES_MAX.
    let frames = memory.to_bytes() / PAGE_BYTES;
    if frames > FRAMES_MAX as u64 { FRAMES_MAX } else { frames as u32 }
}

/// Most frames of one guest: 8 TiB.
pub const FRAMES_MAX: u32 = 1 << 31;

/// Bytes of so many frames, as the length of a buffer.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "4096 fits every usize")]
pub const fn frames_len(frames: u32) -> usize {
    (frames as usize).saturating_mul(PAGE_BYTES as usize)
}

/// A run of frames, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameRun {
    first: u32,
    count: u32,
}

impl FrameRun {
    /// `count` frames from `first` on. `None` when that is none, or reaches past [`FRAMES_MAX`].
    #[must_use]
    pub const fn new(first: u32, count: u32) -> Option<Self> {
        match first.checked_add(count) {
            Some(end) if count > 0 && end <= FRAMES_MAX => Some(Self { first, count }),
            _ => None,
        }
    }

    /// The first frame.
    #[must_use]
    pub const fn first(self) -> u32 {
        self.first
    }

    /// How many frames.
    #[must_use]
    pub const fn count(self) -> u32 {
        self.count
    }

    /// The frame after the last.
    #[must_use]
    pub const fn end(self) -> u32 {
        self.first + self.count
    }

    /// Offset of the first byte from the start of guest memory.
    #[must_use]
    pub const fn offset_bytes(self) -> u64 {
        self.first as u64 * PAGE_BYTES
    }

    /// Its length.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.count as u64 * PAGE_BYTES
    }

    /// The frames that are in both.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        Self::new(first, end.checked_sub(first)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_never_empty_and_never_wrap() {
        assert_eq!(FrameRun::new(1, 0), None);
        assert_eq!(FrameRun::new(u32::MAX, 1), None);
        assert_eq!(FrameRun::new(FRAMES_MAX, 1), None);
        let run = FrameRun::new(FRAMES_MAX - 1, 1).unwrap();
        assert_eq!((run.end(), run.bytes()), (FRAMES_MAX, 4096));
        assert_eq!(frames_of(Mebibytes::new(2)), 512);
        assert_eq!(frames_of(Mebibytes::new(u32::MAX)), FRAMES_MAX);
    }

    #[test]
    fn intersections_are_what_both_hold() {
        let run = |first, count| FrameRun::new(first, count).unwrap();
        assert_eq!(run(0, 10).intersection(run(5, 10)), Some(run(5, 5)));
        assert_eq!(run(0, 5).intersection(run(5, 5)), None);
        assert_eq!(run(9, 1).intersection(run(0, 5)), None);
        assert_eq!(run(0, 10).intersection(run(3, 2)), Some(run(3, 2)));
    }
}
