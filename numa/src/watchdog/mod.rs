//! Notices an executor that does not turn although it has work, and says where it is stuck.
//!
//! Started by `shards::run`, with a seat for each shard. glommio's own stall detection arms a timer with
//! two system calls for every run of its task queue, and lets each executor's signal handler see every
//! other's signals; this costs a reading of a clock for each shard and tick, and a message to those that
//! worked. Refuses to judge: a task that computes, one that blocks in the kernel, and a thread that gets
//! no processor all look the same to who waits; how much processor time it had is in the line.
//!
//! ```text
//!   each tick: has the thread used its processor since? ─ no ─▶ it sleeps
//!                         │ yes
//!                         └▶ ring its bell ─ answered by the next tick? ─ yes ─▶ it turns
//!                                                │ no, for the threshold
//!                                                └▶ signal: the thread writes down its own stack
//! ```

mod capture;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::bell::{self, Bell};
use crate::rt::{self, Task};
use capture::ThreadClock;

/// How often all are looked at.
const TICK: Duration = Duration::from_millis(5);

/// Processor time that answering a ring costs at most: less than this right after one is no work.
const ANSWER_COST: Duration = Duration::from_micros(100);

/// The shortest time between two stacks in the log; stalls between are only counted.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// What was noticed on one seat.
#[derive(Debug, Default)]
pub struct Stalls {
    count: AtomicU64,
    total_ns: AtomicU64,
}

impl Stalls {
    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// How long they took together, from the first tick that found each.
    #[must_use]
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.total_ns.load(Ordering::Relaxed))
    }
}

/// One seat, as the watchdog sees it.
#[derive(Debug)]
struct Seat {
    name: String,
    clock: ThreadClock,
    bell: Bell,
    /// Rung, and not answered.
    asked: Arc<AtomicBool>,
    stalls: Arc<Stalls>,
    watched: Watched,
}

/// Watches seats from a thread of its own until it is dropped. Clones are the same.
#[derive(Clone, Debug)]
pub struct Watchdog(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    seats: Mutex<Vec<Seat>>,
    threshold: Duration,
    ended: AtomicBool,
}

/// A seat that is watched. Dropped, it is not any more.
#[derive(Debug)]
pub struct Watching {
    shared: Arc<Shared>,
    stalls: Arc<Stalls>,
    task: Option<Task<()>>,
}

impl Watchdog {
    /// Starts to watch, nothing yet. A seat that does not turn for `threshold` is told of.
    ///
    /// # Errors
    /// When there is no thread, or the signal cannot be had.
    pub fn start(threshold: Duration) -> io::Result<Self> {
        capture::install()?;
        let seats = Mutex::new(Vec::new());
        let shared = Arc::new(Shared { seats, threshold, ended: AtomicBool::new(false) });
        let watching = Arc::clone(&shared);
        let thread =
            std::thread::Builder::new().name("watchdog".into()).spawn(move || watching.watch())?;
        Ok(Self(Arc::new(Inner { shared, thread: Mutex::new(Some(thread)) })))
    }

    /// Watches the executor that this is called on.
    ///
    /// # Errors
    /// When there is no descriptor left, or this thread has no clock.
    pub fn sit(&self, name: String) -> io::Result<Watching> {
        let (bell, listener) = bell::pair()?;
        let (asked, stalls) = (Arc::new(AtomicBool::new(false)), Arc::new(Stalls::default()));
        let clock = ThreadClock::of_this_thread()?;
        let watched = Watched::new(clock.used().unwrap_or_default());
        let answered = Arc::clone(&asked);
        let mut ear = listener.attach();
        let task = rt::spawn(async move {
            while ear.heard().await {
                answered.store(false, Ordering::Release);
            }
        });
        let seat = Seat { name, clock, bell, asked, stalls: Arc::clone(&stalls), watched };
        let shared = Arc::clone(&self.0.shared);
        shared.seats().push(seat);
        Ok(Watching { shared, stalls, task: Some(task) })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        thread.thread().unpark();
        if thread.join().is_err() {
            tracing::error!("the watchdog panicked");
        }
    }
}

impl Watching {
    /// What was noticed here.
    #[must_use]
    pub fn stalls(&self) -> &Arc<Stalls> {
        &self.stalls
    }

    /// Ends it, its task too.
    pub async fn end(mut self) {
        if let Some(task) = self.task.take() {
            task.end().await;
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.shared.seats().retain(|seat| !Arc::ptr_eq(&seat.stalls, &self.stalls));
    }
}

impl Shared {
    fn seats(&self) -> std::sync::MutexGuard<'_, Vec<Seat>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) {
        let mut logged: Option<Instant> = None;
        let mut untold = 0u64;
        while !self.ended.load(Ordering::Acquire) {
            std::thread::park_timeout(TICK);
            let mut stuck = None;
            for seat in &mut *self.seats() {
                if seat.look(self.threshold) {
                    stuck = Some((seat.name.clone(), seat.clock, Arc::clone(&seat.asked)));
                }
            }
            let Some((name, clock, asked)) = stuck else { continue };
            if logged.is_some_and(|logged| logged.elapsed() < LOG_EVERY) {
                untold += 1;
                continue;
            }
            // Without the lock: its stack is made readable from files.
            let stack = capture::stack_of(clock);
            // What was caught after it had gone on says nothing.
            let stack = stack.filter(|_| asked.load(Ordering::Acquire));
            let stack = stack.map(|frames| capture::readable(&frames));
            let stack = stack.as_deref().unwrap_or("it went on before its stack was read");
            let threshold_ms = self.threshold.as_millis();
            tracing::warn!(
                seat = name,
                threshold_ms,
                untold,
                "an executor does not turn although it has work\n{stack}"
            );
            logged = Some(Instant::now());
            untold = 0;
        }
    }
}

impl Seat {
    /// Whether it has just been found to be stuck.
    fn look(&mut self, threshold: Duration) -> bool {
        // The thread has ended, and its seat is about to go.
        let Some(used) = self.clock.used() else { return false };
        let answered = !self.asked.load(Ordering::Acquire);
        match self.watched.tick(Instant::now(), used, answered, threshold) {
            Seen::Nothing => false,
            Seen::Work => {
                self.asked.store(true, Ordering::Release);
                self.bell.ring();
                false
            }
            Seen::Stuck => {
                self.stalls.count.fetch_add(1, Ordering::Relaxed);
                true
            }
            Seen::GoesOn { stalled, on_cpu } => {
                let ns = u64::try_from(stalled.as_nanos()).unwrap_or(u64::MAX);
                self.stalls.total_ns.fetch_add(ns, Ordering::Relaxed);
                let (stalled_ms, on_cpu_ms) = (stalled.as_millis(), on_cpu.as_millis());
                tracing::debug!(seat = self.name, stalled_ms, on_cpu_ms, "it turns again");
                false
            }
        }
    }
}

/// What a look at a seat finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// It sleeps, or is being waited for.
    Nothing,
    /// It worked since the last look: it is to be asked.
    Work,
    /// It has not answered for too long. Once for each stall.
    Stuck,
    /// It answered at last. For how long it had not, and how much of that it had a processor.
    GoesOn { stalled: Duration, on_cpu: Duration },
}

/// What was seen of a seat before: the decisions, without clock or bell.
#[derive(Debug)]
struct Watched {
    used: Duration,
    asked_at: Option<Instant>,
    stuck: bool,
    /// The answer to a ring may still be in the next reading of the clock.
    after_answer: bool,
}

impl Watched {
    fn new(used: Duration) -> Self {
        Self { used, asked_at: None, stuck: false, after_answer: false }
    }

    fn tick(&mut self, now: Instant, used: Duration, answered: bool, threshold: Duration) -> Seen {
        if let Some(asked_at) = self.asked_at {
            let waited = now.saturating_duration_since(asked_at);
            if answered {
                let on_cpu = used.saturating_sub(self.used);
                self.asked_at = None;
                self.used = used;
                self.after_answer = true;
                if std::mem::take(&mut self.stuck) {
                    return Seen::GoesOn { stalled: waited, on_cpu };
                }
                // One that worked for longer than an answer takes may be at work again.
                return if on_cpu > ANSWER_COST { self.ask(now) } else { Seen::Nothing };
            }
            if waited >= threshold && !self.stuck {
                self.stuck = true;
                return Seen::Stuck;
            }
            return Seen::Nothing;
        }
        let worked = used.saturating_sub(self.used);
        self.used = used;
        let only_answered = std::mem::take(&mut self.after_answer) && worked <= ANSWER_COST;
        if worked.is_zero() || only_answered { Seen::Nothing } else { self.ask(now) }
    }

    fn ask(&mut self, now: Instant) -> Seen {
        self.asked_at = Some(now);
        self.after_answer = false;
        Seen::Work
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const US: Duration = Duration::from_micros(1);

    #[test]
    fn one_that_sleeps_is_left_alone_and_one_that_answers_is_not_kept_awake_by_it() {
        let (start, limit) = (Instant::now(), 5 * MS);
        let mut watched = Watched::new(Duration::ZERO);
        let mut look = |at: u32, used: Duration, answered| {
            watched.tick(start + at * TICK, used, answered, limit)
        };
        assert_eq!(look(1, Duration::ZERO, true), Seen::Nothing);
        assert_eq!(look(2, 30 * US, true), Seen::Work, "a short task ran");
        assert_eq!(look(3, 50 * US, true), Seen::Nothing, "it answered");
        assert_eq!(look(4, 60 * US, true), Seen::Nothing, "the rest of its answer");
        assert_eq!(look(5, 60 * US, true), Seen::Nothing);
        assert_eq!(look(6, 70 * US, true), Seen::Work, "another task");
    }

    #[test]
    fn one_that_is_busy_is_asked_again_at_once() {
        let (start, limit) = (Instant::now(), 5 * MS);
        let mut watched = Watched::new(Duration::ZERO);
        for at in 1..10 {
            let seen = watched.tick(start + at * TICK, at * 4 * MS, true, limit);
            assert_eq!(seen, Seen::Work, "{at}");
        }
    }

    #[test]
    fn a_stall_is_seen_once_and_its_length_told() {
        let (start, limit) = (Instant::now(), 5 * MS);
        let mut watched = Watched::new(Duration::ZERO);
        let mut look = |at: u32, used: Duration, answered| {
            watched.tick(start + at * TICK, used, answered, limit)
        };
        assert_eq!(look(1, MS, true), Seen::Work);
        assert_eq!(look(2, 6 * MS, false), Seen::Stuck);
        // It may block as well as compute.
        assert_eq!(look(3, 6 * MS, false), Seen::Nothing);
        let goes_on = Seen::GoesOn { stalled: 15 * MS, on_cpu: 6 * MS };
        assert_eq!(look(4, 7 * MS, true), goes_on);
        assert_eq!(look(5, 12 * MS, true), Seen::Work);
    }
}
