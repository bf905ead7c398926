//! The blocking part of bringing a sandbox up: its snapshot, its disk, its directory in the store.
//!
//! Called by the driver, on blocking threads. Making may fail anywhere: taking back works by the
//! sandbox's id and finds whatever there is. Refuses to start anything: that is the pool's.

use std::fs::File;
use std::sync::Arc;

use mica_storage::{BootFiles, Layer, SnapshotKind, SnapshotManifest, Stamp, StorageError, Store};
use mica_units::{Mebibytes, SandboxId, TenantId, VcpuCount, frames_of};

use super::chain;
use super::image::Opened;
use super::state::Cause;
use crate::HostConfig;
use crate::rounds::MachineNodes;
use crate::shell::Size;

/// What a shard needs of the host. Cheap to clone and to send to a blocking thread.
#[derive(Clone, Debug)]
pub(crate) struct Workshop {
    /// The operator's decisions.
    pub(crate) config: Arc<HostConfig>,
    /// Templates, snapshots and disks.
    pub(crate) store: Store,
    /// Memory nodes, and how many hardware threads of each run vCPUs.
    pub(crate) nodes: Arc<[(u32, usize)]>,
    /// All nodes of the machine, also those that are in no plan.
    pub(crate) machine: Arc<MachineNodes>,
}

/// Who makes a sandbox, as far as it matters for what it may be made from.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// Whose it will be.
    pub(crate) tenant: TenantId,
    /// Whether it is one of several copies.
    pub(crate) of_copies: bool,
    /// Whether it was asked for by the name of a template that a client built.
    pub(crate) of_built: bool,
}

impl Origin {
    /// Whether a sandbox may be made from this. What is refused must look as if it did not exist.
    pub(crate) fn may_use(&self, manifest: &SnapshotManifest) -> bool {
        // Snapshots of the time before there were tenants are the default one's.
        let is_own = || manifest.tenant.clone().unwrap_or_default() == self.tenant;
        match manifest.kind {
            SnapshotKind::Template => true,
            SnapshotKind::Snapshot => is_own(),
            SnapshotKind::Copies => self.of_copies && is_own(),
            // Whose template it is, and whether others may use it, was asked when the name was looked up.
            SnapshotKind::Built => self.of_built,
            // A resume asks for no leave, and nothing else starts from it.
            SnapshotKind::Pause => false,
        }
    }
}

/// What a sandbox is restored from, and its disk.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) image: Arc<Opened>,
    /// Tells that what was asked for still stands for it.
    pub(crate) stamp: Option<Stamp>,
    pub(crate) disk: Option<Arc<File>>,
    /// Whether its directory is there already.
    pub(crate) has_directory: bool,
    /// What it boots from, where it starts or goes on from a disk alone.
    pub(crate) boot: Option<Boot>,
    /// The VM process it needs: of the image's size, but for one that boots in another.
    pub(crate) size: Size,
}

/// How a paused sandbox is to boot.
#[derive(Debug)]
pub(crate) struct BootWish {
    /// By what its kernel can be found, the best first, if it was not paused with one of its own.
    pub(crate) kernel_of: Vec<String>,
    /// vCPUs and memory, where not those it had.
    pub(crate) size: Option<(VcpuCount, Mebibytes)>,
}

/// What a guest boots from.
#[derive(Debug)]
pub(crate) struct Boot {
    /// Kernel and command line.
    pub(crate) files: BootFiles,
    /// What its memory lies on: nothing but zeros.
    pub(crate) memory: Layer,
}

/// Why a sandbox cannot boot.
pub(crate) const NO_DISK: &str = "it has no disk";
pub(crate) const NO_KERNEL: &str =
    "the template that its kernel is of is not there any more; keep its memory";

impl Found {
    /// Of an image that needs nothing made: one without a disk.
    pub(crate) fn without_disk(image: Arc<Opened>) -> Option<Self> {
        let (size, stamp, disk, boot) = (image.size(), None, None, None);
        let made = Self { image, stamp, disk, has_directory: false, boot, size };
        made.image.disk.is_none().then_some(made)
    }
}

impl Workshop {
    /// Finds what `asked` stands for, and makes the disk of a new sandbox, if it has one: what a restore
    /// needs. [`Workshop::settle`] does the rest while the VM process restores. `known` is what it stood
    /// for last time.
    pub(crate) fn prepare(
        &self,
        id: &SandboxId,
        asked: &str,
        origin: &Origin,
        known: Option<Arc<Opened>>,
    ) -> Result<Found, Cause> {
        let (image, stamp) = self.find(asked, known)?;
        if !origin.may_use(&image.manifest) {
            return Err(Cause::NoSuchTemplate);
        }
        let has_directory = image.disk.is_some();
        let disk = match image.disk.as_deref() {
            Some(disk) => self.store.create_sandbox(id, Some(disk)),
            None => Ok(None),
        };
        let disk = disk.map_err(|error| cause("making its disk", &error))?.map(Arc::new);
        let size = image.size();
        let boot = match image.manifest.has_memory() {
            true => None,
            false => Some(self.boot(id, own_kernel(&image)?, size)?),
        };
        Ok(Found { image, stamp, disk, has_directory, boot, size })
    }

    /// What a sandbox boots from, whose directory is there: with an empty memory.
    fn boot(&self, id: &SandboxId, files: BootFiles, size: Size) -> Result<Boot, Cause> {
        let memory = self.store.make_empty_layer(id, frames_of(size.memory));
        let memory = memory.map_err(|error| cause("making its memory", &error))?;
        Ok(Boot { files, memory })
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

    /// The same for a sandbox that was paused: its directory is there. `wish`: it is to boot.
    pub(crate) fn prepare_resume(
        &self,
        id: &SandboxId,
        snapshot: &str,
        known: Option<Arc<Opened>>,
        wish: Option<BootWish>,
    ) -> Result<Found, Cause> {
        let (image, stamp) = self.find(snapshot, known)?;
        let mut size = image.size();
        if let Some((vcpus, memory)) = wish.as_ref().and_then(|wish| wish.size) {
            size = Size { vcpus, memory, ..size };
        }
        let files = match (image.manifest.has_memory(), wish) {
            (false, _) => Some(own_kernel(&image)?),
            (true, Some(_)) if image.disk.is_none() => return Err(Cause::CannotBoot(NO_DISK)),
            (true, Some(wish)) => Some(self.find_boot(&wish.kernel_of)?),
            (true, None) => None,
        };
        let boot = files.map(|files| self.boot(id, files, size)).transpose()?;
        let reopen = || -> Result<Option<Arc<File>>, StorageError> {
            let Some(disk) = self.store.open_sandbox_disk(id)? else { return Ok(None) };
            if let Some(from) = &image.disk {
                self.store.reclone_disk(from, &disk)?;
            }
            Ok(Some(Arc::new(disk)))
        };
        let disk = reopen().map_err(|error| cause("putting its disk back", &error))?;
        Ok(Found { image, stamp, disk, has_directory: true, boot, size })
    }

    /// The kernel of the first of these that has one.
    pub(crate) fn find_boot(&self, ids: &[String]) -> Result<BootFiles, Cause> {
        match self.store.find_boot(ids) {
            // Replaced since it was found.
            Err(StorageError::TemplateGone { .. }) => Err(Cause::Busy),
            found => {
                let found = found.map_err(|error| cause("finding its kernel", &error))?;
                found.ok_or(Cause::CannotBoot(NO_KERNEL))
            }
        }
    }

    /// What a name or an id stands for now, open, and what tells for how long.
    pub(crate) fn find(
        &self,
        asked: &str,
        known: Option<Arc<Opened>>,
    ) -> Result<(Arc<Opened>, Option<Stamp>), Cause> {
        // Before it is looked up: a change meanwhile shows.
        let stamp =
            self.store.stamp(asked).map_err(|error| cause("finding the snapshot", &error))?;
        let found = self.store.find_snapshot(asked);
        let found = found.map_err(|error| cause("finding the snapshot", &error))?;
        let Some(snapshot) = found else { return Err(self.missing(asked)) };
        if let Some(known) = known
            && known.manifest.id == snapshot.manifest().id
            // Flattening changes what it consists of, never what it says.
            && known.manifest.layers == snapshot.manifest().layers
        {
            return Ok((known, stamp));
        }
        let opened = self.store.open_snapshot(asked);
        let opened = opened.map_err(|error| cause("opening the snapshot", &error))?;
        let Some(opened) = opened else { return Err(self.missing(asked)) };
        let image = Opened::new(opened);
        let image = image.map_err(|error| Cause::Failed(format!("its memory: {error}")))?;
        Ok((Arc::new(image), stamp))
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

/// The kernel that an image without memory has with it.
fn own_kernel(image: &Opened) -> Result<BootFiles, Cause> {
    let opened = image.snapshot.open_boot();
    opened.map_err(|error| cause("opening its kernel", &error))
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

#[cfg(test)]
mod tests {
    use super::*;
    use mica_storage::ReadyWhen;

    fn manifest(kind: SnapshotKind, tenant: Option<&str>) -> SnapshotManifest {
        SnapshotManifest {
            id: "0123456789abcdefghij".to_owned(),
            kind,
            name: None,
            template_id: "0123456789abcdefghij".to_owned(),
            template_name: "base".parse().unwrap(),
            parent: None,
            sandbox: None,
            tenant: tenant.map(|tenant| tenant.parse().unwrap()),
            created_unix_ms: 0,
            vcpus: VcpuCount::new(1).unwrap(),
            memory: Mebibytes::new(16),
            envd_version: String::new(),
            ready: ReadyWhen::Agent,
            layers: Vec::new(),
            disk_bytes: 0,
            state: Vec::new(),
            record: Vec::new(),
        }
    }

    #[test]
    fn sandboxes_are_made_from_templates_and_from_what_is_their_tenants() {
        use SnapshotKind::{Built, Copies, Pause, Snapshot, Template};
        let may = |tenant: &str, of_copies, kind, owner| {
            let tenant = tenant.parse().unwrap();
            let origin = Origin { tenant, of_copies, of_built: owner == Some("built") };
            origin.may_use(&manifest(kind, owner))
        };
        for of_copies in [false, true] {
            assert!(may("a", of_copies, Template, None));
            assert!(may("a", of_copies, Snapshot, Some("a")));
            assert!(!may("a", of_copies, Snapshot, Some("b")));
            assert!(!may("a", of_copies, Snapshot, None), "of the time before: the default's");
            assert!(may("default", of_copies, Snapshot, None));
            assert!(!may("a", of_copies, Pause, Some("a")));
        }
        assert!(may("a", false, Built, Some("built")));
        assert!(!may("a", false, Built, Some("a")), "but by its template's name");
        assert!(may("a", true, Copies, Some("a")));
        assert!(!may("a", true, Copies, Some("b")));
        assert!(!may("a", false, Copies, Some("a")), "but for the copies it was made for");
    }
}
