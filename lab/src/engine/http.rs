//! The same operations as an HTTP client sees them: a daemon as a child, and one connection to it.
//!
//! Called by the benchmark's program. Refuses every answer but the one expected.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::client::Client;
use super::floor::Floor;
use super::place::{Places, TEMPLATE};
use super::series::Book;
use crate::bench::phases::Before;
use crate::served::{Serve, Served};

/// Shells that the daemon keeps.
const POOL: usize = 8;
/// Longest wait for the daemon to come to rest.
const PATIENCE: Duration = Duration::from_secs(60);
/// For so long no VM process may have run before a round begins.
const QUIET: Duration = Duration::from_millis(10);

/// Creates and ends over HTTP. One round more warms up.
///
/// # Errors
/// When the daemon does not come up, or answers anything but success.
pub fn creates(
    places: &Places,
    mica: &Path,
    floor: &Floor,
    book: &mut Book,
    rounds: u32,
) -> Result<()> {
    let daemon = Daemon::start(places, mica)?;
    let mut client = daemon.client()?;
    let body = format!(r#"{{"templateID":"{TEMPLATE}","timeout":3600,"secure":false}}"#);
    let mut counted = Before::default();
    for round in 0..=rounds {
        if round == 1 {
            counted = Before::of(&client.call("GET", "/metrics", b"", 200)?);
        }
        let life = floor.life()?;
        daemon.quiet()?;
        let begun = Instant::now();
        let answer = client.call("POST", "/sandboxes", body.as_bytes(), 201)?;
        let create = begun.elapsed();
        let made: serde_json::Value = serde_json::from_slice(&answer)?;
        let id = made["sandboxID"].as_str().context("an answer without an id")?;
        daemon.quiet()?;
        let path = format!("/sandboxes/{id}");
        let begun = Instant::now();
        client.call("DELETE", &path, b"", 204)?;
        let destroy = begun.elapsed();
        if round > 0 {
            book.add("create_http", create, life.hit);
            book.add("destroy_http", destroy, life.destroy);
        }
    }
    let now = Before::of(&client.call("GET", "/metrics", b"", 200)?);
    let creates = counted.until(&now).into_iter().filter(|phase| phase.operation == "create");
    book.spent("create_http", creates);
    Ok(())
}

/// `mica serve` on the store of the benchmark.
struct Daemon {
    served: Served,
    cgroup: PathBuf,
}

impl Daemon {
    fn start(places: &Places, mica: &Path) -> Result<Self> {
        let (store, keys) = (places.store(), places.root().join("keys"));
        let (cgroup, vm_program) = (&places.cgroup, places.vm_program());
        let serve = Serve { mica, store: &store, keys: &keys, cgroup, vm_program };
        let pool = POOL.to_string();
        let options = [
            &["--accept-unusable-kvm", "--without-cgroup-limits", "--shards", "1"][..],
            &["--pool-min", &pool, "--pool-max", &pool, "--uid-first", "700000"],
        ];
        Ok(Self { served: Served::start(&serve, options.concat())?, cgroup: cgroup.clone() })
    }

    fn client(&self) -> Result<Client> {
        self.served.client(&[("Content-Type", "application/json")])
    }

    /// Waits until the pool is full and no VM process does anything.
    fn quiet(&self) -> Result<()> {
        let begun = Instant::now();
        let mut last = None;
        loop {
            let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
            let groups = fs::read_dir(&self.cgroup)?.flatten().filter(is_dir).count();
            let used = fs::read_to_string(self.cgroup.join("cpu.stat"))?;
            let used = used.lines().next().map(str::to_owned);
            if groups >= POOL && used.is_some() && used == last {
                return Ok(());
            }
            ensure!(begun.elapsed() < PATIENCE, "the daemon's pool does not come to rest");
            last = used;
            thread::sleep(QUIET);
        }
    }
}
