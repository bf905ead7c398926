//! Whether one run is worse than another: row by row, by thresholds.
//!
//! Called by `mica bench compare`, in CI and by people. A row that is gone is as bad as one that is slow. Refuses
//! reports in which there is nothing to compare.

use std::fmt::Write as _;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::document::Document;

/// How much worse is too much: ratios of the second run to the first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholds {
    /// Of the 95th percentile of times, at most.
    pub p95_max: f64,
    /// Of bytes, at most.
    pub memory_max: f64,
    /// Of what is done in a second, at least.
    pub throughput_min: f64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self { p95_max: 1.2, memory_max: 1.5, throughput_min: 0.8 }
    }
}

/// What is compared: a name for people, the fields that hold it, and which way is worse.
struct Measure {
    name: &'static str,
    /// Each with what it is in the unit of its kind.
    fields: &'static [(&'static str, f64)],
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// In microseconds.
    Time,
    /// In bytes.
    Memory,
    /// In a second.
    Throughput,
}

const MEASURES: [Measure; 3] = [
    Measure { name: "p95", fields: &[("p95_us", 1.0), ("p95_ns", 1e-3)], kind: Kind::Time },
    Measure {
        name: "memory",
        fields: &[("bytes_per_sandbox", 1.0), ("bytes", 1.0)],
        kind: Kind::Memory,
    },
    Measure {
        name: "per s",
        fields: &[("throughput_per_s", 1.0), ("per_s", 1.0)],
        kind: Kind::Throughput,
    },
];

/// One figure of one row, in both runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// Operation and case.
    pub row: String,
    /// Which figure.
    pub measure: &'static str,
    /// What it was.
    pub before: f64,
    /// What it is.
    pub after: f64,
    /// Whether that is too much worse.
    pub is_worse: bool,
}

/// What came of a comparison.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    /// Every figure that both have.
    pub pairs: Vec<Pair>,
    /// Why the second run is not good enough. Empty if it is.
    pub reasons: Vec<String>,
    /// What else is to be known.
    pub notes: Vec<String>,
}

/// Compares `after` with `before`.
///
/// # Errors
/// When `before` has no rows, or there is no figure in them to compare: a gate that held nothing is not passed.
pub fn compare(before: &Document, after: &Document, limits: Thresholds) -> Result<Verdict> {
    ensure!(before.rows().next().is_some(), "the first report has no rows");
    let mut verdict = Verdict::default();
    for (document, which) in [(before, "first"), (after, "second")] {
        if document.0["complete"] == Value::Bool(false) {
            verdict.notes.push(format!("the {which} run did not come to its end"));
        }
    }
    if before.0["host"]["cpu"] != after.0["host"]["cpu"] {
        verdict.notes.push("the runs are of different processors: ratios say little".to_owned());
    }
    for row in before.rows() {
        let name = name_of(row);
        match after.rows().find(|other| name_of(other) == name) {
            Some(other) => verdict.row(&name, row, other, limits),
            None => verdict.reasons.push(format!("{name}: the second run has no such row")),
        }
    }
    let something = !verdict.pairs.is_empty() || !verdict.reasons.is_empty();
    let command = before.0["command"].as_str().unwrap_or("no command");
    ensure!(something, "there is nothing to compare in a report of {command}");
    for row in after.rows().map(name_of) {
        if before.rows().all(|other| name_of(other) != row) {
            verdict.notes.push(format!("{row} is only in the second run"));
        }
    }
    Ok(verdict)
}

impl Verdict {
    fn row(&mut self, name: &str, before: &Value, after: &Value, limits: Thresholds) {
        let failed = |row: &Value| row["failed"].as_u64().unwrap_or(0);
        let (failed_before, failed_after) = (failed(before), failed(after));
        if failed_after > failed_before {
            let reason = format!("{name}: {failed_after} requests failed, before {failed_before}");
            self.reasons.push(reason);
        }
        for measure in &MEASURES {
            let figure = |row: &Value| {
                let mut fields = measure.fields.iter();
                fields.find_map(|(field, unit)| Some(row[*field].as_f64()? * unit))
            };
            match (figure(before), figure(after)) {
                (Some(was), Some(is)) => self.pair(name, measure, was, is, limits),
                (Some(_), None) => {
                    let reason = format!("{name}: the second run has no {}", measure.name);
                    self.reasons.push(reason);
                }
                (None, _) => {}
            }
        }
    }

    fn pair(&mut self, row: &str, measure: &Measure, before: f64, after: f64, limits: Thresholds) {
        let Measure { name, kind, .. } = measure;
        if before <= 0.0 {
            // Of memory that is lost in the noise of the machine there is no ratio.
            self.notes.push(format!("{row}: {name} was {before}, which has no ratio"));
            return;
        }
        let ratio = after / before;
        let (is_worse, limit) = match kind {
            Kind::Time => (ratio > limits.p95_max, format!("> {}", limits.p95_max)),
            Kind::Memory => (ratio > limits.memory_max, format!("> {}", limits.memory_max)),
            Kind::Throughput => {
                (ratio < limits.throughput_min, format!("< {}", limits.throughput_min))
            }
        };
        if is_worse {
            let (was, is) = (shown(*kind, before), shown(*kind, after));
            self.reasons.push(format!("{row}: {name} went from {was} to {is}: {ratio:.2} {limit}"));
        }
        let (row, measure) = (row.to_owned(), *name);
        self.pairs.push(Pair { row, measure, before, after, is_worse });
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!(
            "{:<36} {:<7} {:>12} {:>12} {:>7}\n",
            "row", "figure", "before", "after", "ratio"
        );
        for Pair { row, measure, before, after, is_worse } in &self.pairs {
            let kind = MEASURES.iter().find(|known| known.name == *measure);
            let kind = kind.map_or(Kind::Throughput, |known| known.kind);
            let (was, is) = (shown(kind, *before), shown(kind, *after));
            let mark = if *is_worse { "  worse" } else { "" };
            let ratio = after / before;
            add(
                &mut text,
                format_args!("{row:<36} {measure:<7} {was:>12} {is:>12} {ratio:>7.2}{mark}\n"),
            );
        }
        for note in &self.notes {
            add(&mut text, format_args!("note: {note}\n"));
        }
        for reason in &self.reasons {
            add(&mut text, format_args!("FAILED {reason}\n"));
        }
        if self.reasons.is_empty() {
            text.push_str("nothing is worse than the thresholds\n");
        }
        text
    }
}

fn name_of(row: &Value) -> String {
    let text = |field: &str| row[field].as_str().unwrap_or_default();
    format!("{} {}", text("op"), text("case")).trim_end().to_owned()
}

fn shown(kind: Kind, value: f64) -> String {
    match kind {
        Kind::Time if value >= 1e3 => format!("{:.2} ms", value / 1e3),
        Kind::Time if value >= 10.0 => format!("{value:.1} us"),
        Kind::Time => format!("{:.1} ns", value * 1e3),
        Kind::Memory => format!("{:.2} MiB", value / f64::from(1 << 20)),
        Kind::Throughput => format!("{value:.1} /s"),
    }
}

fn add(text: &mut String, what: std::fmt::Arguments<'_>) {
    if text.write_fmt(what).is_err() {
        unreachable!("a string takes what is written to it");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn document(rows: Value) -> Document {
        Document::of(json!({ "format": "mica-bench", "version": 1, "results": rows })).unwrap()
    }

    fn create(p95_us: f64, per_s: f64) -> Value {
        json!([{ "op": "create", "case": "c=1", "p95_us": p95_us, "throughput_per_s": per_s, "failed": 0 }])
    }

    fn reasons(before: Value, after: Value) -> Vec<String> {
        let (before, after) = (document(before), document(after));
        compare(&before, &after, Thresholds::default()).unwrap().reasons
    }

    #[test]
    fn what_is_as_good_or_better_passes() {
        assert_eq!(reasons(create(1000.0, 50.0), create(1000.0, 50.0)), [""; 0]);
        assert_eq!(reasons(create(1000.0, 50.0), create(1.0, 5000.0)), [""; 0]);
        // At the threshold it is not over it.
        assert_eq!(reasons(create(1000.0, 50.0), create(1200.0, 40.0)), [""; 0]);
    }

    #[test]
    fn a_longer_p95_fails() {
        let found = reasons(create(1000.0, 50.0), create(1201.0, 50.0));
        assert_eq!(found, ["create c=1: p95 went from 1.00 ms to 1.20 ms: 1.20 > 1.2"]);
    }

    #[test]
    fn less_throughput_fails() {
        let found = reasons(create(1000.0, 50.0), create(1000.0, 39.0));
        assert_eq!(found, ["create c=1: per s went from 50.0 /s to 39.0 /s: 0.78 < 0.8"]);
        // Rows of `exec` have it under another name.
        let exec = |per_s: f64| json!([{ "op": "command_1", "per_s": per_s }]);
        assert_eq!(reasons(exec(10.0), exec(7.0)).len(), 1);
        assert_eq!(reasons(exec(7.0), exec(10.0)).len(), 0);
    }

    #[test]
    fn more_memory_fails() {
        let memory = |bytes: i64| json!([{ "op": "density", "case": "live=100", "bytes_per_sandbox": bytes }]);
        let found = reasons(memory(1 << 20), memory(1_600_000));
        assert_eq!(found, ["density live=100: memory went from 1.00 MiB to 1.53 MiB: 1.53 > 1.5"]);
        assert_eq!(reasons(memory(1_600_000), memory(1 << 20)).len(), 0);
        let engine = |bytes: i64| json!([{ "op": "idle_bytes_per_sandbox", "bytes": bytes }]);
        assert_eq!(reasons(engine(100), engine(151)).len(), 1);
        // Noise below zero has no ratio, and is said.
        let noise = |bytes: i64| {
            let both = [memory(bytes)[0].clone(), create(1.0, 1.0)[0].clone()];
            document(json!(both))
        };
        let (before, after) = (noise(-5), noise(1 << 20));
        let verdict = compare(&before, &after, Thresholds::default()).unwrap();
        assert!(verdict.reasons.is_empty());
        assert_eq!(verdict.notes.len(), 1, "{verdict:?}");
    }

    #[test]
    fn times_in_nanoseconds_are_times() {
        let registry =
            |p95_ns: f64| json!([{ "op": "BenchmarkRegistryAllocate", "p95_ns": p95_ns }]);
        assert_eq!(reasons(registry(50.0), registry(60.0)), [""; 0]);
        let found = reasons(registry(50.0), registry(61.0));
        let wanted = "BenchmarkRegistryAllocate: p95 went from 50.0 ns to 61.0 ns: 1.22 > 1.2";
        assert_eq!(found, [wanted]);
        // Whatever the unit of either: 50 ns, and then 61.
        let engine = json!([{ "op": "BenchmarkRegistryAllocate", "p95_us": 0.061 }]);
        assert_eq!(reasons(registry(50.0), engine), [wanted]);
    }

    #[test]
    fn a_gate_that_compared_nothing_is_not_passed() {
        let ratios =
            json!([{ "op": "create c=1", "a_median_us": 1.0, "b_median_us": 2.0, "ratio": 2.0 }]);
        let mut turns = document(ratios);
        turns.0["command"] = json!("ab");
        let error = compare(&turns, &turns, Thresholds::default()).unwrap_err().to_string();
        assert_eq!(error, "there is nothing to compare in a report of ab");
        let noise = document(json!([{ "op": "density", "bytes_per_sandbox": -5 }]));
        assert!(compare(&noise, &noise, Thresholds::default()).is_err());
    }

    #[test]
    fn what_is_missing_or_fails_more_often_fails() {
        let both = json!([{ "op": "create", "case": "c=1", "p95_us": 1 },
            { "op": "create", "case": "c=10", "p95_us": 1 }]);
        let one = json!([{ "op": "create", "case": "c=1", "p95_us": 1 }]);
        let found = reasons(both.clone(), one.clone());
        assert_eq!(found, ["create c=10: the second run has no such row"]);
        assert_eq!(reasons(one.clone(), both), [""; 0]);
        let failing = json!([{ "op": "create", "case": "c=1", "p95_us": 1, "failed": 2 }]);
        assert_eq!(reasons(one.clone(), failing), ["create c=1: 2 requests failed, before 0"]);
        let empty = json!([{ "op": "create", "case": "c=1", "p95_us": null }]);
        assert_eq!(reasons(one, empty), ["create c=1: the second run has no p95"]);
        assert!(
            compare(&document(json!([])), &document(json!([])), Thresholds::default()).is_err()
        );
    }

    #[test]
    fn thresholds_are_flags_and_the_table_has_every_figure() {
        let (before, after) = (document(create(1000.0, 50.0)), document(create(1900.0, 30.0)));
        let limits = Thresholds { p95_max: 2.0, throughput_min: 0.5, ..Thresholds::default() };
        let verdict = compare(&before, &after, limits).unwrap();
        assert!(verdict.reasons.is_empty(), "{verdict:?}");
        let text = verdict.text();
        assert!(text.contains("1.90") && text.contains("0.60"), "{text}");
        let strict = compare(&before, &after, Thresholds::default()).unwrap();
        assert_eq!(strict.text().matches("FAILED").count(), 2, "{}", strict.text());
        assert_eq!(strict.text().matches("  worse").count(), 2, "{}", strict.text());
    }
}
