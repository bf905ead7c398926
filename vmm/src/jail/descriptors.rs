//! Closing what the parent left open.
//!
//! Called by `main` before anything else, so that no descriptor of ours can be meant. A module of its
//! own because the call is unsafe: it closes by number, whoever owns it.

#![expect(unsafe_code, reason = "close_range has no safe wrapper: it closes by number")]

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
