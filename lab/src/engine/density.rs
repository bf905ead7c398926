//! Many sandboxes at a time, and many after one another.
//!
//! Called by the benchmark's program, on a shard. Refuses to call a run good that leaves something
//! behind: see [`rounds`].

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mica_shards::{Host, rt};
use mica_units::SandboxId;
use serde::Serialize;

use super::memory::{Leftovers, Machine, Process, children, ours, own_anonymous};
use super::operations::Bench;
use super::place::{MEMORY, TEMPLATE, quiet, request};

/// Live sandboxes whose memory is measured.
pub const LIVE: u32 = 200;
/// Bytes that rounds may leave in this process, and on the machine, and never more for each round:
/// allocators and caches keep some.
const PROCESS_LEFT_MAX: i64 = 16 << 20;
const MACHINE_LEFT_MAX: i64 = 64 << 20;
/// How long memory and processes may take to be given back.
const SETTLE: Duration = Duration::from_secs(30);

/// What idle sandboxes cost.
#[derive(Clone, Debug, Serialize)]
pub struct Idle {
    /// How many there were.
    pub sandboxes: u32,
    /// Bytes of `MemAvailable` that each took: the pool is as full before as after, so it is not in it.
    pub available_bytes_each: i64,
    /// The same without what other programs took meanwhile.
    pub bytes_each: i64,
    /// Bytes that each took when the shells of the pool are counted as sandboxes' cost too.
    pub bytes_each_with_pool: i64,
    /// The lines of `/proc/meminfo`, for each.
    pub machine_each: Machine,
    /// The means over the VM processes.
    pub process_each: Process,
}

impl Bench<'_> {
    /// Creates with nothing else alive, then with [`LIVE`] others, and what those cost. `empty` is the
    /// machine before the host was there.
    ///
    /// # Errors
    /// When an operation fails.
    pub async fn density(&mut self, empty: Machine, rounds: u32) -> Result<Idle> {
        quiet(&self.host, self.shells).await?;
        self.flatness("create_first", rounds).await?;
        let before = self.settled().await?;
        let mut alive: Vec<SandboxId> = Vec::new();
        for _ in 0..LIVE - 1 {
            quiet(&self.host, self.shells).await?;
            alive.push(self.host.create(request(TEMPLATE)).await?.id);
        }
        self.flatness("create_200th", rounds).await?;
        alive.push(self.host.create(request(TEMPLATE)).await?.id);
        let during = self.settled().await?;
        let process_each = mean(&self.host, &alive).await?;
        self.end_all(alive).await?;
        let after = self.settled().await?;
        // What drifts evenly goes out of the mean of both sides.
        let each = |of: fn(&Machine) -> i64| {
            ((of(&before) + of(&after)) / 2 - of(&during)) / i64::from(LIVE)
        };
        let shells = i64::try_from(self.shells)?;
        let pool = (empty.left_to_us() - before.left_to_us()).max(0);
        Ok(Idle {
            sandboxes: LIVE,
            available_bytes_each: each(|machine| machine.available),
            bytes_each: each(Machine::left_to_us),
            bytes_each_with_pool: each(Machine::left_to_us)
                + if shells > 0 { pool / i64::from(LIVE) } else { 0 },
            machine_each: during.each_since(&before, LIVE),
            process_each,
        })
    }

    /// The machine, once it stops changing: what ended is given back in the background.
    async fn settled(&self) -> Result<Machine> {
        quiet(&self.host, self.shells).await?;
        let begun = Instant::now();
        let mut last = Machine::now(&ours()?)?;
        let mut still = 0;
        while still < 3 && begun.elapsed() < SETTLE {
            rt::time::sleep(Duration::from_millis(200)).await;
            let now = Machine::now(&ours()?)?;
            let moved = (now.left_to_us() - last.left_to_us()).abs();
            still = if moved < 1 << 20 { still + 1 } else { 0 };
            last = now;
        }
        Ok(last)
    }

    async fn end_all(&self, alive: Vec<SandboxId>) -> Result<()> {
        let kill = |id| {
            let host = self.host.clone();
            rt::spawn(async move { host.kill(id).await })
        };
        let kills: Vec<_> = alive.into_iter().map(kill).collect();
        for kill in kills {
            kill.join().await.context("a kill was dropped")??;
        }
        Ok(())
    }
}

async fn mean(host: &Host, alive: &[SandboxId]) -> Result<Process> {
    let mut sum = Process::default();
    for id in alive {
        let process = host.bench_process_of(*id).await?;
        let one = Process::of(process.pid, process.memory_address, MEMORY.to_bytes())?;
        sum.guest_own += one.guest_own;
        sum.guest_shared += one.guest_shared;
        sum.private += one.private;
        sum.program += one.program;
        sum.memfds += one.memfds;
        sum.page_tables += one.page_tables;
        sum.threads += one.threads;
    }
    let count = u64::try_from(alive.len())?.max(1);
    for part in [
        &mut sum.guest_own,
        &mut sum.guest_shared,
        &mut sum.private,
        &mut sum.program,
        &mut sum.memfds,
        &mut sum.page_tables,
        &mut sum.threads,
    ] {
        *part /= count;
    }
    Ok(sum)
}

/// What many rounds left.
#[derive(Clone, Debug, Serialize)]
pub struct Left {
    /// How many rounds.
    pub rounds: u32,
    /// Bytes of this process.
    pub process_bytes: i64,
    /// Bytes of the machine.
    pub machine_bytes: i64,
    /// Counts before, and after: the same.
    pub counts: Leftovers,
}

/// Makes and kills one sandbox after the other, and holds what there is then against what there was.
///
/// # Errors
/// When an operation fails, or anything is left behind.
pub async fn rounds(
    host: &Host,
    shells: u64,
    rounds: u32,
    (store, cgroup): (PathBuf, PathBuf),
) -> Result<Left> {
    // What is made once and stays: threads, caches.
    for _ in 0..10 {
        one_round(host, shells).await?;
    }
    quiet(host, shells).await?;
    let counts = Leftovers::now(&store, &cgroup)?;
    let (process, machine) = (own_anonymous()?, Machine::now(&ours()?)?.left_to_us());
    for _ in 0..rounds {
        one_round(host, shells).await?;
    }
    let begun = Instant::now();
    loop {
        quiet(host, shells).await?;
        let now = Leftovers::now(&store, &cgroup)?;
        let left = Left {
            rounds,
            process_bytes: own_anonymous()? - process,
            machine_bytes: machine - Machine::now(&ours()?)?.left_to_us(),
            counts: now.clone(),
        };
        if now == counts
            && left.process_bytes <= PROCESS_LEFT_MAX
            && left.machine_bytes <= MACHINE_LEFT_MAX
        {
            return Ok(left);
        }
        if begun.elapsed() > SETTLE {
            bail!("{rounds} rounds left something: {left:?}; before them: {counts:?}");
        }
        rt::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn one_round(host: &Host, shells: u64) -> Result<()> {
    quiet(host, shells).await?;
    let made = host.create(request(TEMPLATE)).await?;
    host.kill(made.id).await?;
    let alive = children()?.len();
    ensure!(alive < 1000, "{alive} processes");
    Ok(())
}
