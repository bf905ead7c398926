//! When memory is short: which frozen process goes first, and where creates do not go.
//!
//! Run on each shard as its own task. Paused sandboxes are on disk, so their processes are a cache:
//! where the node has less free memory than its reserve, the longest paused goes, and creates go to
//! other nodes. Refuses to touch anything that runs.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use mica_numa::StopSignal;
use mica_numa::rt::{self, time};

use crate::shard::Shard;

/// How often memory is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Looks until `stop`.
pub(crate) async fn watch(shard: Rc<Shard>, node: u32, stop: StopSignal) {
    let reserve = u64::from(shard.workshop.config.memory_reserve_mib) << 20;
    loop {
        let ended = async {
            stop.stopped().await;
            true
        };
        let pause = async {
            time::sleep(LOOK_EVERY).await;
            false
        };
        if futures_lite::future::or(ended, pause).await {
            return;
        }
        match rt::blocking(move || available_bytes(node)).await {
            Ok(Ok(available)) => {
                let short = available < reserve;
                shard.choice.loads().set_memory_is_short(shard.id, short);
                if let Some((sandbox, _)) = shard.longest_paused().filter(|_| short) {
                    let id = sandbox.id;
                    tracing::info!(%id, available, "memory is short: a paused process goes");
                    sandbox.evict();
                }
            }
            Ok(Err(error)) => tracing::warn!(%error, "cannot tell how much memory is free"),
            Err(error) => tracing::debug!(%error, "memory was not looked at"),
        }
    }
}

/// Memory of the node that is free or a clean file's, in bytes.
fn available_bytes(node: u32) -> io::Result<u64> {
    Ok(memory(node)?.1)
}

/// All memory of the node, and what of it is free or a clean file's, in bytes.
pub(crate) fn memory(node: u32) -> io::Result<(u64, u64)> {
    let path = format!("/sys/devices/system/node/node{node}/meminfo");
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            with_total(&text, parse_node(&text)).ok_or_else(|| io::ErrorKind::InvalidData.into())
        }
        // A kernel without NUMA has one node, all of it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let text = std::fs::read_to_string("/proc/meminfo")?;
            with_total(&text, field(&text, "MemAvailable:"))
                .ok_or_else(|| io::ErrorKind::InvalidData.into())
        }
        Err(error) => Err(error),
    }
}

fn with_total(text: &str, available: Option<u64>) -> Option<(u64, u64)> {
    Some((field(text, "MemTotal:")?, available?))
}

/// `MemFree` and what the page cache could give up at once.
fn parse_node(text: &str) -> Option<u64> {
    let (free, files) = (field(text, "MemFree:")?, field(text, "FilePages:")?);
    let kept = field(text, "Shmem:")?.saturating_add(field(text, "Dirty:")?);
    Some(free + files.saturating_sub(kept))
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.split_once(name))?;
    let kib: u64 = line.1.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_a_node_is_what_is_free_and_what_can_be_dropped() {
        let text = "Node 1 MemTotal:  100 kB\nNode 1 MemFree:       10 kB\nNode 1 Dirty: 2 kB\n\
                    Node 1 FilePages:    50 kB\nNode 1 Shmem: 20 kB\n";
        assert_eq!(parse_node(text), Some((10 + 28) << 10));
        assert_eq!(parse_node("Node 1 MemFree: 1 kB"), None);
        assert!(available_bytes(0).unwrap() > 0);
    }
}
