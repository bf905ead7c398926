//! Dropping what was written to many runs of guest memory, in few system calls.
//!
//! Called by `plan` for a rollback, which finds a guest's writes scattered. Refuses to depend on a kernel
//! that takes several runs at once: before 6.13 one could not advise its own memory in that way, and
//! before 6.14 there was no number for oneself.

use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_int, c_long, iovec};
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};

use super::plan::after;

/// The calling thread's own process, where a pidfd is asked for: `PIDFD_SELF` of `linux/fcntl.h`.
pub const PIDFD_SELF: c_int = -10_000;

/// Most runs of one call: `IOV_MAX`.
const RUNS_MAX: usize = 1024;

/// Whether this kernel has said that it cannot.
static REFUSED: AtomicBool = AtomicBool::new(false);

/// Drops what was written to these runs, which the caller knows to be guest memory.
pub(super) fn forget(runs: &mut [iovec]) -> Result<(), Errno> {
    for some in runs.chunks_mut(RUNS_MAX) {
        let mut left = some;
        // For one run the plain call is as good.
        while left.len() > 1 && !REFUSED.load(Ordering::Relaxed) {
            match advise_own(left) {
                // A kernel that cannot; nothing is lost by asking again run by run.
                Ok(0) | Err(Errno::BADF | Errno::INVAL | Errno::NOSYS | Errno::PERM) => {
                    REFUSED.store(true, Ordering::Relaxed);
                }
                Ok(bytes) => left = after(left, bytes),
                Err(errno) => return Err(errno),
            }
        }
        for run in left {
            // SAFETY: the caller's runs are guest memory, which stays mapped; only its content changes.
            unsafe { madvise(run.iov_base, run.iov_len, Advice::LinuxDontNeed) }?;
        }
    }
    Ok(())
}

/// `process_madvise(2)` of this process. How many bytes of the runs, from the first on, it was done for.
fn advise_own(runs: &[iovec]) -> Result<usize, Errno> {
    let (own, dont_need) = (c_long::from(PIDFD_SELF), c_long::from(libc::MADV_DONTNEED));
    let flags: c_long = 0;
    rustix::io::retry_on_intr(|| {
        // SAFETY: as in `forget`; the array outlives the call and is only read.
        let done = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                own,
                runs.as_ptr(),
                runs.len(),
                dont_need,
                flags,
            )
        };
        usize::try_from(done).map_err(|_| super::plan::last_error())
    })
}
