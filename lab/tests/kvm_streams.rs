//! Native KVM tests of streams into a guest that has no vsock driver: nobody ever answers.
//!
//! Run like `kvm_endings.rs`.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{PATIENCE, have_kvm, start};
use mica_lab::one_vm::{Boot, OneVm};
use mica_lab::tiny_guest::{Then, vmlinux};
use mica_wire::vm::{Command, Ending, Event};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Streams that one VM holds at most.
const STREAMS_MAX: usize = 512;

/// A stream into the guest: our end of it.
fn open(vm: &OneVm) -> UnixStream {
    let (near, far) = UnixStream::pair().unwrap();
    vm.send(&Command::OpenStream { vsock_port: 1024 }, &[far.as_fd()]).unwrap();
    near
}

/// How many of these have ended.
fn ended(streams: &[UnixStream]) -> usize {
    let mut fds: Vec<_> = streams.iter().map(|near| PollFd::new(near, PollFlags::IN)).collect();
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
    fds.iter().filter(|fd| fd.revents().contains(PollFlags::HUP)).count()
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn streams_that_no_driver_takes_are_bounded_and_end_with_the_guest() {
    if !have_kvm() {
        return;
    }
    const ASKED: usize = STREAMS_MAX + 80;
    let vm = start(&Boot::of_image(&vmlinux("up\n", Then::Idle)).unwrap());
    vm.expect(&Event::ConsoleStarted, PATIENCE).unwrap();
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().count();
    let before = descriptors();

    let mut streams: Vec<_> = (0..ASKED).map(|_| open(&vm)).collect();
    wait_until("what is too much is refused", || ended(&streams) >= ASKED - STREAMS_MAX);
    assert!(ended(&streams) < ASKED, "the others wait for a driver");
    wait_until("the refused ones are closed", || descriptors() <= before + STREAMS_MAX);

    // Hosts that give up leave nothing behind, and make room.
    streams.clear();
    wait_until("its descriptors are closed", || descriptors() == before);
    let mut last = open(&vm);
    wait_until("there is room again", || descriptors() == before + 1);
    assert_eq!(ended(std::slice::from_ref(&last)), 0);

    vm.send(&Command::Stop, &[]).unwrap();
    vm.expect(&Event::Ended(Ending::Asked), PATIENCE).unwrap();
    last.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(last.read(&mut [0]).unwrap(), 0, "the end of the guest ends its streams");
}
