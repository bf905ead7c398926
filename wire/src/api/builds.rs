//! Templates that clients build, as they read them: builds, their logs, and tags.
//!
//! Written by `http`, which has what clients write in its own checks. Refuses nothing. The names are those
//! of E2B's models.

use serde::{Deserialize, Serialize};

use super::LogLevel;

/// The answer to `POST /v3/templates`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateRequestResponseV3 {
    /// The template that it is a build of.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// A UUID.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// Always false: nobody else may use what is not built yet.
    pub public: bool,
    /// With the tenant in front.
    pub names: Vec<String>,
    /// The tags that the build is to have.
    pub tags: Vec<String>,
    /// Without the tenant.
    pub aliases: Vec<String>,
}

/// How far a build is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum TemplateBuildStatus {
    /// Not started, or others go first.
    Waiting,
    /// Its steps run.
    Building,
    /// Its template can be used.
    Ready,
    /// It ended early.
    Error,
}

/// One entry of a build's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct BuildLogEntry {
    /// RFC 3339.
    pub timestamp: String,
    /// The text.
    pub message: String,
    /// How much it matters.
    pub level: LogLevel,
    /// Which step said it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
}

/// Why a build ended early.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct BuildStatusReason {
    /// In words.
    pub message: String,
    /// `base`, `finalize`, or the number of the step, counted from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// The last that the step said.
    pub log_entries: Vec<BuildLogEntry>,
}

/// The answer to `GET /templates/{id}/builds/{build}/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct TemplateBuildInfo {
    /// A page of the log, as lines,
    pub logs: Vec<String>,
    /// and as entries.
    pub log_entries: Vec<BuildLogEntry>,
    /// The template that it is a build of.
    #[serde(rename = "templateID")]
    pub template_id: String,
    /// A UUID.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// How far it is.
    pub status: TemplateBuildStatus,
    /// There where `status` is `error`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<BuildStatusReason>,
}

/// The answer to `GET /templates/{id}/builds/{build}/logs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateBuildLogsResponse {
    /// The entries.
    pub logs: Vec<BuildLogEntry>,
}

/// The answer to `GET /templates/{id}/files/{hash}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateBuildFileUpload {
    /// Whether the file is there.
    pub present: bool,
    /// Where it is to go if not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
}

/// The answer to `POST /templates/tags`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct AssignedTemplateTags {
    /// The tags that moved.
    pub tags: Vec<String>,
    /// What they stand for now: a UUID.
    #[serde(rename = "buildID")]
    pub build_id: String,
}

/// One entry of `GET /templates/{id}/tags`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateTag {
    /// Its name.
    pub tag: String,
    /// What it stands for: a UUID.
    #[serde(rename = "buildID")]
    pub build_id: String,
    /// Since when, RFC 3339.
    #[serde(rename = "createdAt")]
    pub created_at: String,
}

/// The answer to `GET /templates/{id}/tags/count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateTagsCountResponse {
    /// How many tags.
    pub total: usize,
}

/// The answer to `GET /templates/{id}/tags/exists`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct TemplateTagExistsResponse {
    /// Whether the template has it.
    pub exists: bool,
    /// The tag as it would be kept.
    pub normalized_tag: String,
}

/// That a tag was given to a build.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct TemplateTagAssignment {
    /// A UUID: the same as long as the tag stays where it is.
    pub assignment_id: String,
    /// A UUID.
    pub build_id: String,
    /// RFC 3339.
    pub assigned_at: String,
    /// When the build was asked for, RFC 3339.
    pub build_created_at: String,
    /// When it was done, RFC 3339.
    pub build_finished_at: Option<String>,
}

/// The answer to `GET /templates/{id}/tags/{tag}/assignments`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateTagAssignmentsResponse {
    /// What the tag stands for now; what it stood for before is not kept.
    pub data: Vec<TemplateTagAssignment>,
    /// Always null: there is one page.
    #[serde(rename = "nextCursor")]
    pub next_cursor: Option<String>,
}

/// A tag, and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct TemplateTagGroup {
    /// Its name.
    pub tag: String,
    /// One: what was before is not kept.
    pub assignments: Vec<TemplateTagAssignment>,
    /// Always false.
    pub has_more: bool,
}

/// The answer to `GET /templates/{id}/tags/groups`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateTagGroupsResponse {
    /// Every tag.
    pub tags: Vec<TemplateTagGroup>,
    /// Always null: there is one page.
    #[serde(rename = "nextCursor")]
    pub next_cursor: Option<String>,
}
