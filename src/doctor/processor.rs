//! Processors: how fast they are told to be, and what they share.
//!
//! Called by [`super::judge`]. Refuses to look at the machine itself.

use mica_numa::facts::Facts;
use mica_numa::idle::{C1_LATENCY_US, LATENCY_US_MAX};

use super::finding::Finding;

/// The findings of this family.
pub fn judge(facts: &Facts) -> Vec<Finding> {
    vec![huge_page_splitting(facts), threads(facts), governor(facts), idle(facts)]
}

/// The first vCPU of a VM starts a thread that takes split pages back, and starting it waits for control
/// groups.
fn huge_page_splitting(facts: &Facts) -> Finding {
    let check = "kvm.nx_huge_pages";
    match facts.nx_huge_pages.as_deref() {
        None => Finding::note(check, "unknown: the module kvm is not loaded")
            .costs("where it is on, each VM starts a kernel thread that waits for a grace period")
            .mend("modprobe kvm_intel || modprobe kvm_amd"),
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
        None => Finding::note("smt", "unknown")
            .costs("where it is on, sandboxes of two tenants may share a core")
            .mend("mount -t sysfs sysfs /sys; lscpu"),
        Some(false) => Finding::ok("smt", "off, or the processor has none"),
        Some(true) => Finding::note("smt", "on")
            .costs("sandboxes of two tenants may share a core, and can observe each other through its caches")
            .mend("echo off > /sys/devices/system/cpu/smt/control, where tenants do not trust one another"),
    }
}

fn governor(facts: &Facts) -> Finding {
    let governors = &facts.governors;
    if governors.is_empty() {
        return Finding::note("governor", "none: the firmware, or a hypervisor, sets the speed")
            .costs("where that saves power, a processor that was idle is slow for the first milliseconds")
            .mend(
                "choose performance in the firmware; in a virtual machine, on the machine that runs it: \
                 cpupower frequency-set -g performance",
            );
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

/// What crosses cores waits for the one that sleeps. A guest's kernel knows nothing of how long its
/// hypervisor takes.
fn idle(facts: &Facts) -> Finding {
    let check = "idle states";
    let idle = &facts.idle;
    let (found, limit_us) = match (&idle.deepest, idle.halt_poll_ns) {
        (_, Some(polled_ns)) if polled_ns > 0 => {
            return Finding::ok(
                check,
                format!("polled for up to {polled_ns} ns before a core halts"),
            );
        }
        (_, Some(_)) => ("a core that idles is given back to the hypervisor at once".to_owned(), 0),
        (_, None) if facts.is_guest => {
            ("a core that idles is given back to the hypervisor".to_owned(), 0)
        }
        (None, None) => ("unknown: the kernel does not choose them".to_owned(), C1_LATENCY_US),
        (Some((name, latency_us)), None) if *latency_us <= LATENCY_US_MAX => {
            return Finding::ok(check, format!("{name} at the deepest, left in {latency_us} us"));
        }
        (Some((name, latency_us)), None) => {
            (format!("as deep as {name}, left in {latency_us} us"), C1_LATENCY_US)
        }
    };
    Finding::note(check, found)
        .costs(
            "whatever crosses cores waits for the one that sleeps: a request to another shard once, one to a \
             guest's server twice; `mica serve` keeps cores awake while a shard hands much over",
        )
        .mend(format!("mica serve --cpu-latency-us {limit_us}: always; it takes power"))
}
