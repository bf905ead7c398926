//! Templates, as clients read them.
//!
//! Read and written by `http`. Refuses nothing.

use serde::{Deserialize, Serialize};

use super::builds::TemplateBuildStatus;

/// One entry of `GET /templates`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Template {
    /// Its id.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// The id of the build it came from; of one that has none yet, of its newest.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// Number of vCPUs of its sandboxes; 0 while that is not known.
    pub cpu_count: u32,
    /// Memory of its sandboxes, in MiB; 0 while that is not known.
    #[serde(rename = "memoryMB")]
    pub memory_mib: u32,
    /// Root disk of its sandboxes, in MiB; 0 while that is not known.
    #[serde(rename = "diskSizeMB")]
    pub disk_size_mib: u32,
    /// Always true: an operator's template is everybody's.
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
    /// Builds of it that are done.
    pub build_count: u64,
    /// See [`crate::guest::ENVD_VERSION`]; empty while no build is done.
    pub envd_version: String,
    /// `ready` as soon as one of its builds is; until then, that of its newest.
    pub build_status: TemplateBuildStatus,
    /// The same in CubeSandbox's words: [`READY`](super::READY), `BUILDING` or `FAILED`.
    pub status: String,
}

/// The answer to `GET /templates/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateWithBuilds {
    /// The template.
    #[serde(flatten)]
    pub template: Template,
    /// Its builds that are known, the newest first.
    pub builds: Vec<TemplateBuild>,
}

/// One build of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct TemplateBuild {
    /// A UUID.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// How far it is.
    pub status: TemplateBuildStatus,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339.
    pub updated_at: String,
    /// RFC 3339, once it is over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<String>,
    /// Number of vCPUs of its sandboxes; 0 where that is not known.
    pub cpu_count: u32,
    /// Memory of its sandboxes, in MiB; 0 where that is not known.
    #[serde(rename = "memoryMB")]
    pub memory_mib: u32,
    /// Root disk of its sandboxes, in MiB.
    #[serde(rename = "diskSizeMB", skip_serializing_if = "Option::is_none")]
    pub disk_size_mib: Option<u32>,
    /// See [`crate::guest::ENVD_VERSION`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub envd_version: Option<String>,
}

/// The answer to `GET /templates/aliases/{alias}` and `PUT /templates/{id}/alias`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateAlias {
    /// What it stands for.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// See [`Template::public`].
    pub public: bool,
}

/// The body of `PUT /templates/{id}/alias`. It may be absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SetAlias {
    /// The name.
    pub alias: Option<String>,
}

/// The body of `PATCH /templates/{id}` and `PATCH /v2/templates/{id}`. It may be absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct UpdateTemplate {
    /// Whether others may use it.
    pub public: Option<bool>,
}

/// The answer to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateNames {
    /// Its names.
    pub names: Vec<String>,
}
