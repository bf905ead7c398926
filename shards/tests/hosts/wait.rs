//! Waiting for what happens outside a host, where there is nothing to wait on.
//!
//! Called by the tests of this folder, on a shard. Refuses to wait for ever.

use std::time::{Duration, Instant};

/// Asks until `condition` holds; fails the test when it never does.
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < Duration::from_secs(20), "never: {what}");
        mica_shards::rt::time::sleep(Duration::from_millis(2)).await;
    }
}
