//! Shells that wait for a guest: how many, that they are used, and that one that died is not.
//!
//! Against the double.

use std::time::Duration;

use mica_shards::{Host, HostConfig, HostCounters, rt};

use crate::common::{Bench, Leftovers, kill_process, request};
use crate::wait::eventually;

/// Shells that each of two shards keeps.
const FLOOR: u32 = 2;
const CEILING: u32 = 3;

async fn counters(host: &Host) -> HostCounters {
    host.counters().await.unwrap()
}

/// Runs a test on a host whose shards keep shells.
fn with_pool<F>(bench: &Bench, test: impl FnOnce(Host) -> F + Send + 'static)
where
    F: Future<Output = ()> + 'static,
{
    let config = HostConfig { pool_floor: FLOOR, pool_ceiling: CEILING, ..bench.config() };
    bench.host_with(config, test).unwrap();
    assert_eq!(bench.leftovers(), Leftovers::default(), "after the host's end");
}

async fn is_full(host: &Host) {
    eventually("the floor is held", async || counters(host).await.shells >= 2 * u64::from(FLOOR))
        .await;
}

#[test]
fn the_floor_is_held_before_anyone_asks_and_a_create_takes_one() {
    let bench = Bench::new();
    let places = bench.clone();
    with_pool(&bench, move |host| async move {
        is_full(&host).await;
        assert_eq!(places.leftovers().sandboxes, 0, "a shell has nothing in the store");
        let full = counters(&host).await;
        assert_eq!((full.pool_hits, full.pool_misses, full.sandboxes), (0, 0, 0));
        assert_eq!(places.pids().len() as u64, full.shells, "each is a process");
        for made in 1..=6u64 {
            host.create(request("agent")).await.unwrap();
            let now = counters(&host).await;
            assert_eq!((now.pool_hits + now.pool_misses, now.sandboxes), (made, made));
            is_full(&host).await;
        }
        let now = counters(&host).await;
        assert_eq!((now.pool_hits, now.pool_misses), (6, 0), "there was always one");
    });
}

#[test]
fn an_empty_pool_makes_one_on_the_path_and_says_so() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        host.create(request("agent")).await.unwrap();
        let now = counters(&host).await;
        assert_eq!((now.pool_hits, now.pool_misses, now.shells), (0, 1, 0));
    });
}

#[test]
fn a_burst_never_makes_more_than_the_ceiling() {
    let bench = Bench::new();
    with_pool(&bench, |host| async move {
        is_full(&host).await;
        let start = |_| {
            let host = host.clone();
            rt::spawn(async move { host.create(request("agent")).await.unwrap().id })
        };
        let creates: Vec<_> = (0..16).map(start).collect();
        let mut ids = Vec::new();
        for create in creates {
            ids.push(create.join().await.unwrap());
        }
        let now = counters(&host).await;
        assert_eq!(now.pool_hits + now.pool_misses, 16);
        assert!(now.pool_misses > 0, "the burst was more than the pools hold: {now:?}");
        // It refills, up to the ceiling of each shard and no further.
        let begun = rt::time::Instant::now();
        while begun.elapsed() < Duration::from_millis(700) {
            let shells = counters(&host).await.shells;
            assert!(shells <= 2 * u64::from(CEILING), "{shells} shells");
            rt::time::sleep(Duration::from_millis(10)).await;
        }
        is_full(&host).await;
        for id in ids {
            host.kill(id).await.unwrap();
        }
    });
}

#[test]
fn a_shell_that_died_is_replaced_and_nobody_gets_it() {
    let bench = Bench::new();
    let places = bench.clone();
    with_pool(&bench, move |host| async move {
        is_full(&host).await;
        let dead = places.pids();
        dead.iter().for_each(|pid| kill_process(*pid));
        let are_gone = || places.pids().iter().all(|pid| !dead.contains(pid));
        eventually("they are dead", async || are_gone()).await;
        // Every create finds dead ones, or new ones; none gets a dead one.
        for _ in 0..8 {
            host.create(request("agent")).await.unwrap();
        }
        is_full(&host).await;
        let alive = places.pids();
        assert!(dead.iter().all(|pid| !alive.contains(pid)), "{dead:?} in {alive:?}");
        // One that is just being made is not in the pool yet.
        let adds_up = async || places.pids().len() as u64 == 8 + counters(&host).await.shells;
        eventually("there are those of the sandboxes and of the pool", adds_up).await;
    });
}

#[test]
fn shells_that_cannot_be_made_do_not_stop_the_host() {
    let bench = Bench::new();
    bench.set_mood("not-built");
    let places = bench.clone();
    with_pool(&bench, move |host| async move {
        assert!(host.create(request("agent")).await.is_err());
        assert_eq!(counters(&host).await.shells, 0);
        places.set_mood("dies-in-the-pool");
        eventually("some are made, and die", async || counters(&host).await.shells > 0).await;
        // Whoever read that mood dies soon, and might be taken in its last moment. None of them is left
        // when no process is, since those that are made meanwhile never come up.
        places.set_mood("not-built");
        eventually("they are dead", async || places.pids().is_empty()).await;
        places.set_mood("good");
        for _ in 0..5 {
            host.create(request("agent")).await.unwrap();
        }
    });
}
