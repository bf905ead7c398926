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
