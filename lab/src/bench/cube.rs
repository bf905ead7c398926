//! Rows in the shapes of CubeSandbox's tables, as Markdown, to be laid beside them.
//!
//! Called by `mica bench … --cube-table`. The columns are theirs. Refuses rows that none of its tables has; they are
//! left out.

use std::time::Duration;

use super::row::{Row, Stats, ms, number};

/// A table: the operations in it, its head, and a line of it.
struct Shape {
    title: &'static str,
    ops: &'static [&'static str],
    head: &'static [&'static str],
    line: fn(&Row, &[Row]) -> Vec<String>,
}

const CREATE: [&str; 8] =
    ["Concurrency", "Requests", "avg", "min", "p95", "max", "Per-sandbox amortized", "Throughput"];
const DENSITY: [&str; 3] =
    ["Live Sandboxes", "System Available Memory", "Per-VM Amortized Overhead"];
const DIRTY: [&str; 10] = [
    "Write Size",
    "Dirty Page",
    "snapshot avg",
    "snapshot min",
    "snapshot p95",
    "snapshot max",
    "create sandbox avg",
    "create sandbox min",
    "create sandbox p95",
    "create sandbox max",
];
const CLONE: [&str; 9] = [
    "Scenario",
    "n",
    "Concurrency",
    "Rounds",
    "wall avg",
    "wall min",
    "wall p95",
    "wall max",
    "per-clone avg",
];
const FROM_SNAPSHOT: [&str; 8] = [
    "Concurrency",
    "n total",
    "Rounds",
    "wall avg",
    "wall min",
    "wall p95",
    "wall max",
    "per-sandbox avg",
];

macro_rules! rounds {
    ($per:literal) => {
        &["Concurrency", "Rounds", "wall avg", "wall min", "wall p95", "wall max", $per]
    };
}

const SHAPES: [Shape; 9] = [
    Shape { title: "Create from template", ops: &["create"], head: &CREATE, line: create },
    Shape { title: "Density", ops: &["density"], head: &DENSITY, line: density },
    Shape {
        title: "Snapshot",
        ops: &["snapshot"],
        head: rounds!("per-snapshot avg"),
        line: rounds,
    },
    Shape { title: "Snapshot by dirty pages", ops: &["snapshot_dirty"], head: &DIRTY, line: dirty },
    Shape {
        title: "Create from snapshot",
        ops: &["from_snapshot"],
        head: &FROM_SNAPSHOT,
        line: from_snapshot,
    },
    Shape {
        title: "Rollback",
        ops: &["rollback"],
        head: rounds!("per-rollback avg"),
        line: rounds,
    },
    Shape { title: "Clone", ops: &["clone", "clone_request"], head: &CLONE, line: clone },
    Shape { title: "Pause", ops: &["pause"], head: rounds!("per-pause avg"), line: rounds },
    Shape { title: "Resume", ops: &["resume"], head: rounds!("per-resume avg"), line: rounds },
];

/// The tables that these rows make, with their heads or without.
#[must_use]
pub fn tables(rows: &[Row], with_head: bool) -> String {
    let mut text = String::new();
    for Shape { title, ops, head, line } in &SHAPES {
        let mut lines = rows.iter().filter(|row| ops.contains(&row.op.as_str())).peekable();
        if lines.peek().is_none() {
            continue;
        }
        if with_head {
            text += &format!(
                "\n{title}:\n\n| {} |\n|{}\n",
                head.join(" | "),
                "---|".repeat(head.len())
            );
        }
        for row in lines {
            text += &format!("| {} |\n", line(row, rows).join(" | "));
        }
    }
    let failed: u64 = rows.iter().map(|row| row.failures.total()).sum();
    if failed > 0 {
        text += &format!("\n{failed} requests failed, and are in no figure above.\n");
    }
    text
}

fn shown(time: Option<Duration>) -> String {
    time.map_or_else(|| "-".to_owned(), |time| format!("{:.1} ms", ms(time)))
}

/// avg, min, p95, max.
fn four(times: &[Duration]) -> [String; 4] {
    let stats = Stats::of(times);
    [
        shown(stats.map(|stats| stats.avg)),
        shown(stats.map(|stats| stats.min)),
        shown(stats.map(|stats| stats.p95)),
        shown(stats.map(|stats| stats.max)),
    ]
}

fn create(row: &Row, _: &[Row]) -> Vec<String> {
    let mut line = vec![row.concurrency.to_string(), row.times.len().to_string()];
    line.extend(four(&row.times));
    line.push(shown(row.per_op()));
    line.push(row.per_s().map_or_else(|| "-".to_owned(), |per_s| format!("{per_s:.1} /s")));
    line
}

fn density(row: &Row, _: &[Row]) -> Vec<String> {
    let number = |name: &str| row.more.get(name).and_then(serde_json::Value::as_f64);
    let live = number("sandboxes").unwrap_or(0.0);
    let live = if live > 0.0 { live.to_string() } else { "0 (baseline)".to_owned() };
    let gib = number("mem_available_bytes").unwrap_or(0.0) / f64::from(1 << 30);
    let each =
        number("bytes_per_sandbox").map(|bytes| format!("~{:.1} MB", bytes / f64::from(1 << 20)));
    vec![live, format!("{gib:.1} GiB"), each.unwrap_or_else(|| "—".to_owned())]
}

fn rounds(row: &Row, _: &[Row]) -> Vec<String> {
    let mut line = vec![row.concurrency.to_string(), row.walls.len().to_string()];
    line.extend(four(&row.walls));
    line.push(shown(row.per_op()));
    line
}

fn from_snapshot(row: &Row, rows: &[Row]) -> Vec<String> {
    let mut line = rounds(row, rows);
    line.insert(1, row.concurrency.to_string());
    line
}

fn clone(row: &Row, rows: &[Row]) -> Vec<String> {
    let copies = row.more.get("copies").and_then(serde_json::Value::as_u64).unwrap_or(1);
    let mut line = rounds(row, rows);
    // Of one request for many, each copy has its part.
    let all = number(row.walls.len()) * number(usize::try_from(copies).unwrap_or(1));
    let each = row.wall().as_secs_f64() * 1e3 / all.max(1.0);
    line.pop();
    line.push(format!("{each:.1} ms"));
    line.insert(0, copies.to_string());
    let way = if row.op == "clone" {
        format!("{}-concurrent", row.concurrency)
    } else {
        "1 request".to_owned()
    };
    line.insert(0, format!("{copies} sandboxes, {way}"));
    line
}

fn dirty(row: &Row, rows: &[Row]) -> Vec<String> {
    let number = |name: &str| row.more.get(name).and_then(serde_json::Value::as_u64);
    let held = number("snapshot_bytes").map(|bytes| bytes / 100_000);
    let held = held.map_or_else(
        || "not seen".to_owned(),
        |tenths| format!("{}.{} MB", tenths / 10, tenths % 10),
    );
    let mut line = vec![format!("{} MB", number("dirty_mb").unwrap_or(0)), held];
    line.extend(four(&row.times));
    let creates =
        rows.iter().find(|other| other.op == "create_from_dirty" && other.case == row.case);
    line.extend(four(creates.map(|row| row.times.as_slice()).unwrap_or_default()));
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(op: &str, case: &str, clients: usize) -> Row {
        let mut row = Row::new(op, case.to_owned(), clients);
        row.times = vec![Duration::from_millis(2), Duration::from_millis(4)];
        row.walls = vec![Duration::from_millis(10)];
        row
    }

    #[test]
    fn each_table_has_a_cell_for_each_column() {
        let mut density = row("density", "live=2", 1);
        density.set("sandboxes", 2);
        density.set("mem_available_bytes", 1u64 << 31);
        density.set("bytes_per_sandbox", 3 << 20);
        let mut clone = row("clone", "n=100 c=10", 10);
        clone.set("copies", 100);
        let rows = [
            row("create", "c=10", 10),
            density,
            row("snapshot", "c=1", 1),
            row("snapshot_dirty", "d=10", 1),
            row("create_from_dirty", "d=10", 1),
            row("from_snapshot", "c=1", 1),
            row("rollback", "c=1", 1),
            clone,
            row("pause", "c=1", 1),
            row("resume", "c=1", 1),
            row("load", "10/s", 1),
        ];
        let text = tables(&rows, true);
        assert_eq!(text.matches(":\n\n| ").count(), SHAPES.len(), "{text}");
        for table in text.split("\n\n").filter(|part| part.starts_with('|')) {
            let cells = |line: &str| line.matches('|').count();
            let head = cells(table.lines().next().unwrap());
            assert!(
                table
                    .lines()
                    .all(|line| line.is_empty() || !line.starts_with('|') || cells(line) == head),
                "{table}"
            );
        }
        assert!(
            text.contains("| 10 | 2 | 3.0 ms | 2.0 ms | 4.0 ms | 4.0 ms | 5.0 ms | 200.0 /s |"),
            "{text}"
        );
        assert!(text.contains("| 2 | 2.0 GiB | ~3.0 MB |"), "{text}");
        assert!(
            text.contains("| 100 sandboxes, 10-concurrent | 100 | 10 | 1 | 10.0 ms |"),
            "{text}"
        );
        assert_eq!(tables(&rows[..1], false).lines().count(), 1);
    }
}
