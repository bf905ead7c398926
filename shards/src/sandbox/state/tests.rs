//! What holds for every life of a sandbox, and a few lives told in full.
//!
//! Run by `cargo test`. The generator sends any event at any time, as a hostile VM process could.

use proptest::prelude::*;

use super::*;

fn life(ready: Ready, events: &[Event]) -> (State, Vec<Effect>) {
    let mut state = State::Starting;
    let mut effects = Vec::new();
    for event in events {
        effects.extend(state.advance(ready, event.clone()));
    }
    (state, effects)
}

fn vm(event: vm::Event) -> Event {
    Event::Vm(event)
}

#[test]
fn an_agent_template_comes_up_and_is_killed() {
    let up = [
        Event::Prepared,
        vm(vm::Event::Jailed),
        vm(vm::Event::Started),
        vm(vm::Event::ConsoleStarted),
        vm(vm::Event::Doorbell),
        Event::InitDone,
    ];
    let (state, effects) = life(Ready::Agent, &up);
    assert_eq!(state, State::Running);
    assert_eq!(effects, [Effect::SendBoot, Effect::Initialise, Effect::Announce]);
    let down: Vec<Event> =
        up.into_iter().chain([Event::Kill, Event::Kill, Event::CleanedUp]).collect();
    let (state, effects) = life(Ready::Agent, &down);
    assert_eq!(state, State::Gone(Cause::Killed));
    assert_eq!(effects[3..], [Effect::CleanUp, Effect::Bury]);
}

#[test]
fn a_console_template_is_up_at_its_first_byte() {
    let events = [
        Event::Prepared,
        vm(vm::Event::Jailed),
        vm(vm::Event::ConsoleStarted),
        vm(vm::Event::Started),
    ];
    assert_eq!(life(Ready::Console, &events).0, State::Running);
    assert_eq!(life(Ready::Agent, &events).0, State::Booting);
}

#[test]
fn a_kill_while_starting_waits_for_what_is_being_made() {
    let (state, effects) = life(Ready::Agent, &[Event::Kill, Event::TimeOver]);
    assert_eq!((state, effects), (State::Cancelling(Cause::Killed), vec![]));
    let (state, effects) = life(Ready::Agent, &[Event::Kill, Event::Prepared]);
    assert_eq!((state, effects), (State::Stopping(Cause::Killed), vec![Effect::CleanUp]));
}

#[test]
fn a_deadline_names_the_step() {
    let events = [Event::Prepared, vm(vm::Event::Jailed), Event::TimeOver];
    let cause = Cause::BootTimedOut("waiting for the guest to boot");
    assert_eq!(life(Ready::Agent, &events).0, State::Stopping(cause));
}

#[test]
fn text_of_a_vm_process_is_bounded_and_harmless() {
    let text = format!("\x1b[31m{}", "x".repeat(9_000));
    let how = ended_how(vm::Ending::Internal(text));
    assert_eq!(how.len(), "the VM process failed: ".len() + ENDING_CHARS_MAX);
    assert!(!how.contains('\x1b'));
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Prepared),
        Just(Event::PrepareFailed(Cause::NoSuchTemplate)),
        Just(vm(vm::Event::Jailed)),
        Just(vm(vm::Event::Started)),
        Just(vm(vm::Event::ConsoleStarted)),
        Just(vm(vm::Event::Doorbell)),
        Just(vm(vm::Event::Ended(vm::Ending::Reset))),
        Just(Event::VmLost("closed")),
        Just(Event::InitDone),
        Just(Event::InitFailed("no".to_owned())),
        Just(Event::TimeOver),
        Just(Event::Kill),
        Just(Event::Drain),
        Just(Event::CleanedUp),
    ]
}

fn any_ready() -> impl Strategy<Value = Ready> {
    prop_oneof![Just(Ready::Agent), Just(Ready::Console)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn effects_come_once_and_in_order(
        ready in any_ready(), events in prop::collection::vec(any_event(), 0..40),
    ) {
        let order = [
            Effect::SendBoot, Effect::Initialise, Effect::Announce, Effect::CleanUp, Effect::Bury,
        ];
        let (state, effects) = life(ready, &events);
        let places: Vec<usize> =
            effects.iter().map(|e| order.iter().position(|o| o == e).unwrap()).collect();
        prop_assert!(places.windows(2).all(|w| w[0] < w[1]), "{effects:?}");
        prop_assert_eq!(effects.contains(&Effect::Bury), matches!(state, State::Gone(_)));
        if effects.contains(&Effect::Bury) {
            prop_assert!(effects.contains(&Effect::CleanUp));
        }
        if effects.contains(&Effect::Announce) {
            prop_assert!(effects.contains(&Effect::SendBoot));
        }
    }

    #[test]
    fn the_first_cause_stays_and_nothing_leaves_gone(
        ready in any_ready(), events in prop::collection::vec(any_event(), 0..40),
    ) {
        let mut state = State::Starting;
        let mut first: Option<Cause> = None;
        for event in events {
            let was_gone = matches!(state, State::Gone(_));
            let effects = state.advance(ready, event);
            let cause = match &state {
                State::Cancelling(c) | State::Stopping(c) | State::Gone(c) => Some(c.clone()),
                _ => None,
            };
            if first.is_some() {
                prop_assert_eq!(&cause, &first);
            }
            first = cause.or(first);
            prop_assert!(!was_gone || effects.is_empty());
        }
    }

    #[test]
    fn every_life_can_be_ended(
        ready in any_ready(), mut events in prop::collection::vec(any_event(), 0..40),
    ) {
        events.extend([Event::Kill, Event::Prepared, Event::CleanedUp]);
        prop_assert!(matches!(life(ready, &events).0, State::Gone(_)));
    }
}
