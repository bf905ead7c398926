//! The operations, one after the other, each in turn with the floor's work of the same kind.
//!
//! Called by the benchmark's program, on a shard: what is measured is from the call of the host's
//! function to its answer. Refuses a result that is wrong: what a rollback or a clone brings back is
//! looked at, outside of the time.

use std::fs::File;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mica_shards::{Host, SandboxInfo};
use mica_units::{FrameRun, Mebibytes, SandboxId};

use super::dirt::{self, Dirt, Outside};
use super::floor::{Dirtied, Floor};
use super::place::{MEMORY, TEMPLATE, quiet, request};
use super::series::Book;

/// How long a guest may take to its first byte.
const BYTE_PATIENCE: Duration = Duration::from_secs(10);
/// The life a resumed sandbox is given.
const LIFE: Duration = Duration::from_secs(3600);

/// A host, what it is measured beside, and where the times go.
#[derive(Debug)]
pub struct Bench<'a> {
    /// The host.
    pub host: Host,
    /// Bare system calls.
    pub floor: &'a Floor,
    /// Shells that the pools of all shards hold together.
    pub shells: u64,
    /// The times.
    pub book: Book,
}

/// The time of a future, and what it gave.
async fn timed<T, E>(work: impl Future<Output = Result<T, E>>) -> Result<(Duration, T)>
where
    E: Into<anyhow::Error>,
{
    tracing::trace!("asked");
    let begun = Instant::now();
    let done = work.await;
    let took = begun.elapsed();
    tracing::trace!(?took, "answered");
    Ok((took, done.map_err(Into::into)?))
}

impl Bench<'_> {
    async fn create(&self) -> Result<(Duration, SandboxInfo)> {
        quiet(&self.host, self.shells).await?;
        timed(self.host.create(request(TEMPLATE))).await
    }

    async fn outside(&self, id: SandboxId) -> Result<Outside> {
        let process = self.host.bench_process_of(id).await?;
        Outside::new(process.pid, process.memory_address)
    }

    /// A create whose shell waits, a pause, a resume, an end. One round more warms up.
    ///
    /// # Errors
    /// When an operation fails.
    pub async fn lives(&mut self, rounds: u32) -> Result<()> {
        let floor = self.floor;
        // What the guest wrote itself is what a pause finds.
        let mut nothing = floor.guest(vec![])?;
        for round in 0..=rounds {
            let life = floor.life()?;
            let paused = nothing.snapshot()?;
            nothing.rollback()?;
            quiet(&self.host, self.shells).await?;
            let begun = Instant::now();
            let (create, made) = timed(self.host.create(request(TEMPLATE))).await?;
            let console = self.host.bench_process_of(made.id).await?.console;
            wait_byte(console)?;
            let first_byte = begun.elapsed();
            // The pool makes the next shell meanwhile, which is not part of a pause.
            quiet(&self.host, self.shells).await?;
            let (pause, ()) = timed(self.host.pause(made.id)).await?;
            let (resume, _) = timed(self.host.resume(made.id, LIFE, None)).await?;
            let (destroy, ()) = timed(self.host.kill(made.id)).await?;
            if round > 0 {
                self.book.add("restore_pool_hit", create, life.hit);
                self.book.add("first_byte", first_byte, life.hit);
                self.book.add("pause", pause, paused);
                self.book.add("resume", resume, life.resume);
                self.book.add("destroy", destroy, life.destroy);
            }
        }
        nothing.end()
    }

    /// Creates that find no shell: for a host that keeps none.
    ///
    /// # Errors
    /// When an operation fails.
    pub async fn misses(&mut self, rounds: u32) -> Result<()> {
        for round in 0..=rounds {
            let life = self.floor.life()?;
            let (create, made) = self.create().await?;
            self.host.kill(made.id).await?;
            if round > 0 {
                self.book.add("restore_pool_miss", create, life.miss);
            }
        }
        let counted = self.host.counters().await?;
        ensure!(counted.pool_hits == 0, "{} creates found a shell", counted.pool_hits);
        Ok(())
    }

    /// First snapshots of sandboxes that wrote so much.
    ///
    /// # Errors
    /// When an operation fails.
    pub async fn snapshots(
        &mut self,
        op: &'static str,
        amount: Mebibytes,
        dirt: Dirt,
        rounds: u32,
    ) -> Result<()> {
        let runs = dirt::runs(MEMORY, amount, dirt)?;
        let mut bare = self.floor.guest(runs.clone())?;
        for round in 0..=rounds {
            let least = bare.snapshot()?;
            bare.rollback()?;
            let (_, made) = self.create().await?;
            self.outside(made.id).await?.write(&runs, round)?;
            quiet(&self.host, self.shells).await?;
            let (took, snapshot) = timed(self.host.snapshot(made.id, None)).await?;
            self.end(made.id, &[snapshot.id]).await?;
            if round > 0 {
                self.book.add(op, took, least);
            }
        }
        bare.end()
    }

    async fn end(&self, id: SandboxId, snapshots: &[String]) -> Result<()> {
        self.host.kill(id).await?;
        for snapshot in snapshots {
            ensure!(self.host.delete_snapshot(snapshot).await?, "a snapshot was gone");
        }
        Ok(())
    }

    /// A chain in one sandbox: a first snapshot of 7 MB, one of 1 MB more, one of nothing, rollbacks.
    ///
    /// # Errors
    /// When an operation fails, or a rollback brings other bytes back.
    pub async fn chains(&mut self, rounds: u32) -> Result<()> {
        let first = dirt::runs(MEMORY, Mebibytes::new(7), Dirt::Scattered)?;
        let more = dirt::runs(MEMORY, Mebibytes::new(1), Dirt::Beside)?;
        let mut bare = Bare {
            first: self.floor.guest(first.clone())?,
            more: tracked(self.floor, more.clone())?,
            nothing: tracked(self.floor, vec![])?,
        };
        for round in 0..=rounds {
            let least = bare.round()?;
            let took = self.chain(&first, &more, round).await?;
            if round > 0 {
                let ops = ["snapshot_7mb", "snapshot_next_1mb", "snapshot_empty"];
                for ((op, took), least) in ops.into_iter().zip(took.snapshots).zip(least.snapshots)
                {
                    self.book.add(op, took, least);
                }
                let ops = ["rollback_7mb", "rollback_7mb_over", "rollback_7mb_again"];
                for (op, took) in ops.into_iter().zip(took.rollbacks) {
                    self.book.add(op, took, least.rollback);
                }
            }
        }
        bare.first.end()?;
        bare.more.end()?;
        bare.nothing.end()
    }

    async fn chain(&self, first: &[FrameRun], more: &[FrameRun], round: u32) -> Result<Chain> {
        let (_, made) = self.create().await?;
        let memory = self.outside(made.id).await?;
        quiet(&self.host, self.shells).await?;
        let apart = dirt::runs(MEMORY, Mebibytes::new(7), Dirt::Apart)?;
        let seed = 2 * round;
        memory.write(first, seed)?;
        let (snapshot, a) = timed(self.host.snapshot(made.id, None)).await?;
        memory.write(more, seed)?;
        let (next, b) = timed(self.host.snapshot(made.id, None)).await?;
        let (empty, c) = timed(self.host.snapshot(made.id, None)).await?;
        // What was written where the template is mapped only has to go. What was written over the pages
        // of the first snapshot has to come from its layer; once that is mapped, it only has to go too.
        let mut rollbacks = [Duration::ZERO; 3];
        for (took, written) in rollbacks.iter_mut().zip([&apart, first, first]) {
            memory.write(written, seed + 1)?;
            let back = self.host.rollback(made.id, c.id.clone());
            (*took, ()) = timed(back).await?;
            memory.check(first, Some(seed))?;
            memory.check(more, Some(seed))?;
            memory.check(&apart, None)?;
        }
        self.end(made.id, &[a.id, b.id, c.id]).await?;
        Ok(Chain { snapshots: [snapshot, next, empty], rollbacks })
    }

    /// Clones of one sandbox that wrote 7 MB: the snapshot, and `count` sandboxes of it.
    ///
    /// # Errors
    /// When an operation fails, or a clone has other bytes.
    pub async fn clones(&mut self, op: &'static str, count: usize, rounds: u32) -> Result<()> {
        let runs = dirt::runs(MEMORY, Mebibytes::new(7), Dirt::Scattered)?;
        let mut bare = self.floor.guest(runs.clone())?;
        for round in 0..=rounds {
            let mut least = bare.snapshot()?;
            bare.rollback()?;
            for _ in 0..count {
                least += self.floor.life()?.hit;
            }
            let (_, made) = self.create().await?;
            self.outside(made.id).await?.write(&runs, round)?;
            quiet(&self.host, self.shells).await?;
            let (took, clones) = timed(self.host.clone_sandbox(made.id, count, None)).await?;
            ensure!(clones.len() == count, "{} clones of {count}", clones.len());
            let last = clones.last().context("no clone")?;
            self.outside(last.id).await?.check(&runs, Some(round))?;
            for clone in clones {
                self.host.kill(clone.id).await?;
            }
            self.host.kill(made.id).await?;
            if round > 0 {
                self.book.add(op, took, least);
            }
        }
        bare.end()
    }

    /// Creates and ends with as many others alive as there are now. One round more warms up.
    ///
    /// # Errors
    /// When an operation fails.
    pub async fn flatness(&mut self, op: &'static str, rounds: u32) -> Result<()> {
        for round in 0..=rounds {
            let life = self.floor.life()?;
            let (create, made) = self.create().await?;
            self.host.kill(made.id).await?;
            if round > 0 {
                self.book.add(op, create, life.hit);
            }
        }
        Ok(())
    }
}

/// The bare guests of a chain.
struct Bare<'a> {
    first: Dirtied<'a>,
    more: Dirtied<'a>,
    nothing: Dirtied<'a>,
}

/// Times of one chain's floor.
struct BareChain {
    snapshots: [Duration; 3],
    rollback: Duration,
}

impl Bare<'_> {
    fn round(&mut self) -> Result<BareChain> {
        let first = self.first.snapshot()?;
        let rollback = self.first.rollback()?;
        let snapshots = [first, self.more.snapshot()?, self.nothing.snapshot()?];
        Ok(BareChain { snapshots, rollback })
    }
}

fn tracked(floor: &Floor, runs: Vec<FrameRun>) -> Result<Dirtied<'_>> {
    let mut guest = floor.guest(runs)?;
    guest.track()?;
    Ok(guest)
}

/// Times of one chain.
struct Chain {
    snapshots: [Duration; 3],
    rollbacks: [Duration; 3],
}

/// Looks at a console until the guest has written to it. Holds the shard up: nothing else is to do,
/// and to be woken takes longer than what is measured.
fn wait_byte(console: OwnedFd) -> Result<()> {
    let console = File::from(console);
    let begun = Instant::now();
    let mut written = [0; 8];
    while u64::from_le_bytes(written) == 0 {
        ensure!(begun.elapsed() < BYTE_PATIENCE, "the guest writes nothing");
        console.read_exact_at(&mut written, 0)?;
    }
    Ok(())
}
