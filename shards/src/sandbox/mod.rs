//! One sandbox, as its shard holds it.
//!
//! Called by `shard`, which finds sandboxes, and by the driver, which lives them. Refuses to be
//! reached from another core: it is reference counted without atomics.

mod driver;
mod link;
mod prepare;
mod queue;
mod state;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use mica_numa::rt::oneshot;
use mica_numa::rt::time::Instant;
use mica_units::SandboxId;
use mica_wire::vm::ControlSocket;

use crate::{CreateRequest, SandboxInfo, ShardError};

pub(crate) use driver::drive;
pub(crate) use link::{GatewayError, greet, open_stream};
pub(crate) use prepare::{Workshop, chain, check_program};
use queue::Queue;
use state::{Event, State};

/// Who made a sandbox waits for this.
pub(crate) type Made = Result<Box<SandboxInfo>, ShardError>;

/// One sandbox.
#[derive(Debug)]
pub(crate) struct Sandbox {
    /// Its name.
    pub(crate) id: SandboxId,
    /// The uid of its process.
    pub(crate) uid: u32,
    request: CreateRequest,
    access_token: Option<String>,
    state: RefCell<State>,
    /// Whether its end has been decided, for the blocking thread that is to make it.
    unwanted: Arc<AtomicBool>,
    /// What its driver has not seen yet.
    queue: Queue,
    /// While it runs: what others see of it.
    info: RefCell<Option<SandboxInfo>>,
    /// While its process lives.
    control: RefCell<Option<Rc<ControlSocket>>>,
    /// When its time is over: of its boot, then of its life.
    deadline: Cell<Instant>,
    maker: RefCell<Option<oneshot::Sender<Made>>>,
    mourners: RefCell<Vec<oneshot::Sender<()>>>,
}

impl Sandbox {
    /// A sandbox of which there is nothing yet but its uid.
    pub(crate) fn new(
        id: SandboxId,
        uid: u32,
        request: CreateRequest,
        access_token: Option<String>,
        deadline: Instant,
        maker: oneshot::Sender<Made>,
    ) -> Self {
        Self {
            id,
            uid,
            request,
            access_token,
            state: RefCell::new(State::Starting),
            unwanted: Arc::default(),
            queue: Queue::default(),
            info: RefCell::new(None),
            control: RefCell::new(None),
            deadline: Cell::new(deadline),
            maker: RefCell::new(Some(maker)),
            mourners: RefCell::new(Vec::new()),
        }
    }

    /// What others see of it; nothing before it runs and after it ended.
    pub(crate) fn info(&self) -> Option<SandboxInfo> {
        self.info.borrow().clone()
    }

    /// The way to its guest, while it runs.
    pub(crate) fn control(&self) -> Option<Rc<ControlSocket>> {
        self.info.borrow().as_ref()?;
        self.control.borrow().clone()
    }

    /// Whether its end has been decided.
    pub(crate) fn is_ending(&self) -> bool {
        self.state.borrow().is_ending()
    }

    /// Sets its remaining time, if it runs.
    pub(crate) fn set_life(&self, life: Duration) -> bool {
        let mut info = self.info.borrow_mut();
        let Some(info) = info.as_mut() else { return false };
        let (deadline, end_at) = from_now(life);
        info.end_at = end_at;
        self.deadline.set(deadline);
        self.queue.nudge();
        true
    }

    /// Makes its remaining time at least `life`, if it runs. What others see of it then.
    pub(crate) fn extend_life(&self, life: Duration) -> Option<SandboxInfo> {
        if from_now(life).0 > self.deadline.get() {
            self.set_life(life);
        }
        self.info()
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
}

/// Longest life that is counted: 100 years. Keeps both clocks from overflowing.
const LIFE_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// A moment from now on, on both clocks.
fn from_now(life: Duration) -> (Instant, std::time::SystemTime) {
    let life = life.min(LIFE_MAX);
    (Instant::now() + life, std::time::SystemTime::now() + life)
}
