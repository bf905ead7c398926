//! Snapshots: what sandboxes start from. Looking them up, opening them, deleting them.
//!
//! Called by shards, on threads that may block. Refuses a snapshot whose manifest or layers fail a
//! check. Readers take no lock: a snapshot is there when its directory has a manifest.
//!
//! ```text
//! snapshots/<id>/manifest          THE commit: renamed to this name, last
//! snapshots/<id>/memory.<layer>    hard links to its layers; the manifest has their order
//! snapshots/<id>/disk              a reflink clone, where there is a disk
//! snapshots/<id>/kernel, initramfs  hard links: of one without memory, which has no layers
//! snapshots/<id>/working-set       what to read first; may be missing, and is not part of the commit
//! snapshots/.gone-<id>             deleted, and being removed
//! ```
//!
//! The link count of a layer is its reference count: every snapshot and every sandbox that needs it
//! has a link of its own, so nothing counts, and a power cut cannot make a count wrong.

mod manifest;
mod staging;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use mica_units::TemplateName;
use rustix::fs::FlockOperation;

use manifest::SNAPSHOT_BYTES_MAX;
pub use manifest::{RECORD_BYTES_MAX, STATE_BYTES_MAX, SnapshotKind, SnapshotManifest};
pub(crate) use staging::MANIFEST_NEW;
pub use staging::{SnapshotStaging, SyncJob, Synced};

use crate::error::{Result, StorageError};
use crate::id::is_id;
use crate::layer::{Layer, LayerInfo, Written};
use crate::store::{LOOKUP_ATTEMPTS, Store, chain, entries, mismatch};
use crate::template::{MANIFEST_FILE, Part, open_read};
use crate::working_set::WORKING_SET_FILE;

pub(crate) const SNAPSHOTS_DIR: &str = "snapshots";
pub(crate) const SNAPSHOTS_LOCK: &str = "snapshots.lock";
pub(crate) const DISK_FILE: &str = "disk";
const GONE_PREFIX: &str = ".gone-";

/// A committed snapshot. What is opened from it stays usable when it is deleted.
#[derive(Clone, Debug)]
pub struct Snapshot {
    dir: PathBuf,
    manifest: SnapshotManifest,
}

/// A snapshot with all its files open.
#[derive(Clone, Debug)]
pub struct OpenSnapshot {
    /// What it is, and where.
    pub snapshot: Snapshot,
    /// Its memory, the base first.
    pub layers: Vec<Layer>,
    /// Its disk, where it has one.
    pub disk: Option<std::sync::Arc<File>>,
}

impl Snapshot {
    /// What it is.
    #[must_use]
    pub const fn manifest(&self) -> &SnapshotManifest {
        &self.manifest
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its memory, the base first: open and checked.
    ///
    /// # Errors
    /// [`StorageError::SnapshotGone`] when it was deleted, or flattened, since it was looked up;
    /// [`Store::open_snapshot`] looks again by itself. Others when a layer is damaged.
    pub fn open_layers(&self) -> Result<Vec<Layer>> {
        self.manifest
            .layers
            .iter()
            .map(|info| Layer::open_in(&self.dir, info).map_err(|error| self.gone(error)))
            .collect()
    }

    /// As [`Self::open_layers`], right after it was made: on layers that are open already, and with one
    /// that was written for it.
    ///
    /// # Errors
    /// As there.
    pub fn open_layers_on(&self, under: &[Layer], new: Option<Written>) -> Result<Vec<Layer>> {
        let mut new = new;
        let open = |info: &LayerInfo| {
            if let Some(known) = under.iter().find(|layer| layer.info() == info) {
                return Ok(known.clone());
            }
            match new.take_if(|new| new.info() == info) {
                Some(written) => Layer::open_written(&self.dir, written),
                None => Layer::open_in(&self.dir, info),
            }
            .map_err(|error| self.gone(error))
        };
        self.manifest.layers.iter().map(open).collect()
    }

    /// Its disk, read-only, where it has one.
    ///
    /// # Errors
    /// [`StorageError::SnapshotGone`] when it was deleted since; others when it cannot be opened or
    /// is not as long as the manifest says.
    pub fn open_disk(&self) -> Result<Option<File>> {
        if !self.manifest.has_disk() {
            return Ok(None);
        }
        let path = self.dir.join(DISK_FILE);
        let opened = open_read(&path).map_err(|e| StorageError::io("open", &path, e));
        let file = opened.map_err(|error| self.gone(error))?;
        let found = file.metadata().map_err(|e| StorageError::io("look at", &path, e))?.len();
        if found != self.manifest.disk_bytes {
            let what = format!("{found} bytes long, and not {}", self.manifest.disk_bytes);
            return Err(StorageError::Part { part: DISK_FILE, what });
        }
        Ok(Some(file))
    }

    fn gone(&self, error: StorageError) -> StorageError {
        if error.is_not_found() {
            return StorageError::SnapshotGone { id: self.manifest.id.clone() };
        }
        error
    }
}

impl Store {
    /// The snapshot of that id, or else the running snapshot of the template of that name.
    ///
    /// # Errors
    /// When it is there and its manifest is damaged, or the store cannot be read.
    pub fn find_snapshot(&self, id_or_template: &str) -> Result<Option<Snapshot>> {
        if is_id(id_or_template)
            && let Some(snapshot) = self.read_snapshot(id_or_template)?
        {
            return Ok(Some(snapshot));
        }
        let Ok(name) = id_or_template.parse::<TemplateName>() else { return Ok(None) };
        for _ in 0..LOOKUP_ATTEMPTS {
            let Some(id) = self.target_of(&name)? else { return Ok(None) };
            let found = self.read_snapshot(&id)?;
            // None, and the name still points there: the template has no running snapshot.
            if found.is_some() || self.target_of(&name)?.as_ref() == Some(&id) {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// As [`Self::find_snapshot`], with all its files open. Looks again when it was flattened, or its
    /// template replaced, in between.
    ///
    /// # Errors
    /// As [`Snapshot::open_layers`] and [`Snapshot::open_disk`].
    pub fn open_snapshot(&self, id_or_template: &str) -> Result<Option<OpenSnapshot>> {
        for _ in 0..LOOKUP_ATTEMPTS {
            let Some(snapshot) = self.find_snapshot(id_or_template)? else { return Ok(None) };
            let open = || Ok((snapshot.open_layers()?, snapshot.open_disk()?));
            match open() {
                Err(StorageError::SnapshotGone { .. }) => {}
                Err(error) => return Err(error),
                Ok((layers, disk)) => {
                    let disk = disk.map(std::sync::Arc::new);
                    return Ok(Some(OpenSnapshot { snapshot, layers, disk }));
                }
            }
        }
        Err(StorageError::SnapshotGone { id: id_or_template.to_owned() })
    }

    /// What `select` takes of every committed snapshot, by id; the rest of each, with the state of its
    /// machine, is gone before the next is read. One whose manifest is damaged is left out, and logged.
    /// Reads all of each manifest, so it is for start-up and for people.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn select_snapshots<T>(
        &self,
        mut select: impl FnMut(&SnapshotManifest) -> Option<T>,
    ) -> Result<Vec<T>> {
        let mut ids = entries(&self.snapshots_dir())?;
        ids.retain(|entry| is_id(entry));
        ids.sort_unstable();
        let mut selected = Vec::new();
        for id in ids {
            match self.read_snapshot(&id) {
                Ok(Some(snapshot)) => selected.extend(select(snapshot.manifest())),
                Ok(None) => {}
                Err(error @ StorageError::Manifest { .. }) => {
                    tracing::error!(id, error = %chain(&error), "snapshot left out");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(selected)
    }

    /// Deletes a snapshot; says whether there was one. Sandboxes that run from it, snapshots that
    /// share its layers and files that are open are not affected. Once the name is away, that is
    /// durable, and what cannot be removed then is left to the next start.
    ///
    /// # Errors
    /// When the name could not be taken away, or that could not be made durable.
    pub fn delete_snapshot(&self, id: &str) -> Result<bool> {
        if !is_id(id) {
            return Ok(false);
        }
        let snapshots = self.snapshots_dir();
        let (dir, gone) = (snapshots.join(id), snapshots.join(format!("{GONE_PREFIX}{id}")));
        if !dir.join(MANIFEST_FILE).exists() {
            return Ok(false);
        }
        // Left by a removal that was cut off.
        self.disk.remove_tree(&gone)?;
        match self.disk.rename(&dir, &gone) {
            Err(error) if error.is_not_found() => return Ok(false),
            other => other?,
        }
        self.disk.sync_dir(&snapshots)?;
        if let Err(error) = self.disk.remove_tree(&gone) {
            tracing::warn!(error = %chain(&error), "the next start will try to remove it again");
        }
        Ok(true)
    }

    pub(crate) fn snapshots_dir(&self) -> PathBuf {
        self.root().join(SNAPSHOTS_DIR)
    }

    pub(crate) fn read_snapshot(&self, id: &str) -> Result<Option<Snapshot>> {
        let dir = self.snapshots_dir().join(id);
        let manifest = match read_manifest(&dir) {
            Ok(manifest) => manifest,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        if manifest.id != id {
            return Err(mismatch(&dir, "it is the manifest of another snapshot"));
        }
        Ok(Some(Snapshot { dir, manifest }))
    }

    /// Removes what was never committed and what was deleted, unless somebody is writing just now.
    pub(crate) fn remove_uncommitted_snapshots(&self) -> Result<()> {
        let Some(_alone) = self.snapshots_lock(FlockOperation::NonBlockingLockExclusive)? else {
            return Ok(());
        };
        let snapshots = self.snapshots_dir();
        for entry in entries(&snapshots)? {
            let dir = snapshots.join(&entry);
            if is_id(&entry) && dir.join(MANIFEST_FILE).exists() {
                self.remove_leftovers(&dir);
                continue;
            }
            tracing::info!(entry, "removing a snapshot that was deleted or never committed");
            if let Err(error) = self.disk.remove_tree(&dir) {
                tracing::warn!(error = %chain(&error), "the next start will try again");
            }
        }
        Ok(())
    }

    /// Removes what a flattening that was cut off left beside a committed snapshot.
    fn remove_leftovers(&self, dir: &Path) {
        let removed = || -> Result<()> {
            let manifest = match read_manifest(dir) {
                Ok(manifest) => manifest,
                // Whoever wants this snapshot will be told. Nothing of it is touched until then.
                Err(StorageError::Manifest { .. }) => return Ok(()),
                Err(error) => return Err(error),
            };
            let mut ours: BTreeSet<String> =
                manifest.layers.iter().map(|info| info.id.file_name()).collect();
            ours.extend([MANIFEST_FILE, DISK_FILE, WORKING_SET_FILE].map(str::to_owned));
            ours.extend(Part::ALL.map(|part| part.file_name().to_owned()));
            for entry in entries(dir)?.iter().filter(|entry| !ours.contains(*entry)) {
                self.disk.remove_tree(&dir.join(entry))?;
            }
            Ok(())
        };
        if let Err(error) = removed() {
            tracing::warn!(error = %chain(&error), "the next start will try again");
        }
    }

    /// Held shared by everyone who has an unfinished snapshot in the store, and alone by the one who
    /// removes what is unfinished. `None` when it is held and is not to be waited for.
    pub(crate) fn snapshots_lock(&self, operation: FlockOperation) -> Result<Option<File>> {
        self.flock(SNAPSHOTS_LOCK, operation)
    }
}

/// Reads and checks the manifest in a snapshot's directory.
fn read_manifest(dir: &Path) -> Result<SnapshotManifest> {
    let path = dir.join(MANIFEST_FILE);
    let failed = |error: io::Error| StorageError::io("read", &path, error);
    let file = open_read(&path).map_err(failed)?;
    let mut bytes = Vec::new();
    // One byte more than allowed, so that an oversized file fails its length check.
    file.take(SNAPSHOT_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    SnapshotManifest::decode(&bytes)
        .map_err(|source| StorageError::Manifest { path: path.clone(), source })
}
