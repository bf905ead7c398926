//! The state of the host, for people who look at it: nodes, shards, sandboxes, and what they use.
//!
//! Asked by `http` through [`Host::view`]; each shard answers for itself. Refuses to read anything of a
//! sandbox that is not on the page: what a process uses costs a file of /proc each.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use mica_numa::rt::{self, time::Instant};
use mica_units::{SandboxId, ShardId, TenantId};

use crate::event::{Operation, Reply};
use crate::host::out_of_form;
use crate::metrics::{Measured, OperationView, add_mailboxes};
use crate::pressure;
use crate::shard::Shard;
use crate::{Host, Lifecycle, ShardError, proc};

/// The shortest time over which a share of time is worked out.
const WINDOW: Duration = Duration::from_secs(1);

/// A memory node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// Its number.
    pub node: u32,
    /// Hardware threads that run vCPUs.
    pub vcpus: usize,
    /// Its memory; none where the kernel does not tell.
    pub memory_bytes: Option<u64>,
    /// What of it is free, or a clean file's.
    pub free_bytes: Option<u64>,
}

/// A shard.
#[derive(Clone, Debug)]
pub struct ShardView {
    /// Which.
    pub shard: ShardId,
    /// Its memory node.
    pub node: u32,
    /// The hardware thread it is pinned to.
    pub core: u32,
    /// How much of the last second or more it was busy, 0 to 1.
    pub busy_share: f64,
    /// Requests of other shards that wait for it.
    pub mailbox_depth: u64,
    /// Sandboxes, paused ones included.
    pub sandboxes: u64,
    /// VM processes that wait for a guest.
    pub pool_depth: u64,
    /// Starts that found one.
    pub pool_hits: u64,
    /// Starts that had to wait for one.
    pub pool_misses: u64,
    /// What was done with sandboxes.
    pub operations: Vec<OperationView>,
    /// Messages that it took, and sent to each shard: what waits is the difference.
    pub(crate) taken: u64,
    pub(crate) sent: Vec<u64>,
}

/// A sandbox.
#[derive(Clone, Debug)]
pub struct SandboxView {
    /// Its id.
    pub id: SandboxId,
    /// The name of its template.
    pub template: String,
    /// Whose it is.
    pub tenant: TenantId,
    /// Whether it runs.
    pub state: Lifecycle,
    /// Its shard.
    pub shard: ShardId,
    /// The memory node of that shard.
    pub node: u32,
    /// When its create was answered.
    pub started_at: SystemTime,
    /// What its process uses; none where it has none.
    pub process: Option<ProcessView>,
}

/// What a VM process uses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProcessView {
    /// Memory that it shares with nobody: what the guest wrote, and the process's own.
    pub memory_bytes: u64,
    /// Processors that it used over the last second or more; none at the first look.
    pub cpu: Option<f64>,
    /// Pages of its guest on another node than its own, where that is known.
    pub wrong_node_pages: Option<u64>,
    /// Time that its vCPUs ran on other nodes than its own, where that is known.
    pub wrong_node_time: Option<Duration>,
}

/// The host.
#[derive(Clone, Debug)]
pub struct HostView {
    /// How long this daemon has run.
    pub uptime: Duration,
    /// Release of the kernel.
    pub kernel: String,
    /// Its memory nodes.
    pub nodes: Vec<NodeView>,
    /// Its shards, in order.
    pub shards: Vec<ShardView>,
    /// Sandboxes of the page, ordered by start, then id.
    pub sandboxes: Vec<SandboxView>,
    /// All sandboxes.
    pub sandboxes_total: usize,
    /// Whether there are more behind those of the page.
    pub has_more: bool,
}

/// Something that rises, and when it was looked at last: for its rise over a window.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rising {
    at: Instant,
    value: Duration,
    share: Option<f64>,
}

impl Rising {
    pub(crate) fn new(value: Duration) -> Self {
        Self { at: Instant::now(), value, share: None }
    }

    /// Its rise for each second, over the time since it was looked at before, or as it was then if that
    /// is not long ago. None before a first window is over.
    pub(crate) fn look(&mut self, value: Duration) -> Option<f64> {
        let passed = self.at.elapsed();
        if passed >= WINDOW {
            let rise = value.saturating_sub(self.value).as_secs_f64();
            *self = Self { share: Some(rise / passed.as_secs_f64()), ..Self::new(value) };
        }
        self.share
    }
}

impl Shard {
    /// How this shard is.
    pub(crate) fn view(&self) -> ShardView {
        let counts = self.pool.counts();
        let stats = rt::stats();
        let busy = self.busy.borrow_mut().look(stats.busy);
        // Before a first window is over: since the start.
        let since_start = stats.busy.as_secs_f64() / self.begun.elapsed().as_secs_f64().max(1e-9);
        ShardView {
            shard: self.id,
            node: self.node,
            core: self.core,
            busy_share: busy.unwrap_or(since_start).clamp(0.0, 1.0),
            mailbox_depth: 0,
            sandboxes: self.all().len() as u64,
            pool_depth: self.pool.waiting() as u64,
            pool_hits: counts.hits,
            pool_misses: counts.misses,
            operations: self.metrics.operations.views(),
            taken: self.metrics.taken.get(),
            sent: self.metrics.sent.iter().map(|(_, sent)| sent.get()).collect(),
        }
    }

    /// The process of a sandbox that has one.
    fn pid_of(&self, id: SandboxId) -> Option<u32> {
        self.all().get(&id)?.pid()
    }

    /// The processes of all sandboxes that have one.
    pub(crate) fn pids(&self) -> Vec<u32> {
        self.all().values().filter_map(|sandbox| sandbox.pid()).collect()
    }

    /// What each sandbox is doing.
    pub(crate) fn sandbox_states(&self) -> Vec<&'static str> {
        self.all().values().map(|sandbox| sandbox.state_name()).collect()
    }

    /// Its sandboxes, without what they use.
    pub(crate) fn sandbox_views(&self) -> Vec<SandboxView> {
        let view = |info: crate::SandboxInfo| SandboxView {
            id: info.id,
            template: info.template_name.as_str().to_owned(),
            tenant: info.tenant,
            state: info.state,
            shard: self.id,
            node: self.node,
            started_at: info.started_at,
            process: None,
        };
        self.list().into_iter().map(view).collect()
    }

    /// What the processes of these sandboxes use.
    pub(crate) async fn uses(&self, ids: Vec<SandboxId>) -> BTreeMap<SandboxId, ProcessView> {
        let pids: Vec<_> = ids.into_iter().filter_map(|id| Some((id, self.pid_of(id)?))).collect();
        let read = move || {
            let used = |(id, pid)| Some((id, proc::read(pid)?));
            pids.into_iter().filter_map(used).collect::<Vec<_>>()
        };
        let used = rt::blocking(read).await.unwrap_or_default();
        let mut seen = self.seen.borrow_mut();
        // Of those that are gone nothing is kept.
        seen.retain(|id, _| self.pid_of(*id).is_some());
        let view = |(id, used): (SandboxId, proc::Use)| {
            let rising = seen.entry(id).or_insert_with(|| Rising::new(used.cpu));
            let cpu = rising.look(used.cpu);
            let away = self.all().get(&id).and_then(|sandbox| self.wrong_node_of(sandbox));
            let view = ProcessView {
                memory_bytes: used.anonymous_bytes,
                cpu,
                wrong_node_pages: away.map(|away| away.pages),
                wrong_node_time: away.map(|away| away.vcpu_time),
            };
            (id, view)
        };
        used.into_iter().map(view).collect()
    }
}

impl Host {
    /// Whether numbers are recorded.
    #[must_use]
    pub fn has_metrics(&self) -> bool {
        self.local().metrics.is_on()
    }

    /// From now on this shard's numbers hold those of `source`.
    pub fn add_source(&self, source: std::rc::Rc<dyn crate::metrics::Source>) {
        self.local().metrics.add_source(source);
    }

    /// The numbers of every shard, and those of the host.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn measure(&self) -> Result<Vec<Measured>, ShardError> {
        let mut all = Vec::new();
        for reply in self.ask_all(|| Operation::Measure).await? {
            match reply {
                Reply::Measured(measured) => all.push(*measured),
                other => return Err(out_of_form(&other)),
            }
        }
        all.sort_by_key(|measured| measured.shard);
        add_mailboxes(&mut all);
        let own = self.local();
        let samples = own.sample_host().await;
        all.push(Measured::new(own.id, own.node, samples));
        Ok(all)
    }

    /// The state of the host, with `limit` sandboxes behind the one that started at `after`.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn view(
        &self,
        after: Option<(SystemTime, SandboxId)>,
        limit: usize,
    ) -> Result<HostView, ShardError> {
        let (mut shards, mut sandboxes) = (Vec::new(), Vec::new());
        for reply in self.ask_all(|| Operation::View).await? {
            match reply {
                Reply::View(view) => {
                    shards.push(view.0);
                    sandboxes.extend(view.1);
                }
                other => return Err(out_of_form(&other)),
            }
        }
        shards.sort_by_key(|view| view.shard);
        count_waiting(&mut shards);
        let sandboxes_total = sandboxes.len();
        sandboxes.sort_by_key(|view| (view.started_at, view.id));
        sandboxes.retain(|view| after.is_none_or(|after| (view.started_at, view.id) > after));
        let has_more = sandboxes.len() > limit;
        sandboxes.truncate(limit);
        self.add_uses(&mut sandboxes).await?;
        let shard = self.local();
        let nodes = shard.workshop.nodes.clone();
        let nodes = rt::blocking(move || {
            let look = |(node, vcpus): &(u32, usize)| {
                let memory = pressure::memory(*node).ok();
                NodeView {
                    node: *node,
                    vcpus: *vcpus,
                    memory_bytes: memory.map(|(total, _)| total),
                    free_bytes: memory.map(|(_, free)| free),
                }
            };
            nodes.iter().map(look).collect()
        });
        let nodes = nodes.await.map_err(|_| ShardError::Busy)?;
        let uptime = shard.begun.elapsed();
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        Ok(HostView { uptime, kernel, nodes, shards, sandboxes, sandboxes_total, has_more })
    }

    async fn add_uses(&self, sandboxes: &mut [SandboxView]) -> Result<(), ShardError> {
        let mut by_shard: BTreeMap<ShardId, Vec<SandboxId>> = BTreeMap::new();
        for view in &*sandboxes {
            by_shard.entry(view.shard).or_default().push(view.id);
        }
        let mut uses = BTreeMap::new();
        for (shard, ids) in by_shard {
            match self.ask(shard, Operation::Uses(ids)).await? {
                Reply::Uses(some) => uses.extend(some),
                other => return Err(out_of_form(&other)),
            }
        }
        for view in sandboxes {
            view.process = uses.remove(&view.id);
        }
        Ok(())
    }
}

/// What waits for a shard is what all sent to it and it has not taken. The copies are not of one
/// moment, so this may be off by what was under way.
fn count_waiting(shards: &mut [ShardView]) {
    for place in 0..shards.len() {
        let index = usize::from(shards[place].shard.index());
        let sent: u64 = shards.iter().filter_map(|view| view.sent.get(index)).sum();
        shards[place].mailbox_depth = sent.saturating_sub(shards[place].taken);
    }
}
