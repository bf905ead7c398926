//! What only system calls tell.
//!
//! Called by [`super::run`]; tests make theirs up. Refuses to leave anything behind: what it opens it closes,
//! and the file that it makes never has a name.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use mica_numa::preflight;
use rustix::fs::{AtFlags, OFlags, StatxFlags, ioctl_ficlone, statx};

/// Answers of the kernel.
#[derive(Debug)]
pub struct Probed {
    /// Whether `/dev/kvm` opens.
    pub kvm_device: Result<(), ErrorKind>,
    /// The operations of io_uring that are missing; an error where there are no rings at all.
    pub io_uring: Result<Vec<&'static str>, String>,
    /// Whether the store's file system clones files; `None` where that could not be tried.
    pub clones: Option<bool>,
    /// How direct reads and writes of a file there must be aligned.
    pub direct: Option<Direct>,
}

/// Alignment, as `statx` has it; zeros where a file cannot be read directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    pub memory_bytes: u32,
    pub offset_bytes: u32,
}

/// Asks.
#[must_use]
pub fn this_machine(store: &Path) -> Probed {
    let there = store.ancestors().find(|path| path.is_dir());
    Probed {
        kvm_device: kvm(),
        io_uring: preflight::missing_operations().map_err(|error| error.to_string()),
        clones: there.and_then(clones),
        direct: there.and_then(direct),
    }
}

fn kvm() -> Result<(), ErrorKind> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.map(drop).map_err(|error| error.kind())
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
