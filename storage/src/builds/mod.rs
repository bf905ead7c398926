//! What lasts of templates that clients build: the templates, their builds, and files uploaded for them.
//!
//! Called by `shards` for the API, on threads that may block, and by the start of the daemon. Any number of
//! shards use it at once: what changes in several steps is changed under one lock file. Refuses to look into
//! an uploaded file: it is the guest's to unpack.
//!
//! ```text
//! builds/templates/<template id>       a name of a tenant's, its tags and the snapshots they stand for
//! builds/tenants/<tenant>/<template id>  which templates are a tenant's: empty, and made again by each start
//! builds/histories/<tenant>/<build id>   the same of builds
//! builds/runs/<build id>/state         how far a build is
//! builds/runs/<build id>/log           its log, whose form the API knows
//! builds/uploads/<tenant>/<hash>       files for COPY, as they were uploaded
//! builds/links/<token>                 who may upload what
//! builds/slots/<tenant>.<n>            flock: held by a build that runs
//! builds/lock                          flock: held while templates change
//! ```
//!
//! A file here is replaced as a whole: written beside, synced, renamed, the directory synced. A snapshot of
//! the kind `Built` lives as long as a template names it; the next start removes one that none does.

mod format;
mod index;
mod runs;
mod templates;
#[cfg(test)]
mod tests;
mod uploads;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use mica_units::TenantId;
use rustix::fs::FlockOperation;

use format::SEALED_BYTES_MAX;
pub use format::{
    BuildPhase, BuildRecord, Built, BuiltDefaults, BuiltTag, BuiltTemplate, UploadGrant,
};
pub use runs::BUILD_LOG_BYTES_MAX;
pub use templates::{DEFAULT_TAG, Reference};
pub use uploads::Upload;

use crate::error::{Result, StorageError};
use crate::manifest::ManifestError;
use crate::store::{Store, entries};
use crate::template::open_read;

const DIR: &str = "builds";
const LOCK: &str = "builds/lock";
/// What is being written has a name with this in front.
const NEW_PREFIX: &str = ".new-";

/// Why something of a build cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum BuildStoreError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StorageError),
    /// A bound was reached.
    #[error("{0}")]
    TooMany(String),
    /// A name is that of something else.
    #[error("{0}")]
    NameTaken(String),
}

/// The part of a store that builds use. Cheap to clone.
#[derive(Clone, Debug)]
pub struct BuildStore {
    store: Store,
}

/// The right to run one build. Given back when dropped, and when the process ends.
#[derive(Debug)]
pub struct BuildSlot {
    _held: File,
}

impl Store {
    /// What builds of clients use of it.
    #[must_use]
    pub fn builds(&self) -> BuildStore {
        BuildStore { store: self.clone() }
    }
}

impl BuildStore {
    /// Whether this can be the id of a build.
    #[must_use]
    pub fn is_run_id(text: &str) -> bool {
        runs::is_uuid(text)
    }

    /// One of the `most` builds that a tenant may run at once. `None` while all of them run.
    ///
    /// # Errors
    /// When the lock files cannot be used.
    pub fn take_slot(&self, tenant: &TenantId, most: usize) -> Result<Option<BuildSlot>> {
        self.dir("slots")?;
        for number in 0..most {
            let name = format!("{DIR}/slots/{tenant}.{number}");
            let held = self.store.flock(&name, FlockOperation::NonBlockingLockExclusive)?;
            if let Some(held) = held {
                return Ok(Some(BuildSlot { _held: held }));
            }
        }
        Ok(None)
    }

    /// Puts in order what an earlier daemon left: builds that ran are over, and what they were writing goes.
    /// Gives the snapshots that templates name; `None` when that cannot be told, and then all stay.
    ///
    /// # Errors
    /// When the directory cannot be read or written.
    pub fn recover(&self) -> Result<Option<BTreeSet<String>>> {
        if !self.store.root().join(DIR).is_dir() {
            return Ok(Some(BTreeSet::new()));
        }
        self.end_interrupted()?;
        self.remove_stale_uploads()?;
        self.named_snapshots()
    }

    /// A directory below `builds`, made when it is not there.
    fn dir(&self, name: &str) -> Result<PathBuf> {
        let mut path = self.store.root().join(DIR);
        self.make(&path)?;
        for part in name.split('/') {
            path = path.join(part);
            self.make(&path)?;
        }
        Ok(path)
    }

    /// Two shards may come to it at once.
    fn make(&self, path: &Path) -> Result<()> {
        match self.store.disk.make_dir(path) {
            Err(error) if error.is_already_there() => Ok(()),
            other => other,
        }
    }

    /// Alone with the templates.
    fn lock(&self) -> Result<File> {
        self.dir("templates")?;
        let held = self.store.flock(LOCK, FlockOperation::LockExclusive)?;
        let path = self.store.root().join(LOCK);
        held.ok_or_else(|| StorageError::io("lock", &path, io::ErrorKind::WouldBlock.into()))
    }

    /// Puts a whole file in place of what has this name.
    fn put(&self, dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
        let disk = &self.store.disk;
        let temporary = dir.join(format!("{NEW_PREFIX}{name}"));
        disk.remove_file_if_there(&temporary)?;
        disk.write_file(&temporary, bytes)?;
        disk.replace(dir, &temporary, &dir.join(name))
    }
}

/// Reads one of these files. `None` when it is not there.
fn read<T>(
    path: &Path,
    decode: impl FnOnce(&[u8]) -> std::result::Result<T, ManifestError>,
) -> Result<Option<T>> {
    let failed = |error: io::Error| StorageError::io("read", path, error);
    let file = match open_read(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(SEALED_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    let read = decode(&bytes)
        .map_err(|source| StorageError::Manifest { path: path.to_path_buf(), source })?;
    Ok(Some(read))
}

fn encoded(bytes: std::result::Result<Vec<u8>, ManifestError>) -> Result<Vec<u8>> {
    bytes.map_err(|source| StorageError::Describe { source })
}

/// The names in a directory that may not be there, without those that are being written.
fn names(dir: &Path) -> Result<Vec<String>> {
    match entries(dir) {
        Ok(mut names) => {
            names.retain(|name| !name.starts_with('.'));
            Ok(names)
        }
        Err(error) if error.is_not_found() => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Milliseconds since 1970.
fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds since a file was last written or touched; 0 for the future.
fn age_ms(metadata: &fs::Metadata) -> u64 {
    let age = metadata.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
    age.map_or(0, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}

/// Bytes that nobody can guess, as hexadecimal digits.
fn random_hex<const BYTES: usize>() -> Result<String> {
    let mut random = [0u8; BYTES];
    let failed = |error| StorageError::io("draw", Path::new("random bytes"), error);
    let got = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| failed(errno.into()))?;
    if got != BYTES {
        return Err(failed(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}
