//! Keeps what a shard's pool knows of the hours of the day across restarts.
//!
//! Run on each shard as its own task. One small text file for each shard in the store's directory.
//! Refuses to fail: it is a hint, and a host without it starts with quiet pools.

use std::fs;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use mica_numa::StopSignal;
use mica_numa::rt::{self, time};
use mica_storage::Store;

use crate::shard::Shard;

/// How often it is written.
const WRITE_EVERY: Duration = Duration::from_secs(300);

/// Longest file that is read back.
const BYTES_MAX: u64 = 1 << 20;

/// Writes until `stop`.
pub(crate) async fn keep(shard: Rc<Shard>, stop: StopSignal) {
    loop {
        let stopped = async {
            stop.stopped().await;
            true
        };
        let pause = async {
            time::sleep(WRITE_EVERY).await;
            false
        };
        if futures_lite::future::or(stopped, pause).await {
            return;
        }
        write(&shard).await;
    }
}

/// Writes once.
pub(crate) async fn write(shard: &Shard) {
    let path = path(&shard.workshop.store, shard.id.index());
    let text = shard.pool.demand_text();
    let written = rt::blocking(move || {
        let new = path.with_extension("new");
        fs::write(&new, text).and_then(|()| fs::rename(&new, &path))
    });
    match written.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the hours of demand were not written"),
        Err(error) => tracing::debug!(%error, "the hours of demand were not written"),
    }
}

/// Reads what an earlier daemon wrote; nothing where it wrote nothing. Blocks.
pub(crate) fn read(store: &Store, shard: u16) -> String {
    let path = path(store, shard);
    let small = fs::metadata(&path).is_ok_and(|found| found.len() <= BYTES_MAX);
    if small { fs::read_to_string(&path).unwrap_or_default() } else { String::new() }
}

fn path(store: &Store, shard: u16) -> PathBuf {
    store.root().join(format!("demand-{shard}"))
}
