//! One sandbox, as its shard holds it.
//!
//! Called by `shard`, which finds sandboxes, and by the driver, which lives them. Refuses to be
//! reached from another core: it is reference counted without atomics.

mod asks;
mod capture;
mod driver;
mod image;
mod journal;
mod life;
mod link;
mod log;
mod memory;
mod paging;
mod prepare;
mod queue;
mod record;
mod ring_file;
mod rollback;
mod state;
mod word;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use mica_numa::rt::oneshot;
use mica_numa::rt::time::Instant;
use mica_units::{GuestPort, Mebibytes, SandboxId, TenantId, VcpuCount};

use crate::placement::Whereabouts;
use crate::shell::Held;
use crate::{
    CreateRequest, Epoch, Lifecycle, NEVER, NetworkPolicy, OnTimeout, SandboxInfo, ShardError,
    Visitor,
};

pub(crate) use asks::Request;
pub(crate) use capture::read_state;
pub(crate) use driver::{Start, drive};
pub(crate) use image::{Images, Opened};
use journal::Journal;
use life::from_now;
pub(crate) use link::{Events, GatewayError, greet, open_stream, send, tell_agent};
pub(crate) use memory::Memory;
pub(crate) use prepare::{Origin, Workshop};
use queue::Queue;
pub(crate) use record::{Record, RecordedProcess, RecordedState};
pub(crate) use ring_file::RingFile;
pub(crate) use state::Cause;
use state::{Event, State};
pub(crate) use word::STATES;

/// Who made a sandbox waits for this.
pub(crate) type Made = Result<Box<SandboxInfo>, ShardError>;

/// Who wakes a sandbox waits for this.
pub(crate) type Woken = Result<(), ShardError>;

/// What a sandbox keeps from its create to its end.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// What was asked for.
    pub(crate) request: CreateRequest,
    /// Whether it is made as one of several copies, which start from a snapshot that nobody else may.
    pub(crate) of_copies: bool,
    /// What requests to its agent carry.
    pub(crate) access_token: Option<String>,
    /// What requests to its other ports carry. There is one also while they are public.
    pub(crate) traffic_token: Option<String>,
    /// Its `/etc/machine-id`.
    pub(crate) machine_id: String,
}

/// One sandbox.
#[derive(Debug)]
pub(crate) struct Sandbox {
    /// Its name.
    pub(crate) id: SandboxId,
    identity: Identity,
    state: RefCell<State>,
    /// What its driver has not seen yet.
    queue: Queue,
    /// While clients may know it: what they see of it.
    info: RefCell<Option<SandboxInfo>>,
    /// While it has a process.
    held: RefCell<Option<Rc<Held>>>,
    /// When its time is over.
    deadline: Cell<Instant>,
    /// How long it was given last.
    life: Cell<Duration>,
    /// When its record last followed a request that put its end off.
    put_off_at: Cell<Option<Instant>>,
    /// What happens then: what was asked for at first, until a resume asks for something else.
    on_timeout: Cell<OnTimeout>,
    /// Who may reach it: what was asked for at first, until something else is.
    network: RefCell<NetworkPolicy>,
    /// Since when it is paused.
    paused_at: Cell<Option<Instant>>,
    /// What of it is where, as far as somebody looked.
    whereabouts: RefCell<Whereabouts>,
    /// What happened to it, and what it used.
    journal: RefCell<Journal>,
    /// How often it stopped taking streams: those from before are not good any more.
    epoch: Cell<Epoch>,
    /// Requests that wait for a resume that one of them began.
    waking: RefCell<Option<Vec<oneshot::Sender<Woken>>>>,
    maker: RefCell<Option<oneshot::Sender<Made>>>,
    /// Who waits for it to run, or not to.
    watchers: RefCell<Vec<oneshot::Sender<()>>>,
    mourners: RefCell<Vec<oneshot::Sender<()>>>,
}

impl Sandbox {
    /// A sandbox of which there is nothing yet.
    pub(crate) fn new(
        id: SandboxId,
        identity: Identity,
        maker: Option<oneshot::Sender<Made>>,
    ) -> Self {
        let state =
            if maker.is_some() { State::Starting(state::Birth::Create) } else { State::Adopting };
        let life = identity.request.timeout;
        Self {
            id,
            on_timeout: Cell::new(identity.request.on_timeout),
            network: RefCell::new(identity.request.network.clone()),
            identity,
            state: RefCell::new(state),
            queue: Queue::default(),
            info: RefCell::new(None),
            held: RefCell::new(None),
            deadline: Cell::new(from_now(NEVER).0),
            life: Cell::new(life),
            put_off_at: Cell::new(None),
            whereabouts: RefCell::default(),
            journal: RefCell::default(),
            epoch: Cell::default(),
            waking: RefCell::new(None),
            paused_at: Cell::new(None),
            maker: RefCell::new(maker),
            watchers: RefCell::new(Vec::new()),
            mourners: RefCell::new(Vec::new()),
        }
    }

    /// What others see of it; nothing before it first runs and after it ended.
    pub(crate) fn info(&self) -> Option<SandboxInfo> {
        self.info.borrow().clone()
    }

    /// What it was asked for with, while it runs.
    pub(crate) fn request(&self) -> Option<CreateRequest> {
        let request = || CreateRequest {
            on_timeout: self.on_timeout.get(),
            network: self.network.borrow().clone(),
            ..self.identity.request.clone()
        };
        self.info.borrow().as_ref().map(|_| request())
    }

    /// Whose it is.
    pub(crate) fn tenant(&self) -> &TenantId {
        &self.identity.request.tenant
    }

    /// What it may be made from.
    pub(crate) fn origin(&self) -> Origin {
        Origin {
            tenant: self.tenant().clone(),
            of_copies: self.identity.of_copies,
            of_built: self.identity.request.defaults.is_some(),
        }
    }

    /// Counts no more: nothing of it is left.
    pub(crate) fn release_seat(&self) {
        if let Some(seat) = &self.identity.request.seat {
            seat.release();
        }
    }

    /// Whether this visitor may have a stream to this port.
    pub(crate) fn admits(&self, port: GuestPort, visitor: &Visitor) -> bool {
        if self.network.borrow().allow_public_traffic || port == GuestPort::ENVD {
            return true;
        }
        match (visitor, &self.identity.traffic_token) {
            (Visitor::Host, _) => true,
            (Visitor::Client(Some(shown)), Some(token)) => same_secret(shown, token),
            (Visitor::Client(_), _) => false,
        }
    }

    /// What its servers see as `Host`, if that is not what clients wrote.
    pub(crate) fn mask_of(&self, port: GuestPort) -> Option<String> {
        let network = self.network.borrow();
        let mask = network.mask_request_host.as_ref().filter(|_| port != GuestPort::ENVD)?;
        Some(mask.replace("${PORT}", &port.to_string()))
    }

    /// Waits until a daemon after this one would find it as it is.
    pub(crate) async fn kept(&self) -> Result<(), ShardError> {
        match self.queue.nudge_to_keep().await {
            Some(true) => Ok(()),
            Some(false) => {
                let reason = "it holds, but could not be written down for a daemon after this one";
                let (operation, reason) = ("a change", reason.to_owned());
                Err(ShardError::OperationFailed { operation, sandbox: self.id, reason })
            }
            None => Err(ShardError::NoSuchSandbox(self.id)),
        }
    }

    /// Replaces what its network is, if it is there.
    pub(crate) fn set_network(&self, policy: NetworkPolicy) -> bool {
        let mut info = self.info.borrow_mut();
        let Some(info) = info.as_mut() else { return false };
        info.network.clone_from(&policy);
        info.traffic_token = token_of(&self.identity, &policy);
        *self.network.borrow_mut() = policy;
        true
    }

    /// The way to its guest, while clients may use it.
    pub(crate) fn process(&self) -> Option<Rc<Held>> {
        self.info.borrow().as_ref()?;
        if self.state.borrow().takes_streams() { self.held.borrow().clone() } else { None }
    }

    /// The epoch of the streams that it takes now.
    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch.get()
    }

    /// Tells what depends on the state that it has changed.
    fn state_changed(&self) {
        if !self.state.borrow().takes_streams() {
            self.epoch.set(self.epoch.get().next());
        }
        self.tell_watchers();
    }

    /// Its process, while it has one.
    pub(crate) fn held(&self) -> Option<Rc<Held>> {
        self.held.borrow().clone()
    }

    /// What was seen of where it is.
    pub(crate) fn whereabouts(&self) -> std::cell::RefMut<'_, Whereabouts> {
        self.whereabouts.borrow_mut()
    }

    /// Its process, whatever it is doing, if it has one.
    pub(crate) fn pid(&self) -> Option<u32> {
        let held = self.held.borrow();
        Some(held.as_ref()?.process.pid().as_raw_nonzero().get().unsigned_abs())
    }

    /// What it is doing, in a word of [`STATES`].
    pub(crate) fn state_name(&self) -> &'static str {
        self.state.borrow().name()
    }

    /// Resolves when it is neither on its way to running nor away from it.
    pub(crate) async fn settled(&self) {
        while self.state.borrow().is_in_transition() {
            self.changed().await;
        }
    }

    /// Resolves when what it starts from is not looked for any more.
    pub(crate) async fn started_or_ended(&self) {
        while matches!(*self.state.borrow(), State::Starting(_)) {
            self.changed().await;
        }
    }

    /// Those that wait for it to be woken, while somebody does that.
    pub(crate) fn waking_mut(&self) -> std::cell::RefMut<'_, Option<Vec<oneshot::Sender<Woken>>>> {
        self.waking.borrow_mut()
    }

    /// Resolves when its state has changed.
    pub(crate) async fn changed(&self) {
        let (sender, changed) = oneshot::channel();
        self.watchers.borrow_mut().push(sender);
        changed.await;
    }

    /// Tells those that wait for a change of state.
    fn tell_watchers(&self) {
        for watcher in std::mem::take(&mut *self.watchers.borrow_mut()) {
            if watcher.send(()).is_err() {
                tracing::trace!(id = %self.id, "nobody waits for this change any more");
            }
        }
    }

    /// Whether clients may know it.
    pub(crate) fn is_shown(&self) -> bool {
        self.info.borrow().is_some()
    }

    /// Whether its end has been decided.
    pub(crate) fn is_ending(&self) -> bool {
        self.state.borrow().is_ending()
    }

    /// Whether it has a process, or is about to.
    pub(crate) fn is_live(&self) -> bool {
        !matches!(*self.state.borrow(), State::Paused(state::Process::None))
    }

    /// Since when it waits frozen in its process, so that its memory could be had.
    pub(crate) fn evictable_since(&self) -> Option<Instant> {
        let frozen = matches!(*self.state.borrow(), State::Paused(state::Process::Frozen));
        self.paused_at.get().filter(|_| frozen)
    }

    /// Ends it as one whose process is lost.
    pub(crate) fn lose(&self, how: &'static str) {
        self.queue.push(Event::VmLost(how));
    }

    /// Asks it to give its process up.
    pub(crate) fn evict(&self) {
        self.queue.push(Event::Evict);
    }

    /// Asks for an operation; answers at once when too many wait.
    pub(crate) fn ask(&self, request: Request) {
        if let Err(request) = self.queue.ask(request) {
            request.fail(ShardError::Busy);
        }
    }

    /// Asks for its end.
    pub(crate) fn kill(&self) {
        self.queue.push(Event::Kill);
    }

    /// Asks for its end because the daemon stops.
    pub(crate) fn drain(&self) {
        self.queue.push(Event::Drain);
    }

    /// Resolves when nothing of it is left.
    pub(crate) fn gone(&self) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        self.mourners.borrow_mut().push(sender);
        receiver
    }

    fn show_size(&self, vcpus: VcpuCount, memory: Mebibytes) {
        if let Some(info) = self.info.borrow_mut().as_mut() {
            (info.vcpus, info.memory) = (vcpus, memory);
        }
    }

    fn show(&self, state: Lifecycle, disk_alone: bool) {
        if let Some(info) = self.info.borrow_mut().as_mut() {
            (info.state, info.disk_alone) = (state, disk_alone);
        }
    }
}

/// The traffic token, where clients need it.
fn token_of(identity: &Identity, policy: &NetworkPolicy) -> Option<String> {
    identity.traffic_token.clone().filter(|_| !policy.allow_public_traffic)
}

/// Compares without telling by its time where they differ. Lengths are no secret.
fn same_secret(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |sum, (a, b)| sum | (a ^ b)) == 0
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
