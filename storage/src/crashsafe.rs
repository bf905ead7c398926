//! The only place that renames, links and syncs: the order of steps that survives a power cut.
//!
//! Called by `store` and `staging`. Refuses nothing by itself; it keeps one promise: when
//! [`Disk::commit_name`] has returned, the name points at the whole new content, and at any instant
//! before that it points at the whole old content.
//!
//! Each step that can fail goes through [`Disk::step`], so that a test can stop the world there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::error::{Result, StorageError};

/// The file system, as this crate writes to it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    #[cfg(test)]
    pub(crate) crash: Option<std::sync::Arc<crash::Crash>>,
}

impl Disk {
    /// One step that may fail. In a test it may be the one at which the machine stops.
    #[cfg_attr(not(test), expect(clippy::unused_self, reason = "the seam for the crash tests"))]
    fn step<T>(
        &self,
        operation: &'static str,
        path: &Path,
        run: impl FnOnce() -> io::Result<T>,
    ) -> Result<T> {
        #[cfg(test)]
        if let Some(crash) = &self.crash {
            crash.step(operation, path).map_err(|e| StorageError::io(operation, path, e))?;
        }
        run().map_err(|e| StorageError::io(operation, path, e))
    }

    /// Makes a directory that only its owner can look into. It may be there already.
    pub(crate) fn make_dir(&self, path: &Path) -> Result<()> {
        self.step("make directory", path, || match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        })
    }

    /// Makes a directory that must not be there yet.
    pub(crate) fn make_new_dir(&self, path: &Path) -> Result<()> {
        self.step("make directory", path, || fs::DirBuilder::new().mode(0o700).create(path))
    }

    /// Makes a file that must not be there yet, open for reading and writing, mode 0600.
    pub(crate) fn create_file(&self, path: &Path) -> Result<File> {
        self.step("create", path, || {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(0o600);
            options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(path)
        })
    }

    /// Writes a whole small file and syncs it. The name must not be there yet.
    pub(crate) fn write_file(&self, path: &Path, content: &[u8]) -> Result<()> {
        let mut file = self.create_file(path)?;
        self.step("write", path, || file.write_all(content))?;
        self.sync_file(path, &file)
    }

    /// Makes the content of a file durable.
    pub(crate) fn sync_file(&self, path: &Path, file: &File) -> Result<()> {
        self.step("sync", path, || file.sync_all())
    }

    /// Makes the names in a directory durable.
    pub(crate) fn sync_dir(&self, path: &Path) -> Result<()> {
        self.step("sync directory", path, || {
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW;
            let options = OpenOptions::new()
                .read(true)
                .custom_flags(flags.bits().cast_signed())
                .open(path)?;
            options.sync_all()
        })
    }

    /// Renames a file over another, and makes that durable. Both are in `dir`.
    pub(crate) fn replace(&self, dir: &Path, from: &Path, to: &Path) -> Result<()> {
        self.step("rename to", to, || fs::rename(from, to))?;
        self.sync_dir(dir)
    }

    /// Points `dir/name` at `target`, whatever it pointed at before: the commit.
    ///
    /// Everything `target` stands for must have been synced before.
    pub(crate) fn commit_name(&self, dir: &Path, name: &str, target: &str) -> Result<()> {
        let temporary = dir.join(format!(".{name}.{target}"));
        self.remove_file_if_there(&temporary)?;
        self.step("link", &temporary, || std::os::unix::fs::symlink(target, &temporary))?;
        self.replace(dir, &temporary, &dir.join(name))
    }

    /// Removes a name and makes that durable: the commit of a deletion.
    pub(crate) fn remove_name(&self, dir: &Path, name: &str) -> Result<()> {
        let path = dir.join(name);
        self.step("remove", &path, || fs::remove_file(&path))?;
        self.sync_dir(dir)
    }

    /// Removes a file, or finds that it is not there.
    pub(crate) fn remove_file_if_there(&self, path: &Path) -> Result<()> {
        self.step("remove", path, || gone_is_fine(fs::remove_file(path)))
    }

    /// Removes a directory and all in it, or finds that it is not there. Follows no symlink.
    pub(crate) fn remove_tree(&self, path: &Path) -> Result<()> {
        self.step("remove", path, || gone_is_fine(fs::remove_dir_all(path)))
    }
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
pub(crate) mod crash {
    //! Stops the world at one step: that step and every later one fail.

    use std::io;
    use std::path::{Path, PathBuf};
    use std::sync::Mutex;

    /// A power cut that waits for its step.
    #[derive(Debug)]
    pub(crate) struct Crash {
        state: Mutex<State>,
    }

    #[derive(Debug)]
    struct State {
        left: u32,
        log: Vec<(&'static str, PathBuf)>,
    }

    impl Crash {
        /// Lets `steps` steps happen, and none after that.
        pub(crate) fn after(steps: u32) -> Self {
            Self { state: Mutex::new(State { left: steps, log: Vec::new() }) }
        }

        pub(super) fn step(&self, operation: &'static str, path: &Path) -> io::Result<()> {
            let mut state = self.state.lock().unwrap();
            if state.left == 0 {
                return Err(io::Error::other("the machine has stopped"));
            }
            state.left -= 1;
            state.log.push((operation, path.to_path_buf()));
            Ok(())
        }

        /// Whether the cut came.
        pub(crate) fn happened(&self) -> bool {
            self.state.lock().unwrap().left == 0
        }

        /// The steps that happened, in order.
        pub(crate) fn log(&self) -> Vec<(&'static str, PathBuf)> {
            self.state.lock().unwrap().log.clone()
        }
    }
}
