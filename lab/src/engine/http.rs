//! The same operations as an HTTP client sees them: a daemon as a child, and one connection to it.
//!
//! Called by the benchmark's program. Refuses every answer but the one expected.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::client::Client;
use super::floor::Floor;
use super::place::{Places, TEMPLATE};
use super::series::Book;
use crate::bench::phases::Before;

/// Shells that the daemon keeps.
const POOL: usize = 8;
/// Longest wait for the daemon.
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
    child: Child,
    address: SocketAddr,
    keys: PathBuf,
    cgroup: PathBuf,
}

impl Daemon {
    fn start(places: &Places, mica: &Path) -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let keys = places.root().join("keys");
        let mut command = Command::new(mica);
        command
            .args(["serve", "--accept-unusable-kvm", "--without-cgroup-limits", "--shards", "1"])
            .args(["--listen", &address.to_string()])
            .args(["--pool-min", &POOL.to_string(), "--pool-max", &POOL.to_string()])
            .args(["--uid-first", "700000"])
            .arg("--store")
            .arg(places.store())
            .arg("--key-file")
            .arg(&keys)
            .arg("--cgroup-root")
            .arg(&places.cgroup)
            .arg("--vm-program")
            .arg(places.vm_program())
            .env("MICA_LOG", "error")
            .stdin(Stdio::null());
        let child = command.spawn().with_context(|| format!("run {}", mica.display()))?;
        let mut daemon = Self { child, address, keys, cgroup: places.cgroup.clone() };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(daemon.address).is_err() {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("mica serve ended with {status}");
            }
            ensure!(Instant::now() < deadline, "mica serve does not listen");
            thread::sleep(QUIET);
        }
        Ok(daemon)
    }

    fn client(&self) -> Result<Client> {
        let keys = fs::read_to_string(&self.keys).context("read the keys")?;
        let key = keys.lines().find(|line| !line.is_empty() && !line.starts_with('#'));
        let key = key.context("no key")?.trim();
        Client::open(self.address, &[("X-API-Key", key), ("Content-Type", "application/json")])
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

    /// Asks it to stop, and waits for a bounded time.
    fn stop(&mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.context("no number")?, rustix::process::Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                bail!("mica serve did not end in time and was killed");
            }
            thread::sleep(QUIET);
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("mica-bench: {error:#}");
        }
    }
}
