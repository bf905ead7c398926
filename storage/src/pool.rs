//! The file system under a store: what it can do, and how to get one that can clone.
//!
//! Called at start-up ([`reflink_support`]) and by `mica pool`. Refuses to touch an image or a mount
//! that it did not make. A pool is an XFS image on a loop device, for machines without a partition for
//! XFS or btrfs; it is made of `mkfs.xfs` (xfsprogs) and `losetup` (util-linux).
//!
//! The image has all its space from the start, so that a full disk outside is found now and not by a
//! guest. The loop device reads and writes it directly, or all of it would be in memory twice. Space
//! for what is written to a clone is taken in pieces of 128 KiB ([`COW_EXTENT_BYTES`]), so that writes
//! near one another, in whatever order, end in one extent: cloning costs by the extent.

mod tools;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::error::{Result, StorageError};
use crate::sparse::{self, Copied};
use tools::{Mounted, mounts, run};

/// Smallest pool: `mkfs.xfs` makes none below 300 MiB.
pub const POOL_BYTES_MIN: u64 = 300 << 20;
/// How much space the first write to a part of a cloned disk takes at once, and keeps together.
pub const COW_EXTENT_BYTES: u64 = 128 << 10;
const BLOCK_BYTES: u64 = 4096;
const LABEL: &[u8; 12] = b"mica-pool\0\0\0";
const XFS_MAGIC: &[u8; 4] = b"XFSB";
/// Where an XFS superblock has its label.
const LABEL_AT: u64 = 108;

/// What a clone of a file costs in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reflink {
    /// Nothing: both files share their extents until one is written.
    Clones,
    /// A copy of all data.
    Copies,
}

/// Tries it. The probe has no name, or loses it at once.
///
/// # Errors
/// When the directory cannot be written to.
pub fn reflink_support(dir: &Path) -> Result<Reflink> {
    let probe = || -> io::Result<Copied> {
        let (from, to) = (unnamed_file(dir)?, unnamed_file(dir)?);
        from.write_all_at(&[1; 4096], 0)?;
        sparse::clone_or_copy(&from, &to)
    };
    match probe().map_err(|e| StorageError::io("try to clone a file in", dir, e))? {
        Copied::Reflink => Ok(Reflink::Clones),
        Copied::Bytes => Ok(Reflink::Copies),
    }
}

fn unnamed_file(dir: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    let unnamed = options.clone().custom_flags(OFlags::TMPFILE.bits().cast_signed()).open(dir);
    match unnamed {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            let path = dir.join(format!(".mica-probe-{}", crate::id::random_text()?));
            let file = options.create_new(true).open(&path)?;
            fs::remove_file(&path)?;
            Ok(file)
        }
        other => other,
    }
}

/// Why there is no pool, or no pool any more.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// Too small.
    #[error("a pool has at least 300 MiB, and {0} bytes were asked for")]
    TooSmall(u64),
    /// The directory is in use for something else.
    #[error("{} is not empty; a pool there would hide what is in it", .0.display())]
    NotEmpty(PathBuf),
    /// Something else is mounted there.
    #[error("{} has {source_name} ({kind}) mounted on it; unmount it or choose another directory",
        mount.display())]
    Occupied {
        /// Where.
        mount: PathBuf,
        /// The type of that file system.
        kind: String,
        /// Its device.
        source_name: String,
    },
    /// The image is a file of somebody else.
    #[error("{} is there and is not the image of a pool; it is not touched", .0.display())]
    ForeignImage(PathBuf),
    /// There is no such pool.
    #[error("there is no pool at {} (no image {})", mount.display(), image.display())]
    NoPool {
        /// Where it would be mounted.
        mount: PathBuf,
        /// Its image.
        image: PathBuf,
    },
    /// A program is missing.
    #[error("`{program}` is not installed; install the package {package}")]
    Missing {
        /// The program.
        program: &'static str,
        /// Where it comes from.
        package: &'static str,
    },
    /// A program failed.
    #[error("`{command}` failed: {message}")]
    Failed {
        /// What was run.
        command: String,
        /// What it wrote to its standard error.
        message: String,
    },
    /// The file system failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// What [`Pool::create`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolCreated {
    /// It made the image and mounted it.
    Made,
    /// The image was there; it was mounted.
    Mounted,
    /// Nothing: it is mounted.
    AlreadyThere,
}

/// A pool: an image, and where it is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    mount: PathBuf,
    image: PathBuf,
}

/// A pool that is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolInfo {
    /// Where.
    pub mount: PathBuf,
    /// Its image.
    pub image: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// What is free of it.
    pub free_bytes: u64,
}

impl Pool {
    /// The pool that is, or will be, mounted on `mount`. Its image is the file beside that directory
    /// with `.img` added to its name, unless another is given.
    ///
    /// # Errors
    /// When `mount` is a file, or cannot be made.
    pub fn at(mount: &Path, image: Option<&Path>) -> std::result::Result<Self, PoolError> {
        fs::create_dir_all(mount).map_err(|e| StorageError::io("make directory", mount, e))?;
        let mount = fs::canonicalize(mount).map_err(|e| StorageError::io("find", mount, e))?;
        let beside = || {
            let mut name = mount.clone().into_os_string();
            name.push(".img");
            PathBuf::from(name)
        };
        let image = match image {
            None => beside(),
            Some(image) => {
                std::path::absolute(image).map_err(|e| StorageError::io("find", image, e))?
            }
        };
        Ok(Self { mount, image })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// Its image.
    #[must_use]
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Makes it, of `bytes` bytes, and mounts it. Does what is missing: nothing where it is mounted,
    /// and after a restart of the machine only the mount.
    ///
    /// # Errors
    /// See [`PoolError`]. A failure leaves no image that was not there before.
    pub fn create(&self, bytes: u64) -> std::result::Result<PoolCreated, PoolError> {
        if let Some(there) = self.mounted()? {
            return if there.backing.as_deref() == Some(&*self.image) && is_ours(&self.image)? {
                Ok(PoolCreated::AlreadyThere)
            } else {
                let (kind, source_name) = (there.kind, there.source);
                Err(PoolError::Occupied { mount: self.mount.clone(), kind, source_name })
            };
        }
        let listed = fs::read_dir(&self.mount).map(|mut entries| entries.next().is_some());
        if listed.map_err(|e| StorageError::io("list", &self.mount, e))? {
            return Err(PoolError::NotEmpty(self.mount.clone()));
        }
        if self.image.exists() {
            if !is_ours(&self.image)? {
                return Err(PoolError::ForeignImage(self.image.clone()));
            }
            self.mount_image()?;
            return Ok(PoolCreated::Mounted);
        }
        self.make_image(bytes)?;
        self.mount_image()?;
        Ok(PoolCreated::Made)
    }

    /// Unmounts it and deletes its image, with all that is in it.
    ///
    /// # Errors
    /// See [`PoolError`]; among others when something in it is still open.
    pub fn remove(&self) -> std::result::Result<(), PoolError> {
        if !self.image.exists() {
            let (mount, image) = (self.mount.clone(), self.image.clone());
            return Err(PoolError::NoPool { mount, image });
        }
        if !is_ours(&self.image)? {
            return Err(PoolError::ForeignImage(self.image.clone()));
        }
        if let Some(there) = self.mounted()?
            && there.backing.as_deref() == Some(&*self.image)
        {
            unmount(&self.mount, UnmountFlags::empty())
                .map_err(|e| StorageError::io("unmount", &self.mount, e.into()))?;
        }
        fs::remove_file(&self.image).map_err(|e| StorageError::io("remove", &self.image, e))?;
        Ok(())
    }

    fn mounted(&self) -> Result<Option<Mounted>> {
        // What was mounted last is what one sees.
        Ok(mounts()?.into_iter().rfind(|mounted| mounted.mount == self.mount))
    }

    /// Makes the image under a name of its own, so that one that is cut off is never taken for whole.
    fn make_image(&self, bytes: u64) -> std::result::Result<(), PoolError> {
        if bytes < POOL_BYTES_MIN {
            return Err(PoolError::TooSmall(bytes));
        }
        let mut unfinished = self.image.clone().into_os_string();
        unfinished.push(".new");
        let unfinished = PathBuf::from(unfinished);
        let made = fill_image(&unfinished, bytes / BLOCK_BYTES * BLOCK_BYTES).and_then(|()| {
            fs::rename(&unfinished, &self.image)
                .map_err(|e| StorageError::io("rename to", &self.image, e).into())
        });
        if made.is_err()
            && let Err(error) = fs::remove_file(&unfinished)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!(%error, "an unfinished image could not be removed");
        }
        made
    }

    fn mount_image(&self) -> std::result::Result<(), PoolError> {
        let image = self.image.as_os_str();
        let options = ["--find", "--show", "--direct-io=on", "--sector-size", "4096"];
        let device = run("losetup", "util-linux", options, [image])?;
        let flags =
            MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NOATIME;
        let mounted = mount(device.as_str(), &self.mount, "xfs", flags, None)
            .map_err(|e| StorageError::io("mount a pool on", &self.mount, e.into()));
        // In either case: a device that is mounted stays until it is not.
        let detached = run("losetup", "util-linux", ["--detach"], [device.as_ref()]);
        mounted?;
        detached.map(drop)
    }
}

fn fill_image(path: &Path, bytes: u64) -> std::result::Result<(), PoolError> {
    let allocate = || -> io::Result<()> {
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
        file.sync_all()
    };
    allocate().map_err(|e| StorageError::io("make room for", path, e))?;
    let cow_blocks = format!("cowextsize={}", COW_EXTENT_BYTES / BLOCK_BYTES);
    // -K: a discard would give the space back that was just reserved.
    let options = [
        "-q",
        "-K",
        "-f",
        "-s",
        "size=4096",
        "-b",
        "size=4096",
        "-m",
        "reflink=1",
        "-d",
        &cow_blocks,
        "-L",
        "mica-pool",
    ];
    run("mkfs.xfs", "xfsprogs", options, [path.as_os_str()]).map(drop)
}

/// Whether the file is the image of a pool.
fn is_ours(image: &Path) -> Result<bool> {
    let read = || -> io::Result<bool> {
        let (mut magic, mut label) = ([0; 4], [0; 12]);
        let file = File::open(image)?;
        if file.metadata()?.len() < POOL_BYTES_MIN {
            return Ok(false);
        }
        file.read_exact_at(&mut magic, 0)?;
        file.read_exact_at(&mut label, LABEL_AT)?;
        Ok(&magic == XFS_MAGIC && &label == LABEL)
    };
    read().map_err(|e| StorageError::io("read", image, e))
}

/// The pools that are mounted.
///
/// # Errors
/// When the system's list of mounts cannot be read.
pub fn pools() -> Result<Vec<PoolInfo>> {
    let mut found = Vec::new();
    for mounted in mounts()?.into_iter().filter(|mounted| mounted.kind == "xfs") {
        let Some(image) = mounted.backing else { continue };
        // An image that was deleted or moved cannot be looked at, and is not managed here.
        if !image.exists() || !is_ours(&image)? {
            continue;
        }
        let space = rustix::fs::statvfs(&mounted.mount)
            .map_err(|e| StorageError::io("look at", &mounted.mount, e.into()))?;
        let (bytes, free_bytes) =
            (space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize);
        found.push(PoolInfo { mount: mounted.mount, image, bytes, free_bytes });
    }
    Ok(found)
}
