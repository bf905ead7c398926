//! A template on its way into the store.
//!
//! Called by `mica template` and by the archive reader. Refuses to commit what a manifest cannot
//! describe. Until [`Staging::commit`] returns, no reader sees any of it; dropping it removes it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use mica_units::{Mebibytes, TemplateName, VcpuCount};

use crate::error::{Result, StorageError};
use crate::manifest::{Manifest, PartInfo, ReadyWhen};
use crate::sparse;
use crate::store::{Store, WriteLock};
use crate::template::{MANIFEST_FILE, Part, Template, open_read};

/// What a template is, apart from its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateSpec {
    /// Its name.
    pub name: TemplateName,
    /// vCPUs of a sandbox.
    pub vcpus: VcpuCount,
    /// Memory of a sandbox.
    pub memory: Mebibytes,
    /// The kernel command line.
    pub cmdline: String,
    /// The envd version the agent implements; empty where there is no agent.
    pub envd_version: String,
    /// When a sandbox counts as started.
    pub ready: ReadyWhen,
    /// A hash of everything the template was built from; empty when not built by us.
    pub inputs_hash: String,
}

/// A template that is not committed yet. Holds the store's write lock.
#[derive(Debug)]
pub struct Staging {
    store: Store,
    lock: WriteLock,
    id: String,
    dir: PathBuf,
    name: TemplateName,
    committed: bool,
}

impl Store {
    /// Starts a new template named `name`. Waits while another process writes.
    ///
    /// # Errors
    /// [`StorageError::TemplateExists`] when there is one and `replace` is not set.
    pub fn stage(&self, name: &TemplateName, replace: bool) -> Result<Staging> {
        let lock = self.lock()?;
        if !replace && self.target_of(name)?.is_some() {
            return Err(StorageError::TemplateExists { name: name.to_string() });
        }
        let id = crate::id::random_text()
            .map_err(|e| StorageError::io("draw a random id in", self.root(), e))?;
        let dir = self.templates_dir().join(&id);
        self.disk.make_new_dir(&dir)?;
        Ok(Staging { store: self.clone(), lock, id, dir, name: name.clone(), committed: false })
    }
}

impl Staging {
    /// Makes the file of `part`, empty, for the caller to fill.
    ///
    /// # Errors
    /// When it cannot be made, or was made before.
    pub fn create_part(&self, part: Part) -> Result<File> {
        self.store.disk.create_file(&self.part_path(part))
    }

    /// Makes the file of `part` with the content of `from`: a reflink where the file system can.
    ///
    /// # Errors
    /// When `from` cannot be read, or the copy not be made.
    pub fn copy_part(&self, part: Part, from: &Path) -> Result<()> {
        let source = File::open(from).map_err(|e| StorageError::io("open", from, e))?;
        let file = self.create_part(part)?;
        sparse::clone_or_copy(&source, &file)
            .map(drop)
            .map_err(|e| StorageError::io("copy", from, e))
    }

    /// Makes the template exist: syncs its files, writes its manifest, points its name at it.
    /// What had the name before is deleted.
    ///
    /// # Errors
    /// When a file is missing, a bound does not hold, or a step fails. Then nothing has changed.
    pub fn commit(self, spec: &TemplateSpec) -> Result<Template> {
        let kernel = self.seal_part(Part::Kernel)?.ok_or_else(|| StorageError::Part {
            part: Part::Kernel.file_name(),
            what: "it was not given, and every template has one".to_owned(),
        })?;
        let manifest = Manifest {
            id: self.id.clone(),
            name: spec.name.clone(),
            created_unix_ms: unix_ms(),
            vcpus: spec.vcpus,
            memory: spec.memory,
            cmdline: spec.cmdline.clone(),
            envd_version: spec.envd_version.clone(),
            ready: spec.ready,
            inputs_hash: spec.inputs_hash.clone(),
            kernel,
            initramfs: self.seal_part(Part::Initramfs)?,
            disk: self.seal_part(Part::Disk)?,
        };
        self.commit_manifest(manifest)
    }

    /// Syncs a part and measures it. `None` when it was not made.
    pub(crate) fn seal_part(&self, part: Part) -> Result<Option<PartInfo>> {
        let path = self.part_path(part);
        let file = match open_read(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StorageError::io("open", &path, error)),
        };
        self.store.disk.sync_file(&path, &file)?;
        let measure = || -> std::io::Result<PartInfo> {
            let bytes = file.metadata()?.len();
            Ok(PartInfo { bytes, crc32c: sparse::digest(&file, bytes)? })
        };
        measure().map(Some).map_err(|e| StorageError::io("read", &path, e))
    }

    pub(crate) fn commit_manifest(mut self, manifest: Manifest) -> Result<Template> {
        if manifest.name != self.name {
            let what = format!("it was started as `{}`", self.name);
            let source = crate::ManifestError::Field { field: "name", what };
            return Err(StorageError::Describe { source });
        }
        let bytes = manifest.encode().map_err(|source| StorageError::Describe { source })?;
        let disk = &self.store.disk;
        disk.write_file(&self.dir.join(MANIFEST_FILE), &bytes)?;
        disk.sync_dir(&self.dir)?;
        disk.sync_dir(&self.store.templates_dir())?;
        let replaced = self.store.target_of(&self.name)?;
        disk.commit_name(&self.store.names_dir(), self.name.as_str(), &self.id)?;
        self.committed = true;
        if let Some(old) = replaced {
            self.store.discard(&self.lock, &old);
        }
        Ok(Template::new(self.dir.clone(), manifest))
    }

    /// The id it will have: also that of its running snapshot, which is made before the commit, so
    /// that no template is ever there without one. A start removes both if the commit never comes.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn part_path(&self, part: Part) -> PathBuf {
        self.dir.join(part.file_name())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        // The rename may have happened and only its sync have failed: what a name points at stays.
        let points_here = matches!(self.store.target_of(&self.name), Ok(Some(id)) if id == self.id);
        if !points_here {
            self.store.discard(&self.lock, &self.id);
        }
    }
}

/// Milliseconds since 1970, 0 for a clock before that.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
