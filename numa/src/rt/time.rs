//! Timers on the shard's ring.
//!
//! Called by everything on a shard that waits for time to pass. Refuses nothing: a deadline in the
//! past is over at once.

use std::future::Future;
use std::time::Duration;

use futures_lite::FutureExt as _;

/// The clock of the timers: monotonic.
pub use std::time::Instant;

/// The deadline passed first
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the deadline passed")]
pub struct Elapsed;

/// Waits for `duration`.
pub async fn sleep(duration: Duration) {
    glommio::timer::sleep(duration).await;
}

/// Waits until `deadline`.
pub async fn sleep_until(deadline: Instant) {
    sleep(deadline.saturating_duration_since(Instant::now())).await;
}

/// Runs `future`, and drops it when `duration` passes first. So `future` must be one that may be
/// dropped at any await.
///
/// # Errors
/// [`Elapsed`] when time passed first.
pub fn timeout<T>(
    duration: Duration,
    future: impl Future<Output = T>,
) -> impl Future<Output = Result<T, Elapsed>> {
    // Joined and not awaited in a block of its own, which would have room for the future twice: it may be
    // large, and every request has several.
    let timer = async move {
        sleep(duration).await;
        Err(Elapsed)
    };
    futures_util::FutureExt::map(future, Ok).or(timer)
}
