//! Guest memory: one range of this process's addresses, seen by the guest with a hole below 4 GiB.
//!
//! Called by `build`, which reserves it once, and by `restore`, which maps layers into it. Refuses sizes it cannot place, and runs outside the guest. Nothing
//! here or elsewhere makes a Rust reference into guest memory: every access copies through
//! `vm-memory`'s volatile accessors, because the guest may write at any moment.
//!
//! ```text
//!  address   memory_address                                          + all of guest memory
//!            ┌───────────────────────────────┬──────────────────────┐
//!  frame     0 …                             │ … 786432 …           │
//!            └───────────────────────────────┴──────────────────────┘
//!  guest     0 ………………………………………………… 3 GiB   4 GiB ……………………………………
//! ```
//! The range stays reserved until the process ends, whatever is mapped into it, so a copy of the
//! regions can never point to something else.

#![expect(unsafe_code, reason = "mapping files over a reserved range; each block argues why")]

mod forget;
mod plan;
mod userfault;

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::null_mut;

use mica_units::{FRAMES_MAX, FrameRun, Mebibytes, frames_of};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::layout::{MEMORY_MIN, memory_spans};

pub use forget::PIDFD_SELF;
pub use plan::{ApplyError, Layer, LayerError};
pub use userfault::Userfault;

/// Memory of one guest as the boot code and the devices see it. With a log, it notes which pages they
/// write.
pub type GuestMemory = GuestMemoryMmap<Option<AtomicBitmap>>;

/// What a page of the log stands for.
const LOG_PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

const _: () = assert!(LOG_PAGE.get() as u64 == mica_units::PAGE_BYTES);

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Below the smallest guest.
    #[error("guest memory of {0} is below {MEMORY_MIN}; ask for more")]
    TooSmall(Mebibytes),
    /// More than this process could ever address.
    #[error("guest memory of {0} does not fit this host's address space; ask for less")]
    TooLarge(Mebibytes),
    /// The kernel refused the mapping.
    #[error("reserving {size} of addresses failed; is the host out of address space?")]
    Reserve {
        /// What was asked for.
        size: Mebibytes,
        /// Why.
        #[source]
        source: Errno,
    },
    /// The pieces do not make a guest memory: a mistake in the layout.
    #[error("guest memory cannot be cut around the hole")]
    Cut(#[source] MmapRegionError),
}

/// The reserved range, and the guest's view of it.
#[derive(Clone, Debug)]
pub struct Memory {
    guest: GuestMemory,
    frames: u32,
}

impl Memory {
    /// Reserves zeroed guest memory. Pages cost nothing until they are touched.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn reserve(memory: Mebibytes) -> Result<Self, MemoryError> {
        Self::reserve_with(memory, false)
    }

    /// The same; with `log`, what the devices write is noted.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn reserve_with(memory: Mebibytes, log: bool) -> Result<Self, MemoryError> {
        if memory < MEMORY_MIN {
            return Err(MemoryError::TooSmall(memory));
        }
        let frames = frames_of(memory);
        let bytes =
            usize::try_from(memory.to_bytes()).map_err(|_| MemoryError::TooLarge(memory))?;
        if frames == FRAMES_MAX {
            return Err(MemoryError::TooLarge(memory));
        }
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a null hint without MAP_FIXED makes a new mapping and touches no other.
        let start = unsafe { mmap_anonymous(null_mut(), bytes, PROTECTION, flags) }
            .map_err(|source| MemoryError::Reserve { size: memory, source })?;
        Ok(Self { guest: cut(start.cast(), memory, log)?, frames })
    }

    /// The guest's view.
    #[must_use]
    pub fn guest(&self) -> &GuestMemory {
        &self.guest
    }

    /// How many frames there are.
    #[must_use]
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// The address of frame 0 in this process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start().addr() as u64
    }

    /// Gives the content of all of guest memory back to the host.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn clear(&self) -> Result<(), Errno> {
        let all = FrameRun::new(0, self.frames).ok_or(Errno::INVAL)?;
        let (start, bytes) = self.place(all)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: `place` checked that the range is within the reservation, and it is all of it, so
        // no other mapping is replaced. Nothing refers into it but volatile accessors.
        unsafe { mmap_anonymous(start, bytes, PROTECTION, flags) }?;
        Ok(())
    }

    /// Takes what the devices wrote since the last time, a bit for each frame, in order; none without a
    /// log. Nothing writes meanwhile.
    #[must_use]
    pub fn take_written(&self) -> Option<Vec<u64>> {
        let mut words = Vec::new();
        for region in self.guest.iter() {
            words.extend(MmapRegion::bitmap(region).as_ref()?.get_and_reset());
        }
        Some(words)
    }

    fn start(&self) -> *mut u8 {
        // There is always a first region, at 0.
        self.guest.get_host_address(GuestAddress(0)).unwrap_or(null_mut())
    }

    /// Where a run lies in this process, and its length. An error outside the guest.
    fn place(&self, run: FrameRun) -> Result<(*mut c_void, usize), Errno> {
        if run.end() > self.frames {
            return Err(Errno::FAULT);
        }
        let offset = usize::try_from(run.offset_bytes()).map_err(|_| Errno::FAULT)?;
        let bytes = usize::try_from(run.bytes()).map_err(|_| Errno::FAULT)?;
        // Within the reservation, because the run is within the guest.
        Ok((self.start().wrapping_add(offset).cast(), bytes))
    }
}

const PROTECTION: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// The guest's view of a reservation that starts at `start`.
fn cut(start: *mut u8, memory: Mebibytes, log: bool) -> Result<GuestMemory, MemoryError> {
    let mut regions = Vec::with_capacity(2);
    let mut offset = 0;
    for span in memory_spans(memory) {
        let bytes = usize::try_from(span.bytes).map_err(|_| MemoryError::TooLarge(memory))?;
        let written = log.then(|| AtomicBitmap::new(bytes, LOG_PAGE));
        let builder = MmapRegionBuilder::new_with_bitmap(bytes, written)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE);
        // SAFETY: the spans add up to the reservation, so this piece is within it, and the reservation
        // is never given up. The region does not own it and will not unmap it.
        let builder = unsafe { builder.with_raw_mmap_pointer(start.wrapping_add(offset)) };
        let region = builder.build().map_err(MemoryError::Cut)?;
        offset += bytes;
        let region = GuestRegionMmap::new(region, GuestAddress(span.start.raw()));
        regions.push(region.ok_or(MemoryError::TooLarge(memory))?);
    }
    GuestMemory::from_regions(regions).map_err(|_| MemoryError::TooLarge(memory))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_starts_zeroed_and_has_its_hole() {
        let memory = Memory::reserve(Mebibytes::new(3074)).unwrap();
        let guest = memory.guest();
        assert_eq!(guest.read_obj::<u64>(GuestAddress(0x10_0000)).unwrap(), 0);
        assert!(guest.read_obj::<u64>(GuestAddress(0xd000_0000)).is_err());
        assert_eq!(guest.read_obj::<u64>(GuestAddress(0x1_0000_0000)).unwrap(), 0);
        assert_eq!(guest.last_addr(), GuestAddress(0x1_0000_0000 + (2 << 20) - 1));
    }

    #[test]
    fn frames_are_contiguous_across_the_hole() {
        let memory = Memory::reserve(Mebibytes::new(3074)).unwrap();
        assert_eq!(memory.frames(), 3074 * 256);
        let host = |at| memory.guest().get_host_address(GuestAddress(at)).unwrap().addr() as u64;
        assert_eq!(host(0), memory.address());
        assert_eq!(host(0x1_0000_0000), memory.address() + 0xc000_0000);
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let refusal = |mebibytes| Memory::reserve(Mebibytes::new(mebibytes)).unwrap_err();
        assert!(matches!(refusal(0), MemoryError::TooSmall(_)));
        assert!(matches!(refusal(u32::MAX), MemoryError::TooLarge(_)));
    }

    #[test]
    fn memory_that_was_cleared_is_zero_and_still_there() {
        let memory = Memory::reserve(Mebibytes::new(4)).unwrap();
        memory.guest().write_obj(7u64, GuestAddress(0x1000)).unwrap();
        memory.clear().unwrap();
        assert_eq!(memory.guest().read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0);
    }
}
