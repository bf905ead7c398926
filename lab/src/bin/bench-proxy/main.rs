//! What the sandbox proxy costs: time added to a request, and memory held for idle streams.
//!
//! Run by hand, as root: `bench-proxy --mica FILE --standin FILE`. The daemon is the real one; the guest
//! is the stand-in, whose servers are this program's, so the same server is asked directly and
//! through the daemon, in turns. The stand-in's own part (two threads and a TCP connection for each stream)
//! is in the difference: a guest's is, too. Refuses to report a run with a wrong answer. With `--added-us-max` and
//! `--idle-bytes-max` it is a gate: it ends with 1 where a request or a stream takes more.

#![forbid(unsafe_code)]

mod load;
mod server;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use mica_lab::engine::handover;
use mica_lab::engine::standin::Daemon;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use load::Kind;
use server::Server;

/// Open files of the daemon that are no stream's: a few for each sandbox, and its own.
const DESCRIPTORS_BESIDE: u64 = 1_000;

#[derive(Parser, Debug)]
#[command(about = "Time and memory that the sandbox proxy takes")]
struct Args {
    /// The mica executable.
    #[arg(long)]
    mica: PathBuf,
    /// The stand-in for mica-vm.
    #[arg(long)]
    standin: PathBuf,
    /// Shards of the daemon. With two, half of the sandboxes are on the other one.
    #[arg(long, default_value_t = 1)]
    shards: u16,
    /// The daemon's `--cpu-latency-us`.
    #[arg(long, value_name = "auto|off|MICROSECONDS")]
    cpu_latency_us: Option<String>,
    /// Requests of each kind, taken in turns. The first tenth warms up.
    #[arg(long, default_value_t = 5000)]
    requests: usize,
    /// What the proxy may add to the p50 of a request, in microseconds: more ends the program with 1.
    #[arg(long, value_name = "MICROSECONDS")]
    added_us_max: Option<f64>,
    /// Streams that are opened and left idle, after the requests.
    #[arg(long, default_value_t = 0)]
    idle_streams: usize,
    /// What one idle stream of any kind may take of the daemon's memory, in bytes: more ends the program with 1.
    #[arg(long, value_name = "BYTES", requires = "idle_streams")]
    idle_bytes_max: Option<u64>,
    /// Sandboxes that the idle streams are spread over.
    #[arg(long, default_value_t = 40)]
    sandboxes: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let no_streams = args.idle_bytes_max.is_some() && args.idle_streams == 0;
    ensure!(!no_streams, "--idle-bytes-max takes --idle-streams above 0");
    raise_descriptors(args.idle_streams)?;
    let server = Server::start().context("cannot start a server")?;
    let daemon = start(&args)?;
    if let Some(took) = handover::p50()? {
        println!("a core that idles is handed work in {:.1} us (p50)", us(took));
    }
    let id = daemon.create()?;
    let times = load::interleaved(&daemon, &server, &id, args.requests)?;
    let direct = &times.direct;
    println!("{:<26}{:>10}{:>10}{:>12}", "request", "p50 us", "p95 us", "added p50");
    for (name, series) in [
        ("direct, kept alive", direct),
        ("direct, new connection", &times.anew),
        ("through the proxy", &times.proxied),
    ] {
        let added = us(at(series, 50)) - us(at(direct, 50));
        let (p50, p95) = (us(at(series, 50)), us(at(series, 95)));
        println!("{name:<26}{p50:>10.1}{p95:>10.1}{added:>12.1}");
    }
    let added = us(at(&times.proxied, 50)) - us(at(direct, 50));
    drop(daemon);
    if args.idle_streams > 0 {
        println!("{:<26}{:>10}{:>10}{:>14}", "idle", "MiB before", "MiB with", "bytes each");
        let mut over = Vec::new();
        for kind in [Kind::KeptAlive, Kind::Response, Kind::Switched] {
            over.extend(idle(&args, &server, kind)?);
        }
        // After all of them: who reads it sees every kind.
        ensure!(over.is_empty(), "idle streams take too much: {}", over.join(", "));
    }
    // Last, so that a machine whose times are no good still says what streams take.
    if let Some(most) = args.added_us_max {
        ensure!(added <= most, "the proxy adds {added:.1} us to a request, and {most} may be");
    }
    Ok(())
}

fn start(args: &Args) -> Result<Daemon> {
    Daemon::start_with(&args.mica, &args.standin, args.shards, args.cpu_latency_us.as_deref())
}

/// A new daemon each time: one that held more before would hide what it takes. What is over the bound, if it is.
fn idle(args: &Args, server: &Server, kind: Kind) -> Result<Option<String>> {
    let daemon = start(args)?;
    let ids = (0..args.sandboxes).map(|_| daemon.create()).collect::<Result<Vec<_>>>()?;
    let held = load::idle(&daemon, server, &ids, kind, args.idle_streams)?;
    let mib = |bytes: u64| bytes / (1 << 20);
    let name = format!("{} {kind:?}", args.idle_streams);
    let streams = u64::try_from(args.idle_streams)?;
    let (before, with, each) = (mib(held.before), mib(held.with), held.each(streams));
    println!("{name:<26}{before:>10}{with:>10}{each:>14}");
    let is_over = |most: &u64| held.taken() > most.saturating_mul(streams);
    let told = |most| format!("{kind:?} {each} bytes each, and {most} may be");
    Ok(args.idle_bytes_max.filter(is_over).map(told))
}

/// Both ends of every stream are here, and in the daemon, which inherits the limit.
fn raise_descriptors(streams: usize) -> Result<()> {
    let wanted = u64::try_from(streams)? * 2 + DESCRIPTORS_BESIDE;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    // Above the hard limit only who has CAP_SYS_RESOURCE may go.
    let maximum = limit.maximum.map(|maximum| maximum.max(wanted));
    let raised = Rlimit { current: Some(wanted), maximum };
    setrlimit(Resource::Nofile, raised).with_context(|| {
        let most = limit.maximum.unwrap_or(u64::MAX);
        format!("{streams} streams take {wanted} open files, and `ulimit -Hn` is {most}")
    })
}

/// The value below which `percent` of a sorted series lie.
fn at(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
