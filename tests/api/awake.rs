//! What `--cpu-latency-us` does for a daemon, as its own metrics tell.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use mica_numa::idle::IdleStates;

use crate::client::Connection;
use crate::daemon::{Daemon, eventually};
use crate::exposition::scrape;

/// More than are dense, a window's at least.
const MANY: usize = 200;

/// A port of the stand-in that nothing listens on: the VM process is asked all the same.
const CLOSED: u16 = 4;

/// One request through the proxy, which is handed to the VM process and back.
fn ask_the_guest(client: &mut Connection, id: &str) {
    client.send(format!("GET / HTTP/1.1\r\nhost: {CLOSED}-{id}.any.example\r\n\r\n"));
    client.reply().error(502);
}

/// For how long all shards together kept cores awake, in seconds.
fn kept_awake_s(daemon: &Daemon) -> f64 {
    let exposition = scrape(daemon);
    let series = exposition.series("mica_cores_kept_awake_seconds_total");
    assert!(!series.is_empty(), "a series of each shard");
    series.iter().map(|(_, seconds)| seconds).sum()
}

/// The least of what anybody on the machine holds now, in microseconds.
fn held_us() -> i32 {
    let bytes = fs::read("/dev/cpu_dma_latency").expect("root");
    i32::from_ne_bytes(bytes[..4].try_into().expect("a number"))
}

#[test]
fn cores_are_kept_awake_while_the_proxy_is_busy_where_that_makes_a_difference() {
    let daemon = Daemon::start_with(&["--shards", "1"]);
    let id = daemon.create();
    let mut client = daemon.connect();
    let rest = Duration::from_millis(20);
    for _ in 0..5 {
        ask_the_guest(&mut client, &id);
        // What is asked for so seldom is not dense.
        std::thread::sleep(rest);
    }
    assert_eq!(kept_awake_s(&daemon), 0.0);

    let states = IdleStates::read(Path::new("/"));
    let wanted = states.limit_us().filter(|_| states.has_driver());
    println!("{states:?}: {wanted:?}");
    if wanted.is_none() {
        (0..MANY).for_each(|_| ask_the_guest(&mut client, &id));
        assert_eq!(kept_awake_s(&daemon), 0.0, "it would change nothing here");
        return;
    }
    let began = Instant::now();
    while kept_awake_s(&daemon) == 0.0 {
        assert!(began.elapsed() < Duration::from_secs(60), "never, with {MANY} requests at a time");
        (0..MANY).for_each(|_| ask_the_guest(&mut client, &id));
    }
    let last = Cell::new(kept_awake_s(&daemon));
    eventually("it is let go when nothing more comes", || {
        std::thread::sleep(rest);
        let now = kept_awake_s(&daemon);
        last.replace(now) == now
    });
}

#[test]
fn off_is_off_and_a_number_is_held_always() {
    let daemon = Daemon::start_with(&["--shards", "1", "--cpu-latency-us", "off"]);
    let id = daemon.create();
    let mut client = daemon.connect();
    (0..MANY).for_each(|_| ask_the_guest(&mut client, &id));
    assert_eq!(kept_awake_s(&daemon), 0.0);
    drop(daemon);

    // Fewer than any other test holds that runs at this time would hide this one.
    let limit_us = 1_u8;
    let daemon = Daemon::start_with(&["--shards", "1", "--cpu-latency-us", &limit_us.to_string()]);
    assert!(held_us() <= i32::from(limit_us));
    assert_eq!(kept_awake_s(&daemon), 0.0, "no shard has to");
}
