//! The sandboxes of one shard.
//!
//! Called by `host` for requests of its own thread, and by `run` for those of other shards. Refuses
//! more sandboxes than its share, and any of another shard.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use mica_numa::rt::time::{self, Instant};
use mica_numa::rt::{self, oneshot};
use mica_units::{PerShard, SandboxId, ShardCount, ShardId};

use crate::event::{Operation, Reply, Spawned};
use crate::sandbox::{self, Made, Sandbox, Workshop};
use crate::uids::Uids;
use crate::{ConnectError, CreateRequest, SandboxInfo, ShardError};

/// Bytes of an access token, before they become hexadecimal.
const TOKEN_BYTES: usize = 32;

/// Templates that spawns are counted for. Only as many as were made from since the start matter.
const SPAWNS_MAX: usize = 4096;

/// How long all sandboxes together may take to go when the daemon stops.
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// How many sandboxes each shard has. A hint to spread creates by, read and written without order;
/// what counts is the owner's own admission.
pub(crate) type Loads = Arc<PerShard<AtomicU32>>;

/// One shard.
#[derive(Debug)]
pub(crate) struct Shard {
    /// Which.
    pub(crate) id: ShardId,
    /// Of how many.
    pub(crate) shards: ShardCount,
    /// What sandboxes are made of.
    pub(crate) workshop: Workshop,
    /// How many sandboxes every shard has.
    pub(crate) loads: Loads,
    sandboxes: RefCell<BTreeMap<SandboxId, Rc<Sandbox>>>,
    uids: RefCell<Uids>,
    spawns: RefCell<BTreeMap<String, Spawned>>,
    draining: Cell<bool>,
}

impl Shard {
    /// A shard without sandboxes.
    pub(crate) fn new(id: ShardId, shards: ShardCount, workshop: Workshop, loads: Loads) -> Self {
        let (first, total) = (workshop.config.uid_first, workshop.config.sandboxes_max);
        Self {
            id,
            shards,
            workshop,
            loads,
            sandboxes: RefCell::default(),
            uids: RefCell::new(Uids::share(first, total, id, shards)),
            spawns: RefCell::default(),
            draining: Cell::new(false),
        }
    }

    /// Does what is asked.
    pub(crate) async fn perform(self: Rc<Self>, operation: Operation) -> Reply {
        match operation {
            Operation::Create(id, request) => Reply::Sandbox(self.create(id, *request).await),
            Operation::Get(id) => Reply::Sandbox(self.get(id)),
            Operation::List => Reply::Sandboxes(self.list()),
            Operation::Kill(id) => Reply::Done(self.kill(id).await),
            Operation::SetTimeout(id, life) => Reply::Done(self.set_timeout(id, life)),
            Operation::Extend(id, life) => Reply::Sandbox(self.extend(id, life)),
            Operation::Connect(id) => Reply::Stream(self.connect(id).await),
            Operation::Spawns => Reply::Spawns(self.spawns.borrow().clone()),
        }
    }

    async fn create(self: &Rc<Self>, id: SandboxId, request: CreateRequest) -> Made {
        debug_assert_eq!(id.shard(self.shards), self.id, "sent to the wrong shard");
        if self.draining.get() {
            return Err(ShardError::ShuttingDown);
        }
        let access_token = request.secure.then(draw_token).transpose()?;
        let sandboxes_max = self.workshop.config.sandboxes_max;
        let uid = self.uids.borrow_mut().take().ok_or(ShardError::AtCapacity { sandboxes_max })?;
        let (maker, made) = oneshot::channel();
        let deadline = Instant::now() + self.workshop.config.boot_deadline;
        let sandbox = Sandbox::new(id, uid, request, access_token, deadline, maker);
        let sandbox = Rc::new(sandbox);
        self.sandboxes.borrow_mut().insert(id, Rc::clone(&sandbox));
        self.show_load();
        rt::spawn(sandbox::drive(Rc::clone(self), sandbox)).detach();
        made.await.unwrap_or(Err(ShardError::ShuttingDown))
    }

    fn get(&self, id: SandboxId) -> Made {
        let sandboxes = self.sandboxes.borrow();
        let info = sandboxes.get(&id).and_then(|sandbox| sandbox.info());
        info.map(Box::new).ok_or(ShardError::NoSuchSandbox(id))
    }

    fn list(&self) -> Vec<SandboxInfo> {
        self.sandboxes.borrow().values().filter_map(|sandbox| sandbox.info()).collect()
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

    fn set_timeout(&self, id: SandboxId, life: Duration) -> Result<(), ShardError> {
        let sandboxes = self.sandboxes.borrow();
        let set = sandboxes.get(&id).is_some_and(|sandbox| sandbox.set_life(life));
        if set { Ok(()) } else { Err(ShardError::NoSuchSandbox(id)) }
    }

    fn extend(&self, id: SandboxId, life: Duration) -> Made {
        let sandboxes = self.sandboxes.borrow();
        let info = sandboxes.get(&id).and_then(|sandbox| sandbox.extend_life(life));
        info.map(Box::new).ok_or(ShardError::NoSuchSandbox(id))
    }

    async fn connect(&self, id: SandboxId) -> Result<OwnedFd, ConnectError> {
        let control = self.sandboxes.borrow().get(&id).and_then(|sandbox| sandbox.control());
        let control = control.ok_or(ConnectError::NoSuchSandbox(id))?;
        sandbox::open_stream(&control).await.map_err(|error| {
            tracing::info!(%id, error = sandbox::chain(&error), "no stream into a sandbox");
            ConnectError::Busy
        })
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

    /// Forgets a sandbox of which nothing is left. Its uid goes back if nothing can run under it.
    pub(crate) fn forget(&self, sandbox: &Sandbox, safe_uid: bool) {
        self.sandboxes.borrow_mut().remove(&sandbox.id);
        if safe_uid {
            self.uids.borrow_mut().give_back(sandbox.uid);
        } else {
            tracing::error!(uid = sandbox.uid, "this uid is not used again until the next start");
        }
        self.show_load();
    }

    fn show_load(&self) {
        let count = u32::try_from(self.sandboxes.borrow().len()).unwrap_or(u32::MAX);
        self.loads[self.id].store(count, Ordering::Relaxed);
    }

    /// From now on makes no sandbox.
    pub(crate) fn refuse_creates(&self) {
        self.draining.set(true);
    }

    /// Ends every sandbox and waits until nothing of them is left, for a bounded time.
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
        });
        if gone.await.is_err() {
            let left = self.sandboxes.borrow().len();
            tracing::error!(left, "sandboxes are left; the next start will remove them");
        }
    }
}

fn draw_token() -> Result<String, ShardError> {
    let mut bytes = [0u8; TOKEN_BYTES];
    random(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Fills `bytes` from the kernel's generator.
pub(crate) fn random(bytes: &mut [u8]) -> Result<(), ShardError> {
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(length) => filled += length,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                let reason = format!("the kernel gives no random bytes: {errno}");
                return Err(ShardError::BootFailed { reason, console_tail: String::new() });
            }
        }
    }
    Ok(())
}
