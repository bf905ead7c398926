//! Every family of numbers that shards have: one table, from which `docs/metrics.md` is made.
//!
//! Read by the recorders, by `http`, and by the page's test. Refuses a family that is not in
//! [`FAMILIES`]: a test looks for it there.

use super::sample::{Family, Kind};

const fn shard(
    name: &'static str,
    kind: Kind,
    unit: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
) -> Family {
    Family { name, kind, unit, help, labels, per_shard: true }
}

const fn host(
    name: &'static str,
    kind: Kind,
    unit: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
) -> Family {
    Family { name, kind, unit, help, labels, per_shard: false }
}

/// Operations.
pub(crate) static OPERATIONS: Family = shard(
    "mica_operations_total",
    Kind::Counter,
    "operations",
    "Operations on sandboxes, by how they ended: ok, error, or refused without being begun.",
    &["operation", "result"],
);

/// How long they took.
pub(crate) static OPERATION_SECONDS: Family = shard(
    "mica_operation_seconds",
    Kind::Histogram,
    "seconds",
    "How long operations took that ended well, from the request to the answer.",
    &["operation"],
);

/// Where the time went.
pub(crate) static PHASE_SECONDS: Family = shard(
    "mica_operation_phase_seconds",
    Kind::Histogram,
    "seconds",
    "What operations that ended well spent on each phase; a phase that was not needed counts as 0.",
    &["operation", "phase"],
);

/// Mailboxes.
pub(crate) static MAILBOX_FULL: Family = shard(
    "mica_mailbox_full_total",
    Kind::Counter,
    "messages",
    "Requests to other shards that their full mailbox gave back, counted by who sent them.",
    &[],
);

/// Creates under the name that Fast Sandbox gives them.
pub(crate) static FASTPATH: Family = shard(
    "fastpath_create_sandbox_duration_seconds",
    Kind::Histogram,
    "seconds",
    "Creates, as Fast Sandbox counts them. Here a sandbox is in its record before its create is answered, which is that system's mode strong; fast stays at 0.",
    &["mode", "success"],
);

/// Sandboxes.
pub(crate) static SANDBOXES: Family = shard(
    "mica_sandboxes",
    Kind::Gauge,
    "sandboxes",
    "Sandboxes, by what they are doing.",
    &["state"],
);

/// The pool.
pub(crate) static POOL_DEPTH: Family =
    shard("mica_pool_depth", Kind::Gauge, "processes", "VM processes that wait for a guest.", &[]);

/// What it makes.
pub(crate) static POOL_BUILDING: Family = shard(
    "mica_pool_building",
    Kind::Gauge,
    "processes",
    "VM processes that are being made for the pool.",
    &[],
);

/// Starts that it served.
pub(crate) static POOL_HITS: Family = shard(
    "mica_pool_hits_total",
    Kind::Counter,
    "starts",
    "Starts that found a VM process ready.",
    &[],
);

/// Starts that it did not.
pub(crate) static POOL_MISSES: Family = shard(
    "mica_pool_misses_total",
    Kind::Counter,
    "starts",
    "Starts that waited for a VM process to be made.",
    &[],
);

/// How long making one takes.
pub(crate) static POOL_SPAWN: Family = shard(
    "mica_pool_spawn_seconds",
    Kind::Histogram,
    "seconds",
    "How long VM processes took to be made, from nothing to waiting for a guest.",
    &[],
);

/// Faults of guests.
pub(crate) static VM_FAULTS: Family = shard(
    "mica_vm_page_faults",
    Kind::Gauge,
    "faults",
    "Page faults of the VM processes that are there, since each began: minor ones needed no device.",
    &["kind"],
);

/// What guests wrote.
pub(crate) static VM_COW: Family = shard(
    "mica_vm_cow_bytes",
    Kind::Gauge,
    "bytes",
    "Anonymous memory of VM processes: pages that guests have copied by writing to them, and the processes' own few.",
    &[],
);

/// What VM processes have in memory.
pub(crate) static VM_RESIDENT: Family = shard(
    "mica_vm_resident_bytes",
    Kind::Gauge,
    "bytes",
    "Resident memory of VM processes; what several share counts for each.",
    &[],
);

/// What VM processes spent.
pub(crate) static VM_CPU: Family = shard(
    "mica_vm_cpu_seconds",
    Kind::Gauge,
    "seconds",
    "Processor time of the VM processes that are there, since each began.",
    &[],
);

/// Pages on the wrong node.
pub(crate) static VM_WRONG_NODE: Family = shard(
    "mica_vm_wrong_node_pages",
    Kind::Gauge,
    "pages",
    "Pages of guests on another memory node than their shard's, of 4 KiB, as of the last look at each. Absent where no guest could be looked at.",
    &[],
);

/// Time on the wrong node.
pub(crate) static VM_WRONG_NODE_CPU: Family = shard(
    "mica_vm_wrong_node_cpu_seconds",
    Kind::Gauge,
    "seconds",
    "Time that vCPUs of the guests that are there ran on other nodes than their shard's, as of the last look at each. Absent where no guest could be looked at.",
    &[],
);

/// Labels of what is told of each sandbox.
const OF_SANDBOX: &[&str] = &["sandbox", "template", "tenant"];

/// A sandbox's memory.
pub(crate) static SANDBOX_MEMORY: Family = shard(
    "mica_sandbox_memory_bytes",
    Kind::Gauge,
    "bytes",
    "Of one sandbox: memory that it shares with nobody, which is what its guest wrote and its process's own. In /metrics/sandboxes.",
    OF_SANDBOX,
);

/// Its processors.
pub(crate) static SANDBOX_PROCESSORS: Family = shard(
    "mica_sandbox_processors",
    Kind::Gauge,
    "processors",
    "Of one sandbox: processors that it used over the last second or more. Absent at the first look. In /metrics/sandboxes.",
    OF_SANDBOX,
);

/// Its pages on the wrong node.
pub(crate) static SANDBOX_WRONG_NODE: Family = shard(
    "mica_sandbox_wrong_node_pages",
    Kind::Gauge,
    "pages",
    "Of one sandbox: pages on another memory node than its shard's, of 4 KiB, as of the last look. Absent before it. In /metrics/sandboxes.",
    OF_SANDBOX,
);

/// Its time on the wrong node.
pub(crate) static SANDBOX_WRONG_NODE_CPU: Family = shard(
    "mica_sandbox_wrong_node_cpu_seconds",
    Kind::Gauge,
    "seconds",
    "Of one sandbox: time that its vCPUs ran on other nodes than its shard's, as of the last look. Absent before it. In /metrics/sandboxes.",
    OF_SANDBOX,
);

/// The ring for files.
pub(crate) static RING_DEPTH: Family = shard(
    "mica_ring_depth",
    Kind::Gauge,
    "operations",
    "Operations of the ring for files that are not complete.",
    &[],
);

/// Its buffers.
pub(crate) static RING_BUFFERS: Family = shard(
    "mica_ring_free_buffers",
    Kind::Gauge,
    "buffers",
    "Pinned buffers of 1 MiB that nobody has.",
    &[],
);

/// What the kernel took.
pub(crate) static RING_SUBMISSIONS: Family = shard(
    "mica_ring_submissions_total",
    Kind::Counter,
    "entries",
    "Entries that the kernel took from the ring for files.",
    &[],
);

/// How long it took.
pub(crate) static RING_SECONDS: Family = shard(
    "mica_ring_operation_seconds",
    Kind::Histogram,
    "seconds",
    "Completed operations of the ring for files, from their start, the wait for a place in the ring included.",
    &["kind"],
);

/// What waits.
pub(crate) static MAILBOX_DEPTH: Family = shard(
    "mica_mailbox_depth",
    Kind::Gauge,
    "messages",
    "Requests of other shards that wait for this one. The shards are asked one after another, so it may be off by what was on its way.",
    &[],
);

/// What was taken.
pub(crate) static MAILBOX_TAKEN: Family = shard(
    "mica_mailbox_taken_total",
    Kind::Counter,
    "messages",
    "Requests of other shards that this one took out of its mailbox.",
    &[],
);

/// The executor.
pub(crate) static EXECUTOR_BUSY: Family = shard(
    "mica_executor_busy_seconds_total",
    Kind::Counter,
    "seconds",
    "Time that the shard's executor was awake.",
    &[],
);

/// Its tasks.
pub(crate) static EXECUTOR_TASKS: Family = shard(
    "mica_executor_task_seconds_total",
    Kind::Counter,
    "seconds",
    "Of that, the time of tasks.",
    &[],
);

/// Its sleep.
pub(crate) static EXECUTOR_IDLE: Family = shard(
    "mica_executor_idle_seconds_total",
    Kind::Counter,
    "seconds",
    "Time that it slept for want of work.",
    &[],
);

/// How often a task ran.
pub(crate) static EXECUTOR_RUNS: Family =
    shard("mica_executor_task_runs_total", Kind::Counter, "runs", "Times that a task ran.", &[]);

/// When it did not turn.
pub(crate) static EXECUTOR_STALLS: Family = shard(
    "mica_executor_stalls_total",
    Kind::Counter,
    "stalls",
    "Times that the executor did not turn for 5 ms although it had work. The log names the task.",
    &[],
);

/// For how long.
pub(crate) static EXECUTOR_STALLED: Family = shard(
    "mica_executor_stalled_seconds_total",
    Kind::Counter,
    "seconds",
    "How long it did not turn then.",
    &[],
);

/// What hand-overs cost in power.
pub(crate) static CORES_AWAKE: Family = shard(
    "mica_cores_kept_awake_seconds_total",
    Kind::Counter,
    "seconds",
    "How long the shard kept the machine's cores from deep idle states, as it handed much over. \
     See --cpu-latency-us.",
    &[],
);

/// Memory.
pub(crate) static NODE_MEMORY: Family =
    host("mica_node_memory_bytes", Kind::Gauge, "bytes", "Memory of a node.", &["node"]);

/// Free memory.
pub(crate) static NODE_FREE: Family = host(
    "mica_node_free_bytes",
    Kind::Gauge,
    "bytes",
    "Memory of a node that is free, or a clean file's.",
    &["node"],
);

/// Disks that were not cloned.
pub(crate) static DISK_COPIES: Family = host(
    "mica_disk_copies_total",
    Kind::Counter,
    "disks",
    "Disks that were copied because the store's file system does not clone.",
    &[],
);

/// Which daemon.
pub(crate) static BUILD_INFO: Family = host(
    "mica_build_info",
    Kind::Gauge,
    "",
    "1, with the version of the daemon and the release of the kernel.",
    &["version", "kernel"],
);

/// How long it runs.
pub(crate) static UPTIME: Family =
    host("mica_uptime_seconds", Kind::Gauge, "seconds", "Time since the daemon started.", &[]);

/// All of them.
pub static FAMILIES: &[&Family] = &[
    &OPERATIONS,
    &OPERATION_SECONDS,
    &PHASE_SECONDS,
    &MAILBOX_FULL,
    &FASTPATH,
    &SANDBOXES,
    &POOL_DEPTH,
    &POOL_BUILDING,
    &POOL_HITS,
    &POOL_MISSES,
    &POOL_SPAWN,
    &VM_FAULTS,
    &VM_COW,
    &VM_RESIDENT,
    &VM_CPU,
    &VM_WRONG_NODE,
    &VM_WRONG_NODE_CPU,
    &SANDBOX_MEMORY,
    &SANDBOX_PROCESSORS,
    &SANDBOX_WRONG_NODE,
    &SANDBOX_WRONG_NODE_CPU,
    &RING_DEPTH,
    &RING_BUFFERS,
    &RING_SUBMISSIONS,
    &RING_SECONDS,
    &MAILBOX_DEPTH,
    &MAILBOX_TAKEN,
    &EXECUTOR_BUSY,
    &EXECUTOR_TASKS,
    &EXECUTOR_IDLE,
    &EXECUTOR_RUNS,
    &EXECUTOR_STALLS,
    &EXECUTOR_STALLED,
    &CORES_AWAKE,
    &NODE_MEMORY,
    &NODE_FREE,
    &DISK_COPIES,
    &BUILD_INFO,
    &UPTIME,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_well_formed_say_their_unit_and_are_there_once() {
        let mut names: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
        for Family { name, kind, unit, help, labels, .. } in FAMILIES {
            let in_form = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            assert!(in_form(name) && labels.iter().all(|label| in_form(label)), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
            let timed = name.trim_end_matches("_total").ends_with("_seconds");
            assert_eq!(timed, *unit == "seconds", "{name} in {unit}");
            assert_eq!(name.contains("_bytes"), *unit == "bytes", "{name} in {unit}");
            assert!(help.ends_with('.') && !help.contains('\n'), "{name}");
            let ours = ["shard", "le", "quantile"];
            assert!(labels.iter().all(|label| !ours.contains(label)), "{name}");
        }
    }
}
