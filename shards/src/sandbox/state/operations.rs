//! The steps of the operations that stop the guest: snapshot, pause, rollback.
//!
//! Called by the state machine. A capture is the same for a snapshot and a pause, but for who goes on
//! when:
//!
//! ```text
//!            Frozen            Copied                Thawed (snapshot)
//!  Freezing ────────▶ Copying ────────▶ Committing ────────────────▶ Finishing
//!     ▲                  │ TooMuch                                      │ Committed
//!     │ Precopied        ▼                                              ▼
//!     └── Precopying ◀─ Releasing                                    Running
//! ```
//! What keeps the disk alone begins with `Syncing`, while the guest still runs; with a pause of that kind its
//! process ends. Refuses what is not its turn, by handing it to the common end.

use mica_wire::vm;

use super::{Effect, Event, Outcome, Process, State, Step, Stepped, Terms, fall, stay};

pub(super) fn snapshotting(step: Step, event: Event) -> Stepped {
    let at = State::Snapshotting;
    match (step, event) {
        (Step::Copying, Event::Copied) => {
            (at(Step::Committing), vec![Effect::Thaw, Effect::Commit])
        }
        (Step::Committing, Event::Vm(vm::Event::Thawed)) => stay(at(Step::Finishing)),
        (Step::Committing, Event::Committed) => stay(at(Step::Thawing(Outcome::Done))),
        (Step::Committing, Event::CommitFailed) => stay(at(Step::Thawing(Outcome::Failed))),
        (Step::Finishing, Event::Committed) => (State::Running, vec![Effect::Answer]),
        (Step::Finishing, Event::CommitFailed) => (State::Running, vec![Effect::AnswerFailure]),
        (step, event) => capturing(at, step, event),
    }
}

pub(super) fn pausing(terms: Terms, step: Step, event: Event) -> Stepped {
    let at = State::Pausing;
    match (step, event) {
        (Step::Copying, Event::Copied) => (at(Step::Committing), vec![Effect::Commit]),
        // Nothing of its memory is to go on.
        (Step::Committing, Event::Committed) if terms.disk_alone => {
            let effects = vec![Effect::ShowPaused, Effect::Answer, Effect::EndProcess];
            (State::Paused(Process::Ending), effects)
        }
        (Step::Committing, Event::Committed) => {
            (State::Paused(Process::Frozen), vec![Effect::ShowPaused, Effect::Answer])
        }
        (Step::Committing, Event::CommitFailed) => give_up(at),
        (step, event) => capturing(at, step, event),
    }
}

fn capturing(at: fn(Step) -> State, step: Step, event: Event) -> Stepped {
    match (step, event) {
        (Step::Syncing, Event::Synced) => (at(Step::Freezing), vec![Effect::Freeze]),
        (Step::Syncing, Event::SyncFailed) => (State::Running, vec![Effect::AnswerFailure]),
        (Step::Freezing, Event::Vm(vm::Event::Frozen { .. })) => {
            (at(Step::Copying), vec![Effect::Copy])
        }
        (Step::Copying, Event::CopyFailed) => give_up(at),
        (Step::Copying, Event::TooMuch) => (at(Step::Releasing), vec![Effect::Thaw]),
        // Only now: the command after a thaw may not be sent before its answer.
        (Step::Releasing, Event::Vm(vm::Event::Thawed)) => {
            (at(Step::Precopying), vec![Effect::Precopy])
        }
        (Step::Precopying, Event::Precopied) => (at(Step::Freezing), vec![Effect::Freeze]),
        (Step::Precopying, Event::CopyFailed) => (State::Running, vec![Effect::AnswerFailure]),
        (Step::Thawing(outcome), Event::Vm(vm::Event::Thawed)) => thawed(outcome),
        (step, event) => talking(at(step), event),
    }
}

pub(super) fn rolling_back(step: Step, event: Event) -> Stepped {
    let at = State::RollingBack;
    match (step, event) {
        (Step::Freezing, Event::Vm(vm::Event::Frozen { .. })) => {
            (at(Step::Copying), vec![Effect::Replace])
        }
        (Step::Copying, Event::Copied) => {
            (State::Restoring(super::Birth::Rollback), vec![Effect::SendRestore])
        }
        (Step::Copying, Event::CopyFailed) => give_up(at),
        // Its disk is of no use, but the snapshot is: it waits in that.
        (Step::Copying, Event::ReplaceBroke) => {
            let effects = vec![Effect::ShowPaused, Effect::AnswerFailure, Effect::EndProcess];
            (State::Paused(Process::Ending), effects)
        }
        (Step::Thawing(outcome), Event::Vm(vm::Event::Thawed)) => thawed(outcome),
        (step, event) => talking(at(step), event),
    }
}

/// The operation failed, and the guest goes on as it was.
fn give_up(at: fn(Step) -> State) -> Stepped {
    (at(Step::Thawing(Outcome::Failed)), vec![Effect::Thaw])
}

fn thawed(outcome: Outcome) -> Stepped {
    let effects = match outcome {
        Outcome::Done => vec![Effect::Answer],
        Outcome::Failed => vec![Effect::AnswerFailure],
        Outcome::Nothing => vec![],
    };
    (State::Running, effects)
}

/// What may come at any time while the guest still runs, or did a moment ago.
fn talking(state: State, event: Event) -> Stepped {
    match event {
        Event::Vm(vm::Event::ConsoleStarted | vm::Event::Doorbell) => stay(state),
        event => fall(state, event),
    }
}
