//! The jail: what this process gives up before it reads the first frame, and before guest code runs.
//!
//! Called by `main` while there is one thread. Afterwards: no file system but an empty read-only
//! one, no network, no other process's IPC, no descriptor but the control socket and `/dev/null`, a
//! user of its own without any privilege, and a list of allowed system calls. Refuses to go on when
//! any step fails: a half-closed jail is an open one.

pub mod descriptors;
pub mod limits;
pub mod seccomp;

use rustix::fs::{Gid, Mode, OFlags, Uid, open};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};
use rustix::process::{DumpableBehavior, chdir, pivot_root, set_dumpable_behavior, umask};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

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
    source: Errno,
}

fn step(step: &'static str) -> impl Fn(Errno) -> JailError {
    move |source| JailError { step, source }
}

/// Closes everything but system calls; see [`seccomp`] for those.
///
/// # Errors
/// When any step fails. The process must end then.
pub fn enter(ids: Ids) -> Result<(), JailError> {
    replace_stdio()?;
    limits::set().map_err(step("lower the resource limits"))?;
    leave_namespaces()?;
    enter_empty_root()?;
    drop_privileges(ids)
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
fn leave_namespaces() -> Result<(), JailError> {
    let flags =
        UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNET;
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
