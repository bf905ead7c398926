//! What a person sees while the lab works: one line per step on standard error, with the time.
//!
//! Standard output stays free for what a script reads (`env`, `exec`, `status`).

use std::sync::OnceLock;
use std::time::Instant;

static START: OnceLock<Instant> = OnceLock::new();

/// Seconds since the first call.
pub fn seconds() -> f64 {
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// One line.
pub fn say(text: &str) {
    eprintln!("[{:6.1} s] {text}", seconds());
}
