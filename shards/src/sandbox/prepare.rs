//! The blocking part of bringing a sandbox up: its snapshot, its disk, its directory in the store.
//!
//! Called by the driver, on blocking threads. Making may fail anywhere: taking back works by the
//! sandbox's id and finds whatever there is. Refuses to start anything: that is the pool's.

use std::fs::File;
use std::sync::Arc;

use mica_storage::{Layer, Store, StorageError};
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
}

impl Workshop {
    /// Finds what `asked` stands for, and makes disk and directory of a new sandbox. `known` is what
    /// it stood for last time.
    pub(crate) fn prepare(
        &self,
        id: &SandboxId,
        asked: &str,
        known: Option<Arc<Opened>>,
    ) -> Result<Found, Cause> {
        let image = self.find(asked, known)?;
        let disk = self
            .store
            .create_sandbox(id, image.disk.as_deref())
            .map_err(|error| cause("making its disk", &error))?;
        self.link(id, &image.layers)?;
        Ok(Found { image, disk: disk.map(Arc::new) })
    }

    /// The same for a sandbox that was paused: its directory is there.
    pub(crate) fn prepare_resume(
        &self,
        id: &SandboxId,
        snapshot: &str,
        known: Option<Arc<Opened>>,
    ) -> Result<Found, Cause> {
        let image = self.find(snapshot, known)?;
        let reopen = |from: &Arc<File>| -> Result<Arc<File>, StorageError> {
            let disk = self.store.open_sandbox_disk(id)?;
            self.store.reclone_disk(from, &disk)?;
            Ok(Arc::new(disk))
        };
        let disk = image.disk.as_ref().map(reopen).transpose();
        let disk = disk.map_err(|error| cause("putting its disk back", &error))?;
        self.link(id, &image.layers)?;
        Ok(Found { image, disk })
    }

    fn link(&self, id: &SandboxId, layers: &[Layer]) -> Result<(), Cause> {
        self.store
            .link_lineage(id, layers)
            .map_err(|error| cause("linking the layers of its memory", &error))
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
        let opened = Opened::open(&snapshot);
        opened.map(Arc::new).map_err(|error| cause("opening the snapshot", &error))
    }

    fn missing(&self, asked: &str) -> Cause {
        match self.store.find_template(asked) {
            Ok(Some(_)) => Cause::NotWarm,
            Ok(None) => Cause::NoSuchTemplate,
            Err(error) => cause("finding the template", &error),
        }
    }

    /// Removes what a sandbox has in the store, a snapshot that it waited in too. Blocks.
    pub(crate) fn take_back(
        &self,
        id: &SandboxId,
        paused_in: Option<&str>,
    ) -> Result<(), StorageError> {
        let removed = self.store.remove_sandbox(id);
        if let Some(snapshot) = paused_in {
            self.store.delete_snapshot(snapshot)?;
        }
        removed
    }
}

/// A step in the store that failed.
pub(crate) fn cause(step: &str, error: &StorageError) -> Cause {
    match error {
        StorageError::NoSpace { .. } => Cause::NoSpace,
        error => Cause::Failed(format!("{step}: {}", chain(error))),
    }
}
