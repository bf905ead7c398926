//! Templates that clients build: the way to what the store keeps of them, and to their snapshots.
//!
//! Called by `http` through [`Host`], which knows how a build goes. Refuses to delete any other snapshot
//! than a build's.

use mica_numa::rt::{self, oneshot};
use mica_storage::{BuildStore, BuildStoreError, BuiltDefaults, SnapshotKind, StorageError};
use mica_units::{Mebibytes, SandboxId, VcpuCount};
use mica_wire::guest::Defaults;

use super::Host;
use super::operations::storage;
use crate::event::{IfRunning, Keeps, Operation, Purpose, Wake};
use crate::{BuiltFor, SandboxInfo, ShardError, SnapshotInfo};

impl Host {
    /// Does something with what the store keeps of builds, on a thread that may block.
    ///
    /// # Errors
    /// `Ok(Err(_))` is the store's own; [`ShardError::Busy`] when no thread takes it.
    pub async fn with_builds<T: Send + 'static>(
        &self,
        work: impl FnOnce(&BuildStore) -> Result<T, BuildStoreError> + Send + 'static,
    ) -> Result<Result<T, BuildStoreError>, ShardError> {
        let builds = self.0.shard.workshop.store.builds();
        rt::blocking(move || work(&builds)).await.map_err(|_| ShardError::Busy)
    }

    /// Waits until a build is over somewhere on the host, from this call on.
    pub fn next_turn(&self) -> oneshot::Receiver<()> {
        self.0.shard.turns.next()
    }

    /// Tells all shards that a build is over. One whose mailbox is full is not told: who waits there has to
    /// look by himself now and then.
    pub async fn build_over(&self) {
        if let Err(error) = self.ask_all(|| Operation::BuildOver).await {
            tracing::debug!(%error, "not all shards were told that a build is over");
        }
    }

    /// Makes the snapshot that sandboxes of a built template start from. Durable when this returns, and
    /// gone with the next start unless the template names it.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn snapshot_built(
        &self,
        id: SandboxId,
        built: BuiltFor,
    ) -> Result<SnapshotInfo, ShardError> {
        self.snapshot_for(id, Purpose::Built(built), Keeps::All).await
    }

    /// Boots a running sandbox again from its disk in another size, with all services of its template up. Its
    /// agent writes to the disk first what is to stay; what else ran in it is gone. It lives as long from
    /// then on as it was made for.
    ///
    /// # Errors
    /// [`ShardError::CannotBoot`] where it has no disk, or its kernel is not there any more; see
    /// [`ShardError`]. After any error it is of no use: it may be paused.
    pub async fn boot_resized(
        &self,
        id: SandboxId,
        size: (VcpuCount, Mebibytes),
    ) -> Result<SandboxInfo, ShardError> {
        self.pause_to_disk(id).await?;
        let (if_running, from) = (IfRunning::Refuse, Keeps::Disk);
        let wake = Wake { life: None, on_timeout: None, if_running, from, size: Some(size) };
        Ok(self.wake(id, wake).await?.0)
    }

    /// Deletes a snapshot that no template names any more. Sandboxes made from it go on.
    ///
    /// # Errors
    /// See [`ShardError`]. The next start removes it then.
    pub async fn delete_built(&self, snapshot: &str) -> Result<bool, ShardError> {
        self.delete_if(snapshot, |manifest| manifest.kind == SnapshotKind::Built).await
    }
}

impl ShardError {
    /// What a failure of the store is, with what was being done.
    #[must_use]
    pub fn from_storage(operation: &'static str, error: StorageError) -> Self {
        storage(operation)(error)
    }
}

/// As the agent is told.
pub fn defaults_for_agent(built: &BuiltDefaults) -> Defaults {
    let BuiltDefaults { env, workdir, user } = built.clone();
    Defaults { env, workdir, user }
}
