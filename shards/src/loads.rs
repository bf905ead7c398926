//! What shards show one another of themselves, so that creates go where there is room.
//!
//! Written by each shard about itself, and read by all, without order: hints. What counts is the
//! owner's own admission. Refuses to be exact about templates: two names may look the same here, and
//! then a create goes to a node that has no copy, and maps the file.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use mica_units::{PerShard, ShardCount};

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

    pub(crate) fn sandboxes(&self) -> u32 {
        self.sandboxes.load(Ordering::Relaxed)
    }

    pub(crate) fn memory_is_short(&self) -> bool {
        self.memory_is_short.load(Ordering::Relaxed)
    }

    pub(crate) fn has_near(&self, name: &str) -> bool {
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

#[cfg(test)]
mod tests {
    use mica_units::ShardId;

    use super::*;

    #[test]
    fn a_shard_shows_what_it_has_and_another_reads_it() {
        let loads = loads(ShardCount::new(2).unwrap());
        let [zero, one] = [0, 1].map(ShardId::new);
        loads[zero].set_sandboxes(7);
        loads[zero].add_near("python");
        loads[one].set_memory_is_short(true);
        assert_eq!((loads[zero].sandboxes(), loads[one].sandboxes()), (7, 0));
        assert!(loads[zero].has_near("python") && !loads[one].has_near("python"));
        assert!(!loads[zero].has_near("other"));
        assert!(loads[one].memory_is_short() && !loads[zero].memory_is_short());
    }
}
