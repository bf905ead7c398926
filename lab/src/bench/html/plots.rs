//! Which plots there are, and which rows of a report go into them.
//!
//! Called by [`super::page`]. A plot without rows is left out. Refuses to draw a published figure as if it were
//! measured here: those are grey, dashed, and say whose they are.

use serde_json::Value;

use super::super::seeds::standing;
use super::chart::{Axis, Bar, Chart, Line, stacks};

/// A plot, and what stands below it.
#[derive(Clone, Debug)]
pub struct Figure {
    /// What it shows.
    pub caption: String,
    /// The plot.
    pub svg: String,
}

/// What of a row is a point's value.
type Pick = fn(&Value) -> Option<f64>;

const CLIENTS: Axis = Axis { label: "clients at once", log: true };
const LATENCY: Axis = Axis { label: "ms, log scale", log: true };

/// Every plot that the rows make.
#[must_use]
pub fn all(rows: &[&Value]) -> Vec<Figure> {
    let mut figures = by_concurrency(rows);
    figures.extend(throughput(rows));
    figures.extend(floor(rows));
    figures.extend(dirty(rows));
    figures.extend(density(rows, "density", ""));
    figures.extend(density(rows, "density_after_code", ", after code"));
    figures.extend(load(rows));
    figures.extend(phases(rows));
    figures
}

/// What is drawn as one curve: an operation, or those of `exec`, whose names end in the number of clients.
fn curve(row: &Value) -> &str {
    let op = row["op"].as_str().unwrap_or_default();
    let clients = row["clients"].as_u64();
    let named = op
        .rsplit_once('_')
        .filter(|(_, number)| clients.is_some_and(|clients| number.parse() == Ok(clients)));
    named.map_or(op, |(name, _)| name)
}

/// Names of curves in the order of their rows.
fn curves<'a>(rows: &[&'a Value], wanted: impl Fn(&Value) -> bool) -> Vec<&'a str> {
    let mut names: Vec<&str> = Vec::new();
    for row in rows.iter().filter(|row| wanted(row)) {
        let name = curve(row);
        if !name.is_empty() && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn line(name: &str, rows: &[&Value], x: Pick, y: Pick) -> Option<Line> {
    let mut points: Vec<_> = rows.iter().filter_map(|row| Some((x(row)?, y(row)?))).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    (!points.is_empty()).then(|| Line { name: name.to_owned(), points, is_other: false })
}

/// The published figures, with whose they are.
fn other(what: &str, rows: &[&Value], x: Pick, y: Pick) -> Option<Line> {
    let whose = rows.iter().find_map(|row| row["seed"]["of"].as_str())?;
    let mut line = line(&format!("{whose}, {what} ({})", standing(whose)), rows, x, y)?;
    line.is_other = true;
    Some(line)
}

fn clients(row: &Value) -> Option<f64> {
    row["concurrency"].as_f64()
}

/// Latency against concurrency, a plot for each operation that was measured at several.
fn by_concurrency(rows: &[&Value]) -> Vec<Figure> {
    let has_curve = |row: &Value| {
        row["concurrency"].is_u64()
            && row["rate_per_s"].is_null()
            && row["dirty_mb"].is_null()
            && row["sandboxes"].is_null()
            && row["p50_us"].is_number()
    };
    let mut figures = Vec::new();
    for op in curves(rows, has_curve) {
        let of_op: Vec<&Value> =
            rows.iter().copied().filter(|row| curve(row) == op && has_curve(row)).collect();
        if of_op.len() < 2 {
            continue;
        }
        // Tables of rounds have published walls, others published times of one.
        let is_wall = of_op.iter().any(|row| row["seed"]["wall_avg_ms"].is_number());
        let walls = is_wall || of_op.iter().any(|row| row["rounds"]["count"].as_u64() > Some(1));
        let lines = [
            line("p50 of one", &of_op, clients, |row| ms(&row["p50_us"])),
            line("p95 of one", &of_op, clients, |row| ms(&row["p95_us"])),
            if walls {
                line("mean of a round", &of_op, clients, |row| ms(&row["rounds"]["avg_us"]))
            } else {
                None
            },
            if is_wall {
                other("mean of a round", &of_op, clients, |row| row["seed"]["wall_avg_ms"].as_f64())
            } else {
                other("mean of one", &of_op, clients, |row| row["seed"]["avg_ms"].as_f64())
            },
        ];
        let title = format!("{}: latency against concurrency", op.replace('_', " "));
        figures.push(drawn(title, CLIENTS, LATENCY, lines));
    }
    figures
}

/// What clients together get done in a second, of rows that say how many there were.
fn throughput(rows: &[&Value]) -> Vec<Figure> {
    let is_of_clients =
        |row: &Value| row["clients"].is_u64() && row["throughput_per_s"].is_number();
    let mut figures = Vec::new();
    for op in curves(rows, is_of_clients) {
        let of_op: Vec<&Value> =
            rows.iter().copied().filter(|row| curve(row) == op && is_of_clients(row)).collect();
        if of_op.len() < 2 {
            continue;
        }
        let lines = [
            line("all clients", &of_op, clients, |row| row["throughput_per_s"].as_f64()),
            other("all clients", &of_op, clients, |row| row["seed"]["per_s"].as_f64()),
        ];
        let title = format!("{}: throughput against concurrency", op.replace('_', " "));
        figures.push(drawn(title, CLIENTS, Axis { label: "in a second", log: false }, lines));
    }
    figures
}

/// What the engine takes beside the same work as bare system calls.
fn floor(rows: &[&Value]) -> Option<Figure> {
    let bar = |row: &&Value| {
        let least = row["floor_p50_us"].as_f64().filter(|least| *least > 0.0)?;
        let ratio = row["p50_us"].as_f64()? / least;
        Some(Bar { name: row["op"].as_str()?.to_owned(), parts: vec![("p50".to_owned(), ratio)] })
    };
    let bars: Vec<Bar> = rows.iter().filter_map(bar).collect();
    if bars.is_empty() {
        return None;
    }
    let caption = "p50 beside the same work as bare system calls".to_owned();
    Some(Figure { svg: stacks(&caption, "times as long", &bars), caption })
}

fn dirty(rows: &[&Value]) -> Option<Figure> {
    let of =
        |op: &str| -> Vec<&Value> { rows.iter().copied().filter(|row| row["op"] == op).collect() };
    let (snapshots, creates) = (of("snapshot_dirty"), of("create_from_dirty"));
    if snapshots.len() < 2 {
        return None;
    }
    let x = Axis { label: "written to memory before, MB", log: false };
    let y = Axis { label: "ms", log: false };
    let written: Pick = |row| row["dirty_mb"].as_f64();
    let (average, published): (Pick, Pick) =
        (|row| ms(&row["avg_us"]), |row| row["seed"]["avg_ms"].as_f64());
    let lines = [
        line("snapshot, mean", &snapshots, written, average),
        line("create from it, mean", &creates, written, average),
        other("snapshot", &snapshots, written, published),
        other("create from it", &creates, written, published),
    ];
    Some(drawn("snapshot time against dirty memory".to_owned(), x, y, lines))
}

fn density(rows: &[&Value], op: &str, after: &str) -> Vec<Figure> {
    let of: Vec<&Value> = rows.iter().copied().filter(|row| row["op"] == op).collect();
    if of.len() < 2 {
        return Vec::new();
    }
    let x = Axis { label: "live sandboxes", log: false };
    let live: Pick = |row| row["sandboxes"].as_f64();
    let total = [
        line("taken, MiB", &of, live, |row| Some(row["bytes_taken"].as_f64()? / MIB)),
        other("taken", &of, live, |row| {
            let of_all = || Some(row["seed"]["mb_each"].as_f64()? * row["sandboxes"].as_f64()?);
            row["seed"]["total_mb"].as_f64().or_else(of_all)
        }),
    ];
    let each = [
        line("each, MiB", &of, live, |row| Some(row["bytes_per_sandbox"].as_f64()? / MIB)),
        other("each", &of, live, |row| row["seed"]["mb_each"].as_f64()),
    ];
    let (all_axis, each_axis) =
        (Axis { label: "MiB of the machine", log: false }, Axis { label: "MiB each", log: false });
    vec![
        drawn(format!("memory against live sandboxes{after}"), x, all_axis, total),
        drawn(format!("memory of one, by live sandboxes{after}"), x, each_axis, each),
    ]
}

fn load(rows: &[&Value]) -> Vec<Figure> {
    let of: Vec<&Value> = rows.iter().copied().filter(|row| row["op"] == "load").collect();
    if of.len() < 2 {
        return Vec::new();
    }
    let x = Axis { label: "requests in a second", log: true };
    let rate: Pick = |row| row["rate_per_s"].as_f64();
    let cpu = [
        line("all of it", &of, rate, |row| row["cpu_percent"].as_f64()),
        line("the daemon", &of, rate, |row| row["daemon_cpu_percent"].as_f64()),
        line("VM processes", &of, rate, |row| row["vms_cpu_percent"].as_f64()),
        other("CPU", &of, rate, |row| row["seed"]["cpu_percent"].as_f64()),
    ];
    let times = [
        line("p50", &of, rate, |row| ms(&row["p50_us"])),
        line("p95", &of, rate, |row| ms(&row["p95_us"])),
        line("p99", &of, rate, |row| ms(&row["p99_us"])),
    ];
    let percent = Axis { label: "% of the machine", log: false };
    let mut figures = Vec::new();
    if cpu[0].is_some() {
        figures.push(drawn("the daemon's CPU against load".to_owned(), x, percent, cpu));
    }
    let title = "latency against load, from when a request was due".to_owned();
    figures.push(drawn(title, x, LATENCY, times));
    figures
}

fn phases(rows: &[&Value]) -> Option<Figure> {
    let bar = |row: &&Value| -> Option<Bar> {
        let phases = row["phases"].as_array()?;
        let parts = phases.iter().filter_map(|phase| {
            let name = format!("{} {}", phase["operation"].as_str()?, phase["phase"].as_str()?);
            Some((name, phase["avg_us"].as_f64()? / 1e3))
        });
        let name = format!("{} {}", row["op"].as_str()?, row["case"].as_str()?);
        Some(Bar { name: name.trim_end().to_owned(), parts: parts.collect() })
    };
    let bars: Vec<Bar> = rows.iter().filter_map(bar).collect();
    if bars.is_empty() {
        return None;
    }
    let caption = "what the daemon spends the time of one on".to_owned();
    Some(Figure { svg: stacks(&caption, "ms, mean of each phase", &bars), caption })
}

const MIB: f64 = 1_048_576.0;

fn ms(value: &Value) -> Option<f64> {
    Some(value.as_f64()? / 1e3)
}

fn drawn(
    caption: String,
    x: Axis,
    y: Axis,
    lines: impl IntoIterator<Item = Option<Line>>,
) -> Figure {
    let lines = lines.into_iter().flatten().collect();
    let svg = Chart { title: caption.clone(), x, y, lines }.svg();
    Figure { caption, svg }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_kind_of_row_has_its_plot() {
        let row = |op: &str, clients: u64| {
            json!({ "op": op, "case": format!("c={clients}"),
            "concurrency": clients, "p50_us": 1000.0, "p95_us": 2000.0, "avg_us": 1200.0,
            "seed": { "of": "CubeSandbox", "avg_ms": 47.8 } })
        };
        let with = |mut row: Value, name: &str, value: Value| {
            row[name] = value;
            row
        };
        let rows = [
            row("create", 1),
            row("create", 10),
            // One condition alone is no curve.
            row("delete", 1),
            with(row("snapshot_dirty", 1), "dirty_mb", json!(0)),
            with(row("snapshot_dirty", 1), "dirty_mb", json!(10)),
            json!({ "op": "run_code_1", "concurrency": 1, "clients": 1, "p50_us": 900.0, "p95_us": 950.0,
                "throughput_per_s": 900.0, "seed": { "of": "SoulBox", "per_s": 180.3 } }),
            json!({ "op": "run_code_10", "concurrency": 10, "clients": 10, "p50_us": 1900.0,
                "p95_us": 2500.0, "throughput_per_s": 4000.0 }),
            // The engine's names end in numbers, too.
            with(with(row("clone_1", 1), "floor_p50_us", json!(500.0)), "seed", json!(null)),
            json!({ "op": "density", "sandboxes": 0, "bytes_taken": 0 }),
            json!({ "op": "density", "sandboxes": 9, "bytes_taken": 90, "bytes_per_sandbox": 10 }),
            json!({ "op": "density_after_code", "sandboxes": 1, "bytes_taken": 9,
                "seed": { "of": "SoulBox", "total_mb": 128.0 } }),
            json!({ "op": "density_after_code", "sandboxes": 9, "bytes_taken": 90 }),
            with(row("load", 64), "rate_per_s", json!(10)),
            with(row("load", 64), "rate_per_s", json!(100)),
            with(
                row("pause", 1),
                "phases",
                json!([
                { "operation": "pause", "phase": "freeze", "avg_us": 100.0 }]),
            ),
        ];
        let captions: Vec<String> = all(&rows.iter().collect::<Vec<_>>())
            .into_iter()
            .map(|figure| figure.caption)
            .collect();
        assert_eq!(
            captions,
            [
                "create: latency against concurrency",
                "run code: latency against concurrency",
                "run code: throughput against concurrency",
                "p50 beside the same work as bare system calls",
                "snapshot time against dirty memory",
                "memory against live sandboxes",
                "memory of one, by live sandboxes",
                "memory against live sandboxes, after code",
                "memory of one, by live sandboxes, after code",
                "latency against load, from when a request was due",
                "what the daemon spends the time of one on",
            ]
        );
        assert!(all(&[]).is_empty());
        let svg: String =
            all(&rows.iter().collect::<Vec<_>>()).into_iter().map(|one| one.svg).collect();
        for line in [
            "CubeSandbox, mean of one (other hardware)",
            "SoulBox, all clients (stated target, not measured; other hardware)",
        ] {
            assert!(svg.contains(line), "{line}");
        }
    }
}
