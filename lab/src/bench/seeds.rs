//! What other systems' reports say of the same operations, on other hardware: a column to look at, no judgement.
//!
//! Read by the tables. CubeSandbox: its "Core Operations Performance Benchmark Report", on two Xeon 8255C with
//! 96 threads. SoulBox: its "Performance Benchmarks", whose figures its own project never measured: they are what it
//! wants to reach, and are called so wherever they are shown. Refuses to compare: hardware, disk syncs and clients differ.

use serde_json::{Map, Value, json};

/// Published figures of one row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seed {
    /// Whose.
    pub of: &'static str,
    /// What they are, as `avg_ms`.
    pub names: &'static [&'static str],
    /// The figures.
    pub values: &'static [f64],
}

impl Seed {
    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let mut all = Map::new();
        all.insert("of".to_owned(), json!(self.of));
        all.insert("hardware".to_owned(), json!(OTHER_HARDWARE));
        all.insert("standing".to_owned(), json!(standing(self.of)));
        let figures = self.names.iter().zip(self.values);
        all.extend(figures.map(|(name, value)| ((*name).to_owned(), json!(value))));
        Value::Object(all)
    }

    /// For people: all of them, with whose they are.
    #[must_use]
    pub fn text(&self) -> String {
        let figures = self.names.iter().zip(self.values);
        let figures = figures.map(|(name, value)| format!("{value} {}", name.replace('_', " ")));
        format!("{}: {}", whose(self.of), figures.collect::<Vec<_>>().join(", "))
    }
}

const CUBE: &str = "CubeSandbox";
const SOUL: &str = "SoulBox";
const OTHER_HARDWARE: &str = "other hardware";

/// What these figures are: what a machine that is not ours did, or not even that.
#[must_use]
pub fn standing(of: &str) -> &'static str {
    // Also of a report that was written before its rows said so.
    if of == SOUL { "stated target, not measured; other hardware" } else { OTHER_HARDWARE }
}

/// Whose figures they are, for people, who know from the head of the column that the hardware is another.
#[must_use]
pub fn whose(of: &str) -> String {
    match standing(of) {
        OTHER_HARDWARE => of.to_owned(),
        standing => format!("{of} ({standing})"),
    }
}

/// A row of a table: what it is found by, and its figures.
type Row = (u64, u64, &'static [f64]);

/// What the figures of the tables are.
const TIMES: [&str; 5] = ["avg_ms", "min_ms", "p95_ms", "max_ms", "per_s"];
const ROUNDS: [&str; 5] = ["wall_avg_ms", "wall_min_ms", "wall_p95_ms", "wall_max_ms", "per_ms"];
const WRITTEN: [&str; 5] = ["avg_ms", "min_ms", "p95_ms", "max_ms", "dirty_mb"];

/// By concurrency; the second number is of no use.
const CREATE: [Row; 4] = [
    (1, 0, &[47.8, 43.5, 57.4, 60.4, 17.9]),
    (10, 0, &[88.7, 45.8, 116.9, 119.1, 101.4]),
    (20, 0, &[98.1, 47.7, 175.8, 232.6, 180.9]),
    (50, 0, &[276.1, 60.6, 508.4, 681.3, 147.6]),
];

/// By live sandboxes.
const DENSITY: [Row; 4] =
    [(100, 0, &[21.5]), (300, 0, &[23.8]), (500, 0, &[25.0]), (1000, 0, &[25.7])];

/// By concurrency. Times are of rounds.
const SNAPSHOT: [Row; 3] = [
    (1, 0, &[49.8, 47.3, 54.1, 54.1, 49.8]),
    (5, 0, &[71.0, 62.7, 81.0, 81.0, 14.2]),
    (10, 0, &[127.2, 79.6, 155.6, 155.6, 12.7]),
];

/// By megabytes written.
const DIRTY: [Row; 8] = [
    (0, 0, &[45.7, 43.9, 47.4, 47.4, 7.1]),
    (10, 0, &[75.7, 73.2, 79.2, 79.2, 38.9]),
    (50, 0, &[107.7, 104.8, 112.3, 112.3, 120.7]),
    (100, 0, &[138.6, 136.7, 139.9, 139.9, 195.0]),
    (200, 0, &[174.2, 173.1, 176.2, 176.2, 296.7]),
    (500, 0, &[289.4, 285.0, 293.1, 293.1, 602.5]),
    (800, 0, &[392.8, 392.1, 394.1, 394.1, 908.4]),
    (1024, 0, &[486.9, 471.5, 510.8, 510.8, 1136.4]),
];

/// Creates from those snapshots, by megabytes written.
const DIRTY_CREATE: [Row; 8] = [
    (0, 0, &[64.8, 61.5, 68.6, 68.6]),
    (10, 0, &[60.7, 57.3, 66.1, 66.1]),
    (50, 0, &[64.4, 60.4, 70.6, 70.6]),
    (100, 0, &[66.5, 60.9, 71.1, 71.1]),
    (200, 0, &[63.7, 60.6, 66.8, 66.8]),
    (500, 0, &[64.0, 61.6, 66.5, 66.5]),
    (800, 0, &[60.9, 54.6, 65.8, 65.8]),
    (1024, 0, &[68.4, 58.9, 84.6, 84.6]),
];

/// By concurrency.
const FROM_SNAPSHOT: [Row; 4] = [
    (1, 0, &[63.9, 62.5, 66.1, 66.1, 63.9]),
    (10, 0, &[89.9, 84.0, 93.6, 93.6, 9.0]),
    (20, 0, &[118.9, 92.7, 167.1, 167.1, 5.9]),
    (50, 0, &[180.3, 135.1, 260.7, 260.7, 3.6]),
];

/// By concurrency.
const ROLLBACK: [Row; 3] = [
    (1, 0, &[81.6, 74.7, 97.4, 97.4, 81.6]),
    (5, 0, &[189.6, 161.8, 243.2, 243.2, 37.9]),
    (10, 0, &[266.1, 236.1, 305.1, 305.1, 26.6]),
];

/// By copies and concurrency.
const CLONE: [Row; 4] = [
    (1, 1, &[219.6, 213.6, 234.7, 234.7, 219.6]),
    (100, 10, &[870.4, 860.6, 880.2, 880.2, 8.7]),
    (100, 20, &[638.6, 620.8, 656.3, 656.3, 6.4]),
    (100, 50, &[540.9, 491.3, 590.5, 590.5, 5.4]),
];

/// By concurrency.
const PAUSE: [Row; 3] = [
    (1, 0, &[558.4, 530.8, 590.3, 590.3, 558.4]),
    (5, 0, &[656.9, 621.9, 683.2, 683.2, 131.4]),
    (10, 0, &[682.1, 674.1, 699.3, 699.3, 68.2]),
];

/// By concurrency.
const RESUME: [Row; 3] = [
    (1, 0, &[41.8, 18.7, 65.1, 65.1, 41.8]),
    (5, 0, &[28.2, 17.6, 34.2, 34.2, 5.6]),
    (10, 0, &[35.7, 30.6, 41.7, 41.7, 3.6]),
];

/// By requests in a second: what of the processors the daemon took.
const CPU: [Row; 4] = [(10, 0, &[8.0]), (100, 0, &[22.0]), (500, 0, &[38.0]), (1000, 0, &[45.0])];

/// By clients: small computations in a second.
const THROUGHPUT: [Row; 5] = [
    (1, 0, &[180.3]),
    (10, 0, &[1250.7]),
    (100, 0, &[1456.8]),
    (500, 0, &[1389.2]),
    (1000, 0, &[1234.5]),
];

/// Of an idle machine: what it takes in all, in MB.
const IDLE: [Row; 1] = [(1, 0, &[64.0])];

/// By sandboxes that have run code, at once: what they take in all, in MB.
const AFTER_CODE: [Row; 3] = [(1, 0, &[128.0]), (10, 0, &[256.0]), (100, 0, &[1200.0])];

/// A create and a "Hello World" in Python.
const COLD_HELLO: [f64; 5] = [95.0, 85.0, 120.0, 140.0, 25.0];

/// The published figures of an operation: by what its table is ordered by, and a second number where it has one.
#[must_use]
pub fn find(op: &str, by: usize, and: usize) -> Option<Seed> {
    let (of, names, rows): (_, &[&str], &[Row]) = match op {
        "create" => (CUBE, &TIMES, &CREATE),
        "density" if by == 1 => (SOUL, &["total_mb"], &IDLE),
        "density" => (CUBE, &["mb_each"], &DENSITY),
        "density_after_code" => (SOUL, &["total_mb"], &AFTER_CODE),
        "snapshot" => (CUBE, &ROUNDS, &SNAPSHOT),
        "snapshot_dirty" => (CUBE, &WRITTEN, &DIRTY),
        "create_from_dirty" => (CUBE, &TIMES, &DIRTY_CREATE),
        "from_snapshot" => (CUBE, &ROUNDS, &FROM_SNAPSHOT),
        "rollback" => (CUBE, &ROUNDS, &ROLLBACK),
        "clone" => (CUBE, &ROUNDS, &CLONE),
        "pause" => (CUBE, &ROUNDS, &PAUSE),
        "resume" => (CUBE, &ROUNDS, &RESUME),
        // Languages have cells of the same name, of one client.
        op if op.starts_with("fibonacci_") && by > 0 => (SOUL, &["per_s"], &THROUGHPUT),
        "load" => (SOUL, &["cpu_percent"], &CPU),
        _ => return language(op),
    };
    let same = |row: &&Row| usize::try_from(row.0) == Ok(by) && usize::try_from(row.1) == Ok(and);
    rows.iter().find(same).map(|row| Seed { of, names, values: row.2 })
}

/// The published figures of what the engine's benchmark calls so. A sandbox of `CubeSandbox`'s that wrote nothing has 7 MB
/// to be snapshotted; its hundred clones are those that were made fastest.
#[must_use]
pub fn of_engine(op: &str) -> Option<Seed> {
    match op {
        "restore_pool_hit" | "create_http" => find("create", 1, 0),
        "snapshot_7mb" | "snapshot_7mb_dense" => find("snapshot_dirty", 0, 0),
        "rollback_7mb" => find("rollback", 1, 0),
        "clone_1" => find("clone", 1, 1),
        "clone_100" => find("clone", 100, 50),
        "pause" | "resume" => find(op, 1, 0),
        _ => None,
    }
}

fn language(op: &str) -> Option<Seed> {
    let (names, values): (&[&str], &[f64]) = match op {
        "cold_hello_python" => {
            (&["avg_ms", "p50_ms", "p95_ms", "p99_ms", "stddev_ms"], &COLD_HELLO)
        }
        "first_hello_python" => (&["startup_ms"], &[45.0]),
        "first_hello_javascript" => (&["startup_ms"], &[35.0]),
        "first_hello_go" => (&["startup_ms"], &[25.0]),
        "fibonacci_python" => (&["execution_ms"], &[115.0]),
        "fibonacci_javascript" => (&["execution_ms"], &[80.0]),
        "fibonacci_go" => (&["execution_ms"], &[40.0]),
        "memory_python" => (&["overhead_mb"], &[32.0]),
        "memory_javascript" => (&["overhead_mb"], &[24.0]),
        "memory_go" => (&["overhead_mb"], &[16.0]),
        _ => return None,
    };
    Some(Seed { of: SOUL, names, values })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_by_what_their_tables_are_ordered_by() {
        let first = |op: &str, by, and| find(op, by, and).map(|seed| seed.values[0]);
        assert_eq!(first("create", 20, 0), Some(98.1));
        assert_eq!(first("clone", 100, 50), Some(540.9));
        assert_eq!(first("snapshot_dirty", 1024, 0), Some(486.9));
        assert_eq!(first("fibonacci_javascript", 0, 0), Some(80.0));
        let users = [1, 10, 100, 500, 1000];
        let found = users.map(|users| first(&format!("fibonacci_{users}"), users, 0).unwrap());
        assert_eq!(found, [180.3, 1250.7, 1456.8, 1389.2, 1234.5]);
        // It is not what those do.
        assert_eq!(first("run_code_100", 100, 0), None);
        assert_eq!(first("command_100", 100, 0), None);
        let after = [1, 10, 100].map(|live| first("density_after_code", live, 0).unwrap());
        assert_eq!(after, [128.0, 256.0, 1200.0]);
        assert_eq!((first("density", 1, 0), first("density", 100, 0)), (Some(64.0), Some(21.5)));
        let memory =
            ["python", "javascript", "go", "r"].map(|one| first(&format!("memory_{one}"), 0, 0));
        assert_eq!(memory, [Some(32.0), Some(24.0), Some(16.0), None]);
        let cold = find("cold_hello_python", 0, 0).unwrap();
        assert_eq!(cold.names.iter().zip(cold.values).next_back(), Some((&"stddev_ms", &25.0)));
        assert_eq!(first("create", 2, 0), None);
        assert_eq!(first("clone", 100, 5), None);
        assert_eq!(of_engine("clone_100"), find("clone", 100, 50));
        assert_eq!(of_engine("snapshot_7mb").map(|seed| seed.values[4]), Some(7.1));
        assert_eq!((of_engine("destroy"), of_engine("create")), (None, None));
        assert_eq!(
            find("create", 1, 0).unwrap().text(),
            "CubeSandbox: 47.8 avg ms, 43.5 min ms, 57.4 p95 ms, 60.4 max ms, 17.9 per s"
        );
        let json = find("rollback", 5, 0).unwrap().json();
        assert_eq!(
            (&json["wall_avg_ms"], &json["hardware"]),
            (&json!(189.6), &json!("other hardware"))
        );
        assert_eq!(json["standing"], "other hardware");
    }

    #[test]
    fn what_nobody_measured_is_called_a_target_and_shown_whole() {
        let cold = find("cold_hello_python", 0, 0).unwrap();
        assert_eq!(
            cold.text(),
            "SoulBox (stated target, not measured; other hardware): \
             95 avg ms, 85 p50 ms, 120 p95 ms, 140 p99 ms, 25 stddev ms"
        );
        assert_eq!(cold.json()["standing"], "stated target, not measured; other hardware");
    }
}
