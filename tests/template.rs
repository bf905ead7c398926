//! `mica template` as an operator runs it: bad input, failing steps, interruption, export, import.
//!
//! Called by `cargo test`. Refuses the network: apt and debootstrap are small scripts here, put
//! before the real ones in PATH. The builds need root for their namespaces; without it those tests
//! say so and do nothing. What a real build makes is checked by the end-to-end tests.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A directory with a store, a cache, an agent, and scripts in place of apt and debootstrap.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let place = Self(std::env::temp_dir().join(format!("mica-cli-{}-{n}", std::process::id())));
        fs::create_dir_all(place.path("bin")).unwrap();
        fs::write(place.path("agent"), static_program()).unwrap();
        place.script("apt-cache", APT_CACHE);
        place.script("apt-config", "#!/bin/sh\n");
        place.script("apt-get", APT_GET);
        place.script("debootstrap", DEBOOTSTRAP);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn script(&self, name: &str, text: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn mica(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
        let path = std::env::var("PATH").unwrap();
        command
            .arg("template")
            .args(args)
            .args(["--store".as_ref(), self.path("store").as_os_str()])
            .env("MICA_CACHE_DIR", self.path("cache"))
            .env("PATH", format!("{}:{path}", self.path("bin").display()));
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.mica(args).output().unwrap()
    }

    fn build(&self) -> Command {
        let agent = self.path("agent");
        self.mica(&["build", "--name", "base", "--guest-binary", agent.to_str().unwrap()])
    }

    /// Fails unless nothing of a build is left: no mount, no process, no directory, no template.
    fn assert_nothing_left(&self) {
        let here = self.0.to_str().unwrap();
        for process in fs::read_dir("/proc").unwrap().flatten() {
            // A process may end while it is looked at: what cannot be read is gone.
            let mounts = fs::read_to_string(process.path().join("mountinfo")).unwrap_or_default();
            assert!(!mounts.contains(here), "{} still has {mounts}", process.path().display());
        }
        assert_eq!(names(&self.path("cache/templates/tmp")), [""; 0]);
        assert_eq!(names(&self.path("store/templates")), [""; 0]);
        assert_eq!(names(&self.path("store/names")), [""; 0]);
        let stages = names(&self.path("cache/templates/stages"));
        assert!(stages.iter().all(|s| s.starts_with("kernel-") || s.starts_with("initramfs-")));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// A kernel package with all its drivers built in.
const APT_GET: &str = r#"#!/bin/sh
set -eu
case $1 in
indextargets) echo "Packages http://mirror.invalid/debian bookworm" ;;
download)
    mkdir -p pkg/DEBIAN pkg/boot pkg/lib/modules/6.12
    printf 'Package: k\nVersion: 1\nArchitecture: amd64\nMaintainer: t <t@t>\nDescription: t\n' \
        >pkg/DEBIAN/control
    echo a kernel >pkg/boot/vmlinuz-6.12
    for module in virtio virtio_ring virtio_mmio virtio_blk vsock \
        vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport rng-core virtio-rng \
        virtio_balloon; do
        echo "kernel/$module.ko"
    done >pkg/lib/modules/6.12/modules.builtin
    dpkg-deb -b pkg k.deb >/dev/null
    rm -r pkg ;;
esac
"#;

const APT_CACHE: &str = r#"#!/bin/sh
case $1 in
pkgnames) echo linux-image-6.12.5+deb12-cloud-amd64 ;;
show) echo "Version: 6.12.5-1" ;;
esac
"#;

/// Makes a root with a shell and nothing else. Opening the pipe stops the base recipe at its
/// first command, inside its namespaces and with all its mounts. A whole one has commands that do
/// nothing, so that the recipes get to their ends.
const DEBOOTSTRAP: &str = r#"#!/bin/sh
set -eu
root=$3
mkdir -p "$root/proc" "$root/run" "$root/tmp" "$root/dev" "$root/etc/apt" "$root/bin" \
    "$root/usr/sbin"
cp /bin/sh "$root/bin/sh"
for library in $(ldd /bin/sh | grep -o '/[^ ]*'); do
    mkdir -p "$root${library%/*}"
    cp "$library" "$root$library"
done
if [ -n "${WHOLE:-}" ]; then
    mkdir -p "$root/etc/dpkg/dpkg.cfg.d" "$root/etc/apt/apt.conf.d" "$root/etc/sudoers.d" \
        "$root/etc/default"
    for tool in apt-get cat chmod chown find ln mkdir rm useradd; do
        printf '#!/bin/sh\n' >"$root/bin/$tool"
        chmod 755 "$root/bin/$tool"
    done
fi
[ -z "${HANG:-}" ] || mkfifo "$root/usr/sbin/policy-rc.d"
"#;

/// The header of a static x86-64 program: as much of one as the build looks at.
fn static_program() -> Vec<u8> {
    let mut elf = vec![0; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[18] = 62;
    elf
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(out), String::from_utf8_lossy(err))
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: a template build needs root");
    }
    root
}

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
