//! What only system calls tell.
//!
//! Called by [`super::run`]; tests make theirs up. Refuses to leave anything behind: what it opens it closes,
//! and the file that it makes never has a name.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use mica_numa::facts::KvmKind;
use mica_numa::preflight;
use rustix::fs::{Access, AtFlags, CWD, OFlags, StatxFlags, accessat, ioctl_ficlone, statx};

/// Answers of the kernel.
#[derive(Debug)]
pub struct Probed {
    /// Whether `/dev/kvm` opens.
    pub kvm_device: Result<(), ErrorKind>,
    /// The operations of io_uring that are missing; an error where there are no rings at all.
    pub io_uring: Result<Vec<&'static str>, String>,
    /// The program of VM processes, or why it cannot be run.
    pub program: Result<PathBuf, Refused>,
    /// Whether the store can be made and written.
    pub store: Result<(), Refused>,
    /// Whether the daemon's control group can be made, and told what it hands out.
    pub cgroup: Result<(), Refused>,
    /// Whether the store's file system clones files; `None` where that could not be tried.
    pub clones: Option<bool>,
    /// How direct reads and writes of a file there must be aligned.
    pub direct: Option<Direct>,
}

/// What `mica serve` needs of a path and does not get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub path: PathBuf,
    pub why: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.why)
    }
}

/// Where `mica serve` would have its things.
#[derive(Debug)]
pub struct Places {
    pub store: PathBuf,
    pub cgroup: PathBuf,
    pub program: PathBuf,
}

/// Alignment, as `statx` has it; zeros where a file cannot be read directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    pub memory_bytes: u32,
    pub offset_bytes: u32,
}

/// Asks.
#[must_use]
pub fn this_machine(places: &Places) -> Probed {
    let there = places.store.ancestors().find(|path| path.is_dir());
    Probed {
        kvm_device: KvmKind::try_device(),
        io_uring: preflight::missing_operations().map_err(|error| error.to_string()),
        program: program(&places.program),
        store: store(&places.store),
        cgroup: cgroup(&places.cgroup),
        clones: there.and_then(clones),
        direct: there.and_then(direct),
    }
}

/// As `mica serve` checks it.
fn program(path: &Path) -> Result<PathBuf, Refused> {
    let refused = |why: String| Refused { path: path.to_owned(), why };
    let found = File::open(path).and_then(|file| file.metadata());
    let found = found.map_err(|error| refused(error.to_string()))?;
    if !found.is_file() || found.permissions().mode() & 0o111 == 0 {
        return Err(refused("it is no executable file".to_owned()));
    }
    Ok(path.to_owned())
}

/// The first directory of the path that is there has to take the others, or the store's files.
fn store(path: &Path) -> Result<(), Refused> {
    let there = path.ancestors().find(|path| path.symlink_metadata().is_ok()).unwrap_or(path);
    may(there, Access::WRITE_OK | Access::EXEC_OK)?;
    match unnamed(there) {
        // Where a file must have a name, `mica serve` gives it one.
        Err(error) if error.kind() != ErrorKind::Unsupported => {
            Err(Refused { path: there.to_owned(), why: error.to_string() })
        }
        _ => Ok(()),
    }
}

/// Without making a group: a daemon that starts now would take it for its own.
fn cgroup(path: &Path) -> Result<(), Refused> {
    let above = path.parent().unwrap_or(path);
    may(if path.exists() { path } else { above }, Access::WRITE_OK | Access::EXEC_OK)?;
    let told = [above, path].map(|group| group.join("cgroup.subtree_control"));
    told.iter().filter(|file| file.exists()).try_for_each(|file| may(file, Access::WRITE_OK))
}

/// Asks the kernel, which also looks at how the file system is mounted.
fn may(path: &Path, access: Access) -> Result<(), Refused> {
    accessat(CWD, path, access, AtFlags::EACCESS).map_err(|errno| {
        let why = io::Error::from(errno).to_string();
        Refused { path: path.to_owned(), why }
    })
}

fn unnamed(dir: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE.bits().cast_signed();
    OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags).open(dir)
}

/// Two files without names, both empty: that one can be cloned into the other tells what the file system can.
fn clones(dir: &Path) -> Option<bool> {
    let (from, to) = (unnamed(dir).ok()?, unnamed(dir).ok()?);
    Some(ioctl_ficlone(&to, &from).is_ok())
}

fn direct(dir: &Path) -> Option<Direct> {
    let file = unnamed(dir).ok()?;
    let found = statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let is_told = found.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    is_told.then_some(Direct {
        memory_bytes: found.stx_dio_mem_align,
        offset_bytes: found.stx_dio_offset_align,
    })
}
