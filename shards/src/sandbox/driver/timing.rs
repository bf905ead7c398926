//! Which phase of an operation ends where a sandbox changes its state.
//!
//! Called by the driver after each step of the state machine. What happens within one state is timed by
//! the piece of work that does it. Refuses to decide anything.

use super::super::state::{Ask, Birth, Cause, Outcome, Process, State, Step};
use super::Driver;
use crate::metrics::{Operation, Phase};

/// The operation that a client asks for.
pub(super) fn operation_of(ask: Ask) -> Operation {
    match ask {
        Ask::Snapshot | Ask::SnapshotDisk => Operation::Snapshot,
        Ask::Rollback => Operation::Rollback,
        Ask::Pause | Ask::PauseToDisk => Operation::Pause,
        Ask::Resume | Ask::Boot => Operation::Resume,
    }
}

/// The operation that begins where a sandbox comes into this state, and with what.
fn begins(before: &State, now: &State) -> Option<(Operation, Phase)> {
    match (before, now) {
        (State::Running, State::Snapshotting(_)) => Some((Operation::Snapshot, Phase::Freeze)),
        (State::Running, State::Pausing(_)) => Some((Operation::Pause, Phase::Freeze)),
        (State::Running, State::RollingBack(_)) => Some((Operation::Rollback, Phase::Freeze)),
        (State::Paused(_), State::Paused(Process::Thawing)) => {
            Some((Operation::Resume, Phase::Run))
        }
        (State::Paused(_), State::Paused(Process::Returning) | State::Starting(Birth::Resume)) => {
            Some((Operation::Resume, Phase::Layers))
        }
        _ => None,
    }
}

/// What the time in the state that was left was spent on.
fn spent_on(before: &State, now: &State) -> Option<Phase> {
    match (before, now) {
        (State::Starting(_), State::Restoring(_)) => Some(Phase::Pool),
        (State::Restoring(_), State::Initialising(_))
        | (State::Paused(Process::Thawing), State::Initialising(_)) => Some(Phase::Run),
        (State::Initialising(_), State::Running) => Some(Phase::Ready),
        (
            State::Snapshotting(Step::Freezing)
            | State::Pausing(Step::Freezing)
            | State::RollingBack(Step::Freezing),
            _,
        ) => Some(Phase::Freeze),
        (State::RollingBack(Step::Copying), _) => Some(Phase::Plan),
        (
            State::Snapshotting(Step::Committing | Step::Finishing | Step::Thawing(Outcome::Done))
            | State::Pausing(Step::Committing),
            State::Running | State::Paused(_),
        ) => Some(Phase::Commit),
        _ => None,
    }
}

impl Driver {
    /// Takes the time of what the sandbox has just left.
    pub(super) fn time(&mut self, before: &State) {
        let now = self.sandbox.state.borrow().clone();
        if let Some(phase) = spent_on(before, &now) {
            self.watch.lap(phase);
        }
        // Its process did not go on: another one is needed, from the beginning.
        if (before, &now) == (&State::Paused(Process::Thawing), &State::Starting(Birth::Resume)) {
            self.watch.turn(Some(Phase::Layers));
        }
        if let Some((operation, first)) = begins(before, &now)
            && !self.watch.runs()
        {
            let metrics = &self.shard.metrics;
            self.watch = metrics.watch_from(operation, Some(first), self.sandbox.id);
        }
    }

    /// The operation at hand is over.
    pub(super) fn timed(&mut self, is_done: bool) {
        self.shard.metrics.end(&mut self.watch, is_done);
    }

    /// The sandbox is gone, and what was at hand came to nothing. A create of what is not there is not
    /// counted here: who asked may mean something else by the same name, and counts what all comes to.
    pub(super) fn timed_end(&mut self, cause: &Cause) {
        let is_create = self.sandbox.maker.borrow().is_some();
        if is_create && *cause == Cause::NoSuchTemplate {
            if let Some(stopped) = self.watch.stop() {
                tracing::trace!(target: "mica::operations", "{}", stopped.line(false));
            }
        } else {
            self.timed(false);
        }
    }
}
