//! The jail: what this process gives up before it reads the first frame, and before guest code runs.
//!
//! Called by `main` while there is one thread. Afterwards: no file system but an empty read-only
//! one, no network, no other process to see or signal, no other process's IPC, no descriptor but the
//! control socket, `/dev/null` and a userfaultfd of its own, a user of its own without any privilege,
//! and a list of allowed system calls. Refuses to go on when any step fails: a half-closed jail is an
//! open one. What each wall is for, and which test shows it, is in `docs/jail.md`.

pub mod descriptors;
pub mod limits;
mod process;
pub mod seccomp;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use mica_wire::vm::ControlSocket;
use rustix::fs::{Gid, Mode, OFlags, Uid, open};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};
use rustix::process::{DumpableBehavior, chdir, pivot_root, set_dumpable_behavior, umask};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{
    CapabilitySet, CapabilitySets, LinkNameSpaceType, UnshareFlags, move_into_link_name_space,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

pub use process::Side;

/// Who the process becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// User and file owner; not 0.
    pub uid: u32,
    /// Group; not 0.
    pub gid: u32,
}

/// Why the jail is not closed.
#[derive(Debug, thiserror::Error)]
#[error("jail: cannot {step}; is this process started as root?")]
pub struct JailError {
    step: &'static str,
    #[source]
    source: io::Error,
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> JailError {
    move |source| JailError { step, source: source.into() }
}

/// Leaves the namespaces of the daemon and becomes two processes: see [`Side`] for what each has to do
/// next. `network` is an empty network namespace that others may share; without one it makes its own.
///
/// # Errors
/// When any step fails. The process must end then.
pub fn separate(socket: &ControlSocket, network: Option<OwnedFd>) -> Result<Side, JailError> {
    // Opened among the mounts of the daemon, or it would keep a copy of all of them.
    replace_stdio()?;
    leave_namespaces(network)?;
    process::split(socket).map_err(step("start its process"))
}

/// Closes everything but system calls; see [`seccomp`] for those.
///
/// # Errors
/// When any step fails. The process must end then.
pub fn enter(ids: Ids) -> Result<(), JailError> {
    limits::set().map_err(step("lower the resource limits"))?;
    enter_empty_root()?;
    let userfault = descriptors::userfault().map_err(step("make a userfaultfd"))?;
    *USERFAULT.lock().unwrap_or_else(PoisonError::into_inner) = userfault;
    drop_privileges(ids)
}

/// Made in the jail, because it takes a privilege; wanted by whoever maps guest memory.
static USERFAULT: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// A userfaultfd that also serves the faults of a guest, where the kernel gave one. The first caller
/// gets it.
#[must_use]
pub fn take_userfault() -> Option<OwnedFd> {
    USERFAULT.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// The control socket has moved to another number; what is left points nowhere.
fn replace_stdio() -> Result<(), JailError> {
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(step("open /dev/null"))?;
    dup2_stdin(&null).map_err(step("replace standard input"))?;
    dup2_stdout(&null).map_err(step("replace standard output"))?;
    dup2_stderr(&null).map_err(step("replace standard error"))
}

#[expect(
    deprecated,
    reason = "its successor is unsafe for CLONE_FILES, which is not asked for here"
)]
fn leave_namespaces(network: Option<OwnedFd>) -> Result<(), JailError> {
    let mut flags =
        UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWPID;
    match network {
        Some(network) => {
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(step("enter the network namespace it was given"))?;
        }
        None => flags |= UnshareFlags::NEWNET,
    }
    rustix::thread::unshare(flags).map_err(step("make its own namespaces"))
}

/// Any directory that every Linux has: only the place where the new root is put for a moment.
const STEPPING_STONE: &str = "/proc";

fn enter_empty_root() -> Result<(), JailError> {
    // Or the host would see the mounts that follow.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .map_err(step("make its mounts private"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("none", STEPPING_STONE, "tmpfs", flags, Some(c"size=4k,nr_inodes=1,mode=0555"))
        .map_err(step("mount an empty root"))?;
    chdir(STEPPING_STONE).map_err(step("enter the empty root"))?;
    // Both at once: the old root is stacked on the new one, and comes off again.
    pivot_root(".", ".").map_err(step("change its root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("let go of the old root"))?;
    chdir("/").map_err(step("enter the new root"))?;
    mount_remount("/", flags | MountFlags::RDONLY | MountFlags::BIND, c"")
        .map_err(step("make its root read-only"))
}

fn drop_privileges(ids: Ids) -> Result<(), JailError> {
    let (uid, gid) = (Uid::from_raw(ids.uid), Gid::from_raw(ids.gid));
    umask(Mode::from_raw_mode(0o777));
    // There is one thread yet, so "of the thread" is "of the process".
    empty_bounding_set().map_err(step("empty its bounding set"))?;
    set_thread_groups(&[]).map_err(step("drop its groups"))?;
    set_thread_res_gid(gid, gid, gid).map_err(step("change its group"))?;
    set_thread_res_uid(uid, uid, uid).map_err(step("change its user"))?;
    // Leaving user 0 clears most of them, unless the secure bits say otherwise, and not the
    // inheritable ones.
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, none).map_err(step("drop its capabilities"))?;
    set_no_new_privs(true).map_err(step("give up new privileges"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("become undumpable"))
}

/// Takes away what a program could bring back by being run, though no filter lets one be run.
fn empty_bounding_set() -> Result<(), Errno> {
    for bit in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // The first that this kernel does not know: it has none above either.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
