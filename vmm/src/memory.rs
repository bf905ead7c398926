//! Guest memory: anonymous mappings of this process, cut around the hole below 4 GiB.
//!
//! Called by `build`, once. Refuses sizes it cannot place. Nothing here or elsewhere makes a Rust
//! reference into guest memory: every access copies through `vm-memory`'s volatile accessors,
//! because the guest may write at any moment.

use mica_units::Mebibytes;
use vm_memory::mmap::FromRangesError;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::layout::{MEMORY_MIN, memory_spans};

/// Memory of one guest, shared by the boot code and the devices.
pub type GuestMemory = GuestMemoryMmap<()>;

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
    #[error("mapping {size} of guest memory failed; is the host out of address space?")]
    Map {
        /// What was asked for.
        size: Mebibytes,
        /// Why.
        #[source]
        source: FromRangesError,
    },
}

/// Maps zeroed guest memory. Pages cost nothing until they are touched.
///
/// # Errors
/// See [`MemoryError`].
pub fn map(memory: Mebibytes) -> Result<GuestMemory, MemoryError> {
    if memory < MEMORY_MIN {
        return Err(MemoryError::TooSmall(memory));
    }
    let ranges = memory_spans(memory)
        .into_iter()
        .map(|span| usize::try_from(span.bytes).map(|len| (GuestAddress(span.start.raw()), len)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| MemoryError::TooLarge(memory))?;
    GuestMemory::from_ranges(&ranges).map_err(|source| MemoryError::Map { size: memory, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn memory_starts_zeroed_and_has_its_hole() {
        let memory = map(Mebibytes::new(3074)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x10_0000)).unwrap(), 0);
        assert!(memory.read_obj::<u64>(GuestAddress(0xd000_0000)).is_err());
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1_0000_0000)).unwrap(), 0);
        assert_eq!(memory.last_addr(), GuestAddress(0x1_0000_0000 + (2 << 20) - 1));
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert!(matches!(map(Mebibytes::new(0)), Err(MemoryError::TooSmall(_))));
        // 4 PiB: more than 47 bits of address space.
        assert!(matches!(map(Mebibytes::new(u32::MAX)), Err(MemoryError::Map { .. })));
    }
}
