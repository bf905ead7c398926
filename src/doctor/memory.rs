//! What the kernel does with memory behind everybody's back.
//!
//! Called by [`super::judge`]. Refuses to look at the machine itself.

use mica_numa::facts::Facts;

use super::finding::Finding;

/// The findings of this family.
pub fn judge(facts: &Facts) -> Vec<Finding> {
    vec![huge_pages(facts), same_pages(facts), swap(facts), balancing(facts)]
}

fn huge_pages(facts: &Facts) -> Finding {
    let check = "transparent huge pages";
    match facts.huge_pages.as_deref() {
        None => Finding::note(check, "unknown, or the kernel has none")
            .costs("without them I/O buffers are of small pages, and take longer to pin")
            .mend("mount -t sysfs sysfs /sys; where the file is missing then, a kernel with CONFIG_TRANSPARENT_HUGEPAGE"),
        Some("always") => Finding::warn(check, "always")
            .costs("what guests wrote may be joined to pages of 2 MiB, and then one byte counts as 2 MiB in a snapshot")
            .mend("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"),
        // I/O buffers ask for them.
        Some("never") => Finding::note(check, "never")
            .costs("I/O buffers are of small pages, and take longer to pin")
            .mend("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"),
        Some(other) => Finding::ok(check, other),
    }
}

fn same_pages(facts: &Facts) -> Finding {
    match facts.ksm_run {
        None => Finding::ok("ksm", "the kernel has none"),
        Some(1) => Finding::warn("ksm", "runs")
            .costs("a core's time, and a guest can find out what another has in memory by how long a write takes")
            .mend("echo 2 > /sys/kernel/mm/ksm/run"),
        Some(_) => Finding::ok("ksm", "off"),
    }
}

fn swap(facts: &Facts) -> Finding {
    if facts.swaps.is_empty() {
        return Finding::ok("swap", "none");
    }
    Finding::warn("swap", facts.swaps.join(", "))
        .costs("guests' memory may lie on a disk: a pause or a request waits for it, and what a tenant had stays there")
        .mend("swapoff -a, and take it out of /etc/fstab")
}

fn balancing(facts: &Facts) -> Finding {
    let check = "numa balancing";
    let nodes = facts.nodes;
    match facts.numa_balancing {
        None => Finding::ok(check, "the kernel has none"),
        Some(0) => Finding::ok(check, "off"),
        Some(_) if nodes < 2 => Finding::ok(check, "on, and there is one node"),
        Some(_) => Finding::warn(check, format!("on, with {nodes} nodes"))
            .costs("Mica places sandboxes on a node itself; the kernel's samples unmap their pages, and each is a fault")
            .mend("sysctl kernel.numa_balancing=0"),
    }
}
