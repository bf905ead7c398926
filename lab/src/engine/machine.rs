//! The machine that figures are of: for the report, and for whoever reads a table at the terminal.
//!
//! Called by `mica-bench` at the end of a run. Reads what `mica doctor` reads. Refuses to judge it: `mica doctor`
//! does.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use mica_numa::facts::{Disk, Facts, KvmKind};
use serde_json::{Value, json};

/// Where `mica serve` has its control groups and its store unless it is told otherwise.
const CGROUP: &str = "/sys/fs/cgroup/mica";
const STORE: &str = "/var/lib/mica";

/// The machine. `store` is where the daemon keeps what it writes; without it nothing is said of disks.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn host(store: Option<&Path>) -> Result<Value> {
    let line = |path: &str, name: &str| -> Result<Option<String>> {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {path}"))?;
        let found = text.lines().find_map(|line| line.strip_prefix(name));
        Ok(found.map(|rest| rest.trim_start_matches([':', '\t', ' ']).trim().to_owned()))
    };
    let memory = line("/proc/meminfo", "MemTotal")?.unwrap_or_default();
    let memory: u64 = memory.split(' ').next().and_then(|kib| kib.parse().ok()).unwrap_or(0);
    let store: Option<PathBuf> = store.map(std::fs::canonicalize).transpose()?;
    let at = store.as_deref().unwrap_or(Path::new("/"));
    let facts = Facts::read(Path::new("/"), at, Path::new(CGROUP), KvmKind::try_device());
    let mut host = json!({
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "cpu": line("/proc/cpuinfo", "model name")?,
        "cores": std::thread::available_parallelism()?.get(),
        "memory_bytes": memory * 1024,
        "filesystem": store.as_deref().map(filesystem).transpose()?,
        "drive": store.as_ref().and_then(|_| drives(&facts.store.disks)),
        "commit": commit(),
        // Those of the `lab` profile and of debug builds check themselves, and are slower.
        "assertions": cfg!(debug_assertions),
    });
    for (name, value) in of(&facts) {
        host[name] = value;
    }
    Ok(host)
}

/// What `mica doctor` looks at, and figures depend on.
fn of(facts: &Facts) -> [(&'static str, Value); 7] {
    let all: Vec<String> =
        facts.governors.iter().map(|(name, count)| format!("{name} on {count}")).collect();
    [
        ("kvm", json!(facts.kvm.name())),
        ("nx_huge_pages", json!(facts.nx_huge_pages)),
        ("nodes", json!(facts.nodes)),
        ("sockets", json!((facts.packages > 0).then_some(facts.packages))),
        ("smt", json!(facts.smt_active)),
        ("governor", json!((!all.is_empty()).then(|| all.join(", ")))),
        ("cgroup", json!(facts.cgroup.versions)),
    ]
}

/// In words; `None` where they are not known.
fn drives(disks: &[Disk]) -> Option<String> {
    let words = |disk: &Disk| {
        let below = disk.volume.as_ref().map(|volume| format!(" below {volume}"));
        let file = disk.backing_file.as_ref().map(|file| format!(" over {file}"));
        let scheduler = disk.scheduler.as_deref().unwrap_or("none to choose");
        let (below, file) = (below.unwrap_or_default(), file.unwrap_or_default());
        format!("{}{below}{file}, queues: {}, scheduler: {scheduler}", disk.name, disk.queues)
    };
    let all: Vec<String> = disks.iter().map(words).collect();
    (!all.is_empty()).then(|| all.join("; "))
}

/// A machine that [`host`] described, by this version or an earlier one, as lines below a table.
#[must_use]
pub fn text(host: &Value) -> String {
    lines(host).into_iter().map(|(name, line)| format!("{name:<8} {line}\n")).collect()
}

/// The same: what each line is of, and what it says.
#[must_use]
pub fn lines(host: &Value) -> Vec<(&'static str, String)> {
    let word = |field: &str, show: fn(&str) -> String| match &host[field] {
        Value::Null => None,
        Value::String(text) => Some(show(text)),
        other => Some(show(&other.to_string())),
    };
    let same = |text: &str| text.to_owned();
    let gib = |bytes: &str| {
        let mib = bytes.parse::<u64>().unwrap_or(0) >> 20;
        format!("{}.{} GiB", mib / 1024, mib % 1024 * 10 / 1024)
    };
    let smt = |on: &str| format!("SMT {}", if on == "true" { "on" } else { "off" });
    let build =
        |on: &str| if on == "true" { "with assertions, which cost time" } else { "" }.to_owned();
    let lines = [
        (
            "machine",
            vec![
                word("cpu", same),
                word("sockets", |count| format!("sockets: {count}")),
                word("nodes", |count| format!("nodes: {count}")),
                word("cores", |count| format!("threads: {count}")),
                word("smt", smt),
                word("governor", |name| format!("governor: {name}")),
                word("memory_bytes", gib),
            ],
        ),
        (
            "kernel",
            vec![
                word("kernel", same),
                word("kvm", |kind| format!("KVM: {kind}")),
                word("nx_huge_pages", |value| format!("nx_huge_pages: {value}")),
                word("cgroup", |version| format!("cgroup {version}")),
            ],
        ),
        ("store", vec![word("filesystem", same), word("drive", same)]),
        ("source", vec![word("commit", same), word("assertions", build)]),
    ];
    let said = lines.into_iter().filter_map(|(name, words)| {
        let words: Vec<String> =
            words.into_iter().flatten().filter(|word| !word.is_empty()).collect();
        (!words.is_empty()).then(|| (name, words.join(", ")))
    });
    said.collect()
}

/// The store of a daemon that runs here, by its command line; `None` where it is not to be seen.
#[must_use]
pub fn store_of(pid: u32) -> Option<PathBuf> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let line = std::fs::read(process.join("cmdline")).ok()?;
    let directory = std::fs::read_link(process.join("cwd")).ok()?;
    let store = directory.join(told(&String::from_utf8_lossy(&line)).unwrap_or(STORE));
    store.exists().then_some(store)
}

/// What a command line says of the store.
fn told(line: &str) -> Option<&str> {
    let words: Vec<&str> = line.split('\0').collect();
    words.iter().enumerate().find_map(|(at, word)| match *word {
        "--store" => words.get(at + 1).copied(),
        word => word.strip_prefix("--store="),
    })
}

/// Kind and device of the file system that holds `path`.
fn filesystem(path: &Path) -> Result<String> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let holds = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (device, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
        path.starts_with(point).then(|| (point.len(), format!("{kind} on {device}")))
    });
    // The longest is the innermost, and of two in one place the last lies on top.
    let innermost = holds.max_by_key(|(length, _)| *length);
    Ok(innermost.map(|(_, text)| text).unwrap_or_default())
}

/// The commit of the source that the working directory is in, where there is one.
fn commit() -> Option<String> {
    let described = Command::new("git").args(["describe", "--always", "--dirty"]).output().ok()?;
    let text = String::from_utf8(described.stdout).ok()?;
    (described.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_described() {
        let host = host(Some(Path::new("/"))).unwrap();
        assert!(host["kernel"].as_str().is_some_and(|kernel| kernel.contains('.')));
        assert!(host["cores"].as_u64().is_some_and(|cores| cores > 0));
        assert!(host["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20));
        assert!(host["filesystem"].as_str().is_some_and(|text| text.contains(" on ")));
        let kinds = ["vmx", "svm", "pvm", "none"];
        assert!(host["kvm"].as_str().is_some_and(|kind| kinds.contains(&kind)), "{host}");
        assert!(host["nodes"].as_u64().is_some(), "{host}");
        assert!(host["cgroup"].as_str().is_some_and(|version| version.starts_with('v')), "{host}");
        for name in ["nx_huge_pages", "sockets", "smt", "governor", "drive"] {
            let is_plain = |value: &Value| !value.is_object() && !value.is_array();
            assert!(host.get(name).is_some_and(is_plain), "{name} is not in {host}");
        }
    }

    #[test]
    fn without_a_store_nothing_is_said_of_disks() {
        let host = host(None).unwrap();
        assert_eq!((&host["filesystem"], &host["drive"]), (&Value::Null, &Value::Null));
        assert!(!text(&host).contains("store"), "{}", text(&host));
    }

    #[test]
    fn every_fact_is_at_the_terminal_and_old_reports_lack_some() {
        let host = json!({
            "cpu": "A", "sockets": 2, "nodes": 4, "cores": 96, "smt": true, "governor": "performance on 96",
            "memory_bytes": 401_653_760u64 * 1024, "kernel": "6.12", "kvm": "vmx", "nx_huge_pages": "never",
            "cgroup": "v2", "filesystem": "xfs on /dev/dm-0", "drive": "nvme0n1 below dm-0", "commit": "abc",
            "assertions": true,
        });
        let expected = "\
machine  A, sockets: 2, nodes: 4, threads: 96, SMT on, governor: performance on 96, 383.0 GiB
kernel   6.12, KVM: vmx, nx_huge_pages: never, cgroup v2
store    xfs on /dev/dm-0, nvme0n1 below dm-0
source   abc, with assertions, which cost time
";
        assert_eq!(text(&host), expected);
        let old = json!({ "cpu": null, "cores": 2, "kernel": "6.1", "assertions": false });
        assert_eq!(text(&old), "machine  threads: 2\nkernel   6.1\n");
        assert_eq!(text(&Value::Null), "");
    }

    #[test]
    fn a_daemon_tells_its_store() {
        assert_eq!(told("mica\0serve\0--store\0/a b\0--listen\0x\0"), Some("/a b"));
        assert_eq!(told("mica\0serve\0--store=b\0"), Some("b"));
        assert_eq!(told("mica\0serve\0--stored\0c\0"), None);
        assert_eq!(store_of(u32::MAX), None);
    }

    #[test]
    fn every_drive_is_named() {
        let disk = |name: &str| Disk {
            name: name.to_owned(),
            volume: Some("md0".to_owned()),
            queues: 8,
            scheduler: Some("none".to_owned()),
            is_rotational: Some(false),
            backing_file: None,
        };
        let both = "nvme0n1 below md0, queues: 8, scheduler: none; nvme1n1 below md0, queues: 8, scheduler: none";
        assert_eq!(drives(&[disk("nvme0n1"), disk("nvme1n1")]).as_deref(), Some(both));
        assert_eq!(drives(&[]), None);
    }
}
