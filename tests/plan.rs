//! `mica plan` as an operator runs it: the example host, a report of the engine, and every kind of nonsense.
//!
//! Called by `cargo test`. Refuses nothing: it needs neither root nor KVM.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/host.json")
}

fn file(name: &str, text: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("mica-plan-{}-{name}.json", std::process::id()));
    std::fs::write(&path, text).unwrap();
    path
}

fn plan(rps: &str, live: &str, host: &Path, more: &[&str]) -> Output {
    let mut mica = Command::new(env!("CARGO_BIN_EXE_mica"));
    mica.arg("plan").arg(format!("--rps={rps}")).arg(format!("--live={live}"));
    mica.arg("--host").arg(host).args(more).output().unwrap()
}

fn planned(rps: &str, live: &str, more: &[&str]) -> Value {
    let output = plan(rps, live, &example(), &[more, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_table_says_how_many_hosts_and_what_runs_out_first() {
    let output = plan("200", "10000", &example(), &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("each lives 50.0 s on average"), "{text}");
    // 10,000 of 24 MiB and half as much again, in 366 GiB that the host leaves: 0.96. But a daemon holds 4096.
    assert!(text.contains("3 hosts are needed"), "{text}");
    let first: Vec<_> = text.lines().filter(|line| line.ends_with("runs out first")).collect();
    assert!(first.len() == 1 && first[0].starts_with("sandboxes allowed"), "{text}");
    assert!(text.contains("at 81.9 creates/s with 4096 alive"), "{text}");
}

#[test]
fn more_load_takes_more_hosts_and_measured_costs_replace_the_defaults() {
    let some = planned("200", "4000", &[]);
    let more = planned("20000", "4000", &[]);
    assert_eq!(some["hosts"], 1);
    assert!(more["hosts"].as_u64() > some["hosts"].as_u64(), "{more}");
    assert_eq!(more["runs_out_first"], "cores for VMs");
    let report = json!({"idle_bytes_per_sandbox": 1_000_000, "results": [
        {"op": "restore_pool_hit", "p50_us": 400.0}, {"op": "restore_pool_miss", "p50_us": 3000.0},
        {"op": "destroy", "p50_us": 600.0}, {"op": "create_http", "p50_us": 800.0},
    ]});
    let report = file("engine", &report.to_string());
    let own = file("own", r#"{"exec_cpu_ms": 1.0}"#);
    let files = ["--measured", report.to_str().unwrap(), "--measured", own.to_str().unwrap()];
    let measured = planned("20000", "4000", &files);
    assert_eq!(measured["costs"]["idle_bytes"], 1e6);
    assert_eq!(measured["costs"]["create_cpu_ms"], 4.0);
    assert_eq!(measured["costs"]["exec_cpu_ms"], 1.0);
    assert!(measured["hosts"].as_u64() < more["hosts"].as_u64(), "{measured}");
    for path in [report, own] {
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn each_table_of_the_benchmark_gives_what_it_measured() {
    let density = json!({"format": "mica-bench", "command": "density", "results": [
        {"op": "density", "case": "live=0", "sandboxes": 0},
        {"op": "density", "case": "live=300", "sandboxes": 300, "bytes_per_sandbox": 6_000_000},
    ]});
    let dirty = json!({"format": "mica-bench", "command": "dirty", "results": [
        {"op": "snapshot_dirty", "case": "d=10", "dirty_mb": 10, "snapshot_bytes": 14_000_000},
        {"op": "create_from_dirty", "case": "d=10", "dirty_mb": 10},
        {"op": "snapshot_dirty", "case": "d=500", "dirty_mb": 500, "snapshot_bytes": 530_000_000},
    ]});
    let scale = json!({"results": [
        {"figure": "create_cpu_1_shard", "value": 1303.0, "unit": "us"},
        {"figure": "create_cpu_2_shards", "value": 1329.0, "unit": "us"},
    ]});
    let paths = [("density", density), ("dirty", dirty), ("scale", scale)]
        .map(|(name, report)| file(name, &report.to_string()));
    let mut files: Vec<&str> =
        paths.iter().flat_map(|path| ["--measured", path.to_str().unwrap()]).collect();
    let load = ["--snapshots-per-hour=3600"];
    let undecided = plan("20", "400", &example(), &files);
    let text = String::from_utf8_lossy(&undecided.stderr).into_owned();
    assert!(!undecided.status.success() && text.contains("10, 500 MB"), "{text}");
    files.push("--dirty-mb=10");
    let measured = planned("20", "400", &[&files[..], &load].concat());
    let costs = &measured["costs"];
    assert_eq!((&costs["idle_bytes"], &costs["snapshot_bytes"]), (&json!(6e6), &json!(14e6)));
    assert_eq!(costs["used_bytes"], 20e6, "what an idle one holds, and what it wrote");
    assert_eq!(costs["create_shard_cpu_ms"], 1.329);
    let source = |cost: &str| measured["cost_sources"][cost].clone();
    let of = |known: &str, file: &Path| json!({"known": known, "file": file});
    assert_eq!(source("idle_bytes"), of("bytes", &paths[0]));
    assert_eq!(source("snapshot_bytes"), of("bytes", &paths[1]));
    assert_eq!(source("create_shard_cpu_ms"), of("processor time", &paths[2]));
    assert_eq!(source("create_cpu_ms"), json!({"known": "wall time", "file": null}));
    // A snapshot of 14 MB a second, and a fifth more.
    let writes = |plan: &Value| {
        let lines = plan["resources"].as_array().unwrap();
        let line = lines.iter().find(|line| line["resource"] == "writes to the drive").unwrap();
        line["need"].as_f64().unwrap()
    };
    let assumed = planned("20", "400", &load);
    assert!((writes(&measured) / writes(&assumed) - 14e6 / (8.0 * 1048576.0)).abs() < 1e-9);
    let text = plan("20", "400", &example(), &files).stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(
        text.contains("create_cpu_ms is a wall time that stands in for processor time"),
        "{text}"
    );
    for path in paths {
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn a_create_and_code_that_ran_are_measured_and_not_derived() {
    let create = json!({"format": "mica-bench", "command": "create", "results": [
        {"op": "create", "case": "c=10", "n": 200, "success": 200, "failed": 0,
         "cpu_us_per_create": 9500.0, "daemon_cpu_us_per_create": 1500.0, "vms_cpu_us_per_create": 8000.0},
    ]});
    let after = json!({"format": "mica-bench", "command": "density", "results": [
        {"op": "density_after_code", "case": "live=0", "sandboxes": 0},
        {"op": "density_after_code", "case": "live=100", "sandboxes": 100, "bytes_per_sandbox": 33_000_000},
    ]});
    let dirty = json!({"results": [
        {"op": "snapshot_dirty", "case": "d=10", "dirty_mb": 10, "snapshot_bytes": 14_000_000},
    ]});
    let paths = [("after-code", after), ("create", create), ("one-size", dirty)]
        .map(|(name, report)| file(name, &report.to_string()));
    let files: Vec<&str> =
        paths.iter().flat_map(|path| ["--measured", path.to_str().unwrap()]).collect();
    let alone = planned("20", "400", &files[..2]);
    assert_eq!(alone["costs"]["used_bytes"], 33e6, "its report alone is enough");
    let all = planned("20", "400", &files);
    assert_eq!(all["costs"]["used_bytes"], 33e6, "whatever a snapshot holds");
    assert_eq!(all["costs"]["create_cpu_ms"], 9.5);
    assert_eq!(all["costs"]["create_shard_cpu_ms"], 1.5);
    let of = |known: &str, file: &Path| json!({"known": known, "file": file});
    assert_eq!(all["cost_sources"]["used_bytes"], of("bytes", &paths[0]));
    assert_eq!(all["cost_sources"]["create_cpu_ms"], of("processor time", &paths[1]));
    let text = String::from_utf8(plan("20", "400", &example(), &files).stdout).unwrap();
    assert!(!text.contains("wall time"), "{text}");
    for path in paths {
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn nonsense_is_an_error_that_says_what_is_wrong() {
    let refused = |output: Output, expected: &str| {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(output.stdout.is_empty() && text.contains(expected), "{text}");
    };
    for bad in ["0", "-5", "NaN", "inf", "1e300"] {
        refused(plan(bad, "100", &example(), &[]), "creates in a second");
        refused(plan("10", bad, &example(), &[]), "live sandboxes");
    }
    refused(plan("10", "100", &example(), &["--memory-headroom=0.5"]), "headroom of memory");
    refused(plan("10", "100", Path::new("/nonexistent"), &[]), "cannot open /nonexistent");
    for (name, text, expected) in [
        ("broken", "{", "is not JSON"),
        ("unknown", r#"{"cores": 4, "sockets": 2}"#, "unknown field `sockets`"),
        ("missing", r#"{"cores": 4}"#, "missing field `shards`"),
        (
            "full",
            r#"{"cores": 4, "shards": 4, "memory_bytes": 1e11, "nvme_bytes": 1e12, "nvme_write_bytes_per_s": 1e9}"#,
            "at least one core must be left",
        ),
    ] {
        let path = file(name, text);
        refused(plan("10", "100", &path, &[]), expected);
        std::fs::remove_file(path).unwrap();
    }
    let empty = file("report", r#"{"results": []}"#);
    let more = ["--measured", empty.to_str().unwrap()];
    refused(plan("10", "100", &example(), &more), "mica bench engine --json");
    std::fs::remove_file(empty).unwrap();
}
