//! The sandboxes of one shard.
//!
//! Called by `host` for requests of its own thread, and by `run` for those of other shards. Refuses
//! more sandboxes than its share, and any of another shard.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use mica_numa::io::Ring;
use mica_numa::latency::DenseLatency;
use mica_numa::rt::time::{self, Instant};
use mica_numa::rt::{self, oneshot};
use mica_units::{GuestPort, SandboxId, ShardCount, ShardId, TenantId};

use crate::choice::{Choice, share};
use crate::event::{Counts, Entry, Keeps, Operation, Purpose, Reply, Spawned, Wake};
use crate::memo::Memos;
use crate::metrics::{self, Asked, Metrics};
use crate::placement;
use crate::random::draw_hex;
use crate::replicas::Replicas;
use crate::sandbox::{self, Identity, Images, Made, Request, Sandbox, Start, Workshop};
use crate::shell::Pool;
use crate::turns::Turns;
use crate::upkeep::Upkeep;
use crate::view::Rising;
use crate::{
    ConnectError, CreateRequest, Epoch, Host, Lifecycle, LogLine, NetworkPolicy, SandboxInfo,
    SandboxProcess, ShardError, SnapshotInfo, Usage, Visitor,
};

/// Bytes of an access token, before they become hexadecimal.
const TOKEN_BYTES: usize = 32;

/// Bytes of a machine id (`machine-id(5)`), before they become hexadecimal.
const MACHINE_ID_BYTES: usize = 16;

/// Templates that spawns are counted for. Only as many as were made from since the start matter.
const SPAWNS_MAX: usize = 4096;

/// How long all sandboxes together may take to go when the daemon stops.
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// Where a shard is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Which it is.
    pub(crate) id: ShardId,
    /// Of how many.
    pub(crate) shards: ShardCount,
    /// Its memory node's number.
    pub(crate) node: u32,
    /// The node that its memory is on: another one where its own has none.
    pub(crate) memory_node: u32,
    /// The hardware thread it is pinned to.
    pub(crate) core: u32,
    /// The first shard of that node.
    pub(crate) librarian: ShardId,
}

/// One shard.
#[derive(Debug)]
pub(crate) struct Shard {
    /// Which.
    pub(crate) id: ShardId,
    /// Of how many.
    pub(crate) shards: ShardCount,
    /// What sandboxes are made of.
    pub(crate) workshop: Workshop,
    /// VM processes that wait.
    pub(crate) pool: Rc<Pool>,
    /// What snapshots are written through.
    pub(crate) ring: Rc<Ring>,
    /// What sandboxes are restored from.
    pub(crate) images: Images,
    /// Which shard a new sandbox goes to.
    pub(crate) choice: Choice,
    /// Its node.
    pub(crate) node: u32,
    /// The hardware thread it is pinned to.
    pub(crate) core: u32,
    /// The shard that keeps this node's copies of base layers.
    pub(crate) librarian: ShardId,
    /// What it counts.
    pub(crate) metrics: Metrics,
    /// Keeps cores awake while much is handed over.
    pub(crate) awake: DenseLatency,
    /// When it started.
    pub(crate) begun: Instant,
    /// How busy it was, when somebody looked last.
    pub(crate) busy: RefCell<Rising>,
    /// How busy the processes of its sandboxes were then.
    pub(crate) seen: RefCell<BTreeMap<SandboxId, Rising>>,
    /// Those copies, if it is this one.
    pub(crate) replicas: Replicas,
    /// Snapshots to be flattened.
    pub(crate) upkeep: Upkeep,
    /// The way to the other shards, while it serves.
    host: RefCell<Option<Host>>,
    sandboxes: RefCell<BTreeMap<SandboxId, Rc<Sandbox>>>,
    spawns: RefCell<BTreeMap<String, Spawned>>,
    /// Answers to what is to be done once.
    pub(crate) memos: Memos,
    /// Builds that wait for another.
    pub(crate) turns: Turns,
    draining: Cell<bool>,
}

impl Shard {
    /// A shard without sandboxes.
    pub(crate) fn new(
        Place { id, shards, node, memory_node, core, librarian }: Place,
        workshop: Workshop,
        pool: Rc<Pool>,
        ring: Rc<Ring>,
        choice: Choice,
        awake: DenseLatency,
    ) -> Self {
        let replicas = Replicas::new(memory_node, workshop.config.replica_budget_bytes());
        Self {
            id,
            shards,
            node,
            core,
            librarian,
            metrics: Metrics::new(workshop.config.metrics, shards),
            begun: Instant::now(),
            awake,
            busy: RefCell::new(Rising::new(rt::stats().busy)),
            seen: RefCell::default(),
            replicas,
            upkeep: Upkeep::default(),
            host: RefCell::default(),
            workshop,
            pool,
            ring,
            images: Images::default(),
            choice,
            sandboxes: RefCell::default(),
            spawns: RefCell::default(),
            memos: Memos::default(),
            turns: Turns::default(),
            draining: Cell::new(false),
        }
    }

    /// The way to all shards, while this one serves.
    pub(crate) fn host(&self) -> Option<Host> {
        self.host.borrow().clone()
    }

    /// Gives it the way to the others, or takes it back: the two hold one another.
    pub(crate) fn set_host(&self, host: Option<Host>) {
        *self.host.borrow_mut() = host;
    }

    /// Does what is asked.
    pub(crate) async fn perform(self: Rc<Self>, operation: Operation) -> Reply {
        match operation {
            Operation::Create(id, request, asked) => {
                Reply::Sandbox(self.create(id, *request, false, asked).await)
            }
            Operation::Copy(id, request, asked) => {
                Reply::Sandbox(self.create(id, *request, true, asked).await)
            }
            Operation::TenantOf(id) => Reply::Tenant(self.tenant_of(id)),
            Operation::Get(id) => Reply::Sandbox(self.get(id)),
            Operation::List => Reply::Sandboxes(self.list()),
            Operation::BuildOver => {
                self.turns.wake();
                Reply::Done(Ok(()))
            }
            Operation::Kill(id) => Reply::Done(self.timed_kill(id).await),
            Operation::SetTimeout(id, life) => Reply::Done(self.set_timeout(id, life).await),
            Operation::Extend(id, life) => Reply::Done(self.extend(id, life)),
            Operation::Logs(id) => Reply::Logs(self.logs(id).await),
            Operation::Usage(id, now) => Reply::Usages(self.usages(id, now)),
            Operation::Connect(id, port, visitor, kept) => {
                Reply::Stream(self.connect(id, port, &visitor, kept).await)
            }
            Operation::SetNetwork(id, policy) => Reply::Done(self.set_network(id, *policy).await),
            Operation::Snapshot(id, purpose, keeps) => {
                Reply::Snapshot(self.snapshot(id, purpose, keeps).await)
            }
            Operation::Rollback(id, to) => {
                Reply::Done(self.ask(id, |sender| Request::Rollback(to, sender)).await)
            }
            Operation::Pause(id, keeps) => {
                Reply::Done(self.ask(id, |sender| Request::Pause(keeps, sender)).await)
            }
            Operation::Resume(id, wake) => Reply::Resumed(self.resume(id, wake).await),
            Operation::RequestOf(id) => Reply::Request(self.request_of(id)),
            Operation::ProcessOf(id) => Reply::Process(self.process_of(id)),
            Operation::WrongNode(id) => Reply::WrongNode(placement::wrong_node(&self, id).await),
            Operation::Forget(id) => {
                self.images.forget(&id);
                Reply::Done(Ok(()))
            }
            Operation::Spawns => Reply::Spawns(self.spawns.borrow().clone()),
            Operation::Counts => Reply::Counts(self.counts()),
            Operation::MemoBegin(key, digest) => Reply::Memo(self.memos.begin(key, digest)),
            Operation::MemoEnd(key, ticket, answer) => {
                self.memos.end(&key, ticket, answer);
                Reply::Done(Ok(()))
            }
            Operation::Measure => Reply::Measured(Box::new(self.measured().await)),
            Operation::View => Reply::View(Box::new((self.view(), self.sandbox_views()))),
            Operation::Uses(ids) => Reply::Uses(self.uses(ids).await),
            Operation::Replica(snapshot, layer) => {
                Reply::Replica(Replicas::get(&self, snapshot, layer).await)
            }
        }
    }

    async fn create(
        self: &Rc<Self>,
        id: SandboxId,
        request: CreateRequest,
        of_copies: bool,
        asked: Asked,
    ) -> Made {
        debug_assert_eq!(id.shard(self.shards), self.id, "sent to the wrong shard");
        if self.draining.get() {
            return Err(ShardError::ShuttingDown);
        }
        if self.live() >= self.share() {
            return Err(self.at_capacity());
        }
        let access_token = request.secure.then(draw_hex::<TOKEN_BYTES>).transpose()?;
        let traffic_token = Some(draw_hex::<TOKEN_BYTES>()?);
        let machine_id = draw_hex::<MACHINE_ID_BYTES>()?;
        let (maker, made) = oneshot::channel();
        let identity = Identity { request, of_copies, access_token, traffic_token, machine_id };
        self.begin(Sandbox::new(id, identity, Some(maker)), Start::Create(asked));
        made.await.unwrap_or(Err(ShardError::ShuttingDown))
    }

    /// Starts the life of a sandbox, new or taken over.
    pub(crate) fn begin(self: &Rc<Self>, sandbox: Sandbox, start: Start) {
        let sandbox = Rc::new(sandbox);
        self.sandboxes.borrow_mut().insert(sandbox.id, Rc::clone(&sandbox));
        self.show_load();
        rt::spawn(sandbox::drive(Rc::clone(self), sandbox, start)).detach();
    }

    pub(crate) fn find(&self, id: SandboxId) -> Result<Rc<Sandbox>, ShardError> {
        let found = self.sandboxes.borrow().get(&id).cloned();
        found.filter(|sandbox| !sandbox.is_ending()).ok_or(ShardError::NoSuchSandbox(id))
    }

    fn tenant_of(&self, id: SandboxId) -> Result<TenantId, ShardError> {
        let found = self.sandboxes.borrow().get(&id).map(|sandbox| sandbox.tenant().clone());
        found.ok_or(ShardError::NoSuchSandbox(id))
    }

    fn get(&self, id: SandboxId) -> Made {
        let info = self.find(id)?.info();
        info.map(Box::new).ok_or(ShardError::NoSuchSandbox(id))
    }

    pub(crate) fn list(&self) -> Vec<SandboxInfo> {
        self.sandboxes.borrow().values().filter_map(|sandbox| sandbox.info()).collect()
    }

    async fn timed_kill(&self, id: SandboxId) -> Result<(), ShardError> {
        let mut watch = self.metrics.watch(metrics::Operation::Kill, id);
        let killed = self.kill(id).await;
        match &killed {
            Err(ShardError::NoSuchSandbox(_)) => self.metrics.refused(metrics::Operation::Kill),
            killed => self.metrics.end(&mut watch, killed.is_ok()),
        }
        killed
    }

    async fn kill(&self, id: SandboxId) -> Result<(), ShardError> {
        let found = self.sandboxes.borrow().get(&id).cloned();
        let sandbox = found.ok_or(ShardError::NoSuchSandbox(id))?;
        // One whose end was decided before is no sandbox any more; who asks again may still rely
        // on its being gone when the answer comes.
        let was_ending = sandbox.is_ending();
        let gone = sandbox.gone();
        sandbox.kill();
        drop(sandbox);
        if gone.await.is_none() {
            tracing::warn!(%id, "a sandbox was dropped before its end");
        }
        if was_ending { Err(ShardError::NoSuchSandbox(id)) } else { Ok(()) }
    }

    async fn set_timeout(&self, id: SandboxId, life: Duration) -> Result<(), ShardError> {
        let sandbox = self.find(id)?;
        if sandbox.set_life(life) {
            sandbox.kept().await
        } else {
            Err(ShardError::NoSuchSandbox(id))
        }
    }

    fn extend(&self, id: SandboxId, life: Duration) -> Result<(), ShardError> {
        self.find(id)?.extend_life(life).map(drop).ok_or(ShardError::NoSuchSandbox(id))
    }

    async fn logs(&self, id: SandboxId) -> Result<Vec<LogLine>, ShardError> {
        let gone = ShardError::NoSuchSandbox(id);
        let sandbox = self.find(id)?;
        sandbox.info().ok_or(gone)?;
        sandbox.logs(self.workshop.config.console_bytes).await
    }

    fn usages(&self, id: SandboxId, now: Option<Usage>) -> Result<Vec<Usage>, ShardError> {
        let sandbox = self.find(id)?;
        sandbox.info().ok_or(ShardError::NoSuchSandbox(id))?;
        Ok(sandbox.usages(now))
    }

    /// Asks the driver for an operation and waits for its answer.
    async fn ask<T>(
        &self,
        id: SandboxId,
        request: impl FnOnce(oneshot::Sender<Result<T, ShardError>>) -> Request,
    ) -> Result<T, ShardError> {
        let (sender, answer) = oneshot::channel();
        self.find(id)?.ask(request(sender));
        answer.await.unwrap_or(Err(ShardError::ShuttingDown))
    }

    async fn snapshot(
        &self,
        id: SandboxId,
        purpose: Purpose,
        keeps: Keeps,
    ) -> Result<Box<SnapshotInfo>, ShardError> {
        self.ask(id, |sender| Request::Snapshot(purpose, keeps, sender)).await
    }

    pub(crate) async fn resume(
        &self,
        id: SandboxId,
        wake: Wake,
    ) -> Result<(Box<SandboxInfo>, bool), ShardError> {
        let sandbox = self.find(id)?;
        if !sandbox.is_live() && self.live() >= self.share() {
            return Err(self.at_capacity());
        }
        self.ask(id, |sender| Request::Resume(wake, sender)).await
    }

    fn request_of(&self, id: SandboxId) -> Result<Box<CreateRequest>, ShardError> {
        let request = self.find(id)?.request();
        // Its seat stays its own.
        let request = request.map(|request| CreateRequest { seat: None, once: None, ..request });
        request.map(Box::new).ok_or(ShardError::NoSuchSandbox(id))
    }

    fn process_of(&self, id: SandboxId) -> Result<SandboxProcess, ShardError> {
        let held = self.find(id)?.process().ok_or(ShardError::NoSuchSandbox(id))?;
        let failed = |error: std::io::Error| ShardError::OperationFailed {
            operation: "showing the process",
            sandbox: id,
            reason: error.to_string(),
        };
        Ok(SandboxProcess {
            pid: held.process.pid().as_raw_nonzero().get().unsigned_abs(),
            memory_address: held.layout.memory_address,
            console: held.console.try_clone().map_err(failed)?,
        })
    }

    /// A way into a sandbox of this shard, for who may visit it.
    pub(crate) async fn connect(
        self: &Rc<Self>,
        id: SandboxId,
        port: GuestPort,
        visitor: &Visitor,
        kept: Option<Epoch>,
    ) -> Result<Entry, ConnectError> {
        let sandbox = self.find(id).map_err(|_| ConnectError::NoSuchSandbox(id))?;
        if !sandbox.admits(port, visitor) {
            return Err(ConnectError::NotAdmitted(id));
        }
        let held = self.process_for(&sandbox, visitor).await?;
        let (epoch, mask) = (sandbox.epoch(), sandbox.mask_of(port));
        if kept == Some(epoch) {
            return Ok(Entry { stream: None, epoch, mask });
        }
        let stream = sandbox::open_stream(&held.control).await.map_err(|error| {
            tracing::info!(%id, error = sandbox::chain(&error), "no stream into a sandbox");
            ConnectError::Busy
        })?;
        Ok(Entry { stream: Some(stream), epoch, mask })
    }

    async fn set_network(&self, id: SandboxId, policy: NetworkPolicy) -> Result<(), ShardError> {
        let sandbox = self.find(id)?;
        // The record of one that is paused is its snapshot's.
        if sandbox.info().is_some_and(|info| info.state == Lifecycle::Paused) {
            return Err(ShardError::IsPaused(id));
        }
        if sandbox.set_network(policy) {
            sandbox.kept().await
        } else {
            Err(ShardError::NoSuchSandbox(id))
        }
    }

    /// Counts a sandbox that came up.
    pub(crate) fn count_spawn(&self, template_id: &str, now: SystemTime) {
        let mut spawns = self.spawns.borrow_mut();
        if let Some(spawned) = spawns.get_mut(template_id) {
            *spawned = Spawned { count: spawned.count + 1, last: now };
        } else if spawns.len() < SPAWNS_MAX {
            spawns.insert(template_id.to_owned(), Spawned { count: 1, last: now });
        }
    }

    /// Every sandbox, also one that is being made or ended.
    pub(crate) fn all(&self) -> std::cell::Ref<'_, BTreeMap<SandboxId, Rc<Sandbox>>> {
        self.sandboxes.borrow()
    }

    fn counts(&self) -> Counts {
        Counts {
            pool: self.pool.counts(),
            shells: self.pool.waiting(),
            sandboxes: self.sandboxes.borrow().len(),
        }
    }

    /// Forgets a sandbox of which nothing is left.
    pub(crate) fn forget(&self, sandbox: &Sandbox) {
        self.sandboxes.borrow_mut().remove(&sandbox.id);
        sandbox.release_seat();
        self.show_load();
    }

    /// Sandboxes that may have a process here.
    fn share(&self) -> u32 {
        share(self.workshop.config.sandboxes_max, self.shards, self.id)
    }

    pub(crate) fn at_capacity(&self) -> ShardError {
        ShardError::AtCapacity { sandboxes_max: self.workshop.config.sandboxes_max }
    }

    /// Sandboxes that have a process.
    fn live(&self) -> u32 {
        let live = self.sandboxes.borrow().values().filter(|sandbox| sandbox.is_live()).count();
        u32::try_from(live).unwrap_or(u32::MAX)
    }

    pub(crate) fn show_load(&self) {
        let count = u32::try_from(self.sandboxes.borrow().len()).unwrap_or(u32::MAX);
        self.choice.show(self.id, count);
    }

    /// The sandbox that has waited longest with its process.
    pub(crate) fn longest_paused(&self) -> Option<(Rc<Sandbox>, Instant)> {
        let sandboxes = self.sandboxes.borrow();
        let waits = |sandbox: &Rc<Sandbox>| Some((Rc::clone(sandbox), sandbox.evictable_since()?));
        sandboxes.values().filter_map(waits).min_by_key(|(_, since)| *since)
    }

    /// From now on makes no sandbox.
    pub(crate) fn refuse_creates(&self) {
        self.draining.set(true);
    }

    /// Ends every sandbox that may not stay, and waits until nothing of them is left, for a bounded
    /// time. Then the pool.
    pub(crate) async fn drain(&self) {
        self.refuse_creates();
        let all: Vec<_> = self.sandboxes.borrow().values().cloned().collect();
        let ends: Vec<_> = all.iter().map(|sandbox| sandbox.gone()).collect();
        for sandbox in &all {
            sandbox.drain();
        }
        let gone = time::timeout(DRAIN_DEADLINE, async {
            for end in ends {
                // Dropped means gone as well.
                end.await.unwrap_or(());
            }
            self.pool.close().await;
        });
        if gone.await.is_err() {
            let left = self.sandboxes.borrow().len();
            tracing::error!(left, "VM processes are left; the next start will remove them");
        }
    }
}
