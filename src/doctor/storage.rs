//! The file system of the store, and the device below it.
//!
//! Called by [`super::judge`]. Refuses to look at the machine itself.

use mica_numa::facts::{Disk, Facts};

use super::finding::Finding;
use super::machine::NEWER_KERNEL;
use super::probe::Probed;

/// The alignment that the store's writers keep to.
const BLOCK_BYTES: u32 = 4096;

/// So many are enough for any number of processors.
const QUEUES_MIN: usize = 8;

/// A file system that can all that the store needs, in a file of the one that is there.
fn pool(facts: &Facts) -> String {
    format!(
        "before the first start: mica pool create --size 100G --path {}, which makes an XFS on a loop device; or {}",
        facts.store.path.display(),
        partition(facts)
    )
}

/// The same on a drive of its own.
fn partition(facts: &Facts) -> String {
    format!(
        "with a free partition of an NVMe drive in the place of this one: mkfs.xfs /dev/nvme1n1p1 && mount /dev/nvme1n1p1 {}",
        facts.store.path.display()
    )
}

/// The findings of this family.
pub fn judge(facts: &Facts, probed: &Probed) -> Vec<Finding> {
    let mut findings = vec![writable(facts, probed), clones(facts, probed), direct(facts, probed)];
    if facts.store.disks.is_empty() {
        findings.push(
            Finding::note("device", "unknown, or the store is not on one")
                .costs("how fast snapshots are acknowledged cannot be told, nor whether they outlive the power")
                .mend(partition(facts)),
        );
    }
    findings.extend(facts.store.disks.iter().map(|disk| queues(facts, disk)));
    findings.extend(facts.store.disks.iter().map(scheduler));
    findings
}

fn writable(facts: &Facts, probed: &Probed) -> Finding {
    match &probed.store {
        Ok(()) => Finding::ok("store", format!("{} can be written", facts.store.path.display())),
        Err(refused) => Finding::fail("store", refused.to_string())
            .costs("`mica serve` does not start: templates and sandboxes have no place")
            .mend(format!(
                "mount -o remount,rw the file system there; chown root {0} && chmod 700 {0}; or give --store \
                 another directory",
                facts.store.path.display()
            )),
    }
}

fn clones(facts: &Facts, probed: &Probed) -> Finding {
    let kind = facts.store.file_system.as_deref().unwrap_or("an unknown file system");
    let found = format!("{}: {kind}", facts.store.path.display());
    match probed.clones {
        Some(true) => Finding::ok("reflink", format!("{found}, clones files")),
        Some(false) => Finding::warn("reflink", format!("{found}, does not clone files"))
            .costs("every create, snapshot and fork copies a whole disk")
            .mend(pool(facts)),
        None => Finding::note("reflink", format!("{found}; it could not be tried"))
            .costs(
                "where files are not cloned, every create, snapshot and fork copies a whole disk",
            )
            .mend(format!("sudo mica doctor --store {}", facts.store.path.display())),
    }
}

fn direct(facts: &Facts, probed: &Probed) -> Finding {
    let check = "direct I/O";
    let Some(direct) = probed.direct else {
        return Finding::note(check, "the kernel does not tell how it must be aligned")
            .costs("where the file system takes no blocks of 4096 bytes, writes go through the page cache")
            .mend(format!("{NEWER_KERNEL}; {}", pool(facts)));
    };
    let (memory, offset) = (direct.memory_bytes, direct.offset_bytes);
    if offset == 0 {
        return Finding::warn(check, "files here cannot be read and written directly")
            .costs("what a snapshot writes goes through the page cache, and pushes out what is read from there")
            .mend(pool(facts));
    }
    let found = format!("aligned to {memory} bytes in memory and {offset} in the file");
    if memory <= BLOCK_BYTES && offset <= BLOCK_BYTES {
        return Finding::ok(check, found);
    }
    Finding::warn(check, found)
        .costs("the store writes in blocks of 4096 bytes, which this file system takes through the page cache alone")
        .mend(format!(
            "blocks of 4096 bytes, which deletes what is there: nvme format --block-size=4096 /dev/{disk} && mkfs.xfs -f /dev/{disk}",
            disk = facts.store.disks.first().map_or("nvme1n1", |disk| disk.name.as_str())
        ))
}

fn queues(facts: &Facts, disk: &Disk) -> Finding {
    let cpus = facts.cpus;
    let Disk { name, queues, is_rotational, backing_file, .. } = disk;
    if let Some(file) = backing_file {
        return Finding::note("device", format!("{name}, a loop device over {file}"))
            .costs("one more file system below the store")
            .mend(partition(facts));
    }
    let below = disk.volume.as_ref().map(|volume| format!(" below {volume}")).unwrap_or_default();
    let found = format!("{name}{below}, queues: {queues}, processors: {cpus}");
    if *is_rotational == Some(true) && !name.starts_with("nvme") && !name.starts_with("vd") {
        return Finding::warn("device", format!("{found}, and it rotates"))
            .costs("a snapshot is acknowledged when it is on the device: each waits for the disk to turn")
            .mend(partition(facts));
    }
    if *queues >= cpus || *queues >= QUEUES_MIN {
        return Finding::ok("device", found);
    }
    Finding::note("device", found)
        .costs("shards wait for one another when they write snapshots at the same time")
        .mend(partition(facts))
}

fn scheduler(disk: &Disk) -> Finding {
    let name = &disk.name;
    match disk.scheduler.as_deref() {
        None => Finding::ok("scheduler", format!("{name} has none to choose")),
        Some("none") => Finding::ok("scheduler", format!("none on {name}")),
        Some(other) => Finding::warn("scheduler", format!("{other} on {name}"))
            .costs("requests are sorted for a disk that does not need it, under a lock that all processors share")
            .mend(format!("echo none > /sys/block/{name}/queue/scheduler")),
    }
}
