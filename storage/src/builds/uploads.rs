//! Files that clients upload for the COPY steps of their builds.
//!
//! Called by the API through [`BuildStore`]. A file is kept under the name that the client gave to its
//! content, for its tenant alone: whoever names it wrongly harms only themselves. Refuses names that could
//! be paths, more links than [`LINKS_MAX`], and more bytes of a tenant's than it may keep: the files that
//! were not used for longest go first.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use mica_units::TenantId;

use super::{
    BuildStore, BuildStoreError, NEW_PREFIX, UploadGrant, age_ms, encoded, names, now_unix_ms,
    random_hex, read,
};
use crate::error::{Result, StorageError};
use crate::store::entries;
use crate::template::open_read;

/// Links that may be open at one time, of all tenants together.
const LINKS_MAX: usize = 4096;
/// Those of one tenant.
const TENANT_LINKS_MAX: usize = 512;
/// How long a link works.
const LINK_MS_MAX: u64 = 3600 * 1000;
/// A file that was not used for so long goes at the next start.
const UNUSED_MS_MAX: u64 = 7 * 24 * 3600 * 1000;
const HASH_CHARS_MAX: usize = 128;
const TOKEN_BYTES: usize = 32;

/// A file that is being uploaded. Dropped before its end, it is removed.
#[derive(Debug)]
pub struct Upload {
    builds: BuildStore,
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    written: u64,
    done: bool,
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = self.builds.store.disk.remove_file_if_there(&self.temporary)
        {
            tracing::warn!(%error, "the next start removes an upload that was cut off");
        }
    }
}

impl Upload {
    /// Adds bytes.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.builds.store.disk.write_at(&self.temporary, &self.file, bytes, self.written)?;
        self.written += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        Ok(())
    }

    /// Makes it durable, and puts it in place.
    ///
    /// # Errors
    /// When that fails; nothing of it is left then.
    pub fn finish(mut self) -> Result<()> {
        let disk = &self.builds.store.disk;
        disk.sync_file(&self.temporary, &self.file)?;
        let dir = self.target.parent().unwrap_or(Path::new("/"));
        disk.replace(dir, &self.temporary, &self.target)?;
        self.done = true;
        Ok(())
    }
}

impl BuildStore {
    /// Whether this can be the name of an uploaded content.
    #[must_use]
    pub fn is_hash(text: &str) -> bool {
        matches!(text.len(), 1..=HASH_CHARS_MAX) && text.bytes().all(|b| b.is_ascii_alphanumeric())
    }

    /// Whether a tenant has uploaded this content. It then counts as used now.
    ///
    /// # Errors
    /// When its file cannot be touched.
    pub fn has_upload(&self, tenant: &TenantId, hash: &str) -> Result<bool> {
        let Some((file, path)) = self.find_upload(tenant, hash)? else { return Ok(false) };
        file.set_modified(SystemTime::now())
            .map_err(|error| StorageError::io("touch", &path, error))?;
        Ok(true)
    }

    /// Opens what a tenant uploaded, with its length.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open_upload(&self, tenant: &TenantId, hash: &str) -> Result<Option<(File, u64)>> {
        let Some((file, path)) = self.find_upload(tenant, hash)? else { return Ok(None) };
        let length = file.metadata().map_err(|e| StorageError::io("look at", &path, e))?.len();
        Ok(Some((file, length)))
    }

    /// Makes a link for one upload: a token that nobody can guess.
    ///
    /// # Errors
    /// [`BuildStoreError::TooMany`]; when it cannot be written.
    pub fn grant_upload(
        &self,
        tenant: &TenantId,
        hash: &str,
    ) -> std::result::Result<String, BuildStoreError> {
        let dir = self.dir("links")?;
        // A tenant's links begin alike, so that they can be counted without being read.
        let mark = format!("{:08x}", crc32c::crc32c(tenant.as_str().as_bytes()));
        let is_full = || -> Result<bool> {
            let links = names(&dir)?;
            let own = links.iter().filter(|link| link.starts_with(&mark)).count();
            Ok(links.len() >= LINKS_MAX || own >= TENANT_LINKS_MAX)
        };
        if is_full()? {
            self.remove_old_links(&dir)?;
            if is_full()? {
                let text =
                    "too many uploads are on their way; try again in some minutes".to_owned();
                return Err(BuildStoreError::TooMany(text));
            }
        }
        let mut token = random_hex::<TOKEN_BYTES>()?;
        token.replace_range(..mark.len(), &mark);
        let (tenant, hash) = (tenant.as_str().to_owned(), hash.to_owned());
        let grant = UploadGrant { tenant, hash, created_unix_ms: now_unix_ms() };
        self.put(&dir, &token, &encoded(grant.encode())?)?;
        Ok(token)
    }

    /// What a link allows, while it works.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn grant_of(&self, token: &str) -> Result<Option<UploadGrant>> {
        let in_form = token.len() == 2 * TOKEN_BYTES
            && token.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !in_form {
            return Ok(None);
        }
        let grant = read(&self.store.root().join("builds/links").join(token), UploadGrant::decode)?;
        let since = |grant: &UploadGrant| now_unix_ms().saturating_sub(grant.created_unix_ms);
        Ok(grant.filter(|grant| since(grant) < LINK_MS_MAX))
    }

    /// Begins to take a file of so many bytes, for which older ones go where a tenant's would be more than
    /// `tenant_bytes_max`.
    ///
    /// # Errors
    /// When there is no room, or it cannot be written.
    pub fn begin_upload(
        &self,
        grant: &UploadGrant,
        bytes: u64,
        tenant_bytes_max: u64,
    ) -> std::result::Result<Upload, BuildStoreError> {
        let dir = self.dir(&format!("uploads/{}", grant.tenant))?;
        // Measured and taken as one: else all that come at once find the same room.
        let _held = self.lock()?;
        self.make_room_for(&dir, bytes, tenant_bytes_max)?;
        let temporary = dir.join(format!("{NEW_PREFIX}{}", random_hex::<8>()?));
        let file = self.store.disk.create_file(&temporary)?;
        // So that it counts with its whole length from the start.
        self.store.disk.set_len(&temporary, &file, bytes)?;
        let target = dir.join(&grant.hash);
        let builds = self.clone();
        Ok(Upload { builds, file, temporary, target, written: 0, done: false })
    }

    /// Takes a link away that was used.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn end_grant(&self, token: &str) -> Result<()> {
        let path = self.store.root().join("builds/links").join(token);
        self.store.disk.remove_file_if_there(&path)
    }

    fn find_upload(&self, tenant: &TenantId, hash: &str) -> Result<Option<(File, PathBuf)>> {
        if !Self::is_hash(hash) {
            return Ok(None);
        }
        let path = self.store.root().join("builds/uploads").join(tenant.as_str()).join(hash);
        match open_read(&path) {
            Ok(file) => Ok(Some((file, path))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StorageError::io("open", &path, error)),
        }
    }

    /// Removes the files that were not used for longest until `bytes` more fit. Uploads that are on their
    /// way count, and stay.
    fn make_room_for(
        &self,
        dir: &Path,
        bytes: u64,
        bytes_max: u64,
    ) -> std::result::Result<(), BuildStoreError> {
        let (mut kept, mut total) = (Vec::new(), bytes);
        let too_many = || {
            let text = format!(
                "a tenant's uploads take at most {bytes_max} bytes together; copy less, or wait for \
                 other uploads to end"
            );
            BuildStoreError::TooMany(text)
        };
        if bytes > bytes_max {
            return Err(too_many());
        }
        for name in entries(dir)? {
            let path = dir.join(&name);
            // It may have gone meanwhile.
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            total = total.saturating_add(metadata.len());
            if !name.starts_with('.') {
                kept.push((age_ms(&metadata), metadata.len(), path));
            }
        }
        kept.sort_by_key(|(age, ..)| *age);
        while total > bytes_max {
            let (_, freed, path) = kept.pop().ok_or_else(too_many)?;
            self.store.disk.remove_file_if_there(&path)?;
            total = total.saturating_sub(freed);
        }
        Ok(())
    }

    /// Removes links that do not work any more; how many are left.
    fn remove_old_links(&self, dir: &Path) -> Result<usize> {
        let mut left = 0;
        for name in names(dir)? {
            let path = dir.join(name);
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            if age_ms(&metadata) < LINK_MS_MAX {
                left += 1;
            } else {
                self.store.disk.remove_file_if_there(&path)?;
            }
        }
        Ok(left)
    }

    /// Removes, at a start, uploads that were cut off, links, and files that nobody used for long.
    pub(super) fn remove_stale_uploads(&self) -> Result<()> {
        let root = self.store.root().join("builds");
        self.store.disk.remove_tree(&root.join("links"))?;
        for tenant in names(&root.join("uploads"))? {
            let dir = root.join("uploads").join(tenant);
            for name in entries(&dir)? {
                let path = dir.join(&name);
                let unused = fs::symlink_metadata(&path).is_ok_and(|m| age_ms(&m) > UNUSED_MS_MAX);
                if unused || name.starts_with('.') {
                    self.store.disk.remove_file_if_there(&path)?;
                }
            }
        }
        Ok(())
    }
}
