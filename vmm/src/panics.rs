//! What the first panic of this process said: standard error leads nowhere in the jail.
//!
//! Called by `main`, which sets it up, and by whoever turns a panic into an ending. Refuses to unwind
//! into a backtrace: that would open files.

use std::sync::OnceLock;

static FIRST: OnceLock<String> = OnceLock::new();

/// Keeps the words of the first panic from now on, instead of printing any.
pub fn remember() {
    std::panic::set_hook(Box::new(|info| {
        FIRST.get_or_init(|| info.to_string());
    }));
}

/// Where and why the first panic happened.
#[must_use]
pub fn first() -> &'static str {
    FIRST.get().map_or("a panic without words", String::as_str)
}
