//! One row of what the doctor says.
//!
//! Made by the families of checks, printed by [`super::show`]. Refuses nothing.

use serde::Serialize;

/// How it stands with one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing is lost by it, or it cannot be told.
    Note,
    /// Mica runs, and is slower or less safe than it could be.
    Warn,
    /// `mica serve` does not run, or starts no sandbox.
    Fail,
}

impl Status {
    /// Its word.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How it stands.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What it costs; empty where all is well.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub costs: &'static str,
    /// What mends it; empty where all is well.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mend: String,
}

impl Finding {
    /// All is well.
    pub fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Status::Ok, found)
    }

    /// Worth knowing.
    pub fn note(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Status::Note, found)
    }

    /// It costs something.
    pub fn warn(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Status::Warn, found)
    }

    /// It keeps the host from running.
    pub fn fail(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Status::Fail, found)
    }

    fn new(check: &'static str, status: Status, found: impl Into<String>) -> Self {
        Self { check, status, found: found.into(), costs: "", mend: String::new() }
    }

    /// The same, with what it costs.
    #[must_use]
    pub fn costs(self, costs: &'static str) -> Self {
        Self { costs, ..self }
    }

    /// The same, with what mends it.
    #[must_use]
    pub fn mend(self, mend: impl Into<String>) -> Self {
        Self { mend: mend.into(), ..self }
    }
}
