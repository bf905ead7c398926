//! What the next daemon has to know of a sandbox: the record in its directory of the store.
//!
//! Written by the driver at every change that matters, read at start by `recovery`. Refuses bytes that
//! are not a record: magic, version, length and checksum, then rkyv's bytecheck. What the version before
//! wrote is read still, so that its sandboxes are taken over.
//!
//! ```text
//!  0      4         8        12       16
//!  ┌──────┬─────────┬────────┬────────┬──────────────┐
//!  │ MSBX │ version │ length │ crc32c │ rkyv archive │   integers little endian; crc of the archive
//!  └──────┴─────────┴────────┴────────┴──────────────┘
//! ```

use std::collections::BTreeMap;

use mica_storage::{LayerInfo, SANDBOX_RECORD_BYTES_MAX};
use rkyv::util::AlignedVec;
use rkyv::with::Skip;
use rkyv::{Archive, Deserialize, Serialize, rancor};

use crate::{NetworkPolicy, OnTimeout, OnceName};

const MAGIC: [u8; 4] = *b"MSBX";
const VERSION: u32 = 3;
/// Without [`Record::once`].
const VERSION_BEFORE: u32 = 2;
const HEADER_BYTES: usize = 16;

/// The process of a sandbox.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub(crate) struct RecordedProcess {
    /// Names its cgroup.
    pub(crate) name: String,
    /// Its uid.
    pub(crate) uid: u32,
    /// Its number.
    pub(crate) pid: u32,
    /// When it was started, as the kernel counts: a number that is used again shows by it.
    pub(crate) start_ticks: u64,
    /// [`mica_wire::vm::Shell::memory_address`] and so on.
    pub(crate) memory_address: u64,
    pub(crate) spare_fd: i32,
    pub(crate) exchange_fd: i32,
    pub(crate) console_fd: i32,
    pub(crate) userfault_fd: Option<i32>,
}

/// Where the sandbox is, as far as it matters after a restart.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub(crate) enum RecordedState {
    /// It runs; without its process it is lost.
    Running,
    /// It is in this snapshot, and maybe also frozen in its process.
    Paused { snapshot: String },
    /// It is being put back to this snapshot: its disk may be there already, so it has to go there.
    RollingBack { snapshot: String },
    /// It is in this snapshot, which has its disk alone.
    OnDisk { snapshot: String },
}

/// What happens when its time is over. The first two are as the boolean that was here before.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RecordedEnd {
    /// It ends.
    Kill,
    /// It is paused.
    Pause,
    /// It is paused with its disk alone.
    PauseToDisk,
}

impl From<OnTimeout> for RecordedEnd {
    fn from(on_timeout: OnTimeout) -> Self {
        match on_timeout {
            OnTimeout::Kill => Self::Kill,
            OnTimeout::Pause => Self::Pause,
            OnTimeout::PauseToDisk => Self::PauseToDisk,
        }
    }
}

impl From<RecordedEnd> for OnTimeout {
    fn from(recorded: RecordedEnd) -> Self {
        match recorded {
            RecordedEnd::Kill => Self::Kill,
            RecordedEnd::Pause => Self::Pause,
            RecordedEnd::PauseToDisk => Self::PauseToDisk,
        }
    }
}

/// [`crate::NetworkPolicy`].
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub(crate) struct RecordedNetwork {
    pub(crate) allow_public_traffic: bool,
    pub(crate) mask_request_host: Option<String>,
    pub(crate) allow_internet_access: bool,
    pub(crate) allow_out: Vec<String>,
    pub(crate) deny_out: Vec<String>,
    pub(crate) unapplied: BTreeMap<String, String>,
}

impl From<&NetworkPolicy> for RecordedNetwork {
    fn from(policy: &NetworkPolicy) -> Self {
        let NetworkPolicy {
            allow_public_traffic,
            mask_request_host,
            allow_internet_access,
            allow_out,
            deny_out,
            unapplied,
        } = policy.clone();
        Self {
            allow_public_traffic,
            mask_request_host,
            allow_internet_access,
            allow_out,
            deny_out,
            unapplied,
        }
    }
}

impl From<&RecordedNetwork> for NetworkPolicy {
    fn from(recorded: &RecordedNetwork) -> Self {
        let RecordedNetwork {
            allow_public_traffic,
            mask_request_host,
            allow_internet_access,
            allow_out,
            deny_out,
            unapplied,
        } = recorded.clone();
        Self {
            allow_public_traffic,
            mask_request_host,
            allow_internet_access,
            allow_out,
            deny_out,
            unapplied,
        }
    }
}

/// [`OnceName`].
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub(crate) struct RecordedOnce {
    name: String,
    digest: [u8; 32],
    /// Whether the sandbox was ready, and the create could be answered.
    pub(crate) came_up: bool,
}

impl From<&RecordedOnce> for OnceName {
    fn from(RecordedOnce { name, digest, .. }: &RecordedOnce) -> Self {
        Self { name: name.clone(), digest: *digest }
    }
}

/// One sandbox.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) state: RecordedState,
    pub(crate) process: Option<RecordedProcess>,
    pub(crate) template: String,
    pub(crate) template_id: String,
    pub(crate) template_name: String,
    pub(crate) envd_version: String,
    /// Whether an agent has to answer before it counts as up.
    pub(crate) has_agent: bool,
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) disk_bytes: u64,
    pub(crate) started_unix_ms: u64,
    /// None of one that never ends by itself.
    pub(crate) end_unix_ms: Option<u64>,
    /// The life it was created with.
    pub(crate) timeout_ms: u64,
    /// Whether requests put its end off,
    pub(crate) idle: bool,
    /// and to how long from each.
    pub(crate) life_ms: u64,
    pub(crate) at_end: RecordedEnd,
    pub(crate) auto_resume: bool,
    pub(crate) tenant: String,
    /// The account that it is counted in.
    pub(crate) account: Option<String>,
    pub(crate) network: RecordedNetwork,
    pub(crate) traffic_token: Option<String>,
    pub(crate) secure: bool,
    pub(crate) access_token: Option<String>,
    pub(crate) machine_id: String,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) env_vars: BTreeMap<String, String>,
    /// Whether its pages come when they are touched.
    pub(crate) on_demand: bool,
    /// The layers its memory lies on, base first; linked in its directory.
    pub(crate) layers: Vec<LayerInfo>,
    /// The name under which its create was asked for. In [`Kept`], for it came after the rest.
    #[rkyv(with = Skip)]
    pub(crate) once: Option<RecordedOnce>,
}

/// What is archived.
#[derive(Archive, Serialize, Deserialize)]
struct Kept {
    /// All that there was before.
    record: Record,
    once: Option<RecordedOnce>,
}

/// Why bytes are not a record.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RecordError {
    /// Cut, too long, or another file.
    #[error("it is no record of version {VERSION_BEFORE} or {VERSION}, or cut")]
    Header,
    /// Changed after it was written.
    #[error("its checksum does not match")]
    Checksum,
    /// Not the archive of a record.
    #[error("its contents are not valid")]
    Contents,
}

impl Record {
    /// The name under which its create was asked for, as it is kept.
    pub(crate) fn once_of(name: Option<&OnceName>, came_up: bool) -> Option<RecordedOnce> {
        let OnceName { name, digest } = name?.clone();
        Some(RecordedOnce { name, digest, came_up })
    }

    /// The bytes to keep.
    pub(crate) fn encode(mut self) -> Result<Vec<u8>, RecordError> {
        let kept = Kept { once: self.once.take(), record: self };
        let archive = rkyv::to_bytes::<rancor::Error>(&kept).map_err(|_| RecordError::Contents)?;
        let length = u32::try_from(archive.len()).map_err(|_| RecordError::Header)?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + archive.len());
        bytes.extend_from_slice(&MAGIC);
        for word in [VERSION, length, crc32c::crc32c(&archive)] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&archive);
        if bytes.len() > SANDBOX_RECORD_BYTES_MAX { Err(RecordError::Header) } else { Ok(bytes) }
    }

    /// Reads [`Record::encode`] back.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let (header, archive) =
            bytes.split_first_chunk::<HEADER_BYTES>().ok_or(RecordError::Header)?;
        let word = |at: usize| {
            let word = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            u32::from_le_bytes(word)
        };
        let length = usize::try_from(word(8)).unwrap_or(usize::MAX);
        let is_known = [VERSION, VERSION_BEFORE].contains(&word(4));
        let in_form = header[..4] == MAGIC && is_known && length == archive.len();
        if !in_form || bytes.len() > SANDBOX_RECORD_BYTES_MAX {
            return Err(RecordError::Header);
        }
        if crc32c::crc32c(archive) != word(12) {
            return Err(RecordError::Checksum);
        }
        let mut aligned = AlignedVec::<16>::with_capacity(archive.len());
        aligned.extend_from_slice(archive);
        let bad = |_: rancor::Error| RecordError::Contents;
        if word(4) == VERSION_BEFORE {
            return rkyv::from_bytes(&aligned).map_err(bad);
        }
        let Kept { record, once } = rkyv::from_bytes(&aligned).map_err(bad)?;
        Ok(Self { once, ..record })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            state: RecordedState::Paused { snapshot: "0123456789abcdefghij".to_owned() },
            process: Some(RecordedProcess {
                name: "i0123456789abcdefghij".to_owned(),
                uid: 100_001,
                pid: 4242,
                start_ticks: 77,
                memory_address: 0x7f00_0000_0000,
                spare_fd: 3,
                exchange_fd: 4,
                console_fd: 5,
                userfault_fd: None,
            }),
            template: "base".to_owned(),
            template_id: "0123456789abcdefghij".to_owned(),
            template_name: "base".to_owned(),
            envd_version: "0.5.7".to_owned(),
            has_agent: true,
            vcpus: 2,
            memory_mib: 512,
            disk_bytes: 100 << 20,
            started_unix_ms: 1,
            end_unix_ms: Some(2),
            timeout_ms: 3,
            idle: true,
            life_ms: 4,
            at_end: RecordedEnd::Kill,
            auto_resume: true,
            tenant: "default".to_owned(),
            account: Some("0123456789ab".to_owned()),
            network: RecordedNetwork::from(&NetworkPolicy::default()),
            traffic_token: None,
            secure: true,
            access_token: Some("secret".to_owned()),
            machine_id: "00".repeat(16),
            metadata: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
            env_vars: BTreeMap::new(),
            on_demand: false,
            layers: Vec::new(),
            once: Some(RecordedOnce { name: "a-1".to_owned(), digest: [7; 32], came_up: true }),
        }
    }

    #[test]
    fn records_round_trip() {
        let bytes = record().encode().unwrap();
        assert_eq!(Record::decode(&bytes), Ok(record()));
        let unasked = || Record { once: None, ..record() };
        assert_eq!(Record::decode(&unasked().encode().unwrap()), Ok(unasked()));
    }

    #[test]
    fn a_record_of_the_version_before_is_read() {
        // As its daemon wrote it, of a sandbox of the stand-in's.
        let bytes = include_bytes!("goldens/record-v2.bin");
        assert_eq!(bytes[4], 2);
        let record = Record::decode(bytes).unwrap();
        assert_eq!((record.state, record.once), (RecordedState::Running, None));
        assert_eq!((record.template_name.as_str(), record.timeout_ms), ("base", 300_000));
        assert_eq!(record.metadata["kept"], "by the version before");
        assert_eq!(record.env_vars["COLOUR"], "green");
        assert_eq!((record.tenant.as_str(), record.vcpus), ("default", 2));
        assert!(record.access_token.is_some() && record.process.is_some());
    }

    /// What was a boolean, and a state of fewer kinds, reads as before: version 2 stays what it is.
    #[test]
    fn records_of_before_there_were_pauses_without_memory_are_read() {
        #[derive(Archive, Serialize, Deserialize)]
        enum StateBefore {
            Running,
            Paused { snapshot: String },
            RollingBack { snapshot: String },
        }
        #[derive(Archive, Serialize, Deserialize)]
        struct Before {
            state: StateBefore,
            pause_at_end: bool,
            auto_resume: bool,
        }
        #[derive(Archive, Serialize, Deserialize, Debug, PartialEq)]
        struct Now {
            state: RecordedState,
            at_end: RecordedEnd,
            auto_resume: bool,
        }
        let snapshot = "0123456789abcdefghij".to_owned();
        let paused = RecordedState::Paused { snapshot: snapshot.clone() };
        let back = RecordedState::RollingBack { snapshot: snapshot.clone() };
        for (before, state, pause_at_end, at_end) in [
            (StateBefore::Running, RecordedState::Running, false, RecordedEnd::Kill),
            (StateBefore::Paused { snapshot: snapshot.clone() }, paused, true, RecordedEnd::Pause),
            (StateBefore::RollingBack { snapshot }, back, true, RecordedEnd::Pause),
        ] {
            let before = Before { state: before, pause_at_end, auto_resume: true };
            let bytes = rkyv::to_bytes::<rancor::Error>(&before).unwrap();
            let now = rkyv::from_bytes::<Now, rancor::Error>(&bytes).unwrap();
            assert_eq!(now, Now { state, at_end, auto_resume: true });
        }
        assert_eq!(size_of::<rkyv::Archived<Before>>(), size_of::<rkyv::Archived<Now>>());
    }

    #[test]
    fn a_cut_or_changed_record_is_refused_and_never_a_panic() {
        let bytes = record().encode().unwrap();
        for length in 0..bytes.len() {
            assert!(Record::decode(&bytes[..length]).is_err(), "{length} bytes");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x40;
            assert!(Record::decode(&changed).is_err(), "byte {at}");
        }
    }
}
