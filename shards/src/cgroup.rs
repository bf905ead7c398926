//! One cgroup v2 for each sandbox: its limits, and the handle by which all of it is killed.
//!
//! Called on blocking threads, and by `run` before any shard starts. Refuses a root that is not
//! cgroup v2, cannot be written, is used by another daemon, or holds anything but sandboxes: what
//! is found there at start is killed.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mica_units::{Mebibytes, SandboxId, VcpuCount};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags};

/// `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// What a VM process may use above its guest's memory: its own heap, page tables, rings.
const MEMORY_OVER_GUEST_BYTES: u64 = 64 << 20;

/// Tasks of one VM process: 8 vCPUs, a few device threads, room for the kernel's own helpers.
const PIDS_MAX: u32 = 64;

/// `cpu.weight` for each vCPU: the kernel's default for one whole cgroup.
const CPU_WEIGHT_PER_VCPU: u32 = 100;

/// How long killed processes may take to disappear.
const EMPTY_DEADLINE: Duration = Duration::from_secs(20);

/// How long a lock may be held by what a killed daemon leaves, and the time between two tries.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Controllers that limits need, then those that are only nice to have.
const REQUIRED: [&str; 2] = ["memory", "pids"];
const OPTIONAL: [&str; 1] = ["cpu"];

/// Why cgroups cannot be used, or one of them not made or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// Not a cgroup v2 file system.
    #[error(
        "{} is not in a cgroup v2 file system; set cgroup_root to a directory below its mount \
         point, or boot with systemd.unified_cgroup_hierarchy=1", .0.display()
    )]
    NotV2(PathBuf),
    /// The kernel refused.
    #[error("cannot {operation} {}; does this process run as root, with cgroups writable?",
        path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A controller is missing.
    #[error(
        "the cgroup controller {controller:?} is not available in {}; it may be bound to cgroup \
         v1: boot with systemd.unified_cgroup_hierarchy=1, or do without limits by \
         cgroup_limits_required = false", path.display()
    )]
    NoController {
        /// Which.
        controller: &'static str,
        /// Where.
        path: PathBuf,
    },
    /// Another process holds the lock.
    #[error("another daemon uses {}; stop it, or give each its own cgroup_root", .0.display())]
    InUse(PathBuf),
    /// There is a child that is no sandbox.
    #[error("{} is not a sandbox's; cgroup_root must belong to this daemon alone", .0.display())]
    Foreign(PathBuf),
    /// Processes do not die.
    #[error("processes in {} are still there {} s after they were killed", path.display(),
        EMPTY_DEADLINE.as_secs())]
    StillPopulated {
        /// The cgroup.
        path: PathBuf,
    },
}

/// Takes the lock. A process that a killed daemon was just starting has its descriptors until it becomes
/// another program, so a lock that is held is tried again for a moment.
fn lock_alone(lock: &OwnedFd) -> rustix::io::Result<()> {
    let begun = Instant::now();
    loop {
        match rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(LOCK_RETRY);
            }
            other => return other,
        }
    }
}

/// The cgroup under which every VM process has its own. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Cgroups(Arc<Root>);

#[derive(Debug)]
struct Root {
    path: PathBuf,
    controllers: Vec<&'static str>,
    // Holds the lock while the daemon lives.
    _lock: OwnedFd,
}

impl Cgroups {
    /// Makes `path` if it is not there, locks it, and enables controllers for its children.
    pub(crate) fn open(path: &Path, limits_required: bool) -> Result<Self, CgroupError> {
        let io = |operation, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| CgroupError::Io { operation, path, source }
        };
        let parent = path.parent().unwrap_or(path);
        if !is_v2(parent).map_err(io("look at", parent))? {
            return Err(CgroupError::NotV2(path.to_owned()));
        }
        match fs::create_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(io("make the cgroup", path)(error));
            }
            _ => {}
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|errno| io("open", path)(errno.into()))?;
        lock_alone(&lock).map_err(|_| CgroupError::InUse(path.to_owned()))?;
        let mut controllers = Vec::new();
        for controller in REQUIRED.into_iter().chain(OPTIONAL) {
            let enabled = enable(parent, controller).and_then(|()| enable(path, controller));
            match enabled {
                Ok(()) => controllers.push(controller),
                Err(_) if limits_required && REQUIRED.contains(&controller) => {
                    return Err(CgroupError::NoController { controller, path: path.to_owned() });
                }
                Err(error) => {
                    tracing::warn!(controller, %error, "sandboxes run without this cgroup limit");
                }
            }
        }
        Ok(Self(Arc::new(Root { path: path.to_owned(), controllers, _lock: lock })))
    }

    /// Every child, and the processes in it.
    pub(crate) fn children(&self) -> Result<Vec<(SandboxId, Vec<u32>)>, CgroupError> {
        let root = &self.0.path;
        let io = |source| CgroupError::Io { operation: "read", path: root.clone(), source };
        let mut found = Vec::new();
        for entry in fs::read_dir(root).map_err(io)? {
            let entry = entry.map_err(io)?;
            if !entry.file_type().map_err(io)?.is_dir() {
                continue;
            }
            let name = entry.file_name().to_str().and_then(|name| name.parse().ok());
            // Before any is killed: a root given by mistake must lose nothing.
            let name: SandboxId = name.ok_or_else(|| CgroupError::Foreign(entry.path()))?;
            let procs = fs::read_to_string(entry.path().join("cgroup.procs")).map_err(io)?;
            found.push((name, procs.lines().filter_map(|pid| pid.parse().ok()).collect()));
        }
        Ok(found)
    }

    /// Kills and removes these.
    pub(crate) fn sweep(&self, names: &[SandboxId]) -> Result<(), CgroupError> {
        names.iter().try_for_each(|name| self.kill(name))?;
        names.iter().try_for_each(|name| self.remove(name))
    }

    /// Makes the cgroup of a sandbox, with its limits.
    pub(crate) fn create(
        &self,
        id: &SandboxId,
        memory: Mebibytes,
        vcpus: VcpuCount,
    ) -> Result<(), CgroupError> {
        let path = self.path(id);
        let source = |source| CgroupError::Io { operation: "make", path: path.clone(), source };
        fs::create_dir(&path).map_err(source)?;
        for controller in &self.0.controllers {
            match *controller {
                "memory" => {
                    let bytes = memory.to_bytes() + MEMORY_OVER_GUEST_BYTES;
                    write(&path, "memory.max", &bytes.to_string())?;
                    write(&path, "memory.oom.group", "1")?;
                }
                "pids" => write(&path, "pids.max", &PIDS_MAX.to_string())?,
                _ => {
                    let weight = CPU_WEIGHT_PER_VCPU * u32::from(vcpus.get());
                    write(&path, "cpu.weight", &weight.to_string())?;
                }
            }
        }
        Ok(())
    }

    /// Moves a process in. What it starts from then on is in too.
    pub(crate) fn add(&self, id: &SandboxId, pid: u32) -> Result<(), CgroupError> {
        write(&self.path(id), "cgroup.procs", &pid.to_string())
    }

    /// Sends SIGKILL to everything in a sandbox's cgroup. Not an error when there is none.
    pub(crate) fn kill(&self, id: &SandboxId) -> Result<(), CgroupError> {
        match write(&self.path(id), "cgroup.kill", "1") {
            Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(())
            }
            other => other,
        }
    }

    /// Removes a sandbox's cgroup once it is empty; kill it first. Not an error when there is none.
    pub(crate) fn remove(&self, id: &SandboxId) -> Result<(), CgroupError> {
        let path = self.path(id);
        wait_empty(&path)?;
        match fs::remove_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(CgroupError::Io { operation: "remove", path, source: error })
            }
            _ => Ok(()),
        }
    }

    fn path(&self, id: &SandboxId) -> PathBuf {
        self.0.path.join(id.as_str())
    }
}

fn is_v2(path: &Path) -> io::Result<bool> {
    let kind = rustix::fs::statfs(path)?.f_type;
    Ok(u64::try_from(kind) == Ok(CGROUP2_MAGIC))
}

fn enable(path: &Path, controller: &str) -> Result<(), CgroupError> {
    write(path, "cgroup.subtree_control", &format!("+{controller}"))
}

fn write(cgroup: &Path, file: &'static str, value: &str) -> Result<(), CgroupError> {
    let path = cgroup.join(file);
    // Not fs::write: it would make a file that is not there, where the file system lets it.
    let written = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
    written.map_err(|source| CgroupError::Io { operation: "write", path, source })
}

/// Waits for `populated 0` in `cgroup.events`, which signals every change as POLLPRI.
fn wait_empty(cgroup: &Path) -> Result<(), CgroupError> {
    let path = cgroup.join("cgroup.events");
    let io = |source| CgroupError::Io { operation: "watch", path: path.clone(), source };
    let events = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(io)?,
    };
    let begun = Instant::now();
    loop {
        let mut text = [0u8; 256];
        let length = rustix::io::pread(&events, &mut text, 0).map_err(|e| io(e.into()))?;
        let empty = text[..length].split(|b| *b == b'\n').any(|line| line == b"populated 0");
        if empty {
            return Ok(());
        }
        let left = EMPTY_DEADLINE.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Err(CgroupError::StillPopulated { path: cgroup.to_owned() });
        }
        let wait = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let mut watched = [PollFd::new(&events, PollFlags::PRI)];
        match poll(&mut watched, Some(&wait)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(io(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_directory_is_refused() {
        let refused = Cgroups::open(Path::new("/tmp/mica-no-cgroup"), false);
        assert!(matches!(refused, Err(CgroupError::NotV2(_))), "{refused:?}");
        assert!(!Path::new("/tmp/mica-no-cgroup").exists());
    }
}
