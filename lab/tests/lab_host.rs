//! The emulated host, checked from inside it through `mica-lab`, as a user would.
//!
//! Runs only with `MICA_LAB_TESTS=1` (the Makefile sets it), because it boots a machine: half a
//! minute, and the image must be buildable. Without the variable it says that it was skipped. It
//! uses a lab of its own name and ports, and its own state directory.

#![expect(clippy::unwrap_used, reason = "in a test a panic with its place is the message")]

use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const NAME: &str = "lab-host-test";

struct Lab {
    directory: PathBuf,
    port: u16,
}

impl Lab {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mica-lab"));
        command.args(["--name", NAME]).args(words).env("MICA_LAB_DIR", &self.directory);
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    fn up(&self, binaries: &Path) -> Output {
        let port = self.port.to_string();
        let binaries = binaries.to_str().unwrap();
        self.run(&[
            "up",
            "--no-daemon",
            "--memory",
            "2048",
            "--cores",
            "1",
            "--drive",
            "4",
            "--port",
            &port,
            "--binaries",
            binaries,
        ])
    }

    /// What a shell line prints in the host. It must succeed.
    fn inside(&self, line: &str) -> String {
        let output = self.run(&["exec", "--", "sh", "-c", line]);
        assert!(output.status.success(), "{line}: {}", both(&output));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let output = self.run(&["down", "--wipe"]);
        if !output.status.success() {
            eprintln!("the test's lab did not go down: {}", both(&output));
        }
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("remove {}: {error}", self.directory.display());
        }
    }
}

fn both(output: &Output) -> String {
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(stdout), String::from_utf8_lossy(stderr))
}

/// One test, because one boot serves all the checks.
#[test]
fn the_emulated_host_is_what_mica_needs() {
    if std::env::var_os("MICA_LAB_TESTS").is_none_or(|value| value != "1") {
        eprintln!("skipped: set MICA_LAB_TESTS=1 to boot the emulated host");
        return;
    }
    let directory = std::env::temp_dir().join(format!("mica-lab-test-{}", std::process::id()));
    let binaries = directory.join("binaries");
    std::fs::create_dir_all(&binaries).unwrap();
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let lab = Lab { directory, port };

    assert!(!lab.run(&["status"]).status.success(), "status of a lab that is down must fail");
    let env = lab.run(&["env"]);
    assert!(!env.status.success() && both(&env).contains("mica lab up"), "{}", both(&env));

    let up = lab.up(&binaries);
    assert!(up.status.success(), "{}", both(&up));
    machine(&lab);
    kvm(&lab);
    store(&lab);
    exec(&lab);
    outside(&lab);
    second_up_pushes_programs(&lab, &binaries);
    power_cycle(&lab, &binaries);
    killed_qemu_is_noticed(&lab, &binaries);
}

fn machine(lab: &Lab) {
    assert_eq!(lab.inside("ls -d /sys/devices/system/node/node[0-9]* | wc -l"), "2");
    assert_eq!(lab.inside("cat /sys/devices/system/node/node1/cpulist"), "1");
    let release = lab.inside("uname -r");
    let mut numbers = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    assert!(version >= (6, 7), "PAGEMAP_SCAN needs 6.7: {release}");
    assert_eq!(lab.inside("cat /proc/1/comm"), "tini");
    assert!(lab.inside("cat /sys/fs/cgroup/cgroup.subtree_control").contains("memory"));
    assert!(!lab.inside("cat /var/log/mica.log 2>/dev/null; true").contains("panic"));
    let console = std::fs::read_to_string(lab.directory.join(NAME).join("console.log")).unwrap();
    assert!(console.contains("mica-init: ready"), "{console}");
    assert!(!console.contains("FAILED"), "{console}");
}

fn kvm(lab: &Lab) {
    lab.inside("test -d /sys/module/kvm_amd && test -c /dev/kvm");
    assert!(matches!(lab.inside("cat /sys/module/kvm_amd/parameters/npt").as_str(), "Y" | "1"));
}

fn store(lab: &Lab) {
    assert!(lab.inside("findmnt -n -o SOURCE,FSTYPE /var/lib/mica").contains("/dev/nvme"));
    lab.inside(
        "cd /var/lib/mica && head -c 1048576 /dev/urandom > a && cp --reflink=always a b && \
         cmp a b && rm a b",
    );
}

fn exec(lab: &Lab) {
    for code in [0, 7, 255] {
        let line = format!("exit {code}");
        assert_eq!(lab.run(&["exec", "--", "sh", "-c", &line]).status.code(), Some(code));
    }
    assert_eq!(lab.run(&["exec", "--", "sh", "-c", "kill -9 $$"]).status.code(), Some(137));
    let missing = lab.run(&["exec", "--", "/nonexistent"]);
    assert_eq!(missing.status.code(), Some(127), "{}", both(&missing));

    let split = lab.run(&["exec", "--", "sh", "-c", "echo out; echo err >&2"]);
    assert_eq!((split.stdout.as_slice(), split.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));

    // More than any buffer on the way, through both directions at once.
    let big: Vec<u8> = (0..4_000_000_u32).flat_map(u32::to_le_bytes).take(3_000_001).collect();
    let mut child = lab
        .command(&["exec", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let sent = big.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.stdout == big, "{} bytes came back", output.stdout.len());

    // A client that dies takes its program with it; another one is not disturbed.
    let mut doomed = lab.command(&["exec", "--", "sleep", "4242"]).spawn().unwrap();
    wait_for("the doomed program starts", || alive(lab, "sleep 4242"));
    doomed.kill().unwrap();
    doomed.wait().unwrap();
    wait_for("the doomed program dies", || !alive(lab, "sleep 4242"));
}

fn alive(lab: &Lab, what: &str) -> bool {
    lab.run(&["exec", "--", "pgrep", "-xf", what]).status.success()
}

fn wait_for(what: &str, mut come_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !come_true() {
        assert!(Instant::now() < deadline, "waited too long: {what}");
    }
}

/// Every listening socket of QEMU is on loopback.
fn outside(lab: &Lab) {
    let status = both(&lab.run(&["status"]));
    assert!(status.contains("host: answers"), "{status}");
    let pid = std::fs::read_to_string(lab.directory.join(NAME).join("qemu.pid")).unwrap();
    let ours = sockets_of(pid.trim());
    let mut seen = 0;
    for table in ["tcp", "tcp6"] {
        let text = std::fs::read_to_string(format!("/proc/net/{table}")).unwrap();
        for line in text.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            if words[3] == "0A" && ours.contains(&words[9].to_owned()) {
                seen += 1;
                assert!(words[1].starts_with("0100007F:"), "not on 127.0.0.1: {line}");
            }
        }
    }
    assert_eq!(seen, 2, "the API and the exec channel listen");
}

fn sockets_of(pid: &str) -> Vec<String> {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .filter_map(|target| {
            let name = target.to_string_lossy().into_owned();
            Some(name.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect()
}

fn second_up_pushes_programs(lab: &Lab, binaries: &Path) {
    std::fs::write(binaries.join("mica-vm"), "#!/bin/sh\necho one\n").unwrap();
    let again = lab.up(binaries);
    assert!(both(&again).contains("the lab is up; replacing mica-vm"), "{}", both(&again));
    assert_eq!(lab.inside("mica-vm"), "one");
    let third = lab.up(binaries);
    assert!(both(&third).trim().ends_with("the lab is up"), "{}", both(&third));
}

/// The store lives through a clean power cycle; the root does not.
fn power_cycle(lab: &Lab, binaries: &Path) {
    lab.inside("echo kept > /var/lib/mica/marker; echo lost > /root/marker");
    let down = lab.run(&["down"]);
    assert!(down.status.success(), "{}", both(&down));
    assert!(!both(&down).contains("killing"), "{}", both(&down));
    let up = lab.up(binaries);
    assert!(up.status.success(), "{}", both(&up));
    assert_eq!(lab.inside("cat /var/lib/mica/marker"), "kept");
    lab.inside("test ! -e /root/marker");
}

fn killed_qemu_is_noticed(lab: &Lab, binaries: &Path) {
    let pid = std::fs::read_to_string(lab.directory.join(NAME).join("qemu.pid")).unwrap();
    assert!(Command::new("kill").args(["-9", pid.trim()]).status().unwrap().success());
    wait_for("status sees the death", || both(&lab.run(&["status"])).contains("down"));
    let up = lab.up(binaries);
    assert!(up.status.success(), "{}", both(&up));
    assert_eq!(lab.inside("cat /var/lib/mica/marker"), "kept");
}
