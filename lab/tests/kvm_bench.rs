//! The engine's benchmark, once through: it measures every operation that it promises, and writes it down in a form
//! that what compares and draws reports takes.
//!
//! Run by `cargo test`. Needs root, `/dev/kvm`, and the daemon beside the benchmark's program or in
//! `$MICA_BIN_DIR`. Refuses to judge the figures: on a busy machine they mean nothing.

#[path = "common/kvm.rs"]
mod kvm;

use std::path::PathBuf;
use std::process::Command;

use kvm::have_kvm;
use mica_lab::bench::compare::{Thresholds, compare};
use mica_lab::bench::document::Document;
use mica_lab::bench::html::page::page;
use mica_lab::one_vm::find_mica_vm;
use serde_json::Value;

/// Every operation has its row.
const OPS: [&str; 15] = [
    "restore_pool_hit",
    "restore_pool_miss",
    "snapshot_7mb",
    "snapshot_64mb",
    "snapshot_256mb",
    "snapshot_next_1mb",
    "rollback_7mb",
    "clone_1",
    "clone_100",
    "pause",
    "resume",
    "destroy",
    "create_first",
    "create_200th",
    "create_http",
];

/// The daemon's program.
fn daemon() -> PathBuf {
    let beside = || PathBuf::from(env!("CARGO_BIN_EXE_mica-bench")).with_file_name("mica");
    std::env::var_os("MICA_BIN_DIR").map_or_else(beside, |bin| PathBuf::from(bin).join("mica"))
}

#[test]
fn a_quick_run_has_a_figure_for_every_operation() {
    if !have_kvm() {
        return;
    }
    let file = std::env::temp_dir().join(format!("mica-bench-{}.json", std::process::id()));
    let ran = Command::new(env!("CARGO_BIN_EXE_mica-bench"))
        .args(["engine", "--quick", "--json"])
        .arg(&file)
        .arg("--mica")
        .arg(daemon())
        .arg("--vm-program")
        .arg(find_mica_vm().unwrap())
        .output()
        .unwrap();
    let (table, log) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{table}\n{log}");
    let document = Document::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    let same = compare(&document, &document, Thresholds::default()).unwrap();
    assert!(same.reasons.is_empty() && same.pairs.len() >= OPS.len(), "{}", same.text());
    assert!(page(std::slice::from_ref(&document)).contains("bare system calls"));
    let report = document.0;
    assert_eq!((&report["command"], &report["options"]["quick"]), (&"engine".into(), &true.into()));
    assert!(report["host"].is_object(), "{report}");
    let rows = report["results"].as_array().unwrap();
    for op in OPS {
        let row = rows.iter().find(|row| row["op"] == op).unwrap_or_else(|| panic!("no {op}"));
        let figure = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{op}: no {name}"));
        assert!(row["n"].as_u64().unwrap() > 0, "{row}");
        assert!(figure("p50_us") > 0.0 && figure("floor_p50_us") > 0.0, "{row}");
        assert!(figure("p50_us") <= figure("p95_us"), "{row}");
        assert!(figure("p95_us") <= figure("p99_us"), "{row}");
        assert!(figure("p99_us") <= figure("max_us"), "{row}");
        assert!(figure("min_us") <= figure("avg_us"), "{row}");
        assert_eq!((&row["success"], &row["failed"]), (&row["n"], &Value::from(0)), "{row}");
        assert!(table.contains(op), "{table}");
    }
    let http = rows.iter().find(|row| row["op"] == "create_http").unwrap();
    let phases = http["phases"].as_array().unwrap_or_else(|| panic!("no phases: {http}"));
    assert!(phases.iter().all(|phase| phase["operation"] == "create"), "{http}");
    assert!(phases.iter().any(|phase| phase["phase"] == "run"), "{http}");
    assert_eq!(http["seed"]["hardware"], "other hardware");
    assert!(report["idle_bytes_per_sandbox"].as_i64().unwrap() > 0, "{report}");
}
