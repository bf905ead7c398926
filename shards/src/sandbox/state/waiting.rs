//! The steps of a sandbox that is paused, and what becomes of its process.
//!
//! Called by the state machine. Whatever its process does, a paused sandbox is on disk: refuses to let it
//! take the sandbox with it.

use mica_wire::vm;

use super::{Birth, Effect, Event, Process, State, Stepped, stay};

pub(super) fn paused(process: Process, event: Event) -> Stepped {
    let at = State::Paused;
    match (process, event) {
        (Process::Asked, Event::Vm(vm::Event::Status { phase: vm::Phase::Frozen, .. })) => {
            stay(at(Process::Frozen))
        }
        // Said to the daemon before us.
        (Process::Asked, Event::Vm(vm::Event::Frozen { .. } | vm::Event::Started)) => {
            stay(at(process))
        }
        (Process::Frozen, Event::Evict) => (at(Process::Ending), vec![Effect::EndProcess]),
        (Process::Ending, Event::ProcessEnded) => stay(at(Process::None)),
        (Process::Returning, Event::ProcessEnded) => {
            (State::Starting(Birth::Resume), vec![Effect::Prepare])
        }
        (Process::Unwanted, Event::Prepared) => (at(Process::Ending), vec![Effect::EndProcess]),
        (Process::Unwanted, Event::PrepareFailed(_)) => stay(at(Process::None)),
        (Process::Thawing, Event::Vm(vm::Event::Thawed)) => {
            (State::Initialising(Birth::Resume), vec![Effect::Initialise])
        }
        (process, Event::Vm(vm::Event::ConsoleStarted | vm::Event::Doorbell)) => stay(at(process)),
        (Process::Asked | Process::Frozen, Event::VmLost(_) | Event::Vm(_))
        | (Process::Asked, Event::TimeOver) => (at(Process::Ending), vec![Effect::EndProcess]),
        // Whoever waits is told; the process may still take its time.
        (Process::Returning, Event::TimeOver) => (at(Process::Ending), vec![Effect::AnswerFailure]),
        (Process::Thawing, Event::VmLost(_) | Event::Vm(_) | Event::TimeOver) => back_to_disk(),
        (process, _) => stay(at(process)),
    }
}

/// A resume failed, and the sandbox is paused as before.
pub(super) fn back_to_disk() -> Stepped {
    (State::Paused(Process::Ending), vec![Effect::AnswerFailure, Effect::EndProcess])
}
