//! Two requests on one sandbox, in every order that they and everything else can come in.
//!
//! Run by `cargo test`. The VM process answers each command, or dies, or says nothing until time is over;
//! each piece of work ends in every way it can; the second request comes at every moment between. Refuses
//! a command to a VM process that has not answered the one before.

use std::collections::BTreeSet;

use super::*;

const TERMS: Terms = PLAIN;

/// The sandbox, and the VM process opposite.
#[derive(Clone, Debug)]
struct Scene {
    world: World,
    /// What the VM process owes.
    owed: Option<Event>,
    /// The requests that have not come yet.
    to_come: Vec<Event>,
    /// How many operations began while another was at hand: none may.
    begun: usize,
    refused: usize,
}

impl Scene {
    fn happens(&self, event: &Event) -> Self {
        let mut next = self.clone();
        let (_, effects) = step(self.world.state.clone(), TERMS, event.clone());
        next.world = self.world.happens(TERMS, event);
        if self.owed.as_ref() == Some(event) || matches!(event, Event::VmLost(_)) {
            next.owed = None;
        }
        for effect in &effects {
            let answer = match effect {
                Effect::Freeze => frozen(),
                Effect::Thaw => vm(vm::Event::Thawed),
                Effect::SendRestore => vm(vm::Event::Started),
                Effect::CleanUp | Effect::EndProcess => {
                    next.owed = None;
                    continue;
                }
                Effect::Refuse(_) => {
                    next.refused += 1;
                    continue;
                }
                _ => continue,
            };
            assert_eq!(next.owed, None, "a command before the answer to the last one: {self:?}");
            next.owed = Some(answer);
        }
        if matches!(event, Event::Ask(_))
            && next.world.pending.is_some()
            && next.refused == self.refused
        {
            next.begun += 1;
        }
        next
    }

    /// Everything that can come next.
    fn next(&self) -> Vec<Self> {
        let mut all = Vec::new();
        if let Some(owed) = &self.owed {
            all.extend(
                [owed.clone(), Event::VmLost("closed"), Event::TimeOver].map(|e| self.happens(&e)),
            );
        }
        for event in self.world.work.iter().flatten() {
            all.push(self.happens(event));
        }
        if let Some((event, rest)) = self.to_come.split_first() {
            let scene = Self { to_come: rest.to_vec(), ..self.clone() };
            all.push(scene.arrives(event));
        }
        all
    }

    /// A request comes: it begins if nothing else is at hand, and is refused if something is.
    fn arrives(&self, event: &Event) -> Self {
        let busy = self.world.pending;
        let next = self.happens(event);
        match event {
            Event::Ask(_) if busy.is_some() => {
                assert_eq!(next.refused, self.refused + 1, "two at a time: {self:?} + {event:?}");
                assert_eq!(next.world, self.world, "a refusal changes nothing");
            }
            Event::Ask(ask) => {
                let fits = match &self.world.state {
                    State::Running => !matches!(ask, Ask::Resume | Ask::Boot),
                    State::Paused(Process::Frozen | Process::None | Process::Ending) => {
                        matches!(ask, Ask::Resume | Ask::Boot)
                    }
                    _ => false,
                };
                assert_eq!(next.refused == self.refused, fits, "{self:?} + {event:?}");
            }
            Event::Kill => assert!(next.world.state.is_ending() || next.world.buried, "{next:?}"),
            other => panic!("{other:?} is no request"),
        }
        next
    }

    fn is_over(&self) -> bool {
        self.to_come.is_empty() && self.world.is_at_rest() && self.owed.is_none()
    }
}

/// Walks every order from here; the states it can end in.
fn walk(first: Scene) -> BTreeSet<String> {
    let (mut seen, mut ends) = (BTreeSet::new(), BTreeSet::new());
    let mut open = vec![first];
    while let Some(scene) = open.pop() {
        if !seen.insert(format!("{scene:?}")) {
            continue;
        }
        let next = scene.next();
        if scene.is_over() {
            assert_eq!(scene.world.pending, None);
            ends.insert(match &scene.world.state {
                State::Gone(_) => "Gone".to_owned(),
                other => format!("{other:?}"),
            });
        } else {
            assert!(!next.is_empty(), "nothing can happen any more: {scene:?}");
        }
        open.extend(next);
    }
    ends
}

fn begin(state: State, requests: [Event; 2]) -> Scene {
    Scene { world: World::new(state), owed: None, to_come: requests.to_vec(), begun: 0, refused: 0 }
}

fn requests() -> Vec<Event> {
    let mut requests: Vec<Event> = ASKS.map(Event::Ask).to_vec();
    requests.push(Event::Kill);
    requests
}

#[test]
fn of_two_requests_one_begins_and_it_ends_running_paused_or_gone() {
    let at_rest = ["Running", "Paused(Frozen)", "Paused(None)", "Gone"].map(str::to_owned);
    for state in [State::Running, State::Paused(Process::Frozen), State::Paused(Process::None)] {
        for first in requests() {
            for second in requests() {
                let ends = walk(begin(state.clone(), [first.clone(), second.clone()]));
                assert!(ends.iter().all(|end| at_rest.contains(end)), "{ends:?}");
                let killed = [&first, &second].contains(&&Event::Kill);
                if killed {
                    assert_eq!(ends, BTreeSet::from(["Gone".to_owned()]), "{first:?}, {second:?}");
                } else {
                    assert!(ends.len() > 1 || ends.contains("Running") || !ends.contains("Gone"));
                }
            }
        }
    }
}

#[test]
fn a_vm_process_that_behaves_loses_no_sandbox() {
    // No deaths, no silence, and no work that fails: what was asked for happens.
    for (state, ask, end) in [
        (State::Running, Ask::Snapshot, State::Running),
        (State::Running, Ask::SnapshotDisk, State::Running),
        (State::Running, Ask::Rollback, State::Running),
        (State::Running, Ask::Pause, State::Paused(Process::Frozen)),
        (State::Paused(Process::Frozen), Ask::Resume, State::Running),
        (State::Paused(Process::None), Ask::Resume, State::Running),
        (State::Running, Ask::PauseToDisk, State::Paused(Process::Frozen)),
        (State::Paused(Process::Frozen), Ask::Boot, State::Running),
        (State::Paused(Process::None), Ask::Boot, State::Running),
    ] {
        let mut scene = begin(state, [Event::Ask(ask), Event::Ask(ask)]);
        scene.to_come.truncate(1);
        let event = scene.to_come.remove(0);
        scene = scene.arrives(&event);
        while !scene.is_over() {
            let worked = scene.world.work.as_ref().map(|outcomes| outcomes[0].clone());
            let event = scene.owed.clone().or(worked).expect("something is under way");
            scene = scene.happens(&event);
        }
        assert_eq!(scene.world.state, end, "{ask:?}");
        assert_eq!((scene.begun, scene.refused), (1, 0));
    }
}

#[test]
fn work_that_fails_leaves_the_sandbox_as_it_was() {
    // A capture or a rollback that cannot be done, with a VM process that behaves.
    for (ask, failing) in [
        (Ask::Snapshot, Event::CopyFailed),
        (Ask::Snapshot, Event::CommitFailed),
        (Ask::SnapshotDisk, Event::SyncFailed),
        (Ask::SnapshotDisk, Event::CopyFailed),
        (Ask::SnapshotDisk, Event::CommitFailed),
        (Ask::Pause, Event::CopyFailed),
        (Ask::Pause, Event::CommitFailed),
        (Ask::PauseToDisk, Event::SyncFailed),
        (Ask::PauseToDisk, Event::CopyFailed),
        (Ask::PauseToDisk, Event::CommitFailed),
        (Ask::Rollback, Event::CopyFailed),
    ] {
        let mut scene = begin(State::Running, [Event::Ask(ask), Event::Kill]);
        scene.to_come.clear();
        scene = scene.arrives(&Event::Ask(ask));
        while !scene.is_over() {
            let work = scene.world.work.clone().unwrap_or_default();
            let fails = work.iter().find(|outcome| **outcome == failing).or(work.first()).cloned();
            let event = scene.owed.clone().or(fails).expect("something is under way");
            scene = scene.happens(&event);
        }
        assert_eq!(scene.world.state, State::Running, "{ask:?} with {failing:?}");
    }
}
