//! Processors: how fast they are told to be, and what they share.
//!
//! Called by [`super::judge`]. Refuses to look at the machine itself.

use super::facts::Facts;
use super::finding::Finding;

/// The findings of this family.
pub fn judge(facts: &Facts) -> Vec<Finding> {
    vec![huge_page_splitting(facts), threads(facts), governor(facts)]
}

/// The first vCPU of a VM starts a thread that takes split pages back, and starting it waits for control
/// groups.
fn huge_page_splitting(facts: &Facts) -> Finding {
    let check = "kvm.nx_huge_pages";
    match facts.nx_huge_pages.as_deref() {
        None => Finding::note(check, "unknown: the module kvm is not loaded"),
        Some("N" | "never" | "0") => Finding::ok(check, "off"),
        Some(_) if facts.cgroup.favors_dynamic_moves => {
            Finding::ok(check, "on, and the cgroup mount has favordynmods")
        }
        Some(value) => Finding::warn(check, format!("on ({value})"))
            .costs(
                "each VM starts a kernel thread that joins its control group, which waits for a grace period: \
                 tens of milliseconds at times",
            )
            .mend(
                "echo never > /sys/module/kvm/parameters/nx_huge_pages, where the processor is not affected by \
                 iTLB multihit or guests are trusted; or: mount -o remount,favordynmods /sys/fs/cgroup",
            ),
    }
}

fn threads(facts: &Facts) -> Finding {
    match facts.smt_active {
        None => Finding::note("smt", "unknown"),
        Some(false) => Finding::ok("smt", "off, or the processor has none"),
        Some(true) => Finding::note("smt", "on")
            .costs("sandboxes of two tenants may share a core, and can observe each other through its caches")
            .mend("echo off > /sys/devices/system/cpu/smt/control, where tenants do not trust one another"),
    }
}

fn governor(facts: &Facts) -> Finding {
    let governors = &facts.governors;
    if governors.is_empty() {
        return Finding::note("governor", "none: the firmware, or a hypervisor, sets the speed");
    }
    let all: Vec<_> = governors.iter().map(|(name, count)| format!("{name} on {count}")).collect();
    let found = all.join(", ");
    if governors.keys().all(|name| name == "performance") {
        return Finding::ok("governor", found);
    }
    Finding::warn("governor", found)
        .costs("a processor that was idle is slow for the first milliseconds, which is as long as a create takes")
        .mend("cpupower frequency-set -g performance")
}
