//! System call filters: one allow list for each kind of thread; anything else kills the process.
//!
//! Called by each thread for itself. Filters add up, so every later list is a part of
//! [`ThreadKind::Setup`]'s, which all threads inherit. Refuses by default: a system call that is not
//! here was either never needed, or is the guest's way out.
//!
//! | kind | when | what beyond memory and locks |
//! |---|---|---|
//! | Setup | from the jail to the finished shell | KVM set-up, rings, threads |
//! | Control | the first thread, from then on | frames, poll, kicks, images, mapping layers, chips and clock |
//! | [`Doors`] | the first thread, once there is a guest | the same without what only gives it its disk |
//! | Vcpu | as soon as there are vCPUs | `KVM_RUN`, state of vCPUs, events, closing sockets |
//! | Devices | as soon as there are devices | epoll, the disk ring, sockets already open |

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use crate::memory::PIDFD_SELF;

/// Which list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// The only thread, while it builds the VM.
    Setup,
    /// The first thread, once the VM is built.
    Control,
    /// A vCPU's thread.
    Vcpu,
    /// The thread of the virtio devices.
    Devices,
}

impl ThreadKind {
    /// A word for endings.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Control => "control",
            Self::Vcpu => "vCPU",
            Self::Devices => "device",
        }
    }
}

/// Why a filter is not in place.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// A mistake in the lists.
    #[error("the {0} filter does not compile")]
    Compile(&'static str, #[source] seccompiler::BackendError),
    /// The kernel refused.
    #[error("the {0} filter was not taken; is seccomp built into this kernel?")]
    Install(&'static str, #[source] seccompiler::Error),
}

/// Installs the filter of this kind on the current thread. It cannot be taken off.
///
/// # Errors
/// See [`SeccompError`].
pub fn install(kind: ThreadKind) -> Result<(), SeccompError> {
    let program = compile(kind).map_err(|error| SeccompError::Compile(kind.name(), error))?;
    apply_filter(&program).map_err(|error| SeccompError::Install(kind.name(), error))
}

/// What the control thread may do until its guest is there, and never again: register the disk with its
/// ring, limit the size of files to it, look for places in images. Compiled ahead, because somebody waits
/// for the sandbox when it is installed, and short for the same reason: it only takes away.
#[derive(Debug)]
pub struct Doors(BpfProgram);

impl Doors {
    /// The filter that shuts them.
    ///
    /// # Errors
    /// When there is a mistake in the list.
    pub fn open() -> Result<Self, SeccompError> {
        let rules = DOORS.iter().map(|call| (*call, Vec::new())).collect();
        let taken = (SeccompAction::Allow, SeccompAction::KillProcess);
        let program = SeccompFilter::new(rules, taken.0, taken.1, TargetArch::x86_64)
            .and_then(TryInto::try_into)
            .map_err(|error| SeccompError::Compile("doors", error))?;
        Ok(Self(program))
    }

    /// Shuts them, for the current thread and for good.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn shut(self) -> Result<(), SeccompError> {
        apply_filter(&self.0).map_err(|error| SeccompError::Install("doors", error))
    }
}

/// See [`Doors`]. The last two install it.
const DOORS: &[c_long] = &[
    libc::SYS_io_uring_register,
    libc::SYS_lseek,
    libc::SYS_prlimit64,
    libc::SYS_prctl,
    libc::SYS_seccomp,
];

/// Memory, locks, signals and the end of a thread: what the runtime does by itself.
const RUNTIME: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

/// Only to build the VM and start its threads.
const SETUP: &[c_long] = &[
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    libc::SYS_fstat,
    libc::SYS_getrandom,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_pread64,
    libc::SYS_prlimit64,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_sched_getaffinity,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
    libc::SYS_statx,
];

/// A boot reads images; a restore looks at layers, maps them and copies from them, and a rollback also
/// closes streams of the time before.
const CONTROL: &[c_long] = &[
    libc::SYS_epoll_ctl,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_recvmsg,
    libc::SYS_seccomp,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_tgkill,
];

/// What is registered with the disk's ring when its file comes. The last of them also closes the ring to
/// every registration that could follow: see `ring.rs`.
const RING_REGISTRATIONS: [u32; 3] = [
    2,  // IORING_REGISTER_FILES
    11, // IORING_REGISTER_RESTRICTIONS
    12, // IORING_REGISTER_ENABLE_RINGS
];

/// A guest that resets its vsock device closes the streams on the vCPU thread that wrote the register;
/// and the last thread to leave drops the devices.
const VCPU: &[c_long] = &[libc::SYS_epoll_ctl, libc::SYS_shutdown];

const DEVICES: &[c_long] = &[
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_getrandom,
    libc::SYS_io_uring_enter,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

/// KVM requests of a vCPU's thread: run it, tell a halted guest from an idle one, enter a kernel, save
/// and restore the vCPU.
const KVM_VCPU: &[u32] = &[
    0xae80,      // KVM_RUN
    0x8090_ae81, // KVM_GET_REGS
    0x4090_ae82, // KVM_SET_REGS
    0x8138_ae83, // KVM_GET_SREGS
    0x4138_ae84, // KVM_SET_SREGS
    0xc008_ae88, // KVM_GET_MSRS
    0x4008_ae89, // KVM_SET_MSRS
    0x8400_ae8e, // KVM_GET_LAPIC
    0x4400_ae8f, // KVM_SET_LAPIC
    0x4008_ae90, // KVM_SET_CPUID2
    0x8004_ae98, // KVM_GET_MP_STATE
    0x4004_ae99, // KVM_SET_MP_STATE
    0x8040_ae9f, // KVM_GET_VCPU_EVENTS
    0x4040_aea0, // KVM_SET_VCPU_EVENTS
    0x8080_aea1, // KVM_GET_DEBUGREGS
    0x4080_aea2, // KVM_SET_DEBUGREGS
    0xaea2,      // KVM_SET_TSC_KHZ
    0x9000_aea4, // KVM_GET_XSAVE
    0x5000_aea5, // KVM_SET_XSAVE
    0x8188_aea6, // KVM_GET_XCRS
    0x4188_aea7, // KVM_SET_XCRS
    0xaead,      // KVM_KVMCLOCK_CTRL
    0x9000_aecf, // KVM_GET_XSAVE2
];

/// Requests of the control thread once there is a guest: KVM's for interrupt chips, clock and log. None of the
/// userfaultfd's: whoever registers memory can have the shard wait for it when it reads that memory.
const CONTROL_REQUESTS: &[u32] = &[
    0x4010_ae42, // KVM_GET_DIRTY_LOG
    0xc208_ae62, // KVM_GET_IRQCHIP
    0x8208_ae63, // KVM_SET_IRQCHIP
    0x4030_ae7b, // KVM_SET_CLOCK
    0x8030_ae7c, // KVM_GET_CLOCK
];

/// Requests that build a VM, and the one that makes the userfaultfd ready for the shard.
const KVM_SETUP: &[u32] = &[
    0xc018_aa3f, // UFFDIO_API
    0xae00,      // KVM_GET_API_VERSION
    0xae01,      // KVM_CREATE_VM
    0xc004_ae02, // KVM_GET_MSR_INDEX_LIST
    0xae03,      // KVM_CHECK_EXTENSION
    0xae04,      // KVM_GET_VCPU_MMAP_SIZE
    0xc008_ae05, // KVM_GET_SUPPORTED_CPUID
    0xae41,      // KVM_CREATE_VCPU
    0x4020_ae46, // KVM_SET_USER_MEMORY_REGION
    0xae47,      // KVM_SET_TSS_ADDR
    0xae60,      // KVM_CREATE_IRQCHIP
    0x4020_ae76, // KVM_IRQFD
    0x4040_ae79, // KVM_IOEVENTFD
    0x41a0_ae8d, // KVM_SET_FPU
    0xaea3,      // KVM_GET_TSC_KHZ
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;
type Compiled<T> = Result<T, seccompiler::BackendError>;

fn compile(kind: ThreadKind) -> Compiled<BpfProgram> {
    SeccompFilter::new(
        rules(kind)?,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

fn rules(kind: ThreadKind) -> Compiled<Rules> {
    let mut rules = Rules::new();
    let mut allow = |calls: &[c_long]| {
        rules.extend(calls.iter().map(|call| (*call, Vec::new())));
    };
    allow(RUNTIME);
    let ioctls: Vec<u32> = match kind {
        ThreadKind::Setup => {
            // All that the threads after it may do, or the filters would add up to less.
            [SETUP, CONTROL, DEVICES].into_iter().for_each(allow);
            [KVM_SETUP, KVM_VCPU, CONTROL_REQUESTS].concat()
        }
        ThreadKind::Control => {
            allow(CONTROL);
            CONTROL_REQUESTS.to_vec()
        }
        ThreadKind::Vcpu => {
            allow(VCPU);
            KVM_VCPU.to_vec()
        }
        ThreadKind::Devices => {
            allow(DEVICES);
            Vec::new()
        }
    };
    if !ioctls.is_empty() {
        rules.insert(libc::SYS_ioctl, ioctls.into_iter().map(ioctl).collect::<Compiled<_>>()?);
    }
    // Debug builds of the standard library check each descriptor they close.
    let mut fcntls = vec![libc::F_GETFD];
    if kind == ThreadKind::Setup {
        fcntls.push(libc::F_DUPFD_CLOEXEC);
    }
    let fcntls = fcntls.into_iter().map(|op| argument(1, SeccompCmpOp::Eq, op.cast_unsigned()));
    rules.insert(libc::SYS_fcntl, fcntls.collect::<Compiled<_>>()?);
    rules.insert(libc::SYS_mmap, vec![never_executable()?]);
    if matches!(kind, ThreadKind::Setup | ThreadKind::Control) {
        rules.insert(libc::SYS_process_madvise, vec![forget_own_memory()?]);
    }
    if kind == ThreadKind::Control {
        let registrations = RING_REGISTRATIONS.map(|op| argument(1, SeccompCmpOp::Eq, op));
        let registrations = registrations.into_iter().collect::<Compiled<_>>()?;
        rules.insert(libc::SYS_io_uring_register, registrations);
        let files = argument(1, SeccompCmpOp::Eq, libc::RLIMIT_FSIZE)?;
        rules.insert(libc::SYS_prlimit64, vec![files]);
    }
    // What the next filter needs, and names of threads.
    let mut options = vec![libc::PR_SET_NO_NEW_PRIVS, libc::PR_SET_SECCOMP];
    if kind == ThreadKind::Setup {
        rules.insert(libc::SYS_mprotect, vec![never_executable()?]);
        options.push(libc::PR_SET_NAME);
    }
    if matches!(kind, ThreadKind::Setup | ThreadKind::Control) {
        let named = options.into_iter();
        let named = named.map(|option| argument(0, SeccompCmpOp::Eq, option.cast_unsigned()));
        rules.insert(libc::SYS_prctl, named.collect::<Compiled<_>>()?);
    }
    Ok(rules)
}

fn argument(index: u8, op: SeccompCmpOp, value: u32) -> Compiled<SeccompRule> {
    let length = SeccompCmpArgLen::Dword;
    SeccompRule::new(vec![SeccompCondition::new(index, length, op, u64::from(value))?])
}

fn ioctl(request: u32) -> Compiled<SeccompRule> {
    argument(1, SeccompCmpOp::Eq, request)
}

/// `process_madvise` of this process alone, and only what `madvise` may do to guest memory.
fn forget_own_memory() -> Compiled<SeccompRule> {
    let length = SeccompCmpArgLen::Dword;
    let is = |index, value: i32| {
        let value = u64::from(value.cast_unsigned());
        SeccompCondition::new(index, length.clone(), SeccompCmpOp::Eq, value)
    };
    SeccompRule::new(vec![is(0, PIDFD_SELF)?, is(3, libc::MADV_DONTNEED)?])
}

/// `mmap` and `mprotect` take the protection as their third argument.
fn never_executable() -> Compiled<SeccompRule> {
    let executable = u64::from(libc::PROT_EXEC.cast_unsigned());
    argument(2, SeccompCmpOp::MaskedEq(executable), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [ThreadKind; 4] =
        [ThreadKind::Setup, ThreadKind::Control, ThreadKind::Vcpu, ThreadKind::Devices];

    #[test]
    fn every_filter_compiles() {
        for kind in ALL {
            assert!(!compile(kind).unwrap().is_empty(), "{kind:?}");
        }
    }

    #[test]
    fn the_doors_are_among_what_control_may_do() {
        let control = rules(ThreadKind::Control).unwrap();
        assert!(DOORS.iter().all(|call| control.contains_key(call)));
        assert!(!Doors::open().unwrap().0.is_empty());
    }

    #[test]
    fn later_filters_are_parts_of_the_first() {
        let setup = rules(ThreadKind::Setup).unwrap();
        for kind in ALL {
            for call in rules(kind).unwrap().keys() {
                assert!(setup.contains_key(call), "{kind:?} allows {call}, Setup does not");
            }
        }
    }

    #[test]
    fn nothing_that_leaves_the_jail_is_on_any_list() {
        let escapes = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_kill,
            libc::SYS_bpf,
        ];
        for kind in ALL {
            let rules = rules(kind).unwrap();
            assert!(escapes.iter().all(|call| !rules.contains_key(call)), "{kind:?}");
        }
        for kind in [ThreadKind::Control, ThreadKind::Vcpu, ThreadKind::Devices] {
            let rules = rules(kind).unwrap();
            for call in [libc::SYS_clone, libc::SYS_clone3, libc::SYS_io_uring_setup] {
                assert!(!rules.contains_key(&call), "{kind:?} {call}");
            }
        }
    }

    #[test]
    fn only_the_control_thread_forgets_many_runs_and_only_its_own() {
        for kind in [ThreadKind::Vcpu, ThreadKind::Devices] {
            assert!(!rules(kind).unwrap().contains_key(&libc::SYS_process_madvise), "{kind:?}");
        }
        // Rules allow what any of them does, and a list without rules allows everything.
        for kind in [ThreadKind::Setup, ThreadKind::Control] {
            let own = vec![forget_own_memory().unwrap()];
            assert_eq!(rules(kind).unwrap()[&libc::SYS_process_madvise], own, "{kind:?}");
        }
    }

    #[test]
    fn nobody_registers_memory_with_the_userfaultfd() {
        // The type of its requests is 0xaa; only UFFDIO_API is on a list, and only on Setup's.
        let of_userfaultfd = |requests: &[u32]| -> Vec<u32> {
            requests.iter().copied().filter(|request| request >> 8 & 0xff == 0xaa).collect()
        };
        assert_eq!(of_userfaultfd(KVM_SETUP), [0xc018_aa3f_u32]);
        assert!(of_userfaultfd(KVM_VCPU).is_empty());
        assert!(of_userfaultfd(CONTROL_REQUESTS).is_empty());
    }

    /// Names the kind whose filter this process, started by the test below, dies by.
    const CHILD: &str = "MICA_SECCOMP_CHILD";

    #[test]
    fn a_system_call_that_is_not_listed_kills_the_process() {
        use std::os::unix::process::ExitStatusExt;
        if let Ok(name) = std::env::var(CHILD) {
            let kind = ALL.into_iter().find(|kind| kind.name() == name).unwrap();
            install(kind).unwrap();
            let outcome = std::fs::File::open("/dev/null");
            panic!("the {name} filter let a file be opened: {outcome:?}");
        }
        let own = "jail::seccomp::tests::a_system_call_that_is_not_listed_kills_the_process";
        for kind in ALL {
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", own])
                .env(CHILD, kind.name())
                .output()
                .unwrap();
            assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{kind:?}: {output:?}");
        }
    }
}
