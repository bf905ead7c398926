//! Who on this shard waits for a build to be over, so that another may run.
//!
//! Called by `http` through [`crate::Host`]: whoever ends a build tells all shards, for the builds of a tenant
//! run on any of them. Refuses to say whose turn it is: that is for the lock files of the store, and who was
//! woken looks again.

use std::cell::RefCell;

use mica_numa::rt::oneshot;

/// Those who wait.
#[derive(Debug, Default)]
pub(crate) struct Turns(RefCell<Vec<oneshot::Sender<()>>>);

impl Turns {
    /// Waits from now on, also before it is polled.
    pub(crate) fn next(&self) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.0.borrow_mut();
        // Who gave up takes no place.
        waiting.retain(|sender| !sender.is_closed());
        waiting.push(sender);
        receiver
    }

    /// Wakes all of them.
    pub(crate) fn wake(&self) {
        // Dropping the sender wakes as well.
        drop(self.0.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::{block_on, poll_once};

    #[test]
    fn who_waits_is_woken_once_and_who_gave_up_is_forgotten() {
        block_on(async {
            let turns = Turns::default();
            let (mut first, mut second) = (turns.next(), turns.next());
            assert!(poll_once(&mut first).await.is_none());
            drop(turns.next());
            turns.wake();
            assert!(
                poll_once(&mut first).await.is_some() && poll_once(&mut second).await.is_some()
            );
            let mut later = turns.next();
            assert!(poll_once(&mut later).await.is_none(), "for the next one");
            drop(later);
            let _held = turns.next();
            assert_eq!(turns.0.borrow().len(), 1);
        });
    }
}
