//! Bounded messages from any thread to one executor.
//!
//! Called by `shards`, for everything that crosses cores. Refuses to wait for room: a full mailbox
//! gives the message back, and what that means is the sender's decision.
//!
//! An executor that sleeps is woken by a bell, which costs both sides system calls and the time that the
//! core takes to leave its idle state. So who expects a message soon stays awake for it, for a bounded
//! time, and nobody needs to ring: see [`Inbox::watching`] and [`Lookout`].

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use crate::bell::{self, Bell, Ear, Hush, Hushed, Listener};
use crate::rt;

/// Messages that an executor takes before it lets its other tasks run.
const BATCH: u32 = 64;

/// How long who watches leaves the executor's rings alone: its sockets and timers wait so long.
const SLICE: Duration = Duration::from_micros(50);

/// The end that any thread may send to.
#[derive(Debug)]
pub struct Post<M> {
    queue: SyncSender<M>,
    bell: Bell,
}

// Derived, it would ask for `M: Clone`.
impl<M> Clone for Post<M> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), bell: self.bell.clone() }
    }
}

/// The end that one executor will receive from, on its way there.
#[derive(Debug)]
pub struct Mailbox<M> {
    queue: Receiver<M>,
    listener: Listener,
}

/// The end that this executor receives from.
#[derive(Debug)]
pub struct Inbox<M> {
    queue: Rc<Receiver<M>>,
    ear: Ear,
    hush: Hush,
    taken: u32,
    habit: Habit,
}

/// When an inbox watches: after a message that came less than `limit` after the one before, for as long.
/// Sparse messages are rung for, and cost nobody a watch.
#[derive(Debug)]
struct Habit {
    limit: Duration,
    last: Option<Instant>,
    is_dense: bool,
}

/// Looks into an inbox whose owner waits for the bell.
#[derive(Debug)]
pub struct Lookout<M> {
    queue: Rc<Receiver<M>>,
    hush: Hush,
}

/// Why a message came back, with the message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Returned<M> {
    /// There is no room.
    #[error("the mailbox is full")]
    Full(M),
    /// The receiving executor is gone.
    #[error("the mailbox is closed")]
    Closed(M),
}

/// Makes a mailbox of `capacity` messages.
///
/// # Errors
/// When the process has no descriptor left.
pub fn mailbox<M>(capacity: usize) -> io::Result<(Post<M>, Mailbox<M>)> {
    let (bell, listener) = bell::pair()?;
    let (sender, receiver) = sync_channel(capacity);
    Ok((Post { queue: sender, bell }, Mailbox { queue: receiver, listener }))
}

impl<M> Post<M> {
    /// Puts a message in.
    ///
    /// # Errors
    /// The message back, see [`Returned`].
    pub fn send(&self, message: M) -> Result<(), Returned<M>> {
        self.queue.try_send(message).map_err(|error| match error {
            TrySendError::Full(message) => Returned::Full(message),
            TrySendError::Disconnected(message) => Returned::Closed(message),
        })?;
        self.bell.ring();
        Ok(())
    }
}

impl<M> Mailbox<M> {
    /// Starts to receive on this executor.
    #[must_use]
    pub fn attach(self) -> Inbox<M> {
        let ear = self.listener.attach();
        let (hush, habit) = (ear.hush(), Habit::of(Duration::ZERO));
        Inbox { queue: Rc::new(self.queue), ear, hush, taken: 0, habit }
    }
}

impl Habit {
    fn of(limit: Duration) -> Self {
        Self { limit, last: None, is_dense: false }
    }

    fn came(&mut self, now: Instant) {
        let gap = self.last.map(|last| now.duration_since(last));
        self.is_dense = gap.is_some_and(|gap| gap < self.limit);
        self.last = Some(now);
    }
}

impl<M> Inbox<M> {
    /// The same, awake for messages that come densely: for `limit` after each that came less than that
    /// after another. Zero: never.
    #[must_use]
    pub fn watching(mut self, limit: Duration) -> Self {
        self.habit = Habit::of(limit);
        self
    }

    /// A way to look into this inbox while its owner waits.
    #[must_use]
    pub fn lookout(&self) -> Lookout<M> {
        Lookout { queue: Rc::clone(&self.queue), hush: self.hush.clone() }
    }

    /// Waits for the next message. `None` when no sender is left; a wait that has begun does not
    /// notice that the last one goes. May be dropped at any await: no message is lost by it.
    pub async fn next(&mut self) -> Option<M> {
        loop {
            if self.taken >= BATCH {
                self.taken = 0;
                rt::yield_now().await;
            }
            match self.queue.try_recv() {
                Ok(message) => {
                    self.taken += 1;
                    return Some(self.came(message));
                }
                Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) => {}
            }
            self.taken = 0;
            if self.habit.is_dense {
                // Once for each message: nothing that comes makes it sparse again.
                self.habit.is_dense = false;
                if let Some(message) = watch(&self.hush, &self.queue, self.habit.limit).await {
                    return Some(self.came(message));
                }
                // What came while nobody rang.
                continue;
            }
            if !self.ear.heard().await {
                tracing::error!("the bell of a mailbox is broken; nobody reads it any more");
                return self.queue.try_recv().ok();
            }
        }
    }

    fn came(&mut self, message: M) -> M {
        if !self.habit.limit.is_zero() {
            self.habit.came(Instant::now());
        }
        message
    }
}

/// Stays awake for a message, at most for `limit`. May be dropped at any await: a message that came stays.
async fn watch<M>(hush: &Hush, queue: &Receiver<M>, limit: Duration) -> Option<M> {
    let _quiet = hush.begin();
    let pace = Pace::begin(limit);
    loop {
        if let Ok(message) = queue.try_recv() {
            return Some(message);
        }
        if !pace.goes_on().await {
            return None;
        }
    }
}

thread_local! {
    /// When the slice began that this executor's watches share, and when one of them looked last.
    static SLICES: Cell<Option<(Instant, Instant)>> = const { Cell::new(None) };
}

/// How a watch goes on: its executor's other tasks run between two looks, and its rings are seen to after
/// each slice. Watches at the same time, or one right after the other, share their slices: otherwise they
/// would keep the executor from its rings together.
struct Pace {
    began: Instant,
    limit: Duration,
}

impl Pace {
    fn begin(limit: Duration) -> Self {
        let began = Instant::now();
        let goes_on = |(_, seen): &(Instant, Instant)| began.duration_since(*seen) < SLICE;
        let slice = SLICES.get().filter(goes_on).map_or(began, |(slice, _)| slice);
        SLICES.set(Some((slice, began)));
        Self { began, limit }
    }

    /// Whether there is time for another look.
    async fn goes_on(&self) -> bool {
        let now = Instant::now();
        let slice = SLICES.get().map_or(now, |(slice, _)| slice);
        SLICES.set(Some((slice, now)));
        if now.duration_since(self.began) >= self.limit {
            return false;
        }
        if now.duration_since(slice) < SLICE {
            rt::yield_now().await;
        } else {
            rt::turn().await;
            let turned = Instant::now();
            SLICES.set(Some((turned, turned)));
        }
        true
    }
}

impl<M> Lookout<M> {
    /// Gives messages to `take` as they come, until `done` says that what was waited for has come, or for
    /// `limit`. May be dropped at any await: what came has been taken then.
    pub async fn watch(&self, limit: Duration, take: impl Fn(M), done: impl Fn() -> bool) {
        let watcher = Watcher { quiet: self.hush.begin(), queue: &self.queue, take };
        let pace = Pace::begin(limit);
        loop {
            watcher.take(BATCH);
            if done() || !pace.goes_on().await {
                return;
            }
        }
    }
}

/// Takes what came while nobody rang, also when it is dropped: the inbox's owner still waits for the bell.
struct Watcher<'l, M, T: Fn(M)> {
    quiet: Option<Hushed<'l>>,
    queue: &'l Receiver<M>,
    take: T,
}

impl<M, T: Fn(M)> Watcher<'_, M, T> {
    /// Takes at most so many.
    fn take(&self, most: u32) {
        for _ in 0..most {
            let Ok(message) = self.queue.try_recv() else { return };
            (self.take)(message);
        }
    }
}

impl<M, T: Fn(M)> Drop for Watcher<'_, M, T> {
    fn drop(&mut self) {
        self.quiet = None;
        self.take(u32::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dense_messages_are_watched_for() {
        let (start, us) = (Instant::now(), Duration::from_micros);
        let mut habit = Habit::of(us(200));
        habit.came(start);
        assert!(!habit.is_dense, "nothing came before the first");
        habit.came(start + us(199));
        assert!(habit.is_dense);
        habit.came(start + us(399));
        assert!(!habit.is_dense, "they come no denser than a watch is long");
        let mut never = Habit::of(Duration::ZERO);
        never.came(start);
        never.came(start);
        assert!(!never.is_dense);
    }
}
