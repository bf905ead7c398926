//! A snapshot on its way into the store: the commit protocol.
//!
//! Called by shards and by template builds. Refuses to commit before every sync that the promise
//! needs has been done: [`SnapshotStaging::commit`] wants the token of each. Until it returns, no
//! reader sees any of it; dropping the staging removes it.
//!
//! ```text
//!   stage_snapshot(id)                directory made
//!   link_layers, create_layer, clone_disk       names and data, nothing synced
//!   PackedWriter::finish              the new layer's content is on the device; where its file is as
//!                                     long already as it will be, this may be done beside the syncs
//!   prepare(manifest)                 manifest.new written: now every name is there
//!     ├─ sync manifest.new ─┐
//!     ├─ sync disk          │         at the same time, on whatever threads
//!     ├─ sync directory     │
//!     └─ sync snapshots/   ─┘
//!   commit(tokens)                    rename manifest.new → manifest; sync directory
//! ```
//! The directory is synced only once every name is in it: a manifest that is on the device without
//! the layers it names would be worse than none.

use std::fs::File;
use std::path::{Path, PathBuf};

use mica_units::PAGE_BYTES;
use rustix::fs::FlockOperation;

use super::{DISK_FILE, GONE_PREFIX, Snapshot, SnapshotManifest};
use crate::crashsafe::Disk;
use crate::error::{Result, StorageError};
use crate::id::is_id;
use crate::layer::{Layer, LayerId};
use crate::sparse::Copied;
use crate::store::{Store, chain};
use crate::template::{MANIFEST_FILE, Part};

pub(crate) const MANIFEST_NEW: &str = "manifest.new";

/// A snapshot that is not committed yet.
#[derive(Debug)]
pub struct SnapshotStaging {
    store: Store,
    id: String,
    dir: PathBuf,
    /// Keeps start-ups of other processes from removing it.
    _lock: File,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Open,
    /// The rename may have happened.
    Committing,
    Committed,
}

/// Something to make durable before the commit. Independent of the staging, so that it can run on
/// any thread that may block.
#[derive(Debug)]
#[must_use = "a commit needs every one of them done"]
pub struct SyncJob {
    disk: Disk,
    path: PathBuf,
    /// `None` for a directory.
    file: Option<File>,
    /// How many jobs the commit waits for.
    of: usize,
}

/// The proof that a [`SyncJob`] was done.
#[derive(Debug)]
pub struct Synced {
    path: PathBuf,
    of: usize,
}

impl SyncJob {
    /// Does it.
    ///
    /// # Errors
    /// When the device did not take it. The snapshot cannot be committed then: what failed to sync
    /// once may be lost even if a later sync succeeds.
    pub fn run(self) -> Result<Synced> {
        match &self.file {
            Some(file) => self.disk.sync_file(&self.path, file)?,
            None => self.disk.sync_dir(&self.path)?,
        }
        Ok(Synced { path: self.path, of: self.of })
    }
}

impl Store {
    /// A new id for a snapshot.
    ///
    /// # Errors
    /// When the kernel has no randomness to give.
    pub fn new_snapshot_id(&self) -> Result<String> {
        crate::id::random_text()
            .map_err(|e| StorageError::io("draw a random id in", self.root(), e))
    }

    /// Starts the snapshot `id`: a new one, or a template's id for its running snapshot.
    ///
    /// # Errors
    /// [`StorageError::SnapshotExists`] when there is one, or one is being made.
    pub fn stage_snapshot(&self, id: &str) -> Result<SnapshotStaging> {
        let dir = self.snapshots_dir().join(id);
        if !is_id(id) {
            let source = crate::manifest::field("id", "it must be 20 characters of 0-9 and a-z");
            return Err(StorageError::Describe { source });
        }
        let exists = || StorageError::SnapshotExists { id: id.to_owned() };
        let lock = self.snapshots_lock(FlockOperation::LockShared)?.ok_or_else(exists)?;
        match self.disk.make_new_dir(&dir) {
            Err(error) if error.is_already_there() => return Err(exists()),
            other => other?,
        }
        let (store, id) = (self.clone(), id.to_owned());
        Ok(SnapshotStaging { store, id, dir, _lock: lock, state: State::Open })
    }
}

impl SnapshotStaging {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Gives it layers that are already written, wherever they were opened from.
    ///
    /// # Errors
    /// [`StorageError::LayerGone`] when one has no name any more: whoever still needs a layer must have
    /// a link to it.
    pub fn link_layers(&self, layers: &[Layer]) -> Result<()> {
        for layer in layers {
            layer.link_into(&self.store.disk, &self.dir)?;
        }
        Ok(())
    }

    /// Makes the file of a new layer, open for writing and past the page cache where the file system
    /// can do that. It becomes part of the snapshot when the manifest names it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create_layer(&self) -> Result<(LayerId, File)> {
        let id =
            LayerId::random().map_err(|e| StorageError::io("draw a random id in", &self.dir, e))?;
        let file = self.store.disk.create_direct(&self.layer_path(id))?;
        Ok((id, file))
    }

    /// Removes the file of a layer that was made and turned out to hold nothing.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove_layer(&self, id: LayerId) -> Result<()> {
        self.store.disk.remove_file_if_there(&self.layer_path(id))
    }

    /// Gives it a file of a template's, under the name it has there.
    pub(crate) fn link_part(&self, part: Part, file: &File) -> Result<()> {
        self.store.disk.link_file(file, &self.dir.join(part.file_name()))
    }

    /// Gives it a disk: a clone of an open one, as that is at this instant.
    ///
    /// # Errors
    /// [`StorageError::NoSpace`] where it had to be copied and there is no room; others when the file
    /// system fails.
    pub fn clone_disk(&self, disk: &File) -> Result<File> {
        let path = self.dir.join(DISK_FILE);
        let file = self.store.disk.create_file(&path)?;
        if self.store.disk.clone_content(disk, &file, &path)? == Copied::Bytes {
            self.store.note_copy(&path);
        }
        Ok(file)
    }

    /// Gives it a disk: a copy of an open one, in as few pieces as the file system makes of it. For a
    /// disk that many others will be clones of.
    ///
    /// # Errors
    /// [`StorageError::NoSpace`] where there is no room; others when the file system fails.
    pub fn copy_disk(&self, disk: &File) -> Result<File> {
        let path = self.dir.join(DISK_FILE);
        let file = self.store.disk.create_file(&path)?;
        self.store.disk.copy_content(disk, &file, &path)?;
        Ok(file)
    }

    /// Writes the manifest beside where it will be, and says what has to be made durable. Everything
    /// else must be in the snapshot already: layers linked or finished, or as long as they will be and
    /// being written; the disk cloned.
    ///
    /// # Errors
    /// When the manifest is out of its bounds, is of another snapshot, or names what is not there.
    pub fn prepare(&self, manifest: &SnapshotManifest) -> Result<Vec<SyncJob>> {
        self.check(manifest)?;
        let bytes = manifest.encode().map_err(|source| StorageError::Describe { source })?;
        let path = self.dir.join(MANIFEST_NEW);
        let written = self.store.disk.write_new(&path, &bytes)?;
        let mut jobs = vec![(path, Some(written))];
        if manifest.has_disk() {
            let path = self.dir.join(DISK_FILE);
            let disk = File::open(&path).map_err(|e| StorageError::io("open", &path, e))?;
            jobs.push((path, Some(disk)));
        }
        jobs.push((self.dir.clone(), None));
        jobs.push((self.store.snapshots_dir(), None));
        let of = jobs.len();
        let job = |(path, file)| SyncJob { disk: self.store.disk.clone(), path, file, of };
        Ok(jobs.into_iter().map(job).collect())
    }

    /// Commits: when this has returned, the snapshot outlives a power cut.
    ///
    /// # Errors
    /// When a token is missing, or a step fails. Then there is no snapshot of this id.
    pub fn commit(mut self, manifest: SnapshotManifest, done: Vec<Synced>) -> Result<Snapshot> {
        let ours = done.iter().all(|done| done.path.starts_with(self.store.root()));
        let all = done.first().is_some_and(|first| first.of == done.len());
        if !ours || !all || manifest.id != self.id {
            let source = crate::manifest::field("id", "it was not prepared, or not synced whole");
            return Err(StorageError::Describe { source });
        }
        self.state = State::Committing;
        let (from, to) = (self.dir.join(MANIFEST_NEW), self.dir.join(MANIFEST_FILE));
        self.store.disk.replace(&self.dir, &from, &to)?;
        self.state = State::Committed;
        Ok(Snapshot { dir: self.dir.clone(), manifest })
    }

    /// Does all of it on this thread: prepares, syncs, commits.
    ///
    /// # Errors
    /// As [`Self::prepare`], [`SyncJob::run`] and [`Self::commit`].
    pub fn seal(self, manifest: SnapshotManifest) -> Result<Snapshot> {
        let done: Result<Vec<Synced>> =
            self.prepare(&manifest)?.into_iter().map(SyncJob::run).collect();
        self.commit(manifest, done?)
    }

    fn check(&self, manifest: &SnapshotManifest) -> Result<()> {
        if manifest.id != self.id {
            let source = crate::manifest::field("id", "it is the manifest of another snapshot");
            return Err(StorageError::Describe { source });
        }
        for info in &manifest.layers {
            expect_len(&self.layer_path(info.id), info.file_bytes)?;
        }
        // A flat base holds all of memory, and a page for its footer at least.
        let memory = manifest.memory.to_bytes();
        let base = manifest.layers.first().map_or(0, |base| base.file_bytes);
        if manifest.has_memory() && base < memory + PAGE_BYTES {
            let source = crate::manifest::field("memory", "the base layer does not hold it");
            return Err(StorageError::Describe { source });
        }
        if manifest.has_disk() {
            expect_len(&self.dir.join(DISK_FILE), manifest.disk_bytes)?;
        }
        Ok(())
    }

    /// Ends it as the end of the process does: without a chance to clean up.
    #[cfg(test)]
    pub(crate) fn cut_off(self) {
        let this = std::mem::ManuallyDrop::new(self);
        rustix::fs::flock(&this._lock, FlockOperation::Unlock).unwrap();
    }

    pub(crate) fn layer_path(&self, id: LayerId) -> PathBuf {
        self.dir.join(id.file_name())
    }
}

fn expect_len(path: &Path, expected: u64) -> Result<()> {
    let found =
        std::fs::symlink_metadata(path).map_err(|e| StorageError::io("look at", path, e))?.len();
    if found == expected {
        return Ok(());
    }
    let what = format!("{} is {found} bytes long, and not {expected}", path.display());
    Err(StorageError::Describe { source: crate::manifest::field("layers", what) })
}

impl Drop for SnapshotStaging {
    fn drop(&mut self) {
        let disk = &self.store.disk;
        let removed = match self.state {
            State::Committed => return,
            State::Open => disk.remove_tree(&self.dir),
            // It may be on the device whole. It must not be there half, so its name goes first.
            State::Committing => {
                let snapshots = self.store.snapshots_dir();
                let gone = snapshots.join(format!("{GONE_PREFIX}{}", self.id));
                let away = disk.rename(&self.dir, &gone).and_then(|()| disk.sync_dir(&snapshots));
                away.and_then(|()| disk.remove_tree(&gone))
            }
        };
        if let Err(error) = removed {
            tracing::warn!(error = %chain(&error), "the next start will try to remove it again");
        }
    }
}
