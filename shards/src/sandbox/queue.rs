//! What other tasks of the shard tell a driver.
//!
//! Called by `Sandbox`. Refuses to grow: an event that waits already is not queued twice, and there
//! are few kinds.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Poll, Waker};

use super::state::Event;

/// Events that wait for the driver.
#[derive(Debug, Default)]
pub(crate) struct Queue(RefCell<Inner>);

#[derive(Debug, Default)]
struct Inner {
    events: VecDeque<Event>,
    nudged: bool,
    waker: Option<Waker>,
}

impl Queue {
    /// Adds an event, unless an equal one waits.
    pub(crate) fn push(&self, event: Event) {
        let mut inner = self.0.borrow_mut();
        if !inner.events.contains(&event) {
            inner.events.push_back(event);
        }
        wake(&mut inner);
    }

    /// Makes the driver look at its deadline again.
    pub(crate) fn nudge(&self) {
        let mut inner = self.0.borrow_mut();
        inner.nudged = true;
        wake(&mut inner);
    }

    /// The next event, or `None` for a nudge. May be dropped at any await.
    pub(crate) async fn next(&self) -> Option<Event> {
        poll_fn(|cx| {
            let mut inner = self.0.borrow_mut();
            if let Some(event) = inner.events.pop_front() {
                return Poll::Ready(Some(event));
            }
            if std::mem::take(&mut inner.nudged) {
                return Poll::Ready(None);
            }
            inner.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

fn wake(inner: &mut Inner) {
    if let Some(waker) = inner.waker.take() {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_events_wait_once() {
        futures_lite::future::block_on(async {
            let queue = Queue::default();
            for _ in 0..1000 {
                queue.push(Event::Kill);
            }
            queue.push(Event::Drain);
            queue.nudge();
            assert_eq!(queue.next().await, Some(Event::Kill));
            assert_eq!(queue.next().await, Some(Event::Drain));
            assert_eq!(queue.next().await, None);
            assert!(futures_lite::future::poll_once(queue.next()).await.is_none());
        });
    }
}
