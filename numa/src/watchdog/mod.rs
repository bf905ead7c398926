//! Notices an executor that does not turn although it has work, and says where it is stuck.
//!
//! Started by `shards::run`, with a seat for each shard. glommio's own stall detection arms a timer with
//! two system calls for every run of its task queue, and lets each executor's signal handler see every
//! other's signals; this costs a reading of a clock for each shard and tick, and a message to those that
//! worked and have not begun a task since. Refuses to judge: a task that computes, one that blocks in the kernel, and a thread that gets
//! no processor all look the same to who waits; how much processor time it had is in the line.
//!
//! ```text
//!   each tick: has the thread used its processor since? ─ no ─▶ it sleeps
//!                         │ yes
//!                         └▶ has it begun a task by the next tick? ─ yes ─▶ it turns
//!                                │ no, and used its processor for most of the time ──┐
//!                                │ no: it sleeps, or is blocked                      │
//!                                └▶ ring its bell ─ answered by the next? ─ yes ─▶ it turns
//!                                                       │ no, for the threshold      │
//!                                                       └▶ signal: the thread ◀──────┘
//!                                                          writes down its own stack
//! ```

mod capture;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::bell::{self, Bell};
use crate::rt::turns::Turns;
use crate::rt::{self, Task};
use capture::ThreadClock;

/// How often all are looked at.
const TICK: Duration = Duration::from_millis(5);

/// Looks in a row at one that turns, of which the last asks it: tasks that yield to one another without an
/// end keep an executor from its rings, and so from its bell.
const TRUSTED_LOOKS: u32 = 8;

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
    turns: Turns,
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
        let turns = Turns::of_this_thread();
        let seat = Seat { name, clock, bell, asked, turns, stalls: Arc::clone(&stalls), watched };
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
    fn ask(&self) {
        self.asked.store(true, Ordering::Release);
        self.bell.ring();
    }

    /// Whether it has just been found to be stuck.
    fn look(&mut self, threshold: Duration) -> bool {
        // The thread has ended, and its seat is about to go.
        let Some(used) = self.clock.used() else { return false };
        let answered = !self.asked.load(Ordering::Acquire);
        let look = Look { at: Instant::now(), used, turns: self.turns.read(), answered };
        match self.watched.tick(look, threshold) {
            Seen::Nothing => false,
            Seen::Doubt => {
                self.ask();
                false
            }
            Seen::Stuck => {
                self.stalls.count.fetch_add(1, Ordering::Relaxed);
                // Its answer says that it is over.
                if answered {
                    self.ask();
                }
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

/// What a look at a seat sees.
#[derive(Clone, Copy, Debug)]
struct Look {
    at: Instant,
    /// Processor time of the thread.
    used: Duration,
    /// Tasks that it has begun to run.
    turns: u64,
    /// Whether no ring waits for an answer.
    answered: bool,
}

/// What it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// It sleeps, it turns, or it is being waited for.
    Nothing,
    /// It worked, and began nothing since: it is to be asked.
    Doubt,
    /// It has not turned for too long. Once for each stall.
    Stuck,
    /// It answered at last. For how long it had not, and how much of that it had a processor.
    GoesOn { stalled: Duration, on_cpu: Duration },
}

/// What was seen of a seat before: the decisions, without clock or bell.
#[derive(Debug)]
struct Watched {
    used: Duration,
    turns: u64,
    /// Looks since it was asked, or slept.
    unasked: u32,
    since: Since,
}

/// Since when, and of what kind the doubt is.
#[derive(Clone, Copy, Debug)]
enum Since {
    /// It slept at the last look. Whether what it used after that may be the rest of an answer.
    Asleep { after_answer: bool },
    /// It had worked at that one.
    Worked(Instant),
    /// It was asked.
    Asked { at: Instant, is_stuck: bool },
}

impl Watched {
    fn new(used: Duration) -> Self {
        Self { used, turns: 0, unasked: 0, since: Since::Asleep { after_answer: false } }
    }

    fn tick(&mut self, look: Look, threshold: Duration) -> Seen {
        let worked = look.used.saturating_sub(self.used);
        match self.since {
            Since::Asleep { after_answer } => {
                let only_answered = after_answer && worked <= ANSWER_COST;
                self.note(look, if only_answered { Duration::ZERO } else { worked }, false);
                Seen::Nothing
            }
            Since::Worked(_) if look.turns != self.turns && self.unasked < TRUSTED_LOOKS => {
                self.note(look, worked, false);
                Seen::Nothing
            }
            Since::Worked(at) => {
                let is_stuck = look.turns == self.turns
                    && look.at.saturating_duration_since(at) >= threshold
                    && 5 * worked >= 4 * threshold;
                let at = if is_stuck { at } else { look.at };
                (self.unasked, self.since) = (0, Since::Asked { at, is_stuck });
                if is_stuck { Seen::Stuck } else { Seen::Doubt }
            }
            Since::Asked { at, is_stuck } if look.answered => {
                let stalled = look.at.saturating_duration_since(at);
                let more = if worked > ANSWER_COST { worked } else { Duration::ZERO };
                self.note(look, more, true);
                if is_stuck { Seen::GoesOn { stalled, on_cpu: worked } } else { Seen::Nothing }
            }
            Since::Asked { at, is_stuck } => {
                let becomes = !is_stuck && look.at.saturating_duration_since(at) >= threshold;
                self.since = Since::Asked { at, is_stuck: is_stuck || becomes };
                if becomes { Seen::Stuck } else { Seen::Nothing }
            }
        }
    }

    /// It turned, or slept: what comes next is measured from here.
    fn note(&mut self, look: Look, worked: Duration, after_answer: bool) {
        (self.used, self.turns) = (look.used, look.turns);
        self.since = match worked {
            Duration::ZERO => Since::Asleep { after_answer },
            _ => Since::Worked(look.at),
        };
        self.unasked = if worked.is_zero() { 0 } else { self.unasked + 1 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const US: Duration = Duration::from_micros(1);

    /// Looks once each tick: at the processor time so far, the tasks begun, and whether rings are answered.
    struct Looks(Watched, Instant, u32);

    impl Looks {
        fn new() -> Self {
            Self(Watched::new(Duration::ZERO), Instant::now(), 0)
        }

        fn at(&mut self, used: Duration, turns: u64, answered: bool) -> Seen {
            self.2 += 1;
            let look = Look { at: self.1 + self.2 * TICK, used, turns, answered };
            self.0.tick(look, 5 * MS)
        }
    }

    #[test]
    fn one_that_sleeps_is_left_alone_and_one_that_answers_is_not_kept_awake_by_it() {
        let mut looks = Looks::new();
        assert_eq!(looks.at(Duration::ZERO, 0, true), Seen::Nothing);
        assert_eq!(looks.at(30 * US, 1, true), Seen::Nothing, "a short task ran");
        assert_eq!(looks.at(30 * US, 1, true), Seen::Doubt, "is it over?");
        assert_eq!(looks.at(50 * US, 2, true), Seen::Nothing, "it answered");
        assert_eq!(looks.at(60 * US, 2, true), Seen::Nothing, "the rest of its answer");
        assert_eq!(looks.at(60 * US, 2, true), Seen::Nothing);
        assert_eq!(looks.at(70 * US, 3, true), Seen::Nothing, "another task");
        assert_eq!(looks.at(70 * US, 3, true), Seen::Doubt);
    }

    #[test]
    fn one_that_is_busy_is_asked_now_and_then() {
        let mut looks = Looks::new();
        let mut seen = Vec::new();
        for at in 1..=30 {
            seen.push(looks.at(at * 4 * MS, u64::from(at) * 100, true));
        }
        assert!(seen.iter().all(|seen| matches!(seen, Seen::Nothing | Seen::Doubt)), "{seen:?}");
        assert_eq!(seen.iter().filter(|seen| **seen == Seen::Doubt).count(), 3, "{seen:?}");
    }

    #[test]
    fn one_whose_tasks_yield_and_that_never_looks_at_its_rings_is_found() {
        let mut looks = Looks::new();
        let mut answered = true;
        let found = (1..=30).find(|at| {
            let seen = looks.at(*at * 4 * MS, u64::from(*at) * 100, answered);
            answered &= seen != Seen::Doubt;
            seen == Seen::Stuck
        });
        assert_eq!(found, Some(TRUSTED_LOOKS + 2));
    }

    #[test]
    fn one_that_computes_is_found_at_once_and_its_length_told() {
        let mut looks = Looks::new();
        assert_eq!(looks.at(MS, 7, true), Seen::Nothing);
        assert_eq!(looks.at(5 * MS, 7, true), Seen::Stuck, "in the task that it had begun then");
        assert_eq!(looks.at(9 * MS, 7, false), Seen::Nothing, "once");
        let goes_on = Seen::GoesOn { stalled: 15 * MS, on_cpu: 9 * MS };
        assert_eq!(looks.at(10 * MS, 9, true), goes_on);
        assert_eq!(looks.at(15 * MS, 9, true), Seen::Stuck, "the next");
    }

    #[test]
    fn one_that_blocks_is_asked_first() {
        let mut looks = Looks::new();
        assert_eq!(looks.at(MS, 7, true), Seen::Nothing);
        assert_eq!(looks.at(2 * MS, 7, true), Seen::Doubt);
        assert_eq!(looks.at(2 * MS, 7, false), Seen::Stuck);
        assert_eq!(looks.at(2 * MS, 7, false), Seen::Nothing);
        let goes_on = Seen::GoesOn { stalled: 15 * MS, on_cpu: MS };
        assert_eq!(looks.at(2 * MS, 8, true), goes_on);
        assert_eq!(looks.at(2 * MS, 8, true), Seen::Doubt, "it may be at work again");
        assert_eq!(looks.at(2 * MS, 9, true), Seen::Nothing);
        assert_eq!(looks.at(2 * MS, 9, true), Seen::Nothing);
    }
}
