//! What shards show one another of themselves, so that creates go where there is room.
//!
//! Written by each shard about itself, and by the first of a node about the node's copies; read by all, without
//! order: hints. What counts is the owner's own admission. Refuses to be exact about templates: of two names that
//! look the same the later one counts, and then a create goes to a node that has no copy, and maps the file.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Index;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use mica_storage::LayerId;
use mica_units::{PerShard, ShardCount, ShardId};

use crate::registry::{HOSTS_MAX, HostSet};

/// Names that a node keeps apart: a few hundred, before many look the same.
const NAMES: usize = 4096;

/// Words of a set of shards.
const WORDS: usize = HOSTS_MAX as usize / 64;

/// Of all shards.
#[derive(Debug)]
pub(crate) struct Loads {
    shards: PerShard<Load>,
    /// A bit for each shard whose node is short of memory.
    short: [AtomicU64; WORDS],
    /// Of each node, by its first shard: which copy is there for each name, as a number that is never 0.
    near: PerShard<Box<[AtomicU64]>>,
}

/// Of one shard.
#[derive(Debug)]
pub(crate) struct Load {
    sandboxes: AtomicU32,
    /// The first shard of its node.
    librarian: ShardId,
}

impl Loads {
    /// Nothing on any shard yet. `librarian` says who is the first shard of a shard's node.
    pub(crate) fn new(shards: ShardCount, librarian: impl Fn(ShardId) -> ShardId) -> Arc<Self> {
        let near = |shard| {
            let names = if librarian(shard) == shard { NAMES } else { 0 };
            (0..names).map(|_| AtomicU64::new(0)).collect()
        };
        let none = |shard| Load { sandboxes: AtomicU32::new(0), librarian: librarian(shard) };
        Arc::new(Self {
            near: PerShard::from_fn(shards, near),
            shards: PerShard::from_fn(shards, none),
            short: [const { AtomicU64::new(0) }; WORDS],
        })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (ShardId, &Load)> {
        self.shards.iter()
    }

    pub(crate) fn set_memory_is_short(&self, shard: ShardId, short: bool) {
        let (word, bit) = (usize::from(shard.index()) / 64, 1 << (shard.index() % 64));
        // A registry has no more hosts than this has bits, and each shard is one.
        let Some(word) = self.short.get(word) else { return };
        if short {
            word.fetch_or(bit, Ordering::Relaxed);
        } else {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    /// Those of a set, and those on nodes that are short of memory.
    pub(crate) fn with_short(&self, set: &HostSet) -> HostSet {
        set.with_words(std::array::from_fn(|at| self.short[at].load(Ordering::Relaxed)))
    }

    /// The memory of the image that clients ask for by this name is on the shard's node from now on: a copy of
    /// this layer.
    pub(crate) fn add_near(&self, shard: ShardId, name: &str, layer: LayerId) {
        if let Some(place) = self.near_of(shard).get(place(name)) {
            place.store(tag(layer), Ordering::Relaxed);
        }
    }

    /// The node of this shard, which is its first, gave its copy of a layer up.
    pub(crate) fn drop_near(&self, librarian: ShardId, layer: LayerId) {
        let tag = tag(layer);
        for place in self.near_of(librarian) {
            // One that is another's meanwhile stays.
            let gone = place.compare_exchange(tag, 0, Ordering::Relaxed, Ordering::Relaxed);
            if let Err(other) = gone {
                debug_assert_ne!(other, tag, "nobody but the librarian takes it out");
            }
        }
    }

    pub(crate) fn has_near(&self, shard: ShardId, name: &str) -> bool {
        let near = self.near_of(shard).get(place(name));
        near.is_some_and(|place| place.load(Ordering::Relaxed) != 0)
    }

    fn near_of(&self, shard: ShardId) -> &[AtomicU64] {
        &self.near[self[shard].librarian]
    }
}

impl Index<ShardId> for Loads {
    type Output = Load;

    fn index(&self, shard: ShardId) -> &Load {
        &self.shards[shard]
    }
}

impl Load {
    pub(crate) fn set_sandboxes(&self, count: u32) {
        self.sandboxes.store(count, Ordering::Relaxed);
    }

    pub(crate) fn sandboxes(&self) -> u32 {
        self.sandboxes.load(Ordering::Relaxed)
    }
}

fn hash(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

fn place(name: &str) -> usize {
    usize::try_from(hash(name) % NAMES as u64).unwrap_or(0)
}

fn tag(layer: LayerId) -> u64 {
    hash(layer) | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shards<const N: usize>() -> [ShardId; N] {
        std::array::from_fn(|at| ShardId::new(u16::try_from(at).unwrap()))
    }

    fn layer(character: char) -> LayerId {
        character.to_string().repeat(20).parse().unwrap()
    }

    #[test]
    fn a_shard_shows_what_it_has_and_another_reads_it() {
        let loads = Loads::new(ShardCount::new(200).unwrap(), |_| ShardId::new(0));
        let [zero, one] = shards();
        loads[zero].set_sandboxes(7);
        assert_eq!((loads[zero].sandboxes(), loads[one].sandboxes()), (7, 0));
        let short = || -> Vec<usize> {
            loads.with_short(&HostSet::default()).iter().map(|host| host.get().into()).collect()
        };
        assert_eq!(short(), [0; 0]);
        for shard in [1, 63, 64, 199] {
            loads.set_memory_is_short(ShardId::new(shard), true);
        }
        assert_eq!(short(), [1, 63, 64, 199]);
        loads.set_memory_is_short(ShardId::new(64), false);
        assert_eq!(short(), [1, 63, 199]);
    }

    #[test]
    fn a_copy_is_near_to_all_shards_of_its_node_until_the_node_gives_it_up() {
        // Two nodes of two shards.
        let loads =
            Loads::new(ShardCount::new(4).unwrap(), |shard| ShardId::new(shard.index() & !1));
        let [zero, one, two, three] = shards();
        let [python, other] = ['p', 'o'].map(layer);
        loads.add_near(one, "python", python);
        loads.add_near(one, "other", other);
        loads.add_near(two, "python", python);
        let near = |name| [zero, one, two, three].map(|shard| loads.has_near(shard, name));
        assert_eq!((near("python"), near("other")), ([true; 4], [true, true, false, false]));
        assert_eq!(near("unknown"), [false; 4]);
        loads.drop_near(zero, python);
        assert_eq!(near("python"), [false, false, true, true], "the other node has its own");
        assert_eq!(near("other"), [true, true, false, false]);
    }
}
