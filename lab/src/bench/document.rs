//! The report that a run leaves: one JSON format for all tables, `docs/benchmarks.md` describes it.
//!
//! Made by `mica bench` at a run's end, read by `compare`, `report` and programs. Refuses to read what another
//! version wrote.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::row::Row;

/// What the format is called.
pub const FORMAT: &str = "mica-bench";
/// Its version: a reader of one knows every field of it, and leaves out what it does not know.
pub const VERSION: u64 = 1;
/// Longest report that is read.
const BYTES_MAX: u64 = 64 << 20;

/// A run's report.
#[derive(Clone, Debug)]
pub struct Document(pub Value);

impl Document {
    /// Of what was measured.
    #[must_use]
    pub fn new(command: &str, options: &Value, rows: &[Row]) -> Self {
        let results: Vec<Value> = rows.iter().map(Row::json).collect();
        Self(json!({
            "format": FORMAT,
            "version": VERSION,
            "made_at": rfc3339(SystemTime::now()),
            "command": command,
            "options": options,
            "complete": true,
            "notes": [],
            "results": results,
        }))
    }

    /// Reads one.
    ///
    /// # Errors
    /// When it is none.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display();
        let length = fs::metadata(path).with_context(|| format!("read {name}"))?.len();
        ensure!(length <= BYTES_MAX, "{name} is too long for a report");
        let text = fs::read_to_string(path).with_context(|| format!("read {name}"))?;
        let value: Value = serde_json::from_str(&text).with_context(|| format!("{name}"))?;
        Self::of(value).with_context(|| format!("{name} is no report of mica bench"))
    }

    /// Checks that it is one.
    ///
    /// # Errors
    /// When it is not.
    pub fn of(value: Value) -> Result<Self> {
        // Those of `engine` had neither before there were other tables.
        let format = value.get("format").unwrap_or(&json!(FORMAT)).clone();
        let version = value.get("version").unwrap_or(&json!(VERSION)).clone();
        ensure!(format == FORMAT, "its format is {format}");
        ensure!(version == VERSION, "its version is {version}, and this program reads {VERSION}");
        let rows = value["results"].as_array().context("it has no results")?;
        ensure!(rows.iter().all(|row| row["op"].is_string()), "a result is without its operation");
        Ok(Self(value))
    }

    /// Its rows.
    pub fn rows(&self) -> impl Iterator<Item = &Value> {
        self.0["results"].as_array().into_iter().flatten()
    }

    /// Writes it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.0)? + "\n";
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }
}

/// An instant as `2026-11-22T11:56:16Z`.
#[must_use]
pub fn rfc3339(instant: SystemTime) -> String {
    let since = instant.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let (mut days, second) = (since / 86_400, since % 86_400);
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z", days + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn instants_are_those_that_date_prints() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (1_795_000_000, "2026-11-18T11:06:40Z"),
        ] {
            assert_eq!(rfc3339(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn what_is_written_is_read_and_other_things_are_not() {
        let rows = [Row::new("create", "c=1".to_owned(), 1)];
        let document = Document::new("create", &json!({ "warmup": 3 }), &rows);
        let path = std::env::temp_dir().join(format!("mica-document-{}", std::process::id()));
        document.write(&path).unwrap();
        let read = Document::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(read.0, document.0);
        assert_eq!(read.rows().count(), 1);
        for bad in [
            json!({}),
            json!({ "format": "other", "results": [] }),
            json!({ "version": 2, "results": [] }),
            json!({ "results": [{ "n": 1 }] }),
        ] {
            assert!(Document::of(bad.clone()).is_err(), "{bad}");
        }
        Document::of(json!({ "host": {}, "results": [{ "op": "pause" }] })).unwrap();
    }
}
