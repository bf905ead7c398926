//! A few lives told in full, and the words for what a sandbox does.
//!
//! Run by `cargo test`.

use super::*;

const TERMS: Terms = Terms { outlives_daemon: true, ..PLAIN };

fn life(mut state: State, terms: Terms, events: &[Event]) -> (State, Vec<Effect>) {
    let mut effects = Vec::new();
    for event in events {
        effects.extend(state.advance(terms, event.clone()));
    }
    (state, effects)
}

#[test]
fn it_comes_up_and_is_killed() {
    let up =
        [Event::Prepared, vm(vm::Event::Started), vm(vm::Event::ConsoleStarted), Event::InitDone];
    let (state, effects) = life(State::Starting(Birth::Create), TERMS, &up);
    assert_eq!(state, State::Running);
    assert_eq!(effects, [Effect::SendRestore, Effect::Initialise, Effect::Announce]);
    let down = [Event::Kill, Event::Kill, Event::CleanedUp];
    let (state, effects) = life(state, TERMS, &down);
    assert_eq!(state, State::Gone(Cause::Killed));
    assert_eq!(effects, [Effect::CleanUp, Effect::Bury]);
}

#[test]
fn a_kill_while_starting_waits_for_what_is_being_made() {
    let start = State::Starting(Birth::Create);
    let (state, effects) = life(start.clone(), TERMS, &[Event::Kill, Event::TimeOver]);
    assert_eq!((state, effects), (State::Cancelling(Cause::Killed), vec![]));
    let (state, effects) = life(start, TERMS, &[Event::Kill, Event::Prepared]);
    assert_eq!((state, effects), (State::Stopping(Cause::Killed), vec![Effect::CleanUp]));
}

#[test]
fn a_deadline_names_the_step() {
    let events = [Event::Prepared, Event::TimeOver];
    let (state, _) = life(State::Starting(Birth::Create), TERMS, &events);
    let cause = Cause::TimedOut("waiting for its VM process to bring the guest up");
    assert_eq!(state, State::Stopping(cause));
}

#[test]
fn a_snapshot_lets_the_guest_go_on_before_it_is_on_the_device() {
    let asked = [Event::Ask(Ask::Snapshot), frozen(), Event::Copied];
    let (state, effects) = life(State::Running, TERMS, &asked);
    assert_eq!(state, State::Snapshotting(Step::Committing));
    assert_eq!(effects, [Effect::Freeze, Effect::Copy, Effect::Thaw, Effect::Commit]);
    assert!(state.takes_streams());
    for order in
        [[vm(vm::Event::Thawed), Event::Committed], [Event::Committed, vm(vm::Event::Thawed)]]
    {
        // Told when both are over: what it asks for next finds the sandbox ready.
        let (between, effects) = life(state.clone(), TERMS, &order[..1]);
        assert_eq!(effects, []);
        let (state, effects) = life(between, TERMS, &order[1..]);
        assert_eq!((state, effects), (State::Running, vec![Effect::Answer]));
    }
    // What is on the device is told of, whatever becomes of the guest.
    for end in [Event::Kill, Event::VmLost("closed"), Event::TimeOver] {
        let (state, effects) = life(state.clone(), TERMS, &[Event::Committed, end]);
        assert!(matches!(state, State::Stopping(_)), "{state:?}");
        assert_eq!(effects, [Effect::Answer, Effect::CleanUp]);
    }
}

#[test]
fn a_guest_that_wrote_much_goes_on_while_it_is_copied() {
    let events = [
        Event::Ask(Ask::Pause),
        frozen(),
        Event::TooMuch,
        vm(vm::Event::Thawed),
        Event::Precopied,
        frozen(),
        Event::Copied,
        Event::Committed,
    ];
    let (state, effects) = life(State::Running, TERMS, &events);
    assert_eq!(state, State::Paused(Process::Frozen));
    let expected = [
        Effect::Freeze,
        Effect::Copy,
        Effect::Thaw,
        Effect::Precopy,
        Effect::Freeze,
        Effect::Copy,
        Effect::Commit,
        Effect::ShowPaused,
        Effect::Answer,
    ];
    assert_eq!(effects, expected);
}

#[test]
fn an_evicted_one_is_resumed_from_disk_and_a_frozen_one_by_a_word() {
    let evicted = [Event::Evict, Event::ProcessEnded, Event::Ask(Ask::Resume), Event::Prepared];
    let (state, effects) = life(State::Paused(Process::Frozen), TERMS, &evicted);
    assert_eq!(state, State::Restoring(Birth::Resume));
    assert_eq!(effects, [Effect::EndProcess, Effect::Prepare, Effect::SendRestore]);
    let hurried = [Event::Evict, Event::Ask(Ask::Resume), Event::ProcessEnded];
    let (state, effects) = life(State::Paused(Process::Frozen), TERMS, &hurried);
    assert_eq!(state, State::Starting(Birth::Resume), "it waits for the process's end");
    assert_eq!(effects, [Effect::EndProcess, Effect::Prepare]);
    let thawed = [Event::Ask(Ask::Resume), vm(vm::Event::Thawed), Event::InitDone];
    let (state, effects) = life(State::Paused(Process::Frozen), TERMS, &thawed);
    assert_eq!(state, State::Running);
    assert_eq!(effects, [Effect::Thaw, Effect::Initialise, Effect::ShowResumed]);
}

#[test]
fn the_end_of_its_time_kills_or_pauses() {
    let (state, _) = life(State::Running, TERMS, &[Event::TimeOver]);
    assert_eq!(state, State::Stopping(Cause::Expired));
    let terms = Terms { pause_at_end: true, ..TERMS };
    let (state, effects) = life(State::Running, terms, &[Event::TimeOver]);
    assert_eq!((state, effects), (State::Pausing(Step::Freezing), vec![Effect::Freeze]));
}

#[test]
fn a_pause_without_memory_is_synced_first_and_has_no_process() {
    let terms = Terms { pause_at_end: true, disk_alone: true, ..TERMS };
    for begin in [Event::Ask(Ask::PauseToDisk), Event::TimeOver] {
        let (state, effects) = life(State::Running, terms, std::slice::from_ref(&begin));
        assert_eq!((state, effects), (State::Pausing(Step::Syncing), vec![Effect::Sync]));
        let events = [begin, Event::Synced, frozen(), Event::Copied, Event::Committed];
        let (state, effects) = life(State::Running, terms, &events);
        assert_eq!(state, State::Paused(Process::Ending));
        let expected = [
            Effect::Sync,
            Effect::Freeze,
            Effect::Copy,
            Effect::Commit,
            Effect::ShowPaused,
            Effect::Answer,
            Effect::EndProcess,
        ];
        assert_eq!(effects, expected);
    }
}

#[test]
fn a_guest_that_boots_is_up_when_its_agent_listens() {
    let (started, bell) = (vm(vm::Event::Started), vm(vm::Event::Doorbell));
    let console = vm(vm::Event::ConsoleStarted);
    let booting = |up_by, events: &[Event]| {
        life(State::Restoring(Birth::Resume), Terms { up_by, ..TERMS }, events).0
    };
    let quiet = [started.clone(), console.clone()];
    assert_eq!(booting(UpBy::Doorbell, &quiet), State::Restoring(Birth::Resume));
    let up = [started.clone(), console.clone(), bell];
    assert_eq!(booting(UpBy::Doorbell, &up), State::Initialising(Birth::Resume));
    for order in [[started.clone(), console.clone()], [console, started]] {
        assert_eq!(booting(UpBy::Console, &order), State::Initialising(Birth::Resume));
    }
    // One that does not come up is on disk still.
    let late = booting(UpBy::Doorbell, &[vm(vm::Event::Started), Event::TimeOver]);
    assert_eq!(late, State::Paused(Process::Ending));
}

#[test]
fn a_boot_ends_the_process_that_remembers() {
    let events = [Event::Ask(Ask::Boot), Event::ProcessEnded];
    let (state, effects) = life(State::Paused(Process::Frozen), TERMS, &events);
    assert_eq!(state, State::Starting(Birth::Resume));
    assert_eq!(effects, [Effect::EndProcess, Effect::Prepare]);
}

#[test]
fn what_was_found_frozen_goes_on_unless_it_is_paused() {
    let (state, effects) =
        life(State::Adopting, TERMS, &[frozen(), status(vm::Phase::Frozen), vm(vm::Event::Thawed)]);
    assert_eq!((state, effects), (State::Running, vec![Effect::Thaw]));
    let asked = State::Paused(Process::Asked);
    let (state, effects) = life(asked.clone(), TERMS, &[status(vm::Phase::Frozen)]);
    assert_eq!((state, effects), (State::Paused(Process::Frozen), vec![]));
    // A resume had begun, and nobody was told: it goes back to what is on disk.
    let (state, effects) = life(asked, TERMS, &[status(vm::Phase::Running)]);
    assert_eq!((state, effects), (State::Paused(Process::Ending), vec![Effect::EndProcess]));
}

#[test]
fn refusals_say_what_is_in_the_way() {
    let of = |state: State, ask| match step(state, TERMS, Event::Ask(ask)).1[..] {
        [Effect::Refuse(refusal)] => refusal,
        ref other => panic!("{other:?}"),
    };
    assert_eq!(of(State::Running, Ask::Resume), Refusal::AlreadyRunning);
    for process in [Process::Frozen, Process::None, Process::Ending, Process::Unwanted] {
        assert_eq!(of(State::Paused(process), Ask::Pause), Refusal::AlreadyPaused);
        assert_eq!(of(State::Paused(process), Ask::Snapshot), Refusal::IsPaused);
        assert_eq!(of(State::Paused(process), Ask::Rollback), Refusal::IsPaused);
    }
    let unwanted = of(State::Paused(Process::Unwanted), Ask::Resume);
    assert_eq!(unwanted, Refusal::Busy("its memory is being given back"));
    for birth in [State::Starting, State::Restoring, State::Initialising] {
        assert_eq!(of(birth(Birth::Create), Ask::Pause), Refusal::Gone, "nobody knows it yet");
        assert_eq!(of(birth(Birth::Resume), Ask::Pause), Refusal::Busy("it is being resumed"));
    }
    for ended in [State::Cancelling, State::Stopping, State::Gone] {
        assert_eq!(of(ended(Cause::Killed), Ask::Resume), Refusal::Gone);
    }
    for (state, expected) in [
        (State::Adopting, "the daemon has just started and takes it over"),
        (State::Paused(Process::Asked), "the daemon has just started and takes it over"),
        (State::Snapshotting(Step::Copying), "a snapshot of it is being made"),
        (State::Pausing(Step::Committing), "it is being paused"),
        (State::Paused(Process::Returning), "it is being resumed"),
        (State::Paused(Process::Thawing), "it is being resumed"),
        (State::RollingBack(Step::Freezing), "it is being rolled back"),
        (State::Restoring(Birth::Rollback), "it is being rolled back"),
        (State::Initialising(Birth::Rollback), "it is being rolled back"),
    ] {
        for ask in ASKS {
            assert_eq!(of(state.clone(), ask), Refusal::Busy(expected), "{state:?}");
        }
    }
}

#[test]
fn what_it_does_has_words_in_every_state() {
    for terms in super::TERMS {
        for world in reachable(terms).values() {
            let words = doing(&world.state);
            assert!(words.len() > 6 && !words.ends_with('.'), "{words:?} in a sentence");
        }
    }
    assert_eq!(doing(&State::Running), "it runs");
    assert_eq!(doing(&State::Paused(Process::None)), "it is paused");
    assert_eq!(doing(&State::Stopping(Cause::Killed)), "it ends");
}

#[test]
fn text_of_a_vm_process_is_bounded_and_harmless() {
    let text = format!("\x1b[31m{}", "x".repeat(9_000));
    let how = ended_how(vm::Ending::Internal(text));
    assert_eq!(how.len(), "the VM process failed: ".len() + refusal::ENDING_CHARS_MAX);
    assert!(!how.contains('\x1b'));
}
