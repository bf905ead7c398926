//! What running sandboxes have in the store: a disk, links to the layers they run on, a record.
//!
//! Called by shards, on threads that may block. Refuses a sandbox that is there already, and removes
//! only what the caller says that it does not know any more. Nothing here is synced unless it is
//! asked for: a sandbox does not outlive its host, only the daemon.
//!
//! ```text
//! sandboxes/<id>/disk              a reflink clone, changed by the guest
//! sandboxes/<id>/memory.<layer>    hard links: the layers stay while the sandbox runs on them
//! sandboxes/<id>/record            opaque: what the next daemon needs to take the sandbox over
//! ```

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use mica_units::SandboxId;

use crate::error::{Result, StorageError};
use crate::layer::{Layer, LayerId, LayerInfo};
use crate::snapshot::DISK_FILE;
use crate::sparse::{self, Copied};
use crate::store::{SANDBOXES_DIR, Store, chain, entries};
use crate::template::{Template, open_read};

/// The longest record of a sandbox: its environment and labels are in it, as long as a client may send.
pub const SANDBOX_RECORD_BYTES_MAX: usize = 4 << 20;

const RECORD_FILE: &str = "record";
const RECORD_NEW: &str = "record.new";

impl Store {
    /// Makes a sandbox's directory, and its disk as a clone of `disk`.
    ///
    /// # Errors
    /// [`StorageError::NoSpace`] when the disk is full, [`StorageError::SandboxExists`] when it was
    /// made before. A failure leaves nothing.
    pub fn create_sandbox(&self, sandbox: &SandboxId, disk: Option<&File>) -> Result<Option<File>> {
        let dir = self.sandbox_dir(sandbox);
        match self.disk.make_new_dir(&dir) {
            Err(error) if error.is_already_there() => {
                return Err(StorageError::SandboxExists(*sandbox));
            }
            other => other?,
        }
        let made = disk.map(|disk| self.fill_disk(disk, &dir.join(DISK_FILE))).transpose();
        if made.is_err()
            && let Err(error) = self.remove_sandbox(sandbox)
        {
            // What is told is why there is no disk; the next start sweeps what is left.
            tracing::warn!(error = %chain(&error), "an unfinished disk could not be removed");
        }
        made
    }

    /// Makes the root disk of a sandbox that boots cold: a clone of its template's.
    ///
    /// # Errors
    /// As [`Self::create_sandbox`], and [`StorageError::NoDisk`] when the template has none.
    pub fn create_disk(&self, template: &Template, sandbox: &SandboxId) -> Result<File> {
        let no_disk = || StorageError::NoDisk { name: template.manifest().name.to_string() };
        let source = template.open_disk()?.ok_or_else(no_disk)?;
        self.create_sandbox(sandbox, Some(&source))?.ok_or_else(no_disk)
    }

    fn fill_disk(&self, source: &File, path: &Path) -> Result<File> {
        let file = self.disk.create_file(path)?;
        if self.disk.clone_content(source, &file, path)? == Copied::Bytes {
            self.note_copy(path);
        }
        Ok(file)
    }

    /// The disk of a sandbox, for reading and writing, where it has one: for the next daemon.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open_sandbox_disk(&self, sandbox: &SandboxId) -> Result<Option<File>> {
        let path = self.sandbox_dir(sandbox).join(DISK_FILE);
        match File::options().read(true).write(true).open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StorageError::io("open", &path, error)),
        }
    }

    /// Puts the content of a snapshot's disk into a sandbox's disk, which stays the same file: for a
    /// rollback. The guest must be frozen.
    ///
    /// # Errors
    /// When the disks differ in length, or the file system fails. The disk is of no use then.
    pub fn reclone_disk(&self, from: &File, onto: &File) -> Result<()> {
        let path = Path::new("the sandbox's disk");
        let cloned = || -> io::Result<Copied> {
            let (new, old) = (from.metadata()?.len(), onto.metadata()?.len());
            if new != old {
                let what = format!("one is {new} bytes long and the other {old}");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
            }
            sparse::clone_over(from, onto)
        };
        match cloned().map_err(|e| StorageError::io("roll back", path, e))? {
            Copied::Bytes => self.note_copy(self.root()),
            Copied::Reflink => {}
        }
        Ok(())
    }

    /// Makes the sandbox keep `layers` beside those it has.
    ///
    /// # Errors
    /// [`StorageError::LayerGone`] when one has no name any more, as when its snapshot was flattened
    /// since it was opened: open the snapshot again then. Others when the file system fails.
    pub fn link_layers(&self, sandbox: &SandboxId, layers: &[Layer]) -> Result<()> {
        let dir = self.sandbox_dir(sandbox);
        let had = kept_layers(&dir)?;
        for layer in layers.iter().filter(|layer| !had.contains(&layer.info().id)) {
            layer.link_into(&self.disk, &dir)?;
        }
        Ok(())
    }

    /// Lets go of all layers that the sandbox keeps but `layers`. Its record must not name others by now.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn keep_only_layers(&self, sandbox: &SandboxId, layers: &[Layer]) -> Result<()> {
        let dir = self.sandbox_dir(sandbox);
        let wanted: BTreeSet<LayerId> = layers.iter().map(|layer| layer.info().id).collect();
        for id in kept_layers(&dir)?.difference(&wanted) {
            self.disk.remove_file_if_there(&dir.join(id.file_name()))?;
        }
        Ok(())
    }

    /// Makes `layers` the layers that the sandbox keeps, and lets go of all others it had.
    ///
    /// # Errors
    /// As [`Store::link_layers`].
    pub fn link_lineage(&self, sandbox: &SandboxId, layers: &[Layer]) -> Result<()> {
        self.link_layers(sandbox, layers)?;
        self.keep_only_layers(sandbox, layers)
    }

    /// Opens layers that a sandbox keeps: for the next daemon, which has their descriptions from the
    /// sandbox's record.
    ///
    /// # Errors
    /// When one is not there, or damaged.
    pub fn open_lineage(&self, sandbox: &SandboxId, infos: &[LayerInfo]) -> Result<Vec<Layer>> {
        let dir = self.sandbox_dir(sandbox);
        infos.iter().map(|info| Layer::open_in(&dir, info)).collect()
    }

    /// Replaces a sandbox's record, at once and whole. With `durable` it outlives a power cut.
    ///
    /// # Errors
    /// When it is longer than [`SANDBOX_RECORD_BYTES_MAX`], or the file system fails; the old one stays then.
    pub fn write_record(&self, sandbox: &SandboxId, record: &[u8], durable: bool) -> Result<()> {
        if record.len() > SANDBOX_RECORD_BYTES_MAX {
            let what = format!("longer than {SANDBOX_RECORD_BYTES_MAX} bytes");
            let source = crate::manifest::field("record", what);
            return Err(StorageError::Describe { source });
        }
        let dir = self.sandbox_dir(sandbox);
        let temporary = dir.join(RECORD_NEW);
        self.disk.remove_file_if_there(&temporary)?;
        let file = self.disk.write_new(&temporary, record)?;
        if !durable {
            return self.disk.rename(&temporary, &dir.join(RECORD_FILE));
        }
        self.disk.sync_file(&temporary, &file)?;
        self.disk.replace(&dir, &temporary, &dir.join(RECORD_FILE))?;
        self.disk.sync_dir(&self.root().join(SANDBOXES_DIR))
    }

    /// Every sandbox that has a record, with it: for the next daemon's start.
    ///
    /// # Errors
    /// When the directory or a record cannot be read.
    pub fn records(&self) -> Result<Vec<(SandboxId, Vec<u8>)>> {
        let dir = self.root().join(SANDBOXES_DIR);
        let mut records = Vec::new();
        for sandbox in entries(&dir)?.iter().filter_map(|name| name.parse::<SandboxId>().ok()) {
            let path = self.sandbox_dir(&sandbox).join(RECORD_FILE);
            let file = match open_read(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(StorageError::io("open", &path, error)),
            };
            let mut bytes = Vec::new();
            file.take(SANDBOX_RECORD_BYTES_MAX as u64)
                .read_to_end(&mut bytes)
                .map_err(|e| StorageError::io("read", &path, e))?;
            records.push((sandbox, bytes));
        }
        Ok(records)
    }

    /// Removes all a sandbox has in the store. Not an error when it has nothing.
    ///
    /// # Errors
    /// When something could not be removed.
    pub fn remove_sandbox(&self, sandbox: &SandboxId) -> Result<()> {
        self.disk.remove_tree(&self.sandbox_dir(sandbox))
    }

    /// Removes what sandboxes of an earlier run left, but for those that were taken over; says how
    /// many. For the daemon's start, before it makes sandboxes.
    ///
    /// # Errors
    /// When something could not be removed.
    pub fn sweep_sandboxes_but(&self, adopted: &BTreeSet<SandboxId>) -> Result<usize> {
        let dir = self.root().join(SANDBOXES_DIR);
        let mut removed = 0;
        for name in entries(&dir)? {
            if !name.parse().is_ok_and(|id: SandboxId| adopted.contains(&id)) {
                self.disk.remove_tree(&dir.join(&name))?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// As [`Self::sweep_sandboxes_but`], where none was taken over.
    ///
    /// # Errors
    /// When something could not be removed.
    pub fn sweep_sandboxes(&self) -> Result<usize> {
        self.sweep_sandboxes_but(&BTreeSet::new())
    }

    pub(crate) fn sandbox_dir(&self, sandbox: &SandboxId) -> PathBuf {
        self.root().join(SANDBOXES_DIR).join(sandbox.as_str())
    }
}

/// The layers that a directory keeps.
fn kept_layers(dir: &Path) -> Result<BTreeSet<LayerId>> {
    Ok(entries(dir)?.iter().filter_map(|entry| LayerId::from_file_name(entry)).collect())
}

#[cfg(test)]
mod tests;
