//! Memory mappings that are accessed by copying, never by reference.
//!
//! Called by `memfd` to fill a replica, by `process` and by tests, which play a guest's memory with it.
//! Copies only, because the memory may be shared with others who write to it meanwhile: a reference to
//! it would promise the compiler what nobody keeps. Refuses every access outside of the mapping. A
//! mapped file that somebody shortens still ends this process (SIGBUS): map only what is sealed or
//! nobody else's.

#![expect(unsafe_code, reason = "mappings are addresses")]

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::MemoryPolicy;

/// A mapping, unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value and to no thread.
unsafe impl Send for Mapping {}

impl Mapping {
    /// New memory, all zero, not yet there.
    ///
    /// # Errors
    /// When there is no room for it.
    pub fn anonymous(bytes: u64) -> io::Result<Self> {
        let bytes = length(bytes)?;
        let (protection, flags) = access(MapFlags::PRIVATE);
        // SAFETY: a null hint without MAP_FIXED makes a new mapping and touches no other.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags) }?;
        Self::over(start, bytes)
    }

    /// A file's bytes from 0 on; what is written to them stays here.
    ///
    /// # Errors
    /// When the file cannot be mapped.
    pub fn private(file: impl AsFd, bytes: u64) -> io::Result<Self> {
        Self::of_file(file, bytes, MapFlags::PRIVATE)
    }

    /// A file's bytes from 0 on; what is written to them is the file's.
    ///
    /// # Errors
    /// When the file cannot be mapped or not be written.
    pub fn shared(file: impl AsFd, bytes: u64) -> io::Result<Self> {
        Self::of_file(file, bytes, MapFlags::SHARED)
    }

    fn of_file(file: impl AsFd, bytes: u64, kind: MapFlags) -> io::Result<Self> {
        let bytes = length(bytes)?;
        let (protection, flags) = access(kind);
        // SAFETY: as in `anonymous`.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, protection, flags, file, 0) }?;
        Self::over(start, bytes)
    }

    fn over(start: *mut core::ffi::c_void, bytes: usize) -> io::Result<Self> {
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, bytes })
    }

    /// The address of its first byte in this process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start.as_ptr().expose_provenance() as u64
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// The address of `length` bytes at `offset`, which are all inside.
    fn at(&self, offset: u64, length: usize) -> io::Result<NonNull<u8>> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let offset = usize::try_from(offset).map_err(|_| outside())?;
        let end = offset.checked_add(length).ok_or_else(outside)?;
        if end > self.bytes {
            return Err(outside());
        }
        // SAFETY: the offset is at most the length of the mapping.
        Ok(unsafe { self.start.add(offset) })
    }

    /// Copies from the mapping.
    ///
    /// # Errors
    /// `InvalidInput` when part of it is outside.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let from = self.at(offset, into.len())?;
        // SAFETY: `from` is valid for that many bytes, of a mapping that no reference points into, so
        // the two do not overlap. Bytes that another writes meanwhile come out as one or the other:
        // each is initialised, and no meaning is given to them here.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies to the mapping.
    ///
    /// # Errors
    /// `InvalidInput` when part of it is outside.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: `to` is valid for that many bytes of a writable mapping that no reference points
        // into, so the two do not overlap and nobody is promised that it stays as it is.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Gives up what is in memory there: it is the file's bytes again, or zero. Whole pages.
    ///
    /// # Errors
    /// `InvalidInput` when part of it is outside, or not page-aligned.
    pub fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.advise(offset, bytes, Advice::LinuxDontNeed)
    }

    /// Brings the pages into memory, writable, on this thread's node.
    ///
    /// # Errors
    /// When there is no memory, or part of it is outside.
    pub fn populate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.advise(offset, bytes, Advice::LinuxPopulateWrite)
    }

    /// Has what comes into this memory lie on `node`: with [`MemoryPolicy::Bind`] nowhere else, otherwise
    /// while that has room. Of a shared mapping it is the file's memory that has this policy, whoever writes
    /// to it.
    ///
    /// # Errors
    /// When there is no such node, or the kernel knows no nodes.
    pub fn place_on(&self, node: u32, policy: MemoryPolicy) -> io::Result<()> {
        let start = self.start.as_ptr().expose_provenance();
        crate::sys::place_on(start, self.bytes, node, policy == MemoryPolicy::Bind)
    }

    fn advise(&self, offset: u64, bytes: u64, advice: Advice) -> io::Result<()> {
        let bytes = length(bytes)?;
        let start = self.at(offset, bytes)?;
        // SAFETY: the range is inside this mapping, whose bytes no reference promises to keep.
        unsafe { madvise(start.as_ptr().cast(), bytes, advice) }?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that the value owns, whole, and nothing points into it.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "this was not a mapping");
    }
}

fn length(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn access(kind: MapFlags) -> (ProtFlags, MapFlags) {
    (ProtFlags::READ | ProtFlags::WRITE, kind | MapFlags::NORESERVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_stay_inside() {
        let mapping = Mapping::anonymous(8192).unwrap();
        mapping.write(8190, b"ab").unwrap();
        let mut two = [0; 2];
        mapping.read(8190, &mut two).unwrap();
        assert_eq!(two, *b"ab");
        for offset in [8191, 8192, u64::MAX] {
            assert_eq!(mapping.read(offset, &mut two).unwrap_err().kind(), ErrorKind::InvalidInput);
            assert_eq!(mapping.write(offset, b"ab").unwrap_err().kind(), ErrorKind::InvalidInput);
        }
        assert!(mapping.discard(4096, 8192).is_err());
        mapping.discard(4096, 4096).unwrap();
        mapping.read(8190, &mut two).unwrap();
        assert_eq!(two, [0; 2]);
    }

    use std::io::ErrorKind;

    #[test]
    fn private_writes_stay_here_and_shared_ones_do_not() {
        let file = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        let shared = Mapping::shared(&file, 4096).unwrap();
        let private = Mapping::private(&file, 4096).unwrap();
        shared.write(0, b"shared").unwrap();
        let mut byte = [0];
        private.read(0, &mut byte).unwrap();
        assert_eq!(byte, *b"s");
        private.write(0, b"p").unwrap();
        shared.read(0, &mut byte).unwrap();
        assert_eq!(byte, *b"s");
        private.discard(0, 4096).unwrap();
        private.read(0, &mut byte).unwrap();
        assert_eq!(byte, *b"s");
    }
}
