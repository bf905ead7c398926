//! What other tasks of the shard tell a driver.
//!
//! Called by `Sandbox`. Refuses to grow: an event that waits already is not queued twice, and there are
//! few kinds; requests are bounded.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Poll, Waker};

use mica_numa::rt::oneshot;

use super::asks::Request;
use super::state::Event;

/// Requests that wait for the driver. Each is answered within one of its turns.
const REQUESTS_MAX: usize = 64;

/// What the driver hears.
#[derive(Debug)]
pub(crate) enum Told {
    /// Something happened.
    Event(Event),
    /// A client asks.
    Request(Request),
    /// The deadline, or what others see of the sandbox, has changed.
    Nudge,
}

/// What waits for the driver.
#[derive(Debug, Default)]
pub(crate) struct Queue(RefCell<Inner>);

#[derive(Debug, Default)]
struct Inner {
    events: VecDeque<Event>,
    requests: VecDeque<Request>,
    nudged: bool,
    /// Who waits until the record has what it nudged for.
    keepers: Vec<oneshot::Sender<bool>>,
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

    /// Adds a request; gives it back when too many wait.
    pub(crate) fn ask(&self, request: Request) -> Result<(), Request> {
        let mut inner = self.0.borrow_mut();
        if inner.requests.len() >= REQUESTS_MAX {
            return Err(request);
        }
        inner.requests.push_back(request);
        wake(&mut inner);
        Ok(())
    }

    /// Makes the driver look again.
    pub(crate) fn nudge(&self) {
        let mut inner = self.0.borrow_mut();
        inner.nudged = true;
        wake(&mut inner);
    }

    /// The same. What it gives comes when the record is as the sandbox was then, and says whether it could be
    /// written; nothing comes when there will be none.
    pub(crate) fn nudge_to_keep(&self) -> oneshot::Receiver<bool> {
        let (sender, receiver) = oneshot::channel();
        self.0.borrow_mut().keepers.push(sender);
        self.nudge();
        receiver
    }

    /// Those who wait for a record.
    pub(crate) fn take_keepers(&self) -> Vec<oneshot::Sender<bool>> {
        std::mem::take(&mut self.0.borrow_mut().keepers)
    }

    /// The next thing. May be dropped at any await.
    pub(crate) async fn next(&self) -> Told {
        poll_fn(|cx| {
            let mut inner = self.0.borrow_mut();
            if let Some(event) = inner.events.pop_front() {
                return Poll::Ready(Told::Event(event));
            }
            if let Some(request) = inner.requests.pop_front() {
                return Poll::Ready(Told::Request(request));
            }
            if std::mem::take(&mut inner.nudged) {
                return Poll::Ready(Told::Nudge);
            }
            inner.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Requests that nobody will hear any more. Nor will there be a record.
    pub(crate) fn take_requests(&self) -> VecDeque<Request> {
        drop(self.take_keepers());
        std::mem::take(&mut self.0.borrow_mut().requests)
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
    fn equal_events_wait_once_and_requests_are_bounded() {
        futures_lite::future::block_on(async {
            let queue = Queue::default();
            for _ in 0..1000 {
                queue.push(Event::Kill);
            }
            queue.push(Event::Drain);
            queue.nudge();
            let pause = || {
                let (sender, receiver) = mica_numa::rt::oneshot::channel();
                (queue.ask(Request::Pause(crate::event::Keeps::All, sender)), receiver)
            };
            let receivers: Vec<_> = (0..REQUESTS_MAX).map(|_| pause()).collect();
            assert!(receivers.iter().all(|(asked, _)| asked.is_ok()));
            assert!(pause().0.is_err(), "one more than the bound");
            assert!(matches!(queue.next().await, Told::Event(Event::Kill)));
            assert!(matches!(queue.next().await, Told::Event(Event::Drain)));
            assert!(matches!(queue.next().await, Told::Request(Request::Pause(..))));
            assert_eq!(queue.take_requests().len(), REQUESTS_MAX - 1);
            assert!(matches!(queue.next().await, Told::Nudge));
            assert!(futures_lite::future::poll_once(queue.next()).await.is_none());
        });
    }
}
