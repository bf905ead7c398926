//! Layers: immutable files that hold frames of a guest's memory.
//!
//! Called by `snapshot`, `flatten` and by shards, which map layers over one another. Refuses a file
//! that is not exactly what the writer made: length, magic, version, id, counts and two checksums
//! are checked when it is opened. The pages themselves are not read then, since a restore maps
//! them; [`Layer::verify`] reads them all.
//!
//! A layer never changes after it was made, and one inode serves every guest that maps it, so all of
//! them share its page cache. Directories refer to it by hard links: its link count is its
//! reference count. See `layer/format.rs` for the bytes and `layer/table.rs` for the arithmetic.

mod format;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use mica_units::PAGE_BYTES;
use rkyv::{Archive, Deserialize, Serialize};

pub use table::{Extent, Piece, RUNS_MAX, RunTable, coalesce, groups, merge, restrict};

pub(crate) use format::{FOOTER_BYTES, Footer, data_pages_max, tail};

use crate::crashsafe::Disk;
use crate::error::{Result, StorageError};
use crate::id;
use crate::template::open_read;

/// Pages under one checksum: 64 KiB.
pub const CHUNK_PAGES: u32 = 16;
/// Bytes under one checksum.
pub const CHUNK_BYTES: usize = CHUNK_PAGES as usize * PAGE;
/// Bytes of a page, as a length in memory.
#[expect(clippy::cast_possible_truncation, reason = "4096 fits every usize")]
pub(crate) const PAGE: usize = PAGE_BYTES as usize;
/// A gap of up to this many clean frames between dirty ones is written too: one run of 64 KiB costs
/// less than two.
pub const COALESCE_GAP: u32 = 15;
/// Times that a writer may be given frames again that it has: what a guest changed while it was copied.
pub const ROUNDS_MAX: u32 = 4;
/// Most layers of one guest's memory. The frames between a shard and a VM process have the same
/// bound.
pub const LAYERS_MAX: usize = 16;

/// Why a file is not a layer, or not the one it should be.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// Not a layer at all.
    #[error("it does not end with the magic of a layer")]
    Magic,
    /// Another program version wrote it.
    #[error("it has format version {0}, this program reads version 1")]
    Version(u32),
    /// Another layer, or not as it is described.
    #[error("its `{field}` is {got}, and should be {expected}")]
    Mismatch {
        /// What differs.
        field: &'static str,
        /// What the file has.
        got: String,
        /// What it should be.
        expected: String,
    },
    /// The bytes changed after they were written.
    #[error("the checksum of its {0} does not match: the bytes changed after they were written")]
    Checksum(&'static str),
    /// The pages of one chunk changed after they were written.
    #[error(
        "the checksum of its pages {0} to {1} does not match: they changed after being written"
    )]
    Pages(u32, u32),
    /// A run table that no writer makes.
    #[error("its run table is not valid: {0}")]
    Runs(&'static str),
}

/// The name of one layer: 20 random characters of `0-9a-z`.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId([u8; id::CHARS]);

impl LayerId {
    /// Draws a new one.
    ///
    /// # Errors
    /// When the kernel has no randomness to give.
    pub(crate) fn random() -> io::Result<Self> {
        id::random().map(Self)
    }

    pub(crate) const fn as_bytes(&self) -> &[u8; id::CHARS] {
        &self.0
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    /// The name of its file, in whatever directory.
    #[must_use]
    pub(crate) fn file_name(&self) -> String {
        format!("{FILE_PREFIX}{}", self.as_str())
    }

    /// The layer whose file has this name.
    pub(crate) fn from_file_name(name: &str) -> Option<Self> {
        name.strip_prefix(FILE_PREFIX)?.parse().ok()
    }
}

const FILE_PREFIX: &str = "memory.";

/// Text that is not the id of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a layer id is 20 characters of 0-9 and a-z")]
pub struct LayerIdError;

impl FromStr for LayerId {
    type Err = LayerIdError;

    fn from_str(text: &str) -> std::result::Result<Self, LayerIdError> {
        if !id::is_id(text) {
            return Err(LayerIdError);
        }
        text.as_bytes().try_into().map(Self).map_err(|_| LayerIdError)
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a layer holds its frames.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// Frame `n` is page `n` of the file, and zeros are holes: a base image, one mapping.
    Flat,
    /// Only some frames, one after the other: what a guest changed.
    Packed,
}

/// What a layer is, as manifests keep it.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerInfo {
    /// Its name.
    pub id: LayerId,
    /// How it holds its frames.
    pub kind: LayerKind,
    /// Frames that were written to it; those of a flat layer that are not zero.
    pub frames_held: u32,
    /// Length of the file.
    pub file_bytes: u64,
}

/// A layer, open and checked. Cheap to clone; every clone is the same open file.
#[derive(Clone, Debug)]
pub struct Layer {
    info: LayerInfo,
    frames: u32,
    file: Arc<File>,
    table: Arc<RunTable>,
    checksums: Arc<[u32]>,
}

/// A layer that was just written, as its writer knows it.
#[derive(Clone, Debug)]
pub struct Written {
    pub(crate) info: LayerInfo,
    pub(crate) frames: u32,
    pub(crate) table: RunTable,
    pub(crate) checksums: Vec<u32>,
}

impl Written {
    /// What it is.
    #[must_use]
    pub const fn info(&self) -> &LayerInfo {
        &self.info
    }
}

impl Layer {
    /// Opens a layer in `dir` whose tables need not be read, because its writer has them.
    ///
    /// # Errors
    /// When it cannot be opened, or has another length.
    pub(crate) fn open_written(dir: &Path, written: Written) -> Result<Self> {
        let Written { info, frames, table, checksums } = written;
        let path = dir.join(info.id.file_name());
        let file = open_read(&path).map_err(|e| StorageError::io("open", &path, e))?;
        let found = file.metadata().map_err(|e| StorageError::io("look at", &path, e))?.len();
        if found != info.file_bytes {
            let source = format::mismatch("length", found, info.file_bytes);
            return Err(StorageError::Layer { path, source });
        }
        let (file, table) = (Arc::new(file), Arc::new(table));
        Ok(Self { info, frames, file, table, checksums: checksums.into() })
    }

    /// Opens the layer in `dir` that `info` describes.
    ///
    /// # Errors
    /// [`StorageError::Layer`] when the file is not that layer, or is damaged.
    pub(crate) fn open_in(dir: &Path, info: &LayerInfo) -> Result<Self> {
        let path = dir.join(info.id.file_name());
        let file = open_read(&path).map_err(|e| StorageError::io("open", &path, e))?;
        Self::from_file(file, info, &path)
    }

    /// Checks an open file. `path` is for messages alone.
    ///
    /// # Errors
    /// As [`Self::open_in`].
    pub(crate) fn from_file(file: File, info: &LayerInfo, path: &Path) -> Result<Self> {
        let found = file.metadata().map_err(|e| StorageError::io("look at", path, e))?.len();
        let refuse = |source| StorageError::Layer { path: path.to_path_buf(), source };
        if found != info.file_bytes || found < FOOTER_BYTES {
            return Err(refuse(format::mismatch("length", found, info.file_bytes)));
        }
        let read = |len: u64, offset: u64| {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, offset)
                .map_err(|e| StorageError::io("read", path, e))?;
            Ok(bytes)
        };
        let footer = read(FOOTER_BYTES, found - FOOTER_BYTES)?;
        let footer = Footer::decode(&footer).map_err(refuse)?;
        footer.check(info).map_err(refuse)?;
        let tables = read(footer.tables_bytes(), footer.data_bytes())?;
        let (table, checksums) = footer.decode_tables(&tables).map_err(refuse)?;
        Ok(Self {
            info: *info,
            frames: footer.frames,
            file: Arc::new(file),
            table: Arc::new(table),
            checksums: checksums.into(),
        })
    }

    /// What it is.
    #[must_use]
    pub const fn info(&self) -> &LayerInfo {
        &self.info
    }

    /// Frames of the guest that it is for.
    #[must_use]
    pub const fn frames(&self) -> u32 {
        self.frames
    }

    /// The file, open for reading. Page `n` of it starts at byte `n * 4096`.
    #[must_use]
    pub const fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Which frames it holds, and at which pages of the file.
    #[must_use]
    pub const fn table(&self) -> &Arc<RunTable> {
        &self.table
    }

    /// Length of the pages, which are the start of the file.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        u64::from(self.table.data_pages()) * PAGE_BYTES
    }

    /// Whether `bytes`, read from `offset` on, are what was written. Both are whole chunks of
    /// [`CHUNK_BYTES`], but for the end of the pages; anything else is not.
    #[must_use]
    pub fn is_intact(&self, offset: u64, bytes: &[u8]) -> bool {
        let Ok(first) = usize::try_from(offset / CHUNK_BYTES as u64) else { return false };
        let end = offset + bytes.len() as u64;
        let whole = offset.is_multiple_of(CHUNK_BYTES as u64)
            && (end.is_multiple_of(CHUNK_BYTES as u64) || end == self.data_bytes());
        let chunks = bytes.chunks(CHUNK_BYTES);
        let expected = self.checksums.get(first..).unwrap_or_default();
        whole
            && chunks.len() <= expected.len()
            && chunks.zip(expected).all(|(chunk, crc)| crc32c::crc32c(chunk) == *crc)
    }

    /// Gives it one more name, in `dir`.
    ///
    /// # Errors
    /// [`StorageError::LayerGone`] when it has no name any more.
    pub(crate) fn link_into(&self, disk: &Disk, dir: &Path) -> Result<()> {
        let id = self.info.id;
        match disk.link_file(&self.file, &dir.join(id.file_name())) {
            Err(error) if error.is_not_found() => match self.file.metadata() {
                Ok(metadata) if metadata.nlink() == 0 => Err(StorageError::LayerGone { id }),
                _ => Err(error),
            },
            other => other,
        }
    }

    /// Reads every page and compares it with its checksum.
    ///
    /// # Errors
    /// [`StorageError::Layer`] with the first pages that changed.
    pub fn verify(&self) -> Result<()> {
        let path = std::path::PathBuf::from(self.info.id.file_name());
        let pages = self.table.data_pages();
        let mut buffer = vec![0; CHUNK_BYTES];
        for (index, expected) in self.checksums.iter().enumerate() {
            let first = u32::try_from(index).unwrap_or(u32::MAX).saturating_mul(CHUNK_PAGES);
            let end = pages.min(first.saturating_add(CHUNK_PAGES));
            let bytes = &mut buffer[..(end - first) as usize * PAGE];
            self.file
                .read_exact_at(bytes, u64::from(first) * PAGE_BYTES)
                .map_err(|e| StorageError::io("read", &path, e))?;
            if crc32c::crc32c(bytes) != *expected {
                return Err(StorageError::Layer { path, source: LayerError::Pages(first, end) });
            }
        }
        Ok(())
    }
}
