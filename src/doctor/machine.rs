//! KVM, the program of VM processes, the kernel, io_uring, limits: what has to be there.
//!
//! Called by [`super::judge`]. Refuses to look at the machine itself.

use mica_numa::facts::{Facts, KvmKind, Limit};
use mica_numa::preflight;

use super::finding::Finding;
use super::probe::Probed;

/// Kernel features that Mica uses, the version that brought each, and what is lost without.
const FEATURES: [(&str, (u32, u32), &str); 2] = [
    (
        "PAGEMAP_SCAN and asynchronous write protection of userfaultfd",
        (6, 7),
        "what a guest wrote is logged by KVM and by the VM process instead; every pause and snapshot is slower",
    ),
    (
        "statx with the alignment of direct I/O",
        (6, 1),
        "how the store's files must be aligned cannot be told",
    ),
];

/// More than what is there.
pub(super) const NEWER_KERNEL: &str =
    "on Debian 12: apt install -t bookworm-backports linux-image-amd64 && reboot";

/// Where the kernel says what it has.
pub(super) const MOUNT_PROC: &str = "mount -t proc proc /proc";

/// Open files that are too few for a host of any size.
const FILES_MIN: u64 = 16 * 1024;

/// The findings of this family.
pub fn judge(facts: &Facts, probed: &Probed) -> Vec<Finding> {
    vec![
        kvm(&facts.kvm),
        program(probed),
        kernel(facts.kernel.as_deref()),
        io_uring(facts, probed),
        memlock(facts),
        open_files(facts),
    ]
}

fn kvm(kind: &KvmKind) -> Finding {
    let found = kind.to_string();
    match kind {
        KvmKind::Vmx | KvmKind::Svm => Finding::ok("kvm", found),
        KvmKind::Pvm => Finding::fail("kvm", found)
            .costs("no Linux guest runs at speed; `mica serve` becomes the lab, an emulated host, instead")
            .mend(
                "use a bare-metal server; or, on the machine that runs this virtual one: \
                 modprobe -r kvm_intel && modprobe kvm_intel nested=1 (kvm_amd with AMD), and start \
                 this one with its processor's features: qemu-system-x86_64 -enable-kvm -cpu host",
            ),
        KvmKind::Missing(_) => Finding::fail("kvm", found)
            .costs("no guest runs; `mica serve` becomes the lab, an emulated host, instead")
            .mend(
                "switch on VT-x or AMD-V in the firmware, then: modprobe kvm_intel || modprobe kvm_amd; where \
                 only root may open /dev/kvm: sudo mica serve",
            ),
    }
}

fn program(probed: &Probed) -> Finding {
    match &probed.program {
        Ok(path) => Finding::ok("program", path.display().to_string()),
        Err(refused) => Finding::fail("program", refused.to_string())
            .costs("each sandbox is a process of it, and `mica serve` does not start without")
            .mend("cargo build --release -p mica-vmm, and put mica-vm beside mica; or name it with --vm-program"),
    }
}

/// The first two numbers of a release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn kernel(release: Option<&str>) -> Finding {
    let Some((release, at)) = release.and_then(|release| Some((release, version(release)?))) else {
        return Finding::note("kernel", "of an unknown version")
            .costs("one below 6.7 makes every pause and snapshot slower, and this cannot tell")
            .mend(format!("{MOUNT_PROC}; uname -r"));
    };
    let missing: Vec<_> = FEATURES.iter().filter(|(_, since, _)| at < *since).collect();
    let names = |features: &[&(&str, (u32, u32), &str)]| -> String {
        let each = |(name, (major, minor), _): &&(&str, (u32, u32), &str)| {
            format!("{name} ({major}.{minor})")
        };
        features.iter().map(each).collect::<Vec<_>>().join(", ")
    };
    let Some((_, _, costs)) = missing.first() else {
        let all: Vec<_> = FEATURES.iter().collect();
        return Finding::ok("kernel", format!("{release}: new enough for {}", names(&all)));
    };
    Finding::warn("kernel", format!("{release}: too old for {}", names(&missing)))
        .costs(costs)
        .mend(format!("install Linux 6.7 or newer; {NEWER_KERNEL}"))
}

fn io_uring(facts: &Facts, probed: &Probed) -> Finding {
    let disabled = facts.io_uring_disabled.unwrap_or(0);
    match &probed.io_uring {
        Ok(missing) if missing.is_empty() => {
            let finding = "a ring was made, with every operation that is used".to_owned();
            if disabled == 0 {
                return Finding::ok("io_uring", finding);
            }
            Finding::note("io_uring", format!("{finding}; kernel.io_uring_disabled={disabled}"))
                .costs("a daemon that is not as privileged as this command gets no ring")
                .mend("sysctl kernel.io_uring_disabled=0")
        }
        Ok(missing) => Finding::fail("io_uring", format!("lacks {}", missing.join(", ")))
            .costs("snapshots cannot be written")
            .mend(format!("install Linux 6.7 or newer; {NEWER_KERNEL}")),
        Err(why) => Finding::fail("io_uring", why.clone())
            .costs("no shard starts")
            .mend("sysctl kernel.io_uring_disabled=0; in a container, allow io_uring in its seccomp profile"),
    }
}

fn shown(limit: Option<u64>) -> String {
    limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string())
}

/// A shard on each processor is the most there can be.
fn memlock(facts: &Facts) -> Finding {
    let wanted = preflight::memlock_bytes(u16::try_from(facts.cpus).unwrap_or(u16::MAX));
    let Some(Limit { hard, .. }) = facts.memlock else {
        return Finding::note("memlock", "unknown")
            .costs(
                "where it is too low, rings and I/O buffers cannot be pinned, and no shard starts",
            )
            .mend(format!("{MOUNT_PROC}; ulimit -l"));
    };
    let is_enough = hard.is_none_or(|hard| hard >= wanted);
    match (is_enough, facts.may_raise_limits()) {
        (true, _) => {
            Finding::ok("memlock", format!("{}; {wanted} bytes are needed at most", shown(hard)))
        }
        (false, Some(true)) => {
            Finding::ok("memlock", format!("{} bytes; `mica serve` raises it", shown(hard)))
        }
        (false, _) => Finding::fail(
            "memlock",
            format!("{} bytes, {wanted} may be needed", shown(hard)),
        )
        .costs("rings and I/O buffers cannot be pinned, and no shard starts")
        .mend(
            "LimitMEMLOCK=infinity in the unit file, or run with CAP_SYS_RESOURCE, as root has it",
        ),
    }
}

fn open_files(facts: &Facts) -> Finding {
    let Some(Limit { hard, .. }) = facts.open_files else {
        return Finding::note("open files", "unknown")
            .costs("where they are few, the host is full before its memory is")
            .mend(format!("{MOUNT_PROC}; ulimit -Hn"));
    };
    let wanted = preflight::OPEN_FILES;
    // Nobody can be given more than this, root neither.
    let ceiling = facts.nr_open.unwrap_or(wanted);
    let reached = match facts.may_raise_limits() {
        Some(true) => ceiling.min(wanted),
        _ => hard.map_or(ceiling, |hard| hard.min(ceiling)),
    };
    let found =
        format!("{reached} of {wanted}; RLIMIT_NOFILE {}, fs.nr_open {ceiling}", shown(hard));
    if reached >= wanted {
        return Finding::ok("open files", found);
    }
    let mend = if ceiling < wanted {
        format!("sysctl fs.nr_open={wanted}; LimitNOFILE={wanted} in the unit file")
    } else {
        format!(
            "LimitNOFILE={wanted} in the unit file, or run with CAP_SYS_RESOURCE, as root has it"
        )
    };
    let finding = if reached < FILES_MIN {
        Finding::warn("open files", found)
    } else {
        Finding::note("open files", found)
    };
    finding.costs("a sandbox holds about five descriptors, a connection one: the host is full before its memory is").mend(mend)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(version("6.18.44-fc-v595"), Some((6, 18)));
        assert_eq!(version("6.1.0-29-amd64"), Some((6, 1)));
        assert_eq!(version("7.0-rc1"), Some((7, 0)));
        assert_eq!(version("unknown"), None);
    }
}
