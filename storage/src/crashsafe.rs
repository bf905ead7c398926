//! The only place that creates, writes, renames, links, removes and syncs files of the store.
//!
//! Called by every module that changes the store. Refuses nothing by itself; it keeps one promise:
//! when [`Disk::commit_name`] or [`Disk::replace`] has returned, the name stands for the whole new
//! content, and at any instant before that it stands for the whole old content, provided that the
//! caller has synced the content before.
//!
//! Each step that can fail goes through [`Disk::step`], so that a test can stop the world there, and
//! tells the simulated file system (`simulation.rs`) what it did.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FallocateFlags, OFlags};
use rustix::io::Errno;

use crate::error::{Result, StorageError};
use crate::sparse::{self, Copied};

/// The file system, as this crate writes to it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    #[cfg(test)]
    pub(crate) crash: Option<std::sync::Arc<crash::Crash>>,
    #[cfg(test)]
    pub(crate) simulation: Option<std::sync::Arc<crate::simulation::Simulation>>,
}

/// What a step does, for the simulation.
#[cfg_attr(not(test), expect(dead_code, reason = "only the simulation looks into it"))]
#[derive(Debug)]
pub(crate) enum Effect<'a> {
    /// A directory is made.
    MakeDir(&'a Path),
    /// An empty file is made.
    Create(&'a Path),
    /// A symlink is made, with this target.
    Symlink(&'a Path, &'a str),
    /// A file gets another name.
    Link(&'a File, &'a Path),
    /// A name moves within its directory.
    Rename(&'a Path, &'a Path),
    /// A name of a file, or an empty directory, is removed.
    Remove(&'a Path),
    /// Bytes of a file are written.
    Write(&'a File, u64, &'a [u8]),
    /// A file gets another length.
    SetLen(&'a File, u64),
    /// The second file gets the content of the first.
    Clone(&'a File, &'a File),
    /// A file's content is made durable.
    SyncFile(&'a File),
    /// The names in a directory are made durable.
    SyncDir(&'a Path),
}

impl Disk {
    /// One that stops at a step.
    #[cfg(test)]
    pub(crate) fn crashing(crash: &std::sync::Arc<crash::Crash>) -> Self {
        Self { crash: Some(std::sync::Arc::clone(crash)), ..Self::default() }
    }

    /// One step that may fail. In a test it may be the one at which the machine stops.
    #[cfg_attr(
        not(test),
        expect(clippy::unused_self, unused_variables, reason = "the seam for the crash tests")
    )]
    fn step<T>(
        &self,
        operation: &'static str,
        path: &Path,
        effect: &Effect<'_>,
        run: impl FnOnce() -> io::Result<T>,
    ) -> Result<T> {
        #[cfg(test)]
        if let Some(crash) = &self.crash {
            crash.step(operation, path).map_err(|e| StorageError::io(operation, path, e))?;
        }
        #[cfg(test)]
        if let Some(simulation) = &self.simulation {
            return simulation
                .step(operation, path, effect, run)
                .map_err(|e| StorageError::io(operation, path, e));
        }
        run().map_err(|e| StorageError::io(operation, path, e))
    }

    /// Makes a directory that only its owner can look into. It may be there already.
    pub(crate) fn make_dir(&self, path: &Path) -> Result<()> {
        if path.is_dir() { Ok(()) } else { self.make_new_dir(path) }
    }

    /// Makes a directory that must not be there yet.
    pub(crate) fn make_new_dir(&self, path: &Path) -> Result<()> {
        self.step("make directory", path, &Effect::MakeDir(path), || {
            fs::DirBuilder::new().mode(0o700).create(path)
        })
    }

    /// Makes a file that must not be there yet, open for reading and writing, mode 0600.
    pub(crate) fn create_file(&self, path: &Path) -> Result<File> {
        self.step("create", path, &Effect::Create(path), || {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(0o600);
            options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(path)
        })
    }

    /// As [`Self::create_file`], without the page cache where the file system can do that.
    pub(crate) fn create_direct(&self, path: &Path) -> Result<File> {
        let cached = self.create_file(path)?;
        let flags = OFlags::NOFOLLOW | OFlags::DIRECT;
        let direct = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path);
        match direct {
            Ok(direct) => Ok(direct),
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(cached),
            Err(error) => Err(StorageError::io("open", path, error)),
        }
    }

    /// Writes bytes somewhere in a file.
    pub(crate) fn write_at(&self, path: &Path, file: &File, bytes: &[u8], at: u64) -> Result<()> {
        self.step("write", path, &Effect::Write(file, at, bytes), || file.write_all_at(bytes, at))
    }

    /// Gives a file at least this length, and the space for it where the file system can do that.
    pub(crate) fn allocate(&self, path: &Path, file: &File, bytes: u64) -> Result<()> {
        self.step("make room for", path, &Effect::SetLen(file, bytes), || {
            match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
                Ok(()) => Ok(()),
                // The writes will tell whether there is room.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(bytes),
                Err(error) => Err(error.into()),
            }
        })
    }

    /// Gives a file exactly this length.
    pub(crate) fn set_len(&self, path: &Path, file: &File, bytes: u64) -> Result<()> {
        self.step("cut", path, &Effect::SetLen(file, bytes), || file.set_len(bytes))
    }

    /// Writes a whole small file. The name must not be there yet.
    pub(crate) fn write_new(&self, path: &Path, content: &[u8]) -> Result<File> {
        let file = self.create_file(path)?;
        let effect = Effect::Write(&file, 0, content);
        self.step("write", path, &effect, || (&file).write_all(content))?;
        Ok(file)
    }

    /// Writes a whole small file and syncs it. The name must not be there yet.
    pub(crate) fn write_file(&self, path: &Path, content: &[u8]) -> Result<()> {
        let file = self.write_new(path, content)?;
        self.sync_file(path, &file)
    }

    /// Gives the empty file `to` the content of `from`.
    pub(crate) fn clone_content(&self, from: &File, to: &File, path: &Path) -> Result<Copied> {
        self.step("clone a disk to", path, &Effect::Clone(from, to), || {
            sparse::clone_or_copy(from, to)
        })
    }

    /// Gives the empty file `to` the content of `from`, in blocks of its own.
    pub(crate) fn copy_content(&self, from: &File, to: &File, path: &Path) -> Result<()> {
        self.step("copy a disk to", path, &Effect::Clone(from, to), || sparse::copy_apart(from, to))
    }

    /// Makes the content of a file durable.
    pub(crate) fn sync_file(&self, path: &Path, file: &File) -> Result<()> {
        self.step("sync", path, &Effect::SyncFile(file), || file.sync_all())
    }

    /// Makes the names in a directory durable.
    pub(crate) fn sync_dir(&self, path: &Path) -> Result<()> {
        self.step("sync directory", path, &Effect::SyncDir(path), || {
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW;
            let options = OpenOptions::new()
                .read(true)
                .custom_flags(flags.bits().cast_signed())
                .open(path)?;
            options.sync_all()
        })
    }

    /// Gives an open file one more name. It must have one still.
    pub(crate) fn link_file(&self, file: &File, path: &Path) -> Result<()> {
        self.step("link", path, &Effect::Link(file, path), || {
            let open = format!("/proc/self/fd/{}", file.as_raw_fd());
            Ok(rustix::fs::linkat(CWD, open.as_str(), CWD, path, AtFlags::SYMLINK_FOLLOW)?)
        })
    }

    /// Moves a name within its directory, over what is there. Not durable yet.
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.step("rename to", to, &Effect::Rename(from, to), || fs::rename(from, to))
    }

    /// Renames a file over another, and makes that durable. Both are in `dir`.
    pub(crate) fn replace(&self, dir: &Path, from: &Path, to: &Path) -> Result<()> {
        self.rename(from, to)?;
        self.sync_dir(dir)
    }

    /// Points `dir/name` at `target`, whatever it pointed at before: the commit.
    ///
    /// Everything `target` stands for must have been synced before.
    pub(crate) fn commit_name(&self, dir: &Path, name: &str, target: &str) -> Result<()> {
        let temporary = dir.join(format!(".{name}.{target}"));
        self.remove_file_if_there(&temporary)?;
        self.step("link", &temporary, &Effect::Symlink(&temporary, target), || {
            std::os::unix::fs::symlink(target, &temporary)
        })?;
        self.replace(dir, &temporary, &dir.join(name))
    }

    /// Removes a name and makes that durable: the commit of a deletion.
    pub(crate) fn remove_name(&self, dir: &Path, name: &str) -> Result<()> {
        let path = dir.join(name);
        self.step("remove", &path, &Effect::Remove(&path), || fs::remove_file(&path))?;
        self.sync_dir(dir)
    }

    /// Removes a file, or finds that it is not there.
    pub(crate) fn remove_file_if_there(&self, path: &Path) -> Result<()> {
        if fs::symlink_metadata(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
            return Ok(());
        }
        self.step("remove", path, &Effect::Remove(path), || gone_is_fine(fs::remove_file(path)))
    }

    /// Removes a directory and all in it, or finds that it is not there. Follows no symlink.
    ///
    /// It is not atomic: what must never be seen half is renamed away first.
    pub(crate) fn remove_tree(&self, path: &Path) -> Result<()> {
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) => {
                return match error.kind() {
                    io::ErrorKind::NotFound => Ok(()),
                    io::ErrorKind::NotADirectory => self.remove_file_if_there(path),
                    _ => Err(StorageError::io("list", path, error)),
                };
            }
        };
        for entry in entries {
            let entry = entry.map_err(|e| StorageError::io("list", path, e))?;
            let inside = entry.path();
            let kind = entry.file_type().map_err(|e| StorageError::io("look at", &inside, e))?;
            if kind.is_dir() {
                self.remove_tree(&inside)?;
            } else {
                self.remove_file_if_there(&inside)?;
            }
        }
        self.step("remove", path, &Effect::Remove(path), || gone_is_fine(fs::remove_dir(path)))
    }
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
pub(crate) mod crash;
