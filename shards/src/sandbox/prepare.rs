//! The blocking part of bringing a sandbox up: its snapshot, its disk, its directory in the store.
//!
//! Called by the driver, on blocking threads. Making may fail anywhere: taking back works by the
//! sandbox's id and finds whatever there is. Refuses to start anything: that is the pool's.

use std::fs::File;
use std::sync::Arc;

use mica_storage::{Layer, SnapshotKind, StorageError, Store};
use mica_units::SandboxId;

use super::chain;
use super::image::Opened;
use super::state::Cause;
use crate::HostConfig;

/// What a shard needs of the host. Cheap to clone and to send to a blocking thread.
#[derive(Clone, Debug)]
pub(crate) struct Workshop {
    /// The operator's decisions.
    pub(crate) config: Arc<HostConfig>,
    /// Templates, snapshots and disks.
    pub(crate) store: Store,
}

/// What a sandbox is restored from, and its disk.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) image: Arc<Opened>,
    pub(crate) disk: Option<Arc<File>>,
    /// Whether its directory is there already.
    pub(crate) has_directory: bool,
}

impl Workshop {
    /// Finds what `asked` stands for, and makes the disk of a new sandbox, if it has one: what a restore
    /// needs. [`Workshop::settle`] does the rest while the VM process restores. `known` is what it stood
    /// for last time.
    pub(crate) fn prepare(
        &self,
        id: &SandboxId,
        asked: &str,
        known: Option<Arc<Opened>>,
    ) -> Result<Found, Cause> {
        let image = self.find(asked, known)?;
        let has_directory = image.disk.is_some();
        let disk = match image.disk.as_deref() {
            Some(disk) => self.store.create_sandbox(id, Some(disk)),
            None => Ok(None),
        };
        let disk = disk.map_err(|error| cause("making its disk", &error))?.map(Arc::new);
        Ok(Found { image, disk, has_directory })
    }

    /// What the next daemon needs of a sandbox: links to the layers it runs on, and its record where that
    /// is not there.
    pub(crate) fn settle(
        &self,
        id: &SandboxId,
        has_directory: bool,
        layers: &[Layer],
        record: Option<&[u8]>,
    ) -> Result<(), StorageError> {
        if !has_directory {
            self.store.create_sandbox(id, None)?;
        }
        let Some(record) = record else { return self.store.link_layers(id, layers) };
        self.store.link_lineage(id, layers)?;
        self.store.write_record(id, record, false)
    }

    /// The same for a sandbox that was paused: its directory is there.
    pub(crate) fn prepare_resume(
        &self,
        id: &SandboxId,
        snapshot: &str,
        known: Option<Arc<Opened>>,
    ) -> Result<Found, Cause> {
        let image = self.find(snapshot, known)?;
        let reopen = || -> Result<Option<Arc<File>>, StorageError> {
            let Some(disk) = self.store.open_sandbox_disk(id)? else { return Ok(None) };
            if let Some(from) = &image.disk {
                self.store.reclone_disk(from, &disk)?;
            }
            Ok(Some(Arc::new(disk)))
        };
        let disk = reopen().map_err(|error| cause("putting its disk back", &error))?;
        Ok(Found { image, disk, has_directory: true })
    }

    /// What a name or an id stands for now, open.
    pub(crate) fn find(
        &self,
        asked: &str,
        known: Option<Arc<Opened>>,
    ) -> Result<Arc<Opened>, Cause> {
        let found = self.store.find_snapshot(asked);
        let found = found.map_err(|error| cause("finding the snapshot", &error))?;
        let Some(snapshot) = found else { return Err(self.missing(asked)) };
        if let Some(known) = known
            && known.manifest.id == snapshot.manifest().id
            // Flattening changes what it consists of, never what it says.
            && known.manifest.layers == snapshot.manifest().layers
        {
            return Ok(known);
        }
        let opened = self.store.open_snapshot(asked);
        let opened = opened.map_err(|error| cause("opening the snapshot", &error))?;
        let Some(opened) = opened else { return Err(self.missing(asked)) };
        let image = Opened::new(opened);
        image.map(Arc::new).map_err(|error| Cause::Failed(format!("its memory: {error}")))
    }

    fn missing(&self, asked: &str) -> Cause {
        match self.store.find_template(asked) {
            Ok(Some(_)) => Cause::NotWarm,
            Ok(None) => Cause::NoSuchTemplate,
            Err(error) => cause("finding the template", &error),
        }
    }

    /// Removes what a sandbox has in the store, also the snapshot that it waited in, and one that its
    /// last operation may have committed without telling anyone. Blocks.
    pub(crate) fn take_back(
        &self,
        id: &SandboxId,
        paused_in: Option<&str>,
        committing: Option<&str>,
    ) -> Result<(), StorageError> {
        let removed = self.store.remove_sandbox(id);
        if let Some(snapshot) = committing {
            self.store.delete_snapshot(snapshot)?;
        }
        if let Some(snapshot) = paused_in {
            self.delete_pause(snapshot)?;
        }
        removed
    }

    /// Removes the snapshot of a pause; leaves one that a client made.
    pub(crate) fn delete_pause(&self, id: &str) -> Result<(), StorageError> {
        let found = self.store.find_snapshot(id)?;
        if found.is_some_and(|found| found.manifest().kind == SnapshotKind::Pause) {
            self.store.delete_snapshot(id)?;
        }
        Ok(())
    }
}

/// A step in the store that failed.
pub(crate) fn cause(step: &str, error: &StorageError) -> Cause {
    match error {
        StorageError::NoSpace { .. } => Cause::NoSpace,
        // Flattened or deleted since it was found: the next try finds what it is now.
        StorageError::LayerGone { .. } | StorageError::SnapshotGone { .. } => Cause::Busy,
        error => Cause::Failed(format!("{step}: {}", chain(error))),
    }
}
