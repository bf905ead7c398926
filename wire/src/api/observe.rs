//! What a sandbox used and what was written about it.
//!
//! Written by `http`. Refuses nothing.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a sandbox used at a moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct SandboxMetric {
    /// RFC 3339.
    pub timestamp: String,
    /// The same, in seconds since 1970.
    pub timestamp_unix: u64,
    /// Processors.
    pub cpu_count: u32,
    /// How busy they were, all together: 0 to 100.
    pub cpu_used_pct: f64,
    /// Bytes of memory that programs hold.
    pub mem_used: u64,
    /// Bytes of memory in all.
    pub mem_total: u64,
    /// Bytes of memory that cache files.
    pub mem_cache: u64,
    /// Bytes of the root disk that are in use.
    pub disk_used: u64,
    /// Bytes of the root disk.
    pub disk_total: u64,
}

/// The answer to `GET /sandboxes/metrics`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SandboxesWithMetrics {
    /// By id; sandboxes of which nothing is known are left out.
    pub sandboxes: BTreeMap<String, SandboxMetric>,
}

/// How much an entry of a log matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Hardly.
    Debug,
    /// As a rule.
    Info,
    /// Perhaps something is wrong.
    Warn,
    /// Something is.
    Error,
}

/// One entry of a log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LogEntry {
    /// RFC 3339. Of a line of the console: when the host first looked at it.
    pub timestamp: String,
    /// How much it matters.
    pub level: LogLevel,
    /// The text.
    pub message: String,
    /// `source`: `console` or `host`.
    pub fields: BTreeMap<String, String>,
}

/// The same in E2B's older form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SandboxLog {
    /// RFC 3339.
    pub timestamp: String,
    /// A JSON object as text: what [`LogEntry`] has, with `fields` beside the others.
    pub line: String,
}

/// The answer to `GET /sandboxes/{id}/logs`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Logs {
    /// Every entry in the older form,
    pub logs: Vec<SandboxLog>,
    /// and in the newer one.
    pub log_entries: Vec<LogEntry>,
}

/// The answer to `GET /v2/sandboxes/{id}/logs`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LogsV2 {
    /// The entries.
    pub logs: Vec<LogEntry>,
}
