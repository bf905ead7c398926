//! `GET /health` throughput of `mica serve` at 1 and at 2 shards, with wrk.
//!
//! Run by `make bench-smoke`, as root; with `--metrics-runs` by hand. Measures what a request costs before any sandbox is involved:
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
    /// Instead: what counting and timing cost. Runs in turn of a daemon without and one with them, so
    /// many of each.
    #[arg(long, value_name = "RUNS")]
    metrics_runs: Option<u32>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(runs) = args.metrics_runs {
        return compare_metrics(&args, runs.max(1));
    }
    for shards in [1, 2] {
        let rate = measure(&args, shards).with_context(|| format!("with {shards} shards"))?;
        println!("GET /health, {shards} shard(s): {rate} requests/s");
    }
    Ok(())
}

fn measure(args: &Args, shards: u32) -> Result<String> {
    let daemon = Daemon::start(&args.mica, shards, "on")?;
    let report = load(args, &daemon)?;
    field(&report, "Requests/sec:").map(str::to_owned)
}

/// Processor time of the daemon for a request, off and on, in pairs.
fn compare_metrics(args: &Args, runs: u32) -> Result<()> {
    let daemons = [Daemon::start(&args.mica, 1, "off")?, Daemon::start(&args.mica, 1, "on")?];
    let mut us: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
    for run in 0..runs {
        // Which comes first alternates, so that a drift of the machine falls on both.
        for place in 0..2 {
            let which = usize::try_from((run + place) % 2)?;
            us[which].push(cpu_us_per_request(args, &daemons[which])?);
        }
    }
    let mut ratios: Vec<f64> = us[0].iter().zip(&us[1]).map(|(off, on)| on / off).collect();
    let [off, on] = us.map(|mut us| median(&mut us));
    let more = (median(&mut ratios) - 1.0) * 100.0;
    println!(
        "GET /health, processor time of the daemon for a request, median of {runs} runs each:"
    );
    println!("off {off:.3} us, on {on:.3} us; median of the pairs {more:+.2} %");
    Ok(())
}

fn cpu_us_per_request(args: &Args, daemon: &Daemon) -> Result<f64> {
    let before = daemon.cpu()?;
    let report = load(args, daemon)?;
    let spent = daemon.cpu()?.saturating_sub(before);
    let line = report.lines().find(|line| line.contains(" requests in "));
    let count = line.and_then(|line| line.trim().split(' ').next()?.parse::<u32>().ok());
    let count = count.with_context(|| format!("wrk reported no count:\n{report}"))?;
    Ok(spent.as_secs_f64() * 1e6 / f64::from(count.max(1)))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let (lower, upper) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
    f64::midpoint(lower, upper)
}

/// One run of wrk, all of whose requests were answered.
fn load(args: &Args, daemon: &Daemon) -> Result<String> {
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
    Ok(report)
}

fn field<'r>(report: &'r str, name: &str) -> Result<&'r str> {
    let value = report.lines().find_map(|line| line.strip_prefix(name));
    value.map(str::trim).with_context(|| format!("wrk reported no {name}\n{report}"))
}

/// A daemon without a sandbox.
struct Daemon {
    child: Child,
    address: SocketAddr,
    directory: PathBuf,
    cgroup: PathBuf,
}

impl Daemon {
    fn start(mica: &Path, shards: u32, metrics: &str) -> Result<Self> {
        let name = format!("mica-bench-http-{}-{shards}-{metrics}", std::process::id());
        let directory = std::env::temp_dir().join(&name);
        std::fs::create_dir(&directory).context("cannot make a directory")?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let (mount, limits) = cgroup()?;
        let cgroup = mount.join(&name);
        let mut command = Command::new(mica);
        command
            .args(["serve", "--listen", &address.to_string(), "--shards", &shards.to_string()])
            .args(["--metrics", metrics])
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
        let mut daemon = Self { child, address, directory, cgroup };
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

    /// Time that it has used processors for, all threads together.
    fn cpu(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let fields = stat.rsplit_once(')').context("no name in /proc/PID/stat")?.1;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        // utime and stime, the 14th and 15th of proc_pid_stat(5); the state is the third.
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        let per_second = rustix::param::clock_ticks_per_second().max(1);
        Ok(Duration::from_micros(ticks * 1_000_000 / per_second))
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
