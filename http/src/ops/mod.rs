//! What the host shows of itself, to its operator alone: numbers for Prometheus, the state for the
//! dashboard, profiles of the daemon itself.
//!
//! Called by [`crate::api`] for callers of the default tenant, and told of every request by
//! [`crate::serve`]. Refuses to keep anything but counts: what there is to see, shards are asked for.

mod exposition;
mod profile;
mod requests;
mod state;

pub use exposition::{answer as metrics, answer_sandboxes as sandbox_metrics};
pub use profile::{Form, answer as profile};
pub use requests::{Requests, Served};
pub use state::answer as state;

use mica_shards::metrics::{FAMILIES, Family};

/// Every family that `GET /metrics` and `GET /metrics/sandboxes` show, by name.
#[must_use]
pub fn families() -> Vec<&'static Family> {
    let mut all: Vec<_> = FAMILIES.iter().chain(requests::FAMILIES).copied().collect();
    all.sort_by_key(|family| family.name);
    all
}
