//! The steps of a sandbox that comes up, or that a new daemon finds.
//!
//! Called by the state machine. Refuses to lose what is on disk: a resume that does not come up goes back
//! there.

use mica_wire::vm;

use super::{
    Birth, Cause, Effect, Event, Outcome, Process, State, Step, Stepped, Terms, UpBy, doing, end,
    fall, stay, stop, waiting,
};

pub(super) fn starting(birth: Birth, event: Event) -> Stepped {
    match event {
        Event::Prepared => (State::Restoring(birth), vec![Effect::SendRestore]),
        // What cannot be resumed now is still on disk.
        Event::PrepareFailed(_) if birth == Birth::Resume => {
            (State::Paused(Process::None), vec![Effect::AnswerFailure])
        }
        Event::PrepareFailed(cause) => stop(cause),
        Event::TimeOver if birth == Birth::Resume => {
            (State::Paused(Process::Unwanted), vec![Effect::AnswerFailure])
        }
        Event::TimeOver => {
            (State::Cancelling(Cause::TimedOut(doing(&State::Starting(birth)))), vec![])
        }
        _ => stay(State::Starting(birth)),
    }
}

pub(super) fn coming_up(terms: Terms, state: State, event: Event) -> Stepped {
    match (state, event) {
        (State::Restoring(birth), Event::Vm(said)) if terms.up_by.is(&said) => {
            (State::Initialising(birth), vec![Effect::Initialise])
        }
        // A guest that boots is not up when its vCPUs run, and may write before that is said.
        (state @ (State::Restoring(_) | State::Initialising(_)), Event::Vm(vm::Event::Started))
            if terms.up_by != UpBy::Started =>
        {
            stay(state)
        }
        (State::Initialising(birth), Event::InitDone) => up(birth),
        (
            state @ (State::Restoring(_) | State::Initialising(_)),
            Event::Vm(vm::Event::ConsoleStarted | vm::Event::Doorbell),
        ) => stay(state),
        (
            State::Restoring(Birth::Resume) | State::Initialising(Birth::Resume),
            Event::InitFailed(_) | Event::VmLost(_) | Event::Vm(_) | Event::TimeOver,
        ) => waiting::back_to_disk(),
        (state, Event::InitFailed(cause)) => end(state, cause),
        (state, event) => fall(state, event),
    }
}

fn up(birth: Birth) -> Stepped {
    let effect = match birth {
        Birth::Create => Effect::Announce,
        Birth::Resume => Effect::ShowResumed,
        Birth::Rollback => Effect::Answer,
    };
    (State::Running, vec![effect])
}

pub(super) fn adopting(event: Event) -> Stepped {
    match event {
        Event::Vm(vm::Event::Status { phase: vm::Phase::Running, .. }) => stay(State::Running),
        // An operation of the daemon before us was cut off; its copy is gone.
        Event::Vm(vm::Event::Status { phase: vm::Phase::Frozen, .. }) => {
            (State::Snapshotting(Step::Thawing(Outcome::Nothing)), vec![Effect::Thaw])
        }
        // Said to the daemon before us.
        Event::Vm(event) if !matches!(event, vm::Event::Ended(_) | vm::Event::Status { .. }) => {
            stay(State::Adopting)
        }
        event => fall(State::Adopting, event),
    }
}
