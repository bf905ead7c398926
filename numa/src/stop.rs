//! The signal that everything should end soon.
//!
//! Given by the binary (on SIGTERM) and awaited on every shard. Refuses to be taken back.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// A flag that is raised once and can be awaited on any executor. Clones are the same flag.
#[derive(Clone)]
pub struct StopSignal(Arc<Inner>);

struct Inner {
    raised: AtomicBool,
    // Readable for ever once raised: any number of waiters on any number of shards see it.
    event: OwnedFd,
}

impl StopSignal {
    /// A signal that nobody has given yet.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Inner { raised: AtomicBool::new(false), event })))
    }

    /// Gives the signal. From any thread, any number of times.
    pub fn stop(&self) {
        self.0.raised.store(true, Ordering::Release);
        if let Err(error) = rustix::io::write(&self.0.event, &1u64.to_ne_bytes()) {
            // Only a counter near 2^64 refuses; it is readable then.
            tracing::debug!(%error, "the stop signal was given very often");
        }
    }

    /// Whether it was given.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.raised.load(Ordering::Acquire)
    }

    /// Waits for it, on an executor of this crate. Costs one descriptor while it waits, so wait
    /// once for each shard, not once for each connection.
    pub async fn stopped(&self) {
        while !self.is_stopped() {
            if let Err(error) = crate::rt::readable(self.0.event.as_fd()).await {
                tracing::warn!(%error, "cannot wait for the stop signal; asking every second");
                crate::rt::time::sleep(std::time::Duration::from_secs(1)).await;
            }
        }
    }
}

impl fmt::Debug for StopSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StopSignal").field(&self.is_stopped()).finish()
    }
}
