//! Native KVM tests of a guest's memory as a shard sees it from outside: what was written, and pages that
//! come when they are touched.
//!
//! Run like `kvm_endings.rs`. Needs Linux 6.7 for the tracking of writes.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
mod guests;

use std::cell::Cell;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use common::{PATIENCE, have_kvm, start};
use guests::{
    FRAMES, MEMORY_MIB, UNUSED, frozen, plan_of, restore, run, shell, stop, wait_for_text, waiting,
};
use mica_lab::one_vm::{Boot, OneVm, Shape};
use mica_lab::tiny_guest::{GENERATION_ID, SCRATCH, Then, vmlinux};
use mica_numa::io::{IoBuf, Ring, RingConfig};
use mica_numa::plan::VcpuCores;
use mica_numa::process::{Process, ProcessError, RemoteMemory, Wanted};
use mica_numa::rt;
use mica_numa::seat::run_all;
use mica_numa::userfault::{Content, PageSource, Pager, Userfault};
use mica_numa::{Plan, ShardSeat, StopSignal, topology};
use mica_units::{FrameRun, PAGE_BYTES, ShardId};
use mica_wire::vm::Event;
use mica_wire::vm::plan::Source;
use rustix::process::Pid;

fn remote(vm: &OneVm) -> (Process, RemoteMemory) {
    let pid = Pid::from_raw(i32::try_from(vm.pid()).unwrap()).unwrap();
    let memory = RemoteMemory::new(vm.shell().unwrap().memory_address, FRAMES).unwrap();
    (Process::open(pid).unwrap(), memory)
}

/// Frames written since the last call; counts all of them as not written from now on.
fn written(vm: &OneVm) -> Vec<FrameRun> {
    let (process, memory) = remote(vm);
    let wanted = Wanted::AnonymousWritten { rearm: true };
    let all = memory.all().unwrap();
    process.pagemap().unwrap().scan(memory, all, wanted, FRAMES).unwrap().runs
}

/// The userfaultfd of a VM, taken as a shard takes it, and all of its memory.
fn userfault(vm: &OneVm) -> (Userfault, FrameRun) {
    let (process, memory) = remote(vm);
    let fd = process.getfd(vm.shell().unwrap().userfault_fd.unwrap()).unwrap();
    (Userfault::new(fd, memory).unwrap(), memory.all().unwrap())
}

/// Registers memory for the tracking of writes.
fn track(vm: &OneVm) {
    let (userfault, all) = userfault(vm);
    userfault.track(all).expect("this kernel cannot tell writes");
}

fn write(vm: &OneVm, frame: u32) {
    let at = vm.shell().unwrap().memory_address + u64::from(frame) * PAGE_BYTES;
    vm.memory().unwrap().write_all_at(&[9; 8], at + 100).unwrap();
}

#[test]
fn what_was_written_since_the_last_look_is_found_exactly() {
    if !have_kvm() {
        return;
    }
    let vm = start(&waiting(2));
    vm.expect(&Event::ConsoleStarted, PATIENCE).unwrap();
    vm.freeze(PATIENCE).unwrap();
    track(&vm);
    assert!(!written(&vm).is_empty(), "all that the boot wrote");
    assert_eq!(written(&vm), [], "nothing since");
    let id = u32::try_from(GENERATION_ID / PAGE_BYTES).unwrap();
    for (round, frames) in [vec![UNUSED, UNUSED + 2], vec![], vec![UNUSED + 1]].iter().enumerate() {
        vm.thaw(PATIENCE).unwrap();
        frames.iter().for_each(|frame| write(&vm, *frame));
        // What the guest is told by goes through its memory too.
        let at = vm.shell().unwrap().memory_address + GENERATION_ID;
        vm.memory().unwrap().write_all_at(&[u8::try_from(round).unwrap() + 1], at).unwrap();
        wait_for_text(&vm, &format!("up{}", "R".repeat(round + 1)));
        vm.freeze(PATIENCE).unwrap();
        // Again, as before each capture; what is protected stays so.
        track(&vm);
        let expected: Vec<_> = [id].iter().chain(frames).map(|frame| run(*frame, 1)).collect();
        assert_eq!(written(&vm), expected, "round {round}");
    }
    stop(vm);
}

/// A rollback maps parts of memory anew: they are registered again, and what was written to them before
/// that is found too.
#[test]
fn tracking_goes_on_over_a_rollback() {
    if !have_kvm() {
        return;
    }
    let (vm, _, layer, whole) = frozen(&waiting(1));
    vm.thaw(PATIENCE).unwrap();
    let saved = vm.freeze(PATIENCE).unwrap();
    track(&vm);
    written(&vm);
    let id = u32::try_from(GENERATION_ID / PAGE_BYTES).unwrap();
    let some = plan_of(&[
        (run(UNUSED, 2), Source::Map { layer: 0, page: UNUSED }),
        (run(UNUSED + 2, 1), Source::Zero),
        (run(id, 1), Source::Drop),
    ]);
    for (round, plan) in [&whole, &some, &some].into_iter().enumerate() {
        let generation = u8::try_from(round).unwrap() + 1;
        vm.send_restore(&restore(&saved, &layer, plan, generation)).unwrap();
        vm.expect(&Event::Started, PATIENCE).unwrap();
        wait_for_text(&vm, &format!("up{}", "R".repeat(round + 1)));
        vm.freeze(PATIENCE).unwrap();
        let (process, memory) = remote(&vm);
        let wanted = Wanted::AnonymousWritten { rearm: false };
        let all = memory.all().unwrap();
        let forgotten = process.pagemap().unwrap().scan(memory, all, wanted, FRAMES);
        assert!(matches!(forgotten, Err(ProcessError::NotTracked)), "round {round}: {forgotten:?}");
        track(&vm);
        // The new generation id is the only thing that was written; a shadow page table is not ours.
        assert_eq!(written(&vm), [run(id, 1)], "round {round}");
        for frame in [UNUSED, UNUSED + 2, UNUSED + 5] {
            write(&vm, frame);
        }
        let expected = [UNUSED, UNUSED + 2, UNUSED + 5].map(|frame| run(frame, 1));
        assert_eq!(written(&vm), expected, "round {round}");
    }
    stop(vm);
}

/// The frames whose bits are set.
fn frames_in(log: &[u8]) -> Vec<u32> {
    assert_eq!(log.len() as u64, u64::from(FRAMES / 8), "a bit for each frame");
    (0..FRAMES).filter(|frame| log[*frame as usize / 8] >> (frame % 8) & 1 == 1).collect()
}

/// For kernels that cannot tell writes from outside: the VM process tells what its guest wrote, what KVM
/// wrote for it, and what the VM process did itself, since the last freeze.
#[test]
fn a_shell_that_logs_tells_every_write_since_the_last_freeze() {
    if !have_kvm() {
        return;
    }
    const TOUCHED: u32 = 300;
    let mut boot = Boot::of_image(&vmlinux("up", Then::TouchPages(TOUCHED))).unwrap();
    boot.memory_mib = MEMORY_MIB;
    let shape = Shape { log_writes: true, ..boot.shape() };
    let vm = shell(&shape);
    vm.send_boot(&boot).unwrap();
    vm.expect(&Event::Started, PATIENCE).unwrap();
    wait_for_text(&vm, "up.");
    let (_, log) = vm.freeze_with_log(PATIENCE).unwrap();
    let scratch = u32::try_from(SCRATCH / PAGE_BYTES).unwrap();
    let found = frames_in(&log);
    let missed: Vec<u32> = (scratch..scratch + TOUCHED).filter(|f| !found.contains(f)).collect();
    assert!(missed.is_empty(), "the guest's own writes: {missed:?}");
    assert!(!found.contains(&(scratch + TOUCHED)), "and none that it did not do");
    vm.thaw(PATIENCE).unwrap();
    let since = frames_in(&vm.freeze_with_log(PATIENCE).unwrap().1);
    assert!(since.is_empty(), "nothing since: {since:?}");
    stop(vm);

    // The place of the generation id is written by the VM process alone.
    let boot = waiting(1);
    let (old, saved, layer, plan) = frozen(&boot);
    stop(old);
    let vm = shell(&Shape { log_writes: true, ..boot.shape() });
    for generation in 1..4 {
        vm.send_restore(&restore(&saved, &layer, &plan, generation)).unwrap();
        vm.expect(&Event::Started, PATIENCE).unwrap();
        wait_for_text(&vm, &"R".repeat(usize::from(generation)));
        let (_, log) = vm.freeze_with_log(PATIENCE).unwrap();
        assert_eq!(frames_in(&log), [u32::try_from(GENERATION_ID / PAGE_BYTES).unwrap()]);
    }
    stop(vm);
    let vm = shell(&boot.shape());
    vm.send_restore(&restore(&saved, &layer, &plan, 9)).unwrap();
    vm.expect(&Event::Started, PATIENCE).unwrap();
    let (_, log) = vm.freeze_with_log(PATIENCE).unwrap();
    assert!(log.is_empty(), "none where nobody asked for it");
    stop(vm);
}

/// Serves pages out of a copy of the guest's memory, and counts.
struct Copy {
    memory: Vec<u8>,
    served: Rc<Cell<u32>>,
}

impl PageSource for Copy {
    async fn fill(&self, run: FrameRun, mut buffer: IoBuf) -> (IoBuf, std::io::Result<Content>) {
        self.served.set(self.served.get() + 1);
        let start = usize::try_from(run.offset_bytes()).unwrap();
        buffer.put(&self.memory[start..start + usize::try_from(run.bytes()).unwrap()]);
        (buffer, Ok(Content::Bytes))
    }
}

/// Runs `work` on one shard's executor.
fn on_one<T, F>(work: impl Fn() -> F + Clone + Send + 'static) -> T
where
    T: Send + 'static,
    F: Future<Output = T> + 'static,
{
    let core = topology::read().unwrap().nodes[0].cores[0].cpu();
    let seat = ShardSeat::new(ShardId::new(0), core, 0);
    let vcpus = VcpuCores::new(0, vec![core], true);
    let plan = Plan { seats: vec![seat], vcpus: vec![vcpus], ..Plan::default() };
    let stop = StopSignal::new().unwrap();
    run_all(&plan, vec![()], &stop, move |_, ()| work()).unwrap().pop().unwrap()
}

#[test]
fn pages_that_the_plan_leaves_out_come_when_they_are_touched() {
    if !have_kvm() {
        return;
    }
    on_one(|| async {
        let boot = waiting(2);
        let (old, saved, layer, _) = frozen(&boot);
        let memory = old.frames(0, FRAMES).unwrap();
        stop(old);
        let vm = shell(&boot.shape());
        let (userfault, all) = userfault(&vm);
        userfault.catch_missing(all, false).unwrap();
        let ring = Ring::attach(RingConfig { buffers: 4 }).unwrap();
        let served = Rc::new(Cell::new(0));
        let copy = Copy { memory, served: Rc::clone(&served) };
        let pager = Pager::new(userfault, copy, Rc::clone(&ring), false);
        let server = rt::spawn({
            let pager = Rc::clone(&pager);
            async move { pager.serve().await }
        });
        let vm = rt::blocking(move || {
            // Nothing is there: neither the code, nor the place of the generation id, which the VM
            // process writes itself.
            vm.send_restore(&restore(&saved, &layer, &[], 5)).unwrap();
            vm.expect(&Event::Started, PATIENCE).unwrap();
            vm.expect(&Event::ConsoleStarted, PATIENCE).unwrap();
            wait_for_text(&vm, "R");
            // It can be frozen while nearly everything is still missing.
            vm.freeze(PATIENCE).unwrap();
            vm.thaw(PATIENCE).unwrap();
            vm
        })
        .await
        .unwrap();
        assert!((1..20).contains(&served.get()), "{} neighbourhoods", served.get());
        server.end().await;
        stop(vm);
        ring.close().await;
    });
}
