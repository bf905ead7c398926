//! What the host and the agent inside a guest exchange over vsock.
//!
//! Called by `shards` (host side) and `guest` (agent side). Both ends read with a bound; the host
//! treats every byte from here as hostile.
//!
//! ```text
//!  guest boots ── connects to (CID 2, DOORBELL_PORT) ──▶ VM process answers RST, tells its shard
//!  host        ── connects to (guest, GATEWAY_PORT) ──▶ 8-byte Preamble
//!              ◀── 1 byte Verdict
//!              ◀─▶ bytes of the TCP port asked for, or one control exchange
//! ```
//! A control exchange is one line of JSON each way ([`ControlRequest`], [`ControlReply`]), at most
//! [`CONTROL_LINE_BYTES_MAX`] long with its newline, and then the connection is closed.

use std::collections::BTreeMap;

use mica_units::GuestPort;
use serde::{Deserialize, Serialize};

/// Guest-side vsock port on which the agent takes every connection from the host.
pub const GATEWAY_PORT: u32 = 1024;

/// Host-side vsock port that the agent connects to once its gateway listens. The connection is
/// always reset: the attempt is the message.
pub const DOORBELL_PORT: u32 = 1024;

/// Longest control line, newline included.
pub const CONTROL_LINE_BYTES_MAX: usize = 256 * 1024;

/// The version of the envd protocol that the agent implements, as SDKs compare it. It may be raised
/// only with what SDKs then expect of an agent: the last that it has are recursive watching (0.1.4),
/// `CloseStdin` (0.5.2), uploads of plain and compressed bytes (0.5.7), metadata of files (0.6.2),
/// entries in events (0.6.3), watching network mounts (0.6.4), an end of uploads that stand still
/// (0.6.7).
pub const ENVD_VERSION: &str = "0.6.13";

const MAGIC: [u8; 4] = *b"MICA";
const VERSION: u8 = 1;

/// Bytes of a [`Preamble`].
pub const PREAMBLE_BYTES: usize = 8;

/// The first bytes of a connection to [`GATEWAY_PORT`]: whom it is for.
///
/// ```text
///  0      4      5      6      8
///  ┌──────┬──────┬──────┬──────┐
///  │ MICA │ vers │ kind │ port │  port: little endian, 0 for control
///  └──────┴──────┴──────┴──────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preamble {
    /// One control exchange with the agent itself.
    Control,
    /// Bytes to and from a TCP port of the guest's loopback.
    Tcp(GuestPort),
}

/// A preamble that is not in form
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a gateway connection does not start with a preamble of this version")]
pub struct PreambleError;

impl Preamble {
    /// The bytes on the wire.
    #[must_use]
    pub fn encode(self) -> [u8; PREAMBLE_BYTES] {
        let (kind, port) = match self {
            Self::Control => (0, 0),
            Self::Tcp(port) => (1, port.get()),
        };
        let [low, high] = port.to_le_bytes();
        let [m0, m1, m2, m3] = MAGIC;
        [m0, m1, m2, m3, VERSION, kind, low, high]
    }

    /// Reads the bytes back.
    ///
    /// # Errors
    /// When magic, version, kind or port is not one that [`Preamble::encode`] writes.
    pub fn decode(bytes: [u8; PREAMBLE_BYTES]) -> Result<Self, PreambleError> {
        let [m0, m1, m2, m3, version, kind, low, high] = bytes;
        if [m0, m1, m2, m3] != MAGIC || version != VERSION {
            return Err(PreambleError);
        }
        match (kind, u16::from_le_bytes([low, high])) {
            (0, 0) => Ok(Self::Control),
            (1, port) => GuestPort::new(port).map(Self::Tcp).map_err(|_| PreambleError),
            _ => Err(PreambleError),
        }
    }
}

/// The agent's one-byte answer to a preamble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// The bytes that follow are the port's.
    Open = 0,
    /// Nothing listens on that port; the connection is closed.
    Refused = 1,
    /// The preamble was not in form; the connection is closed.
    BadPreamble = 2,
}

impl Verdict {
    /// Reads the byte back; `None` for any other value.
    #[must_use]
    pub fn decode(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Open),
            1 => Some(Self::Refused),
            2 => Some(Self::BadPreamble),
            _ => None,
        }
    }
}

/// What the host asks the agent itself. Only the host can: a guest's programs do not reach it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlRequest {
    /// Start every service of the template and answer when all of them would answer a client at
    /// once. Sent while a template is made, before it is frozen; the sandbox has no identity yet.
    Warm {
        /// How long that may take.
        deadline_ms: u64,
    },
    /// Take on an identity: after every restore, rollback and resume, before anyone else may talk
    /// to the sandbox. The last one counts.
    Init(InitRequest),
    /// Bring to the disk all that is to be there when the memory is gone: before a pause or a
    /// snapshot that keeps the disk alone. What is written after the answer may be lost.
    Sync,
}

/// What the host tells a sandbox about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitRequest {
    /// Becomes the host name and `E2B_SANDBOX_ID`.
    pub sandbox_id: String,
    /// Becomes `E2B_TEMPLATE_ID`.
    pub template_id: String,
    /// Becomes `/etc/machine-id`: 32 characters of 0-9 and a-f, drawn for each sandbox.
    pub machine_id: String,
    /// The token that envd requests must carry; `None` leaves envd open.
    pub access_token: Option<String>,
    /// Environment of every process started in the sandbox, kernels that run already included.
    pub env_vars: BTreeMap<String, String>,
    /// The wall clock of the host, in nanoseconds since the Unix epoch.
    pub wall_clock_unix_ns: u64,
    /// Whether this is another sandbox than the state was saved in (a create or a clone), and not
    /// the same one going on (a resume or a rollback).
    pub new_sandbox: bool,
    /// What processes start with, where a built template says so. The agent keeps it, and its memory is
    /// saved with the sandbox: `None` leaves what was said last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub defaults: Option<Defaults>,
}

/// What processes of a sandbox start with when their client says nothing else: over the settings in the
/// template's file, under [`InitRequest::env_vars`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Defaults {
    /// Environment.
    pub env: BTreeMap<String, String>,
    /// Directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
    /// User.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// The agent's answer to a [`ControlRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlReply {
    /// [`ENVD_VERSION`] of the agent in the template.
    pub envd_version: String,
    /// Set when the request could not be carried out.
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preambles_round_trip() {
        for preamble in [Preamble::Control, Preamble::Tcp(GuestPort::ENVD)] {
            assert_eq!(Preamble::decode(preamble.encode()), Ok(preamble));
        }
        // Golden: an agent in an old template must be understood by a new host.
        assert_eq!(Preamble::Tcp(GuestPort::ENVD).encode(), *b"MICA\x01\x01\x3f\xc3");
    }

    #[test]
    fn defaults_may_be_missing_on_either_side() {
        let old = r#"{"init":{"sandbox_id":"a","template_id":"t","machine_id":"m","access_token":null,
            "env_vars":{},"wall_clock_unix_ns":1,"new_sandbox":true}}"#;
        let Ok(ControlRequest::Init(mut init)) = serde_json::from_str(old) else {
            panic!("a host of before there were defaults is understood");
        };
        assert_eq!(init.defaults, None);
        assert!(!serde_json::to_string(&init).unwrap().contains("defaults"));
        let user = Some("root".to_owned());
        init.defaults = Some(Defaults { user, ..Defaults::default() });
        let sent = serde_json::to_string(&ControlRequest::Init(init.clone())).unwrap();
        assert_eq!(
            serde_json::from_str::<ControlRequest>(&sent).unwrap(),
            ControlRequest::Init(init)
        );
    }

    #[test]
    fn other_bytes_are_refused() {
        for bad in [
            *b"MICA\x02\x01\x3f\xc3",
            *b"MICB\x01\x01\x3f\xc3",
            *b"MICA\x01\x01\0\0",
            *b"MICA\x01\x00\x01\x00",
            *b"MICA\x01\x02\x01\x00",
        ] {
            assert_eq!(Preamble::decode(bad), Err(PreambleError), "{bad:?}");
        }
        assert_eq!(Verdict::decode(3), None);
    }
}
