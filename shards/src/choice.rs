//! Which shard a new sandbox goes to.
//!
//! Called by `host` for every create, on the shard that was asked. Each shard has a registry of its own in which all
//! shards are the hosts; the load is what they show one another ([`crate::loads`]), read for the two that are
//! drawn. A ticket is held while a create is under way, so that creates of one moment, which all see the same loads,
//! do not fall on one shard. Refuses to decide who is full for more than its own creates: the owner admits.
//!
//! Load comes first, then the template: every shard reads the same store, and a node's copy of a base layer is
//! there for all shards of the node. Sandboxes that stayed where the template came first would leave the other cores
//! idle; of two shards with as much to do, the one whose node has the template's memory is the better one. Shards of
//! a node that is short of memory come when there are no others.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use mica_units::{ShardCount, ShardId};

use crate::loads::Loads;
use crate::registry::{
    AllocateError, HostNumber, HostSet, Registry, RegistryError, Report, SLOTS_MAX, Ticket, Want,
};

/// Sandboxes that may have a process on a shard: all shards' shares together are what the host may run.
pub(crate) fn share(sandboxes_max: u32, shards: ShardCount, shard: ShardId) -> u32 {
    let shards = u32::from(shards.get());
    let one_more = u32::from(shard.index()) < sandboxes_max % shards;
    sandboxes_max / shards + u32::from(one_more)
}

/// What one shard knows of all of them.
#[derive(Debug)]
pub(crate) struct Choice {
    /// Who knows it.
    own: ShardId,
    registry: RefCell<Registry>,
    loads: Arc<Loads>,
}

/// A shard that was chosen. Counts there until it is dropped.
#[derive(Debug)]
pub(crate) struct Chosen<'c> {
    choice: &'c Choice,
    ticket: Ticket,
}

impl Choice {
    /// All shards, with their shares, as `own` knows them. `seed` settles what is drawn.
    pub(crate) fn new(
        own: ShardId,
        shards: ShardCount,
        sandboxes_max: u32,
        loads: Arc<Loads>,
        seed: u64,
    ) -> Result<Self, RegistryError> {
        let mut registry = Registry::new(shards.get(), seed)?;
        for (shard, _) in loads.iter() {
            let slots = share(sandboxes_max, shards, shard).min(SLOTS_MAX);
            let report = Report { slots, load: 0, draining: false, templates: &[] };
            registry.report(shard.try_into()?, &report, Duration::ZERO)?;
        }
        Ok(Self { own, registry: RefCell::new(registry), loads })
    }

    /// Says how many sandboxes a shard has.
    pub(crate) fn show(&self, shard: ShardId, count: u32) {
        self.loads[shard].set_sandboxes(count);
    }

    /// What the shards show.
    pub(crate) fn loads(&self) -> &Loads {
        &self.loads
    }

    /// The less loaded of two shards that are not in `tried`, for a sandbox of the image of this name.
    pub(crate) fn choose(
        &self,
        tried: &HostSet,
        template: &str,
    ) -> Result<Chosen<'_>, AllocateError> {
        let roomy = self.choose_except(&self.loads.with_short(tried), template);
        let ticket = match roomy {
            Err(AllocateError::Full) => self.choose_except(tried, template)?,
            other => other?,
        };
        Ok(Chosen { choice: self, ticket })
    }

    fn choose_except(&self, except: &HostSet, template: &str) -> Result<Ticket, AllocateError> {
        let want = Want { except: Some(except), ..Want::default() };
        let load = |host: HostNumber| {
            let shard = ShardId::new(host.get());
            let is_far = u32::from(!self.loads.has_near(shard, template));
            // To another one go two messages, and each wakes who gets it.
            let is_elsewhere = u32::from(shard != self.own);
            // Both below one sandbox more.
            self.loads[shard]
                .sandboxes()
                .saturating_mul(4)
                .saturating_add(2 * is_far + is_elsewhere)
        };
        self.registry.borrow_mut().allocate_by(&want, load)
    }
}

impl Chosen<'_> {
    /// Its number in a set of those that were tried.
    pub(crate) fn host(&self) -> HostNumber {
        self.ticket.host()
    }

    /// Which it is.
    pub(crate) fn shard(&self) -> ShardId {
        ShardId::new(self.host().get())
    }
}

impl Drop for Chosen<'_> {
    fn drop(&mut self) {
        // Shards do not leave, and this is the ticket's one owner.
        if let Err(error) = self.choice.registry.borrow_mut().release(self.ticket) {
            tracing::error!(shard = self.shard().index(), %error, "a chosen shard is not given back");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mica_storage::LayerId;

    /// As the first of them knows it.
    fn choice(shards: u16, sandboxes_max: u32) -> Choice {
        let shards = ShardCount::new(shards).unwrap();
        // A node for each.
        let loads = Loads::new(shards, |shard| shard);
        Choice::new(ShardId::new(0), shards, sandboxes_max, loads, 1).unwrap()
    }

    #[test]
    fn shares_add_up_to_what_the_host_may_run() {
        for (total, count) in [(5, 2), (1, 3), (100_000, 48), (4096, 7)] {
            let shards = ShardCount::new(count).unwrap();
            let sum: u32 = (0..count).map(|shard| share(total, shards, ShardId::new(shard))).sum();
            assert_eq!(sum, total);
        }
    }

    #[test]
    fn of_two_shards_the_less_loaded_one_is_chosen_as_loads_are_shown() {
        let choice = choice(2, 100);
        for busy in [0, 1, 0] {
            choice.show(ShardId::new(busy), 9);
            choice.show(ShardId::new(1 - busy), 3);
            for _ in 0..20 {
                assert_eq!(
                    choice.choose(&HostSet::default(), "x").unwrap().shard().index(),
                    1 - busy
                );
            }
        }
    }

    #[test]
    fn creates_of_one_moment_are_spread() {
        let choice = choice(8, 800);
        let none = HostSet::default();
        let under_way: Vec<_> = (0..80).map(|_| choice.choose(&none, "x").unwrap()).collect();
        let mut counts = [0; 8];
        for chosen in &under_way {
            counts[usize::from(chosen.shard().index())] += 1;
        }
        assert!(counts.iter().all(|count| (8..=12).contains(count)), "{counts:?}");
    }

    #[test]
    fn each_shard_is_tried_once_and_one_without_a_share_never() {
        let choice = choice(4, 3);
        let mut tried = HostSet::default();
        for _ in 0..3 {
            let chosen = choice.choose(&tried, "x").unwrap();
            assert!(tried.insert(chosen.host()) && chosen.shard().index() < 3);
        }
        assert_eq!(choice.choose(&tried, "x").map(drop), Err(AllocateError::Full));
        let all: Vec<_> =
            (0..3).map(|_| choice.choose(&HostSet::default(), "x").unwrap()).collect();
        assert!(
            choice.choose(&HostSet::default(), "x").is_err(),
            "every share is taken by a create"
        );
        drop(all);
        assert!(choice.choose(&HostSet::default(), "x").is_ok());
    }

    #[test]
    fn of_equals_one_that_has_the_memory_near_is_chosen_and_load_counts_more() {
        let choice = choice(2, 100);
        let [without, with] = [0, 1].map(ShardId::new);
        let layer: LayerId = "p".repeat(20).parse().unwrap();
        choice.loads().add_near(with, "python", layer);
        let none = HostSet::default();
        let shard = || choice.choose(&none, "python").unwrap().shard();
        for _ in 0..20 {
            assert_eq!(shard(), with);
        }
        choice.loads().drop_near(with, layer);
        for _ in 0..20 {
            assert_eq!(shard(), without, "the copy is gone, and of equals the own one is chosen");
        }
        choice.loads().add_near(with, "python", layer);
        choice.show(with, 1);
        for _ in 0..20 {
            assert_eq!(shard(), without);
        }
    }

    #[test]
    fn equals_that_are_both_elsewhere_are_drawn() {
        let choice = choice(3, 300);
        choice.show(ShardId::new(0), 5);
        let none = HostSet::default();
        let drawn: Vec<_> =
            (0..64).map(|_| choice.choose(&none, "x").unwrap().shard().index()).collect();
        assert!(drawn.contains(&1) && drawn.contains(&2) && !drawn.contains(&0), "{drawn:?}");
    }

    #[test]
    fn creates_spill_to_another_node_when_one_is_full() {
        let choice = choice(4, 400);
        // Shards 0 and 1 are of a node without memory left, and have the fewest sandboxes.
        for (shard, count, short) in [(0, 0, true), (1, 0, true), (2, 50, false), (3, 70, false)] {
            choice.show(ShardId::new(shard), count);
            choice.loads().set_memory_is_short(ShardId::new(shard), short);
        }
        let mut tried = HostSet::default();
        let mut order = Vec::new();
        while let Ok(chosen) = choice.choose(&tried, "x") {
            tried.insert(chosen.host());
            order.push(chosen.shard().index());
        }
        assert_eq!(order[..2], [2, 3], "the roomy ones first, by load");
        order.sort_unstable();
        assert_eq!(order, [0, 1, 2, 3], "the others are the last hope");
    }
}
