//! Native KVM tests of freezing, thawing, restoring and rolling back a tiny guest.
//!
//! Run like `kvm_endings.rs`. The guest waits for its generation id to change and says `R` each time, so
//! a restore that works, registers and memory and all, can be heard.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod guests;

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::{PATIENCE, fresh_id, have_kvm, start};
use guests::{FRAMES, UNUSED, frozen, plan_of, restore, run, shell, stop, wait_for_text, waiting};
use mica_lab::one_vm::{OneVm, Restore, Shape, find_mica_vm, memfd_of};
use mica_lab::tiny_guest::GENERATION_ID;
use mica_units::PAGE_BYTES;
use mica_vmm::state::VmState;
use mica_wire::vm::plan::Source;
use mica_wire::vm::{Command, Ending, Event, Phase};

#[test]
fn a_guest_goes_on_in_other_shells() {
    if !have_kvm() {
        return;
    }
    for vcpus in [1, 2, 8] {
        let boot = waiting(vcpus);
        let (vm, saved, layer, plan) = frozen(&boot);
        stop(vm);
        // Twice from the same layer: nothing that one writes reaches the other.
        for generation in [7, 8] {
            let vm = shell(&boot.shape());
            vm.send_restore(&restore(&saved, &layer, &plan, generation)).unwrap();
            vm.expect(&Event::Started, PATIENCE).unwrap();
            vm.expect(&Event::ConsoleStarted, PATIENCE).unwrap();
            wait_for_text(&vm, "R");
            let page = usize::try_from(GENERATION_ID % PAGE_BYTES).unwrap();
            let frame = u32::try_from(GENERATION_ID / PAGE_BYTES).unwrap();
            assert_eq!(vm.frames(frame, 1).unwrap()[page..page + 16], [generation; 16]);
            stop(vm);
        }
    }
}

#[test]
fn a_guest_goes_on_with_its_disk_and_with_no_other() {
    if !have_kvm() {
        return;
    }
    let mut boot = waiting(1);
    boot.disk = Some(memfd_of("disk", &[0; 8192]).unwrap());
    let (vm, saved, layer, plan) = frozen(&boot);
    stop(vm);
    let clone = memfd_of("clone", &[0; 8192]).unwrap();
    let longer = memfd_of("longer", &[0; 16384]).unwrap();
    let good = || restore(&saved, &layer, &plan, 1);
    let with = |disk| Restore { disk, ..good() };
    assert_eq!(outcome(&boot.shape(), &with(Some(clone.as_fd()))), Some(Event::Started));
    for (name, disk) in [("longer", Some(longer.as_fd())), ("none", None)] {
        let event = outcome(&boot.shape(), &with(disk));
        assert!(matches!(event, Some(Event::Ended(Ending::BadConfig(_)))), "{name}: {event:?}");
    }
    // A rollback keeps the disk it has, and takes no other.
    let (vm, saved, layer, plan) = frozen(&boot);
    vm.send_restore(&restore(&saved, &layer, &plan, 1)).unwrap();
    vm.expect(&Event::Started, PATIENCE).unwrap();
    wait_for_text(&vm, "upR");
    vm.freeze(PATIENCE).unwrap();
    let another = Restore { disk: Some(clone.as_fd()), ..restore(&saved, &layer, &plan, 2) };
    vm.send_restore(&another).unwrap();
    let event = vm.next_event(PATIENCE).unwrap();
    assert!(matches!(event, Some(Event::Ended(Ending::BadConfig(_)))), "{event:?}");
}

#[test]
fn a_frozen_guest_stands_still_and_goes_on_when_thawed() {
    if !have_kvm() {
        return;
    }
    let (vm, first, ..) = frozen(&waiting(2));
    let memory = vm.memory().unwrap();
    let at = vm.shell().unwrap().memory_address + GENERATION_ID;
    for (round, text) in ["upR", "upRR", "upRRR"].into_iter().enumerate() {
        memory.write_all_at(&[u8::try_from(round).unwrap() + 1; 4], at).unwrap();
        // It would have said so at once.
        assert!(vm.next_event(Duration::from_millis(50)).is_err());
        assert_eq!(vm.console_text(), &text[..text.len() - 1]);
        vm.thaw(PATIENCE).unwrap();
        wait_for_text(&vm, text);
        let again = vm.freeze(PATIENCE).unwrap();
        assert_ne!(again, first, "its registers have changed");
    }
    stop(vm);
}

/// The guest's clock in seconds, and its time stamp counter in the same.
fn clocks(saved: &[u8]) -> (f64, f64) {
    let state = VmState::decode(saved).unwrap();
    let vcpu = &state.vcpus[0];
    let tsc = vcpu.msrs.iter().find(|msr| msr.index == 0x10).unwrap().value;
    let seconds = Duration::from_nanos(state.machine.clock_ns).as_secs_f64();
    (seconds, tsc as f64 / f64::from(vcpu.tsc_khz) / 1e3)
}

#[test]
fn the_guests_clocks_stand_still_while_it_does() {
    if !have_kvm() {
        return;
    }
    const PAUSE: Duration = Duration::from_millis(2500);
    /// Time that guest code may have run in between.
    const RUN: f64 = 1.4;
    let boot = waiting(2);
    let (vm, first, layer, plan) = frozen(&boot);
    let before = clocks(&first);
    let check = |saved: &[u8], what: &str| {
        let after = clocks(saved);
        assert!((0.0..RUN).contains(&(after.0 - before.0)), "{what}: {before:?} {after:?}");
        // Under PVM a guest reads the host's counter, and nobody can set that.
        if before.1 < 60.0 {
            assert!((0.0..RUN).contains(&(after.1 - before.1)), "{what}: {before:?} {after:?}");
        }
    };
    std::thread::sleep(PAUSE);
    vm.thaw(PATIENCE).unwrap();
    check(&vm.freeze(PATIENCE).unwrap(), "a thaw");
    std::thread::sleep(PAUSE);
    vm.send_restore(&restore(&first, &layer, &plan, 1)).unwrap();
    vm.expect(&Event::Started, PATIENCE).unwrap();
    check(&vm.freeze(PATIENCE).unwrap(), "a rollback");
    stop(vm);
    let vm = shell(&boot.shape());
    vm.send_restore(&restore(&first, &layer, &plan, 1)).unwrap();
    vm.expect(&Event::Started, PATIENCE).unwrap();
    check(&vm.freeze(PATIENCE).unwrap(), "a restore");
    stop(vm);
}

/// The extended state by its components, each written out. One that is in its initial state may be said
/// to be so instead (SDM volume 1, 13.4.2), and processors need not say the same each time.
fn components(state: &VmState, vcpu: usize) -> Vec<Vec<u8>> {
    let xsave = &state.vcpus[vcpu].xsave;
    let written = u64::from_le_bytes(xsave[512..520].try_into().unwrap());
    let part = |number: u32, range: std::ops::Range<usize>, initial: &[u8]| {
        let mut bytes = vec![0; range.len()];
        bytes[..initial.len()].copy_from_slice(initial);
        if written >> number & 1 == 1 {
            bytes.copy_from_slice(&xsave[range]);
        }
        bytes
    };
    // The control word of the FPU has a bit pattern of its own.
    let mut parts =
        vec![part(0, 0..24, &[0x7f, 0x03]), part(0, 32..160, &[]), part(1, 160..416, &[])];
    let of_xsave = state.cpuid.iter().filter(|leaf| leaf.function == 0xd && leaf.index > 1);
    for leaf in of_xsave {
        let [size, offset, ..] = leaf.registers.map(|register| register as usize);
        if size > 0 && offset > 0 && offset + size <= xsave.len() {
            parts.push(part(leaf.index, offset..offset + size, &[]));
        }
    }
    parts
}

#[test]
fn what_is_saved_is_what_was_restored() {
    if !have_kvm() {
        return;
    }
    let boot = waiting(2);
    let (vm, first, layer, plan) = frozen(&boot);
    stop(vm);
    let vm = shell(&boot.shape());
    // The id that the guest knows already, so that it goes on waiting where it is.
    vm.send_restore(&restore(&first, &layer, &plan, 0)).unwrap();
    vm.expect(&Event::Started, PATIENCE).unwrap();
    let again = vm.freeze(PATIENCE).unwrap();
    let [first, again] = [first, again].map(|saved| VmState::decode(&saved).unwrap());
    assert!(first.cpuid == again.cpuid && first.devices == again.devices);
    assert!(first.machine.chips[..2] == again.machine.chips[..2]);
    assert_eq!(components(&first, 0), components(&again, 0), "extended state of vCPU 0");
    for (number, (first, again)) in first.vcpus.iter().zip(&again.vcpus).enumerate() {
        let same = [
            ("sregs", first.sregs == again.sregs),
            ("xcrs", first.xcrs == again.xcrs),
            ("debugregs", first.debugregs == again.debugregs),
            ("run state", first.mp_state == again.mp_state),
        ];
        for (what, same) in same {
            assert!(same, "{what} of vCPU {number}");
        }
        let clocks = [0x10, 0x6e0];
        for (before, after) in first.msrs.iter().zip(&again.msrs) {
            assert!(clocks.contains(&before.index) || before == after, "{before:?} {after:?}");
        }
    }
    stop(vm);
}

/// A state in form with nonsense in it: refused, or a guest that is broken; never a VM process that
/// ends without a word.
#[test]
fn nonsense_in_a_good_state_harms_the_guest_at_most() {
    if !have_kvm() {
        return;
    }
    let boot = waiting(2);
    let (vm, saved, layer, plan) = frozen(&boot);
    stop(vm);
    let good = VmState::decode(&saved).unwrap();
    let mut seed = 1u64;
    let mut random = move |bound: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(seed >> 33).unwrap() % bound
    };
    let mut refused = 0;
    for round in 0..60 {
        let mut state = good.clone();
        let vcpu = &mut state.vcpus[0];
        let part: &mut [u8] = match round % 8 {
            0 => &mut vcpu.regs,
            1 => &mut vcpu.sregs,
            2 => &mut vcpu.xcrs,
            3 => &mut vcpu.lapic,
            4 => &mut vcpu.events,
            5 => &mut vcpu.xsave,
            6 => &mut state.machine.chips[2],
            _ => &mut vcpu.debugregs,
        };
        for _ in 0..=random(8) {
            let at = random(part.len());
            part[at] = u8::try_from(random(256)).unwrap();
        }
        let msr = random(state.vcpus[0].msrs.len());
        state.vcpus[0].msrs[msr].value ^= u64::from(round % 3 == 0) << random(64);
        let vm = shell(&boot.shape());
        let saved = state.encode().unwrap();
        vm.send_restore(&restore(&saved, &layer, &plan, 1)).unwrap();
        match vm.next_event(PATIENCE).unwrap() {
            Some(Event::Started) => {
                // It runs, or ends in whatever way a guest can.
                let frozen = vm.send(&Command::Freeze, &[]);
                let stopped = vm.send(&Command::Stop, &[]);
                let mut ended = None;
                while let Some(event) = vm.next_event(PATIENCE).unwrap() {
                    ended = Some(event);
                }
                let ended_well = matches!(ended, Some(Event::Ended(_)));
                assert!(ended_well, "round {round}: {ended:?} {frozen:?} {stopped:?}");
            }
            Some(Event::Ended(Ending::BadConfig(_))) => refused += 1,
            other => panic!("round {round}: {other:?}"),
        }
    }
    assert!(refused > 0, "KVM took everything");
}

#[test]
fn a_rollback_puts_registers_and_memory_back_and_keeps_the_process() {
    if !have_kvm() {
        return;
    }
    let (vm, saved, layer, whole) = frozen(&waiting(2));
    let memory = vm.memory().unwrap();
    let at = |frame: u32| vm.shell().unwrap().memory_address + u64::from(frame) * PAGE_BYTES;
    let before = vm.frames(0, FRAMES).unwrap();
    let code = u32::try_from(0x10_0000 / PAGE_BYTES).unwrap();
    for generation in 1..5u8 {
        // The guest's code among it: it could not go on if that stayed.
        for frame in [code, code + 1, UNUSED, UNUSED + 1, UNUSED + 3] {
            memory.write_all_at(&[generation; 4096], at(frame)).unwrap();
        }
        let plan = match generation {
            1 => whole.clone(),
            2 => plan_of(&[
                (run(code, 2), Source::Copy { layer: 0, page: code }),
                (run(UNUSED, 4), Source::Copy { layer: 0, page: UNUSED }),
            ]),
            3 => plan_of(&[
                (run(code, 2), Source::Drop),
                (run(UNUSED, 2), Source::Drop),
                (run(UNUSED + 3, 1), Source::Zero),
            ]),
            _ => plan_of(&[
                (run(UNUSED, 4), Source::Zero),
                (run(code, 1), Source::Drop),
                (run(code + 1, 1), Source::Map { layer: 0, page: code + 1 }),
            ]),
        };
        vm.send_restore(&restore(&saved, &layer, &plan, generation)).unwrap();
        vm.expect(&Event::Started, PATIENCE).unwrap();
        wait_for_text(&vm, &format!("up{}", "R".repeat(usize::from(generation))));
        vm.freeze(PATIENCE).unwrap();
        let after = vm.frames(0, FRAMES).unwrap();
        let differs: Vec<_> = (0..FRAMES as usize)
            .filter(|frame| before[frame * 4096..][..4096] != after[frame * 4096..][..4096])
            .collect();
        let id = usize::try_from(GENERATION_ID / PAGE_BYTES).unwrap();
        assert_eq!(differs, [id], "generation {generation}");
    }
    stop(vm);
}

/// What becomes of a shell that is sent this.
fn outcome(shape: &Shape, restore: &Restore<'_>) -> Option<Event> {
    let vm = shell(shape);
    vm.send_restore(restore).unwrap();
    let event = vm.next_event(PATIENCE).unwrap();
    if matches!(event, Some(Event::Ended(_))) {
        assert!(vm.wait(PATIENCE).unwrap().success());
    }
    event
}

#[test]
fn what_is_no_state_or_no_plan_is_a_bad_configuration() {
    if !have_kvm() {
        return;
    }
    let boot = waiting(2);
    let (vm, saved, layer, plan) = frozen(&boot);
    stop(vm);
    let good = || restore(&saved, &layer, &plan, 1);
    assert_eq!(outcome(&boot.shape(), &good()), Some(Event::Started));
    let mut other_version = saved.clone();
    other_version[8] += 1;
    let mut damaged = saved.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let outside = plan_of(&[(run(FRAMES, 1), Source::Zero)]);
    let behind = plan_of(&[(run(0, 2), Source::Map { layer: 0, page: FRAMES - 1 })]);
    let null = std::fs::File::open("/dev/null").unwrap();
    let disk = memfd_of("disk", &[0; 4096]).unwrap();
    let more = Shape { memory_mib: 32, ..boot.shape() };
    let fewer = Shape { vcpus: 1, ..boot.shape() };
    let with_disk = Shape { disk: true, ..boot.shape() };
    let as_made = boot.shape();
    let cases: Vec<(&str, &Shape, Restore<'_>)> = vec![
        ("no state", &as_made, Restore { state: Vec::new(), ..good() }),
        ("garbage", &as_made, Restore { state: vec![0xaa; 30_000], ..good() }),
        ("another version", &as_made, Restore { state: other_version, ..good() }),
        ("damaged", &as_made, Restore { state: damaged, ..good() }),
        ("half a plan", &as_made, Restore { plan: plan[..8].to_vec(), ..good() }),
        ("a plan of garbage", &as_made, Restore { plan: vec![0xaa; 160], ..good() }),
        ("outside the guest", &as_made, Restore { plan: outside, ..good() }),
        ("behind the layer", &as_made, Restore { plan: behind, ..good() }),
        ("no layer", &as_made, Restore { layers: Vec::new(), ..good() }),
        ("not a layer", &as_made, Restore { layers: vec![null.as_fd()], ..good() }),
        ("a disk too many", &as_made, Restore { disk: Some(disk.as_fd()), ..good() }),
        ("other memory", &more, good()),
        ("fewer vCPUs", &fewer, good()),
        ("other devices", &with_disk, Restore { disk: Some(disk.as_fd()), ..good() }),
    ];
    for (name, shape, restore) in cases {
        let event = outcome(shape, &restore);
        assert!(matches!(event, Some(Event::Ended(Ending::BadConfig(_)))), "{name}: {event:?}");
    }
}

#[test]
fn the_vm_outlives_its_shard_and_the_next_one_takes_it_over() {
    if !have_kvm() {
        return;
    }
    let mut vm = start(&waiting(1));
    vm.expect(&Event::ConsoleStarted, PATIENCE).unwrap();
    let shell = vm.shell().unwrap();
    // The guest says "up" in two writes, and may not be there yet.
    let console = std::fs::File::from(vm.descriptor(shell.console_fd).unwrap());
    let mut text = [0; 10];
    let began = std::time::Instant::now();
    while text != *b"\x02\0\0\0\0\0\0\0up" {
        assert!(began.elapsed() < PATIENCE, "the guest says {text:?}");
        std::thread::yield_now();
        // Shorter than that while it has written less.
        let _count = console.read_at(&mut text, 0).unwrap();
    }
    // The end of the shard: what it held is closed.
    vm.change_socket(memfd_of("nothing", &[]).unwrap());
    let spare = vm.descriptor(shell.spare_fd).unwrap();
    vm.change_socket(spare);
    vm.send(&Command::Report { nonce: 77 }, &[]).unwrap();
    let status = Event::Status { nonce: 77, phase: Phase::Running, shell: Some(shell) };
    vm.expect(&status, PATIENCE).unwrap();
    // It can be told everything, and the console and the exchange are where they were said to be.
    let saved = vm.freeze(PATIENCE).unwrap();
    vm.send(&Command::Report { nonce: 78 }, &[]).unwrap();
    let status = Event::Status { nonce: 78, phase: Phase::Frozen, shell: Some(shell) };
    vm.expect(&status, PATIENCE).unwrap();
    let exchange = std::fs::File::from(vm.descriptor(shell.exchange_fd).unwrap());
    let mut state = vec![0; saved.len()];
    exchange.read_exact_at(&mut state, 0).unwrap();
    assert!(state == saved);
    let console = std::fs::File::from(vm.descriptor(shell.console_fd).unwrap());
    let mut text = [0; 10];
    console.read_exact_at(&mut text, 0).unwrap();
    assert_eq!(text, *b"\x02\0\0\0\0\0\0\0up");
    stop(vm);
}

#[test]
fn a_shell_answers_questions_and_ends_when_asked() {
    if !have_kvm() {
        return;
    }
    let mut vm = OneVm::spawn(&find_mica_vm().unwrap(), fresh_id()).unwrap();
    vm.expect(&Event::Jailed, PATIENCE).unwrap();
    vm.send(&Command::Report { nonce: 1 }, &[]).unwrap();
    vm.expect(&Event::Status { nonce: 1, phase: Phase::Idle, shell: None }, PATIENCE).unwrap();
    let shell = vm.build(&waiting(8).shape(), PATIENCE).unwrap();
    vm.send(&Command::Report { nonce: 2 }, &[]).unwrap();
    let status = Event::Status { nonce: 2, phase: Phase::Idle, shell: Some(shell) };
    vm.expect(&status, PATIENCE).unwrap();
    stop(vm);
}

#[test]
fn commands_out_of_turn_are_refused() {
    if !have_kvm() {
        return;
    }
    let boot = waiting(1);
    let refused = |vm: OneVm| loop {
        match vm.next_event(PATIENCE).unwrap() {
            Some(Event::ConsoleStarted) => {}
            Some(Event::Ended(Ending::Internal(words))) => {
                assert!(words.contains("out of turn"), "{words}");
                break;
            }
            other => panic!("{other:?}"),
        }
    };
    for command in [Command::Freeze, Command::Thaw] {
        let vm = shell(&boot.shape());
        vm.send(&command, &[]).unwrap();
        refused(vm);
    }
    let mut vm = start(&boot);
    vm.send_build(&boot.shape()).unwrap();
    refused(vm);
    let (vm, saved, layer, plan) = frozen(&boot);
    vm.thaw(PATIENCE).unwrap();
    vm.send_restore(&restore(&saved, &layer, &plan, 1)).unwrap();
    refused(vm);
}
