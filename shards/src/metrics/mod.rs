//! What one shard counts of itself, and the copies that a reader gets.
//!
//! Recorded by the shard's own tasks, in plain cells: no lock, no atomic, no allocation. Read by a
//! message to the shard, which answers with a copy. Refuses to be an ambient global: whoever measures
//! is given this.

mod operations;
mod reading;
mod sample;
mod sandboxes;
pub(crate) mod table;
mod watch;

pub use operations::{Operation as SandboxOperation, OperationView, Phase, Quantiles};
pub(crate) use operations::{Operation, Operations};
pub(crate) use reading::{Looked, add_mailboxes};
pub use sample::{Family, Kind, Measured, Sample, Source, Value};
pub(crate) use table as families;
pub use table::FAMILIES;
pub(crate) use watch::{Asked, Stopwatch};

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use mica_numa::watchdog::Stalls;
use mica_units::{Buckets, PerShard, SandboxId, ShardCount};

/// The bounds of Fast Sandbox's histogram.
static FASTPATH_BOUNDS_NS: [u64; 9] = [
    1_000_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
];

/// The numbers of one shard.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// Whether anything is recorded at all.
    on: bool,
    /// What was done with sandboxes.
    pub(crate) operations: Operations,
    /// Messages that this shard sent, by who they are for.
    pub(crate) sent: PerShard<Cell<u64>>,
    /// Messages that a full mailbox gave back, by whose it is.
    pub(crate) full: PerShard<Cell<u64>>,
    /// Messages of others that this shard took out of its mailbox.
    pub(crate) taken: Cell<u64>,
    /// Creates that were asked for here: those that failed, and those that did not.
    fastpath: [Buckets<{ FASTPATH_BOUNDS_NS.len() }>; 2],
    /// When its executor did not turn, where that is watched.
    pub(crate) stalls: OnceCell<Arc<Stalls>>,
    /// What the processes of its sandboxes used, when somebody looked last.
    pub(crate) looked: Cell<Option<Looked>>,
    /// What others on this shard count.
    sources: RefCell<Vec<Rc<dyn Source>>>,
}

impl Metrics {
    /// Nothing counted yet. Unless `on`, nothing ever will be.
    pub(crate) fn new(on: bool, shards: ShardCount) -> Self {
        Self {
            on,
            operations: Operations::default(),
            sent: PerShard::from_fn(shards, |_| Cell::new(0)),
            full: PerShard::from_fn(shards, |_| Cell::new(0)),
            taken: Cell::new(0),
            fastpath: [const { Buckets::new(&FASTPATH_BOUNDS_NS) }; 2],
            stalls: OnceCell::new(),
            looked: Cell::new(None),
            sources: RefCell::default(),
        }
    }

    /// Whether anything is recorded.
    pub(crate) fn is_on(&self) -> bool {
        self.on
    }

    /// A stopwatch for an operation that begins now; where nothing is recorded, none.
    pub(crate) fn watch(&self, operation: Operation, sandbox: SandboxId) -> Stopwatch {
        self.watch_from(operation, operation.phases().first().copied(), sandbox)
    }

    /// The same for one that begins with another phase than is usual.
    pub(crate) fn watch_from(
        &self,
        operation: Operation,
        first: Option<Phase>,
        sandbox: SandboxId,
    ) -> Stopwatch {
        if !self.on {
            return Stopwatch::off();
        }
        Stopwatch::since(operation, sandbox, Asked::now(operation, first, Some(sandbox)))
    }

    /// A create that is asked for now, wherever it will be done.
    pub(crate) fn asked_to_create(&self) -> Asked {
        if !self.on {
            return Asked::untraced();
        }
        Asked::now(Operation::Create, Some(Phase::Route), None)
    }

    /// A stopwatch for a create that was asked for before.
    pub(crate) fn watch_create(&self, sandbox: SandboxId, asked: Asked) -> Stopwatch {
        if self.on { Stopwatch::since(Operation::Create, sandbox, asked) } else { Stopwatch::off() }
    }

    /// Counts the operation that `watch` was for.
    pub(crate) fn end(&self, watch: &mut Stopwatch, is_done: bool) {
        let Some(stopped) = watch.stop() else { return };
        if is_done {
            self.operations.done(stopped.operation, stopped.total, &stopped.spent);
        } else {
            self.operations.failed(stopped.operation);
        }
        if tracing::enabled!(target: "mica::operations", tracing::Level::DEBUG) {
            tracing::debug!(target: "mica::operations", "{}", stopped.line(is_done));
        }
    }

    /// Counts a create as Fast Sandbox does, from the request on.
    pub(crate) fn created(&self, asked_at: Instant, success: bool) {
        if self.on {
            self.fastpath[usize::from(success)].record(asked_at.elapsed());
        }
    }

    /// Counts an operation that came to nothing before a shard had anything to time.
    pub(crate) fn failed(&self, operation: Operation) {
        if self.on {
            self.operations.failed(operation);
        }
    }

    /// Counts an operation that was not begun.
    pub(crate) fn refused(&self, operation: Operation) {
        if self.on {
            self.operations.refused(operation);
        }
    }

    /// From now on `source` is asked, too.
    pub(crate) fn add_source(&self, source: Rc<dyn Source>) {
        self.sources.borrow_mut().push(source);
    }

    /// What it and its sources have counted.
    pub(crate) fn sample(&self, into: &mut Vec<Sample>) {
        self.operations.sample(into);
        let full = self.full.iter().map(|(_, count)| count.get()).sum();
        into.push(Sample::count(&families::MAILBOX_FULL, [], full));
        // One that comes before its record is written there is not here.
        let none = Buckets::new(&FASTPATH_BOUNDS_NS);
        for (success, place) in [("false", 0), ("true", 1)] {
            for (mode, times) in [("strong", &self.fastpath[place]), ("fast", &none)] {
                let times = Value::Durations(times.distribution());
                into.push(Sample::new(&families::FASTPATH, [mode, success], times));
            }
        }
        for source in &*self.sources.borrow() {
            source.sample(into);
        }
    }
}

/// Adds to a cell.
pub(crate) fn add(cell: &Cell<u64>, more: u64) {
    cell.set(cell.get().saturating_add(more));
}
