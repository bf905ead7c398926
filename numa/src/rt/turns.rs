//! How often this thread began to run a task: who reads it twice from another thread, and finds the same,
//! knows that the executor did not get from one task to the next.
//!
//! Counted by [`super::spawn`], read by the watchdog. Refuses to cost anything: one addition that no other
//! thread makes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The count of one thread, for any to read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Turns(Arc<AtomicU64>);

thread_local! {
    static TURNS: Turns = Turns::default();
}

impl Turns {
    /// Of the thread that calls this.
    pub(crate) fn of_this_thread() -> Self {
        TURNS.with(Turns::clone)
    }

    pub(crate) fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

pub(super) fn count() {
    // Only this thread writes: no read-modify-write is needed.
    TURNS.with(|turns| turns.0.store(turns.read().wrapping_add(1), Ordering::Relaxed));
}
