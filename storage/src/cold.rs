//! What a sandbox starts or goes on from where the memory was not kept: a kernel, and an empty memory.
//!
//! Called by shards, on threads that may block. Such a pause or snapshot has no layers and no state: the
//! disk, the kernel and the initial RAM file system as hard links, so that it depends on no template, and
//! the command line in the manifest's record. Refuses to guess a kernel: where all that had one is gone, it
//! says so.

use std::fs::File;
use std::io;

use mica_units::SandboxId;

use crate::error::{Result, StorageError};
use crate::layer::{Layer, LayerId};
use crate::snapshot::{Snapshot, SnapshotManifest, SnapshotStaging};
use crate::store::Store;
use crate::template::{Part, Template, open_read};
use crate::writer::{BlockingFile, FlatWriter, run_blocking};

/// Snapshots that are looked at for the template which a sandbox comes from in the end.
const ANCESTORS_MAX: usize = 32;

/// What a guest boots from, beside its disk.
#[derive(Debug)]
pub struct BootFiles {
    /// The kernel, read-only.
    pub kernel: File,
    /// The initial RAM file system, read-only.
    pub initramfs: Option<File>,
    /// The kernel's command line.
    pub cmdline: String,
}

impl SnapshotManifest {
    /// Whether a sandbox goes on from memory, and not from a disk alone.
    #[must_use]
    pub const fn has_memory(&self) -> bool {
        !self.layers.is_empty()
    }
}

impl Template {
    /// What its guests boot from.
    ///
    /// # Errors
    /// As [`Template::open_kernel`].
    pub fn open_boot(&self) -> Result<BootFiles> {
        let (kernel, initramfs) = (self.open_kernel()?, self.open_initramfs()?);
        Ok(BootFiles { kernel, initramfs, cmdline: self.manifest().cmdline.clone() })
    }
}

impl SnapshotStaging {
    /// Gives it a kernel and an initial RAM file system. The command line is the manifest's to keep.
    ///
    /// # Errors
    /// When they have no name any more, or the file system fails.
    pub fn link_boot(&self, files: &BootFiles) -> Result<()> {
        self.link_part(Part::Kernel, &files.kernel)?;
        files.initramfs.as_ref().map_or(Ok(()), |file| self.link_part(Part::Initramfs, file))
    }
}

impl Snapshot {
    /// What a sandbox of it boots from: of one without memory.
    ///
    /// # Errors
    /// [`StorageError::SnapshotGone`] when it was deleted since it was looked up; when a file is not there, or
    /// the command line is none.
    pub fn open_boot(&self) -> Result<BootFiles> {
        let open = |part: Part| {
            let path = self.dir().join(part.file_name());
            match open_read(&path) {
                Ok(file) => Ok(Some(file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(StorageError::io("open", &path, error)),
            }
        };
        let part = Part::Kernel.file_name();
        let missing = || match self.dir().exists() {
            true => StorageError::Part { part, what: "not there".to_owned() },
            false => StorageError::SnapshotGone { id: self.manifest().id.clone() },
        };
        let cmdline = String::from_utf8(self.manifest().record.clone()).map_err(|_| {
            StorageError::Part { part, what: "without a command line in form".to_owned() }
        })?;
        let kernel = open(Part::Kernel)?.ok_or_else(missing)?;
        Ok(BootFiles { kernel, initramfs: open(Part::Initramfs)?, cmdline })
    }
}

impl Store {
    /// The kernel that runs in a sandbox: that of a template among `ids`, or of what a snapshot among them
    /// comes from in the end; or one that a snapshot has with it. None where all of that is gone.
    ///
    /// # Errors
    /// When the store cannot be read; [`StorageError::TemplateGone`] where it was replaced meanwhile.
    pub fn find_boot(&self, ids: &[String]) -> Result<Option<BootFiles>> {
        for id in ids {
            let mut next = Some(id.clone());
            for _ in 0..ANCESTORS_MAX {
                let Some(id) = next.take() else { break };
                if let Some(template) = self.find_template(&id)? {
                    return template.open_boot().map(Some);
                }
                let Some(found) = self.find_snapshot(&id)? else { break };
                if !found.manifest().has_memory() {
                    return found.open_boot().map(Some);
                }
                next.clone_from(&found.manifest().parent);
            }
        }
        Ok(None)
    }

    /// Makes a layer for a sandbox that boots: all of its memory, empty. What it writes lies on that.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make_empty_layer(&self, sandbox: &SandboxId, frames: u32) -> Result<Layer> {
        let dir = self.sandbox_dir(sandbox);
        let id = LayerId::random().map_err(|e| StorageError::io("draw a random id in", &dir, e))?;
        let path = dir.join(id.file_name());
        let file = self.disk.create_direct(&path)?;
        let file = BlockingFile::on(self.disk.clone(), file, path);
        let info = run_blocking(FlatWriter::new(file, id, frames).finish())?;
        Layer::open_in(&dir, &info)
    }
}

#[cfg(test)]
mod tests;
