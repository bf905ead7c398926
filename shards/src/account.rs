//! Who pays for sandboxes: how many somebody has, and how fast new ones come.
//!
//! Made by the binary, one for each API key, before any shard starts; asked by `http`, on every shard at
//! once. A sandbox holds its [`Seat`] from before it is made until nothing of it is left, so the count
//! cannot drift: whatever ends a create or a sandbox drops the seat. Refuses to know what a key is, and
//! to lock: all is atomic, and a bound is a bound across all shards.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest time that creates can be paid for in advance: what a huge request may owe.
const DEBT_MAX: Duration = Duration::from_secs(3600);

/// One account.
pub struct Account {
    id: String,
    /// Seats that are taken.
    live: AtomicU32,
    /// When all creates so far are paid for, in nanoseconds since `epoch` (the generic cell rate
    /// algorithm: a token bucket in one word).
    paid_ns: AtomicU64,
    epoch: Instant,
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let live = self.live.load(Ordering::Relaxed);
        f.debug_struct("Account").field("id", &self.id).field("live", &live).finish_non_exhaustive()
    }
}

/// More sandboxes than the account may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany {
    /// How many there are.
    pub live: u32,
}

/// Creates faster than the account may make them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooFast {
    /// When the same would be let through, if nobody else asks.
    pub wait: Duration,
}

impl Account {
    /// An account without a sandbox. Its id is what records of sandboxes keep.
    #[must_use]
    pub fn new(id: &str) -> Arc<Self> {
        let (live, paid_ns) = (AtomicU32::new(0), AtomicU64::new(0));
        Arc::new(Self { id: id.to_owned(), live, paid_ns, epoch: Instant::now() })
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Sandboxes of it, those being made and those paused included.
    #[must_use]
    pub fn live(&self) -> u32 {
        self.live.load(Ordering::Relaxed)
    }

    /// Takes `count` seats, all or none, if no more than `most` are taken then. No bound: all are had.
    ///
    /// # Errors
    /// How many are taken.
    pub fn reserve(
        self: &Arc<Self>,
        count: usize,
        most: Option<u32>,
    ) -> Result<Vec<Seat>, TooMany> {
        let wanted = u32::try_from(count).unwrap_or(u32::MAX);
        let most = most.unwrap_or(u32::MAX);
        let more = |live: u32| live.checked_add(wanted).filter(|sum| *sum <= most);
        // Only the number itself is shared, so no order is needed with anything else.
        let taken = self.live.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.map_err(|live| TooMany { live })?;
        Ok((0..count).map(|_| Seat::of(self)).collect())
    }

    /// A seat for a sandbox that is there already, whatever the bound is now.
    pub(crate) fn resume(self: &Arc<Self>) -> Seat {
        self.live.fetch_add(1, Ordering::Relaxed);
        Seat::of(self)
    }

    /// Takes `count` creates out of a bucket that holds what `per_second` gives in a second, and at
    /// least one. More than it ever holds are let through when it is full, and are paid off later.
    ///
    /// # Errors
    /// How long to wait.
    pub fn spend(&self, count: usize, per_second: f64) -> Result<(), TooFast> {
        self.spend_at(self.epoch.elapsed(), count, per_second)
    }

    fn spend_at(&self, now: Duration, count: usize, per_second: f64) -> Result<(), TooFast> {
        let each = Duration::try_from_secs_f64(1.0 / per_second).unwrap_or(DEBT_MAX).min(DEBT_MAX);
        let holds = each.max(Duration::from_secs(1));
        let price = each.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX)).min(DEBT_MAX);
        let (now, holds, price) = (nanos(now), nanos(holds), nanos(price));
        let in_advance = holds - price.min(holds);
        let spend = |paid: u64| {
            (paid <= now.saturating_add(in_advance)).then(|| paid.max(now).saturating_add(price))
        };
        let spent = self.paid_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend);
        spent.map(drop).map_err(|paid| {
            let wait = paid.saturating_sub(now.saturating_add(in_advance));
            TooFast { wait: Duration::from_nanos(wait) }
        })
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// One sandbox in the count of an account. It counts until it is released, or all clones of it are
/// dropped.
#[derive(Clone)]
pub struct Seat(Arc<Taken>);

struct Taken {
    account: Arc<Account>,
    released: AtomicBool,
}

impl Seat {
    fn of(account: &Arc<Account>) -> Self {
        Self(Arc::new(Taken { account: Arc::clone(account), released: AtomicBool::new(false) }))
    }

    /// Whose it is.
    #[must_use]
    pub fn account(&self) -> &Account {
        &self.0.account
    }

    /// Counts no more. Once is enough.
    pub(crate) fn release(&self) {
        self.0.release();
    }
}

impl Taken {
    fn release(&self) {
        if !self.released.swap(true, Ordering::Relaxed) {
            self.account.live.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.release();
    }
}

impl PartialEq for Seat {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Seat {}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Seat").field(&self.account().id()).finish()
    }
}

/// The accounts that are known when a host starts, by id: sandboxes of an earlier daemon take their
/// seats again.
pub type Accounts = BTreeMap<String, Arc<Account>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_taken_all_or_none_and_given_back_once() {
        let account = Account::new("a");
        let seats = account.reserve(2, Some(3)).unwrap();
        assert_eq!(account.reserve(2, Some(3)), Err(TooMany { live: 2 }));
        assert_eq!(account.live(), 2, "what is refused takes nothing");
        let kept = seats[0].clone();
        kept.release();
        kept.release();
        assert_eq!(account.live(), 1);
        drop((kept, seats));
        assert_eq!(account.live(), 0);
        // A lower bound than before refuses new ones, and takes none away.
        let _old = account.reserve(5, None).unwrap();
        let _again = account.resume();
        assert_eq!(account.reserve(1, Some(4)), Err(TooMany { live: 6 }));
    }

    #[test]
    fn threads_together_take_no_more_seats_than_there_are() {
        let account = Account::new("a");
        let take =
            || (0..1000).filter_map(|_| account.reserve(1, Some(500)).ok()).collect::<Vec<_>>();
        let taken: Vec<Vec<_>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(taken.iter().map(Vec::len).sum::<usize>(), 500);
        drop(taken);
        assert_eq!(account.live(), 0);
    }

    #[test]
    fn a_bucket_holds_a_second_and_fills_again() {
        let account = Account::new("a");
        let at = |ms, count| account.spend_at(Duration::from_millis(ms), count, 4.0);
        for _ in 0..4 {
            assert_eq!(at(1000, 1), Ok(()));
        }
        assert_eq!(at(1000, 1), Err(TooFast { wait: Duration::from_millis(250) }));
        assert_eq!(at(1250, 1), Ok(()));
        assert_eq!(at(1250, 2), Err(TooFast { wait: Duration::from_millis(500) }));
        assert_eq!(at(1750, 2), Ok(()), "a refusal costs nothing");
    }

    #[test]
    fn more_than_the_bucket_holds_waits_until_it_is_full_and_is_paid_off() {
        let account = Account::new("a");
        let at = |ms, count| account.spend_at(Duration::from_millis(ms), count, 2.0);
        assert_eq!(at(0, 1), Ok(()));
        assert_eq!(at(0, 10), Err(TooFast { wait: Duration::from_millis(500) }));
        assert_eq!(at(500, 10), Ok(()));
        assert_eq!(at(1000, 1), Err(TooFast { wait: Duration::from_millis(4000) }), "ten take 5 s");
        assert_eq!(at(5000, 1), Ok(()));
    }

    #[test]
    fn less_than_one_a_second() {
        let account = Account::new("a");
        let at = |s, count| account.spend_at(Duration::from_secs(s), count, 0.1);
        assert_eq!(at(100, 1), Ok(()));
        assert_eq!(at(101, 1), Err(TooFast { wait: Duration::from_secs(9) }));
        assert_eq!(at(110, 1), Ok(()));
    }
}
