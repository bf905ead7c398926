//! The manifest of a snapshot: its layers, its disk, and the saved state itself.
//!
//! Called by `snapshot`, `staging` and by shards. Refuses bytes that are not exactly what
//! [`SnapshotManifest::encode`] writes: envelope, then rkyv's bytecheck, then every bound. Its file is
//! the commit: a snapshot exists when its directory has one.

use std::collections::BTreeSet;
use std::str::FromStr;

use mica_units::{Mebibytes, SandboxId, TemplateName, TenantId, VcpuCount};
use rkyv::rancor;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::envelope::Envelope;
use crate::id::is_id;
use crate::layer::{LAYERS_MAX, LayerInfo, LayerKind};
use crate::manifest::{
    MEMORY_MIB_MAX, ManifestError, PART_BYTES_MAX, ReadyWhen, SECTOR_BYTES, VERSION_TEXT_BYTES_MAX,
    field, printable,
};

/// The longest saved state.
pub const STATE_BYTES_MAX: usize = 2 << 20;
/// The longest record beside it.
pub const RECORD_BYTES_MAX: usize = 64 * 1024;
const NAME_BYTES_MAX: usize = 128;
/// State, record, and ample room for the rest.
pub(crate) const SNAPSHOT_BYTES_MAX: usize = STATE_BYTES_MAX + RECORD_BYTES_MAX + 16 * 1024;

const ENVELOPE: Envelope =
    Envelope { magic: b"MICASNAP", version: 2, bytes_max: SNAPSHOT_BYTES_MAX };
/// Without tenants.
const ENVELOPE_V1: Envelope = Envelope { version: 1, ..ENVELOPE };

/// What a snapshot was made for.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotKind {
    /// The running snapshot of a template; its id is the template's.
    Template,
    /// Somebody asked for it.
    Snapshot,
    /// A paused sandbox.
    Pause,
    /// What copies of a sandbox start from; of no use once they are there.
    Copies,
    /// What sandboxes of a template start from that a client built; see `builds`.
    Built,
}

/// What a snapshot is. Immutable once committed, but for its layers: flattening puts others in their
/// place that hold the same memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotManifest {
    /// 20 characters of `0-9a-z`; also the name of its directory.
    pub id: String,
    /// What it was made for.
    pub kind: SnapshotKind,
    /// A name somebody gave it: printable ASCII, at most 128 characters.
    pub name: Option<String>,
    /// The template its sandbox was made from.
    pub template_id: String,
    /// That template's name.
    pub template_name: TemplateName,
    /// The snapshot its sandbox was started from, or rolled back to, last.
    pub parent: Option<String>,
    /// The sandbox it is of.
    pub sandbox: Option<SandboxId>,
    /// Whom that sandbox belonged to; nobody: the running snapshot of a template of the operator's.
    pub tenant: Option<TenantId>,
    /// When it was made, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// vCPUs of the guest.
    pub vcpus: VcpuCount,
    /// Memory of the guest.
    pub memory: Mebibytes,
    /// The envd version the agent implements; empty where there is no agent.
    pub envd_version: String,
    /// When a sandbox of it counts as started.
    pub ready: ReadyWhen,
    /// Its memory, the base first. The base is flat, all others are packed. None where the disk alone is kept.
    pub layers: Vec<LayerInfo>,
    /// Length of the disk; 0 where there is none.
    pub disk_bytes: u64,
    /// The saved state of vCPUs and devices, opaque to the store.
    pub state: Vec<u8>,
    /// What the shard keeps of the sandbox, opaque to the store. Where the disk alone is kept: the command
    /// line of its kernel.
    pub record: Vec<u8>,
}

/// The body as rkyv stores it. A change here is a new format version.
#[derive(Archive, Serialize, Deserialize)]
struct BodyV1 {
    id: String,
    kind: SnapshotKind,
    name: Option<String>,
    template_id: String,
    template_name: String,
    parent: Option<String>,
    sandbox: Option<String>,
    created_unix_ms: u64,
    vcpus: u32,
    memory_mib: u32,
    envd_version: String,
    ready: ReadyWhen,
    layers: Vec<LayerInfo>,
    disk_bytes: u64,
    state: Vec<u8>,
    record: Vec<u8>,
}

/// The same, with the tenant.
#[derive(Archive, Serialize, Deserialize)]
struct BodyV2 {
    common: BodyV1,
    tenant: Option<String>,
}

// Tripwires: when one of these fails, the stored format has changed. Raise the version, keep reading
// the old one, and add a golden file; do not edit the numbers.
const _: () = assert!(size_of::<ArchivedBodyV1>() == 128);
const _: () = assert!(align_of::<ArchivedBodyV1>() == 8);
const _: () = assert!(size_of::<ArchivedBodyV2>() == 144);
const _: () = assert!(size_of::<rkyv::Archived<LayerInfo>>() == 40);

impl SnapshotManifest {
    /// Whether a sandbox of it has a root disk.
    #[must_use]
    pub const fn has_disk(&self) -> bool {
        self.disk_bytes > 0
    }

    /// The bytes to store.
    ///
    /// # Errors
    /// When a field is out of its bounds, so that nothing is written that cannot be read.
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        self.check()?;
        let common = BodyV1 {
            id: self.id.clone(),
            kind: self.kind,
            name: self.name.clone(),
            template_id: self.template_id.clone(),
            template_name: self.template_name.as_str().to_owned(),
            parent: self.parent.clone(),
            sandbox: self.sandbox.map(|id| id.as_str().to_owned()),
            created_unix_ms: self.created_unix_ms,
            vcpus: u32::from(self.vcpus.get()),
            memory_mib: self.memory.count(),
            envd_version: self.envd_version.clone(),
            ready: self.ready,
            layers: self.layers.clone(),
            disk_bytes: self.disk_bytes,
            state: self.state.clone(),
            record: self.record.clone(),
        };
        let tenant = self.tenant.as_ref().map(|tenant| tenant.as_str().to_owned());
        let body = BodyV2 { common, tenant };
        let body = rkyv::to_bytes::<rancor::Error>(&body).map_err(body_error)?;
        ENVELOPE.seal(&body)
    }

    /// Reads what [`Self::encode`] wrote.
    ///
    /// # Errors
    /// When anything about the bytes is not as it must be.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let (body, tenant) = match ENVELOPE.open(bytes) {
            Err(ManifestError::Version(1)) => {
                let body = aligned(ENVELOPE_V1.open(bytes)?);
                (rkyv::from_bytes::<BodyV1, rancor::Error>(&body).map_err(body_error)?, None)
            }
            body => {
                let body = aligned(body?);
                let body = rkyv::from_bytes::<BodyV2, rancor::Error>(&body).map_err(body_error)?;
                (body.common, body.tenant)
            }
        };
        let tenant = tenant.as_deref().map(TenantId::from_str).transpose();
        let sandbox = body.sandbox.as_deref().map(SandboxId::from_str).transpose();
        let manifest = Self {
            template_name: TemplateName::from_str(&body.template_name)
                .map_err(|error| field("template_name", error.to_string()))?,
            sandbox: sandbox.map_err(|error| field("sandbox", error.to_string()))?,
            tenant: tenant.map_err(|error| field("tenant", error.to_string()))?,
            vcpus: VcpuCount::new(body.vcpus).map_err(|error| field("vcpus", error.to_string()))?,
            memory: Mebibytes::new(body.memory_mib),
            id: body.id,
            kind: body.kind,
            name: body.name,
            template_id: body.template_id,
            parent: body.parent,
            created_unix_ms: body.created_unix_ms,
            envd_version: body.envd_version,
            ready: body.ready,
            layers: body.layers,
            disk_bytes: body.disk_bytes,
            state: body.state,
            record: body.record,
        };
        manifest.check()?;
        Ok(manifest)
    }

    /// Checks every bound that the field types do not already keep.
    fn check(&self) -> Result<(), ManifestError> {
        let id_form = "it must be 20 characters of 0-9 and a-z";
        if !is_id(&self.id) {
            return Err(field("id", id_form));
        }
        if !is_id(&self.template_id) {
            return Err(field("template_id", id_form));
        }
        if (self.kind == SnapshotKind::Template) != (self.id == self.template_id) {
            return Err(field("id", "a running snapshot, and no other, has its template's id"));
        }
        if self.parent.as_deref().is_some_and(|parent| !is_id(parent)) {
            return Err(field("parent", id_form));
        }
        if let Some(name) = &self.name {
            printable("name", name, NAME_BYTES_MAX)?;
        }
        printable("envd_version", &self.envd_version, VERSION_TEXT_BYTES_MAX)?;
        if !(1..=MEMORY_MIB_MAX).contains(&self.memory.count()) {
            let what = format!("{} is not 1 to {MEMORY_MIB_MAX} MiB", self.memory);
            return Err(field("memory", what));
        }
        let sectors = self.disk_bytes.is_multiple_of(SECTOR_BYTES);
        if !sectors || self.disk_bytes > PART_BYTES_MAX {
            return Err(field("disk_bytes", "it must be a multiple of 512, at most 2^46"));
        }
        if self.state.len() > STATE_BYTES_MAX {
            return Err(field("state", format!("longer than {STATE_BYTES_MAX} bytes")));
        }
        if self.record.len() > RECORD_BYTES_MAX {
            return Err(field("record", format!("longer than {RECORD_BYTES_MAX} bytes")));
        }
        let of_sandbox = matches!(self.kind, SnapshotKind::Pause | SnapshotKind::Snapshot);
        let disk_alone = of_sandbox && self.state.is_empty();
        if self.layers.is_empty() && disk_alone && self.has_disk() {
            return Ok(());
        }
        check_layers(&self.layers)
    }
}

/// rkyv reads in place.
fn aligned(body: &[u8]) -> AlignedVec<16> {
    let mut aligned = AlignedVec::with_capacity(body.len());
    aligned.extend_from_slice(body);
    aligned
}

fn body_error(error: rancor::Error) -> ManifestError {
    ManifestError::Body(error.to_string())
}

fn check_layers(layers: &[LayerInfo]) -> Result<(), ManifestError> {
    let Some((base, diffs)) = layers.split_first().filter(|_| layers.len() <= LAYERS_MAX) else {
        let what = format!("{} layers are not 1 to {LAYERS_MAX}", layers.len());
        return Err(field("layers", what));
    };
    let packed = diffs.iter().all(|layer| layer.kind == LayerKind::Packed);
    if base.kind != LayerKind::Flat || !packed {
        return Err(field("layers", "the base must be flat and all others packed"));
    }
    if !layers.iter().all(|layer| is_id(layer.id.as_str())) {
        return Err(field("layers", "a layer's id is out of form"));
    }
    let ids: BTreeSet<_> = layers.iter().map(|layer| layer.id).collect();
    if ids.len() != layers.len() {
        return Err(field("layers", "a layer is there twice"));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
