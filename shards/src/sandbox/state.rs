//! The life of one sandbox, as a pure function.
//!
//! Called by the driver alone, which feeds it everything that happens and performs what it answers.
//! Refuses to do anything itself: no clock, no descriptor, no error of the operating system.
//!
//! ```text
//!            Prepared        Jailed         Doorbell           InitDone
//!  Starting ─────────▶ Jailing ─────▶ Booting ─────▶ Initialising ─────▶ Running
//!     │                  │              │ ConsoleStarted (console templates) ▲ │
//!     │ kill, time       │              └────────────────────────────────────┘ │
//!     ▼                  │ kill, time, socket closed, frame out of turn,       │
//!  Cancelling            │ vm ended, init failed                               │
//!     │ Prepared or      ▼                                                     │
//!     │ PrepareFailed                                                          │
//!     └──────────────▶ Stopping ◀──────────────────────────────────────────────┘
//!                        │ CleanedUp
//!                        ▼
//!                       Gone
//! ```
//! Starting cannot be interrupted half way: what is being made is finished, then taken back; what
//! still waits to be made is not begun. Every way to the end goes through Stopping, whose one effect
//! takes back everything at once.

use std::mem;

use mica_wire::vm;

/// Where a sandbox is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Its disk, cgroup and process are being made.
    Starting,
    /// Its end was decided while they were being made.
    Cancelling(Cause),
    /// The VM process locks itself in.
    Jailing,
    /// The guest boots.
    Booting,
    /// The agent is told who it is.
    Initialising,
    /// Anyone may use it.
    Running,
    /// Everything is being taken back.
    Stopping(Cause),
    /// Nothing is left.
    Gone(Cause),
}

/// Why a sandbox ends. The first reason stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Someone asked, or who asked for it is gone.
    Killed,
    /// Its time is over.
    Expired,
    /// The daemon stops.
    Draining,
    /// Not ready in time; where it was then.
    BootTimedOut(&'static str),
    /// A step could not be done.
    Failed(String),
    /// No blocking thread had room for it.
    Busy,
    /// The template was not there.
    NoSuchTemplate,
    /// The guest stopped or its VM process ended.
    Ended(String),
}

/// When a template counts as up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ready {
    /// When its agent has been initialised.
    Agent,
    /// When the guest writes to its console.
    Console,
}

/// What can happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Disk, cgroup and process are there.
    Prepared,
    /// They are not, and why.
    PrepareFailed(Cause),
    /// The VM process says.
    Vm(vm::Event),
    /// The VM process closed its socket, sent garbage, or takes no commands.
    VmLost(&'static str),
    /// The agent answered.
    InitDone,
    /// It did not, or not well.
    InitFailed(String),
    /// The boot deadline, or the end of its time.
    TimeOver,
    /// Someone asks for its end.
    Kill,
    /// The daemon stops.
    Drain,
    /// Everything is taken back.
    CleanedUp,
}

/// What the driver is to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Send the boot command.
    SendBoot,
    /// Start the exchange with the agent.
    Initialise,
    /// Start its time, and tell whoever made it.
    Announce,
    /// Take back process, cgroup, disk and uid.
    CleanUp,
    /// Forget it, and tell whoever waits for its end or its beginning.
    Bury,
}

/// One step.
pub(crate) fn step(state: State, ready: Ready, event: Event) -> (State, Vec<Effect>) {
    match (state, event) {
        // The end has been decided already.
        (State::Gone(cause), _) => (State::Gone(cause), vec![]),
        (State::Stopping(cause), Event::CleanedUp) => (State::Gone(cause), vec![Effect::Bury]),
        (State::Stopping(cause), _) => (State::Stopping(cause), vec![]),
        (State::Cancelling(cause), Event::Prepared | Event::PrepareFailed(_)) => stop(cause),
        (State::Cancelling(cause), _) => (State::Cancelling(cause), vec![]),
        // While things are being made, an end has to wait for them.
        (State::Starting, Event::Prepared) => (State::Jailing, vec![]),
        (State::Starting, Event::PrepareFailed(cause)) => stop(cause),
        (State::Starting, event) => match end_by(&State::Starting, event) {
            Some(cause) => (State::Cancelling(cause), vec![]),
            None => (State::Starting, vec![]),
        },
        // The way up.
        (State::Jailing, Event::Vm(vm::Event::Jailed)) => (State::Booting, vec![Effect::SendBoot]),
        (State::Booting, Event::Vm(vm::Event::Started)) => (State::Booting, vec![]),
        (State::Booting, Event::Vm(vm::Event::ConsoleStarted)) if ready == Ready::Console => {
            (State::Running, vec![Effect::Announce])
        }
        (State::Booting, Event::Vm(vm::Event::Doorbell)) if ready == Ready::Agent => {
            (State::Initialising, vec![Effect::Initialise])
        }
        (State::Initialising, Event::InitDone) => (State::Running, vec![Effect::Announce]),
        // These may come at any time once the guest runs, and change nothing then.
        (
            state @ (State::Booting | State::Initialising | State::Running),
            Event::Vm(vm::Event::Started | vm::Event::ConsoleStarted | vm::Event::Doorbell),
        ) => (state, vec![]),
        (state, event) => match end_by(&state, event) {
            Some(cause) => stop(cause),
            None => (state, vec![]),
        },
    }
}

fn stop(cause: Cause) -> (State, Vec<Effect>) {
    (State::Stopping(cause), vec![Effect::CleanUp])
}

/// The reason to end that `event` is, if it is one.
fn end_by(state: &State, event: Event) -> Option<Cause> {
    match event {
        Event::Kill => Some(Cause::Killed),
        Event::Drain => Some(Cause::Draining),
        Event::TimeOver if *state == State::Running => Some(Cause::Expired),
        Event::TimeOver => Some(Cause::BootTimedOut(waiting_for(state))),
        Event::VmLost(how) => Some(Cause::Ended(how.to_owned())),
        Event::InitFailed(why) => Some(Cause::Failed(format!("the agent's start: {why}"))),
        Event::Vm(vm::Event::Ended(ending)) => Some(Cause::Ended(ended_how(ending))),
        Event::Vm(vm::Event::Jailed | vm::Event::Started) => Some(out_of_turn()),
        Event::Vm(vm::Event::ConsoleStarted | vm::Event::Doorbell) => Some(out_of_turn()),
        // Answers that nobody asked for: ours, not the guest's. They change nothing.
        Event::Prepared | Event::PrepareFailed(_) | Event::InitDone | Event::CleanedUp => None,
    }
}

fn out_of_turn() -> Cause {
    Cause::Failed("the VM process broke its protocol".to_owned())
}

/// What a sandbox waits for, for the message of a deadline.
pub(crate) fn waiting_for(state: &State) -> &'static str {
    match state {
        State::Starting | State::Cancelling(_) => "making its disk and its process",
        State::Jailing => "waiting for the VM process to lock itself in",
        State::Booting => "waiting for the guest to boot",
        State::Initialising => "waiting for the agent in the guest",
        State::Running | State::Stopping(_) | State::Gone(_) => "waiting for nothing",
    }
}

/// Longest text of a VM process that is passed on.
const ENDING_CHARS_MAX: usize = 512;

fn ended_how(ending: vm::Ending) -> String {
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
        vm::Ending::BadConfig(what) => format!("the template cannot boot: {}", bounded(what)),
        vm::Ending::Internal(what) => format!("the VM process failed: {}", bounded(what)),
    }
}

impl State {
    /// Takes one step in place.
    pub(crate) fn advance(&mut self, ready: Ready, event: Event) -> Vec<Effect> {
        let (next, effects) = step(mem::replace(self, Self::Starting), ready, event);
        *self = next;
        effects
    }

    /// Whether its end has been decided.
    pub(crate) fn is_ending(&self) -> bool {
        matches!(self, Self::Cancelling(_) | Self::Stopping(_) | Self::Gone(_))
    }
}

#[cfg(test)]
mod tests;
