//! What a ring for files did: how much, and how long the kernel took.
//!
//! Kept by `ring`, read through [`super::Ring::stats`]. Refuses to be shared: it is its thread's.

use std::cell::Cell;
use std::time::Duration;

use mica_units::{Distribution, Durations};

/// What a ring is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkKind {
    /// Read a part of a file.
    Read,
    /// Write one.
    Write,
    /// Make what was written last.
    Sync,
    /// Make room.
    Allocate,
}

/// All of them.
const KINDS: [WorkKind; 4] = [WorkKind::Read, WorkKind::Write, WorkKind::Sync, WorkKind::Allocate];

impl WorkKind {
    /// As labels have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Sync => "sync",
            Self::Allocate => "allocate",
        }
    }
}

/// What a ring did, for a reader.
#[derive(Clone, Debug)]
pub struct RingStats {
    /// Operations that are not complete.
    pub depth: usize,
    /// Buffers that nobody has.
    pub free_buffers: usize,
    /// Entries that the kernel took.
    pub submissions: u64,
    /// Operations that ended, by kind, and how long each took from its start here.
    pub completed: Vec<(WorkKind, Distribution)>,
}

/// The counts of one ring.
#[derive(Debug, Default)]
pub(super) struct RingCounts {
    submissions: Cell<u64>,
    completed: [Durations; KINDS.len()],
}

impl RingCounts {
    pub(super) fn submitted(&self, entries: usize) {
        self.submissions.set(self.submissions.get().saturating_add(entries as u64));
    }

    pub(super) fn completed(&self, kind: WorkKind, took: Duration) {
        self.completed[kind as usize].record(took);
    }

    pub(super) fn stats(&self, depth: usize, free_buffers: usize) -> RingStats {
        let shown = |(kind, times): (WorkKind, &Durations)| (kind, times.distribution());
        RingStats {
            depth,
            free_buffers,
            submissions: self.submissions.get(),
            completed: KINDS.into_iter().zip(&self.completed).map(shown).collect(),
        }
    }
}
