//! Makes the root disk image from a root file system.
//!
//! Called by the build. Refuses a disk that is too small for its content before it starts.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::cache::{Cache, Key};
use super::runner::{Runner, bound_to_us};

/// A fixed identity: a sandbox's disk is a copy in any case, and equal inputs give equal images.
const UUID: &str = "6d696361-0000-4000-8000-000000000001";
/// Space that the file system's own tables and a first command need.
const SPARE_MIB: u64 = 64;
/// `ext4` without a journal: a disk lives as long as its sandbox, which never boots twice from it,
/// and its snapshots are taken with the guest's memory. Tables are not zeroed: the file is new,
/// so they read as zeros already, and the guest need not zero them later.
const FEATURES: &str = "^has_journal,^resize_inode";

/// The key of a disk stage.
pub fn key(rootfs: &Key, disk_mib: u32) -> Key {
    Key::of(&[
        ("rootfs", rootfs.as_str()),
        ("mib", &disk_mib.to_string()),
        ("format", &format!("ext4 {FEATURES} {UUID}")),
    ])
}

/// Makes `disk` in a stage.
///
/// # Errors
/// When the content does not fit, or `mkfs.ext4` fails.
pub fn disk(
    runner: &Runner,
    cache: &Cache,
    key: &Key,
    rootfs: &Path,
    disk_mib: u32,
) -> Result<PathBuf> {
    cache.stage(runner, "disk", key, |out| {
        let used = used_mib(rootfs)?;
        let needed = used + used / 16 + SPARE_MIB;
        runner.say("disk", &format!("{used} MiB of files into an image of {disk_mib} MiB"))?;
        if needed > u64::from(disk_mib) {
            bail!("the files take {used} MiB; give --disk-mib {needed} or more");
        }
        let path = out.join("disk");
        let file =
            File::create(&path).with_context(|| format!("could not make {}", path.display()))?;
        file.set_len(u64::from(disk_mib) << 20).context("could not size the disk image")?;
        let mut mkfs = bound_to_us("mkfs.ext4");
        mkfs.args(["-q", "-F", "-m", "0", "-L", "root", "-U", UUID, "-O", FEATURES])
            .args(["-E", &format!("assume_storage_prezeroed=1,root_owner=0:0,hash_seed={UUID}")])
            .arg("-d")
            .arg(rootfs)
            .arg(&path);
        runner.run("disk mkfs", mkfs)
    })
}

/// MiB that the files below `dir` take, in blocks of 4 KiB.
fn used_mib(dir: &Path) -> Result<u64> {
    Ok(used_blocks(dir)?.div_ceil(256))
}

fn used_blocks(dir: &Path) -> Result<u64> {
    let mut blocks = 1;
    for entry in fs::read_dir(dir).with_context(|| format!("could not list {}", dir.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        blocks += match () {
            () if kind.is_dir() => used_blocks(&entry.path())?,
            () if kind.is_file() => entry.metadata()?.len().div_ceil(4096),
            () => 0,
        };
    }
    Ok(blocks)
}
