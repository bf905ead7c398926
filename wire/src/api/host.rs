//! The state of the host, for the operator's own eyes: the dashboard and `mica top`.
//!
//! Written by `http`, read by those two. Not part of E2B's interface. Refuses to hold a secret: there is
//! no token in it, though it names every tenant.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The answer to `GET /ui/state`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HostState {
    /// The machine and its shards.
    pub host: HostSummary,
    /// One page of sandboxes, running and paused, the oldest first.
    pub sandboxes: Vec<SandboxSummary>,
    /// How many there are on all pages.
    pub sandboxes_total: u64,
}

/// The machine and its shards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HostSummary {
    /// Version of the daemon.
    pub version: String,
    /// Seconds since it started.
    pub uptime_s: f64,
    /// Release of the kernel.
    pub kernel: String,
    /// Whether operations are counted and timed: without, `ops` stays at zero.
    pub metrics: bool,
    /// Memory nodes.
    pub nodes: Vec<NodeSummary>,
    /// Shards, in order.
    pub shards: Vec<ShardSummary>,
}

/// A memory node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NodeSummary {
    /// Its number.
    pub node: u32,
    /// Its memory; null where the kernel does not tell.
    pub memory_bytes: Option<u64>,
    /// What of it is free, or a clean file's.
    pub free_bytes: Option<u64>,
    /// Hardware threads that run vCPUs.
    pub vcpus: u32,
}

/// A shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ShardSummary {
    /// Its number.
    pub shard: u16,
    /// Its memory node.
    pub node: u32,
    /// The hardware thread it is pinned to.
    pub core: u32,
    /// How busy it was, 0 to 1, since somebody looked last, a second ago or more.
    pub busy_fraction: f64,
    /// Requests of other shards that wait for it.
    pub mailbox_depth: u64,
    /// Sandboxes, paused ones included.
    pub sandboxes: u64,
    /// VM processes that are held ready.
    pub pool: PoolSummary,
    /// Operations since the daemon started, by name.
    pub ops: BTreeMap<String, OperationSummary>,
}

/// VM processes that are held ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PoolSummary {
    /// How many wait.
    pub depth: u64,
    /// Starts that found one.
    pub hits: u64,
    /// Starts that had to wait for one to be made.
    pub misses: u64,
}

/// What was done with sandboxes, of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct OperationSummary {
    /// How many succeeded.
    pub count: u64,
    /// How many failed.
    pub errors: u64,
    /// Half of them took no longer than this, in microseconds; null where there was none.
    pub p50_us: Option<u64>,
    /// 95 of a hundred.
    pub p95_us: Option<u64>,
    /// 99 of a hundred.
    pub p99_us: Option<u64>,
    /// What that time was spent on, by name.
    pub phases: BTreeMap<String, PhaseSummary>,
}

/// What time was spent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PhaseSummary {
    /// Its place among the phases: they follow one another.
    pub order: u32,
    /// Half of the operations took no longer than this on it, in microseconds.
    pub p50_us: Option<u64>,
    /// 95 of a hundred.
    pub p95_us: Option<u64>,
    /// 99 of a hundred.
    pub p99_us: Option<u64>,
}

/// A sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SandboxSummary {
    /// Its id.
    pub id: String,
    /// The name of its template.
    pub template: String,
    /// Whose it is.
    pub tenant: String,
    /// Whether it runs.
    pub state: super::SandboxState,
    /// Its shard.
    pub shard: u16,
    /// The memory node of that shard.
    pub node: u32,
    /// When it was made. RFC 3339.
    pub started_at: String,
    /// Memory that it shares with nobody; null where it has no process.
    pub memory_bytes: Option<u64>,
    /// Processors that it used since somebody looked last, a second ago or more; null at the first look.
    pub cpu: Option<f64>,
    /// Pages of its memory on another node than its own, of 4 KiB, at the last look, which may be a minute
    /// ago or more; 0 on a machine with one memory node; null where that is not known, or it has no process.
    pub wrong_node_pages: Option<u64>,
    /// Seconds that its vCPUs ran on other nodes than its own, at that look; null as the pages are.
    pub wrong_node_cpu_s: Option<f64>,
}
