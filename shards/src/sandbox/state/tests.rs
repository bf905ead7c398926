//! What holds for every life of a sandbox, and a few lives told in full.
//!
//! Run by `cargo test`. Most is shown for every state that can be reached, by walking all of them:
//! a VM process that a guest has taken over says anything at any time, while what is work of ours ends
//! once, and only when it was begun. `interleavings` takes two clients at a time.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::*;

mod interleavings;
mod lives;

fn vm(event: vm::Event) -> Event {
    Event::Vm(event)
}

fn status(phase: vm::Phase) -> Event {
    vm(vm::Event::Status { nonce: 1, phase, shell: None })
}

fn frozen() -> Event {
    vm(vm::Event::Frozen { state_bytes: 1, log_bytes: 0 })
}

/// Everything a VM process can say, truly or not.
fn said() -> Vec<Event> {
    vec![
        vm(vm::Event::Jailed),
        vm(vm::Event::Started),
        vm(vm::Event::ConsoleStarted),
        vm(vm::Event::Doorbell),
        frozen(),
        vm(vm::Event::Thawed),
        status(vm::Phase::Idle),
        status(vm::Phase::Running),
        status(vm::Phase::Frozen),
        vm(vm::Event::Ended(vm::Ending::Reset)),
        Event::VmLost("closed"),
    ]
}

const ASKS: [Ask; 7] = [
    Ask::Snapshot,
    Ask::SnapshotDisk,
    Ask::Rollback,
    Ask::Pause,
    Ask::PauseToDisk,
    Ask::Resume,
    Ask::Boot,
];

/// What others do.
fn done_to_it() -> Vec<Event> {
    let mut events = vec![Event::TimeOver, Event::Evict, Event::Kill, Event::Drain];
    events.extend(ASKS.map(Event::Ask));
    events
}

/// What the work that an effect begins can end with; `None` for an effect that begins none.
fn outcomes(effect: &Effect) -> Option<Vec<Event>> {
    Some(match effect {
        Effect::Prepare => vec![Event::Prepared, Event::PrepareFailed(Cause::NoSpace)],
        Effect::Initialise => {
            vec![Event::InitDone, Event::InitFailed(Cause::Failed("no".to_owned()))]
        }
        Effect::Sync => vec![Event::Synced, Event::SyncFailed],
        Effect::Copy => vec![Event::Copied, Event::CopyFailed, Event::TooMuch],
        Effect::Precopy => vec![Event::Precopied, Event::CopyFailed],
        Effect::Replace => vec![Event::Copied, Event::CopyFailed, Event::ReplaceBroke],
        Effect::Commit => vec![Event::Committed, Event::CommitFailed],
        Effect::EndProcess => vec![Event::ProcessEnded],
        Effect::CleanUp => vec![Event::CleanedUp],
        _ => return None,
    })
}

/// Killed at the end of its time, with the daemon, keeping its memory, and restored.
const PLAIN: Terms =
    Terms { pause_at_end: false, outlives_daemon: false, disk_alone: false, up_by: UpBy::Started };

const TERMS: [Terms; 7] = [
    PLAIN,
    Terms { outlives_daemon: true, ..PLAIN },
    Terms { pause_at_end: true, ..PLAIN },
    Terms { pause_at_end: true, outlives_daemon: true, ..PLAIN },
    Terms { pause_at_end: true, disk_alone: true, ..PLAIN },
    Terms { outlives_daemon: true, disk_alone: true, up_by: UpBy::Doorbell, ..PLAIN },
    Terms { up_by: UpBy::Console, ..PLAIN },
];

/// A sandbox, and what a driver would know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct World {
    state: State,
    /// What the work at hand can end with.
    work: Option<Vec<Event>>,
    /// The request that was accepted and not answered.
    pending: Option<Ask>,
    announced: bool,
    cleaned: bool,
    left: bool,
    buried: bool,
}

impl World {
    fn new(state: State) -> Self {
        // The first effect of a create comes from its driver.
        let work =
            matches!(state, State::Starting(_)).then(|| outcomes(&Effect::Prepare)).flatten();
        let announced = !matches!(state, State::Starting(_));
        Self { state, work, pending: None, announced, cleaned: false, left: false, buried: false }
    }

    fn every_beginning() -> Vec<Self> {
        let paused = |process| State::Paused(process);
        [
            State::Starting(Birth::Create),
            State::Adopting,
            paused(Process::Asked),
            paused(Process::None),
        ]
        .map(Self::new)
        .to_vec()
    }

    /// Everything that can happen next.
    fn possible(&self) -> Vec<Event> {
        let mut events = said();
        events.extend(done_to_it());
        events.extend(self.work.clone().unwrap_or_default());
        events
    }

    /// Lets it happen, and checks what must hold at every single step.
    fn happens(&self, terms: Terms, event: &Event) -> Self {
        let (state, effects) = step(self.state.clone(), terms, event.clone());
        let mut next = Self { state, ..self.clone() };
        let tale = format!("{:?} + {event:?} = {:?} {effects:?}", self.state, next.state);
        if self.work.as_ref().is_some_and(|outcomes| outcomes.contains(event)) {
            next.work = None;
        }
        let refused = effects.iter().any(|effect| matches!(effect, Effect::Refuse(_)));
        if let Event::Ask(ask) = event {
            if refused {
                assert_eq!((effects.len(), &next.state), (1, &self.state), "{tale}");
            } else {
                assert_eq!(self.pending, None, "two at a time: {tale}");
                assert_ne!(next.state, self.state, "accepted, and nothing begins: {tale}");
                next.pending = Some(*ask);
            }
        } else {
            assert!(!refused, "{tale}");
        }
        for effect in &effects {
            next.performs(effect, &tale);
        }
        next.check(&tale);
        next
    }

    fn performs(&mut self, effect: &Effect, tale: &str) {
        let refuses = matches!(effect, Effect::Refuse(_));
        assert!(!self.buried || refuses, "after the burial: {tale}");
        if let Some(outcomes) = outcomes(effect) {
            // An end drops what is at hand; the end of a process waits for it.
            let may_be_busy = matches!(effect, Effect::CleanUp | Effect::EndProcess);
            assert!(self.work.is_none() || may_be_busy, "two works at a time: {tale}");
            self.work = Some(outcomes);
        }
        match effect {
            Effect::Answer => {
                // A pause at the end of its time has nobody who waits.
                let answers = !matches!(self.pending, Some(Ask::Resume | Ask::Boot));
                assert!(answers, "{tale}");
                self.pending = None;
            }
            Effect::AnswerFailure => self.pending = None,
            Effect::ShowResumed => {
                let pending = self.pending.take();
                assert!(matches!(pending, Some(Ask::Resume | Ask::Boot)), "{tale}");
            }
            Effect::Announce => {
                assert!(!std::mem::replace(&mut self.announced, true), "{tale}");
            }
            Effect::CleanUp => {
                assert!(!std::mem::replace(&mut self.cleaned, true), "{tale}");
            }
            Effect::Leave => self.left = true,
            Effect::Bury => {
                assert!(self.cleaned != self.left, "{tale}");
                self.buried = true;
                // Whoever still waits is told, and work that is at hand is dropped.
                (self.pending, self.work) = (None, None);
            }
            _ => {}
        }
    }

    fn check(&self, tale: &str) {
        assert_eq!(self.buried, matches!(self.state, State::Gone(_)), "{tale}");
        let settled = matches!(
            self.state,
            State::Running
                | State::Adopting
                | State::Paused(
                    Process::Frozen
                        | Process::None
                        | Process::Ending
                        | Process::Asked
                        | Process::Unwanted
                )
        );
        assert!(!settled || self.pending.is_none(), "never answered: {tale}");
        // Whatever is not at rest has work, a deadline, or somebody who answers until a deadline.
        let waits_for_work = matches!(
            self.state,
            State::Cancelling(_)
                | State::Stopping(_)
                | State::Paused(Process::Ending | Process::Returning | Process::Unwanted)
        );
        assert!(!waits_for_work || self.work.is_some(), "nothing will ever happen: {tale}");
        let quiet = !matches!(
            self.state,
            State::Starting(Birth::Create)
                | State::Restoring(Birth::Create)
                | State::Initialising(Birth::Create)
        );
        assert!(!quiet || self.announced || self.state.is_ending(), "{tale}");
    }

    /// Whether nothing is under way: it runs, waits, or is gone.
    fn is_at_rest(&self) -> bool {
        let rests = matches!(
            self.state,
            State::Running | State::Paused(Process::Frozen | Process::None) | State::Gone(_)
        );
        rests && self.work.is_none()
    }

    fn key(&self) -> String {
        format!("{self:?}")
    }
}

/// Every world that can be reached, with what happens in it.
fn reachable(terms: Terms) -> BTreeMap<String, World> {
    let mut found = BTreeMap::new();
    let mut open: VecDeque<World> = World::every_beginning().into();
    while let Some(world) = open.pop_front() {
        if found.insert(world.key(), world.clone()).is_none() {
            open.extend(world.possible().iter().map(|event| world.happens(terms, event)));
        }
    }
    found
}

#[test]
fn what_must_hold_holds_after_everything_that_can_happen() {
    for terms in TERMS {
        // The checks are in every step of the walk.
        let found = reachable(terms);
        assert!(found.len() > 60, "the walk got nowhere: {}", found.len());
        let seen = |wanted: &State| found.values().any(|world| world.state == *wanted);
        for state in [
            State::RollingBack(Step::Thawing(Outcome::Failed)),
            State::Pausing(Step::Precopying),
            State::Pausing(Step::Syncing),
            State::Snapshotting(Step::Finishing),
            State::Paused(Process::Unwanted),
            State::Initialising(Birth::Rollback),
        ] {
            assert!(seen(&state), "{state:?} was not reached with {terms:?}");
        }
    }
}

#[test]
fn from_everywhere_it_comes_to_rest_when_the_vm_process_says_nothing_any_more() {
    for terms in TERMS {
        for world in reachable(terms).values() {
            rest(terms, world, 0);
        }
    }
}

/// With the end of work and of time alone, whichever way the work ends.
fn rest(terms: Terms, world: &World, depth: usize) {
    if world.is_at_rest() {
        return;
    }
    assert!(depth < 12, "no rest: {world:?}");
    match &world.work {
        Some(outcomes) => {
            for event in outcomes {
                rest(terms, &world.happens(terms, event), depth + 1);
            }
        }
        None => rest(terms, &world.happens(terms, &Event::TimeOver), depth + 1),
    }
}

#[test]
fn from_everywhere_it_can_be_killed() {
    for terms in TERMS {
        for world in reachable(terms).values() {
            let mut world = world.happens(terms, &Event::Kill);
            while let Some(outcomes) = world.work.clone() {
                world = world.happens(terms, &outcomes[0]);
            }
            assert!(matches!(world.state, State::Gone(_)), "{world:?}");
        }
    }
}

#[test]
fn a_drain_ends_or_leaves_everything_and_never_loses_what_is_on_disk() {
    for terms in TERMS {
        for before in reachable(terms).values() {
            let mut world = before.happens(terms, &Event::Drain);
            let on_disk = matches!(
                before.state,
                State::Paused(_)
                    | State::Starting(Birth::Resume)
                    | State::Restoring(Birth::Resume)
                    | State::Initialising(Birth::Resume)
            );
            if on_disk {
                assert!(world.left && !world.cleaned, "{before:?}");
            }
            if terms.outlives_daemon && before.announced && !before.state.is_ending() {
                assert!(world.left && !world.cleaned, "{before:?}");
            }
            while !matches!(world.state, State::Gone(_)) {
                let outcomes = world.work.clone().expect("an end needs work");
                world = world.happens(terms, &outcomes[0]);
            }
        }
    }
}

#[test]
fn a_paused_sandbox_survives_whatever_its_process_does() {
    for terms in TERMS {
        let on_disk = |state: &State| {
            matches!(
                state,
                State::Paused(_)
                    | State::Starting(Birth::Resume)
                    | State::Restoring(Birth::Resume)
                    | State::Initialising(Birth::Resume)
            )
        };
        for world in reachable(terms).values().filter(|world| on_disk(&world.state)) {
            let ours = world.work.clone().unwrap_or_default();
            for event in said().iter().chain(&ours).chain([&Event::TimeOver, &Event::Evict]) {
                let next = world.happens(terms, event).state;
                assert!(
                    on_disk(&next) || next == State::Running,
                    "{world:?} + {event:?} = {next:?}"
                );
            }
        }
    }
}

fn any_event() -> impl Strategy<Value = Event> {
    let mut events = said();
    events.extend(done_to_it());
    for effect in [
        Effect::Prepare,
        Effect::Initialise,
        Effect::Sync,
        Effect::Copy,
        Effect::Precopy,
        Effect::Replace,
        Effect::Commit,
        Effect::EndProcess,
        Effect::CleanUp,
    ] {
        events.extend(outcomes(&effect).unwrap());
    }
    prop::sample::select(events)
}

fn any_terms() -> impl Strategy<Value = Terms> {
    prop::sample::select(TERMS.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Even events that cannot be: a machine that is told nonsense does not panic, keeps its first
    /// cause, and is buried once.
    #[test]
    fn the_first_cause_stays_and_nothing_leaves_gone(
        terms in any_terms(), events in prop::collection::vec(any_event(), 0..60),
    ) {
        let mut state = State::Starting(Birth::Create);
        let (mut first, mut burials): (Option<Cause>, usize) = (None, 0);
        for event in events {
            let was_gone = matches!(state, State::Gone(_));
            let asks = matches!(event, Event::Ask(_));
            let effects = state.advance(terms, event);
            let cause = match &state {
                State::Cancelling(c) | State::Stopping(c) | State::Gone(c) => Some(c.clone()),
                _ => None,
            };
            if first.is_some() {
                prop_assert_eq!(&cause, &first);
            }
            first = cause.or(first);
            burials += effects.iter().filter(|effect| **effect == Effect::Bury).count();
            if was_gone {
                let refused = vec![Effect::Refuse(Refusal::Gone)];
                prop_assert_eq!(effects, if asks { refused } else { vec![] });
            }
        }
        prop_assert_eq!(burials, usize::from(matches!(state, State::Gone(_))));
    }
}
