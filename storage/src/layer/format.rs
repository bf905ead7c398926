//! The bytes of a layer file.
//!
//! Called by `layer` when one is opened and by `writer` when one is made. Refuses what no writer
//! makes. The tables stand at the end because they are known last: the file is written from front
//! to back, once, in whole pages, so that it can be written with `O_DIRECT`.
//!
//! ```text
//!  ┌──────────────────────────┬───────────────────────┬─────────────────────┬─────┬──────────────┐
//!  │ pages, 4 KiB each        │ run table             │ CRC32C of each      │  0  │ footer,      │
//!  │ (flat: frame n at page n)│ 16 bytes for each run │ 64 KiB of the pages │ pad │ 4 KiB        │
//!  └──────────────────────────┴───────────────────────┴─────────────────────┴─────┴──────────────┘
//!  run     first frame, frames, page, 0                              u32 little endian each
//!  footer  magic, version, kind, layer id (20 bytes), frames of the guest, frames held, pages,
//!          runs, CRC of the tables with their padding, CRC of the footer before it, zeros
//! ```

use mica_units::{FRAMES_MAX, FrameRun, PAGE_BYTES};

use super::table::{Extent, RUNS_MAX, RunTable};
use super::{CHUNK_PAGES, LayerError, LayerId, LayerInfo, LayerKind, PAGE};

pub(crate) const FOOTER_BYTES: u64 = PAGE_BYTES;
const MAGIC: &[u8; 8] = b"MICALAYR";
const VERSION: u32 = 1;
const RUN_BYTES: usize = 16;
const FLAT: u32 = 1;
const PACKED: u32 = 2;

const AT_VERSION: usize = 8;
const AT_KIND: usize = 12;
const AT_ID: usize = 16;
const AT_FRAMES: usize = 36;
const AT_HELD: usize = 40;
const AT_PAGES: usize = 44;
const AT_RUNS: usize = 48;
const AT_TABLES_CRC: usize = 52;
const AT_CRC: usize = 56;
const USED_BYTES: usize = 60;

// Tripwires: when one of these fails, the stored format has changed. Raise VERSION, keep reading
// the old one, and add a golden file; do not edit the numbers.
const _: () = assert!(MAGIC.len() == AT_VERSION);
const _: () = assert!(AT_ID + size_of::<LayerId>() == AT_FRAMES);
const _: () = assert!(AT_CRC + 4 == USED_BYTES && USED_BYTES < 4096);
const _: () = assert!(CHUNK_PAGES == 16 && PAGE_BYTES == 4096);

/// What the last page of a layer file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) kind: LayerKind,
    pub(crate) id: LayerId,
    /// Frames of the guest that it is for.
    pub(crate) frames: u32,
    pub(crate) frames_held: u32,
    pub(crate) data_pages: u32,
    pub(crate) runs: u32,
    pub(crate) tables_crc: u32,
}

/// The tables, their padding and the footer: all that follows the pages. `footer` need have no
/// counts of the tables yet.
pub(crate) fn tail(mut footer: Footer, table: &RunTable, checksums: &[u32]) -> (Footer, Vec<u8>) {
    let extents = table.extents();
    let mut bytes = Vec::with_capacity(extents.len() * RUN_BYTES + checksums.len() * 4 + 8192);
    for extent in extents {
        for word in [extent.run.first(), extent.run.count(), extent.page, 0] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    for checksum in checksums {
        bytes.extend_from_slice(&checksum.to_le_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(PAGE), 0);
    footer.data_pages = table.data_pages();
    footer.runs = u32::try_from(extents.len()).unwrap_or(u32::MAX);
    footer.tables_crc = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&footer.encode());
    (footer, bytes)
}

/// Most pages of data of a guest with so many frames: each frame as often as there are rounds.
pub(crate) const fn data_pages_max(frames: u32) -> u32 {
    frames.saturating_mul(super::ROUNDS_MAX + 1)
}

impl Footer {
    pub(crate) const fn data_bytes(&self) -> u64 {
        self.data_pages as u64 * PAGE_BYTES
    }

    const fn chunks(&self) -> u64 {
        (self.data_pages as u64).div_ceil(CHUNK_PAGES as u64)
    }

    /// Bytes of the tables with their padding.
    pub(crate) const fn tables_bytes(&self) -> u64 {
        (self.runs as u64 * RUN_BYTES as u64 + self.chunks() * 4).next_multiple_of(PAGE_BYTES)
    }

    pub(crate) const fn file_bytes(&self) -> u64 {
        self.data_bytes() + self.tables_bytes() + FOOTER_BYTES
    }

    pub(crate) fn encode(&self) -> [u8; PAGE] {
        let mut bytes = [0; PAGE];
        let kind = match self.kind {
            LayerKind::Flat => FLAT,
            LayerKind::Packed => PACKED,
        };
        bytes[..AT_VERSION].copy_from_slice(MAGIC);
        bytes[AT_ID..AT_FRAMES].copy_from_slice(self.id.as_bytes());
        let mut put = |at: usize, word: u32| {
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        };
        put(AT_VERSION, VERSION);
        put(AT_KIND, kind);
        put(AT_FRAMES, self.frames);
        put(AT_HELD, self.frames_held);
        put(AT_PAGES, self.data_pages);
        put(AT_RUNS, self.runs);
        put(AT_TABLES_CRC, self.tables_crc);
        let crc = crc32c::crc32c(&bytes[..AT_CRC]);
        bytes[AT_CRC..USED_BYTES].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the last page of a file.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, LayerError> {
        if bytes.len() as u64 != FOOTER_BYTES || &bytes[..AT_VERSION] != MAGIC {
            return Err(LayerError::Magic);
        }
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if word(AT_VERSION) != VERSION {
            return Err(LayerError::Version(word(AT_VERSION)));
        }
        let padded = bytes[USED_BYTES..].iter().all(|byte| *byte == 0);
        if crc32c::crc32c(&bytes[..AT_CRC]) != word(AT_CRC) || !padded {
            return Err(LayerError::Checksum("footer"));
        }
        let kind = match word(AT_KIND) {
            FLAT => LayerKind::Flat,
            PACKED => LayerKind::Packed,
            other => return Err(mismatch("kind", other, "1 or 2")),
        };
        let id = std::str::from_utf8(&bytes[AT_ID..AT_FRAMES]).unwrap_or_default();
        let id = id.parse().map_err(|_| mismatch("id", "no id", "20 characters of 0-9 and a-z"))?;
        let footer = Self {
            kind,
            id,
            frames: word(AT_FRAMES),
            frames_held: word(AT_HELD),
            data_pages: word(AT_PAGES),
            runs: word(AT_RUNS),
            tables_crc: word(AT_TABLES_CRC),
        };
        footer.check_bounds()
    }

    fn check_bounds(self) -> Result<Self, LayerError> {
        if !(1..=FRAMES_MAX).contains(&self.frames) {
            return Err(mismatch("frames", self.frames, "1 to 2^31"));
        }
        if self.data_pages > data_pages_max(self.frames) || self.frames_held > self.data_pages {
            return Err(mismatch("pages", self.data_pages, "at most the frames of the guest"));
        }
        if self.runs as usize > RUNS_MAX {
            return Err(mismatch("runs", self.runs, RUNS_MAX));
        }
        Ok(self)
    }

    /// Whether the file is what a manifest says.
    pub(crate) fn check(&self, info: &LayerInfo) -> Result<(), LayerError> {
        if self.id != info.id {
            return Err(mismatch("id", self.id, info.id));
        }
        if self.kind != info.kind {
            return Err(mismatch("kind", format!("{:?}", self.kind), format!("{:?}", info.kind)));
        }
        if self.frames_held != info.frames_held {
            return Err(mismatch("frames held", self.frames_held, info.frames_held));
        }
        if self.file_bytes() != info.file_bytes {
            return Err(mismatch("length by its counts", self.file_bytes(), info.file_bytes));
        }
        Ok(())
    }

    /// Reads the tables, with their padding, of this footer.
    pub(crate) fn decode_tables(&self, bytes: &[u8]) -> Result<(RunTable, Vec<u32>), LayerError> {
        if bytes.len() as u64 != self.tables_bytes() || crc32c::crc32c(bytes) != self.tables_crc {
            return Err(LayerError::Checksum("tables"));
        }
        let (runs, rest) = bytes.split_at(self.runs as usize * RUN_BYTES);
        let extents: Option<Vec<Extent>> =
            runs.as_chunks::<RUN_BYTES>().0.iter().map(decode_extent).collect();
        let extents = extents.ok_or(LayerError::Runs("a run is empty or out of bounds"))?;
        let table = RunTable::checked(extents, self.data_pages)?;
        if table.extents().last().is_some_and(|last| last.run.end() > self.frames) {
            return Err(LayerError::Runs("a run leaves the guest's memory"));
        }
        match self.kind {
            LayerKind::Flat if table != RunTable::flat(self.frames)? => {
                return Err(LayerError::Runs("a flat layer has one run, all of memory"));
            }
            LayerKind::Packed if table.frames() != self.frames_held => {
                return Err(LayerError::Runs("its runs are not as many frames as it holds"));
            }
            LayerKind::Flat | LayerKind::Packed => {}
        }
        let chunks = usize::try_from(self.chunks()).unwrap_or(usize::MAX);
        let checksums = rest.as_chunks::<4>().0.iter().take(chunks);
        Ok((table, checksums.map(|word| u32::from_le_bytes(*word)).collect()))
    }
}

fn decode_extent(bytes: &[u8; RUN_BYTES]) -> Option<Extent> {
    let word =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let run = FrameRun::new(word(0), word(4))?;
    (word(12) == 0).then_some(Extent { run, page: word(8) })
}

pub(crate) fn mismatch(
    field: &'static str,
    got: impl std::fmt::Display,
    expected: impl std::fmt::Display,
) -> LayerError {
    LayerError::Mismatch { field, got: got.to_string(), expected: expected.to_string() }
}
