//! Works out what a rollback has to put back, and puts the disk back.
//!
//! Called by the driver while the guest is frozen; the VM process does the memory. Refuses a snapshot
//! that is not of this sandbox. Up to the record nothing is changed; after it, the sandbox is on its
//! way to the snapshot whatever happens to the daemon.

use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;

use futures_lite::future::zip;
use mica_numa::process::ProcessError;
use mica_numa::rt;
use mica_storage::{Layer, SnapshotKind, StorageError};
use mica_units::{SandboxId, TenantId};
use mica_wire::vm::plan::{self, Entry, PlanError, Source};

use super::chain;
use super::image::Opened;
use super::memory::{Memory, Place, difference, plan_back, union};
use super::prepare::Workshop;
use super::state::Cause;
use crate::shard::Shard;
use crate::{ShardError, warmth};

/// What the VM process is to be told.
#[derive(Debug)]
pub(crate) struct Back {
    /// Where the sandbox goes.
    pub(crate) image: Arc<Opened>,
    /// What differs.
    pub(crate) entries: Vec<Entry>,
    /// The same as bytes.
    pub(crate) plan: Vec<u8>,
}

/// Why a rollback does not happen. The sandbox is as it was, but where it is [`BackError::Broken`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackError {
    /// No such snapshot.
    #[error("snapshot {0:?} does not exist")]
    Missing(String),
    /// Of another sandbox.
    #[error("snapshot {0:?} is of another sandbox")]
    Foreign(String),
    /// Of the disk alone.
    #[error("snapshot {0:?} has no memory")]
    NoMemory(String),
    /// The store.
    #[error("the store failed")]
    Storage(#[from] StorageError),
    /// Its memory.
    #[error("its memory could not be looked at")]
    Process(#[from] ProcessError),
    /// It differs in too many places.
    #[error("too much differs")]
    Plan(#[from] PlanError),
    /// A blocking thread.
    #[error("a blocking thread did not do its part")]
    Blocking(#[from] rt::BlockingError),
    /// Half of its disk is the snapshot's. It can only go on from there.
    #[error("its disk could not be put back; it is paused in the snapshot")]
    Broken(#[source] StorageError),
    /// The copy of its base is not there yet, or nobody is free to make it.
    #[error("its memory is not at hand yet")]
    NotYet,
    /// The daemon stops.
    #[error("the daemon stops")]
    Draining,
    /// Something else.
    #[error("{0}")]
    Other(String),
}

impl From<Cause> for BackError {
    /// Why its memory cannot be had.
    fn from(cause: Cause) -> Self {
        match cause {
            Cause::Busy => Self::NotYet,
            Cause::Draining => Self::Draining,
            Cause::Failed(why) => Self::Other(why),
            other => Self::Other(format!("{other:?}")),
        }
    }
}

impl BackError {
    /// For who asked.
    pub(crate) fn for_client(self, sandbox: SandboxId) -> ShardError {
        match self {
            Self::Missing(snapshot) => ShardError::NoSuchSnapshot(snapshot),
            Self::Foreign(snapshot) => ShardError::ForeignSnapshot { snapshot, sandbox },
            Self::NoMemory(snapshot) => ShardError::SnapshotOfDisk(snapshot),
            Self::Storage(StorageError::NoSpace { .. }) => ShardError::NoSpace,
            Self::Draining => ShardError::ShuttingDown,
            // Not `NoSpace`, which says that nothing was changed.
            Self::NotYet
            | Self::Blocking(rt::BlockingError::Full)
            | Self::Storage(StorageError::LayerGone { .. } | StorageError::SnapshotGone { .. }) => {
                ShardError::Busy
            }
            error => ShardError::OperationFailed {
                operation: "a rollback",
                sandbox,
                reason: chain(&error),
            },
        }
    }
}

/// What a rollback works on.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) shard: Rc<Shard>,
    pub(crate) id: SandboxId,
    pub(crate) tenant: TenantId,
    pub(crate) snapshot: String,
    /// What that was when it was made, or last used.
    pub(crate) known: Option<Arc<Opened>>,
    /// The record that says where the sandbox is going.
    pub(crate) record: Vec<u8>,
    pub(crate) disk: Option<Arc<File>>,
}

/// Works the plan out, records where the sandbox goes, and puts its disk back.
pub(crate) async fn replace(
    job: Job,
    place: Place<'_>,
    memory: &mut Memory,
) -> Result<Back, BackError> {
    let Job { shard, id, tenant, snapshot, known, record, disk } = job;
    let (workshop, finder) = (shard.workshop.clone(), shard.workshop.clone());
    let finding = rt::blocking(move || find(&finder, &id, &tenant, &snapshot, known));
    // Only looked at: what is found stays written, should this come to nothing.
    let (image, changed) = zip(finding, memory.changed(place, false)).await;
    let (image, changed) = (image??, changed?);
    let shown = memory.shown_from_below(place, &image.pieces, &image.layers).await?;
    let differing = union(&changed, &difference(&memory.layers, &image.layers));
    let differing = union(&differing, &shown);
    let entries = plan_back(memory, &image.pieces, &image.layers, &differing);
    let plan = plan::encode(&entries)?;
    // The file's pages may be on another node. Nothing is changed yet, and what the guest is now is to be
    // given up: so it waits here, where it stands still. For half of the time that the step has: one that
    // takes longer ends the sandbox.
    if entries.iter().any(maps_base) {
        let longest = workshop.config.boot_deadline / 2;
        warmth::at_hand_within(&shard, &image, longest).await?;
    }
    let turn = Turn { workshop, id, record, disk };
    let (from, old, new) = (image.disk.clone(), memory.layers.clone(), image.layers.clone());
    rt::blocking(move || turn.put_back(from.as_deref(), &old, &new)).await??;
    Ok(Back { image, entries, plan })
}

fn maps_base(entry: &Entry) -> bool {
    matches!(entry.source, Source::Map { layer: 0, .. })
}

/// The blocking part.
struct Turn {
    workshop: Workshop,
    id: SandboxId,
    record: Vec<u8>,
    disk: Option<Arc<File>>,
}

impl Turn {
    fn put_back(self, from: Option<&File>, old: &[Layer], new: &[Layer]) -> Result<(), BackError> {
        let Self { workshop, id, record, disk } = self;
        let store = &workshop.store;
        // Both: until the record is written it may go on from where it is.
        let known = |layer: &&Layer| old.iter().all(|old| old.info().id != layer.info().id);
        let both: Vec<Layer> = old.iter().chain(new.iter().filter(known)).cloned().collect();
        store.link_lineage(&id, &both)?;
        store.write_record(&id, &record, false)?;
        if let (Some(from), Some(disk)) = (from, &disk) {
            store.reclone_disk(from, disk).map_err(BackError::Broken)?;
        }
        // It goes back whatever happens now; links too many go with the next rollback or with it.
        if let Err(error) = store.link_lineage(&id, new) {
            tracing::warn!(%id, error = chain(&error), "layers of an earlier time stay linked");
        }
        Ok(())
    }
}

fn find(
    workshop: &Workshop,
    id: &SandboxId,
    tenant: &TenantId,
    snapshot: &str,
    known: Option<Arc<Opened>>,
) -> Result<Arc<Opened>, BackError> {
    let missing = || BackError::Missing(snapshot.to_owned());
    let image = match workshop.find(snapshot, known) {
        Ok((image, _)) => image,
        Err(Cause::NoSuchTemplate | Cause::NotWarm) => return Err(missing()),
        Err(cause) => return Err(BackError::Other(format!("{cause:?}"))),
    };
    let manifest = &image.manifest;
    if manifest.kind != SnapshotKind::Snapshot || manifest.id != snapshot {
        return Err(missing());
    }
    // To say that it is another's would say that it is there.
    if manifest.tenant.clone().unwrap_or_default() != *tenant {
        return Err(missing());
    }
    if manifest.sandbox != Some(*id) {
        return Err(BackError::Foreign(snapshot.to_owned()));
    }
    if !manifest.has_memory() {
        return Err(BackError::NoMemory(snapshot.to_owned()));
    }
    Ok(image)
}
