//! `mica doctor` on the machine that the tests run on.

use std::process::{Command, Output};

use serde_json::Value;

const MICA: &str = env!("CARGO_BIN_EXE_mica");

fn run(arguments: &[&str]) -> Output {
    Command::new(MICA).args(arguments).output().expect("run mica")
}

#[test]
fn every_check_has_a_row_and_the_exit_code_follows_from_them() {
    let store = std::env::temp_dir().join(format!("mica-api-doctor-{}", std::process::id()));
    std::fs::create_dir(&store).expect("a directory");
    let path = store.to_str().expect("a text");
    let json = run(&["doctor", "--json", "--store", path]);
    let text = run(&["doctor", "--store", path]);
    let left = std::fs::read_dir(&store).expect("a list").count();
    std::fs::remove_dir(&store).expect("it is empty");
    assert_eq!(left, 0, "something was left in the store");

    let rows: Vec<Value> = serde_json::from_slice(&json.stdout).expect("an array");
    let status_of = |check: &str| {
        let row = rows.iter().find(|row| row["check"] == check);
        row.unwrap_or_else(|| panic!("no row {check} in {rows:?}"))["status"]
            .as_str()
            .expect("a text")
    };
    for check in [
        "user",
        "kernel",
        "memlock",
        "open files",
        "kvm.nx_huge_pages",
        "smt",
        "governor",
        "transparent huge pages",
        "ksm",
        "swap",
        "numa balancing",
        "reflink",
        "direct I/O",
        "device",
        "cgroup",
    ] {
        assert!(["ok", "note", "warn", "fail"].contains(&status_of(check)), "{check}");
    }
    // The tests around this one need a ring, and know of KVM from elsewhere.
    assert_eq!(status_of("io_uring"), "ok");
    assert_eq!(status_of("kvm") == "ok", run(&["kvm-kind"]).status.success());

    let fails = rows.iter().any(|row| row["status"] == "fail");
    assert_eq!(json.status.success(), !fails);
    assert_eq!(text.status.success(), !fails);
    let shown = String::from_utf8(text.stdout).expect("text");
    for row in &rows {
        let found = row["found"].as_str().expect("a text");
        assert!(shown.contains(found), "{found} is not in {shown}");
    }
}
