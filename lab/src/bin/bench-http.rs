//! `GET /health` throughput of `mica serve` at 1 and at 2 shards, with wrk.
//!
//! Run by `make bench-smoke`, as root. Measures what a request costs before any sandbox is involved:
//! accept, parse, route, answer. wrk runs on the same cores, so on a small machine the figures say
//! how shards compare, not what the daemon can do. Refuses to report a run with failed requests.

#![forbid(unsafe_code)]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;

/// How long the daemon may take to listen, and to end.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Parser, Debug)]
#[command(about = "GET /health throughput at 1 and 2 shards")]
struct Args {
    /// The mica executable.
    #[arg(long)]
    mica: PathBuf,
    /// Seconds of each run.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Connections that wrk keeps open.
    #[arg(long, default_value_t = 64)]
    connections: u32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    for shards in [1, 2] {
        let rate = measure(&args, shards).with_context(|| format!("with {shards} shards"))?;
        println!("GET /health, {shards} shard(s): {rate} requests/s");
    }
    Ok(())
}

fn measure(args: &Args, shards: u32) -> Result<String> {
    let directory =
        std::env::temp_dir().join(format!("mica-bench-http-{}-{shards}", std::process::id()));
    std::fs::create_dir(&directory).context("cannot make a directory")?;
    let daemon = Daemon::start(&args.mica, shards, &directory)?;
    let report = Command::new("wrk")
        .args(["-t", "1", "-c", &args.connections.to_string()])
        .args(["-d", &format!("{}s", args.seconds)])
        .arg(format!("http://{}/health", daemon.address))
        .output()
        .context("cannot run wrk; it is Debian's package `wrk`")?;
    let report = String::from_utf8_lossy(&report.stdout).into_owned();
    if report.contains("Non-2xx") || report.contains("Socket errors") {
        bail!("requests failed:\n{report}");
    }
    report
        .lines()
        .find_map(|line| line.strip_prefix("Requests/sec:"))
        .map(|rate| rate.trim().to_owned())
        .with_context(|| format!("wrk reported no rate:\n{report}"))
}

/// A daemon without a sandbox.
struct Daemon {
    child: Child,
    address: SocketAddr,
    directory: PathBuf,
    cgroup: PathBuf,
}

impl Daemon {
    fn start(mica: &Path, shards: u32, directory: &Path) -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let (mount, limits) = cgroup()?;
        let cgroup = mount.join(format!("mica-bench-http-{}-{shards}", std::process::id()));
        let mut command = Command::new(mica);
        command
            .args(["serve", "--listen", &address.to_string(), "--shards", &shards.to_string()])
            .arg("--store")
            .arg(directory.join("store"))
            .arg("--key-file")
            .arg(directory.join("keys"))
            .arg("--cgroup-root")
            .arg(&cgroup)
            // No sandbox is made, so any program will do, also where there is no KVM.
            .arg("--vm-program")
            .arg(mica)
            .env("MICA_LOG", "error")
            .stdin(Stdio::null());
        if !limits {
            command.arg("--without-cgroup-limits");
        }
        let child = command.spawn().with_context(|| format!("cannot run {}", mica.display()))?;
        let mut daemon = Self { child, address, directory: directory.to_owned(), cgroup };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(daemon.address).is_err() {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("mica serve ended with {status}");
            }
            if Instant::now() > deadline {
                bail!("mica serve does not listen");
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }

    /// Asks it to stop, and waits for a bounded time.
    fn stop(&mut self) -> Result<()> {
        let pid = self.child.id().to_string();
        Command::new("kill").args(["-s", "TERM", &pid]).status().context("cannot run kill")?;
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                bail!("mica serve did not end in time and was killed");
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("bench-http: {error:#}");
        }
        // The daemon removes what is inside; the directories are ours.
        drop(std::fs::remove_dir(&self.cgroup));
        drop(std::fs::remove_dir_all(&self.directory));
    }
}

/// Where cgroup v2 is mounted, and whether it has the controllers that limits need.
fn cgroup() -> Result<(PathBuf, bool)> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let mount = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .and_then(|fields| fields.get(1).map(PathBuf::from))
        .context("cgroup v2 is not mounted")?;
    let controllers = std::fs::read_to_string(mount.join("cgroup.controllers"))?;
    let has = |wanted| controllers.split_whitespace().any(|name| name == wanted);
    Ok((mount, has("memory") && has("pids")))
}
