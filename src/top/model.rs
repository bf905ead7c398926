//! What `mica top` knows: the last look at the host, the one before, and how sandboxes are ordered.
//!
//! Called by [`super`] and [`super::render`]. Refuses to ask anything itself: it is given looks.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::time::SystemTime;

use clap::ValueEnum;
use mica_wire::api::{HostSummary, OperationSummary, SandboxState, SandboxSummary};

use super::exposition::Times;

/// The operations, in the order of a sandbox's life.
pub const OPERATIONS: [&str; 8] =
    ["create", "restore", "snapshot", "pause", "resume", "rollback", "clone", "kill"];

/// One look at a host.
#[derive(Clone, Debug)]
pub struct Look {
    /// When it was taken.
    pub at: SystemTime,
    /// The machine and its shards.
    pub host: HostSummary,
    /// Its sandboxes.
    pub sandboxes: Vec<SandboxSummary>,
    /// How long operations took; none where that is not counted.
    pub operations: Option<BTreeMap<String, Times>>,
}

/// What sandboxes are ordered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SortBy {
    /// Memory that it shares with nobody, the most first.
    Memory,
    /// Processors in use, the most first.
    Cpu,
    /// Pages on another node than its own, then vCPU time there, the most first.
    WrongNode,
    /// The youngest first.
    Age,
}

/// One operation over all shards.
#[derive(Clone, Debug, PartialEq)]
pub struct OperationRow {
    pub name: &'static str,
    pub count: u64,
    pub errors: u64,
    pub p50_s: Option<f64>,
    pub p95_s: Option<f64>,
}

/// Everything that a frame is drawn from.
#[derive(Debug)]
pub struct Screen {
    /// Where the host is.
    pub url: String,
    /// The last look.
    pub look: Option<Look>,
    /// Sandboxes made each second between the last two.
    pub creates_per_s: Option<f64>,
    /// How sandboxes are ordered.
    pub sort: SortBy,
    /// Why there is nothing newer.
    pub failure: Option<String>,
}

impl Screen {
    pub fn new(url: String, sort: SortBy) -> Self {
        Self { url, look: None, creates_per_s: None, sort, failure: None }
    }

    pub fn take(&mut self, look: Look) {
        self.creates_per_s = self.look.as_ref().and_then(|before| rate(before, &look));
        self.look = Some(look);
        self.failure = None;
        self.order();
    }

    pub fn failed(&mut self, why: String) {
        self.failure = Some(why);
    }

    pub fn sort_by(&mut self, by: SortBy) {
        self.sort = by;
        self.order();
    }

    fn order(&mut self) {
        let by = self.sort;
        if let Some(look) = &mut self.look {
            look.sandboxes.sort_by(|a, b| compare(by, a, b));
        }
    }
}

fn made(host: &HostSummary) -> u64 {
    let of = |name| host.shards.iter().filter_map(move |shard| shard.ops.get(name));
    of("create").chain(of("restore")).map(|operation| operation.count).sum()
}

/// None where a new daemon counts from nothing, or no time has passed.
fn rate(before: &Look, now: &Look) -> Option<f64> {
    let more = made(&now.host).checked_sub(made(&before.host))?;
    let passed = now.at.duration_since(before.at).ok()?.as_secs_f64();
    (passed > 0.0 && now.host.uptime_s >= before.host.uptime_s).then(|| more as f64 / passed)
}

fn compare(by: SortBy, a: &SandboxSummary, b: &SandboxSummary) -> Ordering {
    let first = match by {
        SortBy::Memory => b.memory_bytes.cmp(&a.memory_bytes),
        SortBy::Cpu => b.cpu.unwrap_or(-1.0).total_cmp(&a.cpu.unwrap_or(-1.0)),
        SortBy::WrongNode => b.wrong_node_pages.cmp(&a.wrong_node_pages).then_with(|| {
            let time = |one: &SandboxSummary| one.wrong_node_cpu_s.unwrap_or(-1.0);
            time(b).total_cmp(&time(a))
        }),
        SortBy::Age => b.started_at.cmp(&a.started_at),
    };
    first.then_with(|| a.id.cmp(&b.id))
}

impl Look {
    /// Operations over all shards; none where they are not counted.
    pub fn operation_rows(&self) -> Option<Vec<OperationRow>> {
        let times = self.operations.as_ref()?;
        let row = |name: &'static str| {
            let parts: Vec<&OperationSummary> =
                self.host.shards.iter().filter_map(|shard| shard.ops.get(name)).collect();
            let quantile = |share, of: fn(&OperationSummary) -> Option<u64>| {
                times.get(name)?.quantile(share, parts.iter().filter_map(|part| of(part)))
            };
            OperationRow {
                name,
                count: parts.iter().map(|part| part.count).sum(),
                errors: parts.iter().map(|part| part.errors).sum(),
                p50_s: quantile(0.5, |part| part.p50_us),
                p95_s: quantile(0.95, |part| part.p95_us),
            }
        };
        Some(OPERATIONS.into_iter().map(row).collect())
    }

    /// Running ones, and paused ones.
    pub fn states(&self) -> (usize, usize) {
        let running =
            self.sandboxes.iter().filter(|one| one.state == SandboxState::Running).count();
        (running, self.sandboxes.len() - running)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use mica_wire::api::{NodeSummary, PhaseSummary, PoolSummary, ShardSummary};
    use std::time::{Duration, UNIX_EPOCH};

    fn shard(number: u16, creates: u64) -> ShardSummary {
        let operation = OperationSummary {
            count: creates,
            errors: u64::from(number),
            p50_us: Some(3_000),
            p95_us: Some(9_000),
            p99_us: Some(9_500),
            phases: BTreeMap::from([(
                "run".to_owned(),
                PhaseSummary { order: 0, p50_us: None, p95_us: None, p99_us: None },
            )]),
        };
        ShardSummary {
            shard: number,
            node: u32::from(number / 2),
            core: u32::from(number) + 2,
            busy_fraction: f64::from(number) * 0.25,
            mailbox_depth: u64::from(number),
            sandboxes: 2,
            pool: PoolSummary { depth: 4, hits: 9, misses: 1 },
            ops: BTreeMap::from([("create".to_owned(), operation)]),
        }
    }

    fn sandbox(name: &str, memory_mib: Option<u64>, cpu: Option<f64>) -> SandboxSummary {
        SandboxSummary {
            id: name.to_owned(),
            template: "base".to_owned(),
            tenant: "default".to_owned(),
            state: if memory_mib.is_some() { SandboxState::Running } else { SandboxState::Paused },
            shard: 3,
            node: 1,
            started_at: format!("2026-11-26T07:00:0{}Z", name.len() % 10),
            memory_bytes: memory_mib.map(|mib| mib << 20),
            cpu,
            wrong_node_pages: memory_mib.map(|_| 7),
            wrong_node_cpu_s: cpu.map(|cpu| cpu * 10.0),
        }
    }

    /// A host of two nodes with four shards, at so many seconds.
    pub fn look(at_s: u64, creates: u64) -> Look {
        let node = |node| NodeSummary {
            node,
            memory_bytes: Some(64 << 30),
            free_bytes: Some(16 << 30),
            vcpus: 12,
        };
        let text = format!(
            "mica_operation_seconds_bucket{{operation=\"create\",le=\"0.008\"}} {0}\n\
             mica_operation_seconds_count{{operation=\"create\"}} {0}\n",
            4 * creates
        );
        Look {
            at: UNIX_EPOCH + Duration::from_secs(1_700_000_000 + at_s),
            host: HostSummary {
                version: "0.1.0".to_owned(),
                uptime_s: 3600.0 + at_s as f64,
                kernel: "6.12.0".to_owned(),
                metrics: true,
                nodes: vec![node(0), node(1)],
                shards: (0..4).map(|number| shard(number, creates)).collect(),
            },
            sandboxes: vec![
                sandbox("ismall", Some(10), Some(0.9)),
                sandbox("ilarge1", Some(2000), Some(0.1)),
                sandbox("ipaused22", None, None),
            ],
            operations: Some(super::super::exposition::operations(&text)),
        }
    }

    #[test]
    fn sandboxes_are_ordered_and_operations_added_up() {
        let mut screen = Screen::new("http://x".to_owned(), SortBy::Memory);
        screen.take(look(0, 10));
        let order = |screen: &Screen| -> Vec<String> {
            screen.look.as_ref().unwrap().sandboxes.iter().map(|one| one.id.clone()).collect()
        };
        assert_eq!(order(&screen), ["ilarge1", "ismall", "ipaused22"]);
        screen.sort_by(SortBy::Cpu);
        assert_eq!(order(&screen), ["ismall", "ilarge1", "ipaused22"]);
        screen.sort_by(SortBy::WrongNode);
        assert_eq!(
            order(&screen),
            ["ismall", "ilarge1", "ipaused22"],
            "by time where pages are equal"
        );
        screen.sort_by(SortBy::Age);
        assert_eq!(order(&screen), ["ipaused22", "ilarge1", "ismall"]);
        screen.take(look(2, 15));
        assert_eq!(order(&screen)[0], "ipaused22", "a new look is in the same order");
        assert_eq!(screen.creates_per_s, Some(10.0));
        let rows = screen.look.as_ref().unwrap().operation_rows().unwrap();
        assert_eq!((rows[0].count, rows[0].errors), (60, 6));
        assert_eq!((rows[0].p50_s, rows[0].p95_s), (Some(0.003), Some(0.009)));
        assert_eq!((rows[1].name, rows[1].p50_s), ("restore", None));
        let mut new_daemon = look(4, 1);
        new_daemon.host.uptime_s = 1.0;
        screen.take(new_daemon);
        assert_eq!(screen.creates_per_s, None);
    }
}
