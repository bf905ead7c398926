//! What shards show one another of themselves, so that creates go where there is room.
//!
//! Written by each shard about itself, and read by all, without order: hints. What counts is the
//! owner's own admission. Refuses to be exact about templates: two names may look the same here, and
//! then a create goes to a node that has no copy, and maps the file.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use mica_units::{PerShard, ShardCount, ShardId};

/// Words of a shard's set of names: room for a few hundred before many look the same.
const NAME_WORDS: usize = 64;

/// Of all shards.
pub(crate) type Loads = Arc<PerShard<Load>>;

/// Of one shard.
#[derive(Debug)]
pub(crate) struct Load {
    sandboxes: AtomicU32,
    memory_is_short: AtomicBool,
    /// One bit for each name of an image whose memory is in the node's.
    near: [AtomicU64; NAME_WORDS],
}

/// Nothing on any shard yet.
pub(crate) fn loads(shards: ShardCount) -> Loads {
    let none = |_| Load {
        sandboxes: AtomicU32::new(0),
        memory_is_short: AtomicBool::new(false),
        near: [const { AtomicU64::new(0) }; NAME_WORDS],
    };
    Arc::new(PerShard::from_fn(shards, none))
}

impl Load {
    pub(crate) fn set_sandboxes(&self, count: u32) {
        self.sandboxes.store(count, Ordering::Relaxed);
    }

    pub(crate) fn set_memory_is_short(&self, short: bool) {
        self.memory_is_short.store(short, Ordering::Relaxed);
    }

    /// The memory of the image that clients ask for by this name is near from now on.
    pub(crate) fn add_near(&self, name: &str) {
        let (word, bit) = place(name);
        self.near[word].fetch_or(bit, Ordering::Relaxed);
    }

    fn has_near(&self, name: &str) -> bool {
        let (word, bit) = place(name);
        self.near[word].load(Ordering::Relaxed) & bit != 0
    }
}

fn place(name: &str) -> (usize, u64) {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    let hash = hasher.finish();
    let word = (hash >> 6) % NAME_WORDS as u64;
    (usize::try_from(word).unwrap_or(0), 1 << (hash % 64))
}

/// Every shard in the order in which a create of `template` tries them. The first is the less loaded
/// of two drawn ones, then come the others by load; of equal ones, those whose node has the template's
/// memory. Those whose node is short of memory come last. `drawn` decides what is drawn, and which of
/// equals is first.
pub(crate) fn in_order(loads: &PerShard<Load>, template: &str, drawn: [u16; 3]) -> Vec<ShardId> {
    let standing = |load: &Load| {
        let short = load.memory_is_short.load(Ordering::Relaxed);
        (short, load.sandboxes.load(Ordering::Relaxed), !load.has_near(template))
    };
    // Read once each: they change meanwhile, and a sort wants an order that stays.
    let mut shards: Vec<_> = loads.iter().map(|(shard, load)| (standing(load), shard)).collect();
    let [first, second, start] = drawn.map(usize::from);
    // So that of equals it is not always the first: sorting keeps their order.
    let count = shards.len();
    shards.rotate_left(start % count);
    shards.sort_by_key(|(standing, _)| *standing);
    let roomy = shards.iter().filter(|((short, ..), _)| !short).count();
    let among = if roomy == 0 { count } else { roomy };
    // In order, so the lower place is the less loaded of the two.
    shards[..=(first % among).min(second % among)].rotate_right(1);
    shards.into_iter().map(|(_, shard)| shard).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn some(counts: &[u32]) -> Loads {
        let loads = loads(ShardCount::new(u16::try_from(counts.len()).unwrap()).unwrap());
        for ((_, load), count) in loads.iter().zip(counts) {
            load.set_sandboxes(*count);
        }
        loads
    }

    fn order(loads: &Loads, template: &str, drawn: [u16; 3]) -> Vec<u16> {
        in_order(loads, template, drawn).into_iter().map(ShardId::index).collect()
    }

    #[test]
    fn the_less_loaded_of_two_comes_first_and_then_the_others_by_load() {
        let loads = some(&[5, 1, 9, 3]);
        // Sorted by load: 1, 3, 0, 2. Drawn are places 3 and 2.
        assert_eq!(order(&loads, "x", [3, 2, 0]), [0, 1, 3, 2]);
        assert_eq!(order(&loads, "x", [0, 3, 0]), [1, 3, 0, 2]);
    }

    #[test]
    fn of_equals_one_that_has_the_memory_near_comes_first() {
        let loads = some(&[2, 2, 2, 2]);
        loads[ShardId::new(3)].add_near("python");
        for start in 0..4 {
            assert_eq!(order(&loads, "python", [0, 1, start])[0], 3);
        }
        let firsts: Vec<u16> =
            (0..4).map(|start| order(&loads, "other", [0, 0, start])[0]).collect();
        assert_eq!(firsts, [0, 1, 2, 3], "of equals it is not always the same");
        loads[ShardId::new(3)].set_sandboxes(3);
        assert_ne!(order(&loads, "python", [0, 1, 0])[0], 3, "load counts more");
    }

    #[test]
    fn creates_spill_to_another_node_when_one_is_full() {
        // Shards 0 and 1 are of a node without memory left, and have the fewest sandboxes.
        let loads = some(&[0, 0, 50, 70]);
        for shard in [0, 1] {
            loads[ShardId::new(shard)].set_memory_is_short(true);
        }
        for drawn in 0..8 {
            let first = order(&loads, "x", [drawn, drawn + 1, drawn])[0];
            assert!(first >= 2, "a full node was taken");
            assert_eq!(
                order(&loads, "x", [drawn, drawn, 0])[2..],
                [0, 1],
                "they are the last hope"
            );
        }
        for shard in [2, 3] {
            loads[ShardId::new(shard)].set_memory_is_short(true);
        }
        assert_eq!(order(&loads, "x", [0, 0, 0]), [0, 1, 2, 3], "all are full: by load again");
        loads[ShardId::new(0)].set_memory_is_short(false);
        assert_eq!(order(&loads, "x", [2, 3, 0])[0], 0);
    }

    proptest! {
        #[test]
        fn every_shard_is_tried_once(
            counts in prop::collection::vec(0u32..4, 1..9),
            short in any::<u16>(),
            drawn in any::<[u16; 3]>(),
        ) {
            let loads = some(&counts);
            for (shard, load) in loads.iter() {
                load.set_memory_is_short(short >> shard.index() & 1 == 1);
            }
            let mut all = order(&loads, "x", drawn);
            all.sort_unstable();
            let expected: Vec<u16> = (0..).take(counts.len()).collect();
            prop_assert_eq!(all, expected);
        }
    }
}
