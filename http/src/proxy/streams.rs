//! How many streams into sandboxes one shard holds for its clients.
//!
//! Called by [`super`] for every request. A connection of HTTP/2 carries many, so bounding connections
//! is not enough. Refuses more than the limit.

use std::cell::Cell;
use std::rc::Rc;

/// The count.
#[derive(Clone, Debug, Default)]
pub struct Streams(Rc<Cell<usize>>);

impl Streams {
    /// Counts one more, if there is room below `max`.
    #[must_use]
    pub fn open(&self, max: usize) -> Option<Open> {
        if self.0.get() >= max {
            return None;
        }
        self.0.set(self.0.get() + 1);
        Some(Open(Rc::clone(&self.0)))
    }
}

/// One stream. Dropping it ends its count.
#[derive(Debug)]
pub struct Open(Rc<Cell<usize>>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_counted_up_to_the_limit() {
        let streams = Streams::default();
        let first = streams.open(2).unwrap();
        let second = streams.open(2).unwrap();
        assert!(streams.open(2).is_none());
        drop(first);
        assert!(streams.open(2).is_some());
        drop(second);
        assert_eq!(streams.0.get(), 0);
    }
}
