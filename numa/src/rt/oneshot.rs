//! One value from one task to another on the same executor.
//!
//! Called wherever a task waits for an answer. Refuses to cross threads: it is reference counted
//! without atomics.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

#[derive(Debug)]
struct Slot<T> {
    value: Option<T>,
    waker: Option<Waker>,
    sender_gone: bool,
}

/// The end that gives the value.
#[derive(Debug)]
pub struct Sender<T>(Rc<RefCell<Slot<T>>>);

/// The end that waits for it: a future of `Some(value)`, or `None` when the sender was dropped.
#[derive(Debug)]
#[must_use = "a receiver does nothing unless awaited"]
pub struct Receiver<T>(Rc<RefCell<Slot<T>>>);

/// Both ends.
pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let slot = Rc::new(RefCell::new(Slot { value: None, waker: None, sender_gone: false }));
    (Sender(Rc::clone(&slot)), Receiver(slot))
}

impl<T> Sender<T> {
    /// Gives the value.
    ///
    /// # Errors
    /// The value back, when nobody waits for it any more.
    pub fn send(self, value: T) -> Result<(), T> {
        if self.is_closed() {
            return Err(value);
        }
        self.0.borrow_mut().value = Some(value);
        Ok(())
    }

    /// Whether nobody waits for the value any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        Rc::strong_count(&self.0) < 2
    }
}

impl<T> Receiver<T> {
    /// Whether waiting is over: there is a value, or none will come.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let slot = self.0.borrow();
        slot.value.is_some() || slot.sender_gone
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let waker = {
            let mut slot = self.0.borrow_mut();
            slot.sender_gone = true;
            // A waker that is left over from a receiver that is gone has nobody to wake.
            slot.waker.take().filter(|_| Rc::strong_count(&self.0) > 1)
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Future for Receiver<T> {
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut slot = self.0.borrow_mut();
        if let Some(value) = slot.value.take() {
            return Poll::Ready(Some(value));
        }
        if slot.sender_gone {
            return Poll::Ready(None);
        }
        slot.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_arrives_once_and_a_dropped_sender_is_seen() {
        futures_lite::future::block_on(async {
            let (sender, receiver) = channel();
            assert!(!receiver.is_over());
            sender.send(7).unwrap();
            assert!(receiver.is_over());
            assert_eq!(receiver.await, Some(7));
            let (sender, receiver) = channel::<u8>();
            drop(sender);
            assert!(receiver.is_over());
            assert_eq!(receiver.await, None);
            let (sender, receiver) = channel();
            drop(receiver);
            assert_eq!(sender.send(9), Err(9));
        });
    }
}
