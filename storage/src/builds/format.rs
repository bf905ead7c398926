//! What is stored of templates that clients build, of their builds, and of links for uploads.
//!
//! Called by the other modules of [`super`]. Refuses bytes that are not exactly what `encode` wrote: the
//! envelope first (see `envelope.rs`), then rkyv's bytecheck.

use std::collections::BTreeMap;

use rkyv::rancor;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::envelope::Envelope;
use crate::manifest::ManifestError;

/// The longest of these files: the environment of a template is in it once for each build kept.
pub(super) const SEALED_BYTES_MAX: usize = 8 << 20;

/// What processes of a template's sandboxes start with when a client says nothing else.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
pub struct BuiltDefaults {
    /// Environment.
    pub env: BTreeMap<String, String>,
    /// Directory; the base's when absent.
    pub workdir: Option<String>,
    /// User; the base's when absent.
    pub user: Option<String>,
}

/// A build that came to its end, and the snapshot that sandboxes of it start from.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// Id of the build: a UUID.
    pub build_id: String,
    /// Id of the snapshot.
    pub snapshot_id: String,
    /// When it was asked for, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// When it was done.
    pub finished_unix_ms: u64,
    /// vCPUs of a sandbox.
    pub vcpus: u32,
    /// Memory of a sandbox.
    pub memory_mib: u32,
    /// Root disk of a sandbox.
    pub disk_mib: u32,
    /// Version of the envd protocol its agent speaks.
    pub envd_version: String,
    /// What its steps set.
    pub defaults: BuiltDefaults,
}

/// A tag, and the build that it stands for.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct BuiltTag {
    /// Its name.
    pub tag: String,
    /// Id of the build.
    pub build_id: String,
    /// Since when, in milliseconds since 1970.
    pub assigned_unix_ms: u64,
}

/// A template that a client builds: a name of a tenant's, and what its tags stand for.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct BuiltTemplate {
    /// 20 characters of `0-9a-z`; also the name of its file.
    pub id: String,
    /// Whose it is.
    pub tenant: String,
    /// Its name, one of its tenant's.
    pub name: String,
    /// Whether other tenants may make sandboxes of it.
    pub public: bool,
    /// When it was first asked for, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// When a build of it was last done, or a tag moved.
    pub updated_unix_ms: u64,
    /// Builds that came to their end so far.
    pub build_count: u32,
    /// Its tags. None until a build is done.
    pub tags: Vec<BuiltTag>,
    /// The builds that tags stand for.
    pub builds: Vec<Built>,
}

impl BuiltTemplate {
    /// What a tag stands for.
    #[must_use]
    pub fn tagged(&self, tag: &str) -> Option<&Built> {
        let tag = self.tags.iter().find(|held| held.tag == tag)?;
        self.builds.iter().find(|built| built.build_id == tag.build_id)
    }
}

/// How far a build is.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum BuildPhase {
    /// Announced: its files may be uploaded.
    Announced,
    /// Asked for; others of its tenant go first.
    Waiting,
    /// Its steps run.
    Building,
    /// Its template can be used.
    Ready,
    /// It ended early.
    Failed {
        /// Why.
        message: String,
        /// `base`, `finalize`, or the number of the step, counted from 1.
        step: Option<String>,
    },
}

impl BuildPhase {
    /// Whether nothing more comes.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        matches!(self, Self::Ready | Self::Failed { .. })
    }
}

/// One build, from the moment it is announced.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct BuildRecord {
    /// A UUID; also the name of its directory.
    pub id: String,
    /// The template it is for.
    pub template_id: String,
    /// Whose it is.
    pub tenant: String,
    /// The template's name.
    pub name: String,
    /// Tags that stand for it once it is done.
    pub tags: Vec<String>,
    /// vCPUs that were wished for.
    pub vcpus: Option<u32>,
    /// Memory that was wished for.
    pub memory_mib: Option<u32>,
    /// When it was announced, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// When its phase last changed.
    pub updated_unix_ms: u64,
    /// How far it is.
    pub phase: BuildPhase,
}

/// Who may upload what through a link.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct UploadGrant {
    /// Whose file it becomes.
    pub tenant: String,
    /// The name that the client gave to its content.
    pub hash: String,
    /// When the link was made, in milliseconds since 1970.
    pub created_unix_ms: u64,
}

/// A kind of file of its own: magic and version before a body that rkyv wrote.
macro_rules! sealed {
    ($type:ty, $magic:literal) => {
        impl $type {
            const ENVELOPE: Envelope =
                Envelope { magic: $magic, version: 1, bytes_max: SEALED_BYTES_MAX };

            pub(super) fn encode(&self) -> Result<Vec<u8>, ManifestError> {
                let body = rkyv::to_bytes::<rancor::Error>(self)
                    .map_err(|error| ManifestError::Body(error.to_string()))?;
                Self::ENVELOPE.seal(&body)
            }

            pub(super) fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
                let body = Self::ENVELOPE.open(bytes)?;
                let mut aligned = AlignedVec::<16>::with_capacity(body.len());
                aligned.extend_from_slice(body);
                rkyv::from_bytes::<Self, rancor::Error>(&aligned)
                    .map_err(|error| ManifestError::Body(error.to_string()))
            }
        }
    };
}

sealed!(BuiltTemplate, b"MICABTPL");
sealed!(BuildRecord, b"MICABLDR");
sealed!(UploadGrant, b"MICAUPLD");

// Tripwires: when one of these fails, the stored format has changed. Raise the version of its envelope,
// and keep reading the old one; do not edit the numbers.
const _: () = assert!(size_of::<ArchivedBuiltTemplate>() == 72);
const _: () = assert!(size_of::<ArchivedBuilt>() == 88);
const _: () = assert!(size_of::<ArchivedBuildRecord>() == 96);
const _: () = assert!(size_of::<ArchivedUploadGrant>() == 24);
