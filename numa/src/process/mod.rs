//! Another process's memory and descriptors, from outside: what it wrote, and the bytes.
//!
//! Called by `shards` on VM processes, with their guests stopped. The other process is hostile: it may
//! unmap, remap and end at any moment. All that this can do is make a call fail or give bytes of its own;
//! every answer is bounded by what was asked for. Its number cannot come to mean another process
//! unnoticed: a [`Process`] holds a pidfd, and asks it after each use of the number.
//!
//! One thing is the caller's to see to: reading a page that the process has put behind a userfaultfd of
//! its own waits for that process. A VM process must not be able to register memory for missing pages
//! once guest code has run in it (its seccomp filter refuses the ioctls; the registrations are made here,
//! through [`crate::userfault`]).

mod pagemap;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use mica_units::{FrameRun, PAGE_BYTES};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

pub use crate::sys::RemoteRange;
pub use pagemap::{Pagemap, Scan, Wanted};

use crate::io::IoBuf;
use crate::sys;

/// Ranges of one system call (UIO_MAXIOV).
const RANGES_PER_CALL: usize = 1024;

/// Why something about another process failed.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It ended.
    #[error("the process is gone")]
    Gone,
    /// No right to look into it.
    #[error("no permission to look into the process; the daemon needs CAP_SYS_PTRACE")]
    Denied,
    /// A page is not there, or not readable.
    #[error("the memory of the process at {address:#x} cannot be accessed")]
    Unreadable {
        /// The first address that failed.
        address: u64,
    },
    /// More was asked for than the buffer has room for, or a range that is no range.
    #[error("the range is outside of the memory, or longer than the buffer")]
    Range,
    /// Part of the memory is not registered for tracking.
    #[error("the memory is not registered for write tracking")]
    NotTracked,
    /// This kernel cannot.
    #[error("this kernel cannot track writes; Linux 6.7 or newer can")]
    Unsupported,
    /// Anything else the kernel said.
    #[error("cannot {what}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl ProcessError {
    fn of(what: &'static str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ESRCH) => Self::Gone,
            Some(libc::EPERM | libc::EACCES) => Self::Denied,
            _ => Self::Kernel { what, source },
        }
    }
}

/// The memory of a guest as it lies in its process: one range of addresses, frame 0 first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteMemory {
    address: u64,
    frames: u32,
}

impl RemoteMemory {
    /// `frames` frames from `address` on. `None` when that is not page-aligned, is empty, or wraps.
    #[must_use]
    pub fn new(address: u64, frames: u32) -> Option<Self> {
        let end = address.checked_add(u64::from(frames) * PAGE_BYTES)?;
        let good = frames > 0 && address.is_multiple_of(PAGE_BYTES) && end <= 1 << 56;
        good.then_some(Self { address, frames })
    }

    /// All of it.
    #[must_use]
    pub fn all(self) -> Option<FrameRun> {
        FrameRun::new(0, self.frames)
    }

    /// How many frames.
    #[must_use]
    pub fn frames(self) -> u32 {
        self.frames
    }

    /// Where a run of frames lies. `None` when part of it is outside.
    #[must_use]
    pub fn range(self, run: FrameRun) -> Option<RemoteRange> {
        let inside = run.end() <= self.frames;
        let address = self.address + run.offset_bytes();
        inside.then_some(RemoteRange { address, bytes: run.bytes() })
    }

    /// The frame that lies at `address`, rounded down. `None` outside.
    #[must_use]
    pub fn frame_at(self, address: u64) -> Option<u32> {
        let frame = address.checked_sub(self.address)? / PAGE_BYTES;
        u32::try_from(frame).ok().filter(|frame| *frame < self.frames)
    }
}

/// A process that is not this one.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Process {
    /// The process that has this number now.
    ///
    /// # Errors
    /// [`ProcessError::Gone`] when none has.
    pub fn open(pid: Pid) -> Result<Self, ProcessError> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty())
            .map_err(|errno| ProcessError::of("open a pidfd", errno.into()))?;
        Ok(Self { pid, pidfd })
    }

    /// A process by number and pidfd, which are the same process's.
    #[must_use]
    pub fn from_parts(pid: Pid, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd }
    }

    /// The same process once more, for another thread.
    ///
    /// # Errors
    /// When this process has no descriptor left.
    pub fn try_clone(&self) -> Result<Self, ProcessError> {
        let pidfd = self.pidfd.try_clone();
        let pidfd = pidfd.map_err(|source| ProcessError::of("duplicate a pidfd", source))?;
        Ok(Self { pid: self.pid, pidfd })
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// That the number was this process's until now.
    fn check(&self) -> Result<(), ProcessError> {
        if sys::pidfd_exists(self.pidfd.as_fd()) { Ok(()) } else { Err(ProcessError::Gone) }
    }

    /// A duplicate of the process's descriptor `number`.
    ///
    /// # Errors
    /// When it has none of that number, or is gone.
    pub fn getfd(&self, number: RawFd) -> Result<OwnedFd, ProcessError> {
        pidfd_getfd(&self.pidfd, number, PidfdGetfdFlags::empty())
            .map_err(|errno| ProcessError::of("take a descriptor of the process", errno.into()))
    }

    /// Its page map.
    ///
    /// # Errors
    /// When it is gone or not ours to look into.
    pub fn pagemap(&self) -> Result<Pagemap, ProcessError> {
        let pagemap = Pagemap::open(self.pid)?;
        self.check()?;
        Ok(pagemap)
    }

    /// Copies frames, one run behind the other, behind what the buffer holds. Blocks for the time of
    /// the copy, about a tenth of a millisecond for each 2^20 bytes.
    ///
    /// # Errors
    /// [`ProcessError::Range`] when a run is outside of the memory or the buffer has no room for all;
    /// [`ProcessError::Unreadable`] at the first page that is not there: the buffer then holds what was
    /// copied before it.
    pub fn read_frames(
        &self,
        memory: RemoteMemory,
        runs: &[FrameRun],
        buffer: &mut IoBuf,
    ) -> Result<(), ProcessError> {
        let ranges: Option<Vec<_>> = runs.iter().map(|run| memory.range(*run)).collect();
        self.read(&ranges.ok_or(ProcessError::Range)?, buffer)
    }

    /// The same as bytes of this process's own, for a thread that may wait: where pages come on demand,
    /// reading one waits for whoever brings them.
    ///
    /// # Errors
    /// As [`Self::read_frames`].
    pub fn copy_frames(
        &self,
        memory: RemoteMemory,
        runs: &[FrameRun],
    ) -> Result<Vec<u8>, ProcessError> {
        let ranges: Option<Vec<_>> = runs.iter().map(|run| memory.range(*run)).collect();
        let ranges = ranges.ok_or(ProcessError::Range)?;
        let bytes = ranges.iter().try_fold(0u64, |sum, range| sum.checked_add(range.bytes));
        let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
        let mut copy = vec![0; bytes.ok_or(ProcessError::Range)?];
        let pid = self.pid.as_raw_nonzero().get();
        let mut done = 0;
        self.transfer(&ranges, |ranges, bytes| {
            let copied = sys::process_vm_readv(pid, &mut copy[done..done + bytes], ranges)?;
            done += copied;
            Ok(copied)
        })?;
        Ok(copy)
    }

    /// As [`Self::read_frames`], for any ranges.
    ///
    /// # Errors
    /// As there.
    pub fn read(&self, ranges: &[RemoteRange], buffer: &mut IoBuf) -> Result<(), ProcessError> {
        let wanted = ranges.iter().try_fold(0u64, |sum, range| sum.checked_add(range.bytes));
        if wanted.is_none_or(|wanted| wanted > buffer.room() as u64) {
            return Err(ProcessError::Range);
        }
        let pid = self.pid.as_raw_nonzero().get();
        self.transfer(ranges, |ranges, bytes| {
            let copied = sys::process_vm_readv(pid, &mut buffer.room_mut()[..bytes], ranges)?;
            buffer.filled(copied);
            Ok(copied)
        })
    }

    /// Copies `bytes` into the process, at `address`.
    ///
    /// # Errors
    /// [`ProcessError::Denied`] when it is this process: its own memory is the compiler's to arrange.
    /// [`ProcessError::Unreadable`] at the first page that is not there or not writable.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), ProcessError> {
        if self.pid == rustix::process::getpid() {
            return Err(ProcessError::Denied);
        }
        let pid = self.pid.as_raw_nonzero().get();
        let mut rest = bytes;
        self.transfer(&[RemoteRange { address, bytes: bytes.len() as u64 }], |ranges, count| {
            let copied = sys::process_vm_writev(pid, &rest[..count], ranges)?;
            rest = &rest[copied..];
            Ok(copied)
        })
    }

    /// Calls `copy` with ranges and the sum of their bytes until all is copied.
    fn transfer(
        &self,
        ranges: &[RemoteRange],
        mut copy: impl FnMut(&[RemoteRange], usize) -> io::Result<usize>,
    ) -> Result<(), ProcessError> {
        for batch in ranges.chunks(RANGES_PER_CALL) {
            let mut rest: Vec<RemoteRange> =
                batch.iter().copied().filter(|range| range.bytes > 0).collect();
            while let Some(first) = rest.first() {
                let address = first.address;
                let bytes = rest.iter().map(|range| range.bytes).sum::<u64>();
                let bytes = usize::try_from(bytes).map_err(|_| ProcessError::Range)?;
                match copy(&rest, bytes) {
                    // Nothing, and no error: the kernel does not say so, and this must end.
                    Ok(0) => return Err(ProcessError::Unreadable { address }),
                    Ok(copied) => advance(&mut rest, copied as u64),
                    Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                        self.check()?;
                        return Err(ProcessError::Unreadable { address });
                    }
                    Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                    Err(error) => return Err(ProcessError::of("copy memory", error)),
                }
            }
        }
        self.check()
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Takes `bytes` off the front of `ranges`.
fn advance(ranges: &mut Vec<RemoteRange>, mut bytes: u64) {
    let mut whole = 0;
    for range in ranges.iter_mut() {
        if bytes < range.bytes {
            range.address += bytes;
            range.bytes -= bytes;
            break;
        }
        bytes -= range.bytes;
        whole += 1;
    }
    ranges.drain(..whole);
}

/// Cuts runs into batches of `frames` frames each, in order, the last one shorter: what fills one
/// buffer after the other.
pub fn batches(runs: &[FrameRun], frames: u32) -> impl Iterator<Item = Vec<FrameRun>> {
    let mut rest = runs.iter().copied().peekable();
    let mut cut: Option<FrameRun> = None;
    std::iter::from_fn(move || {
        let mut batch = Vec::new();
        let mut room = frames;
        while room > 0
            && let Some(run) = cut.take().or_else(|| rest.next())
        {
            let here = run.count().min(room);
            batch.extend(FrameRun::new(run.first(), here));
            cut = FrameRun::new(run.first() + here, run.count() - here);
            room -= here;
        }
        (!batch.is_empty()).then_some(batch)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u32, count: u32) -> FrameRun {
        FrameRun::new(first, count).unwrap()
    }

    #[test]
    fn batches_hold_every_frame_once_and_in_order() {
        let runs = [run(0, 3), run(10, 1), run(20, 9)];
        let cut: Vec<_> = batches(&runs, 4).collect();
        let expected =
            [vec![run(0, 3), run(10, 1)], vec![run(20, 4)], vec![run(24, 4)], vec![run(28, 1)]];
        assert_eq!(cut, expected);
        assert_eq!(batches(&[], 4).count(), 0);
        assert_eq!(batches(&runs, 0).count(), 0);
    }

    #[test]
    fn ranges_are_taken_off_the_front() {
        let range = |address, bytes| RemoteRange { address, bytes };
        let mut ranges = vec![range(0, 10), range(100, 10), range(200, 10)];
        advance(&mut ranges, 0);
        assert_eq!(ranges.len(), 3);
        advance(&mut ranges, 13);
        assert_eq!(ranges, [range(103, 7), range(200, 10)]);
        advance(&mut ranges, 7);
        assert_eq!(ranges, [range(200, 10)]);
        advance(&mut ranges, 10);
        assert_eq!(ranges, []);
    }

    #[test]
    fn frames_lie_behind_one_another() {
        assert_eq!(RemoteMemory::new(1, 1), None);
        assert_eq!(RemoteMemory::new(0, 0), None);
        assert_eq!(RemoteMemory::new(u64::MAX - 4095, 1), None);
        let memory = RemoteMemory::new(0x10_0000, 4).unwrap();
        let range = RemoteRange { address: 0x10_1000, bytes: 0x3000 };
        assert_eq!(memory.range(run(1, 3)), Some(range));
        assert_eq!(memory.range(run(1, 4)), None);
        assert_eq!(memory.frame_at(0x10_3fff), Some(3));
        assert_eq!((memory.frame_at(0x10_4000), memory.frame_at(0xf_ffff)), (None, None));
    }
}
