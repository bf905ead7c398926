//! The manifest of a template: what it is, and how its files must look.
//!
//! Called by `template` and `staging`, and by whoever shows a template. Refuses bytes that are not
//! exactly what [`Manifest::encode`] writes: the envelope (see `envelope.rs`) is checked before
//! rkyv's bytecheck looks at the body, and every field is checked against its bound after it.

use std::str::FromStr;

use mica_units::{Mebibytes, TemplateName, VcpuCount};
use rkyv::rancor;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::envelope::Envelope;
use crate::id::is_id;

/// Characters of a template id.
pub const TEMPLATE_ID_CHARS: usize = crate::id::CHARS;
/// The largest manifest that is read.
pub const MANIFEST_BYTES_MAX: usize = 16 * 1024;

const ENVELOPE: Envelope =
    Envelope { magic: b"MICAMANI", version: 1, bytes_max: MANIFEST_BYTES_MAX };
const CMDLINE_BYTES_MAX: usize = 2048;
pub(crate) const VERSION_TEXT_BYTES_MAX: usize = 32;
const HASH_CHARS_MAX: usize = 64;
pub(crate) const MEMORY_MIB_MAX: u32 = 1 << 20;
/// 64 TiB: far above any template, far below where offsets overflow.
pub(crate) const PART_BYTES_MAX: u64 = 1 << 46;
/// A disk is read and written in sectors.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// Why a manifest was refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The file is not a manifest.
    #[error("it does not start with the magic of such a file")]
    Magic,
    /// Another program version wrote it.
    #[error("it has format version {0}, which this program does not read")]
    Version(u32),
    /// Too short, too long, or cut off.
    #[error("its length is wrong: {got} bytes, and its header asks for {expected}")]
    Length {
        /// Bytes there are.
        got: usize,
        /// Bytes the header asks for.
        expected: usize,
    },
    /// The bytes changed after they were written.
    #[error("its checksum does not match: the bytes changed after they were written")]
    Checksum,
    /// The body is not a valid archive.
    #[error("its body is not valid: {0}")]
    Body(String),
    /// A field is out of its bounds.
    #[error("its field `{field}` is out of bounds: {what}")]
    Field {
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        what: String,
    },
}

/// When a sandbox of the template counts as started.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadyWhen {
    /// The agent in the guest answered.
    Agent,
    /// The guest wrote its first byte to the serial console.
    Console,
}

/// The length and checksum of one file of a template.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartInfo {
    /// Its length in bytes.
    pub bytes: u64,
    /// Its content checksum: over its blocks that are not all zeros, so that a sparse
    /// file and a full one with the same content agree.
    pub crc32c: u32,
}

/// What a template is. Immutable once committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// [`TEMPLATE_ID_CHARS`] characters of `0-9a-z`; also the name of its directory.
    pub id: String,
    /// Its name.
    pub name: TemplateName,
    /// When it was committed, in milliseconds since 1970.
    pub created_unix_ms: u64,
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
    /// The kernel.
    pub kernel: PartInfo,
    /// The initial RAM file system, where there is one.
    pub initramfs: Option<PartInfo>,
    /// The root disk, where there is one.
    pub disk: Option<PartInfo>,
}

/// The body as rkyv stores it. A change here is a new format version.
#[derive(Archive, Serialize, Deserialize)]
struct BodyV1 {
    id: String,
    name: String,
    created_unix_ms: u64,
    vcpus: u32,
    memory_mib: u32,
    cmdline: String,
    envd_version: String,
    ready: ReadyWhen,
    inputs_hash: String,
    kernel: PartInfo,
    initramfs: Option<PartInfo>,
    disk: Option<PartInfo>,
}

// Tripwires: when one of these fails, the stored format has changed. Raise VERSION, keep reading
// the old one, and add a golden file; do not edit the numbers.
const _: () = assert!(size_of::<ArchivedBodyV1>() == 128);
const _: () = assert!(align_of::<ArchivedBodyV1>() == 8);
const _: () = assert!(size_of::<ArchivedPartInfo>() == 16);

impl Manifest {
    /// Whether a sandbox of it has a root disk.
    #[must_use]
    pub const fn has_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// Length of the root disk in bytes; 0 where there is none.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.disk.map_or(0, |disk| disk.bytes)
    }

    /// Whether both are the same template but for their ids and dates.
    #[must_use]
    pub fn same_content(&self, other: &Self) -> bool {
        let as_ours =
            Self { id: self.id.clone(), created_unix_ms: self.created_unix_ms, ..other.clone() };
        *self == as_ours
    }

    /// The bytes to store.
    ///
    /// # Errors
    /// When a field is out of its bounds, so that nothing is written that cannot be read.
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        self.check()?;
        let body = BodyV1 {
            id: self.id.clone(),
            name: self.name.as_str().to_owned(),
            created_unix_ms: self.created_unix_ms,
            vcpus: u32::from(self.vcpus.get()),
            memory_mib: self.memory.count(),
            cmdline: self.cmdline.clone(),
            envd_version: self.envd_version.clone(),
            ready: self.ready,
            inputs_hash: self.inputs_hash.clone(),
            kernel: self.kernel,
            initramfs: self.initramfs,
            disk: self.disk,
        };
        let body = rkyv::to_bytes::<rancor::Error>(&body)
            .map_err(|error| ManifestError::Body(error.to_string()))?;
        ENVELOPE.seal(&body)
    }

    /// Reads what [`Self::encode`] wrote.
    ///
    /// # Errors
    /// When anything about the bytes is not as it must be.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let body = ENVELOPE.open(bytes)?;
        let mut aligned = AlignedVec::<16>::with_capacity(body.len());
        aligned.extend_from_slice(body);
        let body = rkyv::from_bytes::<BodyV1, rancor::Error>(&aligned)
            .map_err(|error| ManifestError::Body(error.to_string()))?;
        let manifest = Self {
            name: TemplateName::from_str(&body.name)
                .map_err(|error| field("name", error.to_string()))?,
            vcpus: VcpuCount::new(body.vcpus).map_err(|error| field("vcpus", error.to_string()))?,
            memory: Mebibytes::new(body.memory_mib),
            id: body.id,
            created_unix_ms: body.created_unix_ms,
            cmdline: body.cmdline,
            envd_version: body.envd_version,
            ready: body.ready,
            inputs_hash: body.inputs_hash,
            kernel: body.kernel,
            initramfs: body.initramfs,
            disk: body.disk,
        };
        manifest.check()?;
        Ok(manifest)
    }

    /// Checks every bound that the field types do not already keep.
    fn check(&self) -> Result<(), ManifestError> {
        if !is_id(&self.id) {
            return Err(field("id", "it must be 20 characters of 0-9 and a-z"));
        }
        if !(1..=MEMORY_MIB_MAX).contains(&self.memory.count()) {
            return Err(field(
                "memory",
                format!("{} is not 1 to {MEMORY_MIB_MAX} MiB", self.memory),
            ));
        }
        printable("cmdline", &self.cmdline, CMDLINE_BYTES_MAX)?;
        printable("envd_version", &self.envd_version, VERSION_TEXT_BYTES_MAX)?;
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if self.inputs_hash.len() > HASH_CHARS_MAX || !self.inputs_hash.bytes().all(hex) {
            return Err(field("inputs_hash", "it must be at most 64 characters of 0-9 and a-f"));
        }
        part("kernel", self.kernel)?;
        self.initramfs.map_or(Ok(()), |info| part("initramfs", info))?;
        self.disk.map_or(Ok(()), |info| part("disk", info))?;
        if !self.disk_bytes().is_multiple_of(SECTOR_BYTES) {
            return Err(field("disk", "its length must be a multiple of 512"));
        }
        Ok(())
    }
}

pub(crate) fn field(field: &'static str, what: impl Into<String>) -> ManifestError {
    ManifestError::Field { field, what: what.into() }
}

pub(crate) fn printable(
    name: &'static str,
    text: &str,
    bytes_max: usize,
) -> Result<(), ManifestError> {
    if text.len() > bytes_max {
        return Err(field(name, format!("{} bytes, at most {bytes_max} are allowed", text.len())));
    }
    if !text.bytes().all(|b| b == b' ' || b.is_ascii_graphic()) {
        return Err(field(name, "only printable ASCII characters are allowed"));
    }
    Ok(())
}

fn part(name: &'static str, info: PartInfo) -> Result<(), ManifestError> {
    if (1..=PART_BYTES_MAX).contains(&info.bytes) {
        return Ok(());
    }
    Err(field(name, format!("a length of {} bytes is not 1 to 2^46", info.bytes)))
}

#[cfg(test)]
pub(crate) mod tests;
