//! What it costs to hand work to a core that idles: the part of every latency that is the machine's.
//!
//! Called by the benchmarks of the daemon, which print it beside their own figures: a request through the
//! proxy has four of them, one to another shard up to two. Two pinned threads pass a byte to and fro, so each
//! finds the other's core idle. Refuses nothing: where this process has one core only there is none.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::series::percentile;

/// Passes that are timed, and those before them that are not.
const PASSES: usize = 4000;
const WARM_UP: usize = 200;

/// Half of a round trip between the first core of this process and its last, the median; none of one core.
///
/// # Errors
/// When there is no thread or no socket.
pub fn p50() -> Result<Option<Duration>> {
    let allowed = sched_getaffinity(None)?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    let first = cpus.next().context("no core")?;
    let Some(last) = cpus.next_back() else { return Ok(None) };
    let (here, there) = UnixStream::pair()?;
    let echo = thread::spawn(move || {
        pin(last)?;
        pass_back(there)
    });
    let timed = thread::spawn(move || {
        pin(first)?;
        time(here)
    });
    let times = timed.join().ok().context("the timing thread panicked")??;
    echo.join().ok().context("the other thread panicked")??;
    Ok(Some(percentile(&times, 50) / 2))
}

/// Binds the calling thread to a core.
///
/// # Errors
/// When this process may not run there.
pub fn pin(cpu: usize) -> Result<()> {
    let mut only = CpuSet::new();
    only.set(cpu);
    sched_setaffinity(None, &only).context("cannot pin a thread")
}

/// Until the other end closes.
fn pass_back(mut stream: UnixStream) -> Result<()> {
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

fn time(mut stream: UnixStream) -> Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(PASSES);
    let mut byte = [0];
    for pass in 0..WARM_UP + PASSES {
        let began = Instant::now();
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        if pass >= WARM_UP {
            times.push(began.elapsed());
        }
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_time_and_less_than_a_scheduler_tick() {
        let Some(took) = p50().unwrap() else { return };
        assert!(took > Duration::ZERO && took < Duration::from_millis(4), "{took:?}");
    }
}
