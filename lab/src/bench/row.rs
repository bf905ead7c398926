//! One measured operation under one condition: its times, what failed, and what it is printed and written as.
//!
//! Made by the tables, read by everything that shows or compares. Refuses to leave out what failed: the counts
//! stand in every form of it.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::load::{Failures, Round};
use super::phases::{Phase, own};
use super::seeds::{self, Seed};
use crate::engine::series::percentile;

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// The operation.
    pub op: String,
    /// Under which condition, as `c=10 n=100`. With the operation it is what a row is known by.
    pub case: String,
    /// How many clients there were.
    pub concurrency: usize,
    /// The times of what succeeded.
    pub times: Vec<Duration>,
    /// From the first call to the last answer, of each round.
    pub walls: Vec<Duration>,
    /// The times of the same work as bare system calls; nothing where there is no such work.
    pub floor: Vec<Duration>,
    /// What did not succeed.
    pub failures: Failures,
    /// What somebody else's report says.
    pub seed: Option<Seed>,
    /// What the daemon says it spent the time on.
    pub phases: Vec<Phase>,
    /// Fields that only this operation has.
    pub more: Map<String, Value>,
}

impl Row {
    /// An empty one.
    #[must_use]
    pub fn new(op: &str, case: String, concurrency: usize) -> Self {
        Self { op: op.to_owned(), case, concurrency, ..Self::default() }
    }

    /// With the published figures that are found so.
    #[must_use]
    pub fn beside(mut self, by: usize, and: usize) -> Self {
        self.seed = seeds::find(&self.op, by, and);
        self
    }

    /// Takes a round in, and gives what came of it.
    pub fn add<T>(&mut self, round: Round<T>) -> Vec<T> {
        self.times.extend(round.times);
        self.walls.push(round.wall);
        self.failures.append(round.failures);
        round.values
    }

    /// Takes of what the daemon went through meanwhile what is the row's own.
    pub fn spent(&mut self, phases: &[Phase]) {
        let own = own(&self.op);
        let is_own = |phase: &&Phase| own.contains(&phase.operation.as_str());
        self.phases.extend(phases.iter().filter(is_own).cloned());
    }

    /// Sets a field of its own.
    pub fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.more.insert(name.to_owned(), value.into());
    }

    /// All rounds together.
    #[must_use]
    pub fn wall(&self) -> Duration {
        self.walls.iter().sum()
    }

    /// What succeeded in a second of all rounds.
    #[must_use]
    pub fn per_s(&self) -> Option<f64> {
        let wall = self.wall().as_secs_f64();
        (wall > 0.0).then(|| number(self.times.len()) / wall)
    }

    /// The mean time of one, of all rounds.
    #[must_use]
    pub fn per_op(&self) -> Option<Duration> {
        let count = u32::try_from(self.times.len()).ok().filter(|count| *count > 0)?;
        Some(self.wall() / count)
    }

    /// As programs read it: see `docs/benchmarks.md`.
    #[must_use]
    pub fn json(&self) -> Value {
        let failed = self.failures.total();
        let mut row = json!({
            "op": self.op,
            "case": self.case,
            "concurrency": self.concurrency,
            "n": u64::try_from(self.times.len()).unwrap_or(u64::MAX) + failed,
            "success": self.times.len(),
            "failed": failed,
            "errors": self.failures.json(),
            "floor_p50_us": (!self.floor.is_empty()).then(|| us(percentile(&self.floor, 50))),
            "wall_us": (!self.walls.is_empty()).then(|| us(self.wall())),
            "per_op_us": self.per_op().map(us),
            "throughput_per_s": self.per_s().map(tenth),
            "seed": self.seed.map(|seed| seed.json()),
        });
        let stats = Stats::of(&self.times);
        for (name, value) in [
            ("p50_us", stats.map(|s| s.p50)),
            ("p90_us", stats.map(|s| s.p90)),
            ("p95_us", stats.map(|s| s.p95)),
            ("p99_us", stats.map(|s| s.p99)),
            ("max_us", stats.map(|s| s.max)),
            ("avg_us", stats.map(|s| s.avg)),
            ("min_us", stats.map(|s| s.min)),
            ("stddev_us", stats.map(|s| s.stddev)),
        ] {
            row[name] = json!(value.map(us));
        }
        if self.walls.len() > 1 || self.concurrency > 1 {
            row["rounds"] = Stats::of(&self.walls).map_or(Value::Null, |walls| {
                json!({
                    "count": self.walls.len(), "avg_us": us(walls.avg), "min_us": us(walls.min),
                    "p50_us": us(walls.p50), "p95_us": us(walls.p95), "max_us": us(walls.max),
                })
            });
        }
        if !self.phases.is_empty() {
            row["phases"] = self.phases.iter().map(Phase::json).collect();
        }
        for (name, value) in &self.more {
            row[name] = value.clone();
        }
        row
    }
}

/// What is said of some times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Half of them are no longer.
    pub p50: Duration,
    /// And so on.
    pub p90: Duration,
    /// And so on.
    pub p95: Duration,
    /// And so on.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
    /// The mean.
    pub avg: Duration,
    /// The shortest.
    pub min: Duration,
    /// How far they lie from the mean: the standard deviation of these, not of what they are a sample of.
    pub stddev: Duration,
}

impl Stats {
    /// Of these; `None` of none.
    #[must_use]
    pub fn of(times: &[Duration]) -> Option<Self> {
        let min = *times.iter().min()?;
        let avg = times.iter().sum::<Duration>() / u32::try_from(times.len()).ok()?;
        let [p50, p90, p95, p99, max] = [50, 90, 95, 99, 100].map(|p| percentile(times, p));
        let squares = times.iter().map(|time| (time.as_secs_f64() - avg.as_secs_f64()).powi(2));
        let stddev = Duration::from_secs_f64((squares.sum::<f64>() / number(times.len())).sqrt());
        Some(Self { p50, p90, p95, p99, max, avg, min, stddev })
    }
}

/// Microseconds, to what the clock can tell.
#[must_use]
pub fn us(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e7).round() / 10.0
}

/// Milliseconds.
#[must_use]
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// To a tenth.
#[must_use]
pub fn tenth(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// A count as a number to divide.
#[must_use]
pub fn number(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn a_row_has_what_programs_read_and_what_failed() {
        let ms = Duration::from_millis;
        let mut row = Row::new("create", "c=10".to_owned(), 10).beside(10, 0);
        let mut failures = Failures::default();
        failures.add(&anyhow!("POST /sandboxes gave 503: full"));
        let times = (1..=19).map(ms).collect();
        row.add(Round { wall: ms(50), times, values: vec![(); 19], failures });
        row.set("dirty_mb", 7);
        row.floor = vec![ms(3), ms(1), ms(2)];
        let json = row.json();
        for (name, value) in [
            ("n", json!(20)),
            ("success", json!(19)),
            ("failed", json!(1)),
            ("p50_us", json!(10_000.0)),
            ("p90_us", json!(18_000.0)),
            ("p95_us", json!(19_000.0)),
            ("p99_us", json!(19_000.0)),
            ("max_us", json!(19_000.0)),
            ("avg_us", json!(10_000.0)),
            ("min_us", json!(1_000.0)),
            // Of 1 to n it is the root of (n² - 1) / 12.
            ("stddev_us", json!(5_477.2)),
            ("wall_us", json!(50_000.0)),
            ("throughput_per_s", json!(380.0)),
            ("dirty_mb", json!(7)),
            ("floor_p50_us", json!(2_000.0)),
        ] {
            assert_eq!(json[name], value, "{name} of {json}");
        }
        assert_eq!(json["errors"][0]["count"], 1);
        assert_eq!(json["seed"]["avg_ms"], 88.7);
        assert_eq!(json["rounds"]["count"], 1);
    }

    #[test]
    fn of_nothing_nothing_is_said() {
        let json = Row::new("create", String::new(), 1).json();
        for name in [
            "p50_us",
            "avg_us",
            "stddev_us",
            "wall_us",
            "throughput_per_s",
            "per_op_us",
            "seed",
            "floor_p50_us",
        ] {
            assert!(json[name].is_null(), "{name} of {json}");
        }
        assert_eq!((&json["n"], &json["success"]), (&json!(0), &json!(0)));
    }
}
