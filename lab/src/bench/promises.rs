//! What the project promises of its own figures, and whether reports keep it.
//!
//! Called by `mica bench check`, which ends `make bench`, and by whoever prints what is wanted beside a figure. A limit is
//! judged on the median of a report's rounds, which were taken in turns: a machine that others use is slow for a while, and
//! then some rounds are, too. Refuses to call a promise kept whose figure is not there, or is of few rounds.

use std::fmt::Write as _;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::bootstrap::median;
use super::document::Document;

/// Where a row has its figure of each round.
pub const OF_ROUNDS: &str = "of_rounds";
/// Where a row has what two batches of its operation took of the allocator.
pub const ALLOCATIONS: &str = "allocations";
/// Rounds that a median says something of.
const ROUNDS_MIN: usize = 3;

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Promise {
    /// The command whose report has the figure.
    pub report: &'static str,
    /// The row.
    pub op: &'static str,
    /// The field of the row: a list, of rounds, or one number, which is no matter of luck.
    field: &'static str,
    /// The most that it may be.
    pub most: f64,
    /// Of what.
    unit: &'static str,
    /// What it is, for people.
    what: &'static str,
}

/// Every one.
pub const ALL: [Promise; 10] = {
    const fn promise(
        (report, op, field): (&'static str, &'static str, &'static str),
        most: f64,
        unit: &'static str,
        what: &'static str,
    ) -> Promise {
        Promise { report, op, field, most, unit, what }
    }
    const SMALL: &str = "BenchmarkRegistryAllocate";
    const LARGE: &str = "BenchmarkRegistryAllocateLargePool";
    [
        promise(("registry", SMALL, OF_ROUNDS), 100.0, "ns", "choosing one of 100 hosts"),
        promise(("registry", LARGE, OF_ROUNDS), 100.0, "ns", "choosing one of 1,000 hosts"),
        promise(("registry", SMALL, ALLOCATIONS), 0.0, "allocations", "of 4,000 such choices"),
        promise(("registry", LARGE, ALLOCATIONS), 0.0, "allocations", "of 4,000 such choices"),
        promise(("scale", "health_cpu_ratio", OF_ROUNDS), 1.1, "times", "a request, 2 shards by 1"),
        promise(("scale", "create_cpu_ratio", OF_ROUNDS), 1.1, "times", "a create, 2 shards by 1"),
        promise(("scale", "crossing_adds_p50", OF_ROUNDS), 20.0, "us", "what the other shard adds"),
        promise(
            ("scale", "idle_share_of_a_core", OF_ROUNDS),
            1.0,
            "%",
            "an idle daemon, of a core",
        ),
        promise(("scale", "idle_resident", OF_ROUNDS), 60.0, "MB", "an idle daemon's memory"),
        promise(("scale", "metrics_cpu_ratio", OF_ROUNDS), 1.01, "times", "metrics on by off"),
    ]
};

/// The most that is wanted of a figure that has rounds.
#[must_use]
pub fn most(report: &str, op: &str) -> Option<f64> {
    let same =
        |promise: &&Promise| (promise.report, promise.op, promise.field) == (report, op, OF_ROUNDS);
    ALL.iter().find(same).map(|promise| promise.most)
}

/// A figure, and what the rounds made of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    /// What is judged.
    pub median: f64,
    /// The smallest of the rounds.
    pub low: f64,
    /// The largest.
    pub high: f64,
    /// How many; none of a number that is no matter of luck.
    pub rounds: Option<usize>,
}

/// A promise, and what a report has of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    /// What was promised.
    pub promise: Promise,
    /// What there is, or why it cannot be judged.
    pub found: Result<Figure, String>,
}

impl Judged {
    /// Whether it is kept.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.found.as_ref().is_ok_and(|figure| figure.median <= self.promise.most)
    }

    fn line(&self) -> String {
        let Promise { report, op, most, unit, what, .. } = self.promise;
        let word = if self.is_kept() { "kept" } else { "BROKEN" };
        let begin = format!("{word:<7} {report:<9} {op:<35}");
        match &self.found {
            Err(why) => format!("{begin} {why} ({what}, <= {most} {unit})"),
            Ok(Figure { median, low, high, rounds }) => {
                let spread = rounds.map_or_else(String::new, |rounds| {
                    format!("; {rounds} rounds, {} to {}", shown(*low), shown(*high))
                });
                format!("{begin} {:>8} {unit} <= {most} ({what}{spread})", shown(*median))
            }
        }
    }
}

/// A figure with so many digits that one just above its limit is not shown as the limit.
fn shown(value: f64) -> String {
    if value.abs() < 10.0 { format!("{value:.4}") } else { format!("{value:.1}") }
}

/// Judges what is promised of these reports.
///
/// # Errors
/// When nothing is: a gate that held nothing is not passed.
pub fn judge(documents: &[Document]) -> Result<Vec<Judged>> {
    let of = |document: &Document| -> Vec<Judged> {
        let own = |promise: &&Promise| document.0["command"] == promise.report;
        ALL.iter().filter(own).map(|promise| judged(*promise, document)).collect()
    };
    let all: Vec<Judged> = documents.iter().flat_map(of).collect();
    ensure!(
        !all.is_empty(),
        "nothing is promised of these reports: take those of registry and scale"
    );
    Ok(all)
}

fn judged(promise: Promise, document: &Document) -> Judged {
    let found = if document.0["complete"] == true {
        let row = document.rows().find(|row| row["op"] == promise.op);
        row.ok_or_else(|| "the report has no such row".to_owned())
            .and_then(|row| figure(&row[promise.field], promise.field))
    } else {
        Err("the run did not come to its end".to_owned())
    };
    Judged { promise, found }
}

fn figure(value: &Value, field: &str) -> Result<Figure, String> {
    if let Some(one) = value.as_f64() {
        return Ok(Figure { median: one, low: one, high: one, rounds: None });
    }
    let missing = || format!("the row has no {field}");
    let values: Option<Vec<f64>> =
        value.as_array().ok_or_else(missing)?.iter().map(Value::as_f64).collect();
    let values = values.ok_or_else(|| format!("a round of {field} is no number"))?;
    let rounds = values.len();
    if rounds < ROUNDS_MIN {
        return Err(format!("{rounds} rounds are too few, of {ROUNDS_MIN} at least"));
    }
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let median = median(values).ok_or_else(missing)?;
    Ok(Figure { median, low, high, rounds: Some(rounds) })
}

/// A line for each.
#[must_use]
pub fn text(all: &[Judged]) -> String {
    let mut text = String::new();
    for one in all {
        if writeln!(text, "{}", one.line()).is_err() {
            unreachable!("a string takes what is written to it");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scale(change: impl Fn(&mut Value)) -> Document {
        let row = |op: &str, of_rounds: [f64; 5]| json!({ "op": op, "of_rounds": of_rounds });
        let mut report = json!({
            "command": "scale", "complete": true,
            "results": [
                row("health_cpu_ratio", [1.3, 0.9, 1.1, 1.0, 1.2]),
                row("create_cpu_ratio", [1.0; 5]),
                // Two rounds while the machine did something else.
                row("crossing_adds_p50", [18.0, 400.0, 20.0, 19.0, 90.0]),
                row("idle_share_of_a_core", [0.3; 5]),
                row("idle_resident", [51.0; 5]),
                row("metrics_cpu_ratio", [1.0, 1.005, 1.01, 1.02, 1.03]),
            ],
        });
        change(&mut report);
        Document::of(report).unwrap()
    }

    fn registry(ns: [f64; 3], allocations: &Value) -> Document {
        let row = |op: &str| json!({ "op": op, "of_rounds": ns, "allocations": allocations });
        let rows = ["BenchmarkRegistryAllocate", "BenchmarkRegistryAllocateLargePool"].map(row);
        let report = json!({ "command": "registry", "complete": true, "results": rows });
        Document::of(report).unwrap()
    }

    fn broken(documents: &[Document]) -> Vec<&'static str> {
        let all = judge(documents).unwrap();
        all.iter().filter(|one| !one.is_kept()).map(|one| one.promise.op).collect()
    }

    #[test]
    fn what_is_at_its_limit_is_kept_whatever_single_rounds_were() {
        let all = [registry([90.0, 100.0, 900.0], &json!(0)), scale(|_| ())];
        assert!(broken(&all).is_empty(), "{}", text(&judge(&all).unwrap()));
        assert_eq!(judge(&all).unwrap().len(), ALL.len());
        let text = text(&judge(&all).unwrap());
        assert_eq!(text.lines().filter(|line| line.starts_with("kept ")).count(), ALL.len());
        let crossing = text.lines().find(|line| line.contains("crossing_adds_p50")).unwrap();
        let end = "20.0 us <= 20 (what the other shard adds; 5 rounds, 18.0 to 400.0)";
        assert!(crossing.ends_with(end), "{crossing}");
    }

    #[test]
    fn each_promise_can_be_broken() {
        for (at, above) in [(0, 1.11), (1, 1.11), (2, 20.1), (3, 1.1), (4, 60.1), (5, 1.011)] {
            let slow =
                scale(|report| report["results"][at]["of_rounds"] = json!([0.0, above, above]));
            let name = ["health_cpu_ratio", "create_cpu_ratio", "crossing_adds_p50"]
                .into_iter()
                .chain(["idle_share_of_a_core", "idle_resident", "metrics_cpu_ratio"])
                .nth(at);
            assert_eq!(broken(std::slice::from_ref(&slow)), [name.unwrap()]);
            let text = text(&judge(&[slow]).unwrap());
            assert_eq!(
                text.lines().filter(|line| line.starts_with("BROKEN ")).count(),
                1,
                "{text}"
            );
        }
        let little =
            scale(|report| report["results"][5]["of_rounds"] = json!([1.0103, 1.0103, 1.0103]));
        assert!(text(&judge(&[little]).unwrap()).contains(" 1.0103 times <= 1.01 "));
        assert_eq!(broken(&[registry([99.0, 101.0, 101.0], &json!(0))]).len(), 2);
        assert_eq!(broken(&[registry([50.0; 3], &json!(1))]).len(), 2);
    }

    #[test]
    fn what_is_not_there_is_not_kept() {
        let why = |document: Document| text(&judge(&[document]).unwrap());
        let gone = scale(|report| drop(report["results"].as_array_mut().unwrap().remove(2)));
        assert!(
            why(gone).contains("the report has no such row (what the other shard adds, <= 20 us)")
        );
        let few = scale(|report| report["results"][0]["of_rounds"] = json!([1.0, 1.0]));
        assert!(why(few).contains("2 rounds are too few, of 3 at least"));
        let none = scale(|report| report["results"][0]["of_rounds"] = json!([1.0, null, 1.0]));
        assert!(why(none).contains("a round of of_rounds is no number"));
        assert!(why(registry([50.0; 3], &Value::Null)).contains("the row has no allocations"));
        let cut = scale(|report| report["complete"] = json!(false));
        assert_eq!(broken(&[cut]).len(), 6);
        let engine = Document::of(json!({ "command": "engine", "complete": true, "results": [] }));
        assert!(judge(&[engine.unwrap()]).is_err());
        assert!(judge(&[]).is_err());
    }

    #[test]
    fn what_is_wanted_is_said_of_what_is_promised() {
        assert_eq!(most("scale", "idle_resident"), Some(60.0));
        assert_eq!(most("scale", "hand_over_p50"), None);
        assert_eq!(most("registry", "BenchmarkRegistryAllocate"), Some(100.0));
    }
}
