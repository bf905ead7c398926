//! Break-out tests: a real `mica-vm`, jailed and with its guest let go, tries to leave.
//!
//! `cargo test -p mica-vmm --features breakout --test breakout`, as root, with `/dev/kvm`. The program
//! is built with the same feature, which makes one of its threads do one forbidden thing instead of
//! what it is for. Refuses to pass for want of a try: each attempt must end as its line says.

#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command as Program, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use mica_wire::vm::{
    BootConfig, Command, ControlSocket, EXCHANGE_BYTES, Ending, Event, FdRole, ShellConfig,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, WaitOptions, WaitStatus, set_child_subreaper, waitpid};

/// How an attempt has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The whole process is killed by its filter.
    Killed,
    /// The kernel refuses with this error, and the process goes on.
    Refused(i32),
}
use End::{Killed, Refused};

/// What no thread may do while guest code runs.
const FORBIDDEN: &[&str] = &[
    "open",
    "read-proc",
    "create",
    "socket",
    "unix-socket",
    "ptrace",
    "read-memory",
    "write-memory",
    "advise-other",
    "advise-more",
    "ring",
    "widen-ring",
    "fork",
    "thread",
    "execve",
    "mount",
    "unshare-net",
    "unshare-user",
    "kill",
    "pidfd",
    "setuid",
    "raise-limit",
    "lock-memory",
    "map-code",
    "make-code",
    "new-vm",
    "register-memory",
    "userfault",
    "bpf",
    "key",
];

/// What the other walls do to a process whose filter is not there yet.
const BARE: &[(&str, End)] = &[
    // Its root is empty, and read-only.
    ("open", Refused(libc::ENOENT)),
    ("read-proc", Refused(libc::ENOENT)),
    ("execve", Refused(libc::ENOENT)),
    ("create", Refused(libc::EROFS)),
    // Its network has no way out.
    ("connect", Refused(libc::ENETUNREACH)),
    // No other process has a number in its pid namespace.
    ("ptrace", Refused(libc::ESRCH)),
    ("read-memory", Refused(libc::ESRCH)),
    ("write-memory", Refused(libc::ESRCH)),
    ("kill", Refused(libc::ESRCH)),
    ("kill-thread", Refused(libc::ESRCH)),
    // It has no privilege.
    ("mount", Refused(libc::EPERM)),
    ("unshare-net", Refused(libc::EPERM)),
    ("setuid", Refused(libc::EPERM)),
    // Its limits cannot be raised.
    ("raise-limit", Refused(libc::EPERM)),
    ("lock-memory", Refused(libc::ENOMEM)),
    ("fork-bomb", Refused(libc::EAGAIN)),
];

/// Long enough for a busy machine; every wait is for an event.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// A process to be attacked: killed when dropped.
struct Neighbour(Child);

impl Neighbour {
    fn new() -> Self {
        Self(Program::new("sleep").arg("1000").spawn().unwrap())
    }

    fn is_alive(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A `mica-vm` with an order to break out.
struct Prisoner {
    socket: ControlSocket,
    pid: Pid,
}

impl Prisoner {
    fn new(place: &str, attempt: &str, neighbour: u32) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = 400_000 + std::process::id() % 20_000 * 256 + NEXT.fetch_add(1, Ordering::Relaxed);
        set_child_subreaper(Some(Pid::INIT)).unwrap();
        let (socket, far) = ControlSocket::pair().unwrap();
        let mut first = Program::new(env!("CARGO_BIN_EXE_mica-vm"))
            .args(["--uid", &id.to_string(), "--gid", &id.to_string()])
            .env(mica_vmm::breakout::VARIABLE, format!("{place} {attempt} {neighbour}"))
            .stdin(Stdio::from(far.into_fd()))
            .spawn()
            .unwrap();
        let Some(Event::Spawned { pid }) = receive(&socket) else { panic!("no number") };
        assert!(first.wait().unwrap().success());
        Self { socket, pid: Pid::from_raw(i32::try_from(pid).unwrap()).unwrap() }
    }

    /// Boots a guest that idles; from then on the order is carried out.
    fn let_go(&self) {
        assert_eq!(receive(&self.socket), Some(Event::Jailed));
        let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
        let (console, exchange) = (memfd("console", &[0; 4096]), memfd("exchange", &[]));
        rustix::fs::ftruncate(&exchange, EXCHANGE_BYTES).unwrap();
        let config = ShellConfig {
            vcpus: 2,
            memory_mib: 64,
            disk: true,
            console_bytes: 4096,
            exchange_bytes: EXCHANGE_BYTES,
            log_writes: false,
            fds: vec![FdRole::Kvm, FdRole::Console, FdRole::Exchange, FdRole::Spare],
        };
        // A spare that nobody uses: our own end has to be the last, so that its closing is seen.
        let spare = memfd("spare", &[]);
        let fds = [kvm.as_fd(), console.as_fd(), exchange.as_fd(), spare.as_fd()];
        self.socket.send_command(&Command::Build(config), &fds).unwrap();
        let built = receive(&self.socket);
        assert!(matches!(built, Some(Event::Built(_))), "{built:?}");
        let (kernel, disk) = (memfd("kernel", &idle_guest()), memfd("disk", &[0; 4096]));
        let config = BootConfig {
            cmdline: String::new(),
            disk_read_only: false,
            fds: vec![FdRole::Kernel, FdRole::Disk],
        };
        let fds = [kernel.as_fd(), disk.as_fd()];
        self.socket.send_command(&Command::Boot(config), &fds).unwrap();
    }

    /// How it ended, by its last words and by its exit.
    fn end(self) -> (Option<Ending>, WaitStatus) {
        let mut last = None;
        while let Some(event) = receive(&self.socket) {
            if let Event::Ended(ending) = event {
                last = Some(ending);
            }
        }
        let (_, status) = waitpid(Some(self.pid), WaitOptions::empty()).unwrap().unwrap();
        (last, status)
    }
}

/// The next event, or nothing when the process is gone.
fn receive(socket: &ControlSocket) -> Option<Event> {
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    assert_ne!(poll(&mut fds, Some(&PATIENCE)).unwrap(), 0, "no event came");
    socket.receive_event().ok()
}

fn check(place: &str, attempt: &str, expected: End) {
    let mut neighbour = Neighbour::new();
    let prisoner = Prisoner::new(place, attempt, neighbour.0.id());
    if place != "bare" {
        prisoner.let_go();
    }
    let (last, status) = prisoner.end();
    match expected {
        Killed => {
            let signal = status.terminating_signal();
            assert_eq!(signal, Some(libc::SIGSYS), "{place} {attempt}: {last:?} {status:?}");
            assert_eq!(last, None, "{place} {attempt}");
        }
        Refused(errno) => {
            let words = Ending::Internal(format!("refused: {errno}"));
            assert_eq!(last, Some(words), "{place} {attempt}: {status:?}");
        }
    }
    assert!(neighbour.is_alive(), "{place} {attempt}");
}

/// All attempts from one kind of thread, and how an attempt to signal a stranger ends there.
fn check_thread(place: &str, kill_thread: End) {
    if !have_kvm() {
        return;
    }
    // Nothing kills it before the attempt.
    check(place, "nothing", Refused(0));
    for attempt in FORBIDDEN {
        check(place, attempt, Killed);
    }
    check(place, "kill-thread", kill_thread);
    // Memory is a thread's to map, as far as the limit goes.
    check(place, "map-more", Refused(libc::ENOMEM));
}

#[test]
fn a_vcpu_thread_cannot_leave() {
    check_thread("vCPU", Killed);
}

#[test]
fn the_device_thread_cannot_leave() {
    check_thread("device", Killed);
}

#[test]
fn the_control_thread_cannot_leave() {
    // It signals vCPU threads; no other process has a number here.
    check_thread("control", Refused(libc::ESRCH));
}

#[test]
fn the_other_walls_hold_without_a_filter() {
    for (attempt, expected) in BARE {
        check("bare", attempt, *expected);
    }
}

/// Attempts are real ones: what nothing forbids succeeds, and is told.
#[test]
fn an_attempt_that_nothing_forbids_breaks_out() {
    let (last, _) = Prisoner::new("bare", "fork", 0).end();
    assert_eq!(last, Some(Ending::Internal("broke out: 2".to_owned())));
    let (last, _) = Prisoner::new("bare", "nonsense", 0).end();
    assert_eq!(last, Some(Ending::Internal("no such attempt: nonsense".to_owned())));
}

/// See `default_build.rs`, which checks that the word is nowhere else.
#[test]
fn the_word_of_the_attempts_is_in_this_program() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_mica-vm")).unwrap();
    let word = b"MICA_BREAKOUT";
    assert_eq!(word, mica_vmm::breakout::VARIABLE.as_bytes());
    assert!(program.windows(word.len()).any(|window| window == word));
}

fn have_kvm() -> bool {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) if std::env::var_os("REQUIRE_KVM").is_some_and(|value| value == "1") => {
            panic!("REQUIRE_KVM=1, but /dev/kvm cannot be opened: {error}")
        }
        Err(error) => {
            eprintln!("SKIPPED: /dev/kvm cannot be opened: {error}");
            false
        }
    }
}

/// A memfd with these contents.
fn memfd(name: &str, contents: &[u8]) -> OwnedFd {
    let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(contents, 0).unwrap();
    file.into()
}

/// An ELF executable of one segment at 1 MiB: `sti; hlt`, in a circle.
fn idle_guest() -> Vec<u8> {
    const CODE: [u8; 4] = [0xfb, 0xf4, 0xeb, 0xfd];
    let mut image = Vec::new();
    image.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0");
    for word in [0x10_0000u64, 64, 0] {
        image.extend_from_slice(&word.to_le_bytes());
    }
    image.extend_from_slice(&[0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    image.extend_from_slice(&[1, 0, 0, 0, 7, 0, 0, 0]);
    for word in [0x1000u64, 0x10_0000, 0x10_0000, 4, 4, 0x1000] {
        image.extend_from_slice(&word.to_le_bytes());
    }
    image.resize(0x1000, 0);
    image.extend_from_slice(&CODE);
    image
}
