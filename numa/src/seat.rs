//! One thread for each seat of a plan, pinned, with a glommio executor on it.
//!
//! Called by `shards::run`. The only place that starts shard threads. Refuses to start any when one
//! cannot start; when one panics, gives the stop signal to the others.

use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use glommio::{LocalExecutor, LocalExecutorBuilder, Placement};

use crate::blocking::Pool;
use crate::placement::prefer_memory;
use crate::preflight::{self, PreflightError};
use crate::{Plan, ShardSeat, StopSignal};

/// Entries of each of an executor's three rings.
const RING_ENTRIES: usize = 256;

/// Registered memory of an executor, for direct I/O.
pub(crate) const IO_MEMORY_BYTES: usize = 256 << 10;

/// Why the seats did not run, or not to their end.
#[derive(Debug, thiserror::Error)]
pub enum SeatError {
    /// The machine does not grant what executors need.
    #[error("the machine cannot run executors")]
    Preflight(#[from] PreflightError),
    /// No thread or descriptor left.
    #[error("cannot start the threads of shard {shard}")]
    Threads {
        /// The shard.
        shard: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The core is offline or outside this process's cpuset.
    #[error("cannot pin shard {shard} to core {core}; is it online and in the cpuset?")]
    Pin {
        /// The shard.
        shard: u16,
        /// Its core.
        core: u32,
    },
    /// glommio refused.
    #[error("cannot start the executor of shard {shard}")]
    Executor {
        /// The shard.
        shard: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It panicked; the others were told to stop and have ended.
    #[error("shard {0} panicked; its log line says where")]
    Panicked(u16),
}

/// Runs `start(seat, input)` on every seat of `plan`, each with its own input, and waits for all.
/// The results are in seat order.
///
/// # Errors
/// See [`SeatError`]. No thread of a seat is left then.
pub fn run_all<I, T, S, F>(
    plan: &Plan,
    inputs: Vec<I>,
    stop: &StopSignal,
    start: S,
) -> Result<Vec<T>, SeatError>
where
    I: Send + 'static,
    T: Send + 'static,
    S: Fn(ShardSeat, I) -> F + Clone + Send + 'static,
    F: Future<Output = T> + 'static,
{
    let count = plan.shard_count();
    preflight::check(count.get())?;
    let (report, reports) = channel();
    let mut threads: Vec<Started<T>> = Vec::new();
    for (seat, input) in plan.seats.iter().copied().zip(inputs) {
        let started = start_one(plan, seat, input, stop, start.clone(), &report);
        match started {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                abandon(threads);
                return Err(error);
            }
        }
    }
    drop(report);
    // All executors stand before any runs, so that none has to be torn down half way.
    for _ in 0..threads.len() {
        if let Ok(Err(error)) = reports.recv() {
            abandon(threads);
            return Err(error);
        }
    }
    let (goes, handles): (Vec<_>, Vec<_>) = threads.into_iter().unzip();
    for go in goes {
        // One that is gone panicked, and joining it says so.
        if go.send(()).is_err() {
            stop.stop();
        }
    }
    handles
        .into_iter()
        .zip(&plan.seats)
        .map(|(handle, seat)| (handle.join(), seat.shard.index()))
        .map(|(joined, shard)| joined.ok().flatten().ok_or(SeatError::Panicked(shard)))
        .collect::<Vec<_>>()
        .into_iter()
        .collect()
}

type Started<T> = (Sender<()>, JoinHandle<Option<T>>);

/// Ends threads that were never told to go.
fn abandon<T>(threads: Vec<Started<T>>) {
    for (go, handle) in threads {
        drop(go);
        if handle.join().is_err() {
            tracing::error!("a shard's thread panicked before it ran");
        }
    }
}

fn start_one<I, T, S, F>(
    plan: &Plan,
    seat: ShardSeat,
    input: I,
    stop: &StopSignal,
    start: S,
    report: &Sender<Result<(), SeatError>>,
) -> Result<Started<T>, SeatError>
where
    I: Send + 'static,
    T: Send + 'static,
    S: Fn(ShardSeat, I) -> F + Send + 'static,
    F: Future<Output = T> + 'static,
{
    let shard = seat.shard.index();
    let threads = |source| SeatError::Threads { shard, source };
    let pool = Pool::start(&plan.blocking_cpus(seat), seat.memory_node).map_err(threads)?;
    let (go, may_go) = channel();
    let (stop, report) = (stop.clone(), report.clone());
    let body = move || {
        let executor = match executor(seat) {
            Ok(executor) => executor,
            Err(error) => {
                tell(&report, Err(error));
                return None;
            }
        };
        tell(&report, Ok(()));
        drop(report);
        run_one(&executor, pool, &may_go, &stop, move || start(seat, input))
    };
    let thread = std::thread::Builder::new().name(format!("shard-{shard}")).spawn(body);
    Ok((go, thread.map_err(threads)?))
}

fn tell(report: &Sender<Result<(), SeatError>>, result: Result<(), SeatError>) {
    if report.send(result).is_err() {
        tracing::debug!("another shard did not start either");
    }
}

/// Pins this thread and makes its executor. Pinned by us and not by glommio, whose placement reads
/// the machine a second time; glommio is then told that it is unbound.
fn executor(seat: ShardSeat) -> Result<LocalExecutor, SeatError> {
    let (shard, core) = (seat.shard.index(), seat.core);
    let id = usize::try_from(core).unwrap_or(usize::MAX);
    // core_affinity aborts the process on a number that does not fit its set.
    let fits = id < rustix::thread::CpuSet::MAX_CPU;
    if !fits || !core_affinity::set_for_current(core_affinity::CoreId { id }) {
        return Err(SeatError::Pin { shard, core });
    }
    // Before its rings and buffers are made.
    prefer_memory(seat.memory_node);
    LocalExecutorBuilder::new(Placement::Unbound)
        .name("shard")
        .ring_depth(RING_ENTRIES)
        .io_memory(IO_MEMORY_BYTES)
        .make()
        .map_err(|error| SeatError::Executor { shard, source: io::Error::from(error) })
}

fn run_one<T, F: Future<Output = T> + 'static>(
    executor: &LocalExecutor,
    pool: Pool,
    may_go: &Receiver<()>,
    stop: &StopSignal,
    start: impl FnOnce() -> F,
) -> Option<T> {
    may_go.recv().ok()?;
    let ran = catch_unwind(AssertUnwindSafe(|| {
        executor.run(async move {
            let closer = pool.attach();
            let output = start().await;
            closer.close().await;
            output
        })
    }));
    match ran {
        Ok(output) => Some(output),
        Err(_) => {
            stop.stop();
            None
        }
    }
}
