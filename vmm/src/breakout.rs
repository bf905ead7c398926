//! Attempts to break out of the jail, from where guest code would run. Only built for the tests of the
//! jail (`tests/breakout.rs`): no release has it, and a build without debug assertions refuses it.
//!
//! Called by `main`, which takes the order from the environment, and by each kind of thread once its
//! filter is in place and the guest is let go. Refuses nothing, of course: an attempt ends with the
//! process killed, or with the error number that the kernel gave, as the [`Ending`] of the VM.

#![expect(unsafe_code, reason = "attempts are system calls that no safe wrapper makes this way")]

#[cfg(not(debug_assertions))]
compile_error!("break-out attempts are for tests: build without the feature `breakout`");

use std::sync::{Arc, OnceLock};

use libc::c_long;
use mica_wire::vm::Ending;

use crate::jail::seccomp::ThreadKind;
use crate::notices::Notices;

/// The variable that holds the order: `WHERE ATTEMPT PID`. WHERE is a kind of thread, or [`BARE`].
pub const VARIABLE: &str = "MICA_BREAKOUT";
/// In the jail but before any filter: what the other walls hold by themselves.
const BARE: &str = "bare";

#[derive(Debug)]
struct Order {
    place: String,
    attempt: String,
    /// Another process, by its number outside.
    pid: usize,
}

static ORDER: OnceLock<Order> = OnceLock::new();

/// Reads the order, before the environment is out of reach.
pub fn take_order() {
    let Ok(text) = std::env::var(VARIABLE) else { return };
    let mut words = text.split_whitespace().map(str::to_owned);
    let (Some(place), Some(attempt)) = (words.next(), words.next()) else { return };
    let pid = words.next().and_then(|pid| pid.parse().ok()).unwrap_or(0);
    ORDER.get_or_init(|| Order { place, attempt, pid });
}

/// Carries the order out if it is for a process without a filter; how it ended.
#[must_use]
pub fn attempt_bare() -> Option<Ending> {
    ordered(BARE)
}

static NOTICES: OnceLock<Arc<Notices>> = OnceLock::new();

/// Where the outcome of [`attempt`] is told.
pub(crate) fn tell(notices: &Arc<Notices>) {
    NOTICES.get_or_init(|| Arc::clone(notices));
}

/// Carries the order out if it is for this kind of thread.
pub(crate) fn attempt(kind: ThreadKind) {
    if let (Some(notices), Some(ending)) = (NOTICES.get(), ordered(kind.name())) {
        notices.end(ending);
    }
}

fn ordered(place: &str) -> Option<Ending> {
    let order = ORDER.get().filter(|order| order.place == place)?;
    let words = match carry_out(&order.attempt, order.pid) {
        Some(Ok(value)) => format!("broke out: {value}"),
        Some(Err(errno)) => format!("refused: {errno}"),
        None => format!("no such attempt: {}", order.attempt),
    };
    Some(Ending::Internal(words))
}

type Outcome = Result<usize, i32>;

/// One system call; arguments that are not given are 0.
fn call<const COUNT: usize>(number: c_long, given: [usize; COUNT]) -> Outcome {
    let mut arguments = [0; 6];
    for (slot, value) in arguments.iter_mut().zip(given) {
        *slot = value;
    }
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: every pointer among the arguments is null or to something of this module that is
    // constant or outlives the call, and what any of these calls may do to this process, where it
    // is not refused, is over when the test sees that it was not.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    match usize::try_from(result) {
        Ok(value) => Ok(value),
        Err(_) => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
    }
}

fn text(text: &'static std::ffi::CStr) -> usize {
    text.as_ptr() as usize
}

/// This process, as a pidfd: `PIDFD_SELF`.
const OWN: usize = usize::MAX - 9_999;

fn number(value: c_long) -> usize {
    value.cast_unsigned().try_into().unwrap_or(0)
}

fn open(path: &'static std::ffi::CStr, flags: i32) -> Outcome {
    let here = number(c_long::from(libc::AT_FDCWD));
    call(libc::SYS_openat, [here, text(path), number(flags.into()), 0o600])
}

/// A child, if there is one, waits for its end: it goes with the first process of its namespace.
fn fork() -> Outcome {
    let child = call(libc::SYS_clone, [number(libc::SIGCHLD.into())])?;
    if child == 0 {
        loop {
            let _interrupted = call(libc::SYS_pause, [0; 3]);
        }
    }
    Ok(child)
}

fn map(bytes: usize, protection: i32) -> Outcome {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let (protection, flags) = (number(protection.into()), number(flags.into()));
    call(libc::SYS_mmap, [0, bytes, protection, flags, usize::MAX])
}

fn carry_out(attempt: &str, pid: usize) -> Option<Outcome> {
    const PAGE: usize = 4096;
    const KVM_CREATE_VM: usize = 0xae01;
    const UFFDIO_REGISTER: usize = 0xc020_aa00;
    const NEW_USER: i32 = libc::CLONE_NEWUSER;
    const ADDRESS: [u16; 8] = [2, 80, 10, 0, 0, 0, 0, 0];
    static PARAMETERS: [u64; 15] = [0; 15];
    let kill = number(libc::SIGKILL.into());
    let zeros = PARAMETERS.as_ptr() as usize;
    // One piece of memory, here and there: eight bytes.
    let mut buffer = [0u64; 1];
    let piece = [buffer.as_mut_ptr() as usize, 8];
    let piece = piece.as_ptr() as usize;
    Some(match attempt {
        "nothing" => Err(0),
        "open" => open(c"/etc/passwd", libc::O_RDONLY),
        "read-proc" => open(c"/proc/self/maps", libc::O_RDONLY),
        "create" => open(c"/x", libc::O_WRONLY | libc::O_CREAT),
        "socket" => call(libc::SYS_socket, [2, 1]),
        "unix-socket" => call(libc::SYS_socket, [1, 1]),
        "connect" => call(libc::SYS_socket, [2, 1])
            .and_then(|fd| call(libc::SYS_connect, [fd, ADDRESS.as_ptr() as usize, 16])),
        "ptrace" => call(libc::SYS_ptrace, [number(16), pid]),
        "read-memory" => call(libc::SYS_process_vm_readv, [pid, piece, 1, piece, 1]),
        "write-memory" => call(libc::SYS_process_vm_writev, [pid, piece, 1, piece, 1]),
        // Of whatever descriptor is 3, and of itself with another advice than to forget.
        "advise-other" => {
            call(libc::SYS_process_madvise, [3, piece, 1, number(libc::MADV_DONTNEED.into())])
        }
        "advise-more" => {
            call(libc::SYS_process_madvise, [OWN, piece, 1, number(libc::MADV_COLD.into())])
        }
        "ring" => call(libc::SYS_io_uring_setup, [4, zeros]),
        // Registers no files, with each descriptor until one is a ring.
        "widen-ring" => (3..100)
            .map(|fd| call(libc::SYS_io_uring_register, [fd, 2, zeros, 1]))
            .find(Result::is_ok)
            .unwrap_or(Err(libc::EBADF)),
        "fork" => fork(),
        "fork-bomb" => (0..1000).map(|_| fork()).find(Result::is_err).unwrap_or(Ok(0)),
        "thread" => call(libc::SYS_clone3, [zeros, 88]),
        "execve" => call(libc::SYS_execve, [text(c"/bin/sh")]),
        "mount" => call(libc::SYS_mount, [text(c"none"), text(c"/"), text(c"tmpfs")]),
        "unshare-net" => call(libc::SYS_unshare, [number(libc::CLONE_NEWNET.into())]),
        "unshare-user" => call(libc::SYS_unshare, [number(NEW_USER.into())]),
        "kill" => call(libc::SYS_kill, [pid, kill]),
        "kill-thread" => call(libc::SYS_tgkill, [pid, pid, kill]),
        "pidfd" => call(libc::SYS_pidfd_open, [pid]),
        "setuid" => call(libc::SYS_setresuid, [0; 3]),
        "raise-limit" => {
            static MORE: [u64; 2] = [1 << 20; 2];
            let files = number(c_long::from(libc::RLIMIT_NOFILE));
            call(libc::SYS_prlimit64, [0, files, MORE.as_ptr() as usize])
        }
        "lock-memory" => {
            map(1 << 20, libc::PROT_READ).and_then(|at| call(libc::SYS_mlock, [at, 1 << 20]))
        }
        "map-code" => map(PAGE, libc::PROT_READ | libc::PROT_EXEC),
        "make-code" => map(PAGE, libc::PROT_READ)
            .and_then(|at| call(libc::SYS_mprotect, [at, PAGE, number(libc::PROT_EXEC.into())])),
        "map-more" => map(1 << 42, libc::PROT_READ | libc::PROT_WRITE),
        "new-vm" => (3..100)
            .map(|fd| call(libc::SYS_ioctl, [fd, KVM_CREATE_VM]))
            .find(Result::is_ok)
            .unwrap_or(Err(libc::EBADF)),
        // With each descriptor until one is the userfaultfd; the filter ends it at the first.
        "register-memory" => (3..100)
            .map(|fd| call(libc::SYS_ioctl, [fd, UFFDIO_REGISTER, zeros]))
            .find(Result::is_ok)
            .unwrap_or(Err(libc::EBADF)),
        "userfault" => call(libc::SYS_userfaultfd, [0; 3]),
        "bpf" => call(libc::SYS_bpf, [0, zeros, 8]),
        "key" => call(libc::SYS_keyctl, [0; 3]),
        _ => return None,
    })
}
