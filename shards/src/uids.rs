//! User ids for VM processes: each its own, of a shard's share of the host's range.
//!
//! Called by a shard's pool when it makes a VM process and when it has removed one. Refuses to give one
//! out twice.

use std::collections::BTreeSet;

use mica_units::{ShardCount, ShardId};

/// One shard's share.
#[derive(Debug)]
pub(crate) struct Uids {
    // Lowest first, so that a quiet host uses few.
    free: BTreeSet<u32>,
}

impl Uids {
    /// Every `shards`-th uid of `first .. first + total`, starting with the shard's index; but none
    /// that is `taken` by a process of an earlier daemon. Such a one joins the share of the shard that
    /// gives it back.
    pub(crate) fn share(
        first: u32,
        total: u32,
        shard: ShardId,
        shards: ShardCount,
        taken: &BTreeSet<u32>,
    ) -> Self {
        let step = usize::from(shards.get());
        let range = first..first.saturating_add(total);
        let share = range.skip(usize::from(shard.index())).step_by(step);
        Self { free: share.filter(|uid| !taken.contains(uid)).collect() }
    }

    /// Takes one; `None` when the shard has as many sandboxes as it may.
    pub(crate) fn take(&mut self) -> Option<u32> {
        self.free.pop_first()
    }

    /// Gives one back, when no process runs under it any more.
    pub(crate) fn give_back(&mut self, uid: u32) {
        if !self.free.insert(uid) {
            debug_assert!(false, "uid {uid} was given back twice");
            tracing::error!(uid, "a uid was given back twice");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn shares_are_disjoint_and_complete(
            total in 1u32..500, shards in 1u16..9, first in 10_000u32..20_000,
        ) {
            let count = ShardCount::new(shards).unwrap();
            let mut all = BTreeSet::new();
            for shard in 0..shards {
                let taken = BTreeSet::from([first]);
                let mut uids = Uids::share(first, total, ShardId::new(shard), count, &taken);
                while let Some(uid) = uids.take() {
                    prop_assert!(all.insert(uid), "uid {} is in two shares", uid);
                }
            }
            prop_assert_eq!(all, (first + 1..first + total).collect::<BTreeSet<_>>());
        }
    }

    #[test]
    fn the_lowest_is_used_again() {
        let mut uids = Uids::share(10_000, 2, ShardId::new(0), ShardCount::MIN, &BTreeSet::new());
        assert_eq!(uids.take(), Some(10_000));
        assert_eq!(uids.take(), Some(10_001));
        assert_eq!(uids.take(), None);
        uids.give_back(10_000);
        assert_eq!((uids.take(), uids.take()), (Some(10_000), None));
    }
}
