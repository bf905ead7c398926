//! The one handle that callers hold: routes each request to the shard that owns its sandbox.
//!
//! Called by `http` on every shard. Refuses to hold any sandbox itself.

mod bench;
mod builds;
mod copies;
mod creates;
mod memos;
mod operations;

pub use builds::defaults_for_agent;
pub use copies::CLONES_MAX;
pub use creates::OneCreate;
pub use memos::{Doing, Once};
pub(crate) use operations::snapshot_info;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use mica_numa::StopSignal;
use mica_numa::mailbox::{Lookout, Returned};
use mica_numa::rt::net::UnixStream;
use mica_numa::rt::{self, oneshot, time};
use mica_units::{GuestPort, PerShard, SANDBOX_ID_CHARS, SandboxId, ShardCount, ShardId, TenantId};
use mica_wire::guest::Preamble;

use crate::event::{Address, Answer, Entry, OUTSTANDING_MAX, Operation, Reply, Request};
use crate::metrics;
use crate::random::random;
use crate::sandbox::{GatewayError, greet};
use crate::shard::Shard;
use crate::{ConnectError, GuestStream, NetworkPolicy, SandboxInfo, ShardError, Visitor};

/// How long a guest's gateway may take to answer a preamble.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Ids drawn for each shard of the host until one hashes to the shard wanted. That none does has a
/// chance of e^-64.
const DRAWS_PER_SHARD: u32 = 64;

/// How long a shard stays awake for an answer that the other has at hand: about what it takes to wake that
/// one and to hear from it. Going to sleep, being rung for and waking would take longer.
const WATCH_FOR_ANSWER: Duration = Duration::from_micros(50);

/// Tries to tell a busy shard that a client is gone, and the time between them.
const CANCEL_TRIES: u32 = 50;
const CANCEL_RETRY: Duration = Duration::from_millis(100);

/// The host, as seen from one shard. Cheap to clone, and bound to its thread.
#[derive(Clone)]
pub struct Host(Rc<Inner>);

struct Inner {
    shard: Rc<Shard>,
    addresses: PerShard<Address>,
    /// Of the mailbox for answers.
    lookout: Lookout<Answer>,
    waiting: RefCell<HashMap<u64, oneshot::Sender<Reply>>>,
    next_ticket: Cell<u64>,
    stop: StopSignal,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("shard", &self.0.shard.id).finish_non_exhaustive()
    }
}

impl Host {
    pub(crate) fn new(
        shard: Rc<Shard>,
        addresses: PerShard<Address>,
        lookout: Lookout<Answer>,
        stop: &StopSignal,
    ) -> Self {
        let (waiting, next_ticket) = (RefCell::default(), Cell::new(0));
        let stop = stop.clone();
        Self(Rc::new(Inner { shard, addresses, lookout, waiting, next_ticket, stop }))
    }

    /// Whether the host was asked to stop: what fails from then on, most likely fails for that.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.0.stop.is_stopped()
    }

    /// The shard this handle is on.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        self.0.shard.id
    }

    /// How many there are.
    #[must_use]
    pub fn shard_count(&self) -> ShardCount {
        self.0.shard.shards
    }

    /// Sandboxes of all shards, as they show them: no shard is asked.
    #[must_use]
    pub fn sandboxes_shown(&self) -> u32 {
        let shown = self.0.shard.choice.loads().iter().map(|(_, load)| load.sandboxes());
        shown.fold(0, u32::saturating_add)
    }

    /// Whose a sandbox is, also one that is being made or ended.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn tenant_of(&self, id: SandboxId) -> Result<TenantId, ShardError> {
        match self.ask(self.owner(id), Operation::TenantOf(id)).await? {
            Reply::Tenant(result) => result,
            other => Err(out_of_form(&other)),
        }
    }

    /// A running sandbox.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn get(&self, id: SandboxId) -> Result<SandboxInfo, ShardError> {
        self.ask_sandbox(id, Operation::Get(id)).await
    }

    /// Every running sandbox of all shards, ordered by start, then id.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn list(&self) -> Result<Vec<SandboxInfo>, ShardError> {
        let mut all = Vec::new();
        for reply in self.ask_all(|| Operation::List).await? {
            match reply {
                Reply::Sandboxes(some) => all.extend(some),
                other => return Err(out_of_form(&other)),
            }
        }
        all.sort_by_key(|info| (info.started_at, info.id));
        Ok(all)
    }

    /// Kills a sandbox, also one that is still being made, and waits until nothing of it is left.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn kill(&self, id: SandboxId) -> Result<(), ShardError> {
        self.ask_done(id, Operation::Kill(id)).await
    }

    /// Sets a sandbox's remaining life, counted from now.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn set_timeout(&self, id: SandboxId, life: Duration) -> Result<(), ShardError> {
        self.ask_done(id, Operation::SetTimeout(id, life)).await
    }

    /// Replaces who may reach a sandbox, and whom it may reach.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn set_network(
        &self,
        id: SandboxId,
        policy: NetworkPolicy,
    ) -> Result<(), ShardError> {
        self.ask_done(id, Operation::SetNetwork(id, Box::new(policy))).await
    }

    /// A stream to a TCP port of a guest, for the host's own use. May be dropped at any await.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(
        &self,
        id: SandboxId,
        port: GuestPort,
    ) -> Result<GuestStream, ConnectError> {
        self.visit(id, port, Visitor::Host).await
    }

    /// The same for whoever it is for.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn visit(
        &self,
        id: SandboxId,
        port: GuestPort,
        visitor: Visitor,
    ) -> Result<GuestStream, ConnectError> {
        self.visit_again(id, port, visitor, None).await
    }

    /// The same for one who has a stream to that port from an earlier visit, if it is still good: then it
    /// comes back, with what is to be seen now. Who may not visit any more is refused, and the stream
    /// closed.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn visit_again(
        &self,
        id: SandboxId,
        port: GuestPort,
        visitor: Visitor,
        kept: Option<GuestStream>,
    ) -> Result<GuestStream, ConnectError> {
        let held = kept.as_ref().map(|kept| kept.epoch);
        let owner = self.owner(id);
        // Four times, if one counts: to the VM process, to the guest, and back.
        self.0.shard.awake.handed_over();
        let asked = if owner == self.shard() {
            // Past what takes the room of every operation: of all that is asked this is asked most.
            Ok(Reply::Stream(self.0.shard.connect(id, port, &visitor, held).await))
        } else {
            let pending = self.send(owner, Operation::Connect(id, port, visitor, held));
            match pending {
                Ok(pending) => pending.reply().await,
                Err(error) => Err(error),
            }
        };
        let Entry { stream, mask, epoch } = match asked {
            Ok(Reply::Stream(result)) => result?,
            Ok(other) => {
                tracing::error!(?other, "a shard answered out of form");
                return Err(ConnectError::Unreachable);
            }
            Err(ShardError::Busy) => return Err(ConnectError::Busy),
            Err(_) => return Err(ConnectError::NoSuchSandbox(id)),
        };
        let stream = match (stream, kept) {
            (Some(stream), _) => stream,
            (None, Some(kept)) => return Ok(GuestStream { mask, kept: true, ..kept }),
            (None, None) => {
                tracing::error!(%id, "a shard gave no stream");
                return Err(ConnectError::Unreachable);
            }
        };
        let mut stream = UnixStream::from_fd(stream);
        let greeted = greet(&mut stream, Preamble::Tcp(port));
        match time::timeout(CONNECT_DEADLINE, greeted).await {
            Ok(Ok(())) => Ok(GuestStream { stream, mask, epoch, kept: false }),
            Ok(Err(GatewayError::Refused)) => Err(ConnectError::PortNotOpen(port)),
            Ok(Err(GatewayError::Broken)) | Err(time::Elapsed) => Err(ConnectError::Unreachable),
        }
    }

    /// Ends a sandbox that nobody wants any more, or never did.
    async fn end_unwanted(&self, id: SandboxId) {
        for _ in 0..CANCEL_TRIES {
            match self.kill(id).await {
                Err(ShardError::Busy) => time::sleep(CANCEL_RETRY).await,
                // Not there any more, or never was.
                _ => return,
            }
        }
        tracing::warn!(%id, "an unwanted sandbox lives until its time is over");
    }

    /// Hands an answer to who waits for it. One that nobody waits for any more is dropped, and
    /// closes what it carries.
    pub(crate) fn answered(&self, answer: Answer) {
        let waiter = self.0.waiting.borrow_mut().remove(&answer.ticket);
        if let Some(Err(unwanted)) = waiter.map(|waiter| waiter.send(answer.reply)) {
            drop(unwanted);
        }
    }

    /// The shard this handle is on, itself.
    pub(crate) fn local(&self) -> &Rc<Shard> {
        &self.0.shard
    }

    fn owner(&self, id: SandboxId) -> ShardId {
        id.shard(self.0.shard.shards)
    }

    async fn ask_done(&self, id: SandboxId, operation: Operation) -> Result<(), ShardError> {
        match self.ask(self.owner(id), operation).await? {
            Reply::Done(result) => result,
            other => Err(out_of_form(&other)),
        }
    }

    async fn ask_sandbox(
        &self,
        id: SandboxId,
        operation: Operation,
    ) -> Result<SandboxInfo, ShardError> {
        match self.ask(self.owner(id), operation).await? {
            Reply::Sandbox(result) => result.map(|info| *info),
            other => Err(out_of_form(&other)),
        }
    }

    /// Asks every shard at once, and waits for all.
    pub(crate) async fn ask_all(
        &self,
        operation: impl Fn() -> Operation,
    ) -> Result<Vec<Reply>, ShardError> {
        let mut asked = Vec::new();
        for (shard, _) in self.0.addresses.iter() {
            if shard != self.shard() {
                asked.push(self.send(shard, operation())?);
            }
        }
        let mut replies = vec![Rc::clone(&self.0.shard).perform(operation()).await];
        for pending in asked {
            replies.push(pending.reply().await?);
        }
        Ok(replies)
    }

    pub(crate) async fn ask(
        &self,
        shard: ShardId,
        operation: Operation,
    ) -> Result<Reply, ShardError> {
        if shard == self.shard() {
            // In a box, with the room of the largest operation: callers would have it many times over.
            return Ok(Box::pin(Rc::clone(&self.0.shard).perform(operation)).await);
        }
        self.send(shard, operation)?.reply().await
    }

    fn send(&self, shard: ShardId, operation: Operation) -> Result<Pending<'_>, ShardError> {
        let mut waiting = self.0.waiting.borrow_mut();
        if waiting.len() >= OUTSTANDING_MAX {
            return Err(ShardError::Busy);
        }
        let ticket = self.0.next_ticket.get();
        let at_hand = operation.is_at_hand();
        let request = Request { from: self.shard(), ticket, operation };
        let metrics = &self.0.shard.metrics;
        self.0.addresses[shard].requests.send(request).map_err(|returned| match returned {
            Returned::Full(_) => {
                metrics::add(&metrics.full[shard], 1);
                ShardError::Busy
            }
            Returned::Closed(_) => ShardError::ShuttingDown,
        })?;
        metrics::add(&metrics.sent[shard], 1);
        self.0.next_ticket.set(ticket.wrapping_add(1));
        let (sender, receiver) = oneshot::channel();
        waiting.insert(ticket, sender);
        Ok(Pending { receiver, host: self, ticket, at_hand })
    }

    fn draw_id(&self, shard: ShardId) -> Result<SandboxId, ShardError> {
        for _ in 0..DRAWS_PER_SHARD * u32::from(self.0.shard.shards.get()) {
            let mut bytes = [0u8; SANDBOX_ID_CHARS];
            random(&mut bytes)?;
            let id = SandboxId::from_random(bytes);
            if self.owner(id) == shard {
                return Ok(id);
            }
        }
        Err(ShardError::Busy)
    }
}

/// A request on its way. Dropped, it does not count as outstanding only when its answer has come:
/// until then the answer still needs its room.
struct Pending<'h> {
    receiver: oneshot::Receiver<Reply>,
    host: &'h Host,
    ticket: u64,
    /// Whether the other shard has the answer at hand.
    at_hand: bool,
}

impl Pending<'_> {
    async fn reply(self) -> Result<Reply, ShardError> {
        if self.at_hand {
            self.host.0.shard.awake.handed_over();
            let take = |answer| self.host.answered(answer);
            let over = || self.receiver.is_over();
            self.host.0.lookout.watch(WATCH_FOR_ANSWER, take, over).await;
        }
        let reply = self.receiver.await;
        if reply.is_none() {
            self.host.0.waiting.borrow_mut().remove(&self.ticket);
        }
        reply.ok_or(ShardError::ShuttingDown)
    }
}

/// Ends a sandbox that is being made when who wants it goes away.
struct CancelOnDrop<'h> {
    host: &'h Host,
    id: SandboxId,
    armed: Cell<bool>,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        if !self.armed.get() {
            return;
        }
        let (host, id) = (self.host.clone(), self.id);
        rt::spawn(async move { host.end_unwanted(id).await }).detach();
    }
}

pub(crate) fn out_of_form(reply: &Reply) -> ShardError {
    tracing::error!(?reply, "a shard answered out of form");
    ShardError::Busy
}
