//! Shows templates, as a table for people and as JSON for programs.
//!
//! Called by `mica template list`. Refuses nothing.

use anyhow::{Context, Result};
use mica_storage::{ReadyWhen, Template};
use serde::Serialize;

/// One template, as `--json` prints it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row<'a> {
    name: &'a str,
    template_id: &'a str,
    vcpus: u8,
    memory_mib: u32,
    disk_mib: u64,
    ready: &'static str,
    envd_version: &'a str,
    created_unix_ms: u64,
    inputs_hash: &'a str,
}

fn row(template: &Template) -> Row<'_> {
    let manifest = template.manifest();
    Row {
        name: manifest.name.as_str(),
        template_id: &manifest.id,
        vcpus: manifest.vcpus.get(),
        memory_mib: manifest.memory.count(),
        disk_mib: manifest.disk_bytes() >> 20,
        ready: match manifest.ready {
            ReadyWhen::Agent => "agent",
            ReadyWhen::Console => "console",
        },
        envd_version: &manifest.envd_version,
        created_unix_ms: manifest.created_unix_ms,
        inputs_hash: &manifest.inputs_hash,
    }
}

/// One JSON array and a line end.
///
/// # Errors
/// When a value cannot be written as JSON.
pub fn json(templates: &[Template]) -> Result<String> {
    let rows: Vec<_> = templates.iter().map(row).collect();
    let mut text = serde_json::to_string_pretty(&rows).context("could not write the list")?;
    text.push('\n');
    Ok(text)
}

/// Aligned columns under a heading.
pub fn table(templates: &[Template]) -> String {
    let heading = ["NAME", "ID", "VCPUS", "MEMORY", "DISK", "CREATED (UTC)"].map(str::to_owned);
    let mut lines = vec![heading];
    lines.extend(templates.iter().map(row).map(|row| {
        [
            row.name.to_owned(),
            row.template_id.to_owned(),
            row.vcpus.to_string(),
            format!("{} MiB", row.memory_mib),
            format!("{} MiB", row.disk_mib),
            utc(row.created_unix_ms / 1000),
        ]
    }));
    let mut text = String::new();
    for line in &lines {
        for (column, cell) in line.iter().enumerate() {
            let width = lines.iter().map(|l| l[column].len()).max().unwrap_or(0);
            text.push_str(&format!("{cell:width$}  "));
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

/// `2026-01-31 23:59` from seconds since 1970. The days to date step is Howard Hinnant's
/// `civil_from_days`, which counts years from March so that the leap day comes last.
fn utc(seconds: u64) -> String {
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}", time / 3600, time % 3600 / 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days() {
        assert_eq!(utc(0), "1970-01-01 00:00");
        assert_eq!(utc(951_782_399), "2000-02-28 23:59");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00");
        assert_eq!(utc(1_709_251_200), "2024-03-01 00:00");
        assert_eq!(utc(4_107_542_400), "2100-03-01 00:00");
    }

    #[test]
    fn an_empty_store_is_a_heading_and_an_empty_array() {
        assert_eq!(table(&[]).lines().count(), 1);
        assert_eq!(json(&[]).unwrap(), "[]\n");
    }
}
