//! Native KVM tests: every way a tiny guest can end, against the real `mica-vm` on `/dev/kvm`.
//!
//! Run by `cargo test -p mica-lab`, as root, after `cargo build -p mica-vmm` (or with `MICA_VM`
//! naming another build). Without `/dev/kvm` they say so and pass, unless `REQUIRE_KVM=1`.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use common::{PATIENCE, fresh_id, have_kvm, start};
use mica_lab::one_vm::{Boot, OneVm, find_mica_vm, memfd_of};
use mica_lab::tiny_guest::{ALL_GARBAGE, Then, vmlinux};
use mica_wire::vm::{Command, Ending, Event};

/// Runs a guest until it ends by itself: its ending, and the text on its console.
fn run_to_end(boot: &Boot) -> (Ending, String) {
    let vm = start(boot);
    loop {
        match vm.next_event(PATIENCE).unwrap() {
            Some(Event::Ended(ending)) => {
                let text = vm.console_text();
                assert!(vm.wait(PATIENCE).unwrap().success());
                return (ending, text);
            }
            Some(_) => {}
            None => panic!("mica-vm ended without a word; console: {}", vm.console_text()),
        }
    }
}

/// Boots a guest that writes `text` and does `then`, and returns how it ended and what it wrote.
fn ending_of(text: &str, then: Then) -> (Ending, String) {
    run_to_end(&Boot::of_image(&vmlinux(text, then)).unwrap())
}

#[test]
fn a_reset_ends_as_reset() {
    if !have_kvm() {
        return;
    }
    assert_eq!(ending_of("hello\n", Then::Reset), (Ending::Reset, "hello\n".to_owned()));
}

#[test]
fn a_power_off_ends_as_reset() {
    if !have_kvm() {
        return;
    }
    assert_eq!(ending_of("bye\n", Then::PowerOff), (Ending::Reset, "bye\n".to_owned()));
}

#[test]
fn a_triple_fault_ends_as_one() {
    if !have_kvm() {
        return;
    }
    assert_eq!(ending_of("x", Then::TripleFault), (Ending::TripleFault, "x".to_owned()));
}

#[test]
fn a_halt_with_interrupts_off_is_found_out() {
    if !have_kvm() {
        return;
    }
    assert_eq!(ending_of("so long\n", Then::Halt), (Ending::Halted, "so long\n".to_owned()));
}

#[test]
fn an_idle_guest_lives_until_it_is_stopped() {
    if !have_kvm() {
        return;
    }
    let vm = start(&Boot::of_image(&vmlinux("idle\n", Then::Idle)).unwrap());
    vm.expect(&Event::ConsoleStarted, PATIENCE).unwrap();
    // Longer than the first look for a sign of life, so that it is asked and answers.
    assert!(vm.next_event(Duration::from_millis(1500)).is_err(), "an idle guest must not end");
    vm.send(&Command::Stop, &[]).unwrap();
    vm.expect(&Event::Ended(Ending::Asked), PATIENCE).unwrap();
    assert!(vm.wait(PATIENCE).unwrap().success());
}

#[test]
fn a_spinning_guest_is_stopped_when_the_shard_hangs_up() {
    if !have_kvm() {
        return;
    }
    let vm = start(&Boot::of_image(&vmlinux("spin\n", Then::Spin)).unwrap());
    vm.expect(&Event::ConsoleStarted, PATIENCE).unwrap();
    vm.hang_up(PATIENCE).unwrap();
}

#[test]
fn a_guest_that_is_stopped_as_it_starts_ends() {
    if !have_kvm() {
        return;
    }
    let mut boot = Boot::of_image(&vmlinux("", Then::Spin)).unwrap();
    boot.vcpus = 8;
    for _ in 0..40 {
        let mut vm = OneVm::spawn(&find_mica_vm().unwrap(), fresh_id()).unwrap();
        vm.expect(&Event::Jailed, PATIENCE).unwrap();
        // Both at once: the stop is read before some of the vCPU threads are in the guest.
        vm.boot(&boot).unwrap();
        vm.send(&Command::Stop, &[]).unwrap();
        vm.expect(&Event::Started, PATIENCE).unwrap();
        vm.expect(&Event::Ended(Ending::Asked), PATIENCE).unwrap();
        assert!(vm.wait(PATIENCE).unwrap().success());
    }
}

#[test]
fn a_console_flood_stays_in_its_ring() {
    if !have_kvm() {
        return;
    }
    const BYTES: u32 = 20_000;
    let mut boot = Boot::of_image(&vmlinux("begin", Then::Flood(BYTES))).unwrap();
    boot.console_bytes = 4096;
    let vm = start(&boot);
    vm.expect(&Event::ConsoleStarted, PATIENCE).unwrap();
    vm.expect(&Event::Ended(Ending::Halted), PATIENCE).unwrap();
    let (bytes, total) = vm.console().unwrap();
    assert_eq!(total, u64::from(BYTES) + 5);
    assert_eq!(bytes.len(), 4096 - 8);
    assert!(bytes.iter().all(|byte| *byte == b'x'), "the oldest bytes are overwritten");
}

#[test]
fn memory_is_there_as_far_as_it_was_asked_for() {
    if !have_kvm() {
        return;
    }
    const PAGES: u32 = 200;
    let mut boot = Boot::of_image(&vmlinux("", Then::TouchPages(PAGES))).unwrap();
    boot.memory_mib = 3;
    let vm = start(&boot);
    // 200 pages from 2 MiB on are within 3 MiB; the guest says so.
    vm.expect(&Event::ConsoleStarted, PATIENCE).unwrap();
    assert_eq!(vm.console_text(), ".");
}

#[test]
fn garbage_in_a_virtqueue_ends_the_guest_that_wrote_it() {
    if !have_kvm() {
        return;
    }
    for garbage in ALL_GARBAGE {
        let mut boot = Boot::of_image(&vmlinux("g", Then::Garbage(garbage))).unwrap();
        boot.disk = Some(memfd_of("disk", &[0; 4096]).unwrap());
        let (ending, _) = run_to_end(&boot);
        assert!(
            matches!(&ending, Ending::GuestFault(words) if words.contains("blk")),
            "{garbage:?}: {ending:?}"
        );
    }
}

#[test]
fn eight_vcpus_start_and_each_of_them_speaks() {
    if !have_kvm() {
        return;
    }
    let mut boot = Boot::of_image(&vmlinux("1", Then::StartSecond)).unwrap();
    boot.vcpus = 8;
    assert_eq!(run_to_end(&boot), (Ending::Halted, "12222222".to_owned()));
}

#[test]
fn a_second_vcpu_starts_and_both_halting_is_a_halt() {
    if !have_kvm() {
        return;
    }
    let mut boot = Boot::of_image(&vmlinux("1", Then::StartSecond)).unwrap();
    boot.vcpus = 2;
    assert_eq!(run_to_end(&boot), (Ending::Halted, "12".to_owned()));
}
