//! What a sandbox is doing, why an operation is refused, and how a VM process ended, in words.
//!
//! Called by the state machine and by the driver, which turns a refusal into an error for whoever
//! asked. Refuses nothing itself.

use mica_wire::vm;

use super::{Ask, Birth, Process, State};

/// Why an operation cannot begin now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Another has the sandbox; what it is doing.
    Busy(&'static str),
    /// It is paused and should run.
    IsPaused,
    /// It is paused already.
    AlreadyPaused,
    /// It runs already.
    AlreadyRunning,
    /// It ends, or nobody knows it yet.
    Gone,
}

/// Why `ask` is refused in `state`, which does not begin it.
pub(super) fn of(state: &State, ask: Ask) -> Refusal {
    match (state, ask) {
        (State::Paused(process), Ask::Pause | Ask::PauseToDisk) if !waits_to_run(*process) => {
            Refusal::AlreadyPaused
        }
        (State::Paused(process), Ask::Snapshot | Ask::SnapshotDisk | Ask::Rollback)
            if !waits_to_run(*process) =>
        {
            Refusal::IsPaused
        }
        (State::Running, _) => Refusal::AlreadyRunning,
        (
            State::Starting(Birth::Create)
            | State::Restoring(Birth::Create)
            | State::Initialising(Birth::Create)
            | State::Cancelling(_)
            | State::Stopping(_)
            | State::Gone(_),
            _,
        ) => Refusal::Gone,
        (state, _) => Refusal::Busy(doing(state)),
    }
}

/// Whether a paused one is about to be something else.
fn waits_to_run(process: Process) -> bool {
    matches!(process, Process::Asked | Process::Thawing | Process::Returning)
}

/// What a sandbox is doing, for the message of a deadline or of a refusal.
pub(crate) fn doing(state: &State) -> &'static str {
    match state {
        State::Starting(Birth::Resume)
        | State::Paused(Process::Thawing | Process::Returning)
        | State::Restoring(Birth::Resume)
        | State::Initialising(Birth::Resume) => "it is being resumed",
        State::Starting(_) | State::Cancelling(_) => {
            "finding what it starts from, and making its disk and its process"
        }
        State::Restoring(Birth::Rollback)
        | State::Initialising(Birth::Rollback)
        | State::RollingBack(_) => "it is being rolled back",
        State::Restoring(Birth::Create) => "waiting for its VM process to bring the guest up",
        State::Initialising(Birth::Create) => "waiting for the agent in the guest",
        State::Adopting | State::Paused(Process::Asked) => {
            "the daemon has just started and takes it over"
        }
        State::Snapshotting(_) => "a snapshot of it is being made",
        State::Pausing(_) => "it is being paused",
        State::Paused(Process::Ending | Process::Unwanted) => "its memory is being given back",
        State::Paused(_) => "it is paused",
        State::Running => "it runs",
        State::Stopping(_) | State::Gone(_) => "it ends",
    }
}

/// Longest text of a VM process that is passed on.
pub(super) const ENDING_CHARS_MAX: usize = 512;

pub(super) fn ended_how(ending: vm::Ending) -> String {
    let bounded = |text: String| {
        let text = crate::console::sanitise(text.as_bytes());
        text.chars().take(ENDING_CHARS_MAX).collect::<String>()
    };
    match ending {
        vm::Ending::Asked => "the VM process was asked to end".to_owned(),
        vm::Ending::Reset => "the guest reset or powered off".to_owned(),
        vm::Ending::Halted => "the guest halted".to_owned(),
        vm::Ending::TripleFault => "the guest triple-faulted".to_owned(),
        vm::Ending::GuestFault(what) => format!("the guest broke a rule: {}", bounded(what)),
        vm::Ending::BadConfig(what) => format!("the snapshot cannot start: {}", bounded(what)),
        vm::Ending::Internal(what) => format!("the VM process failed: {}", bounded(what)),
    }
}
