//! Findings as text and as JSON.
//!
//! Called by [`super::run`]. Refuses nothing.

use std::fmt::Write as _;

use anyhow::{Context, Result};

use super::finding::{Finding, Status};

/// A line for each finding; below those that are not as they should be, what it costs and what mends it.
#[must_use]
pub fn text(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    let mut line = |line: std::fmt::Arguments<'_>| {
        // Writing to a string does not fail.
        text.write_fmt(line).unwrap_or_default();
    };
    for Finding { check, status, found, costs, mend } in findings {
        line(format_args!("{:<4}  {check:<width$}  {found}\n", status.word()));
        if !costs.is_empty() {
            line(format_args!("{:6}{:width$}  costs: {costs}\n", "", ""));
        }
        if !mend.is_empty() {
            line(format_args!("{:6}{:width$}  mend:  {mend}\n", "", ""));
        }
    }
    let count = |wanted| findings.iter().filter(|finding| finding.status == wanted).count();
    let (fail, warn) = (count(Status::Fail), count(Status::Warn));
    line(format_args!("\n{} checks: {fail} fail, {warn} warn\n", findings.len()));
    text
}

/// An array of objects.
///
/// # Errors
/// Never, as far as anybody knows.
pub fn json(findings: &[Finding]) -> Result<String> {
    let text = serde_json::to_string_pretty(findings).context("write the findings as JSON")?;
    Ok(text + "\n")
}
