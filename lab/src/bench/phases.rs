//! What the daemon itself says an operation's time went to: sums that its `/metrics` counts, before and after.
//!
//! Called around every row, and by the engine's benchmark around what it does over HTTP. Where the daemon counts no phases there are none, and who shows them says so. Refuses to
//! guess: a phase that was not counted in between is left out.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::host::Host;

/// The family that is read.
pub const FAMILY: &str = "mica_operation_phase_seconds";

/// Seconds and counts, by operation and phase.
type Sums = BTreeMap<(String, String), (f64, f64)>;

/// What one phase of one operation took.
#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    /// The operation, by the daemon's name.
    pub operation: String,
    /// The phase.
    pub phase: String,
    /// How often it was gone through.
    pub count: f64,
    /// How long it took on average.
    pub avg_us: f64,
}

/// What the daemon calls what is timed in a row: making what is measured, and removing it, goes through phases, too.
#[must_use]
pub fn own(op: &str) -> &'static [&'static str] {
    match op {
        // Which of both it is depends on what `--template` names.
        "create" => &["create", "restore"],
        // One of `clone` is a create from the snapshot that the round begins with.
        "from_snapshot" | "create_from_dirty" | "clone" => &["restore"],
        "clone_request" => &["clone"],
        "snapshot" | "snapshot_dirty" => &["snapshot"],
        "rollback" => &["rollback"],
        "pause" => &["pause"],
        "resume" => &["resume"],
        _ => &[],
    }
}

impl Phase {
    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "operation": self.operation, "phase": self.phase, "count": self.count,
            "avg_us": (self.avg_us * 10.0).round() / 10.0,
        })
    }
}

/// What was counted until now.
#[derive(Clone, Debug, Default)]
pub struct Before(Sums);

impl Before {
    /// Looks. A host that does not answer, or counts nothing of the kind, has counted nothing.
    #[must_use]
    pub fn now(host: &Host) -> Self {
        Self::of(&host.get("/metrics").unwrap_or_default())
    }

    /// What an answer to `GET /metrics` says was counted.
    #[must_use]
    pub fn of(answer: &[u8]) -> Self {
        Self(sums(&String::from_utf8_lossy(answer)))
    }

    /// What came to it since.
    #[must_use]
    pub fn until_now(&self, host: &Host) -> Vec<Phase> {
        self.until(&Self::now(host))
    }

    /// What came to it until that was looked at.
    #[must_use]
    pub fn until(&self, later: &Self) -> Vec<Phase> {
        difference(&self.0, &later.0)
    }
}

fn difference(before: &Sums, after: &Sums) -> Vec<Phase> {
    let mut phases = Vec::new();
    for ((operation, phase), (seconds, count)) in after {
        let key = (operation.clone(), phase.clone());
        let (seconds_before, count_before) = before.get(&key).copied().unwrap_or_default();
        let count = count - count_before;
        if count > 0.0 {
            let (operation, phase) = key;
            let avg_us = (seconds - seconds_before).max(0.0) * 1e6 / count;
            phases.push(Phase { operation, phase, count, avg_us });
        }
    }
    phases
}

/// The sums and counts of the family in a text of Prometheus.
fn sums(text: &str) -> Sums {
    let mut sums = Sums::new();
    for line in text.lines() {
        let Some(rest) = line.strip_prefix(FAMILY) else { continue };
        let Some((kind, rest)) = rest.split_once('{') else { continue };
        let Some((labels, value)) = rest.rsplit_once('}') else { continue };
        let label = |name: &str| {
            let found = labels.split(',').find_map(|one| one.trim().strip_prefix(name));
            found.and_then(|rest| Some(rest.strip_prefix("=\"")?.strip_suffix('"')?.to_owned()))
        };
        let value = value.split_whitespace().next().and_then(|value| value.parse::<f64>().ok());
        let (Some(operation), Some(phase), Some(value)) =
            (label("operation"), label("phase"), value)
        else {
            continue;
        };
        let sum = sums.entry((operation, phase)).or_default();
        match kind {
            // One line for each shard, or one for all: they add up.
            "_sum" => sum.0 += value,
            "_count" => sum.1 += value,
            _ => {}
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# TYPE mica_operation_phase_seconds histogram
mica_operation_phase_seconds_bucket{operation=\"create\",phase=\"restore\",le=\"0.1\"} 4
mica_operation_phase_seconds_sum{operation=\"create\",phase=\"restore\"} 0.5
mica_operation_phase_seconds_count{operation=\"create\",phase=\"restore\"} 4
mica_operation_phase_seconds_sum{shard=\"1\", operation=\"create\", phase=\"disk\"} 0.25 1700000000
mica_operation_phase_seconds_count{shard=\"1\", operation=\"create\", phase=\"disk\"} 1 1700000000
mica_sandboxes 3
";

    #[test]
    fn phases_are_what_came_between_two_looks() {
        let before = sums(TEXT);
        let later = TEXT.replace("} 0.5", "} 0.9").replace("restore\"} 4", "restore\"} 8");
        let phases = difference(&before, &sums(&later));
        assert_eq!(phases.len(), 1, "{phases:?}");
        assert_eq!((phases[0].phase.as_str(), phases[0].count), ("restore", 4.0));
        assert!((phases[0].avg_us - 100_000.0).abs() < 1e-6, "{phases:?}");
        assert_eq!(difference(&Sums::new(), &before).len(), 2);
    }

    #[test]
    fn a_row_has_the_phases_of_what_it_times_and_no_others() {
        let phase = |operation: &str| Phase {
            operation: operation.to_owned(),
            phase: "run".to_owned(),
            count: 1.0,
            avg_us: 1.0,
        };
        let all = ["create", "restore", "snapshot", "pause", "resume", "rollback", "clone"];
        let all = all.map(phase);
        for (op, wanted) in [
            ("create", &["create", "restore"][..]),
            ("from_snapshot", &["restore"]),
            ("snapshot_dirty", &["snapshot"]),
            ("clone_request", &["clone"]),
            ("resume", &["resume"]),
            ("run_code_1", &[]),
        ] {
            let mut row = super::super::row::Row::new(op, String::new(), 1);
            row.spent(&all);
            let found: Vec<&str> = row.phases.iter().map(|one| one.operation.as_str()).collect();
            assert_eq!(found, wanted, "{op}");
        }
    }

    #[test]
    fn other_metrics_and_half_lines_are_no_phases() {
        for text in [
            "",
            "mica_sandboxes 3",
            "mica_operation_phase_seconds_sum{operation=\"a\"} 1",
            "mica_operation_phase_seconds_sum{operation=\"a\",phase=\"b\"} much",
            "<html>{}",
        ] {
            assert!(sums(text).is_empty(), "{text}");
        }
    }
}
