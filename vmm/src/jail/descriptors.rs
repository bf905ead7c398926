//! What the process starts with: no descriptor that the parent left open, and one heap.
//!
//! Called by `main` before anything else, so that no descriptor of ours can be meant and nothing has
//! been allocated by another thread. A module of its own because both calls are unsafe.

#![expect(unsafe_code, reason = "close_range and mallopt have no safe wrappers")]

use std::io;

/// Closes every descriptor but standard input, output and error.
///
/// # Errors
/// When the kernel refuses (it is older than 5.9).
pub fn close_inherited() -> io::Result<()> {
    const FIRST: libc::c_uint = 3;
    // SAFETY: `main` calls this first, when this process owns no descriptor above 2 yet, so no
    // owner in this program can lose one.
    let result = unsafe { libc::close_range(FIRST, libc::c_uint::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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
