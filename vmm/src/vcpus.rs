//! The vCPU threads: each carries out the orders of the control thread on its own vCPU.
//!
//! Called by `control`, `freeze` and `restore`. Saving and restoring happen on the vCPUs' own threads, all
//! at once. Refuses to wait for a thread longer than [`PATIENCE`].
//!
//! ```text
//!            ┌──────────────── waits for orders ◀───────────────┐
//!            │    │                                             │
//!            │    └─ EnterAt, Save, Restore, Thaw ─▶ Answer ────┤
//!            ▼ Run                                              │
//!      guest code ── kicked: Probe ─▶ says whether it is halted for good, goes on
//!            │                                                  │
//!            └────── kicked: Leave ─▶ Answer ───────────────────┘    Stop ends the thread, from anywhere
//! ```
//! With in-kernel interrupt chips a `hlt` never leaves KVM, so a guest that has halted for good looks
//! like an idle one. It is found by asking: when no vCPU used any processor time for a while, all are
//! kicked out once, and each says whether anything could still wake it.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mica_units::Gpa;
use mica_wire::vm::Ending;

use crate::bus::Bus;
use crate::jail::seccomp::{self, SeccompError, ThreadKind};
use crate::kvm::{self, Cpuid, Kick, KickError, KvmError, Parked, Pause, RestoreError, Tsc, Vcpu};
use crate::notices::Notices;
use crate::state::VcpuState;

/// Longest time that an order may take. KVM answers within microseconds; a host that does not get
/// round to it within this is beyond help.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Why the threads do not run, or did not do what they were told.
#[derive(Debug, thiserror::Error)]
pub enum ThreadError {
    /// A thread could not be started.
    #[error("starting the {name} thread failed")]
    Spawn {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A thread ended before it was ready.
    #[error("a thread ended before it was ready")]
    Lost,
    /// Its filter was refused.
    #[error("closing the jail of a thread failed")]
    Seccomp(#[from] SeccompError),
    /// Kicks do not work.
    #[error("vCPU threads cannot be reached")]
    Kick(#[from] KickError),
    /// A vCPU did not answer.
    #[error("a vCPU thread did not answer in time")]
    Late,
    /// KVM refused what an order asked for.
    #[error("a vCPU could not do what it was told")]
    Kvm(#[from] KvmError),
    /// A saved vCPU does not fit.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// An answer to something else: a mistake of ours.
    #[error("a vCPU thread answered something else than it was asked")]
    Answer,
}

/// What a vCPU thread is told to do.
#[derive(Debug)]
enum Order {
    /// Start at this 64-bit code.
    EnterAt(Gpa),
    /// Run guest code. Not answered.
    Run,
    /// Leave the guest.
    Leave,
    /// Say everything there is to know about the vCPU.
    Save,
    /// Become another vCPU.
    Restore(Box<Saved>),
    /// Get ready to go on after a freeze; with the time stamp counter set back, if it is given.
    Thaw(Option<Tsc>),
    /// Say whether it could ever run again by itself. Not answered, but by a notice.
    Probe,
    /// End the thread.
    Stop,
}

/// A vCPU to become.
#[derive(Debug)]
struct Saved {
    state: VcpuState,
    cpuid: Option<Arc<Cpuid>>,
}

type Answer = Result<Option<Box<VcpuState>>, ThreadError>;

/// What the control thread and the vCPU threads share.
#[derive(Debug)]
struct Shared {
    /// One bit for each vCPU that said, since the last probe, that nothing could wake it.
    parked: AtomicU32,
    all: u32,
    notices: Arc<Notices>,
}

/// One vCPU's end of the conversation.
struct Seat {
    index: u8,
    orders: mpsc::Receiver<Order>,
    answers: mpsc::Sender<(u8, Answer)>,
    shared: Arc<Shared>,
    stopped: Cell<bool>,
}

impl Seat {
    fn answer(&self, answer: Answer) {
        // A control thread that is gone takes the process with it.
        self.stopped.set(self.answers.send((self.index, answer)).is_err());
    }

    /// Carries out orders until it is told to stop.
    fn serve(&self, mut vcpu: Vcpu, bus: &Bus) {
        while !self.stopped.get() {
            let Ok(order) = self.orders.recv() else { return };
            match order {
                Order::Run => {
                    #[cfg(feature = "breakout")]
                    crate::breakout::attempt(ThreadKind::Vcpu);
                    if let Err(ending) = vcpu.run(bus, self) {
                        self.shared.notices.end(ending);
                    }
                }
                Order::EnterAt(entry) => {
                    self.answer(vcpu.enter_at(entry).map(|()| None).map_err(Into::into));
                }
                // It is out: its guest ended, or it never ran.
                Order::Leave => self.answer(Ok(None)),
                Order::Save => {
                    self.answer(vcpu.save().map(|state| Some(Box::new(state))).map_err(Into::into));
                }
                Order::Restore(saved) => {
                    let restored = vcpu.restore(&saved.state, saved.cpuid.as_deref());
                    self.answer(restored.map(|()| None).map_err(Into::into));
                }
                Order::Thaw(tsc) => self.answer(thaw(&vcpu, tsc).map(|()| None)),
                Order::Probe => {}
                Order::Stop => return,
            }
        }
    }
}

fn thaw(vcpu: &Vcpu, tsc: Option<Tsc>) -> Result<(), ThreadError> {
    if let Some(tsc) = tsc {
        vcpu.rewind(&tsc)?;
    }
    Ok(vcpu.tell_stopped()?)
}

impl Pause for Seat {
    fn kicked(&self) -> Kick {
        match self.orders.try_recv() {
            Ok(Order::Leave) => {
                self.answer(Ok(None));
                Kick::Leave
            }
            Ok(Order::Probe) => Kick::Probe,
            Ok(Order::Stop) | Err(mpsc::TryRecvError::Disconnected) => {
                self.stopped.set(true);
                Kick::Leave
            }
            // Nothing else is asked of a vCPU that runs; a mistake of ours is answered as one.
            Ok(
                Order::Run | Order::EnterAt(_) | Order::Save | Order::Restore(_) | Order::Thaw(_),
            ) => {
                self.answer(Err(ThreadError::Answer));
                Kick::GoOn
            }
            Err(mpsc::TryRecvError::Empty) => Kick::GoOn,
        }
    }

    fn probed(&self, parked: Parked) {
        if parked == Parked::ForGood {
            let bit = 1 << self.index;
            let before = self.shared.parked.fetch_or(bit, Ordering::AcqRel);
            if before | bit == self.shared.all {
                self.shared.notices.end(Ending::Halted);
            }
        }
    }
}

/// Threads that have been started and are on their way into their jails.
pub struct Starting {
    ready: mpsc::Receiver<Result<(), SeccompError>>,
    ready_tx: Option<mpsc::Sender<Result<(), SeccompError>>>,
    expected: Cell<usize>,
}

impl std::fmt::Debug for Starting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Starting").field("expected", &self.expected).finish_non_exhaustive()
    }
}

impl Default for Starting {
    fn default() -> Self {
        let (ready_tx, ready) = mpsc::channel();
        Self { ready, ready_tx: Some(ready_tx), expected: Cell::new(0) }
    }
}

impl Starting {
    /// Starts a thread: it takes its filter, says so, then does `work`.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn spawn(
        &self,
        name: String,
        kind: ThreadKind,
        notices: &Arc<Notices>,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<JoinHandle<()>, ThreadError> {
        let ready = self.ready_tx.clone().ok_or(ThreadError::Lost)?;
        let notices = Arc::clone(notices);
        let body = move || {
            let _guard = notices.on_panic(kind.name());
            let jailed = seccomp::install(kind);
            let run = jailed.is_ok();
            // The receiver lives until all have said so; without it there is nothing to run for.
            if ready.send(jailed).is_ok() && run {
                drop(ready);
                work();
            }
        };
        self.expected.set(self.expected.get() + 1);
        thread::Builder::new()
            .name(name.clone())
            .stack_size(STACK_BYTES)
            .spawn(body)
            .map_err(|source| ThreadError::Spawn { name, source })
    }

    /// Waits until every thread is in its jail.
    ///
    /// # Errors
    /// When one is not.
    pub fn all_jailed(mut self) -> Result<(), ThreadError> {
        // Then a thread that is gone without a word ends the wait.
        self.ready_tx = None;
        for _ in 0..self.expected.get() {
            self.ready.recv().map_err(|_| ThreadError::Lost)??;
        }
        Ok(())
    }
}

/// Deep enough for a device's work and a panic; shallow, because there are thousands of these.
const STACK_BYTES: usize = 256 * 1024;

/// The vCPU threads, as the control thread holds them.
#[derive(Debug)]
pub struct VcpuThreads {
    threads: Vec<JoinHandle<()>>,
    orders: Vec<mpsc::Sender<Order>>,
    answers: mpsc::Receiver<(u8, Answer)>,
    shared: Arc<Shared>,
}

impl VcpuThreads {
    /// Starts a thread for each vCPU. None runs guest code before [`VcpuThreads::run`].
    ///
    /// # Errors
    /// See [`ThreadError`].
    pub fn start(
        starting: &Starting,
        vcpus: Vec<Vcpu>,
        bus: &Arc<Bus>,
        notices: &Arc<Notices>,
    ) -> Result<Self, ThreadError> {
        kvm::install_kick()?;
        let all = vcpus.iter().fold(0, |all, vcpu| all | 1 << vcpu.index());
        let parked = AtomicU32::new(0);
        let shared = Arc::new(Shared { parked, all, notices: Arc::clone(notices) });
        let (answers_tx, answers) = mpsc::channel();
        let mut orders = Vec::with_capacity(vcpus.len());
        let mut threads = Vec::with_capacity(vcpus.len());
        for vcpu in vcpus {
            let (order, own) = mpsc::channel();
            orders.push(order);
            let seat = Seat {
                index: vcpu.index(),
                orders: own,
                answers: answers_tx.clone(),
                shared: Arc::clone(&shared),
                stopped: Cell::new(false),
            };
            let bus = Arc::clone(bus);
            let name = format!("vcpu-{}", vcpu.index());
            let serve = move || seat.serve(vcpu, &bus);
            threads.push(starting.spawn(name, ThreadKind::Vcpu, notices, serve)?);
        }
        Ok(Self { threads, orders, answers, shared })
    }

    /// Points the first vCPU at 64-bit code.
    ///
    /// # Errors
    /// See [`ThreadError`].
    pub fn enter_at(&self, entry: Gpa) -> Result<(), ThreadError> {
        let first = self.orders.first().ok_or(ThreadError::Lost)?;
        first.send(Order::EnterAt(entry)).map_err(|_| ThreadError::Lost)?;
        self.answers(1).map(|_| ())
    }

    /// Lets all vCPUs run guest code.
    ///
    /// # Errors
    /// When a thread has ended.
    pub fn run(&self) -> Result<(), ThreadError> {
        self.tell(|_| Order::Run)
    }

    /// Asks all vCPUs to leave the guest, without waiting for them.
    ///
    /// # Errors
    /// When a thread cannot be reached.
    pub fn leave(&self) -> Result<(), ThreadError> {
        self.tell(|_| Order::Leave)?;
        Ok(self.kick_all()?)
    }

    /// Asks for the state of all vCPUs, which are out of the guest, without waiting for them.
    ///
    /// # Errors
    /// When a thread has ended.
    pub fn save(&self) -> Result<(), ThreadError> {
        self.tell(|_| Order::Save)
    }

    /// The answers to [`VcpuThreads::save`], in the order of the vCPUs.
    ///
    /// # Errors
    /// See [`ThreadError`].
    pub fn saved(&self) -> Result<Vec<VcpuState>, ThreadError> {
        let answers = self.answers(self.orders.len())?;
        answers.into_iter().map(|state| Ok(*state.ok_or(ThreadError::Answer)?)).collect()
    }

    /// Has each vCPU become the saved one of its number, without waiting for them.
    ///
    /// # Errors
    /// When a thread has ended. There are as many states as vCPUs.
    pub fn restore(
        &self,
        states: Vec<VcpuState>,
        cpuid: Option<&Arc<Cpuid>>,
    ) -> Result<(), ThreadError> {
        for (orders, state) in self.orders.iter().zip(states) {
            let saved = Saved { state, cpuid: cpuid.cloned() };
            orders.send(Order::Restore(Box::new(saved))).map_err(|_| ThreadError::Lost)?;
        }
        Ok(())
    }

    /// Gets all vCPUs ready to go on after a freeze, without waiting for them.
    ///
    /// # Errors
    /// When a thread has ended.
    pub fn thaw(&self, tscs: Option<&[Tsc]>) -> Result<(), ThreadError> {
        self.tell(|index| Order::Thaw(tscs.and_then(|tscs| tscs.get(index)).copied()))
    }

    /// Waits until all vCPUs have done what was asked last.
    ///
    /// # Errors
    /// See [`ThreadError`].
    pub fn done(&self) -> Result<(), ThreadError> {
        self.answers(self.orders.len()).map(|_| ())
    }

    /// Asks every vCPU whether it could ever run again. If none could, the guest ends as halted.
    ///
    /// # Errors
    /// When a thread cannot be signalled.
    pub fn probe(&self) -> Result<(), ThreadError> {
        self.shared.parked.store(0, Ordering::Release);
        self.tell(|_| Order::Probe)?;
        Ok(self.kick_all()?)
    }

    /// Stops guest code and waits for the threads.
    ///
    /// # Errors
    /// When a thread cannot be signalled, or does not end in time: one that waits for a page that
    /// nobody brings, in the kernel's own reading of guest memory, ends with the process only.
    pub fn stop(self) -> Result<(), ThreadError> {
        for orders in &self.orders {
            // A thread that has ended by itself needs no order, and said why in a notice.
            orders.send(Order::Stop).ok();
        }
        self.kick_all()?;
        // Each holds one end for as long as it runs; no answer is of interest any more.
        let deadline = Instant::now() + PATIENCE;
        while let Ok(_) | Err(mpsc::RecvTimeoutError::Timeout) =
            self.answers.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            if Instant::now() >= deadline {
                return Err(ThreadError::Late);
            }
        }
        for thread in self.threads {
            if thread.join().is_err() {
                self.shared.notices.end(Ending::Internal("a vCPU thread panicked".to_owned()));
            }
        }
        Ok(())
    }

    fn tell(&self, order: impl Fn(usize) -> Order) -> Result<(), ThreadError> {
        self.orders
            .iter()
            .enumerate()
            .try_for_each(|(index, orders)| orders.send(order(index)))
            .map_err(|_| ThreadError::Lost)
    }

    /// The next `count` answers, in the order of the vCPUs. The first refusal counts.
    fn answers(&self, count: usize) -> Result<Vec<Option<Box<VcpuState>>>, ThreadError> {
        let deadline = Instant::now() + PATIENCE;
        let mut answers = Vec::with_capacity(count);
        let mut refusal = None;
        for _ in 0..count {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.answers.recv_timeout(left).map_err(|_| ThreadError::Late)? {
                (index, Ok(answer)) => answers.push((index, answer)),
                (_, Err(error)) => refusal = refusal.or(Some(error)),
            }
        }
        if let Some(error) = refusal {
            return Err(error);
        }
        answers.sort_unstable_by_key(|(index, _)| *index);
        Ok(answers.into_iter().map(|(_, answer)| answer).collect())
    }

    fn kick_all(&self) -> Result<(), KickError> {
        // A thread that has ended, because its vCPU did, has nothing to leave.
        self.threads.iter().filter(|thread| !thread.is_finished()).try_for_each(kvm::kick)
    }
}
