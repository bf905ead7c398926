//! What was done once under a name, so that asking again gives the same answer.
//!
//! Called by `http` through [`crate::Host`], for creates that carry an idempotency key. One table for the
//! whole host: each name is kept by one shard, which its hash names, and the others ask that one. Answers
//! are opaque bytes, kept in memory alone; the record of a sandbox has the name under which it was asked for,
//! and the next daemon remembers that. Refuses more names of a tenant than its bound, and more in all:
//! a tenant's own finished ones make room for its next, and where all tenants together have too many, those
//! of the tenant that has the most, the oldest first; while all are at work a new one is not begun. So no
//! tenant can push out the answers of one that keeps fewer.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use mica_numa::rt::time::Instant;
use mica_units::{SandboxId, ShardCount, ShardId, TenantId};

use crate::takeover::Left;

/// Names that one shard keeps.
const MEMOS_MAX: usize = 4096;

/// Those of one tenant.
const TENANT_MEMOS_MAX: usize = 1024;

/// Longest answer that is kept; a longer one is an answer, but to nobody who asks again.
const ANSWER_BYTES_MAX: usize = 4096;

/// How long an answer is kept.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// How long something may be at work: longer than any create may take (`boot_deadline` is an hour at
/// most). After it, whoever was to say how it ended has been lost.
const WORK_MAX: Duration = Duration::from_secs(2 * 3600);

/// A hash of what was asked for.
pub type Digest = [u8; 32];

/// A name, and whose: names of two tenants have nothing to do with one another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MemoKey {
    /// Whose.
    pub tenant: TenantId,
    /// What the client calls it.
    pub name: String,
}

impl MemoKey {
    /// The shard that keeps it: the same on all of them. The hash does not outlive the daemon, so the next
    /// one may hash otherwise.
    pub(crate) fn shard(&self, shards: ShardCount) -> ShardId {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        let wide = u128::from(hasher.finish()) * u128::from(shards.get());
        ShardId::new(u16::try_from(wide >> 64).unwrap_or(0))
    }
}

/// Tells one beginning of a name from a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoTicket(u64);

/// What asking under a name comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Memo {
    /// The asker is to do it, and to say how it ended.
    Begun(MemoTicket),
    /// Somebody is doing it.
    Running,
    /// It was done, and this was the answer.
    Done(Arc<[u8]>),
    /// An earlier daemon was asked, and made this sandbox; none where it may not have been ready.
    Left(Option<SandboxId>),
    /// Something else was asked for under this name.
    Mismatch,
    /// As many as there may be are at work.
    Full,
}

#[derive(Debug)]
struct Entry {
    digest: Digest,
    ticket: MemoTicket,
    until: Instant,
    came: Option<Came>,
}

/// What came of it.
#[derive(Debug)]
enum Came {
    Answer(Arc<[u8]>),
    Left(Option<SandboxId>),
}

impl Entry {
    fn is_over(&self, now: Instant) -> bool {
        now >= self.until
    }
}

/// The names of one tenant.
type Names = HashMap<String, Entry>;

/// One shard's part of the table.
#[derive(Debug, Default)]
pub(crate) struct Memos {
    tenants: RefCell<HashMap<TenantId, Names>>,
    next: Cell<u64>,
}

impl Memos {
    /// Begins, or says why not.
    pub(crate) fn begin(&self, key: MemoKey, digest: Digest) -> Memo {
        self.begin_at(Instant::now(), key, digest)
    }

    fn begin_at(&self, now: Instant, key: MemoKey, digest: Digest) -> Memo {
        let mut tenants = self.tenants.borrow_mut();
        let ours = tenants.get(&key.tenant);
        let found = ours.and_then(|names| names.get(&key.name));
        if let Some(entry) = found.filter(|entry| !entry.is_over(now)) {
            return match &entry.came {
                _ if entry.digest != digest => Memo::Mismatch,
                Some(Came::Answer(answer)) => Memo::Done(Arc::clone(answer)),
                Some(Came::Left(sandbox)) => Memo::Left(*sandbox),
                None => Memo::Running,
            };
        }
        // One that is over makes its own room.
        if found.is_none() && !make_room(&mut tenants, &key.tenant, now) {
            return Memo::Full;
        }
        let ticket = self.ticket();
        let entry = Entry { digest, ticket, until: now + WORK_MAX, came: None };
        tenants.entry(key.tenant).or_default().insert(key.name, entry);
        Memo::Begun(ticket)
    }

    /// Keeps what an earlier daemon was asked for, as long as it would have. Of two of one name, the later
    /// call's stays: call it with the older first.
    pub(crate) fn remember(&self, left: Left) {
        let Left { key, digest, sandbox, age } = left;
        let now = Instant::now();
        let mut tenants = self.tenants.borrow_mut();
        let rest = KEPT.saturating_sub(age);
        if rest.is_zero() || !make_room(&mut tenants, &key.tenant, now) {
            return;
        }
        let ticket = self.ticket();
        let came = Some(Came::Left(sandbox));
        let entry = Entry { digest, ticket, until: now + rest, came };
        tenants.entry(key.tenant).or_default().insert(key.name, entry);
    }

    fn ticket(&self) -> MemoTicket {
        let ticket = MemoTicket(self.next.get());
        self.next.set(ticket.0.wrapping_add(1));
        ticket
    }

    /// Keeps the answer, or without one lets the name go: the next who asks begins again.
    pub(crate) fn end(&self, key: &MemoKey, ticket: MemoTicket, answer: Option<Vec<u8>>) {
        let mut tenants = self.tenants.borrow_mut();
        let Some(names) = tenants.get_mut(&key.tenant) else { return };
        let Some(entry) = names.get_mut(&key.name).filter(|entry| entry.ticket == ticket) else {
            return;
        };
        match answer.filter(|answer| answer.len() <= ANSWER_BYTES_MAX) {
            Some(answer) => {
                entry.came = Some(Came::Answer(answer.into()));
                entry.until = Instant::now() + KEPT;
            }
            None => {
                names.remove(&key.name);
                tenants.retain(|_, names| !names.is_empty());
            }
        }
    }
}

fn count(tenants: &HashMap<TenantId, Names>) -> usize {
    tenants.values().map(HashMap::len).sum()
}

/// Whether there is room for one more name of the tenant, made where it can be.
fn make_room(tenants: &mut HashMap<TenantId, Names>, tenant: &TenantId, now: Instant) -> bool {
    if let Some(names) = tenants.get_mut(tenant)
        && names.len() >= TENANT_MEMOS_MAX
    {
        names.retain(|_, entry| !entry.is_over(now));
        if names.len() >= TENANT_MEMOS_MAX && !drop_oldest(names) {
            return false;
        }
    }
    if count(tenants) < MEMOS_MAX {
        return true;
    }
    tenants.retain(|_, names| {
        names.retain(|_, entry| !entry.is_over(now));
        !names.is_empty()
    });
    if count(tenants) < MEMOS_MAX {
        return true;
    }
    // A tenant whose names are all at work has nothing to give.
    let mut most: Vec<&mut Names> = tenants.values_mut().collect();
    most.sort_unstable_by_key(|names| std::cmp::Reverse(names.len()));
    most.into_iter().any(drop_oldest)
}

/// Drops the oldest answers, a part of them at a time, so that not every further name walks all of them.
/// Whether there were any.
fn drop_oldest(names: &mut Names) -> bool {
    let mut finished: Vec<Instant> =
        names.values().filter(|entry| entry.came.is_some()).map(|entry| entry.until).collect();
    finished.sort_unstable();
    let Some(oldest) = finished.get(finished.len() / 16) else { return false };
    names.retain(|_, entry| entry.came.is_none() || entry.until > *oldest);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> MemoKey {
        MemoKey { tenant: TenantId::default(), name: name.to_owned() }
    }

    fn of(tenant: &str, n: usize) -> MemoKey {
        MemoKey { tenant: tenant.parse().unwrap(), name: n.to_string() }
    }

    fn done(memos: &Memos, key: &MemoKey) {
        let ticket = begun(&memos.begin(key.clone(), [1; 32]));
        memos.end(key, ticket, Some(Vec::new()));
    }

    fn is_done(memos: &Memos, key: MemoKey) -> bool {
        matches!(memos.begin(key, [1; 32]), Memo::Done(_))
    }

    fn begun(memo: &Memo) -> MemoTicket {
        let Memo::Begun(ticket) = memo else { panic!("{memo:?}") };
        *ticket
    }

    #[test]
    fn an_answer_is_given_again_to_the_same_question_of_the_same_tenant() {
        let memos = Memos::default();
        let ticket = begun(&memos.begin(key("a"), [1; 32]));
        assert_eq!(memos.begin(key("a"), [1; 32]), Memo::Running);
        assert_eq!(memos.begin(key("a"), [2; 32]), Memo::Mismatch);
        memos.end(&key("a"), ticket, Some(b"yes".to_vec()));
        assert_eq!(memos.begin(key("a"), [1; 32]), Memo::Done(b"yes".as_slice().into()));
        assert_eq!(memos.begin(key("a"), [2; 32]), Memo::Mismatch);
        let other = MemoKey { tenant: "other".parse().unwrap(), name: "a".to_owned() };
        begun(&memos.begin(other, [2; 32]));
    }

    #[test]
    fn a_failure_lets_the_name_go_and_a_late_end_does_nothing() {
        let memos = Memos::default();
        let first = begun(&memos.begin(key("a"), [1; 32]));
        memos.end(&key("a"), first, None);
        let second = begun(&memos.begin(key("a"), [1; 32]));
        assert_ne!(first, second);
        memos.end(&key("a"), first, Some(b"late".to_vec()));
        assert_eq!(memos.begin(key("a"), [1; 32]), Memo::Running);
        memos.end(&key("a"), second, Some(vec![0; ANSWER_BYTES_MAX + 1]));
        begun(&memos.begin(key("a"), [1; 32]));
    }

    #[test]
    fn answers_are_kept_for_a_day_and_work_that_was_lost_for_two_hours() {
        let memos = Memos::default();
        let now = Instant::now();
        let ticket = begun(&memos.begin_at(now, key("a"), [1; 32]));
        memos.end(&key("a"), ticket, Some(b"yes".to_vec()));
        let day = Duration::from_secs(24 * 3600);
        assert!(matches!(
            memos.begin_at(now + day - Duration::from_secs(1), key("a"), [1; 32]),
            Memo::Done(_)
        ));
        let later = now + day + Duration::from_secs(1);
        begun(&memos.begin_at(later, key("a"), [2; 32]));
        assert_eq!(memos.begin_at(later + WORK_MAX / 2, key("a"), [2; 32]), Memo::Running);
        begun(&memos.begin_at(later + WORK_MAX, key("a"), [2; 32]));
    }

    #[test]
    fn what_an_earlier_daemon_made_is_remembered_for_the_rest_of_the_day() {
        let memos = Memos::default();
        let sandbox = |n: u8| Some(SandboxId::from_random([n; 20]));
        let left = |name: &str, n: u8, hours: u64| {
            let age = Duration::from_secs(hours * 3600);
            memos.remember(Left { key: key(name), digest: [1; 32], sandbox: sandbox(n), age });
        };
        left("a", 1, 20);
        left("a", 2, 10);
        left("old", 3, 24);
        assert_eq!(memos.begin(key("a"), [1; 32]), Memo::Left(sandbox(2)), "the later of two");
        assert_eq!(memos.begin(key("a"), [2; 32]), Memo::Mismatch);
        let later = Instant::now() + Duration::from_secs(14 * 3600);
        begun(&memos.begin_at(later, key("a"), [2; 32]));
        begun(&memos.begin(key("old"), [2; 32]));
        // They make room as other answers do.
        for n in 0..=TENANT_MEMOS_MAX {
            left(&n.to_string(), 4, 1);
        }
        assert!(count(&memos.tenants.borrow()) <= TENANT_MEMOS_MAX);
    }

    #[test]
    fn a_tenant_is_bounded_and_what_is_at_work_stays() {
        let memos = Memos::default();
        let tickets: Vec<MemoTicket> = (0..TENANT_MEMOS_MAX)
            .map(|n| begun(&memos.begin(key(&n.to_string()), [1; 32])))
            .collect();
        assert_eq!(memos.begin(key("more"), [1; 32]), Memo::Full);
        begun(&memos.begin(of("other", 0), [1; 32]));
        memos.end(&key("7"), tickets[7], Some(Vec::new()));
        begun(&memos.begin(key("more"), [1; 32]));
        assert_eq!(memos.begin(key("8"), [1; 32]), Memo::Running);
        assert_eq!(count(&memos.tenants.borrow()), TENANT_MEMOS_MAX + 1);
        assert_eq!(memos.begin(key("7"), [1; 32]), Memo::Full, "the finished one made room");
    }

    #[test]
    fn a_tenant_pushes_out_its_own_answers_and_no_others() {
        let memos = Memos::default();
        for n in 0..10 {
            done(&memos, &of("quiet", n));
        }
        for n in 0..3 * MEMOS_MAX {
            done(&memos, &of("busy", n));
        }
        assert!((0..10).all(|n| is_done(&memos, of("quiet", n))));
        assert!(!is_done(&memos, of("busy", 0)) && is_done(&memos, of("busy", 3 * MEMOS_MAX - 1)));
        assert!(count(&memos.tenants.borrow()) <= TENANT_MEMOS_MAX + 10);
    }

    #[test]
    fn where_all_together_have_too_many_the_largest_gives() {
        let memos = Memos::default();
        for n in 0..10 {
            done(&memos, &of("quiet", n));
        }
        for tenant in ["a", "b", "c", "d", "e"] {
            for n in 0..TENANT_MEMOS_MAX - 1 {
                done(&memos, &of(tenant, n));
            }
        }
        assert!(count(&memos.tenants.borrow()) <= MEMOS_MAX);
        assert!((0..10).all(|n| is_done(&memos, of("quiet", n))));
        let last = |tenant: &str| is_done(&memos, of(tenant, TENANT_MEMOS_MAX - 2));
        assert!(["a", "b", "c", "d", "e"].into_iter().all(last), "each keeps its newest");
    }

    #[test]
    fn nothing_is_kept_of_a_tenant_without_names() {
        let memos = Memos::default();
        let ticket = begun(&memos.begin(of("a", 1), [1; 32]));
        memos.end(&of("a", 1), ticket, None);
        assert!(memos.tenants.borrow().is_empty());
    }

    #[test]
    fn names_are_spread_over_all_shards() {
        let shards = ShardCount::new(3).unwrap();
        let mut seen = [0; 3];
        for n in 0..300 {
            seen[usize::from(key(&n.to_string()).shard(shards).index())] += 1;
        }
        assert!(seen.iter().all(|count| *count > 50), "{seen:?}");
    }
}
