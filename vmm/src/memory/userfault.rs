//! The userfaultfd: telling which pages were written, and serving pages when they are touched.
//!
//! Made by the jail before it drops its privileges, taken over by `build`. Refuses to serve faults
//! itself: that is the shard's work, through its own copy of the descriptor.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use mica_units::FrameRun;
use rustix::io::Errno;

use super::Memory;

/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xaa, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const API: u64 = 0xaa;
/// Pages that were never touched can be protected too.
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// A write to a protected page takes its protection away, and nobody has to answer.
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const TRACKING: u64 = FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC;
const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 2;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    bytes: u64,
    mode: u64,
    ioctls: u64,
}

/// The descriptor, ready for use.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    tracks: bool,
    tracked: bool,
    on_demand: Vec<FrameRun>,
}

impl Userfault {
    /// Agrees with the kernel on what the descriptor is for.
    ///
    /// # Errors
    /// When it is no userfaultfd.
    pub fn new(fd: OwnedFd) -> Result<Self, Errno> {
        // Kernels before 6.7 have no asynchronous protection.
        let tracks = match agree(&fd, TRACKING) {
            Ok(()) => true,
            Err(Errno::INVAL) => {
                agree(&fd, 0)?;
                false
            }
            Err(errno) => return Err(errno),
        };
        Ok(Self { fd, tracks, tracked: false, on_demand: Vec::new() })
    }

    /// The descriptor.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.fd)
    }

    /// Whether writes can be told from now on: registers all of memory for write protection if the
    /// kernel can do that. Nothing is protected by this; the scan that looks for writes does it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn track(&mut self, memory: &Memory) -> Result<bool, Errno> {
        if self.tracks && !self.tracked {
            self.tracked = true;
            self.register_again(memory)?;
        }
        Ok(self.tracked)
    }

    /// Has faults of these runs, which are not mapped from files, served from outside.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn serve(&mut self, memory: &Memory, runs: Vec<FrameRun>) -> Result<(), Errno> {
        self.on_demand = runs;
        self.register_again(memory)
    }

    /// Registers what was registered, after parts of it were mapped anew: a new mapping has forgotten.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn register_again(&self, memory: &Memory) -> Result<(), Errno> {
        let protect = if self.tracked { MODE_WP } else { 0 };
        if let Some(all) = FrameRun::new(0, memory.frames()).filter(|_| self.tracked) {
            self.register(memory, all, protect)?;
        }
        self.on_demand
            .iter()
            .try_for_each(|run| self.register(memory, *run, protect | MODE_MISSING))
    }

    fn register(&self, memory: &Memory, run: FrameRun, mode: u64) -> Result<(), Errno> {
        let (start, bytes) = memory.place(run)?;
        let (start, bytes) = (start.addr() as u64, bytes as u64);
        let mut request = Register { start, bytes, mode, ioctls: 0 };
        // SAFETY: the kernel reads and writes one `uffdio_register`, which this is. The range is within
        // guest memory, where a fault that waits for an answer is one of a volatile access.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut request) };
        check(result)
    }
}

fn agree(fd: &OwnedFd, features: u64) -> Result<(), Errno> {
    let mut request = Api { api: API, features, ioctls: 0 };
    // SAFETY: the kernel reads and writes one `uffdio_api`, which this is.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut request) };
    check(result)
}

fn check(result: libc::c_int) -> Result<(), Errno> {
    if result >= 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}
