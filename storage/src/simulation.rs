//! A file system whose every step a test sees.
//!
//! Called by [`crate::crashsafe::Disk`] in tests only. It lets each step happen, and counts them.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::crashsafe::Effect;

/// Counts steps.
#[derive(Debug, Default)]
pub(crate) struct Simulation {
    steps: AtomicU32,
}

impl Simulation {
    pub(crate) fn step<T>(
        &self,
        _effect: &Effect<'_>,
        run: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        self.steps.fetch_add(1, Ordering::Relaxed);
        run()
    }
}
