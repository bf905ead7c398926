//! One committed template, and its files.
//!
//! Called by whoever starts a sandbox or shows a template. Refuses to open a file whose length is
//! not what the manifest says.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::error::{Result, StorageError};
use crate::manifest::{MANIFEST_BYTES_MAX, Manifest, PartInfo};

/// The name of the manifest in a template's directory.
pub(crate) const MANIFEST_FILE: &str = "manifest";

/// A file of a template other than its manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The kernel: a bzImage or an ELF vmlinux.
    Kernel,
    /// The initial RAM file system.
    Initramfs,
    /// The root disk.
    Disk,
}

impl Part {
    /// All of them, in the order an archive has them.
    pub const ALL: [Self; 3] = [Self::Kernel, Self::Initramfs, Self::Disk];

    /// Its file name.
    #[must_use]
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::Disk => "disk",
        }
    }
}

/// A committed template. It stays usable for what is open when it is deleted.
#[derive(Clone, Debug)]
pub struct Template {
    dir: PathBuf,
    manifest: Manifest,
}

impl Template {
    pub(crate) const fn new(dir: PathBuf, manifest: Manifest) -> Self {
        Self { dir, manifest }
    }

    /// What it is.
    #[must_use]
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The kernel, read-only.
    ///
    /// # Errors
    /// When it cannot be opened, or the template was deleted since.
    pub fn open_kernel(&self) -> Result<File> {
        self.open_part(Part::Kernel, self.manifest.kernel)
    }

    /// The initial RAM file system, read-only, where there is one.
    ///
    /// # Errors
    /// When it cannot be opened, or the template was deleted since.
    pub fn open_initramfs(&self) -> Result<Option<File>> {
        self.manifest.initramfs.map(|info| self.open_part(Part::Initramfs, info)).transpose()
    }

    /// The template's own root disk, read-only, where there is one. Sandboxes get clones of it:
    /// see [`crate::Store::create_disk`].
    ///
    /// # Errors
    /// When it cannot be opened, or the template was deleted since.
    pub fn open_disk(&self) -> Result<Option<File>> {
        self.manifest.disk.map(|info| self.open_part(Part::Disk, info)).transpose()
    }

    fn open_part(&self, part: Part, info: PartInfo) -> Result<File> {
        let path = self.dir.join(part.file_name());
        let file = open_read(&path).map_err(|error| {
            if error.kind() == io::ErrorKind::NotFound {
                return StorageError::TemplateGone {
                    name: self.manifest.name.to_string(),
                    id: self.manifest.id.clone(),
                };
            }
            StorageError::io("open", &path, error)
        })?;
        let found = file.metadata().map_err(|e| StorageError::io("look at", &path, e))?.len();
        if found != info.bytes {
            let what = format!("{found} bytes long, and not {}", info.bytes);
            return Err(StorageError::Part { part: part.file_name(), what });
        }
        Ok(file)
    }
}

/// Opens for reading; follows no symlink in the last component.
pub(crate) fn open_read(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(path)
}

/// Reads and checks the manifest in a template's directory.
pub(crate) fn read_manifest(dir: &Path) -> Result<Manifest> {
    let path = dir.join(MANIFEST_FILE);
    let file = open_read(&path).map_err(|e| StorageError::io("open", &path, e))?;
    let mut bytes = Vec::new();
    // One byte more than allowed, so that an oversized file fails its length check.
    file.take(MANIFEST_BYTES_MAX as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| StorageError::io("read", &path, e))?;
    Manifest::decode(&bytes).map_err(|source| StorageError::Manifest { path, source })
}
