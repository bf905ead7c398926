//! The userfaultfd, by which the shard tells which pages were written, and serves pages that are touched.
//!
//! Made by the jail before it drops its privileges, taken over by `build`, which tells the shard its
//! number. Refuses to register memory: the shard does that with its own copy of the descriptor. A
//! process that could, could make whoever reads its memory wait for an answer that never comes.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::io::Errno;

/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const API: u64 = 0xaa;
/// Pages that were never touched can be protected too.
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// A write to a protected page takes its protection away, and nobody has to answer.
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const TRACKING: u64 = FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// The descriptor, ready for use from outside.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
}

impl Userfault {
    /// Agrees with the kernel on what the descriptor is for.
    ///
    /// # Errors
    /// When it is no userfaultfd.
    pub fn new(fd: OwnedFd) -> Result<Self, Errno> {
        match agree(&fd, TRACKING) {
            Ok(()) => {}
            // Kernels before 6.7 have no asynchronous protection; pages can be served all the same.
            Err(Errno::INVAL) => agree(&fd, 0)?,
            Err(errno) => return Err(errno),
        }
        Ok(Self { fd })
    }

    /// Its number.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn agree(fd: &OwnedFd, features: u64) -> Result<(), Errno> {
    let mut request = Api { api: API, features, ioctls: 0 };
    // SAFETY: the kernel reads and writes one `uffdio_api`, which this is.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut request) };
    if result >= 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}
