//! The exchange: a memfd through which plans and states travel.
//!
//! Called by `freeze` to write, by `restore` to read. The shard may write to it at any moment, so what is
//! read is copied out first and looked at afterwards. Refuses parts that do not lie inside it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use mica_units::PAGE_BYTES;
use mica_wire::vm::EXCHANGE_PART_BYTES_MAX;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Why there is no exchange.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The memfd is not what the configuration says.
    #[error("the exchange has {actual} bytes, the configuration says {expected}")]
    Length {
        /// Length of the file.
        actual: u64,
        /// `exchange_bytes` of the configuration.
        expected: u64,
    },
    /// Its length could not be read.
    #[error("reading the length of the exchange failed")]
    Stat(#[source] io::Error),
    /// It could not be mapped.
    #[error("mapping the exchange failed")]
    Map(#[source] MmapRegionError),
}

/// A part that does not lie in the exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes at {offset} do not lie in the exchange")]
pub struct OutsideExchange {
    offset: u64,
    bytes: u64,
}

/// The memfd. Written through a mapping, because the limit on the size of files is for the disk, and
/// read without one, because a first look at each page of a mapping costs more than the copy.
#[derive(Debug)]
pub struct Exchange {
    map: MmapRegion<()>,
    file: File,
}

impl Exchange {
    /// Maps the memfd, which must be as long as it is said to be, and sealed so.
    ///
    /// # Errors
    /// See [`ExchangeError`].
    pub fn new(memfd: OwnedFd, bytes: u64) -> Result<Self, ExchangeError> {
        let file = File::from(memfd);
        let actual = file.metadata().map_err(ExchangeError::Stat)?.len();
        let wrong = ExchangeError::Length { actual, expected: bytes };
        let Ok(length) = usize::try_from(bytes) else { return Err(wrong) };
        if actual != bytes || length == 0 {
            return Err(wrong);
        }
        let twin = file.try_clone().map_err(ExchangeError::Stat)?;
        let map =
            MmapRegion::from_file(FileOffset::new(twin, 0), length).map_err(ExchangeError::Map)?;
        Ok(Self { map, file })
    }

    /// The number of the memfd in this process. It stays open as long as this lives.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Where a state lies behind a plan of this length.
    #[must_use]
    pub fn behind(plan_bytes: u64) -> u64 {
        plan_bytes.checked_next_multiple_of(PAGE_BYTES).unwrap_or(u64::MAX)
    }

    /// Copies a part out.
    ///
    /// # Errors
    /// When it does not lie in the exchange, or is longer than a part may be.
    pub fn read(&self, offset: u64, bytes: u64) -> Result<Vec<u8>, OutsideExchange> {
        let outside = OutsideExchange { offset, bytes };
        let in_bounds = bytes <= EXCHANGE_PART_BYTES_MAX
            && offset.checked_add(bytes).is_some_and(|end| end <= self.map.size() as u64);
        let (Ok(length), true) = (usize::try_from(bytes), in_bounds) else {
            return Err(outside);
        };
        let mut part = vec![0; length];
        // Its length is sealed, so what lies inside can be read.
        self.file.read_exact_at(&mut part, offset).map_err(|_| outside)?;
        Ok(part)
    }

    /// Puts a part at the start.
    ///
    /// # Errors
    /// When it is longer than the exchange.
    pub fn write(&self, part: &[u8]) -> Result<(), OutsideExchange> {
        self.write_at(part, 0)
    }

    /// Puts a part behind another.
    ///
    /// # Errors
    /// When it does not lie in the exchange.
    pub fn write_at(&self, part: &[u8], offset: u64) -> Result<(), OutsideExchange> {
        let outside = OutsideExchange { offset, bytes: part.len() as u64 };
        let at = usize::try_from(offset).map_err(|_| outside)?;
        self.map.as_volatile_slice().write_slice(part, at).map_err(|_| outside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn memfd(bytes: u64) -> OwnedFd {
        let fd = memfd_create("exchange", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, bytes).unwrap();
        fd
    }

    #[test]
    fn parts_go_in_and_come_out() {
        let exchange = Exchange::new(memfd(3 * PAGE_BYTES), 3 * PAGE_BYTES).unwrap();
        exchange.write(&[7; 5000]).unwrap();
        assert_eq!(exchange.read(4090, 20).unwrap(), [7; 20]);
        assert_eq!(exchange.read(4990, 20).unwrap()[10..], [0; 10]);
        assert_eq!(Exchange::behind(0), 0);
        assert_eq!(Exchange::behind(16), PAGE_BYTES);
    }

    #[test]
    fn what_lies_outside_is_refused() {
        assert!(Exchange::new(memfd(PAGE_BYTES), 2 * PAGE_BYTES).is_err());
        assert!(Exchange::new(memfd(0), 0).is_err());
        let exchange = Exchange::new(memfd(PAGE_BYTES), PAGE_BYTES).unwrap();
        for (offset, bytes) in [
            (0, PAGE_BYTES + 1),
            (PAGE_BYTES, 1),
            (u64::MAX, 1),
            (1, u64::MAX),
            (u64::MAX, u64::MAX),
        ] {
            assert!(exchange.read(offset, bytes).is_err(), "{offset} {bytes}");
        }
        assert!(exchange.write(&[0; 4097]).is_err());
        assert!(exchange.write_at(&[0; 2], 4095).is_err());
        assert!(exchange.read(PAGE_BYTES, 0).unwrap().is_empty());
    }
}
