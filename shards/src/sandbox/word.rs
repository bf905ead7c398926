//! A word for each state, for numbers and people.
//!
//! Called by `Sandbox`. Refuses more words than a reader can tell apart.

use super::state::State;

/// Every word.
pub(crate) const STATES: [&str; 7] =
    ["starting", "running", "snapshotting", "pausing", "paused", "rolling_back", "ending"];

impl State {
    /// The word for it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Starting(_) | Self::Restoring(_) | Self::Initialising(_) | Self::Adopting => {
                "starting"
            }
            Self::Running => "running",
            Self::Snapshotting(_) => "snapshotting",
            Self::Pausing(_) => "pausing",
            Self::Paused(_) => "paused",
            Self::RollingBack(_) => "rolling_back",
            Self::Cancelling(_) | Self::Stopping(_) | Self::Gone(_) => "ending",
        }
    }
}
