//! Flattens snapshots whose chains have grown, in the background.
//!
//! Called after each commit. One at a time for each shard, on a blocking thread. What sandboxes have
//! open stays as it was. Refuses to hold anything up: a snapshot that is not flattened is only slower.

use std::collections::VecDeque;
use std::rc::Rc;

use mica_numa::rt;
use mica_storage::{FlattenLimits, FlattenStep, Layer, Shape};

use crate::sandbox::chain;
use crate::shard::Shard;

/// Snapshots that wait to be flattened. One more is left as it is, until the next capture on it.
const WAITING_MAX: usize = 256;

/// What waits on one shard.
#[derive(Debug, Default)]
pub(crate) struct Upkeep {
    waiting: std::cell::RefCell<VecDeque<String>>,
    busy: std::cell::Cell<bool>,
}

/// Flattens a new snapshot if its chain is over the limits.
pub(crate) fn look_at(shard: &Rc<Shard>, snapshot: &str, layers: &[Layer]) {
    let limits = shard.workshop.config.flatten;
    if limits.step(&Shape::of(layers)) == FlattenStep::Keep {
        return;
    }
    let mut waiting = shard.upkeep.waiting.borrow_mut();
    if waiting.len() >= WAITING_MAX {
        return;
    }
    waiting.push_back(snapshot.to_owned());
    // A task runs as soon as it is spawned, and takes from the queue.
    drop(waiting);
    if !shard.upkeep.busy.replace(true) {
        rt::spawn(work(Rc::clone(shard), limits)).detach();
    }
}

async fn work(shard: Rc<Shard>, limits: FlattenLimits) {
    loop {
        let next = shard.upkeep.waiting.borrow_mut().pop_front();
        let Some(snapshot) = next else { break };
        let (store, id) = (shard.workshop.store.clone(), snapshot.clone());
        match rt::blocking(move || store.flatten(&id, &limits)).await {
            Ok(Ok(flattened)) => tracing::debug!(snapshot, ?flattened, "a chain was flattened"),
            Ok(Err(error)) => {
                tracing::warn!(snapshot, error = chain(&error), "a chain was not flattened");
            }
            Err(error) => tracing::debug!(snapshot, %error, "a chain was not flattened"),
        }
    }
    shard.upkeep.busy.set(false);
}
