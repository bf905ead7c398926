//! `mica template` as an operator runs it: bad input, failing steps, interruption, export, import.
//!
//! Called by `cargo test`. Refuses the network: apt and debootstrap are small scripts here, put
//! before the real ones in PATH. The builds need root for their namespaces; without it those tests
//! say so and do nothing. What a real build makes is checked by the end-to-end tests.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod image;
mod place;

use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use place::{DEBOOTSTRAP, Place, is_root, names, static_program, text};

#[test]
fn bad_input_is_refused_with_the_reason_and_nothing_is_made() {
    let place = Place::new();
    let cases: &[(&[&str], &str)] = &[
        (&["build", "--name", "../x"], "a template name is"),
        (&["build", "--name", "a/b"], "a template name is"),
        (&["build", "--name", ".."], "a template name is"),
        (&["build", "--name", ""], "a template name is"),
        (&["build", "--name", "x", "--memory", "64"], "--memory 64 is out of range"),
        (&["build", "--name", "x", "--memory", "999999999"], "out of range; give 128 to"),
        (&["build", "--name", "x", "--disk-mib", "1"], "--disk-mib 1 is out of range"),
        (&["build", "--name", "x", "--vcpus", "0"], "outside 1 to 8"),
        (&["build", "--name", "x", "--vcpus", "9"], "outside 1 to 8"),
        (&["build", "--name", "x", "--packages", "git,-y"], "`-y` is not the name"),
        (&["build", "--name", "x", "--packages", "a b"], "`a b` is not the name"),
        (&["build", "--name", "x", "--pip=-rx"], "`-rx` is not a PyPI requirement"),
        (&["build", "--name", "x", "--from", "docker"], "invalid value 'docker'"),
        (&["delete", "../x"], "a template name is"),
    ];
    for (args, reason) in cases {
        let output = place.run(args);
        assert!(!output.status.success(), "{args:?}");
        assert!(text(&output).contains(reason), "{args:?}: {}", text(&output));
        assert!(!place.path("store").exists(), "{args:?}");
        assert!(!place.path("cache").exists(), "{args:?}");
    }
    for args in [&["delete", "nobody"], &["export", "nobody"]] {
        let output = place.run(args);
        assert!(!output.status.success());
        assert!(text(&output).contains("there is no template `nobody`"), "{}", text(&output));
    }
}

#[test]
fn an_agent_that_cannot_run_in_an_initramfs_is_refused() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    for (agent, reason) in [
        ("/nonexistent", "there is no guest agent"),
        ("/etc/passwd", "not an x86-64 ELF program"),
        ("/bin/sh", "dynamically linked"),
    ] {
        let output = place.run(&["build", "--name", "base", "--guest-binary", agent]);
        assert!(!output.status.success());
        assert!(text(&output).contains(reason), "{}", text(&output));
    }
    place.assert_nothing_left();
}

#[test]
fn a_failing_step_is_named_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    // Inside the root file system: there is no `chmod` in it.
    let place = Place::new();
    let output = place.build().output().unwrap();
    assert!(!output.status.success());
    let said = text(&output);
    assert!(said.contains("step `base packages` failed"), "{said}");
    assert!(said.contains("chmod: not found"), "{said}");
    place.assert_nothing_left();

    // Outside of it.
    place.script("debootstrap", "#!/bin/sh\nmkdir -p $3/etc\necho no such mirror >&2\nexit 3\n");
    let output = place.build().output().unwrap();
    let said = text(&output);
    assert!(said.contains("step `base` failed"), "{said}");
    assert!(said.contains("exit code 3") && said.contains("no such mirror"), "{said}");
    place.assert_nothing_left();

    // The kernel was got once.
    assert!(said.contains("kernel] unchanged, taken from the cache"), "{said}");
}

/// Starts a build that hangs in its base recipe, and waits until it is there.
fn hanging_build(place: &Place) -> Child {
    let child = place.build().env("HANG", "1").stdout(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let here = place.0.to_str().unwrap();
    let mounted = || {
        fs::read_dir("/proc").unwrap().flatten().any(|process| {
            let path = process.path().join("mountinfo");
            let mounts = fs::read_to_string(path).unwrap_or_default();
            // The last thing mounted before the recipe starts.
            mounts.lines().any(|line| line.contains(here) && line.contains("/etc/hosts"))
        })
    };
    while !mounted() {
        assert!(Instant::now() < deadline, "the build never came to its recipe");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

fn pid(child: &Child) -> rustix::process::Pid {
    rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap()
}

#[test]
fn an_interrupted_build_leaves_nothing() {
    use rustix::process::{Signal, kill_process};
    if !is_root() {
        return;
    }
    for signal in [Signal::INT, Signal::TERM] {
        let place = Place::new();
        let child = hanging_build(&place);
        kill_process(pid(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(!output.status.success());
        place.assert_nothing_left();
    }
}

#[test]
fn after_a_killed_build_no_process_or_mount_is_left_and_the_next_one_tidies() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let mut child = hanging_build(&place);
    child.kill().unwrap();
    child.wait().unwrap();
    let here = place.0.to_str().unwrap().to_owned();
    let deadline = Instant::now() + Duration::from_secs(30);
    let left = || {
        fs::read_dir("/proc").unwrap().flatten().any(|process| {
            let path = process.path().join("mountinfo");
            fs::read_to_string(path).unwrap_or_default().contains(&here)
        })
    };
    while left() {
        assert!(Instant::now() < deadline, "mounts outlived the build");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(names(&place.path("store/templates")), [""; 0]);
    assert!(!place.build().output().unwrap().status.success());
    place.assert_nothing_left();
}

#[test]
fn a_build_makes_only_what_has_changed() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let build = |more: &[&str]| {
        let output =
            place.build().args(["--disk-mib", "256"]).args(more).env("WHOLE", "1").output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    };
    let made = |said: &str| -> Vec<String> {
        let stages = ["kernel", "initramfs", "base", "rootfs", "disk"];
        let made = |stage: &&str| said.contains(&format!(" {stage}] done in"));
        stages.into_iter().filter(made).map(str::to_owned).collect()
    };
    assert_eq!(made(&build(&[])), ["kernel", "initramfs", "base", "rootfs", "disk"]);
    let id = || -> String {
        let rows = text(&place.run(&["list", "--json"]));
        let rows: serde_json::Value = serde_json::from_str(&rows).unwrap();
        assert_eq!(rows.as_array().map(Vec::len), Some(1));
        rows[0]["templateId"].as_str().unwrap().to_owned()
    };
    let first = id();
    let again = build(&[]);
    assert!(again.contains("template `base` is up to date"), "{again}");
    assert_eq!(id(), first);

    // Another agent: another initramfs. More memory: nothing but another manifest.
    let mut agent = static_program();
    agent.push(1);
    fs::write(place.path("agent"), agent).unwrap();
    assert_eq!(made(&build(&[])), ["initramfs"]);
    assert_eq!(made(&build(&["--memory", "512"])), [""; 0]);
    assert_eq!(made(&build(&["--memory", "512", "--packages", "tree"])), ["rootfs", "disk"]);
    assert_ne!(id(), first);
    assert_eq!(made(&build(&["--force"])).len(), 5);

    // The content does not fit: refused before the image is made.
    fs::write(place.path("agent"), static_program()).unwrap();
    place.script(
        "debootstrap",
        &DEBOOTSTRAP.replace("if [", "truncate -s 300M \"$root/big\"\nif ["),
    );
    let output = place.build().args(["--disk-mib", "256", "--force"]).env("WHOLE", "1").output();
    let said = text(&output.unwrap());
    assert!(said.contains("step `disk` failed") && said.contains("give --disk-mib"), "{said}");
    assert_eq!(names(&place.path("cache/templates/tmp")), [""; 0]);
}

#[test]
fn own_templates_are_added_listed_carried_and_deleted() {
    let (here, there) = (Place::new(), Place::new());
    let disk = here.path("disk");
    fs::write(here.path("kernel"), [1; 3000]).unwrap();
    fs::write(&disk, vec![2; 1 << 20]).unwrap();
    let (kernel, disk) = (here.path("kernel"), disk.to_str().unwrap().to_owned());
    let kernel = kernel.to_str().unwrap();
    let add = ["add", "--name", "tiny", "--kernel", kernel, "--disk", &disk, "--ready", "console"];
    let output = here.run(&add);
    assert!(output.status.success(), "{}", text(&output));
    let output = here.run(&add);
    assert!(text(&output).contains("a template named `tiny` exists"), "{}", text(&output));

    let listed = text(&here.run(&["list"]));
    assert!(listed.lines().nth(1).unwrap().starts_with("tiny  "), "{listed}");
    let rows: serde_json::Value =
        serde_json::from_str(&text(&here.run(&["list", "--json"]))).unwrap();
    assert_eq!((&rows[0]["name"], &rows[0]["diskMib"]), (&"tiny".into(), &1.into()));
    assert_eq!(rows[0]["ready"], "console");

    let mut archive = here.run(&["export", "tiny"]).stdout;
    archive.extend_from_slice(&[0; 9999]);
    let carried = there.path("carried");
    fs::write(&carried, &archive).unwrap();
    let import = ["import", carried.to_str().unwrap()];
    for state in ["ready", "up to date"] {
        let output = there.run(&import);
        assert!(output.status.success(), "{}", text(&output));
        assert!(text(&output).contains(&format!("`tiny` is {state}")), "{}", text(&output));
    }
    assert!(text(&there.run(&["list"])).contains("tiny"));

    assert!(there.run(&["delete", "tiny"]).status.success());
    fs::write(&carried, &archive[..2000]).unwrap();
    let output = there.run(&import);
    assert!(text(&output).contains("not a whole template archive"), "{}", text(&output));

    assert!(!there.run(&["delete", "tiny"]).status.success());
    assert_eq!(names(&there.path("store/templates")), [""; 0]);
}
