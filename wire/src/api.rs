//! The JSON of the control plane, field for field as E2B's SDKs parse it.
//!
//! Called by `http`, which reads and writes it, and by `shards`, which never does. A name here is
//! a compatibility promise: SDKs fail on a missing required field, and ignore an extra one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The body of `POST /sandboxes` and `POST /v2/sandboxes`. Unknown fields are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct NewSandbox {
    /// The id or the name of a template.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// Life time in seconds. Absent: 15 on v1, 300 on v2.
    pub timeout: Option<i64>,
    /// Whether envd demands the access token. Absent: yes.
    pub secure: Option<bool>,
    /// Free labels, returned by `GET` and matched by the list filter.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Environment of every process in the sandbox.
    #[serde(rename = "envVars")]
    pub env_vars: Option<BTreeMap<String, String>>,
}

/// The answer to a create.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Overrides the client's own domain in sandbox URLs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
}

/// What a sandbox is doing, in the two words that SDKs accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SandboxState {
    /// It runs.
    Running,
    /// It is paused.
    Paused,
}

/// One entry of a list, and the answer to `GET /sandboxes/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// RFC 3339.
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
    /// Only in the answer to `GET /sandboxes/{id}`, never in a list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub envd_access_token: Option<String>,
}

/// The body of `POST /sandboxes/{id}/timeout`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct SetTimeout {
    /// Seconds from now.
    pub timeout: i64,
}

/// The body of `POST /sandboxes/{id}/connect` and `POST /v2/sandboxes/{id}/connect`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct ConnectSandbox {
    /// Seconds from now that the sandbox lives at the least. Absent: 300, on v2 alone.
    pub timeout: Option<i64>,
}

/// One entry of `GET /templates`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Template {
    /// Its id.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// The id of the build it came from.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// Number of vCPUs of its sandboxes.
    pub cpu_count: u32,
    /// Memory of its sandboxes, in MiB.
    #[serde(rename = "memoryMB")]
    pub memory_mib: u32,
    /// Root disk of its sandboxes, in MiB.
    #[serde(rename = "diskSizeMB")]
    pub disk_size_mib: u32,
    /// Always true: this host has one tenant so far.
    pub public: bool,
    /// Its name.
    pub aliases: Vec<String>,
    /// Its name.
    pub names: Vec<String>,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339.
    pub updated_at: String,
    /// Always null: there are no users.
    pub created_by: Option<()>,
    /// RFC 3339, null until the first sandbox.
    pub last_spawned_at: Option<String>,
    /// Sandboxes made from it since the daemon started.
    pub spawn_count: u64,
    /// Builds under this name.
    pub build_count: u64,
    /// See [`crate::guest::ENVD_VERSION`].
    pub envd_version: String,
    /// `ready`: a template that is not cannot be seen.
    pub build_status: String,
}
