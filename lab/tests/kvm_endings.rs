//! Native KVM tests: every way a tiny guest can end, against the real `mica-vm` on `/dev/kvm`.
//!
//! Run by `cargo test -p mica-lab`, as root, after `cargo build -p mica-vmm` (or with `MICA_VM`
//! naming another build). Without `/dev/kvm` they say so and pass, unless `REQUIRE_KVM=1`.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{PATIENCE, fresh_id, have_kvm, start};
use mica_lab::one_vm::{Boot, OneVm, find_mica_vm, memfd_of};
use mica_lab::tiny_guest::{ALL_GARBAGE, ALL_PLACES, Place, Then, vmlinux};
use mica_wire::vm::{Command, Ending, Event};

/// Runs a guest until it ends by itself: its ending, and the text on its console.
fn run_to_end(boot: &Boot) -> (Ending, String) {
    until_end(start(boot))
}

/// Waits until a guest ends by itself.
fn until_end(vm: OneVm) -> (Ending, String) {
    loop {
        match vm.next_event(PATIENCE).unwrap() {
            Some(Event::Ended(ending)) => {
                let text = vm.console_text();
                assert!(vm.wait(PATIENCE).unwrap().success());
                return (ending, text);
            }
            Some(_) => {}
            None => {
                let text = vm.console_text();
                panic!("mica-vm ended without a word, {:?}; console: {text}", vm.wait(PATIENCE))
            }
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
fn a_spinning_guest_is_stopped() {
    if !have_kvm() {
        return;
    }
    let vm = start(&Boot::of_image(&vmlinux("spin\n", Then::Spin)).unwrap());
    vm.expect(&Event::ConsoleStarted, PATIENCE).unwrap();
    vm.send(&Command::Stop, &[]).unwrap();
    vm.expect(&Event::Ended(Ending::Asked), PATIENCE).unwrap();
    assert!(vm.wait(PATIENCE).unwrap().success());
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
        vm.boot(&boot, PATIENCE).unwrap();
        vm.send(&Command::Stop, &[]).unwrap();
        vm.expect(&Event::Started, PATIENCE).unwrap();
        vm.expect(&Event::Ended(Ending::Asked), PATIENCE).unwrap();
        assert!(vm.wait(PATIENCE).unwrap().success());
    }
}

#[test]
fn the_ending_arrives_though_frames_were_left_unread() {
    if !have_kvm() {
        return;
    }
    for _ in 0..10 {
        let vm = start(&Boot::of_image(&vmlinux("", Then::Idle)).unwrap());
        let (_near, far) = UnixStream::pair().unwrap();
        vm.send(&Command::Stop, &[]).unwrap();
        // Nobody reads this one; it may also come too late to be sent.
        let sent = vm.send(&Command::OpenStream { vsock_port: 1 }, &[far.as_fd()]);
        let event = vm.next_event(PATIENCE).unwrap();
        assert_eq!(event, Some(Event::Ended(Ending::Asked)), "{sent:?}");
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

/// A VM with every device.
fn with_disk(then: Then) -> Boot {
    let mut boot = Boot::of_image(&vmlinux("g", then)).unwrap();
    boot.disk = Some(memfd_of("disk", &[0; 4096]).unwrap());
    boot
}

#[test]
fn garbage_in_a_virtqueue_ends_the_guest_that_wrote_it_and_no_other() {
    if !have_kvm() {
        return;
    }
    let neighbour = start(&with_disk(Then::Idle));
    neighbour.expect(&Event::ConsoleStarted, PATIENCE).unwrap();
    for place in ALL_PLACES {
        for garbage in ALL_GARBAGE {
            let vm = start(&with_disk(Then::Garbage(place, garbage)));
            // Something to deliver, so that every queue is looked at.
            let (_near, far) = UnixStream::pair().unwrap();
            // A guest that has ended already does not take it.
            let sent = vm.send(&Command::OpenStream { vsock_port: 1 }, &[far.as_fd()]);
            let (ending, _) = until_end(vm);
            let name = match place {
                Place::Disk => "blk",
                Place::VsockToGuest | Place::VsockFromGuest => "vsock",
                Place::Rng => "rng",
                Place::Balloon => "balloon",
            };
            assert!(
                matches!(&ending, Ending::GuestFault(words) if words.contains(name)),
                "{place:?} {garbage:?}: {ending:?}, {sent:?}"
            );
        }
    }
    neighbour.send(&Command::Stop, &[]).unwrap();
    neighbour.expect(&Event::Ended(Ending::Asked), PATIENCE).unwrap();
}

#[test]
fn a_reset_of_the_vsock_device_ends_its_streams_and_nothing_else() {
    if !have_kvm() {
        return;
    }
    let vm = start(&with_disk(Then::ResetVsock));
    let (mut near, far) = UnixStream::pair().unwrap();
    vm.send(&Command::OpenStream { vsock_port: 1 }, &[far.as_fd()]).unwrap();
    drop(far);
    near.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(near.read(&mut [0]).unwrap(), 0, "the stream ended");
    assert_eq!(until_end(vm), (Ending::Halted, "gr".to_owned()));
}

#[test]
fn scribbled_registers_are_a_fault_or_nothing() {
    if !have_kvm() {
        return;
    }
    for seed in 0..20 {
        let (ending, _) = run_to_end(&with_disk(Then::Scribble(seed)));
        let expected = matches!(ending, Ending::GuestFault(_) | Ending::Halted);
        assert!(expected, "seed {seed}: {ending:?}");
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

#[test]
fn a_halt_that_leaves_the_other_vcpus_in_init_is_found_out() {
    if !have_kvm() {
        return;
    }
    let mut boot = Boot::of_image(&vmlinux("1", Then::InitOthers)).unwrap();
    boot.vcpus = 2;
    assert_eq!(run_to_end(&boot), (Ending::Halted, "1".to_owned()));
}
