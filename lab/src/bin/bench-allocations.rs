//! What choosing a host takes of the allocator: `{"BenchmarkRegistryAllocate": 0, …}`, for two batches of each.
//!
//! Run by `mica bench registry`, which puts the counts into its report. A program of its own, because what counts here
//! is every allocation of a process, and the counting would slow down whatever else is timed. Refuses to count when
//! the counter does not.

#![forbid(unsafe_code)]

use std::io::Write;

use anyhow::{Context, Result, ensure};
use mica_lab::engine::registry::{ALL, BATCH, Pool};
use mica_lab::engine::registry_report::Allocations;

#[global_allocator]
static COUNTED: dhat::Alloc = dhat::Alloc;

fn main() -> Result<()> {
    let choices: Vec<_> = ALL.into_iter().filter(|work| work.is_choice()).collect();
    let mut counts = Vec::with_capacity(choices.len());
    let pools = choices.iter().map(|work| Pool::new(work.hosts)).collect::<Result<Vec<_>>>()?;
    let counting = dhat::Profiler::builder().testing().build();
    let blocks = || dhat::HeapStats::get().total_blocks;
    let seen = Box::new(1u8);
    ensure!((blocks(), *seen) == (1, 1), "the counter does not count");
    for (work, mut pool) in choices.iter().zip(pools) {
        let before = blocks();
        // Twice: slots that are used for the first time, and such as are used again.
        for _ in 0..2 {
            work.run(&mut pool, u64::try_from(BATCH)?)?;
        }
        counts.push((work.name, blocks() - before));
    }
    drop(counting);
    let counts: Allocations =
        counts.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
    let text = serde_json::to_string(&counts)?;
    writeln!(std::io::stdout(), "{text}").context("print the counts")
}
