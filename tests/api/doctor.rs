//! `mica doctor` on the machine that the tests run on, as it is and with what `mica serve` refuses.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

use crate::daemon::cgroup;

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
        "program",
        "user",
        "capabilities",
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
        "store",
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

/// What `mica serve` and `mica doctor` are told: everything of this test alone.
struct Place {
    directory: PathBuf,
    cgroup: PathBuf,
}

impl Place {
    fn new(name: &str) -> Self {
        let name = format!("mica-doctor-{name}-{}", std::process::id());
        let directory = std::env::temp_dir().join(&name);
        std::fs::create_dir(&directory).expect("a directory");
        Self { directory, cgroup: cgroup().0.join(name) }
    }

    fn text(&self, name: &str) -> String {
        self.directory.join(name).to_str().expect("a text").to_owned()
    }

    /// Both, under `wrapper`: what `serve` said when it refused, and the doctor's row of that.
    fn refused(
        &self,
        wrapper: &[&str],
        mica: &str,
        program: &[&str],
        check: &str,
    ) -> (String, Value) {
        let (store, keys) = (self.text("store"), self.text("keys"));
        let cgroup = self.cgroup.to_str().expect("a text");
        let common = ["--store", &store, "--cgroup-root", cgroup];
        let serve = ["serve", "--listen", "127.0.0.1:0", "--key-file", &keys];
        let lax = ["--shards", "1", "--without-cgroup-limits", "--accept-unusable-kvm"];
        // Where it runs after all, it is ended, and then nothing was refused.
        let words = [&["60"], wrapper, &[mica], &serve, &common, &lax, program].concat();
        let served = Command::new("timeout").args(words).output().expect("mica serve");
        let said = String::from_utf8_lossy(&served.stderr).into_owned();
        assert_eq!(served.status.code(), Some(1), "mica serve did not refuse: {said}");
        let words = [wrapper, &[mica, "doctor", "--json"], &common, program].concat();
        let doctor = Command::new(words[0]).args(&words[1..]).output().expect("mica doctor");
        assert_eq!(doctor.status.code(), Some(1), "{doctor:?}");
        (said, row(&doctor, check))
    }

    /// The row of a check where nothing is in the way.
    fn usual(&self, check: &str) -> Value {
        let (store, cgroup) = (self.text("store"), self.cgroup.to_str().expect("a text"));
        row(&run(&["doctor", "--json", "--store", &store, "--cgroup-root", cgroup]), check)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Made by a daemon that came so far.
        drop(std::fs::remove_dir(&self.cgroup));
        drop(std::fs::remove_dir_all(&self.directory));
    }
}

fn row(doctor: &Output, check: &str) -> Value {
    let rows: Vec<Value> = serde_json::from_slice(&doctor.stdout).expect("an array");
    rows.into_iter().find(|row| row["check"] == check).expect("its row")
}

/// Runs what follows after `script`, whose mounts nobody else sees.
fn apart(script: &str) -> [String; 6] {
    let script = format!("{script} && exec \"$@\"");
    ["unshare", "--mount", "sh", "-c", &script, "sh"].map(str::to_owned)
}

/// A program that can be run; what it does is nobody's business here.
const PROGRAM: [&str; 2] = ["--vm-program", "/bin/true"];

#[test]
fn control_groups_that_cannot_be_written_are_refused_by_both() {
    let place = Place::new("groups");
    let mount = cgroup().0;
    let mount = mount.to_str().expect("a text");
    let wrapper =
        apart(&format!("mount --bind {mount} {mount} && mount -o remount,bind,ro {mount}"));
    let wrapper = wrapper.each_ref().map(String::as_str);
    let (said, row) = place.refused(&wrapper, MICA, &PROGRAM, "cgroup");
    assert!(said.contains("cannot make the cgroup"), "{said}");
    assert_eq!(row["status"], "fail");
    let wanted = format!("{mount}: Read-only file system");
    assert!(row["found"].as_str().is_some_and(|found| found.contains(&wanted)), "{row}");
    let usual = place.usual("cgroup");
    assert!(!usual["found"].as_str().expect("a text").contains("Read-only"), "{usual}");
}

#[test]
fn a_store_that_cannot_be_written_is_refused_by_both() {
    let place = Place::new("store");
    let store = place.text("store");
    std::fs::create_dir(&store).expect("a directory");
    let wrapper = apart(&format!("mount -t tmpfs -o ro none {store}"));
    let wrapper = wrapper.each_ref().map(String::as_str);
    let (said, row) = place.refused(&wrapper, MICA, &PROGRAM, "store");
    assert!(said.contains("Read-only file system"), "{said}");
    assert_eq!(row["status"], "fail");
    assert_eq!(row["found"], format!("{store}: Read-only file system (os error 30)"));
    assert_eq!(place.usual("store")["status"], "ok");
}

#[test]
fn a_missing_program_is_refused_by_both() {
    let place = Place::new("program");
    // Alone in a directory, as somebody may copy it.
    let alone = place.text("mica");
    std::fs::copy(MICA, &alone).expect("a copy");
    let missing = place.text("mica-vm");
    let (said, row) = place.refused(&["env"], &alone, &[], "program");
    assert!(said.contains(&format!("there is no file {missing}")), "{said}");
    assert_eq!(row["status"], "fail");
    assert_eq!(row["found"], format!("{missing}: No such file or directory (os error 2)"));
    std::fs::write(&missing, "#!/bin/sh\n").expect("a file");
    let (said, row) = place.refused(&["env"], &alone, &[], "program");
    assert!(said.contains("not an executable file"), "{said}");
    assert_eq!(
        (&row["status"], &row["found"]),
        (&"fail".into(), &format!("{missing}: it is no executable file").into())
    );
}

#[test]
fn a_missing_capability_is_refused_by_both() {
    let place = Place::new("capabilities");
    let without = ["setpriv", "--bounding-set=-sys_admin"];
    let (said, row) = place.refused(&without, MICA, &PROGRAM, "capabilities");
    assert!(said.contains("not permitted"), "{said}");
    assert_eq!((&row["status"], &row["found"]), (&"fail".into(), &"without CAP_SYS_ADMIN".into()));
    assert_eq!(place.usual("capabilities")["status"], "ok");
}
