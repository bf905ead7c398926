//! What a run found: a table for people, JSON for programs.
//!
//! Called by the benchmark's program at its end. Refuses to say whether the figures are good.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::density::{Idle, Left};
use super::machine;
use super::series::{Series, percentile};
use crate::bench::document::Document;
use crate::bench::row::{Row, us};
use crate::bench::seeds;

/// The row of what idle sandboxes cost, which is in bytes.
const IDLE: &str = "idle_bytes_per_sandbox";

/// Everything that was measured.
#[derive(Debug)]
pub struct Report<'a> {
    /// The machine: see [`super::machine::host`].
    pub host: Value,
    /// The times.
    pub series: &'a [Series],
    /// What idle sandboxes cost.
    pub idle: Option<&'a Idle>,
    /// What rounds left behind.
    pub left: Option<&'a Left>,
}

impl Report<'_> {
    /// As programs read it, and `mica bench compare` and `report` do.
    #[must_use]
    pub fn document(&self, options: &Value) -> Document {
        let mut rows: Vec<Row> = self.series.iter().map(row).collect();
        if let Some(idle) = self.idle {
            // In bytes, so that there are no times.
            let mut row = Row::new(IDLE, String::new(), 1);
            for count in ["n", "success"] {
                row.set(count, idle.sandboxes);
            }
            row.set("bytes", idle.bytes_each);
            rows.push(row);
        }
        let mut document = Document::new("engine", options, &rows);
        for (name, value) in [
            ("host", self.host.clone()),
            (IDLE, json!(self.idle.map(|idle| idle.bytes_each))),
            ("idle", json!(self.idle)),
            ("create_kill_rounds", json!(self.left)),
        ] {
            document.0[name] = value;
        }
        document
    }

    /// As a table.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<20} {:>5} {:>10} {:>10} {:>10} {:>10} {:>10} {:>7}\n",
            "µs", "n", "p50", "p95", "p99", "max", "floor p50", "ratio"
        );
        for Series { op, times, floor, .. } in self.series {
            let [p50, p95, p99, max] =
                [50, 95, 99, 100].map(|percent| us(percentile(times, percent)));
            let least = us(percentile(floor, 50));
            let ratio = if least > 0.0 { format!("{:.2}", p50 / least) } else { "-".to_owned() };
            let n = times.len();
            let line = format!(
                "{op:<20} {n:>5} {p50:>10.1} {p95:>10.1} {p99:>10.1} {max:>10.1} {least:>10.1} {ratio:>7}\n"
            );
            text.push_str(&line);
        }
        if let Some(idle) = self.idle {
            text.push_str(&memory(idle));
        }
        if let Some(left) = self.left {
            let Left { rounds, process_bytes, machine_bytes, counts } = left;
            let kib = |bytes: i64| bytes / 1024;
            let line = format!(
                "\nafter {rounds} rounds of create and kill: {counts:?} as before, this process {:+} KiB, \
                 the machine {:+} KiB\n",
                kib(*process_bytes),
                kib(*machine_bytes)
            );
            text.push_str(&line);
        }
        text + "\n" + &machine::text(&self.host)
    }
}

/// One operation, as a row of a table: one client, no conditions.
fn row(series: &Series) -> Row {
    let Series { op, times, floor, phases } = series.clone();
    let seed = seeds::of_engine(op);
    Row { times, floor, phases, seed, ..Row::new(op, String::new(), 1) }
}

fn memory(idle: &Idle) -> String {
    let Idle { sandboxes, available_bytes_each, bytes_each, .. } = idle;
    let kib = |bytes: i64| bytes / 1024;
    let mut text = format!(
        "\n{IDLE}: {bytes_each} ({} KiB) over {sandboxes} of them; {} KiB of MemAvailable as it is, \
         {} KiB with the pool\n",
        kib(*bytes_each),
        kib(*available_bytes_each),
        kib(idle.bytes_each_with_pool),
    );
    let machine = &idle.machine_each;
    let process = &idle.process_each;
    for (name, bytes) in [
        ("anonymous", machine.anonymous),
        ("shared (memfds)", machine.shared),
        ("slab", machine.slab),
        ("slab, reclaimable", machine.slab_reclaimable),
        ("page tables", machine.page_tables),
        ("KVM's page tables", machine.second_page_tables),
        ("kernel stacks", machine.stacks),
        ("per processor", machine.per_cpu),
        ("by range", machine.vmalloc),
    ] {
        line(&mut text, "machine", name, bytes);
    }
    for (name, bytes) in [
        ("guest, own", process.guest_own),
        ("guest, template", process.guest_shared),
        ("heap and stacks", process.private),
        ("program", process.program),
        ("memfds", process.memfds),
        ("page tables", process.page_tables),
    ] {
        line(&mut text, "process", name, i64::try_from(bytes).unwrap_or(i64::MAX));
    }
    text
}

fn line(text: &mut String, of: &str, name: &str, bytes: i64) {
    if writeln!(text, "  {of} {name:<20} {:>8} KiB", bytes / 1024).is_err() {
        unreachable!("a string takes what is written to it");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::memory::{Machine, Process};
    use super::*;
    use crate::bench::compare::{Thresholds, compare};
    use crate::bench::html::page::page;
    use crate::bench::phases::Phase;

    fn report(series: &[Series]) -> Report<'_> {
        Report { host: json!({ "kvm": "vmx" }), series, idle: None, left: None }
    }

    fn idle() -> Idle {
        Idle {
            sandboxes: 200,
            available_bytes_each: 2 << 20,
            bytes_each: 1 << 20,
            bytes_each_with_pool: 3 << 20,
            machine_each: Machine::default(),
            process_each: Process::default(),
        }
    }

    #[test]
    fn rows_have_what_programs_read() {
        let us = Duration::from_micros;
        let phase = |phase: &str| Phase {
            operation: "pause".to_owned(),
            phase: phase.to_owned(),
            count: 3.0,
            avg_us: 7.0,
        };
        let series = [Series {
            op: "pause",
            times: vec![us(30), us(10), us(20)],
            floor: vec![us(5)],
            phases: vec![phase("freeze")],
        }];
        let idle = idle();
        let report = Report { idle: Some(&idle), ..report(&series) };
        let document = report.document(&json!({ "shards": 1 }));
        let rows: Vec<&Value> = document.rows().collect();
        for (name, value) in [
            ("op", json!("pause")),
            ("n", json!(3)),
            ("success", json!(3)),
            ("failed", json!(0)),
            ("min_us", json!(10.0)),
            ("p50_us", json!(20.0)),
            ("p90_us", json!(30.0)),
            ("p95_us", json!(30.0)),
            ("p99_us", json!(30.0)),
            ("max_us", json!(30.0)),
            ("avg_us", json!(20.0)),
            ("floor_p50_us", json!(5.0)),
        ] {
            assert_eq!(rows[0][name], value, "{name} of {}", rows[0]);
        }
        assert_eq!(rows[0]["seed"]["hardware"], "other hardware");
        assert_eq!(rows[0]["phases"][0]["phase"], "freeze");
        assert_eq!((&rows[1]["op"], &rows[1]["n"]), (&json!(IDLE), &json!(200)));
        assert_eq!((&rows[1]["bytes"], &rows[1]["p95_us"]), (&json!(1 << 20), &Value::Null));
        assert_eq!((&document.0[IDLE], &document.0["complete"]), (&json!(1 << 20), &json!(true)));
        assert_eq!(document.0["options"]["shards"], 1);
        let table = report.table();
        assert!(table.lines().nth(1).is_some_and(|line| line.ends_with("   4.00")), "{table}");
        assert!(table.ends_with("\nkernel   KVM: vmx\n"), "{table}");
    }

    #[test]
    fn runs_are_compared_and_drawn() {
        let series = |ms| {
            let (times, floor) =
                (vec![Duration::from_millis(ms); 3], vec![Duration::from_millis(1)]);
            [Series { op: "pause", times, floor, phases: Vec::new() }]
        };
        let (fast, slow) = (series(2), series(4));
        let [fast, slow] = [&fast, &slow].map(|series| report(series).document(&json!({})));
        let verdict = compare(&fast, &slow, Thresholds::default()).unwrap();
        assert_eq!(verdict.reasons, ["pause: p95 went from 2.00 ms to 4.00 ms: 2.00 > 1.2"]);
        let page = page(&[slow]);
        for part in ["bare system calls", "<svg", "CubeSandbox", "floor p50"] {
            assert!(page.contains(part), "{part} is not in {page}");
        }
    }
}
