//! Native KVM tests of the jail: what a running `mica-vm` still has, read from `/proc`.
//!
//! Run like `kvm_endings.rs`. As root, because the jail is closed from root.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::{PATIENCE, fresh_id, have_kvm, start};
use mica_lab::one_vm::{Boot, OneVm, Shape, empty_network, find_mica_vm, memfd_of};
use mica_lab::tiny_guest::{Then, vmlinux};
use mica_wire::vm::{BootConfig, Command, ControlSocket, Ending, Event, FdRole, ShellConfig};
use rustix::process::{Pid, WaitOptions, waitpgid};
use rustix::thread::{
    CapabilitiesSecureBits, capabilities, set_capabilities, set_capabilities_secure_bits,
};

fn idle() -> Boot {
    let mut boot = Boot::of_image(&vmlinux("up\n", Then::Idle)).unwrap();
    boot.vcpus = 2;
    boot.disk = Some(memfd_of("disk", &[0; 4096]).unwrap());
    boot
}

/// A running guest with every device.
fn running() -> OneVm {
    let vm = start(&idle());
    vm.expect(&Event::ConsoleStarted, PATIENCE).unwrap();
    vm
}

fn proc(vm: &OneVm) -> PathBuf {
    Path::new("/proc").join(vm.pid().to_string())
}

/// The value of a line of `/proc/PID/status`.
fn status(file: &Path, key: &str) -> String {
    let text = fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim_start_matches(':').trim().to_owned()
}

#[test]
fn every_thread_has_its_own_user_no_privilege_and_a_filter() {
    if !have_kvm() {
        return;
    }
    check_threads(&running());
}

#[test]
fn privileges_that_a_change_of_user_does_not_clear_are_cleared() {
    if !have_kvm() {
        return;
    }
    // Those of this thread, so of the process that it starts: capabilities outlive the next setuid,
    // and some are inheritable, which no setuid clears.
    let mut sets = capabilities(None).unwrap();
    sets.inheritable = sets.permitted;
    set_capabilities(None, sets).unwrap();
    set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP).unwrap();
    check_threads(&running());
}

/// That no thread of a running VM has more than it needs.
fn check_threads(vm: &OneVm) {
    let tasks: Vec<_> =
        fs::read_dir(proc(vm).join("task")).unwrap().map(|task| task.unwrap().path()).collect();
    assert!(tasks.len() >= 4, "control, devices and two vCPUs, got {tasks:?}");
    let name = |task: &std::path::PathBuf| fs::read_to_string(task.join("comm")).unwrap();
    let mut vcpus: Vec<String> =
        tasks.iter().map(name).filter(|n| n.starts_with("vcpu-")).collect();
    vcpus.sort();
    assert_eq!(vcpus, ["vcpu-0\n", "vcpu-1\n"], "a shard finds them by these names, to pin them");
    for task in tasks {
        let name = fs::read_to_string(task.join("comm")).unwrap();
        // KVM's own helper thread is a kernel thread in all but name.
        if name.starts_with("kvm-") {
            continue;
        }
        let file = task.join("status");
        let uids = status(&file, "Uid");
        let uid = uids.split_whitespace().next().unwrap();
        assert!(uid.parse::<u32>().unwrap() >= 100_000, "{name}: {uids}");
        assert!(uids.split_whitespace().all(|id| id == uid), "{name}: {uids}");
        assert_eq!(status(&file, "Groups"), "", "{name}");
        assert_eq!(status(&file, "NoNewPrivs"), "1", "{name}");
        assert_eq!(status(&file, "Seccomp"), "2", "{name}");
        // The control thread has one more, taken when it needed no more to give the guest its disk.
        let filters = if name.trim() == "mica-vm" { "3" } else { "2" };
        assert_eq!(status(&file, "Seccomp_filters"), filters, "{name}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd"] {
            assert_eq!(status(&file, set), "0000000000000000", "{name} {set}");
        }
    }
}

#[test]
fn its_root_is_empty_and_read_only_and_its_namespaces_are_its_own() {
    if !have_kvm() {
        return;
    }
    let vm = running();
    let root = proc(&vm).join("root");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    assert!(fs::create_dir(root.join("x")).is_err(), "the root must be read-only");
    let mounts = fs::read_to_string(proc(&vm).join("mounts")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains("tmpfs ro,nosuid,nodev,noexec"), "{mounts}");
    for name in ["mnt", "ipc", "uts", "net", "pid"] {
        assert_ne!(namespace(&vm.pid().to_string(), name), namespace("self", name), "{name}");
    }
}

/// The number of a namespace.
fn namespace(pid: &str, name: &str) -> u64 {
    fs::metadata(Path::new("/proc").join(pid).join("ns").join(name)).unwrap().ino()
}

#[test]
fn it_is_the_first_and_only_process_it_can_see_and_outlives_the_one_that_started_it() {
    if !have_kvm() {
        return;
    }
    let vm = running();
    let numbers = status(&proc(&vm).join("status"), "NSpid");
    assert_eq!(numbers.split_whitespace().collect::<Vec<_>>(), [&vm.pid().to_string(), "1"]);
    // The process in between has ended, so it is our child now.
    assert_eq!(status(&proc(&vm).join("status"), "PPid"), std::process::id().to_string());
    vm.send(&Command::Stop, &[]).unwrap();
    vm.expect(&Event::Ended(Ending::Asked), PATIENCE).unwrap();
    assert!(vm.wait(PATIENCE).unwrap().success());
}

#[test]
fn vm_processes_share_the_network_namespace_they_are_given_and_nothing_is_in_it() {
    if !have_kvm() {
        return;
    }
    let network = empty_network().unwrap();
    let number = fs::metadata(format!("/proc/self/fd/{}", network.as_raw_fd())).unwrap().ino();
    let vms = [(); 2].map(|()| {
        let program = find_mica_vm().unwrap();
        let mut vm = OneVm::spawn_in(&program, fresh_id(), Some(network.as_fd())).unwrap();
        vm.expect(&Event::Jailed, PATIENCE).unwrap();
        vm.boot(&idle(), PATIENCE).unwrap();
        vm.expect(&Event::Started, PATIENCE).unwrap();
        vm
    });
    for vm in &vms {
        assert_eq!(namespace(&vm.pid().to_string(), "net"), number);
        let devices = fs::read_to_string(proc(vm).join("net/dev")).unwrap();
        // Two lines of headings, and loopback, which is down.
        assert_eq!(devices.lines().count(), 3, "{devices}");
        let routes = fs::read_to_string(proc(vm).join("net/route")).unwrap();
        assert_eq!(routes.lines().filter(|line| !line.starts_with("Iface")).count(), 0, "{routes}");
        check_descriptors(vm);
    }
    for name in ["mnt", "ipc", "uts", "pid"] {
        let [a, b] = [&vms[0], &vms[1]].map(|vm| namespace(&vm.pid().to_string(), name));
        assert_ne!(a, b, "{name}");
    }
}

#[test]
fn a_network_that_is_none_is_refused() {
    let program = find_mica_vm().unwrap();
    let null = fs::File::open("/dev/null").unwrap();
    let refused = OneVm::spawn_in(&program, fresh_id(), Some(null.as_fd())).unwrap_err();
    assert!(refused.to_string().contains("enter the network namespace"), "{refused}");
}

#[test]
fn its_descriptors_are_the_ones_it_was_given() {
    if !have_kvm() {
        return;
    }
    // One that the parent leaves open on purpose.
    let leaked =
        fs::File::open("/etc/hostname").or_else(|_| fs::File::open("/etc/passwd")).unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    let vm = running();
    check_descriptors(&vm);
    let limits = fs::read_to_string(proc(&vm).join("limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line.trim_start_matches(name).split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(limit("Max core file size"), "0");
    assert_eq!(limit("Max file size"), "4096");
    assert_eq!(limit("Max open files"), "1024");
    assert_eq!(limit("Max processes"), "64");
    assert_eq!(limit("Max locked memory"), "65536");
}

fn check_descriptors(vm: &OneVm) {
    let mut sockets = 0;
    for entry in fs::read_dir(proc(vm).join("fd")).unwrap() {
        let target = fs::read_link(entry.unwrap().path()).unwrap();
        let target = target.to_string_lossy().into_owned();
        sockets += usize::from(target.starts_with("socket:"));
        let expected = [
            "/dev/null",
            "socket:",
            "anon_inode:kvm-vm",
            "anon_inode:kvm-vcpu",
            "anon_inode:[eventfd]",
            "anon_inode:[eventpoll]",
            "anon_inode:[io_uring]",
            "anon_inode:[userfaultfd]",
            "/memfd:disk",
            "/memfd:console",
            "/memfd:exchange",
        ];
        assert!(expected.iter().any(|known| target.starts_with(known)), "{target}");
    }
    assert_eq!(sockets, 2, "the control socket and its spare, nothing else");
}

/// What a VM process answers to a command with these descriptors.
fn refusal(command: &Command, fds: &[std::os::fd::BorrowedFd<'_>]) -> Option<Event> {
    let vm = OneVm::spawn(&find_mica_vm().unwrap(), fresh_id()).unwrap();
    vm.expect(&Event::Jailed, PATIENCE).unwrap();
    vm.send(command, fds).unwrap();
    let event = vm.next_event(PATIENCE).unwrap();
    assert!(vm.wait(PATIENCE).unwrap().success());
    event
}

#[test]
fn broken_images_are_a_bad_configuration() {
    if !have_kvm() {
        return;
    }
    let good = vmlinux("never\n", Then::Halt);
    let mut absurd = good.clone();
    // The segment's address in memory: far outside.
    absurd[64 + 24..64 + 32].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut bzimage = vec![0; 0x400];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    bzimage[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    bzimage[0x211] = 1;
    let cases: [(&str, &[u8]); 6] = [
        ("empty", &[]),
        ("text", b"#!/bin/sh\nexit 0\n"),
        ("header only", &good[..64]),
        ("cut in its code", &good[..0x1001]),
        ("absurd address", &absurd),
        ("bzImage of nothing", &bzimage),
    ];
    for (name, image) in cases {
        let mut vm = OneVm::spawn(&find_mica_vm().unwrap(), fresh_id()).unwrap();
        vm.expect(&Event::Jailed, PATIENCE).unwrap();
        vm.boot(&Boot::of_image(image).unwrap(), PATIENCE).unwrap();
        let event = vm.next_event(PATIENCE).unwrap();
        assert!(matches!(event, Some(Event::Ended(Ending::BadConfig(_)))), "{name}: {event:?}");
    }
}

#[test]
fn a_wrong_build_command_is_a_bad_configuration() {
    if !have_kvm() {
        return;
    }
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm").unwrap();
    let console = memfd_of("console", &[0; 4096]).unwrap();
    let exchange = memfd_of("exchange", &[0; 4096]).unwrap();
    let (spare, _far) = ControlSocket::pair().unwrap();
    let good = ShellConfig {
        vcpus: 1,
        memory_mib: 16,
        disk: false,
        console_bytes: 4096,
        exchange_bytes: 4096,
        log_writes: false,
        fds: vec![FdRole::Kvm, FdRole::Console, FdRole::Exchange, FdRole::Spare],
    };
    let fds = [kvm.as_fd(), console.as_fd(), exchange.as_fd(), spare.as_fd()];
    let roles = |fds: &[FdRole]| ShellConfig { fds: fds.to_vec(), ..good.clone() };
    let not_kvm = [console.as_fd(), console.as_fd(), exchange.as_fd(), spare.as_fd()];
    for (name, config, fds) in [
        ("no vCPU", ShellConfig { vcpus: 0, ..good.clone() }, &fds[..]),
        ("nine vCPUs", ShellConfig { vcpus: 9, ..good.clone() }, &fds),
        ("no memory", ShellConfig { memory_mib: 0, ..good.clone() }, &fds),
        ("absurd memory", ShellConfig { memory_mib: u32::MAX, ..good.clone() }, &fds),
        ("console length", ShellConfig { console_bytes: 8192, ..good.clone() }, &fds),
        ("exchange length", ShellConfig { exchange_bytes: 8192, ..good.clone() }, &fds),
        ("no KVM", roles(&[FdRole::Console, FdRole::Exchange, FdRole::Spare]), &fds[1..]),
        ("no spare", roles(&[FdRole::Kvm, FdRole::Console, FdRole::Exchange]), &fds[..3]),
        ("a disk", roles(&[FdRole::Kvm, FdRole::Console, FdRole::Exchange, FdRole::Disk]), &fds),
        ("another file as KVM", good.clone(), &not_kvm),
        ("too few descriptors", good.clone(), &fds[..2]),
    ] {
        let event = refusal(&Command::Build(config), fds);
        assert!(matches!(event, Some(Event::Ended(Ending::BadConfig(_)))), "{name}: {event:?}");
    }
}

#[test]
fn a_wrong_boot_command_is_a_bad_configuration() {
    if !have_kvm() {
        return;
    }
    let kernel = memfd_of("kernel", &vmlinux("never\n", Then::Halt)).unwrap();
    let disk = memfd_of("disk", &[0; 4096]).unwrap();
    let odd = memfd_of("disk", &[0; 100]).unwrap();
    let good =
        BootConfig { cmdline: String::new(), disk_read_only: false, fds: vec![FdRole::Kernel] };
    let with_disk = BootConfig { fds: vec![FdRole::Kernel, FdRole::Disk], ..good.clone() };
    let layer = BootConfig { fds: vec![FdRole::Kernel, FdRole::Layer], ..good.clone() };
    let none = BootConfig { fds: Vec::new(), ..good.clone() };
    let fds = [kernel.as_fd(), disk.as_fd()];
    let odd = [kernel.as_fd(), odd.as_fd()];
    for (name, shell_disk, config, fds) in [
        ("zero", false, BootConfig { cmdline: "a\0b".to_owned(), ..good.clone() }, &fds[..1]),
        ("long", false, BootConfig { cmdline: "x".repeat(4000), ..good.clone() }, &fds[..1]),
        ("no kernel", false, none, &fds[..0]),
        ("a layer", false, layer, &fds),
        ("a disk too many", false, with_disk.clone(), &fds),
        ("a disk too few", true, good.clone(), &fds[..1]),
        ("an odd disk", true, with_disk, &odd),
    ] {
        let mut vm = OneVm::spawn(&find_mica_vm().unwrap(), fresh_id()).unwrap();
        vm.expect(&Event::Jailed, PATIENCE).unwrap();
        let shape = Shape {
            vcpus: 1,
            memory_mib: 16,
            disk: shell_disk,
            console_bytes: 4096,
            log_writes: false,
        };
        vm.build(&shape, PATIENCE).unwrap();
        vm.send(&Command::Boot(config), fds).unwrap();
        let event = vm.next_event(PATIENCE).unwrap();
        assert!(matches!(event, Some(Event::Ended(Ending::BadConfig(_)))), "{name}: {event:?}");
        assert!(vm.wait(PATIENCE).unwrap().success());
    }
}

#[test]
fn a_shard_that_breaks_the_protocol_is_told() {
    if !have_kvm() {
        return;
    }
    let vm = OneVm::spawn(&find_mica_vm().unwrap(), fresh_id()).unwrap();
    vm.expect(&Event::Jailed, PATIENCE).unwrap();
    let null = fs::File::open("/dev/null").unwrap();
    vm.send(&Command::OpenStream { vsock_port: 1 }, &[null.as_fd()]).unwrap();
    let event = vm.next_event(PATIENCE).unwrap();
    assert!(matches!(event, Some(Event::Ended(Ending::Internal(_)))), "{event:?}");
}

#[test]
fn a_vm_process_whose_number_nobody_was_told_ends() {
    use std::os::unix::process::CommandExt;
    rustix::process::set_child_subreaper(Some(Pid::INIT)).unwrap();
    let (near, far) = ControlSocket::pair().unwrap();
    drop(near);
    let mut first = std::process::Command::new(find_mica_vm().unwrap())
        .args(["--uid", "7", "--gid", "7"])
        .process_group(0)
        .stdin(Stdio::from(far.into_fd()))
        .spawn()
        .unwrap();
    let group = Pid::from_child(&first);
    assert_eq!(first.wait().unwrap().code(), Some(1));
    // Its child is ours now, alone in the group.
    let (_, status) = waitpgid(group, WaitOptions::empty()).unwrap().unwrap();
    assert_eq!(status.exit_status(), Some(1), "{status:?}");
}

#[test]
fn it_refuses_to_stay_root() {
    let output = std::process::Command::new(find_mica_vm().unwrap())
        .args(["--uid", "0", "--gid", "0"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("usage"));
}
