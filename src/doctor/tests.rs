//! Two made-up machines, and what the doctor says of each.
//!
//! Refuses to look at the machine that the tests run on.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use mica_numa::facts::{Disk, Facts, KvmKind, Limit};

use super::finding::{Finding, Status};
use super::probe::{Direct, Probed, Refused};
use super::{Seen, judge, show};

/// A tree of files that goes with the value.
struct Tree(PathBuf);

impl Tree {
    fn new(name: &str, files: &[(&str, &str)]) -> Self {
        let root = std::env::temp_dir().join(format!("mica-doctor-{name}-{}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Self(root)
    }

    fn read(&self, probed: Probed) -> Seen {
        let (store, cgroup) = ("/var/lib/mica", "/sys/fs/cgroup/mica");
        let (store, cgroup) = (Path::new(store), Path::new(cgroup));
        Seen { facts: Facts::read(&self.0, store, cgroup, probed.kvm_device), probed }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap_or_default();
    }
}

const GOOD: &[(&str, &str)] = &[
    (
        "proc/cpuinfo",
        "processor\t: 0\nflags\t\t: fpu vmx\n\nprocessor\t: 1\nflags\t\t: fpu vmx\n\n\
         processor\t: 2\nflags\t\t: fpu vmx\n\nprocessor\t: 3\nflags\t\t: fpu vmx\n",
    ),
    ("proc/sys/kernel/osrelease", "6.12.12+bpo-amd64\n"),
    ("proc/sys/kernel/io_uring_disabled", "0\n"),
    ("proc/sys/kernel/numa_balancing", "0\n"),
    ("proc/sys/fs/nr_open", "1073741816\n"),
    ("proc/self/status", "Name:\tmica\nUid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\n"),
    (
        "proc/self/limits",
        "Limit                     Soft Limit           Hard Limit           Units     \n\
         Max open files            1024                 524288               files     \n\
         Max locked memory         unlimited            unlimited            bytes     \n",
    ),
    (
        "proc/self/mountinfo",
        "22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n\
         30 22 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate,favordynmods\n\
         40 22 259:5 / /var/lib/mica rw,noatime shared:9 - xfs /dev/nvme1n1p1 rw,attr2\n",
    ),
    ("proc/swaps", "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"),
    ("sys/module/kvm/parameters/nx_huge_pages", "never\n"),
    ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
    ("sys/kernel/mm/ksm/run", "0\n"),
    ("sys/devices/system/cpu/smt/active", "0\n"),
    ("sys/devices/system/cpu/cpufreq/policy0/scaling_governor", "performance\n"),
    ("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n"),
    ("sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "performance\n"),
    ("sys/devices/system/cpu/cpuidle/current_driver", "intel_idle\n"),
    ("sys/devices/system/cpu/cpu0/cpuidle/state0/name", "POLL\n"),
    ("sys/devices/system/cpu/cpu0/cpuidle/state0/latency", "0\n"),
    ("sys/devices/system/cpu/cpu0/cpuidle/state1/name", "C1\n"),
    ("sys/devices/system/cpu/cpu0/cpuidle/state1/latency", "1\n"),
    ("sys/devices/system/cpu/cpu0/cpuidle/state2/name", "C6\n"),
    ("sys/devices/system/cpu/cpu0/cpuidle/state2/latency", "170\n"),
    ("sys/devices/system/cpu/cpu0/cpuidle/state2/disable", "1\n"),
    ("sys/devices/system/cpu/cpu2/cpufreq/scaling_governor", "performance\n"),
    ("sys/devices/system/cpu/cpu3/cpufreq/scaling_governor", "performance\n"),
    ("sys/devices/system/node/node0/cpulist", "0-1\n"),
    ("sys/devices/system/node/node1/cpulist", "2-3\n"),
    ("sys/devices/system/node/has_cpu", "0-1\n"),
    ("sys/block/nvme0n1/dev", "259:0\n"),
    ("sys/block/nvme0n1/nvme0n1p2/dev", "259:2\n"),
    ("sys/block/nvme1n1/dev", "259:4\n"),
    ("sys/block/nvme1n1/nvme1n1p1/dev", "259:5\n"),
    ("sys/block/nvme1n1/mq/0/cpu_list", "0\n"),
    ("sys/block/nvme1n1/mq/1/cpu_list", "1\n"),
    ("sys/block/nvme1n1/mq/2/cpu_list", "2\n"),
    ("sys/block/nvme1n1/mq/3/cpu_list", "3\n"),
    ("sys/block/nvme1n1/queue/scheduler", "[none] mq-deadline kyber\n"),
    ("sys/block/nvme1n1/queue/rotational", "0\n"),
    ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids rdma misc\n"),
];

fn refused(path: &str, why: &str) -> Result<PathBuf, Refused> {
    Err(Refused { path: PathBuf::from(path), why: why.to_owned() })
}

fn good_answers() -> Probed {
    Probed {
        kvm_device: Ok(()),
        io_uring: Ok(Vec::new()),
        program: Ok(PathBuf::from("/usr/bin/mica-vm")),
        store: Ok(()),
        cgroup: Ok(()),
        clones: Some(true),
        direct: Some(Direct { memory_bytes: 512, offset_bytes: 512 }),
    }
}

const BAD: &[(&str, &str)] = &[
    ("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu svm\n\nprocessor\t: 1\nflags\t\t: fpu svm\n"),
    ("proc/sys/kernel/osrelease", "5.15.0-100-generic\n"),
    ("proc/sys/kernel/io_uring_disabled", "2\n"),
    ("proc/sys/kernel/numa_balancing", "1\n"),
    ("proc/sys/fs/nr_open", "8192\n"),
    ("proc/self/status", "Name:\tmica\nUid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000\n"),
    (
        "proc/self/limits",
        "Limit                     Soft Limit           Hard Limit           Units     \n\
         Max open files            1024                 4096                 files     \n\
         Max locked memory         65536                65536                bytes     \n",
    ),
    (
        "proc/self/mountinfo",
        "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n\
         30 22 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs ro\n\
         31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
    ),
    ("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n/swap.img\tfile\t8388604\t512\t-2\n"),
    ("sys/module/kvm/parameters/nx_huge_pages", "Y\n"),
    ("sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never\n"),
    ("sys/kernel/mm/ksm/run", "1\n"),
    ("sys/devices/system/cpu/smt/active", "1\n"),
    ("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave\n"),
    ("sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "powersave\n"),
    ("sys/devices/system/cpu/cpuidle/current_driver", "haltpoll\n"),
    ("sys/module/haltpoll/parameters/guest_halt_poll_ns", "0\n"),
    ("sys/devices/system/node/node0/cpulist", "0\n"),
    ("sys/devices/system/node/node1/cpulist", "1\n"),
    ("sys/block/sda/dev", "8:0\n"),
    ("sys/block/sda/sda1/dev", "8:1\n"),
    ("sys/block/sda/mq/0/cpu_list", "0, 1\n"),
    ("sys/block/sda/queue/scheduler", "none [mq-deadline]\n"),
    ("sys/block/sda/queue/rotational", "1\n"),
];

fn bad_answers() -> Probed {
    Probed {
        kvm_device: Err(ErrorKind::PermissionDenied),
        io_uring: Err("io_uring is forbidden here (kernel.io_uring_disabled=2)".to_owned()),
        program: refused("/usr/bin/mica-vm", "No such file or directory (os error 2)"),
        store: refused("/var/lib", "Read-only file system (os error 30)").map(drop),
        cgroup: refused("/sys/fs/cgroup", "Read-only file system (os error 30)").map(drop),
        clones: Some(false),
        direct: Some(Direct { memory_bytes: 0, offset_bytes: 0 }),
    }
}

/// With `MICA_BLESS=1`, what was found is kept as what is right.
fn golden(name: &str, found: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/doctor/goldens").join(name);
    if std::env::var_os("MICA_BLESS").is_some() {
        fs::write(&path, found).unwrap();
    }
    fs::read_to_string(path).unwrap()
}

#[test]
fn a_good_machine_of_two_sockets_has_nothing_to_mend() {
    let findings = judge(&Tree::new("good", GOOD).read(good_answers()));
    let text = show::text(&findings);
    assert_eq!(text, golden("good.txt", &text));
    assert!(findings.iter().all(|finding| finding.status == Status::Ok), "{findings:#?}");
}

#[test]
fn a_bad_machine_is_told_what_each_thing_costs_and_what_mends_it() {
    let findings = judge(&Tree::new("bad", BAD).read(bad_answers()));
    let text = show::text(&findings);
    assert_eq!(text, golden("bad.txt", &text));
    for finding in findings.iter().filter(|finding| finding.status != Status::Ok) {
        assert!(!finding.costs.is_empty() && !finding.mend.is_empty(), "{finding:?}");
    }
}

#[test]
fn a_machine_of_which_nothing_can_be_read_is_not_judged_by_guesses() {
    let probed = Probed {
        kvm_device: Err(ErrorKind::NotFound),
        clones: None,
        direct: None,
        ..good_answers()
    };
    let findings = judge(&Tree::new("empty", &[]).read(probed));
    let failing: Vec<_> =
        findings.iter().filter(|f| f.status == Status::Fail).map(|f| f.check).collect();
    assert_eq!(failing, ["kvm", "cgroup"], "{findings:#?}");
    assert!(findings.iter().all(|finding| finding.status != Status::Warn), "{findings:#?}");
    for finding in findings.iter().filter(|finding| finding.status == Status::Note) {
        assert!(!finding.costs.is_empty() && !finding.mend.is_empty(), "{finding:?}");
    }
}

/// What people can type as it is there.
const COMMANDS: [&str; 10] = [
    "modprobe kvm_intel nested=1",
    "sudo mica serve",
    "mica pool create --size 100G --path /var/lib/mica",
    "mkfs.xfs /dev/nvme1n1p1 && mount /dev/nvme1n1p1 /var/lib/mica",
    "nvme format --block-size=4096 /dev/sda && mkfs.xfs -f /dev/sda",
    "sudo mica doctor --store /var/lib/mica",
    "mount -t proc proc /proc",
    "apt install -t bookworm-backports linux-image-amd64",
    "cargo build --release -p mica-vmm",
    "chown root /var/lib/mica && chmod 700 /var/lib/mica",
];

#[test]
fn what_mends_a_thing_is_a_command() {
    let with = |name: &str, change: fn(&mut Facts, &mut Probed)| {
        let mut seen = Tree::new(name, BAD).read(bad_answers());
        change(&mut seen.facts, &mut seen.probed);
        judge(&seen)
    };
    let of = |findings: &[Finding], check: &str| {
        let finding = findings.iter().find(|finding| finding.check == check).unwrap().clone();
        assert!(!finding.costs.is_empty(), "{finding:?}");
        finding.mend
    };
    let bad = with("mends", |_, _| {});
    let other = with("other-mends", |facts, probed| {
        facts.kvm = KvmKind::Pvm;
        probed.clones = None;
        probed.direct = Some(Direct { memory_bytes: 512, offset_bytes: 8192 });
        facts.store.disks[0].backing_file = Some("/pool.img".to_owned());
    });
    let few = with("few-queues", |facts, _| {
        facts.store.disks[0].is_rotational = Some(false);
        facts.is_root = None;
    });
    // Root of a container, whose limits are the container's.
    let bounded = with("bounded", |facts, _| {
        (facts.is_root, facts.capabilities) = (Some(true), Some(0));
        facts.open_files = Some(Limit { soft: Some(1024), hard: Some(20_000) });
        facts.nr_open = Some(1 << 20);
    });
    let found = |check| bounded.iter().find(|finding| finding.check == check).unwrap();
    assert!(found("open files").found.starts_with("20000 of"), "{:?}", found("open files"));
    let [nested, serve, pool, mkfs, format, doctor, proc, apt, build, chown] = COMMANDS;
    for (findings, check, command) in [
        (&other, "kvm", nested),
        (&bad, "kvm", serve),
        (&bad, "user", serve),
        (&few, "user", proc),
        (&bad, "capabilities", serve),
        (&bad, "program", build),
        (&bad, "store", chown),
        (&bad, "kernel", apt),
        (&bad, "reflink", pool),
        (&bad, "reflink", mkfs),
        (&other, "reflink", doctor),
        (&bad, "direct I/O", pool),
        (&other, "direct I/O", format),
        (&bad, "device", mkfs),
        (&other, "device", mkfs),
        (&few, "device", mkfs),
    ] {
        let mend = of(findings, check);
        assert!(mend.contains(command), "{check}: {mend}");
    }
}

#[test]
fn the_document_has_a_row_for_every_check_and_for_nothing_else() {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/doctor.md");
    let document = fs::read_to_string(document).unwrap();
    let table = document.split_once("| check |").unwrap().1;
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    let rows: BTreeSet<&str> = rows.map(|(check, _)| check).collect();
    let machines = [("good", GOOD, good_answers()), ("bad", BAD, bad_answers())];
    let judged = machines.map(|(name, files, answers)| {
        judge(&Tree::new(&format!("rows-{name}"), files).read(answers))
    });
    let checks: BTreeSet<&str> = judged.iter().flatten().map(|finding| finding.check).collect();
    assert_eq!(rows, checks);
}

#[test]
fn facts_are_read_as_the_kernel_writes_them() {
    let facts = Tree::new("facts", BAD).read(bad_answers()).facts;
    assert_eq!(facts.memlock, Some(Limit { soft: Some(65536), hard: Some(65536) }));
    assert_eq!((facts.cpus, facts.nodes, facts.is_root), (2, 2, Some(false)));
    assert_eq!(facts.swaps, ["/swap.img"]);
    let disk = Disk {
        name: "sda".to_owned(),
        volume: None,
        queues: 1,
        scheduler: Some("mq-deadline".to_owned()),
        is_rotational: Some(true),
        backing_file: None,
    };
    assert_eq!(facts.store.disks, [disk]);
    // Btrfs has a device number of its own; its source names the disk.
    let btrfs = "22 1 0:30 / / rw - btrfs /dev/sda1 rw\n";
    let files = [("proc/self/mountinfo", btrfs), ("sys/block/sda/sda1/dev", "8:1\n")];
    let facts = Tree::new("btrfs", &files).read(bad_answers()).facts;
    assert_eq!(facts.store.disks.iter().map(|disk| &disk.name).collect::<Vec<_>>(), ["sda"]);
    assert_eq!(facts.store.file_system.as_deref(), Some("btrfs"));
}

#[test]
fn json_says_the_same() {
    let findings = judge(&Tree::new("json", BAD).read(bad_answers()));
    let json: serde_json::Value = serde_json::from_str(&show::json(&findings).unwrap()).unwrap();
    let rows = json.as_array().unwrap();
    assert_eq!(rows.len(), findings.len());
    assert_eq!(rows[0]["check"], "kvm");
    assert_eq!(rows[0]["status"], "fail");
    assert!(rows[0]["found"].as_str().unwrap().contains("may not be opened"));
    assert!(rows.iter().all(|row| row["costs"] != "" && row["mend"] != ""));
}

#[test]
fn the_deepest_idle_state_that_is_on_is_what_a_hand_over_waits_for() {
    let of = |files: &[(&str, &str)]| {
        let findings = judge(&Tree::new("idle", files).read(good_answers()));
        findings.into_iter().find(|finding| finding.check == "idle states").unwrap()
    };
    let deep = of(&[
        ("sys/devices/system/cpu/cpu0/cpuidle/state2/name", "C6\n"),
        ("sys/devices/system/cpu/cpu0/cpuidle/state2/latency", "170\n"),
        ("sys/devices/system/cpu/cpu0/cpuidle/state2/disable", "0\n"),
    ]);
    assert_eq!((deep.status, deep.found.as_str()), (Status::Note, "as deep as C6, left in 170 us"));
    let polled = of(&[
        ("sys/devices/system/cpu/cpuidle/current_driver", "haltpoll\n"),
        ("sys/module/haltpoll/parameters/guest_halt_poll_ns", "200000\n"),
    ]);
    assert_eq!(polled.status, Status::Ok, "{polled:?}");
    let guest = of(&[
        ("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu hypervisor\n"),
        ("sys/devices/system/cpu/cpu0/cpuidle/state1/name", "C1\n"),
        ("sys/devices/system/cpu/cpu0/cpuidle/state1/latency", "1\n"),
    ]);
    assert_eq!(guest.status, Status::Note, "its C1 is not the hypervisor's: {guest:?}");
    assert!(guest.mend.contains("--cpu-latency-us 0") && deep.mend.contains("--cpu-latency-us 2"));
}

#[test]
fn every_drive_below_a_volume_is_judged() {
    let files: Vec<_> =
        GOOD.iter().copied().filter(|(path, _)| !path.contains("mountinfo")).collect();
    let below = [
        ("proc/self/mountinfo", "40 22 253:0 / /var/lib/mica rw - xfs /dev/mapper/vg-mica rw\n"),
        ("sys/block/dm-0/dev", "253:0\n"),
        ("sys/block/dm-0/slaves/nvme0n1p2/dev", "259:2\n"),
        ("sys/block/dm-0/slaves/nvme1n1p1/dev", "259:5\n"),
        ("sys/block/nvme0n1/mq/0/cpu_list", "0-3\n"),
        ("sys/block/nvme0n1/queue/scheduler", "none [mq-deadline]\n"),
    ];
    let findings = judge(&Tree::new("volume", &[&files[..], &below].concat()).read(good_answers()));
    let of = |check: &str| -> Vec<(Status, &str)> {
        let findings = findings.iter().filter(|finding| finding.check == check);
        findings.map(|finding| (finding.status, &*finding.found)).collect()
    };
    let devices = [
        (Status::Note, "nvme0n1 below dm-0, queues: 1, processors: 4"),
        (Status::Ok, "nvme1n1 below dm-0, queues: 4, processors: 4"),
    ];
    assert_eq!(of("device"), devices);
    let schedulers = [(Status::Warn, "mq-deadline on nvme0n1"), (Status::Ok, "none on nvme1n1")];
    assert_eq!(of("scheduler"), schedulers);
}

/// A machine that is good but for one thing.
fn good_but(name: &str, change: impl FnOnce(&mut Facts, &mut Probed)) -> Vec<Finding> {
    let mut seen = Tree::new(name, GOOD).read(good_answers());
    change(&mut seen.facts, &mut seen.probed);
    judge(&seen)
}

/// The one that fails.
fn failing(findings: &[Finding]) -> &Finding {
    let failing: Vec<_> = findings.iter().filter(|f| f.status == Status::Fail).collect();
    assert_eq!(failing.len(), 1, "{findings:#?}");
    failing[0]
}

#[test]
fn a_control_group_that_serve_cannot_make_fails() {
    let findings = good_but("cgroup-read-only", |_, probed| {
        probed.cgroup = refused("/sys/fs/cgroup", "Read-only file system (os error 30)").map(drop);
    });
    let finding = failing(&findings);
    assert_eq!(finding.check, "cgroup");
    assert_eq!(finding.found, "v2, /sys/fs/cgroup: Read-only file system (os error 30)");
}

#[test]
fn a_control_group_that_can_hand_no_memory_out_fails() {
    let findings = good_but("cgroup-busy", |facts, _| {
        facts.cgroup.busy = Some(PathBuf::from("/sys/fs/cgroup/unit"));
    });
    let finding = failing(&findings);
    assert!(finding.found.contains("processes are in /sys/fs/cgroup/unit"), "{finding:?}");
    assert!(
        finding.mend.contains("echo $p > /sys/fs/cgroup/unit/init/cgroup.procs"),
        "{finding:?}"
    );
    // Where there is no memory to hand out, that is what fails.
    let findings = good_but("cgroup-bare", |facts, _| {
        facts.cgroup.busy = Some(PathBuf::from("/sys/fs/cgroup/unit"));
        facts.cgroup.controllers.clear();
    });
    assert_eq!(failing(&findings).found, "v2, without memory and pids");
}

#[test]
fn what_this_process_may_not_is_named() {
    let findings = good_but("capabilities", |facts, _| {
        // CAP_SETUID and CAP_SYS_ADMIN are not there.
        facts.capabilities = Some(0x1ff_ffff_ffff & !(1 << 7 | 1 << 21));
    });
    let finding = failing(&findings);
    assert_eq!(finding.found, "without CAP_SYS_ADMIN, CAP_SETUID");
    assert!(finding.mend.contains("--cap-add=SYS_ADMIN --cap-add=SETUID"), "{finding:?}");
    let findings = good_but("capabilities-unknown", |facts, _| facts.capabilities = None);
    let finding = findings.iter().find(|finding| finding.check == "capabilities").unwrap();
    assert_eq!(finding.status, Status::Note);
}

#[test]
fn a_store_or_a_program_that_is_not_there_fails() {
    let findings = good_but("store", |_, probed| {
        probed.store = refused("/var/lib", "Permission denied (os error 13)").map(drop);
    });
    assert_eq!(failing(&findings).found, "/var/lib: Permission denied (os error 13)");
    let findings = good_but("program", |_, probed| {
        probed.program = refused("/opt/mica-vm", "it is no executable file");
    });
    assert_eq!(failing(&findings).found, "/opt/mica-vm: it is no executable file");
}
