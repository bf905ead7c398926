//! Where a connection is between its requests, as the socket and the service both see it.
//!
//! Called by [`super::io`] for bytes, by the service for requests and by the driver for deadlines.
//! Refuses to look at contents: it counts messages.
//!
//! ```text
//!            first byte          head complete           response dropped, then flushed
//!   Between ───────────▶ Head ────────────────▶ Service ───────────────────────────────▶ Between
//!      │ idle limit        │ head limit             no limit: a stream may be silent for hours
//!      ▼                   ▼
//!    close            408, close
//! ```

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use mica_shards::rt::time::Instant;

use crate::config::Limits;

/// What is over when a deadline is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overdue {
    /// Nothing was asked for a long time: close without a word.
    Idle,
    /// A request head never ended.
    Head,
}

/// Shared by everything that serves one connection.
#[derive(Debug)]
pub struct Phase {
    /// Requests that are with the service, or whose response is not written to the end. Over HTTP/1 at
    /// most one.
    in_service: Cell<u32>,
    /// Everything the service answered so far has left; what comes next starts a new message.
    between: Cell<bool>,
    /// The first bytes of a next head have arrived.
    head_started: Cell<bool>,
    /// No request has been served yet.
    fresh: Cell<bool>,
    since: Cell<Instant>,
}

impl Phase {
    /// A connection just accepted.
    #[must_use]
    pub fn new() -> Rc<Self> {
        Rc::new(Self {
            in_service: Cell::new(0),
            between: Cell::new(true),
            head_started: Cell::new(false),
            fresh: Cell::new(true),
            since: Cell::new(Instant::now()),
        })
    }

    /// Bytes arrived from the client.
    pub fn received(&self) {
        if !self.is_serving() && !self.head_started.replace(true) && !self.fresh.get() {
            // The clock of a fresh connection runs from its accept: a client that sends nothing
            // and one that sends too slowly are the same to it.
            self.since.set(Instant::now());
        }
    }

    /// The service has a request. The guard ends with its response.
    #[must_use]
    pub fn serve(self: &Rc<Self>) -> InService {
        self.in_service.set(self.in_service.get() + 1);
        self.between.set(false);
        self.head_started.set(false);
        self.fresh.set(false);
        InService(Rc::clone(self))
    }

    /// Everything written so far was handed to the kernel.
    pub fn flushed(&self) {
        if !self.is_serving() && !self.between.replace(true) {
            self.since.set(Instant::now());
        }
    }

    /// Whether bytes written now begin a message that the service did not make.
    #[must_use]
    pub fn is_between(&self) -> bool {
        self.between.get() && !self.is_serving()
    }

    /// Whether it waits for another request, and has for so long.
    #[must_use]
    pub fn is_resting(&self, silence: Duration) -> bool {
        let waits = !self.fresh.get() && !self.head_started.get();
        self.is_between() && waits && self.since.get().elapsed() >= silence
    }

    /// Whether a request is with the service.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        self.in_service.get() > 0
    }

    /// What is overdue by now, or how long to wait before asking again.
    ///
    /// # Errors
    /// The kind of deadline that passed.
    pub fn check(&self, limits: &Limits) -> Result<Duration, Overdue> {
        if self.is_serving() {
            return Ok(limits.head_timeout);
        }
        let waits_for_head = self.head_started.get() || self.fresh.get();
        let limit = if waits_for_head { limits.head_timeout } else { limits.idle_timeout };
        match limit.checked_sub(self.since.get().elapsed()) {
            Some(left) if !left.is_zero() => Ok(left.min(limits.head_timeout)),
            _ if self.head_started.get() => Err(Overdue::Head),
            _ => Err(Overdue::Idle),
        }
    }
}

/// A request that is being served.
#[derive(Debug)]
pub struct InService(Rc<Phase>);

impl Drop for InService {
    fn drop(&mut self) {
        self.0.in_service.set(self.0.in_service.get() - 1);
        self.0.since.set(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(head: Duration, idle: Duration) -> Limits {
        Limits { head_timeout: head, idle_timeout: idle, ..Limits::default() }
    }

    #[test]
    fn a_message_boundary_needs_the_response_gone_and_flushed() {
        let phase = Phase::new();
        assert!(phase.is_between());
        let serving = phase.serve();
        phase.flushed();
        assert!(!phase.is_between(), "a flush in the middle of a response is no boundary");
        drop(serving);
        assert!(!phase.is_between(), "its last bytes are still in the buffer");
        phase.flushed();
        assert!(phase.is_between());
    }

    #[test]
    fn a_connection_rests_between_two_requests_alone() {
        let phase = Phase::new();
        assert!(!phase.is_resting(Duration::ZERO), "its first request is to come");
        let serving = phase.serve();
        assert!(!phase.is_resting(Duration::ZERO));
        drop(serving);
        assert!(!phase.is_resting(Duration::ZERO), "its last bytes are still in the buffer");
        phase.flushed();
        assert!(phase.is_resting(Duration::ZERO));
        assert!(!phase.is_resting(Duration::from_secs(3600)));
        phase.received();
        assert!(!phase.is_resting(Duration::ZERO), "a head has begun");
    }

    #[test]
    fn a_connection_of_many_requests_is_idle_after_the_last() {
        let phase = Phase::new();
        let (first, second) = (phase.serve(), phase.serve());
        drop(first);
        assert!(phase.check(&limits(Duration::ZERO, Duration::ZERO)).is_ok());
        drop(second);
        assert_eq!(phase.check(&limits(Duration::ZERO, Duration::ZERO)), Err(Overdue::Idle));
    }

    #[test]
    fn deadlines_depend_on_what_the_client_began() {
        let hour = Duration::from_secs(3600);
        let phase = Phase::new();
        assert!(phase.check(&limits(hour, hour)).is_ok());
        assert_eq!(phase.check(&limits(Duration::ZERO, hour)), Err(Overdue::Idle));
        phase.received();
        assert_eq!(phase.check(&limits(Duration::ZERO, hour)), Err(Overdue::Head));
        let serving = phase.serve();
        assert!(phase.check(&limits(Duration::ZERO, Duration::ZERO)).is_ok());
        drop(serving);
        phase.flushed();
        assert!(phase.check(&limits(Duration::ZERO, hour)).is_ok(), "idle has its own limit");
        assert_eq!(phase.check(&limits(hour, Duration::ZERO)), Err(Overdue::Idle));
    }
}
