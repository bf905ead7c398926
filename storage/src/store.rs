//! The store's directory: opening it, looking templates up, deleting them.
//!
//! Called by `shards` and by `mica template`. Refuses a directory it did not make. Any number of
//! processes may use one store: readers take no lock, since one symlink commits; writers take the
//! lock file. Only the daemon may call [`Store::sweep_sandboxes`].

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mica_units::TemplateName;
use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use crate::crashsafe::Disk;
use crate::error::{Result, StorageError};
use crate::id::is_id;
use crate::manifest::ManifestError;
use crate::snapshot::{SNAPSHOTS_DIR, SNAPSHOTS_LOCK};
use crate::template::{Template, open_read, read_manifest};

const MARKER_FILE: &str = "mica-store";
const MARKER_TEMPORARY: &str = ".mica-store.new";
const MARKER: &str = "mica store 1";
const LOCK_FILE: &str = "lock";
pub(crate) const TEMPLATES_DIR: &str = "templates";
pub(crate) const NAMES_DIR: &str = "names";
pub(crate) const SANDBOXES_DIR: &str = "sandboxes";
/// Times a lookup starts again because a writer replaced what it was looking at.
pub(crate) const LOOKUP_ATTEMPTS: u32 = 16;

/// A store, open. Cheap to clone; every clone is the same store.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    pub(crate) disk: Disk,
    /// Disks that had to be copied, by all clones together.
    copies: Arc<AtomicU64>,
}

/// Held while this process alone may write templates.
#[derive(Debug)]
pub(crate) struct WriteLock {
    _file: File,
}

impl Store {
    /// Opens the store in `root`, making it when the directory is empty or not there, and removes
    /// what was never committed (unless another process is writing just now).
    ///
    /// # Errors
    /// When the directory holds something else, is of another version, or cannot be used.
    pub fn open(root: &Path) -> Result<Self> {
        Self::open_on(root, Disk::default())
    }

    pub(crate) fn open_on(root: &Path, disk: Disk) -> Result<Self> {
        fs::create_dir_all(root).map_err(|e| StorageError::io("make directory", root, e))?;
        let root = fs::canonicalize(root).map_err(|e| StorageError::io("find", root, e))?;
        let store = Self { root, disk, copies: Arc::default() };
        if !store.has_marker()? {
            store.make_layout()?;
        }
        // A store of before there were snapshots has no directory for them.
        store.disk.make_dir(&store.snapshots_dir())?;
        if let Some(lock) = store.try_lock()? {
            store.remove_uncommitted(&lock)?;
        }
        store.remove_uncommitted_snapshots()?;
        Ok(store)
    }

    /// Disks that were copied since this store was opened, because the file system does not clone.
    #[must_use]
    pub fn disk_copies(&self) -> u64 {
        self.copies.load(Ordering::Relaxed)
    }

    /// Counts a disk that had to be copied, and says it the first time.
    pub(crate) fn note_copy(&self, path: &Path) {
        self.copies.fetch_add(1, Ordering::Relaxed);
        crate::sparse::warn_no_reflink(path);
    }

    /// The directory it is in.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Every committed template, by name. One whose manifest is damaged is left out, and logged;
    /// [`Self::find_template`] says what is wrong with it.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn templates(&self) -> Result<Vec<Template>> {
        let mut found = Vec::new();
        for name in self.names()? {
            match self.find_by_name(&name) {
                Ok(template) => found.extend(template),
                Err(error @ StorageError::Manifest { .. }) => {
                    tracing::error!(%name, error = %chain(&error), "template left out");
                }
                Err(error) => return Err(error),
            }
        }
        found.sort_by(|a, b| a.manifest().name.cmp(&b.manifest().name));
        Ok(found)
    }

    /// The template of that name, or else of that id.
    ///
    /// # Errors
    /// When it is there and its manifest is damaged, or the store cannot be read.
    pub fn find_template(&self, id_or_name: &str) -> Result<Option<Template>> {
        if let Ok(name) = id_or_name.parse::<TemplateName>()
            && let Some(template) = self.find_by_name(&name)?
        {
            return Ok(Some(template));
        }
        if !is_id(id_or_name) {
            return Ok(None);
        }
        for name in self.names()? {
            if self.target_of(&name)?.as_deref() == Some(id_or_name) {
                let found = self.find_by_name(&name)?;
                return Ok(found.filter(|template| template.manifest().id == id_or_name));
            }
        }
        Ok(None)
    }

    /// Deletes a template and its running snapshot; says whether there was one. Sandboxes that run
    /// from it are not affected: their disks are clones, and their layers have links of their own.
    ///
    /// # Errors
    /// When it could not be deleted.
    pub fn delete_template(&self, name: &TemplateName) -> Result<bool> {
        let lock = self.lock()?;
        let Some(id) = self.target_of(name)? else { return Ok(false) };
        self.disk.remove_name(&self.names_dir(), name.as_str())?;
        self.discard(&lock, &id);
        Ok(true)
    }

    pub(crate) fn names_dir(&self) -> PathBuf {
        self.root.join(NAMES_DIR)
    }

    pub(crate) fn templates_dir(&self) -> PathBuf {
        self.root.join(TEMPLATES_DIR)
    }

    /// Every committed name.
    fn names(&self) -> Result<Vec<TemplateName>> {
        Ok(entries(&self.names_dir())?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// The template id a name points at.
    pub(crate) fn target_of(&self, name: &TemplateName) -> Result<Option<String>> {
        let path = self.names_dir().join(name.as_str());
        let target = match fs::read_link(&path) {
            Ok(target) => target,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StorageError::io("read", &path, error)),
        };
        match target.to_str().filter(|id| is_id(id)) {
            Some(id) => Ok(Some(id.to_owned())),
            None => Err(mismatch(&path, "it does not point at a template id")),
        }
    }

    fn find_by_name(&self, name: &TemplateName) -> Result<Option<Template>> {
        let mut seen = None;
        for _ in 0..LOOKUP_ATTEMPTS {
            let Some(id) = self.target_of(name)? else { return Ok(None) };
            let dir = self.templates_dir().join(&id);
            match read_manifest(&dir) {
                Ok(manifest) if manifest.id == id && manifest.name == *name => {
                    return Ok(Some(Template::new(dir, manifest)));
                }
                Ok(_) => return Err(mismatch(&dir, "it is the manifest of another template")),
                // Replaced or deleted between the two reads: look again. The same id twice means
                // that the manifest is really missing.
                Err(error) if error.is_not_found() && seen.as_ref() != Some(&id) => seen = Some(id),
                Err(error) if error.is_not_found() => {
                    return Err(mismatch(&dir, "the file is missing"));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Waits until no other process writes.
    pub(crate) fn lock(&self) -> Result<WriteLock> {
        let file = self.flock(LOCK_FILE, FlockOperation::LockExclusive)?;
        let busy = || StorageError::io("lock", &self.root, io::ErrorKind::WouldBlock.into());
        Ok(WriteLock { _file: file.ok_or_else(busy)? })
    }

    fn try_lock(&self) -> Result<Option<WriteLock>> {
        let file = self.flock(LOCK_FILE, FlockOperation::NonBlockingLockExclusive)?;
        Ok(file.map(|file| WriteLock { _file: file }))
    }

    /// Locks a file of the store for as long as what is returned is open. `None` when another holds
    /// it and the operation does not wait.
    pub(crate) fn flock(&self, name: &str, operation: FlockOperation) -> Result<Option<File>> {
        let path = self.root.join(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&path)
            .map_err(|e| StorageError::io("open", &path, e))?;
        match rustix::io::retry_on_intr(|| rustix::fs::flock(&file, operation)) {
            Ok(()) => Ok(Some(file)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(StorageError::io("lock", &path, error.into())),
        }
    }

    /// Whether the directory is a store already.
    fn has_marker(&self) -> Result<bool> {
        let path = self.root.join(MARKER_FILE);
        let text = match open_read(&path).and_then(io::read_to_string) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                return Err(StorageError::Foreign { root: self.root.clone() });
            }
            Err(error) => return Err(StorageError::io("read", &path, error)),
        };
        match text.lines().next() {
            Some(MARKER) => Ok(true),
            Some(found) if found.starts_with("mica store ") => Err(StorageError::Version {
                root: self.root.clone(),
                found: found.to_owned(),
                expected: MARKER.to_owned(),
            }),
            _ => Err(StorageError::Foreign { root: self.root.clone() }),
        }
    }

    /// Makes the directories, then the marker: a directory without it is not a store yet.
    fn make_layout(&self) -> Result<()> {
        self.refuse_foreign()?;
        let _lock = self.lock()?;
        if self.has_marker()? {
            return Ok(());
        }
        for dir in [TEMPLATES_DIR, NAMES_DIR, SANDBOXES_DIR, SNAPSHOTS_DIR] {
            self.disk.make_dir(&self.root.join(dir))?;
        }
        let temporary = self.root.join(MARKER_TEMPORARY);
        self.disk.remove_file_if_there(&temporary)?;
        self.disk.write_file(&temporary, format!("{MARKER}\n").as_bytes())?;
        self.disk.replace(&self.root, &temporary, &self.root.join(MARKER_FILE))
    }

    /// Allows only what a start that was cut off can have left, and a new file system's own.
    fn refuse_foreign(&self) -> Result<()> {
        for name in entries(&self.root)? {
            let ours = match name.as_str() {
                LOCK_FILE | SNAPSHOTS_LOCK | MARKER_FILE | MARKER_TEMPORARY | "lost+found" => true,
                TEMPLATES_DIR | NAMES_DIR | SANDBOXES_DIR | SNAPSHOTS_DIR => {
                    entries(&self.root.join(&name))?.is_empty()
                }
                _ => false,
            };
            if !ours && !self.has_marker()? {
                return Err(StorageError::Foreign { root: self.root.clone() });
            }
        }
        Ok(())
    }

    /// Removes template directories that no name points at, and names that were not finished.
    fn remove_uncommitted(&self, lock: &WriteLock) -> Result<()> {
        let names = self.names_dir();
        let mut committed = Vec::new();
        for entry in entries(&names)? {
            if entry.starts_with('.') {
                self.disk.remove_file_if_there(&names.join(&entry))?;
            } else if let Ok(target) = fs::read_link(names.join(&entry)) {
                committed.extend(target.to_str().map(str::to_owned));
            }
        }
        for entry in entries(&self.templates_dir())? {
            if !committed.contains(&entry) {
                tracing::info!(entry, "removing a template that was never committed");
                self.discard(lock, &entry);
            }
        }
        Ok(())
    }

    /// Removes the directory of a template that no name points at any more, and its running snapshot
    /// before that: as long as the directory is there, a start knows that both have to go. A failure
    /// is not the caller's: the next start-up tries again.
    pub(crate) fn discard(&self, _lock: &WriteLock, id: &str) {
        let removed = self
            .delete_snapshot(id)
            .and_then(|_| self.disk.remove_tree(&self.templates_dir().join(id)));
        if let Err(error) = removed {
            tracing::warn!(error = %chain(&error), "the next start will try to remove it again");
        }
    }
}

/// The names in a directory. A name that is not UTF-8 is shown with replacement characters; it is
/// never one of ours.
pub(crate) fn entries(dir: &Path) -> Result<Vec<String>> {
    let read = || -> io::Result<Vec<String>> {
        fs::read_dir(dir)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    };
    read().map_err(|e| StorageError::io("list", dir, e))
}

pub(crate) fn mismatch(path: &Path, what: &str) -> StorageError {
    let source = ManifestError::Field { field: "id", what: what.to_owned() };
    StorageError::Manifest { path: path.to_path_buf(), source }
}

/// An error and its causes in one line, for a log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
