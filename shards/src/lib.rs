//! One shard = one core = one event loop. Sandboxes live here: made, found, timed out, removed.
//!
//! Called by `http` (through [`Host`]) and by the binary (through [`run`]). Refuses to know HTTP,
//! and to touch a sandbox from any shard but its owner: everything else is a message.
//!
//! ```text
//!  http on shard A ── Host ──▶ owner is A?  ── yes ─▶ Shard A
//!                                   │ no
//!                                   └── bounded mailbox ──▶ Shard B ── control socket ──▶ mica-vm
//! ```

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod account;
pub mod capacity;
mod cgroup;
mod choice;
mod config;
mod console;
mod error;
mod event;
mod host;
mod hours;
mod loads;
mod memo;
pub mod metrics;
mod placement;
mod pressure;
mod proc;
mod random;
mod recovery;
pub mod registry;
mod replicas;
mod rounds;
pub mod rt;
mod run;
mod sandbox;
mod shard;
mod shell;
mod stream;
mod takeover;
mod turns;
mod types;
mod uids;
mod upkeep;
mod view;
mod wake;
mod warm;
mod warmth;

pub use account::{Account, Accounts, Seat, TooFast, TooMany};
pub use config::HostConfig;
pub use error::{ConnectError, RunError, ShardError};
pub use host::{CLONES_MAX, Doing, Host, Once, OneCreate, defaults_for_agent};
pub use memo::{Digest, MemoKey};
pub use mica_numa::StopSignal;
pub use mica_storage::{
    BUILD_LOG_BYTES_MAX, BuildPhase, BuildRecord, BuildSlot, BuildStore, BuildStoreError, Built,
    BuiltDefaults, BuiltTag, BuiltTemplate, DEFAULT_TAG, Reference, Upload, UploadGrant,
};
pub use placement::WrongNode;
pub use run::run;
pub(crate) use stream::Epoch;
pub use stream::GuestStream;
pub use types::{
    BUILD_TENANT, BuiltFor, CreateRequest, HostCounters, Lifecycle, LogLine, LogSource, NEVER,
    NetworkPolicy, OnTimeout, OnceName, SandboxInfo, SandboxProcess, SnapshotInfo, TemplateInfo,
    Usage, Visitor,
};
pub use view::{HostView, NodeView, ProcessView, SandboxView, ShardView};
pub use warm::{WarmError, warm};
