//! How long a sandbox lives.
//!
//! Called by the shard for clients, and by the driver when it comes up. Refuses to end anything: the
//! driver sees the deadline.

use std::time::{Duration, SystemTime};

use mica_numa::rt::time::Instant;

use super::Sandbox;
use crate::{NEVER, SandboxInfo};

/// Longest life that is counted: 100 years. Keeps both clocks from overflowing.
const LIFE_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// How long a resume that names no time lets a sandbox live at the least, as E2B's does.
const RESUMED_LIFE_MIN: Duration = Duration::from_secs(15);

/// How far the record of a sandbox that lives by its requests may be behind them.
const RECORD_BEHIND_MAX: Duration = Duration::from_secs(1);

impl Sandbox {
    /// How long it was given last.
    pub(crate) fn life(&self) -> Duration {
        self.life.get()
    }

    /// How long it lives when a request wakes it: what it was made for, but not less than `least`,
    /// unless requests put its end off anyway.
    pub(crate) fn life_when_woken(&self, least: Duration) -> Duration {
        let request = &self.identity.request;
        if request.idle { self.life.get() } else { request.timeout.max(least) }
    }

    /// The life that somebody names; who names none wants what it was made for.
    pub(crate) fn life_wanted(&self, named: Option<Duration>) -> Duration {
        named.unwrap_or_else(|| self.identity.request.timeout.max(RESUMED_LIFE_MIN))
    }

    /// The life that a resume gives it: one without an end, or that lives by its requests, keeps at
    /// least what it had.
    pub(crate) fn life_after_resume(&self, named: Option<Duration>) -> Duration {
        let (had, wanted) = (self.life.get(), self.life_wanted(named));
        let keeps = self.identity.request.idle || from_now(had).1.is_none();
        if keeps { had.max(wanted) } else { wanted }
    }

    /// It lives for `left`, and from each request on for `life` if it lives by them.
    pub(crate) fn goes_on_for(&self, left: Duration, life: Duration) {
        self.deadline.set(from_now(left).0);
        self.life.set(life);
    }

    /// Sets its remaining time, if it is there.
    pub(crate) fn set_life(&self, life: Duration) -> bool {
        let mut info = self.info.borrow_mut();
        let Some(info) = info.as_mut() else { return false };
        let (deadline, end_at) = from_now(life);
        info.end_at = end_at;
        self.deadline.set(deadline);
        self.life.set(life);
        self.queue.nudge();
        true
    }

    /// Makes its remaining time at least `life`, if it is there. What others see of it then.
    pub(crate) fn extend_life(&self, life: Duration) -> Option<SandboxInfo> {
        self.is_used();
        if from_now(life).0 > self.deadline.get() {
            let longest = self.life.get().max(life);
            self.set_life(life);
            self.life.set(longest);
        }
        self.info()
    }

    /// Puts its end off, if it lives by its requests.
    pub(crate) fn is_used(&self) {
        let mut info = self.info.borrow_mut();
        let Some(info) = info.as_mut().filter(|_| self.identity.request.idle) else { return };
        let (deadline, end_at) = from_now(self.life.get());
        if deadline <= self.deadline.get() {
            return;
        }
        info.end_at = end_at;
        self.deadline.set(deadline);
        let is_behind = |at: Instant| at.elapsed() >= RECORD_BEHIND_MAX;
        if self.put_off_at.get().is_none_or(is_behind) {
            self.put_off_at.set(Some(Instant::now()));
            self.queue.nudge();
        }
    }
}

/// A moment from now on, on both clocks; on the second one none for a life that does not end.
pub(crate) fn from_now(life: Duration) -> (Instant, Option<SystemTime>) {
    let ends = life < LIFE_MAX.min(NEVER);
    let life = life.min(LIFE_MAX);
    (Instant::now() + life, ends.then(|| SystemTime::now() + life))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ends_has_an_end() {
        assert!(from_now(Duration::ZERO).1.is_some());
        assert!(from_now(Duration::from_secs(86_400)).1.is_some());
        // What a record makes of a life that does not end: whole milliseconds in 64 bits.
        for never in [NEVER, LIFE_MAX, Duration::from_millis(u64::MAX)] {
            assert_eq!(from_now(never).1, None, "{never:?}");
        }
    }
}
