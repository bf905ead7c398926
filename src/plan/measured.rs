//! What things cost, and how that is known: defaults, what an operator says, and reports of `mica bench`.
//!
//! Called by `mica plan` with the files of `--measured`. Refuses reports that have none of the figures it looks for,
//! and to call a time that went by the time of a processor: where one stands in for the other, it says so.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use mica_shards::capacity::UnitCosts;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::files;

const MIB: f64 = 1024.0 * 1024.0;

/// Where each comes from is in docs/capacity.md.
const DEFAULTS: UnitCosts = UnitCosts {
    base_bytes: 6.0 * 1024.0 * MIB,
    idle_bytes: 4_271_872.0,
    used_bytes: 24.0 * MIB,
    create_cpu_ms: 20.0,
    create_shard_cpu_ms: 1.8,
    exec_cpu_ms: 5.0,
    disk_bytes: 16.0 * MIB,
    snapshot_bytes: 8.0 * MIB,
};

/// One of the unit costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cost {
    Base,
    Idle,
    Used,
    Create,
    CreateShard,
    Exec,
    Disk,
    Snapshot,
}

const COSTS: [Cost; 8] = [
    Cost::Base,
    Cost::Idle,
    Cost::Used,
    Cost::Create,
    Cost::CreateShard,
    Cost::Exec,
    Cost::Disk,
    Cost::Snapshot,
];

impl Cost {
    /// As files have it.
    fn name(self) -> &'static str {
        match self {
            Self::Base => "base_bytes",
            Self::Idle => "idle_bytes",
            Self::Used => "used_bytes",
            Self::Create => "create_cpu_ms",
            Self::CreateShard => "create_shard_cpu_ms",
            Self::Exec => "exec_cpu_ms",
            Self::Disk => "disk_bytes",
            Self::Snapshot => "snapshot_bytes",
        }
    }

    fn of(self, costs: &mut UnitCosts) -> &mut f64 {
        match self {
            Self::Base => &mut costs.base_bytes,
            Self::Idle => &mut costs.idle_bytes,
            Self::Used => &mut costs.used_bytes,
            Self::Create => &mut costs.create_cpu_ms,
            Self::CreateShard => &mut costs.create_shard_cpu_ms,
            Self::Exec => &mut costs.exec_cpu_ms,
            Self::Disk => &mut costs.disk_bytes,
            Self::Snapshot => &mut costs.snapshot_bytes,
        }
    }
}

/// How a cost is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Assumed,
    /// An object of unit costs says so.
    Said,
    /// A time that went by, taken for a processor's.
    WallTime,
    ProcessorTime,
    /// Memory, or what a snapshot holds of it.
    Bytes,
    /// Of others of these.
    Derived,
}

impl Known {
    fn word(self) -> &'static str {
        match self {
            Self::Assumed => "assumed",
            Self::Said => "said",
            Self::WallTime => "wall time",
            Self::ProcessorTime => "processor time",
            Self::Bytes => "bytes",
            Self::Derived => "derived",
        }
    }
}

/// A cost that a file gives.
type Figure = (Cost, f64, Known);

/// What things cost, with where each cost comes from.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) costs: UnitCosts,
    /// In the order of [`COSTS`], with the file where there was one.
    sources: [(Known, Option<String>); COSTS.len()],
}

impl Measured {
    /// What is thought where nobody measured.
    fn assumed() -> Self {
        let source = |cost| match cost {
            Cost::Create | Cost::CreateShard => (Known::WallTime, None),
            Cost::Idle => (Known::Bytes, None),
            _ => (Known::Assumed, None),
        };
        Self { costs: DEFAULTS, sources: COSTS.map(source) }
    }

    /// What these files say, in the place of what is assumed. `dirty_mb`: which snapshots are like the operator's.
    pub(super) fn read(paths: &[std::path::PathBuf], dirty_mb: Option<u32>) -> Result<Self> {
        let mut measured = Self::assumed();
        for path in paths {
            let found = files::read(path)?;
            let name = path.display().to_string();
            let figures = figures(found, path, dirty_mb)?;
            for (cost, value, known) in figures {
                measured.take(cost, value, known, Some(name.clone()));
            }
        }
        measured.derive();
        Ok(measured)
    }

    fn known(&self, cost: Cost) -> Known {
        self.sources[cost as usize].0
    }

    /// Later files win, but a time that went by never over a processor's.
    fn take(&mut self, cost: Cost, value: f64, known: Known, file: Option<String>) {
        if known == Known::WallTime && self.known(cost) == Known::ProcessorTime {
            return;
        }
        *cost.of(&mut self.costs) = value;
        self.sources[cost as usize] = (known, file);
    }

    /// One that has run code holds what an idle one does and what it wrote, which is what a snapshot of it holds.
    fn derive(&mut self) {
        if matches!(self.known(Cost::Used), Known::Said | Known::Bytes) {
            return;
        }
        let UnitCosts { idle_bytes, used_bytes, snapshot_bytes, .. } = self.costs;
        if self.known(Cost::Snapshot) == Known::Bytes {
            self.take(Cost::Used, idle_bytes + snapshot_bytes, Known::Derived, None);
        } else if idle_bytes > used_bytes {
            self.take(Cost::Used, idle_bytes, Known::Derived, None);
        }
    }

    /// What is to be said of times that are none of a processor.
    pub(super) fn note(&self) -> Option<String> {
        let is_wall = |cost: &Cost| self.known(*cost) == Known::WallTime;
        let names: Vec<_> = COSTS.into_iter().filter(is_wall).map(Cost::name).collect();
        let stand = if names.len() == 1 {
            "is a wall time that stands"
        } else {
            "are wall times that stand"
        };
        (!names.is_empty()).then(|| {
            format!(
                "{} {stand} in for processor time, which is at most as long.",
                names.join(" and ")
            )
        })
    }

    /// As a file has them.
    pub(super) fn costs_json(&self) -> Value {
        let mut costs = self.costs;
        let field = |cost: Cost| (cost.name().to_owned(), json!(*cost.of(&mut costs)));
        Value::Object(COSTS.into_iter().map(field).collect::<Map<_, _>>())
    }

    /// How each is known.
    pub(super) fn sources_json(&self) -> Value {
        let field = |(cost, (known, file)): (Cost, &(Known, Option<String>))| {
            (cost.name().to_owned(), json!({ "known": known.word(), "file": file }))
        };
        Value::Object(COSTS.into_iter().zip(&self.sources).map(field).collect::<Map<_, _>>())
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct CostsFile {
    base_bytes: Option<f64>,
    idle_bytes: Option<f64>,
    used_bytes: Option<f64>,
    create_cpu_ms: Option<f64>,
    create_shard_cpu_ms: Option<f64>,
    exec_cpu_ms: Option<f64>,
    disk_bytes: Option<f64>,
    snapshot_bytes: Option<f64>,
}

/// What a file gives.
fn figures(found: Value, path: &Path, dirty_mb: Option<u32>) -> Result<Vec<Figure>> {
    let name = path.display();
    if found.get("results").is_some() {
        return report(&found, dirty_mb)
            .with_context(|| format!("{name} is a report without what a plan needs"));
    }
    let said: CostsFile = serde_json::from_value(found)
        .with_context(|| format!("{name} holds no unit costs: see docs/capacity.md"))?;
    let all = [
        (Cost::Base, said.base_bytes),
        (Cost::Idle, said.idle_bytes),
        (Cost::Used, said.used_bytes),
        (Cost::Create, said.create_cpu_ms),
        (Cost::CreateShard, said.create_shard_cpu_ms),
        (Cost::Exec, said.exec_cpu_ms),
        (Cost::Disk, said.disk_bytes),
        (Cost::Snapshot, said.snapshot_bytes),
    ];
    Ok(all.into_iter().filter_map(|(cost, value)| Some((cost, value?, Known::Said))).collect())
}

/// What a report of `mica bench` says, whichever it is.
fn report(report: &Value, dirty_mb: Option<u32>) -> Result<Vec<Figure>> {
    let rows = report["results"].as_array().context("its results are not a list")?;
    let mut figures = engine(report, rows);
    figures.extend(scale(rows));
    figures.extend(create(rows));
    figures.extend(density(rows, "density", Cost::Idle)?);
    figures.extend(density(rows, "density_after_code", Cost::Used)?);
    figures.extend(dirty(rows, dirty_mb)?);
    if figures.is_empty() {
        bail!(
            "it has neither idle_bytes_per_sandbox nor the operations create_http, restore_pool_hit, \
             restore_pool_miss and destroy, nor rows of dirty, density or scale, nor cpu_us_per_create in rows \
             of create, which has it where the daemon is seen and no create failed: make one with \
             `mica bench engine --json FILE`, or see docs/capacity.md"
        );
    }
    Ok(figures)
}

/// What a report of the engine says. Its times are times that went by, and a processor worked at most as long:
/// the plan errs on the side of too many hosts.
fn engine(report: &Value, rows: &[Value]) -> Vec<Figure> {
    let ms = |op: &str| {
        let row = rows.iter().find(|row| row["op"] == op)?;
        row["p50_us"].as_f64().map(|us| us / 1000.0)
    };
    let idle = report["idle_bytes_per_sandbox"].as_f64();
    let mut figures: Vec<Figure> =
        idle.map(|bytes| (Cost::Idle, bytes, Known::Bytes)).into_iter().collect();
    if let Some(ms) = ms("create_http").or_else(|| ms("restore_pool_hit")) {
        figures.push((Cost::CreateShard, ms, Known::WallTime));
    }
    // A miss makes the VM process that a hit finds made: over a life both are done once.
    if let (Some(miss), Some(destroy)) = (ms("restore_pool_miss"), ms("destroy")) {
        let over_http = ms("create_http").zip(ms("restore_pool_hit"));
        let http = over_http.map_or(0.0, |(http, hit)| (http - hit).max(0.0));
        figures.push((Cost::Create, miss + destroy + http, Known::WallTime));
    }
    figures
}

/// Processor time of the daemon's threads for a create: the shard's part. With two shards, where there are two.
fn scale(rows: &[Value]) -> Option<Figure> {
    let us = |name: &str| rows.iter().find(|row| row["figure"] == name)?["value"].as_f64();
    let us = us("create_cpu_2_shards").or_else(|| us("create_cpu_1_shard"))?;
    Some((Cost::CreateShard, us / 1000.0, Known::ProcessorTime))
}

/// Processor time of a life that runs no code, and the daemon's part of it, from the row that has the most lives.
fn create(rows: &[Value]) -> Vec<Figure> {
    let us = |row: &Value, name: &str| row[name].as_f64().filter(|us| *us > 0.0);
    let measured = rows.iter().filter(|row| row["op"] == "create" && row["failed"] == 0);
    let measured = measured.filter(|row| us(row, "cpu_us_per_create").is_some());
    let Some(row) = measured.max_by_key(|row| row["success"].as_u64()) else { return Vec::new() };
    let figure = |cost, name| Some((cost, us(row, name)? / 1000.0, Known::ProcessorTime));
    let both = [
        figure(Cost::Create, "cpu_us_per_create"),
        figure(Cost::CreateShard, "daemon_cpu_us_per_create"),
    ];
    both.into_iter().flatten().collect()
}

/// What one sandbox takes where most of them live: what is the host's own is shared out among the most. Of idle ones
/// and of such as have run code.
fn density(rows: &[Value], op: &str, cost: Cost) -> Result<Option<Figure>> {
    let of = |row: &Value| Some((row["sandboxes"].as_u64()?, row["bytes_per_sandbox"].as_f64()?));
    let rows = rows.iter().filter(|row| row["op"] == op);
    let Some((live, bytes)) = rows.filter_map(of).max_by_key(|(live, _)| *live) else {
        return Ok(None);
    };
    // Others gave memory back meanwhile.
    ensure!(bytes > 0.0, "with {live} sandboxes its machine had more memory than with none");
    Ok(Some((cost, bytes, Known::Bytes)))
}

/// What a snapshot holds of memory, of guests that wrote so much: which of several are like the operator's, only
/// the operator knows.
fn dirty(rows: &[Value], dirty_mb: Option<u32>) -> Result<Option<Figure>> {
    let of = |row: &Value| Some((row["dirty_mb"].as_u64()?, row["snapshot_bytes"].as_f64()));
    let rows = rows.iter().filter(|row| row["op"] == "snapshot_dirty").filter_map(of);
    let rows: Vec<_> = rows.collect();
    let chosen = match dirty_mb {
        _ if rows.is_empty() => return Ok(None),
        Some(wanted) => rows.iter().find(|(dirty, _)| *dirty == u64::from(wanted)),
        None if rows.len() == 1 => rows.first(),
        None => None,
    };
    let Some((dirty, bytes)) = chosen else {
        let there: Vec<_> = rows.iter().map(|(dirty, _)| dirty.to_string()).collect();
        bail!(
            "it has snapshots after {} MB were written: say with --dirty-mb which are like yours",
            there.join(", ")
        );
    };
    let bytes = bytes.with_context(|| {
        format!("after {dirty} MB it does not say what a snapshot holds: `mica bench dirty --store DIR` does")
    })?;
    Ok(Some((Cost::Snapshot, bytes, Known::Bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(figures: &[Figure], cost: Cost) -> Option<(f64, Known)> {
        figures.iter().find(|(of, ..)| *of == cost).map(|(_, value, known)| (*value, *known))
    }

    #[test]
    fn a_report_of_the_engine_gives_what_a_life_costs() {
        let engine = json!({"idle_bytes_per_sandbox": 5_000_000, "results": [
            {"op": "restore_pool_hit", "p50_us": 800.0},
            {"op": "restore_pool_miss", "p50_us": 16_000.0},
            {"op": "destroy", "p50_us": 2000.0},
            {"op": "create_http", "p50_us": 1800.0},
        ]});
        let said = report(&engine, None).unwrap();
        assert_eq!(value(&said, Cost::Idle), Some((5e6, Known::Bytes)));
        assert_eq!(value(&said, Cost::CreateShard), Some((1.8, Known::WallTime)));
        assert_eq!(value(&said, Cost::Create), Some((16.0 + 2.0 + 1.0, Known::WallTime)));
        assert_eq!(value(&said, Cost::Exec), None, "it says nothing of code");
    }

    #[test]
    fn snapshots_are_those_of_guests_that_wrote_as_much_as_told() {
        let row = |dirty: u32, bytes: f64| json!({"op": "snapshot_dirty", "dirty_mb": dirty, "snapshot_bytes": bytes});
        let rows = [row(0, 2e6), row(100, 1.1e8), row(10, 1.3e7)];
        let bytes = |dirty_mb| dirty(&rows, dirty_mb).map(|found| found.map(|(_, value, _)| value));
        assert_eq!(bytes(Some(10)).unwrap(), Some(1.3e7));
        for unknown in [Some(11), None] {
            let error = bytes(unknown).unwrap_err().to_string();
            assert!(error.contains("0, 100, 10 MB") && error.contains("--dirty-mb"), "{error}");
        }
        let one = dirty(&rows[1..2], None).unwrap();
        assert_eq!(one, Some((Cost::Snapshot, 1.1e8, Known::Bytes)));
        let blind = [json!({"op": "snapshot_dirty", "dirty_mb": 10})];
        assert!(dirty(&blind, None).unwrap_err().to_string().contains("--store DIR"));
        assert_eq!(dirty(&[], Some(10)).unwrap(), None, "that is for another file");
    }

    #[test]
    fn density_counts_where_most_live_and_never_below_nothing() {
        let row = |live: u32, bytes: i64| json!({"op": "density", "sandboxes": live, "bytes_per_sandbox": bytes});
        let first = json!({"op": "density", "sandboxes": 0});
        let rows = [first, row(500, 5_000_000), row(100, 9_000_000)];
        let found = density(&rows, "density", Cost::Idle).unwrap();
        assert_eq!(found, Some((Cost::Idle, 5e6, Known::Bytes)));
        assert!(density(&[row(100, -1)], "density", Cost::Idle).is_err());
    }

    #[test]
    fn what_one_that_ran_code_holds_is_measured_and_not_derived() {
        let row = |live: u32, bytes: i64| json!({"op": "density_after_code", "sandboxes": live, "bytes_per_sandbox": bytes});
        let after = json!({"results": [row(0, 1), row(10, 40_000_000), row(100, 31_000_000)]});
        let said = report(&after, None).unwrap();
        assert_eq!(said, [(Cost::Used, 3.1e7, Known::Bytes)]);
        let mut measured = Measured::assumed();
        for (cost, bytes, known) in said {
            measured.take(cost, bytes, known, Some("after.json".to_owned()));
        }
        measured.take(Cost::Snapshot, 1e9, Known::Bytes, None);
        measured.derive();
        assert_eq!(measured.costs.used_bytes, 3.1e7, "whatever a snapshot holds");
    }

    #[test]
    fn processor_time_of_a_life_is_that_of_the_most_creates() {
        let row = |n: u32, failed: u32, us: f64| {
            json!({"op": "create", "success": n, "failed": failed, "cpu_us_per_create": us,
                "daemon_cpu_us_per_create": us / 10.0})
        };
        let rows = [row(20, 0, 9000.0), row(500, 0, 7000.0), row(900, 1, 1.0)];
        let said = report(&json!({ "results": rows }), None).unwrap();
        let known = Known::ProcessorTime;
        assert_eq!(said, [(Cost::Create, 7.0, known), (Cost::CreateShard, 0.7, known)]);
        let mut measured = Measured::assumed();
        for (cost, ms, known) in said {
            measured.take(cost, ms, known, None);
        }
        measured.take(Cost::Create, 19.0, Known::WallTime, None);
        assert_eq!((measured.costs.create_cpu_ms, measured.note()), (7.0, None));
        let blind = json!({"results": [{"op": "create", "success": 20, "failed": 0}]});
        let error = report(&blind, None).unwrap_err().to_string();
        assert!(error.contains("where the daemon is seen"), "{error}");
    }

    #[test]
    fn processor_time_wins_over_a_wall_time_and_what_is_said_over_what_is_derived() {
        let mut measured = Measured::assumed();
        assert!(measured.note().unwrap().starts_with("create_cpu_ms and create_shard_cpu_ms are"));
        let rows = [json!({"figure": "create_cpu_2_shards", "value": 1329.0})];
        let (cost, ms, known) = scale(&rows).unwrap();
        assert_eq!((cost, ms, known), (Cost::CreateShard, 1.329, Known::ProcessorTime));
        measured.take(cost, ms, known, None);
        measured.take(Cost::CreateShard, 1.8, Known::WallTime, None);
        assert_eq!(measured.costs.create_shard_cpu_ms, 1.329);
        assert!(measured.note().unwrap().starts_with("create_cpu_ms is a wall time"));
        measured.take(Cost::Idle, 5e6, Known::Bytes, None);
        measured.take(Cost::Snapshot, 7e6, Known::Bytes, None);
        measured.derive();
        assert_eq!(measured.costs.used_bytes, 12e6);
        measured.take(Cost::Used, 9e6, Known::Said, None);
        measured.derive();
        assert_eq!(measured.costs.used_bytes, 9e6);
    }

    #[test]
    fn a_report_of_something_else_is_refused() {
        let other = json!({"results": [{"op": "run_code", "p50_us": 1.0}]});
        let error = report(&other, None).err().unwrap();
        assert!(error.to_string().contains("mica bench engine --json"), "{error}");
        assert!(report(&json!({"results": 5}), None).is_err());
    }

    #[test]
    fn costs_survive_their_own_form() {
        let costs = Measured::assumed().costs_json();
        let said = figures(costs, Path::new("own"), None).unwrap();
        assert_eq!(said.len(), COSTS.len());
        assert_eq!(value(&said, Cost::Create), Some((DEFAULTS.create_cpu_ms, Known::Said)));
    }
}
