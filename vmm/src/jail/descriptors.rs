//! What the process starts with: no descriptor that the parent left open, and one heap; and the one
//! that has to be made while it is still privileged.
//!
//! Called by `main` before anything else, so that no descriptor of ours can be meant and nothing has
//! been allocated by another thread, and by the jail. A module of its own because these calls are
//! unsafe.

#![expect(unsafe_code, reason = "close_range, mallopt and userfaultfd have no safe wrappers")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;

/// The first number that is not standard input, output or error.
const FIRST: u32 = 3;

/// Closes every descriptor but standard input, output and error, and takes over the one of this
/// number, if one is named.
///
/// # Errors
/// When the kernel refuses (it is older than 5.9), or the descriptor is not open.
pub fn close_inherited(keep: Option<u32>) -> io::Result<Option<OwnedFd>> {
    let kept = keep.map(duplicate).transpose()?;
    // The duplicate is above what it was made from, and above standard error.
    match &kept {
        Some((_, number)) => {
            close_range(FIRST, number - 1)?;
            close_range(number + 1, u32::MAX)?;
        }
        None => close_range(FIRST, u32::MAX)?,
    }
    Ok(kept.map(|(fd, _)| fd))
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: `main` calls this first, when this process owns no descriptor above 2 but the
    // duplicate, which no range holds, so no owner in this program can lose one.
    let result = unsafe { libc::close_range(first, last, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A second descriptor of what has this number, and its number.
fn duplicate(number: u32) -> io::Result<(OwnedFd, u32)> {
    let number = libc::c_int::try_from(number).map_err(|_| io::ErrorKind::InvalidInput)?;
    let least = libc::c_int::try_from(FIRST).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: it takes numbers only, and fails on one that is not open.
    let twin = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, least) };
    let Ok(twin_number) = u32::try_from(twin) else { return Err(io::Error::last_os_error()) };
    // SAFETY: the kernel just opened it for this call, so nobody else owns it.
    Ok((unsafe { OwnedFd::from_raw_fd(twin) }, twin_number))
}

/// Makes all threads share one heap.
///
/// By itself the allocator gives each thread one, and at the ninth it looks up the number of
/// processors in `/sys`, which no filter allows; and these threads allocate next to nothing.
#[must_use]
pub fn share_one_heap() -> bool {
    // SAFETY: `main` calls this while there is one thread; it sets one number in the allocator.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) == 1 }
}

/// A userfaultfd of this process, if the kernel has them. It also serves faults of the kernel, which
/// is what a guest's are, and that takes a privilege.
pub(super) fn userfault() -> Result<Option<OwnedFd>, Errno> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: by itself it does nothing to memory. Whoever registers a range with it takes care that
    // no Rust reference points there: guest memory has none.
    match unsafe { rustix::mm::userfaultfd(flags) } {
        Ok(fd) => Ok(Some(fd)),
        // Not built into this kernel, or closed even to root.
        Err(Errno::NOSYS | Errno::PERM) => Ok(None),
        Err(errno) => Err(errno),
    }
}
