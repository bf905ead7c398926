//! What was done with sandboxes: how often, how it ended, and where the time went.
//!
//! Recorded by drivers and by `host`. Refuses to show a phase of an operation that did not succeed:
//! so each phase is counted as often as its operation, and their sum is never more than the whole.

use std::cell::Cell;
use std::time::Duration;

use mica_units::Durations;
use tracing::Span;

use super::sample::{Sample, Value};
use super::{add, families};

/// What can be done with a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// It is made from a template.
    Create,
    /// It is made from a snapshot, as a clone or a fork is, too.
    Restore,
    /// A snapshot is made of it.
    Snapshot,
    /// It is paused.
    Pause,
    /// It goes on.
    Resume,
    /// It goes back to a snapshot.
    Rollback,
    /// Others are made from it while it runs.
    Clone,
    /// It is ended because somebody asks.
    Kill,
}

/// All of them.
pub(crate) const OPERATIONS: [Operation; 8] = [
    Operation::Create,
    Operation::Restore,
    Operation::Snapshot,
    Operation::Pause,
    Operation::Resume,
    Operation::Rollback,
    Operation::Clone,
    Operation::Kill,
];

/// What an operation spends its time on. Where two things are done at once, the time is that of the one
/// that was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A shard is chosen, and the request is brought there.
    Route,
    /// What to restore is found, and the disk cloned.
    Layers,
    /// A VM process is taken from the pool, or made where none waits.
    Pool,
    /// Plan and state are handed to the VM process.
    State,
    /// The VM process maps the memory, takes the state and runs.
    Run,
    /// The agent answers, and the record is written.
    Ready,
    /// The guest stops: vCPUs are out, queues drained.
    Freeze,
    /// What the guest wrote is found.
    Scan,
    /// That, and the disk, are copied.
    Copy,
    /// What is left of the copy is written.
    Write,
    /// It is brought to the device.
    Sync,
    /// The snapshot comes into being, and who asked is told.
    Commit,
    /// What differs from the snapshot is worked out, and the disk put back.
    Plan,
    /// What copies are made from is: a snapshot.
    Snapshot,
    /// The copies are made.
    Copies,
}

/// How many there are.
const PHASES: usize = Phase::Copies as usize + 1;

/// The name of each phase, and its span: one place of code for each, for a span's name is a constant.
macro_rules! named {
    ($($phase:ident: $name:literal,)*) => {
        impl Phase {
            /// As labels, spans and log lines have it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$phase => $name,)* }
            }

            /// A span of this name within another, for whoever traces; else none.
            pub(super) fn span(self, within: &Span) -> Span {
                match self {
                    $(Self::$phase => {
                        tracing::trace_span!(target: "mica::operations", parent: within, $name)
                    })*
                }
            }
        }
    };
}

named! {
    Route: "route",
    Layers: "layers",
    Pool: "pool",
    State: "state",
    Run: "run",
    Ready: "ready",
    Freeze: "freeze",
    Scan: "scan",
    Copy: "copy",
    Write: "write",
    Sync: "sync",
    Commit: "commit",
    Plan: "plan",
    Snapshot: "snapshot",
    Copies: "copies",
}

impl Operation {
    /// As labels and log lines have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Restore => "restore",
            Self::Snapshot => "snapshot",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Rollback => "rollback",
            Self::Clone => "clone",
            Self::Kill => "kill",
        }
    }

    /// What it spends its time on, in order.
    #[must_use]
    pub fn phases(self) -> &'static [Phase] {
        use Phase::{
            Commit, Copies, Copy, Freeze, Layers, Plan, Pool, Ready, Route, Run, Scan, State, Sync,
            Write,
        };
        match self {
            Self::Create | Self::Restore => &[Route, Layers, Pool, State, Run, Ready],
            // One that is frozen in its process needs the last two only.
            Self::Resume => &[Layers, Pool, State, Run, Ready],
            Self::Snapshot | Self::Pause => &[Freeze, Scan, Copy, Write, Sync, Commit],
            Self::Rollback => &[Freeze, Plan, State, Run, Ready],
            Self::Clone => &[Phase::Snapshot, Copies],
            Self::Kill => &[],
        }
    }
}

/// What one kind of operation came to.
#[derive(Debug, Default)]
struct Counted {
    ok: Cell<u64>,
    /// Begun, and come to nothing.
    error: Cell<u64>,
    /// Not begun: another one was at work, or the sandbox was in no state for it.
    refused: Cell<u64>,
    total: Durations,
    /// In the order of the operation's phases.
    phases: Vec<Durations>,
}

/// All of a shard's operations.
#[derive(Debug)]
pub(crate) struct Operations(Vec<Counted>);

impl Default for Operations {
    fn default() -> Self {
        let counted = |operation: Operation| Counted {
            phases: operation.phases().iter().map(|_| Durations::default()).collect(),
            ..Counted::default()
        };
        Self(OPERATIONS.into_iter().map(counted).collect())
    }
}

/// The time that an operation spent on each phase.
pub(crate) type Spent = [Cell<Duration>; PHASES];

/// No time yet.
pub(crate) fn nothing_spent() -> Spent {
    [const { Cell::new(Duration::ZERO) }; PHASES]
}

impl Operations {
    /// Counts one that is done.
    pub(crate) fn done(&self, operation: Operation, total: Duration, spent: &Spent) {
        let Some(counted) = self.0.get(operation as usize) else { return };
        add(&counted.ok, 1);
        counted.total.record(total);
        for (phase, durations) in operation.phases().iter().zip(&counted.phases) {
            durations.record(spent[*phase as usize].get());
        }
    }

    /// Counts one that came to nothing.
    pub(crate) fn failed(&self, operation: Operation) {
        if let Some(counted) = self.0.get(operation as usize) {
            add(&counted.error, 1);
        }
    }

    /// Counts one that was not begun.
    pub(crate) fn refused(&self, operation: Operation) {
        if let Some(counted) = self.0.get(operation as usize) {
            add(&counted.refused, 1);
        }
    }

    /// Adds a copy of everything.
    pub(crate) fn sample(&self, into: &mut Vec<Sample>) {
        for (operation, counted) in OPERATIONS.into_iter().zip(&self.0) {
            let name = operation.name();
            for (result, count) in
                [("ok", &counted.ok), ("error", &counted.error), ("refused", &counted.refused)]
            {
                into.push(Sample::count(&families::OPERATIONS, [name, result], count.get()));
            }
            let total = Value::Durations(counted.total.distribution());
            into.push(Sample::new(&families::OPERATION_SECONDS, [name], total));
            for (phase, durations) in operation.phases().iter().zip(&counted.phases) {
                let value = Value::Durations(durations.distribution());
                let labels = [name, phase.name()];
                into.push(Sample::new(&families::PHASE_SECONDS, labels, value));
            }
        }
    }

    /// What was done and how long it took, with its phases.
    pub(crate) fn views(&self) -> Vec<OperationView> {
        let view = |(operation, counted): (Operation, &Counted)| {
            let phase =
                |(phase, durations): (&Phase, &Durations)| (phase.name(), quantiles(durations));
            OperationView {
                operation: operation.name(),
                count: counted.ok.get(),
                errors: counted.error.get(),
                total: quantiles(&counted.total),
                phases: operation.phases().iter().zip(&counted.phases).map(phase).collect(),
            }
        };
        OPERATIONS.into_iter().zip(&self.0).map(view).collect()
    }
}

/// What one kind of operation came to, for people.
#[derive(Clone, Debug)]
pub struct OperationView {
    /// Which.
    pub operation: &'static str,
    /// How many succeeded.
    pub count: u64,
    /// How many failed.
    pub errors: u64,
    /// How long they took; none where there was none.
    pub total: Option<Quantiles>,
    /// How long each phase took.
    pub phases: Vec<(&'static str, Option<Quantiles>)>,
}

/// How long something took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantiles {
    /// Half of them no longer than this.
    pub p50: Duration,
    /// 95 of a hundred.
    pub p95: Duration,
    /// 99 of a hundred.
    pub p99: Duration,
}

fn quantiles(durations: &Durations) -> Option<Quantiles> {
    Some(Quantiles {
        p50: durations.quantile(0.5)?,
        p95: durations.quantile(0.95)?,
        p99: durations.quantile(0.99)?,
    })
}
