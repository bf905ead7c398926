//! The store: templates, their manifests, and the disks of sandboxes. Knows no VM.
//!
//! Called by `shards` (on a thread that may block) and by `mica template`. Refuses a directory it
//! did not make, a manifest that fails any check, and any name that is not exactly in form.
//!
//! ```text
//! <root>/mica-store                 marker and version; a directory without it is refused
//! <root>/lock                       flock: exclusive while a template is written or deleted
//! <root>/templates/<id>/            manifest, kernel, initramfs, disk: immutable once committed
//! <root>/names/<name> -> <id>       THE commit: a template exists when its name points at it
//! <root>/snapshots/<id>/            what sandboxes start from: see `snapshot.rs`
//! <root>/snapshots.lock             flock: shared while a snapshot is made
//! <root>/sandboxes/<sandbox id>/    see `sandbox.rs`
//! <root>/builds/                    templates that clients build: see `builds/mod.rs`
//! ```
//!
//! One symlink, replaced by one rename, is both the index by name and the commit point. So the
//! index cannot disagree with what is committed, and replacing a template is atomic. A directory
//! in `templates/` that no name points at was never committed, or has been replaced or deleted;
//! start-up removes it.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod archive;
mod builds;
mod cold;
#[cfg(test)]
mod crash_tests;
mod crashsafe;
mod envelope;
mod error;
mod flatten;
mod id;
mod layer;
mod manifest;
mod pool;
mod sandbox;
#[cfg(test)]
mod simulation;
mod snapshot;
mod sparse;
mod staging;
mod stamp;
mod store;
mod template;
#[cfg(test)]
mod testing;
mod working_set;
mod writer;

pub use archive::{Imported, OnExisting, write_archive};
pub use builds::{
    BUILD_LOG_BYTES_MAX, BuildPhase, BuildRecord, BuildSlot, BuildStore, BuildStoreError, Built,
    BuiltDefaults, BuiltTag, BuiltTemplate, DEFAULT_TAG, Reference, Upload, UploadGrant,
};
pub use cold::BootFiles;
pub use error::{Result, StorageError};
pub use flatten::{FlattenLimits, FlattenStep, Flattened, Shape};
pub use layer::{
    CHUNK_BYTES, CHUNK_PAGES, COALESCE_GAP, Extent, LAYERS_MAX, Layer, LayerError, LayerId,
    LayerIdError, LayerInfo, LayerKind, Piece, RUNS_MAX, RunTable, Written, coalesce, groups,
    merge, restrict,
};
pub use manifest::{
    MANIFEST_BYTES_MAX, Manifest, ManifestError, PartInfo, ReadyWhen, TEMPLATE_ID_CHARS,
};
pub use pool::{
    COW_EXTENT_BYTES, POOL_BYTES_MIN, Pool, PoolCreated, PoolError, PoolInfo, Reflink, pools,
    reflink_support,
};
pub use sandbox::SANDBOX_RECORD_BYTES_MAX;
pub use snapshot::{
    OpenSnapshot, RECORD_BYTES_MAX, STATE_BYTES_MAX, Snapshot, SnapshotKind, SnapshotManifest,
    SnapshotStaging, SyncJob, Synced,
};
pub use staging::{Staging, TemplateSpec};
pub use stamp::Stamp;
pub use store::Store;
pub use template::{Part, Template};
pub use working_set::{PREFETCH_FRAMES, WORKING_SET_RUNS_MAX, prefetch_plan};
pub use writer::{
    Aligned, BlockingFile, Closing, FlatWriter, LayerFile, PackedWriter, Pending, ROUNDS_MAX,
    run_blocking,
};
