//! The life of one sandbox, as a pure function.
//!
//! Called by the driver alone, which feeds it everything that happens and performs what it answers.
//! Refuses to do anything itself: no clock, no descriptor, no error of the operating system.
//!
//! ```text
//!            Prepared            Started              InitDone
//!  Starting ─────────▶ Restoring ───────▶ Initialising ───────▶ Running ◀────────────┐
//!     │ ▲                  ▲                   ▲  ▲               │ │ │              │
//!     │ │ Resume (on disk) │                   │  │ Thawed        │ │ └ Snapshot ▶ Snapshotting
//!     │ │                  │ RolledBack        │  │               │ │      (Syncing ▶) Freezing ▶ Copying ▶ Committing
//!     │ └──── Paused ──────┼───────────────────┼──┘               │ └ Rollback ▶ RollingBack
//!     │        ▲  ▲        └── RollingBack ◀───┼──────────────────┘        Freezing ▶ Replacing
//!     │        │  └── Pausing ◀────────────────┼─ Pause
//!     │        │       (Syncing ▶) Freezing ▶ Copying ▶ Committing
//!     ▼        └ the process of a paused one may go at any time: it is on disk
//!  Cancelling ──▶ Stopping ──▶ Gone
//! ```
//! A resume that does not come up goes back to being paused: until it is answered it is on disk.
//! Starting cannot be interrupted half way: what is being made is finished, then taken back; what
//! still waits to be made is not begun. Every way to the end goes through Stopping, whose one effect
//! takes back everything at once. One operation at a time: whoever asks for a second is refused at
//! once. A step of an operation that takes too long ends the sandbox, so none stays between states;
//! an operation that fails while the guest can go on lets it go on.

use std::mem;

use mica_wire::vm;

mod birth;
mod operations;
mod refusal;
mod waiting;

use refusal::ended_how;
pub(crate) use refusal::{Refusal, doing};

/// Where a sandbox is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Its disk is being made and a VM process found for it.
    Starting(Birth),
    /// Its end was decided while they were being made.
    Cancelling(Cause),
    /// The VM process maps its memory and takes its state.
    Restoring(Birth),
    /// Its record is written, and its agent told who it is.
    Initialising(Birth),
    /// A daemon that found it running asks its VM process how far it is.
    Adopting,
    /// Anyone may use it.
    Running,
    /// A snapshot is made of it.
    Snapshotting(Step),
    /// It is on its way to being paused.
    Pausing(Step),
    /// It is on disk.
    Paused(Process),
    /// It goes back to a snapshot.
    RollingBack(Step),
    /// Everything is being taken back.
    Stopping(Cause),
    /// Nothing is left.
    Gone(Cause),
}

/// Why a guest is brought up: what its coming up is the answer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Birth {
    /// A create: nobody knows it yet.
    Create,
    /// A resume.
    Resume,
    /// A rollback.
    Rollback,
}

/// How far an operation is that stops the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The guest brings to its disk what is to stay, and still runs.
    Syncing,
    /// The guest is asked to stop.
    Freezing,
    /// It stands still; what it is, is copied, or replaced.
    Copying,
    /// It wrote too much to be copied while it stands still. It is told to go on.
    Releasing,
    /// It goes on, and the most is copied meanwhile; what it writes over is copied again.
    Precopying,
    /// The copy is brought to the device. After a snapshot the guest is also told to go on.
    Committing,
    /// The same, and the guest goes on.
    Finishing,
    /// The guest is told to go on; then whoever asked is told, and finds the sandbox ready.
    Thawing(Outcome),
}

/// What whoever asked for an operation is told at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is done.
    Done,
    /// It failed, and the guest goes on as it was.
    Failed,
    /// Nobody asked, or nobody knows any more what for.
    Nothing,
}

/// Whether a paused sandbox still has its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Process {
    /// A daemon that found it asks it whether it still stands still.
    Asked,
    /// Frozen; a resume is a word to it.
    Frozen,
    /// That word was said.
    Thawing,
    /// It is being ended, because its memory is wanted, or because it did not come up.
    Ending,
    /// The same, and a resume waits for that.
    Returning,
    /// One is being found for a resume that was given up meanwhile.
    Unwanted,
    /// None; a resume is a restore.
    None,
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
    TimedOut(&'static str),
    /// A step could not be done.
    Failed(String),
    /// No blocking thread had room for it.
    Busy,
    /// The template was not there.
    NoSuchTemplate,
    /// The template has no running snapshot.
    NotWarm,
    /// Without its memory it cannot go on, and why.
    CannotBoot(&'static str),
    /// The store is full.
    NoSpace,
    /// The guest stopped or its VM process ended.
    Ended(String),
}

/// What a client can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// A snapshot.
    Snapshot,
    /// The same, of nothing but its disk.
    SnapshotDisk,
    /// To go back to one.
    Rollback,
    /// To wait.
    Pause,
    /// The same, with nothing but its disk.
    PauseToDisk,
    /// To go on.
    Resume,
    /// The same, from its disk alone.
    Boot,
}

/// What can happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Its disk is there, and a VM process for it.
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
    InitFailed(Cause),
    /// The deadline of the step at hand, or the end of its time.
    TimeOver,
    /// A client asks.
    Ask(Ask),
    /// What is to stay is on the guest's disk.
    Synced,
    /// It is not; the guest goes on.
    SyncFailed,
    /// Memory and disk are copied (or, of a rollback, ready to be put back).
    Copied,
    /// They are not; the guest is as it was.
    CopyFailed,
    /// Of a rollback: they are not, and what the guest was is not there any more. But its record says
    /// where it goes, and there it can start again.
    ReplaceBroke,
    /// There is too much to copy while the guest stands still.
    TooMuch,
    /// The most of it is copied.
    Precopied,
    /// The copy is on the device.
    Committed,
    /// It is not, and nothing of it is left.
    CommitFailed,
    /// Memory is wanted: a paused sandbox gives its process up.
    Evict,
    /// Its process is gone, as was asked.
    ProcessEnded,
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
    /// Find a VM process and make a disk.
    Prepare,
    /// Send the plan and the state, or a kernel.
    SendRestore,
    /// Write its record, and tell its agent who it is, where there is one.
    Initialise,
    /// Start its time, and tell whoever made it.
    Announce,
    /// Have the guest bring to its disk what is to stay, where that alone is kept.
    Sync,
    /// Ask the guest to stop.
    Freeze,
    /// Copy memory and disk, or find that it is too much.
    Copy,
    /// Copy what was too much, while the guest runs.
    Precopy,
    /// Work out what differs from the snapshot, and put the disk back.
    Replace,
    /// Let the guest go on.
    Thaw,
    /// Bring the copy to the device.
    Commit,
    /// From now on it shows as paused.
    ShowPaused,
    /// From now on it shows as running, its time starts, and whoever resumed it is told.
    ShowResumed,
    /// Tell whoever asked that it is done.
    Answer,
    /// Tell whoever asked that it failed, and why; the sandbox goes on.
    AnswerFailure,
    /// Tell whoever asks just now why not.
    Refuse(Refusal),
    /// End its process, and nothing else.
    EndProcess,
    /// Take back process, cgroup, disk, snapshots of its own and uid.
    CleanUp,
    /// Leave everything as it is, for the next daemon.
    Leave,
    /// Forget it, and tell whoever waits for its end or its beginning.
    Bury,
}

/// What the machine has to know of a sandbox beside its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Whether it is paused, and not killed, when its time is over.
    pub(crate) pause_at_end: bool,
    /// Whether it outlives the daemon although it runs.
    pub(crate) outlives_daemon: bool,
    /// Whether the pause at hand, or the one at the end of its time, keeps its disk alone.
    pub(crate) disk_alone: bool,
    /// What tells that its guest is there, while it comes up.
    pub(crate) up_by: UpBy,
}

/// What a VM process says when there is a guest that can be told who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UpBy {
    /// Its vCPUs run: it was restored.
    Started,
    /// It was booted, and its agent listens,
    Doorbell,
    /// or, of one without an agent, its kernel writes.
    Console,
}

impl UpBy {
    fn is(self, said: &vm::Event) -> bool {
        *said
            == match self {
                Self::Started => vm::Event::Started,
                Self::Doorbell => vm::Event::Doorbell,
                Self::Console => vm::Event::ConsoleStarted,
            }
    }
}

type Stepped = (State, Vec<Effect>);

/// One step.
pub(crate) fn step(state: State, terms: Terms, event: Event) -> Stepped {
    match (state, event) {
        // The end has been decided already.
        (State::Gone(cause), event) => (State::Gone(cause), refuse_ask(&event, Refusal::Gone)),
        (State::Stopping(cause), Event::CleanedUp) => (State::Gone(cause), vec![Effect::Bury]),
        (State::Stopping(cause), event) => {
            (State::Stopping(cause), refuse_ask(&event, Refusal::Gone))
        }
        (State::Cancelling(cause), Event::Prepared | Event::PrepareFailed(_)) => stop(cause),
        (State::Cancelling(cause), event) => {
            (State::Cancelling(cause), refuse_ask(&event, Refusal::Gone))
        }
        (state, Event::Ask(ask)) => asked(state, ask),
        (state, Event::Kill) => end(state, Cause::Killed),
        (state, Event::Drain) => drain(state, terms),
        (State::Starting(birth), event) => birth::starting(birth, event),
        (state @ (State::Restoring(_) | State::Initialising(_)), event) => {
            birth::coming_up(terms, state, event)
        }
        (State::Adopting, event) => birth::adopting(event),
        (State::Running, event) => running(terms, event),
        (State::Snapshotting(step), event) => operations::snapshotting(step, event),
        (State::Pausing(step), event) => operations::pausing(terms, step, event),
        (State::RollingBack(step), event) => operations::rolling_back(step, event),
        (State::Paused(process), event) => waiting::paused(process, event),
    }
}

fn stop(cause: Cause) -> Stepped {
    (State::Stopping(cause), vec![Effect::CleanUp])
}

fn stay(state: State) -> Stepped {
    (state, vec![])
}

fn refuse_ask(event: &Event, refusal: Refusal) -> Vec<Effect> {
    if matches!(event, Event::Ask(_)) { vec![Effect::Refuse(refusal)] } else { vec![] }
}

fn asked(state: State, ask: Ask) -> Stepped {
    match (state, ask) {
        (State::Running, Ask::Snapshot) => {
            (State::Snapshotting(Step::Freezing), vec![Effect::Freeze])
        }
        (State::Running, Ask::SnapshotDisk) => {
            (State::Snapshotting(Step::Syncing), vec![Effect::Sync])
        }
        (State::Running, Ask::Pause) => (State::Pausing(Step::Freezing), vec![Effect::Freeze]),
        (State::Running, Ask::PauseToDisk) => (State::Pausing(Step::Syncing), vec![Effect::Sync]),
        (State::Running, Ask::Rollback) => {
            (State::RollingBack(Step::Freezing), vec![Effect::Freeze])
        }
        (State::Paused(Process::Frozen), Ask::Resume) => {
            (State::Paused(Process::Thawing), vec![Effect::Thaw])
        }
        // What it remembers is not wanted.
        (State::Paused(Process::Frozen), Ask::Boot) => {
            (State::Paused(Process::Returning), vec![Effect::EndProcess])
        }
        (State::Paused(Process::None), Ask::Resume | Ask::Boot) => {
            (State::Starting(Birth::Resume), vec![Effect::Prepare])
        }
        (State::Paused(Process::Ending), Ask::Resume | Ask::Boot) => {
            stay(State::Paused(Process::Returning))
        }
        (state, ask) => {
            let refusal = refusal::of(&state, ask);
            (state, vec![Effect::Refuse(refusal)])
        }
    }
}

/// The end, from any state before it.
fn end(state: State, cause: Cause) -> Stepped {
    match state {
        // While things are being made, an end has to wait for them.
        State::Starting(_) | State::Paused(Process::Unwanted) => (State::Cancelling(cause), vec![]),
        // What is on the device is there, whatever becomes of the guest.
        State::Snapshotting(Step::Thawing(Outcome::Done)) => {
            (State::Stopping(cause), vec![Effect::Answer, Effect::CleanUp])
        }
        _ => stop(cause),
    }
}

/// The daemon stops: what is on disk stays, what runs stays if it may, the rest ends.
fn drain(state: State, terms: Terms) -> Stepped {
    match state {
        // Its record names another process than this one, or none.
        State::Restoring(Birth::Resume) | State::Paused(Process::Thawing) => {
            let effects = vec![Effect::EndProcess, Effect::Leave, Effect::Bury];
            (State::Gone(Cause::Draining), effects)
        }
        State::Paused(_) | State::Starting(Birth::Resume) | State::Initialising(Birth::Resume) => {
            leave()
        }
        State::Snapshotting(Step::Thawing(Outcome::Done)) if terms.outlives_daemon => {
            let effects = vec![Effect::Answer, Effect::Leave, Effect::Bury];
            (State::Gone(Cause::Draining), effects)
        }
        // The next daemon lets a frozen guest go on, and brings half a rollback to its end.
        State::Running
        | State::Adopting
        | State::Snapshotting(_)
        | State::Pausing(_)
        | State::RollingBack(_)
        | State::Restoring(Birth::Rollback)
        | State::Initialising(Birth::Rollback)
            if terms.outlives_daemon =>
        {
            leave()
        }
        state => end(state, Cause::Draining),
    }
}

fn leave() -> Stepped {
    (State::Gone(Cause::Draining), vec![Effect::Leave, Effect::Bury])
}

fn running(terms: Terms, event: Event) -> Stepped {
    match event {
        Event::TimeOver if terms.pause_at_end && terms.disk_alone => {
            (State::Pausing(Step::Syncing), vec![Effect::Sync])
        }
        Event::TimeOver if terms.pause_at_end => {
            (State::Pausing(Step::Freezing), vec![Effect::Freeze])
        }
        Event::TimeOver => stop(Cause::Expired),
        Event::Vm(vm::Event::ConsoleStarted | vm::Event::Doorbell) => stay(State::Running),
        event => fall(State::Running, event),
    }
}

/// What ends any sandbox that is not on disk, and what changes nothing.
fn fall(state: State, event: Event) -> Stepped {
    match event {
        Event::TimeOver => {
            let doing = doing(&state);
            end(state, Cause::TimedOut(doing))
        }
        Event::VmLost(how) => end(state, Cause::Ended(how.to_owned())),
        Event::Vm(vm::Event::Ended(ending)) => end(state, Cause::Ended(ended_how(ending))),
        Event::Vm(_) => end(state, Cause::Failed("the VM process broke its protocol".to_owned())),
        // Answers that nobody asked for, or not any more: ours, not the guest's.
        _ => stay(state),
    }
}

impl State {
    /// Takes one step in place.
    pub(crate) fn advance(&mut self, terms: Terms, event: Event) -> Vec<Effect> {
        let (next, effects) = step(mem::replace(self, Self::Running), terms, event);
        *self = next;
        effects
    }

    /// Whether its end has been decided.
    pub(crate) fn is_ending(&self) -> bool {
        matches!(self, Self::Cancelling(_) | Self::Stopping(_) | Self::Gone(_))
    }

    /// Whether a guest is being brought up in a VM process.
    pub(crate) fn is_coming_up(&self) -> bool {
        matches!(self, Self::Starting(_) | Self::Restoring(_) | Self::Initialising(_))
    }

    /// Whether it will soon be running, or not be: what waits for that may.
    pub(crate) fn is_in_transition(&self) -> bool {
        match self {
            Self::Starting(birth) | Self::Restoring(birth) | Self::Initialising(birth) => {
                *birth != Birth::Create
            }
            Self::Adopting
            | Self::Pausing(_)
            | Self::RollingBack(_)
            | Self::Paused(Process::Thawing | Process::Returning) => true,
            _ => false,
        }
    }

    /// Whether a client may use it: a guest that stands still for a moment takes connections.
    pub(crate) fn takes_streams(&self) -> bool {
        matches!(self, Self::Running | Self::Snapshotting(_))
    }
}

#[cfg(test)]
mod tests;
