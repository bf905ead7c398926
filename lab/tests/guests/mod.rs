//! Guests that wait for a new generation id, and what it takes to move them.
//!
//! Called by the KVM tests of snapshots. Refuses nothing.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use mica_lab::one_vm::{Boot, OneVm, Restore, Shape, find_mica_vm, memfd_of};
use mica_lab::tiny_guest::{Then, vmlinux};
use mica_units::FrameRun;
use mica_wire::vm::plan::{self, Entry, Source};
use mica_wire::vm::{Command, Ending, Event};

use crate::common::{PATIENCE, fresh_id, start};

/// Memory of the guests.
pub const MEMORY_MIB: u32 = 16;
/// The same in frames.
pub const FRAMES: u32 = MEMORY_MIB * 256;
/// A page that no guest here touches.
pub const UNUSED: u32 = FRAMES - 10;

/// A guest that waits for generation ids.
pub fn waiting(vcpus: u32) -> Boot {
    let mut boot = Boot::of_image(&vmlinux("up", Then::WaitForGenerations)).unwrap();
    (boot.vcpus, boot.memory_mib) = (vcpus, MEMORY_MIB);
    boot
}

/// A run of frames.
pub fn run(first: u32, count: u32) -> FrameRun {
    FrameRun::new(first, count).unwrap()
}

/// A plan as bytes.
pub fn plan_of(entries: &[(FrameRun, Source)]) -> Vec<u8> {
    let entries: Vec<_> =
        entries.iter().map(|(run, source)| Entry { run: *run, source: *source }).collect();
    plan::encode(&entries).unwrap()
}

/// Memory of a frozen VM as a layer, and the plan that maps it.
pub fn layer_of(vm: &OneVm) -> (OwnedFd, Vec<u8>) {
    let layer = memfd_of("layer", &vm.frames(0, FRAMES).unwrap()).unwrap();
    (layer, plan_of(&[(run(0, FRAMES), Source::Map { layer: 0, page: 0 })]))
}

/// An idle shell.
pub fn shell(shape: &Shape) -> OneVm {
    let mut vm = OneVm::spawn(&find_mica_vm().unwrap(), fresh_id()).unwrap();
    vm.expect(&Event::Jailed, PATIENCE).unwrap();
    vm.build(shape, PATIENCE).unwrap();
    vm
}

/// Waits until the console says this.
pub fn wait_for_text(vm: &OneVm, text: &str) {
    let start = Instant::now();
    while vm.console_text() != text {
        assert!(start.elapsed() < PATIENCE, "it says {:?}, not {text:?}", vm.console_text());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A frozen guest that has said `up`, and what it takes to go on from there.
pub fn frozen(boot: &Boot) -> (OneVm, Vec<u8>, OwnedFd, Vec<u8>) {
    let vm = start(boot);
    vm.expect(&Event::ConsoleStarted, PATIENCE).unwrap();
    wait_for_text(&vm, "up");
    let saved = vm.freeze(PATIENCE).unwrap();
    let (layer, plan) = layer_of(&vm);
    (vm, saved, layer, plan)
}

/// Ends a VM.
pub fn stop(vm: OneVm) {
    vm.send(&Command::Stop, &[]).unwrap();
    // A guest that just went on may have said something first.
    let mut next = vm.next_event(PATIENCE).unwrap();
    if next == Some(Event::ConsoleStarted) {
        next = vm.next_event(PATIENCE).unwrap();
    }
    assert_eq!(next, Some(Event::Ended(Ending::Asked)), "it says {:?}", vm.console_text());
    assert!(vm.wait(PATIENCE).unwrap().success());
}

/// What goes on from a saved state and a layer.
pub fn restore<'a>(saved: &[u8], layer: &'a OwnedFd, plan: &[u8], generation: u8) -> Restore<'a> {
    Restore {
        plan: plan.to_vec(),
        state: saved.to_vec(),
        generation: [generation; 16],
        layers: vec![layer.as_fd()],
        ..Restore::default()
    }
}
