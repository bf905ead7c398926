//! The guest's file systems, and the switch from the initramfs to the disk.
//!
//! Called by init, in the order of the functions here. Refuses a disk that does not appear within
//! [`DISK_LIMIT`].

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};

use super::{InitError, c_text};

/// The sandbox's disk.
const DISK: &str = "/dev/vda";

/// Where the disk is before it becomes the root.
const NEW_ROOT: &str = "/newroot";

/// How long the disk may take to appear after its driver was loaded.
const DISK_LIMIT: Duration = Duration::from_secs(30);

/// Between looks for the disk.
const DISK_LOOK: Duration = Duration::from_millis(5);

/// One file system to mount.
struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static str,
}

const QUIET: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

impl Mount {
    fn make(&self) -> Result<(), InitError> {
        let step = || format!("mount {} on {}", self.kind, self.target);
        std::fs::create_dir_all(self.target).map_err(InitError::at(step()))?;
        let data = c_text(self.data);
        match mount(self.kind, self.target, self.kind, self.flags, Some(data.as_c_str())) {
            // The kernel mounts devtmpfs itself when it is told to.
            Ok(()) | Err(Errno::BUSY) => Ok(()),
            Err(errno) => Err(InitError::at(step())(errno)),
        }
    }
}

/// What finding and mounting the disk needs.
pub fn early() -> Result<(), InitError> {
    let proc = QUIET.union(MountFlags::NOEXEC);
    let all = [
        Mount { kind: "proc", target: "/proc", flags: proc, data: "" },
        Mount { kind: "sysfs", target: "/sys", flags: proc, data: "" },
        Mount { kind: "devtmpfs", target: "/dev", flags: MountFlags::NOSUID, data: "mode=0755" },
    ];
    all.iter().try_for_each(Mount::make)
}

/// Mounts the disk, takes the file systems of [`early`] along, and makes it the root.
pub fn switch_to_disk() -> Result<(), InitError> {
    wait_for_disk()?;
    std::fs::create_dir_all(NEW_ROOT).map_err(InitError::at("make /newroot"))?;
    mount(DISK, NEW_ROOT, "ext4", MountFlags::NOATIME, None)
        .map_err(InitError::at("mount /dev/vda as ext4; is the template's disk one?"))?;
    free_initramfs();
    for directory in ["/proc", "/sys", "/dev"] {
        let target = format!("{NEW_ROOT}{directory}");
        std::fs::create_dir_all(&target).map_err(InitError::at(format!("make {target}")))?;
        mount_move(directory, &target).map_err(InitError::at(format!("move {directory}")))?;
    }
    rustix::process::chdir(NEW_ROOT).map_err(InitError::at("enter the new root"))?;
    mount_move(".", "/").map_err(InitError::at("move the new root onto /"))?;
    rustix::process::chroot(".").map_err(InitError::at("change the root"))?;
    rustix::process::chdir("/").map_err(InitError::at("enter /"))
}

/// Modules are memory until they are removed, and what cannot be is only that. The program goes
/// from sight; its memory is in use as long as it runs.
fn free_initramfs() {
    for path in ["/modules", "/init"] {
        let path = Path::new(path);
        let removed =
            if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
        if let Err(error) = removed
            && error.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("mica-guest: cannot free {}: {error}", path.display());
        }
    }
}

/// A driver's probe may finish after its module is loaded.
fn wait_for_disk() -> Result<(), InitError> {
    let start = Instant::now();
    while !Path::new(DISK).exists() {
        if start.elapsed() > DISK_LIMIT {
            let source = std::io::Error::from(std::io::ErrorKind::TimedOut);
            return Err(InitError::at("find the disk /dev/vda; is virtio_blk loaded?")(source));
        }
        std::thread::sleep(DISK_LOOK);
    }
    Ok(())
}

/// What a Linux system has besides its disk. `/tmp` is on the disk: in memory it would have half of
/// that at the most, and a directory could not be renamed from there to a home.
pub fn late() -> Result<(), InitError> {
    let quiet = QUIET;
    let no_exec = QUIET.union(MountFlags::NOEXEC);
    let pts = MountFlags::NOSUID.union(MountFlags::NOEXEC);
    let pts_data = "mode=0620,gid=5,ptmxmode=0666";
    let all = [
        Mount { kind: "devpts", target: "/dev/pts", flags: pts, data: pts_data },
        Mount { kind: "tmpfs", target: "/dev/shm", flags: quiet, data: "mode=1777" },
        Mount { kind: "tmpfs", target: "/run", flags: quiet, data: "mode=0755" },
        Mount { kind: "cgroup2", target: "/sys/fs/cgroup", flags: no_exec, data: "" },
    ];
    all.iter().try_for_each(Mount::make)?;
    std::fs::create_dir_all("/run/lock").map_err(InitError::at("make /run/lock"))?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        match std::os::unix::fs::symlink(target, link) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(InitError::at(format!("link {link}"))(error));
            }
            _ => {}
        }
    }
    Ok(())
}
