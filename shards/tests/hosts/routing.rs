//! Requests that cross from one shard to another, and what a full mailbox means: an answer at once,
//! and nothing lost of what was taken.
//!
//! For the full mailbox, one shard's thread is held while the other sends.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use mica_numa::StopSignal;
use mica_shards::{Host, ShardError, rt, run};
use mica_units::{SANDBOX_ID_CHARS, SandboxId, ShardCount, ShardId};

use crate::common::{Bench, port, request, two_seats};

/// More than a mailbox holds.
const REQUESTS: usize = 1500;

/// An id that the other shard owns.
fn foreign_id() -> SandboxId {
    let shards = ShardCount::new(2).unwrap();
    let ids = (0..=255).map(|n| SandboxId::from_random([n; SANDBOX_ID_CHARS]));
    ids.into_iter().find(|id| id.shard(shards) == ShardId::new(1)).unwrap()
}

async fn flood(host: Host, release: Sender<()>) {
    let id = foreign_id();
    let mut tasks = Vec::new();
    for _ in 0..REQUESTS {
        let host = host.clone();
        tasks.push(rt::spawn(async move { host.get(id).await.unwrap_err() }));
    }
    // Each of them has sent by the time this timer is over: it is behind them all.
    rt::time::sleep(Duration::from_millis(1)).await;
    // What needs every shard is refused as well, and does not wait for the one that is held.
    let begun = rt::time::Instant::now();
    assert!(matches!(host.list().await, Err(ShardError::Busy)));
    assert!(begun.elapsed() < Duration::from_secs(1));
    release.send(()).unwrap();
    let (mut busy, mut answered) = (0, 0);
    for task in tasks {
        match task.join().await.unwrap() {
            ShardError::Busy => busy += 1,
            ShardError::NoSuchSandbox(asked) if asked == id => answered += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((answered, busy), (1024, REQUESTS - 1024));
    // And it is as good as new.
    assert!(matches!(host.get(id).await, Err(ShardError::NoSuchSandbox(_))));
}

#[test]
fn a_full_mailbox_is_an_answer() {
    let bench = Bench::new();
    let (release, released): (Sender<()>, Receiver<()>) = channel();
    let (held, is_held): (Sender<()>, Receiver<()>) = channel();
    let ends = Arc::new(Mutex::new((Some((release, is_held)), Some((held, released)))));
    let stop = StopSignal::new().unwrap();
    let ended = run(&two_seats(), bench.config(), stop, move |host, stop| {
        let mut ends = ends.lock().unwrap();
        let (sender, holder) = match host.shard().index() {
            0 => (ends.0.take(), None),
            _ => (None, ends.1.take()),
        };
        async move {
            if let Some((release, is_held)) = sender {
                is_held.recv().unwrap();
                flood(host, release).await;
            } else if let Some((held, released)) = holder {
                // Holds this shard's thread, as nothing in the product may.
                held.send(()).unwrap();
                released.recv().unwrap();
                stop.stopped().await;
            }
        }
    });
    ended.unwrap();
}

#[test]
fn both_shards_own_sandboxes_and_each_sees_all() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let mut ids = Vec::new();
        for _ in 0..12 {
            ids.push(host.create(request("agent")).await.unwrap().id);
        }
        let shards = std::num::NonZeroU16::new(2).unwrap();
        for shard in 0..2 {
            let owned = ids.iter().filter(|id| id.shard(shards).index() == shard).count();
            assert!(owned >= 3, "shard {shard} owns {owned} of 12");
        }
        let mut listed: Vec<_> = host.list().await.unwrap().iter().map(|info| info.id).collect();
        listed.sort();
        ids.sort();
        assert_eq!(listed, ids);
        let templates = host.templates().await.unwrap();
        assert_eq!(templates.iter().map(|t| t.spawn_count).sum::<u64>(), 12);
        for id in &ids {
            assert_eq!(host.get(*id).await.unwrap().id, *id);
            let mut stream = host.connect(*id, port(7)).await.unwrap();
            stream.write_all(b"over and back").await.unwrap();
            stream.close().await.unwrap();
            let mut back = String::new();
            stream.read_to_string(&mut back).await.unwrap();
            assert_eq!(back, "over and back");
        }
    });
}
