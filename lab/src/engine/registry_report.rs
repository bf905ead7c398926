//! What the registry's operations were found to cost: rounds of all benchmarks in turns, a table, a report.
//!
//! Called by `mica bench registry`, and by the test that holds how a choice grows. Fast Sandbox's own figures stand beside
//! ours, and are of other hardware. Refuses to judge: `bench::promises` does.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;
use serde_json::{Value, json};

use super::registry::{ALL, Pool, Work};
use crate::bench::bootstrap::median;
use crate::bench::document::Document;
use crate::bench::promises::{ALLOCATIONS, OF_ROUNDS};
use crate::bench::row::{number, tenth};

/// What the figures beside ours were measured on.
const SEED_MACHINE: &str = "Apple M4 Pro, Go";

/// What two batches of each choice took of the allocator, by the benchmark's name.
pub type Allocations = BTreeMap<String, u64>;

/// What one benchmark found: ns for each operation, a figure for each batch.
#[derive(Debug)]
pub struct Found {
    work: Work,
    /// Sorted.
    times_ns: Vec<f64>,
    /// The median of the batches of each round.
    of_rounds: Vec<f64>,
}

impl Found {
    /// The time that `percent` of a hundred batches stay at or below.
    #[must_use]
    pub fn at(&self, percent: usize) -> f64 {
        let rank = (self.times_ns.len() * percent).div_ceil(100).max(1) - 1;
        self.times_ns.get(rank).copied().unwrap_or_default()
    }
}

/// A benchmark under measurement.
struct Measuring {
    pool: Pool,
    found: Found,
}

impl Measuring {
    fn new(work: Work) -> Result<Self> {
        let found = Found { work, times_ns: Vec::new(), of_rounds: Vec::new() };
        let mut new = Self { pool: Pool::new(work.hosts)?, found };
        // The first one touches the memory.
        new.batch()?;
        Ok(new)
    }

    fn batch(&mut self) -> Result<f64> {
        let batch = self.found.work.batch();
        let time = self.found.work.run(&mut self.pool, u64::try_from(batch)?)?;
        Ok(time.as_secs_f64() * 1e9 / number(batch))
    }

    fn round(&mut self, batches: usize) -> Result<()> {
        let times = (0..batches).map(|_| self.batch()).collect::<Result<Vec<_>>>()?;
        self.found.of_rounds.extend(median(times.clone()));
        self.found.times_ns.extend(times);
        self.found.times_ns.sort_unstable_by(f64::total_cmp);
        Ok(())
    }
}

/// Measures benchmarks over so many batches each, in rounds: every one has a share of its batches in each.
///
/// # Errors
/// When an operation fails.
pub fn measure(works: &[Work], batches: usize, rounds: usize) -> Result<Vec<Found>> {
    let mut all = works.iter().map(|work| Measuring::new(*work)).collect::<Result<Vec<_>>>()?;
    let rounds = rounds.min(batches).max(1);
    for round in 0..rounds {
        let share = batches * (round + 1) / rounds - batches * round / rounds;
        all.iter_mut().try_for_each(|one| one.round(share))?;
    }
    Ok(all.into_iter().map(|one| one.found).collect())
}

/// Measures all of them.
///
/// # Errors
/// When an operation fails.
pub fn measure_all(batches: usize, rounds: usize) -> Result<Vec<Found>> {
    measure(&ALL, batches, rounds)
}

/// As programs read it, and `mica bench compare` does: a report as that of the engine. `host` is the machine.
#[must_use]
pub fn document(
    found: &[Found],
    allocations: &Allocations,
    options: &Value,
    host: Value,
) -> Document {
    let mut document = Document::new("registry", options, &[]);
    document.0["host"] = host;
    document.0["results"] = found.iter().map(|one| row(one, allocations)).collect();
    document
}

/// The fields of the engine's rows, in nanoseconds: its microseconds would hide what differs.
fn row(found: &Found, allocations: &Allocations) -> Value {
    let n = found.times_ns.len();
    let mean = found.times_ns.iter().sum::<f64>() / number(n.max(1));
    let squares = found.times_ns.iter().map(|ns| (ns - mean).powi(2)).sum::<f64>();
    json!({
        "op": found.work.name,
        "case": "",
        "concurrency": 1,
        "n": n,
        "success": n,
        "failed": 0,
        "errors": [],
        "floor_p50_ns": null,
        "wall_ns": null,
        "per_op_ns": null,
        "throughput_per_s": null,
        "min_ns": tenth(found.at(0)),
        "p50_ns": tenth(found.at(50)),
        "p90_ns": tenth(found.at(90)),
        "p95_ns": tenth(found.at(95)),
        "p99_ns": tenth(found.at(99)),
        "max_ns": tenth(found.at(100)),
        "avg_ns": tenth(mean),
        "stddev_ns": tenth((squares / number(n.max(1))).sqrt()),
        "seed": {
            "of": "Fast Sandbox", "hardware": "other hardware", "machine": SEED_MACHINE,
            "avg_ns": found.work.seed_ns,
        },
        "batch": found.work.batch(),
        "hosts": found.work.hosts,
        OF_ROUNDS: found.of_rounds.iter().map(|ns| tenth(*ns)).collect::<Vec<_>>(),
        ALLOCATIONS: allocations.get(found.work.name),
    })
}

/// As people read it.
#[must_use]
pub fn table(found: &[Found], allocations: &Allocations) -> String {
    let mut text = format!(
        "{:<41} {:>5} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11}\n",
        "ns for each operation", "hosts", "p50", "p95", "p99", "max", "seed", "allocations"
    );
    for one in found {
        let [p50, p95, p99, max] = [50, 95, 99, 100].map(|percent| one.at(percent));
        let Work { name, hosts, seed_ns, .. } = one.work;
        let taken = match allocations.get(name) {
            Some(taken) => taken.to_string(),
            None if one.work.is_choice() => "not counted".to_owned(),
            None => "no choice".to_owned(),
        };
        let row = format!(
            "{name:<41} {hosts:>5} {p50:>9.1} {p95:>9.1} {p99:>9.1} {max:>9.1} {seed_ns:>9.1} {taken:>11}"
        );
        text.push_str(&row);
        text.push('\n');
    }
    let written = writeln!(
        text,
        "seed: Fast Sandbox's own figures, of other hardware: {SEED_MACHINE}\n\
         allocations: of 4,000 choices, which alone are counted"
    );
    if written.is_err() {
        unreachable!("a string takes what is written to it");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::report::Report;
    use super::super::series::Series;
    use super::*;

    /// The best of several medians each: what else runs on the machine makes a figure larger, never smaller.
    fn best(found: &Found) -> f64 {
        found.of_rounds.iter().copied().min_by(f64::total_cmp).unwrap()
    }

    #[test]
    fn a_choice_among_a_thousand_costs_what_one_among_a_hundred_does() {
        let [small, large] = [0, 3].map(|at| ALL[at]);
        assert_eq!((small.hosts, large.hosts), (100, 1000));
        let found = measure(&[small, large], 105, 5).unwrap();
        let (small, large) = (best(&found[0]), best(&found[1]));
        assert!(large < small * 3.0, "{large:.0} ns among 1000, {small:.0} ns among 100");
    }

    #[test]
    fn every_benchmark_runs_and_has_its_row() {
        let found = measure_all(5, 3).unwrap();
        assert!(found.iter().all(|one| (one.times_ns.len(), one.of_rounds.len()) == (5, 3)));
        let taken = Allocations::from([(ALL[0].name.to_owned(), 7)]);
        let document = document(&found, &taken, &json!({ "batches": 5 }), json!({ "cores": 2 }));
        assert_eq!(document.rows().count(), 11);
        for (row, work) in document.rows().zip(ALL) {
            assert_eq!(row["op"], work.name);
            assert!(row["p50_ns"].as_f64().is_some_and(|ns| ns > 0.0), "{row}");
            assert_eq!(row["seed"]["avg_ns"], work.seed_ns);
            assert!(table(&found, &taken).contains(work.name));
        }
        let of_choices = document.rows().map(|row| row["allocations"].as_u64()).collect::<Vec<_>>();
        assert_eq!(of_choices[..2], [Some(7), None]);
        let table = table(&found, &taken);
        let end = |at: usize| table.lines().nth(at).unwrap().split_whitespace().next_back();
        assert_eq!([end(1), end(2), end(5)], [Some("7"), Some("counted"), Some("choice")]);
        assert_eq!(
            (&document.0["command"], &document.0["version"]),
            (&json!("registry"), &json!(1))
        );
    }

    #[test]
    fn a_row_has_every_field_of_the_engines_in_nanoseconds() {
        let series =
            [Series { op: "pause", times: Vec::new(), floor: Vec::new(), phases: Vec::new() }];
        let report = Report { host: json!({}), series: &series, idle: None, left: None };
        let none = Allocations::new();
        let (engine, ours) =
            (report.document(&json!({})), document(&[], &none, &json!({}), json!({})));
        let row = row(&measure(&ALL[9..10], 1, 1).unwrap()[0], &none);
        for name in engine.rows().next().unwrap().as_object().unwrap().keys() {
            let name = name.replace("_us", "_ns");
            assert!(row.get(&name).is_some(), "{name} is not in {row}");
        }
        // What is beside the rows is the engine's own.
        for name in
            ["format", "version", "made_at", "command", "options", "complete", "host", "results"]
        {
            assert!(ours.0.get(name).is_some() && engine.0.get(name).is_some(), "{name}");
        }
    }
}
