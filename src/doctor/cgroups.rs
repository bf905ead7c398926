//! Control groups: the limits of sandboxes, and what moving a process costs.
//!
//! Called by [`super::judge`]. Refuses to look at the machine itself.

use std::path::Path;

use mica_numa::facts::Facts;

use super::finding::Finding;
use super::probe::Probed;

/// Without these `mica serve` does not start; without the others it limits less.
const REQUIRED: [&str; 2] = ["memory", "pids"];
const OPTIONAL: [&str; 1] = ["cpu"];

const UNIFIED: &str = "boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line";

/// The findings of this family.
pub fn judge(facts: &Facts, probed: &Probed) -> Vec<Finding> {
    let cgroup = &facts.cgroup;
    let at = cgroup.path.display();
    if cgroup.file_system.as_deref() != Some("cgroup2") {
        let kind = cgroup.file_system.as_deref().unwrap_or("nothing that is known");
        return vec![
            Finding::fail("cgroup", format!("{at} is on {kind}, not on cgroup v2"))
                .costs("sandboxes cannot be limited, nor ended as one")
                .mend(format!("{UNIFIED}, or give --cgroup-root a directory of a cgroup2 mount")),
        ];
    }
    vec![group(facts, probed), moves(facts)]
}

/// The group of the daemon, which it makes, and has hand controllers out.
fn group(facts: &Facts, probed: &Probed) -> Finding {
    if let Err(refused) = &probed.cgroup {
        return Finding::fail("cgroup", format!("v2, {refused}"))
            .costs("`mica serve` does not start: it can make no group for a sandbox")
            .mend(
                "mount -o remount,rw /sys/fs/cgroup; in a container: docker run --cgroupns=private -v \
                 /sys/fs/cgroup:/sys/fs/cgroup:rw; or give --cgroup-root a directory that can be made",
            );
    }
    match &facts.cgroup.busy {
        Some(busy) if has(facts, "memory") => occupied(busy),
        _ => controllers(facts),
    }
}

fn occupied(group: &Path) -> Finding {
    let at = group.display();
    Finding::fail("cgroup", format!("v2, processes are in {at}, which may have none and hand memory out"))
        .costs("sandboxes would have no limits, and `mica serve` refuses that")
        .mend(format!(
            "mkdir {at}/init && for p in $(cat {at}/cgroup.procs); do echo $p > {at}/init/cgroup.procs; done; \
             in a unit file: Delegate=yes and DelegateSubgroup=init; or give --cgroup-root a directory below \
             /sys/fs/cgroup, other than this one"
        ))
}

fn has(facts: &Facts, controller: &str) -> bool {
    facts.cgroup.controllers.iter().any(|there| there == controller)
}

fn controllers(facts: &Facts) -> Finding {
    let missing: Vec<&str> = REQUIRED.into_iter().filter(|name| !has(facts, name)).collect();
    if !missing.is_empty() {
        return Finding::fail("cgroup", format!("v2, without {}", missing.join(" and ")))
            .costs("sandboxes would have no limits, and `mica serve` refuses that")
            .mend(format!("{UNIFIED}; for development alone: mica serve --without-cgroup-limits"));
    }
    if !OPTIONAL.iter().all(|name| has(facts, name)) {
        return Finding::warn("cgroup", "v2, without cpu")
            .costs("a sandbox of eight vCPUs that computes takes as much as eight sandboxes of one")
            .mend("echo +cpu > /sys/fs/cgroup/cgroup.subtree_control");
    }
    Finding::ok("cgroup", "v2, with memory, pids and cpu")
}

fn moves(facts: &Facts) -> Finding {
    if facts.cgroup.favors_dynamic_moves {
        return Finding::ok("favordynmods", "on");
    }
    Finding::note("favordynmods", "off")
        .costs("a process that joins a control group waits for a grace period; the pool of VM processes hides it until it is empty")
        .mend("mount -o remount,favordynmods /sys/fs/cgroup")
}
