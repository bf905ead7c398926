//! What can go wrong in the store, in words that say what to change.
//!
//! Called by every module of this crate. Refuses to swallow a cause: the system's error is kept as
//! the source, and the message adds the operation and the path.

use std::io;
use std::path::{Path, PathBuf};

use mica_units::SandboxId;

use crate::layer::{LayerError, LayerId};
use crate::manifest::ManifestError;

/// The result of a store operation.
pub type Result<T> = std::result::Result<T, StorageError>;

/// Why a store operation failed.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The directory holds something else.
    #[error(
        "{} is not empty and is not a Mica store (it has no valid `mica-store` file); give an \
         empty or a new directory", root.display()
    )]
    Foreign {
        /// The directory.
        root: PathBuf,
    },
    /// A store of another version.
    #[error("{} is a Mica store of version {found:?}; this program reads version {expected:?}",
        root.display())]
    Version {
        /// The directory.
        root: PathBuf,
        /// The first line of its marker file.
        found: String,
        /// The first line this program writes.
        expected: String,
    },
    /// No space is left for the file.
    #[error("no space left while trying to {operation} {}; free some space or enlarge the file \
         system", path.display())]
    NoSpace {
        /// What was being done.
        operation: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A system call failed.
    #[error("could not {operation} {}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A manifest failed a check.
    #[error("the manifest {} is damaged; delete the template and build it again", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Which check.
        #[source]
        source: ManifestError,
    },
    /// A manifest to be written failed a check.
    #[error("the template cannot be described by a manifest")]
    Describe {
        /// Which check.
        #[source]
        source: ManifestError,
    },
    /// A layer failed a check.
    #[error("the memory layer {} cannot be used", path.display())]
    Layer {
        /// The file.
        path: PathBuf,
        /// Which check.
        #[source]
        source: LayerError,
    },
    /// A template of this name is there already.
    #[error("a template named `{name}` exists; delete it first or ask for it to be replaced")]
    TemplateExists {
        /// Its name.
        name: String,
    },
    /// The template was deleted, or replaced, since it was looked up.
    #[error("template `{name}` ({id}) was deleted or replaced; look it up again")]
    TemplateGone {
        /// Its name.
        name: String,
        /// Its id.
        id: String,
    },
    /// A snapshot of this id is there already.
    #[error("snapshot {id} exists already, or is being made")]
    SnapshotExists {
        /// Its id.
        id: String,
    },
    /// The snapshot was deleted, or its layers were replaced, since it was looked up.
    #[error("snapshot {id} was deleted or changed; look it up again")]
    SnapshotGone {
        /// Its id.
        id: String,
    },
    /// A layer that is open has lost its last name: what it was opened from was deleted or flattened.
    #[error("layer {id} is not kept by anything any more; open its snapshot again")]
    LayerGone {
        /// The layer.
        id: LayerId,
    },
    /// The template has no root disk to clone.
    #[error("template `{name}` has no disk, so a sandbox of it has none either")]
    NoDisk {
        /// Its name.
        name: String,
    },
    /// The sandbox has a disk already.
    #[error("sandbox {0} has a disk already; a disk is made once")]
    SandboxExists(SandboxId),
    /// A file of a template is not what its manifest says.
    #[error(
        "file `{part}` is not what the manifest says ({what}); build or import the template \
         again"
    )]
    Part {
        /// Which file.
        part: &'static str,
        /// What differs.
        what: String,
    },
    /// An archive is not a template archive.
    #[error("this is not a whole template archive: {0}")]
    Archive(String),
}

impl StorageError {
    /// Wraps a system error, telling "disk full" apart from the rest.
    pub(crate) fn io(operation: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { operation, path, source }
            }
            _ => Self::Io { operation, path, source },
        }
    }

    /// Whether the cause is a name that is taken.
    pub(crate) fn is_already_there(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists)
    }

    /// Whether the cause is a file that is not there.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}
