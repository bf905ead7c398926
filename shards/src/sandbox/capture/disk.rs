//! A capture of the disk alone: a clone of it, and what boots from that.
//!
//! Called by the driver in the steps of any other capture. Refuses to look at the memory.

use std::fs::File;
use std::sync::Arc;

use mica_numa::rt;
use mica_storage::{BootFiles, Snapshot, SnapshotManifest, Store};

use super::{CaptureError, Staged, sync};

/// A snapshot in the making that has no memory.
#[derive(Debug)]
pub(crate) struct DiskCapture {
    staging: Staged,
    files: BootFiles,
}

impl DiskCapture {
    /// Clones the disk. The guest must stand still: where the file system cannot clone, this copies.
    pub(crate) async fn copy(
        store: Store,
        disk: Arc<File>,
        files: BootFiles,
    ) -> Result<Self, CaptureError> {
        let copy = move || {
            let staging = store.stage_snapshot(&store.new_snapshot_id()?)?;
            staging.clone_disk(&disk)?;
            staging.link_boot(&files)?;
            Ok::<_, CaptureError>((staging, files))
        };
        let (staging, files) = rt::blocking(copy).await??;
        Ok(Self { staging: Staged(Some(Arc::new(staging))), files })
    }

    /// The id of what it makes.
    pub(crate) fn id(&self) -> Option<String> {
        self.staging.id()
    }

    /// Brings everything to the device and makes the snapshot exist, of the manifest that `describe` makes.
    /// `keep` is as in [`super::Capture::commit`].
    pub(crate) async fn commit<T: Send + 'static>(
        self,
        describe: impl FnOnce(String) -> SnapshotManifest,
        keep: impl FnOnce(Snapshot, &dyn Fn() -> bool) -> Result<T, CaptureError> + Send + 'static,
    ) -> Result<T, CaptureError> {
        let Self { mut staging, files } = self;
        let preparing = staging.share()?;
        let mut manifest = describe(preparing.id().to_owned());
        manifest.record = files.cmdline.into_bytes();
        // Each a piece of its own: should nobody wait any more, what is left of them is not begun.
        let prepare = move || preparing.prepare(&manifest).map(|jobs| (jobs, manifest));
        let (manifest, synced) = sync(prepare).await?;
        let whole = staging.0.take().and_then(Arc::into_inner).ok_or(CaptureError::Shared)?;
        // Lives as long as this future.
        let heard = Arc::new(());
        let hearing = Arc::downgrade(&heard);
        let commit = move || {
            let snapshot = whole.commit(manifest, synced)?;
            keep(snapshot, &|| hearing.strong_count() == 0)
        };
        let kept = rt::blocking(commit).await;
        drop(heard);
        kept?
    }
}
