//! Gives guest memory that nobody uses back to the host.
//!
//! Called by the balloon device. Refuses what is not guest memory, and leaves alone the ends of a run
//! that are no whole page.

#![expect(unsafe_code, reason = "madvise takes raw addresses")]

use std::io;

use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::virtio::GuestRam;

const PAGE_BYTES: u64 = mica_units::PAGE_BYTES;

/// Why a run was not given back.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// It is not guest memory from end to end.
    #[error("the run lies outside guest memory")]
    Outside,
    /// The kernel refused.
    #[error("madvise failed")]
    Os(#[source] io::Error),
}

/// Drops what was written to the whole pages within `bytes` from `start` on: they are not
/// anonymous memory of this process afterwards, so they cost nothing and no snapshot holds them. Read
/// again they are what the mapping has there: a layer's content, or zeros.
///
/// # Errors
/// See [`DiscardError`].
pub fn discard(memory: &GuestRam, start: GuestAddress, bytes: u32) -> Result<(), DiscardError> {
    let end = start.0.checked_add(u64::from(bytes)).ok_or(DiscardError::Outside)?;
    // Regions start at page boundaries in the guest and in this process.
    let first = start.0.checked_next_multiple_of(PAGE_BYTES).ok_or(DiscardError::Outside)?;
    let length = (end - end % PAGE_BYTES).saturating_sub(first);
    let length = usize::try_from(length).map_err(|_| DiscardError::Outside)?;
    if length == 0 {
        return Ok(());
    }
    let run = memory.get_slice(GuestAddress(first), length).map_err(|_| DiscardError::Outside)?;
    let at = run.ptr_guard_mut();
    // SAFETY: `get_slice` checked that all of `at..at + length` is one region of guest memory, which
    // `memory` keeps mapped for the length of this borrow. Its content may change at any moment by
    // the hand of the guest, so nothing in this process holds a reference into it or relies on it.
    unsafe { madvise(at.as_ptr().cast(), length, Advice::LinuxDontNeed) }
        .map_err(|errno| DiscardError::Os(errno.into()))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, FileOffset, GuestRegionMmap};

    use super::*;

    const PAGES: usize = 8;
    const BYTES: usize = PAGES * 4096;

    /// Two regions of eight pages: a layer's, mapped privately over a file of `7`s, and, behind a
    /// hole, an anonymous one. Both are then written full of `9`s.
    fn memory() -> GuestRam {
        let fd = rustix::fs::memfd_create("layer", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.write_all_at(&[7; BYTES], 0).unwrap();
        let region = || {
            MmapRegionBuilder::new_with_bitmap(BYTES, None)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE)
        };
        let layer = region().with_file_offset(FileOffset::new(file, 0)).build().unwrap();
        let layer = GuestRegionMmap::new(layer, GuestAddress(0)).unwrap();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let anonymous = region().with_mmap_flags(flags).build().unwrap();
        let anonymous = GuestRegionMmap::new(anonymous, GuestAddress(HIGH)).unwrap();
        let memory = GuestRam::from_regions(vec![layer, anonymous]).unwrap();
        for start in [0, HIGH] {
            memory.write_slice(&[9; BYTES], GuestAddress(start)).unwrap();
        }
        memory
    }

    const HIGH: u64 = 1 << 20;

    /// The first and the last byte of each page.
    fn content(memory: &GuestRam, start: u64) -> Vec<(u8, u8)> {
        let byte = |at: u64| memory.read_obj(GuestAddress(at)).unwrap();
        let pages = (start..start + BYTES as u64).step_by(4096);
        pages.map(|page| (byte(page), byte(page + 4095))).collect()
    }

    #[test]
    fn a_layer_shows_again_and_anonymous_memory_is_zero() {
        let memory = memory();
        for (start, rest) in [(0, 7), (HIGH, 0)] {
            discard(&memory, GuestAddress(start + 4096), 2 * 4096).unwrap();
            let mut expected = vec![(9, 9); PAGES];
            expected[1..3].fill((rest, rest));
            assert_eq!(content(&memory, start), expected);
        }
    }

    #[test]
    fn ends_that_are_no_whole_page_are_kept() {
        let memory = memory();
        for (start, bytes) in [(0, 0), (4096, 4095), (1, 4096), (1, 8190), (4095, 2)] {
            discard(&memory, GuestAddress(start), bytes).unwrap();
            assert_eq!(content(&memory, 0), [(9, 9); PAGES], "{start} {bytes}");
        }
        discard(&memory, GuestAddress(1), 8191).unwrap();
        assert_eq!(content(&memory, 0)[..3], [(9, 9), (7, 7), (9, 9)]);
    }

    #[test]
    fn nothing_outside_guest_memory_is_touched() {
        let memory = memory();
        let whole = u32::try_from(BYTES).unwrap();
        for (start, bytes) in [
            (BYTES as u64, 4096),
            (0, whole + 4096),
            (HIGH, whole + 4096),
            (0, u32::MAX),
            (u64::MAX - 4095, 4096),
            (u64::MAX, 1),
            (u64::MAX - 8192, u32::MAX),
        ] {
            let refused = discard(&memory, GuestAddress(start), bytes);
            assert!(matches!(refused, Err(DiscardError::Outside)), "{start:#x} {bytes}");
        }
        assert_eq!(content(&memory, 0), [(9, 9); PAGES]);
        assert_eq!(content(&memory, HIGH), [(9, 9); PAGES]);
    }
}
