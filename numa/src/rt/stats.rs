//! How busy this seat's executor is.
//!
//! Called by the shard on it, when somebody asks. Refuses to measure anything itself: glommio does, two
//! clock readings to a turn, whether anyone asks or not.

use std::time::Duration;

/// What an executor did since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Time that it was awake: tasks, and asking its rings.
    pub busy: Duration,
    /// Time of tasks alone.
    pub tasks: Duration,
    /// Times that a task ran.
    pub runs: u64,
}

/// Of the executor that this runs on.
#[must_use]
pub fn stats() -> Stats {
    let stats = glommio::executor().executor_stats();
    Stats {
        busy: stats.total_runtime(),
        tasks: stats.executor_runtime(),
        runs: stats.tasks_executed(),
    }
}
