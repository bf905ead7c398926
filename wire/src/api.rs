//! The JSON of the control plane, field for field as E2B's SDKs parse it.
//!
//! Called by `http`, which reads and writes it, and by `shards`, which never does. A name here is
//! a compatibility promise: SDKs fail on a missing required field, and ignore an extra one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

mod builds;
mod host;
mod network;
mod observe;
mod templates;

pub use builds::{
    AssignedTemplateTags, BuildLogEntry, BuildStatusReason, TemplateBuildFileUpload,
    TemplateBuildInfo, TemplateBuildLogsResponse, TemplateBuildStatus, TemplateRequestResponseV3,
    TemplateTag, TemplateTagAssignment, TemplateTagAssignmentsResponse, TemplateTagExistsResponse,
    TemplateTagGroup, TemplateTagGroupsResponse, TemplateTagsCountResponse,
};
pub use host::{
    HostState, HostSummary, NodeSummary, OperationSummary, PhaseSummary, PoolSummary,
    SandboxSummary, ShardSummary,
};
pub use network::{
    EgressAction, EgressMatch, EgressRule, HeaderRule, HeaderTransform, NetworkConfig,
};
pub use observe::{
    LogEntry, LogLevel, Logs, LogsV2, SandboxLog, SandboxMetric, SandboxesWithMetrics,
};
pub use templates::{
    SetAlias, Template, TemplateAlias, TemplateBuild, TemplateNames, TemplateWithBuilds,
    UpdateTemplate,
};

/// The body of `POST /sandboxes` and `POST /v2/sandboxes`. Unknown fields are ignored.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NewSandbox {
    /// The id or the name of a template or of a snapshot.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// Life time in seconds; -1: without an end, except for E2B's clients. Absent: what the host gives, 300
    /// unless its operator says otherwise. With one of CubeSandbox's own fields, `lifecycle` say, each request
    /// to the sandbox starts it again, and an absent one is without an end.
    pub timeout: Option<i64>,
    /// Whether envd demands the access token. Absent: no on v1, yes on v2.
    pub secure: Option<bool>,
    /// Free labels, returned by `GET` and matched by the list filter.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Environment of every process in the sandbox.
    #[serde(rename = "envVars", alias = "envs")]
    pub env_vars: Option<BTreeMap<String, String>>,
    /// Pause instead of kill when the time is over. Absent: kill.
    #[serde(rename = "autoPause", alias = "auto_pause")]
    pub auto_pause: Option<bool>,
    /// `false`: keep only the disk when pausing. Only with `autoPause`, and not with `autoResume`.
    #[serde(rename = "autoPauseMemory")]
    pub auto_pause_memory: Option<bool>,
    /// Wake a paused sandbox when a request for it comes.
    #[serde(rename = "autoResume", alias = "auto_resume")]
    pub auto_resume: Option<AutoResume>,
    /// The same wishes as CubeSandbox's clients write them. They win over the flat ones.
    pub lifecycle: Option<LifecycleWish>,
    /// Whether it may reach the world. Absent: yes.
    #[serde(rename = "allow_internet_access", alias = "allowInternetAccess")]
    pub allow_internet_access: Option<bool>,
    /// Who may reach it, and whom it may reach.
    pub network: Option<NetworkConfig>,
}

/// What happens to a sandbox whose time is over, in a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum OnTimeoutWish {
    /// It ends.
    Kill,
    /// It is paused.
    Pause,
}

/// Whether a request for a paused sandbox wakes it: a flag, or an object that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged, expecting = "expected a boolean or an object with the boolean `enabled`")]
pub enum AutoResume {
    /// As old clients write it.
    Flag(bool),
    /// As newer ones do.
    Object {
        /// Whether it does.
        enabled: bool,
    },
}

impl AutoResume {
    /// Whether it is wished for.
    #[must_use]
    pub fn is_on(self) -> bool {
        match self {
            Self::Flag(on) | Self::Object { enabled: on } => on,
        }
    }
}

/// CubeSandbox's form of the wishes about a sandbox's end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LifecycleWish {
    /// What happens when the time is over.
    #[serde(rename = "onTimeout", alias = "on_timeout")]
    pub on_timeout: Option<OnTimeoutWish>,
    /// Wake a paused sandbox when a request for it comes.
    #[serde(rename = "autoResume", alias = "auto_resume")]
    pub auto_resume: Option<AutoResume>,
}

/// The answer to a create.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Sandbox {
    /// The template it was made from.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// Its id.
    #[serde(rename = "sandboxID")]
    pub sandbox_id: String,
    /// Required by every SDK, meaningless since sandbox ids are global.
    #[serde(rename = "clientID")]
    pub client_id: String,
    /// See [`crate::guest::ENVD_VERSION`].
    pub envd_version: String,
    /// The template's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// What envd requests carry as `X-Access-Token`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub envd_access_token: Option<String>,
    /// What requests to its other ports carry as `E2b-Traffic-Access-Token`, where they are not public.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traffic_access_token: Option<String>,
    /// Overrides the client's own domain in sandbox URLs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
}

/// What a sandbox is doing, in the two words that SDKs accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum SandboxState {
    /// It runs.
    Running,
    /// It is paused.
    Paused,
}

/// What the pause of a sandbox kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum SandboxPauseMode {
    /// The disk alone: it boots when it goes on, and no request wakes it.
    Filesystem,
    /// Memory and disk.
    Full,
}

/// One entry of a list, and the answer to `GET /sandboxes/{id}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct SandboxDetail {
    /// The template it was made from.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// Its id.
    #[serde(rename = "sandboxID")]
    pub sandbox_id: String,
    /// See [`Sandbox::client_id`].
    #[serde(rename = "clientID")]
    pub client_id: String,
    /// The template's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// RFC 3339.
    pub started_at: String,
    /// RFC 3339. In the year 9999: it never ends by itself.
    pub end_at: String,
    /// Number of vCPUs.
    pub cpu_count: u32,
    /// Guest memory, in MiB.
    #[serde(rename = "memoryMB")]
    pub memory_mib: u32,
    /// Root disk, in MiB.
    #[serde(rename = "diskSizeMB")]
    pub disk_size_mib: u32,
    /// Running or paused.
    pub state: SandboxState,
    /// See [`crate::guest::ENVD_VERSION`].
    pub envd_version: String,
    /// Labels given at create.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub metadata: BTreeMap<String, String>,
    /// Only in the answer to `GET /sandboxes/{id}`, never in a list. So is all that follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub envd_access_token: Option<String>,
    /// See [`Sandbox::domain`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// What happens when its time is over, and after.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lifecycle: Option<SandboxLifecycle>,
    /// What its pause kept, while it is paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pause_mode: Option<SandboxPauseMode>,
    /// Whether it may reach the world.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_internet_access: Option<bool>,
    /// Who may reach it, and whom it may reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkConfig>,
}

/// What happens to a sandbox whose time is over, in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct SandboxLifecycle {
    /// Whether a request wakes it when it is paused.
    pub auto_resume: bool,
    /// Killed or paused.
    pub on_timeout: OnTimeoutWish,
}

/// The body of `POST /sandboxes/{id}/refreshes`. It may be absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct RefreshSandbox {
    /// Seconds from now that it lives at the least. Absent, or less than that: 15.
    pub duration: Option<i64>,
}

/// The body of `POST /sandboxes/{id}/timeout`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SetTimeout {
    /// Seconds from now; -1: without an end, except for E2B's clients, to whom all below 0 is 0.
    pub timeout: i64,
}

/// The body of `POST /sandboxes/{id}/connect` and `POST /v2/sandboxes/{id}/connect`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ConnectSandbox {
    /// Seconds from now that the sandbox lives at the least, 1 or more; -1: without an end. Absent: 300.
    pub timeout: Option<i64>,
    /// `false`: boot a paused sandbox from its disk, and drop its memory, instead of going on.
    pub memory: Option<bool>,
}

/// The body of `POST /sandboxes/{id}/pause`. It may be absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PauseSandbox {
    /// `false`: keep only the disk. Absent: yes, keep the memory.
    pub memory: Option<bool>,
    /// Refuse when the agent in the sandbox does not answer.
    #[serde(rename = "requireHealthyGuest")]
    pub require_healthy_guest: Option<bool>,
}

/// The body of `POST /sandboxes/{id}/resume`. It may be absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ResumeSandbox {
    /// Seconds from now; -1: without an end. Absent: what its create asked for, and 15 at the least.
    pub timeout: Option<i64>,
    /// What happens when that time is over. Absent: what was wished for before.
    #[serde(rename = "autoPause", alias = "auto_pause")]
    pub auto_pause: Option<bool>,
    /// `false`: boot from its disk, and drop its memory, instead of going on.
    pub memory: Option<bool>,
}

/// The body of `POST /sandboxes/{id}/clone` and `POST /sandboxes/{id}/fork`. It may be absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CopySandbox {
    /// How many. Absent: 1.
    pub count: Option<i64>,
    /// Life time of the new ones in seconds. Absent: what the first one was made with.
    pub timeout: Option<i64>,
}

/// One entry of the answer to a fork: either of the two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ForkResult {
    /// It came up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<Sandbox>,
    /// It did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
}

/// An error, as the body of an answer or in a list of outcomes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ErrorBody {
    /// The HTTP status.
    pub code: u16,
    /// What to do about it.
    pub message: String,
    /// A word for programs, where clients tell this error from others of its status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_code: Option<String>,
}

/// The answer to `GET /health`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Health {
    /// Always `ok`.
    pub status: String,
    /// Sandboxes that the key of the request has, paused ones included; without one 0, and on a host
    /// that asks for none all there are.
    pub sandboxes: u32,
}

/// The body of `POST /sandboxes/{id}/snapshots`. It may be absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NewSnapshot {
    /// A label.
    pub name: Option<String>,
    /// `false`: keep only the disk.
    pub memory: Option<bool>,
}

/// A snapshot: the answer to its making, and one entry of `GET /snapshots`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// Its id, usable as a `templateID`.
    #[serde(rename = "snapshotID")]
    pub snapshot_id: String,
    /// What it is called, usable as a `templateID`, or nothing.
    pub names: Vec<String>,
    /// Always [`READY`]: one that is not cannot be seen.
    pub status: String,
    /// The sandbox it was made of.
    #[serde(rename = "originSandboxID", skip_serializing_if = "Option::is_none")]
    pub origin_sandbox_id: Option<String>,
    /// RFC 3339.
    pub created_at: String,
}

/// The only state that CubeSandbox's clients accept of a snapshot and of an operation.
pub const READY: &str = "READY";

/// The body of `POST /sandboxes/{id}/rollback`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct RollbackSandbox {
    /// One of the sandbox's own snapshots.
    #[serde(rename = "snapshotID")]
    pub snapshot_id: String,
}

/// The answer to a rollback.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct RolledBack {
    /// The sandbox, under the id it had.
    #[serde(rename = "sandboxID")]
    pub sandbox_id: String,
    /// Where it is now.
    #[serde(rename = "snapshotID")]
    pub snapshot_id: String,
    /// Names this rollback in the host's log.
    #[serde(rename = "operationID")]
    pub operation_id: String,
    /// Always [`READY`]: the answer comes when it is done.
    pub status: String,
}
