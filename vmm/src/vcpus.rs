//! The vCPU threads: starting, stopping, and finding out that a guest will never run again.
//!
//! Called by `control`. With in-kernel interrupt chips a `hlt` never leaves KVM, so a guest that has
//! halted for good looks like an idle one. It is found by asking: when no vCPU used any processor
//! time for a while, all are kicked out once, and each says whether anything could still wake it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread::{self, JoinHandle};

use mica_wire::vm::Ending;

use crate::bus::Bus;
use crate::jail::seccomp::{self, SeccompError, ThreadKind};
use crate::kvm::{self, KickError, Parked, Pause, Vcpu};
use crate::notices::Notices;

/// Why the threads do not run.
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
}

/// What the control thread and the vCPU threads share.
#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    /// One bit for each vCPU that said, since the last probe, that nothing could wake it.
    parked: AtomicU32,
    all: u32,
    notices: Arc<Notices>,
}

/// One vCPU's view of [`Shared`].
struct Seat<'a> {
    shared: &'a Shared,
    bit: u32,
}

impl Pause for Seat<'_> {
    fn leave(&self, parked: Parked) -> bool {
        if self.shared.stop.load(Ordering::Acquire) {
            return true;
        }
        if parked == Parked::ForGood {
            let before = self.shared.parked.fetch_or(self.bit, Ordering::AcqRel);
            if before | self.bit == self.shared.all {
                self.shared.notices.end(Ending::Halted);
            }
        }
        false
    }
}

/// Threads that wait, already in their jails, to be let go.
pub struct Starting {
    ready: mpsc::Receiver<Result<(), SeccompError>>,
    ready_tx: Option<mpsc::Sender<Result<(), SeccompError>>>,
    go: Arc<Barrier>,
    expected: usize,
}

impl std::fmt::Debug for Starting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Starting").field("expected", &self.expected).finish_non_exhaustive()
    }
}

impl Starting {
    /// For `threads` threads and the control thread.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let (ready_tx, ready) = mpsc::channel();
        let go = Arc::new(Barrier::new(threads + 1));
        Self { ready, ready_tx: Some(ready_tx), go, expected: threads }
    }

    /// Starts a thread: it takes its filter, says so, waits for [`Starting::go`], then does `work`.
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
        let go = Arc::clone(&self.go);
        let notices = Arc::clone(notices);
        let body = move || {
            let _guard = notices.on_panic(kind.name());
            let jailed = seccomp::install(kind);
            let run = jailed.is_ok();
            // The receiver lives until all have said so; without it there is nothing to run for.
            if ready.send(jailed).is_ok() && run {
                drop(ready);
                go.wait();
                #[cfg(feature = "breakout")]
                crate::breakout::attempt(kind, &notices);
                work();
            }
        };
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
    pub fn all_jailed(&mut self) -> Result<(), ThreadError> {
        // Then a thread that is gone without a word ends the wait.
        self.ready_tx = None;
        for _ in 0..self.expected {
            self.ready.recv().map_err(|_| ThreadError::Lost)??;
        }
        Ok(())
    }

    /// Lets all threads go.
    pub fn go(self) {
        self.go.wait();
    }
}

/// Deep enough for a device's work and a panic; shallow, because there are thousands of these.
const STACK_BYTES: usize = 256 * 1024;

/// The running vCPU threads.
#[derive(Debug)]
pub struct VcpuThreads {
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

impl VcpuThreads {
    /// Starts a thread for each vCPU. None runs guest code before [`Starting::go`].
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
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            parked: AtomicU32::new(0),
            all,
            notices: Arc::clone(notices),
        });
        let start = |mut vcpu: Vcpu| {
            let (shared, bus) = (Arc::clone(&shared), Arc::clone(bus));
            let name = format!("vcpu-{}", vcpu.index());
            starting.spawn(name, ThreadKind::Vcpu, notices, move || {
                let seat = Seat { shared: &shared, bit: 1 << vcpu.index() };
                if let Err(ending) = vcpu.run(&*bus, &seat) {
                    shared.notices.end(ending);
                }
            })
        };
        let threads = vcpus.into_iter().map(start).collect::<Result<_, _>>()?;
        Ok(Self { threads, shared })
    }

    /// Asks every vCPU whether it could ever run again. If none could, the guest ends as halted.
    ///
    /// # Errors
    /// When a thread cannot be signalled.
    pub fn probe(&self) -> Result<(), KickError> {
        self.shared.parked.store(0, Ordering::Release);
        self.kick_all()
    }

    /// Stops guest code and waits for the threads.
    ///
    /// # Errors
    /// When a thread cannot be signalled; it is not waited for then.
    pub fn stop(self) -> Result<(), KickError> {
        self.shared.stop.store(true, Ordering::Release);
        self.kick_all()?;
        for thread in self.threads {
            if thread.join().is_err() {
                self.shared.notices.end(Ending::Internal("a vCPU thread panicked".to_owned()));
            }
        }
        Ok(())
    }

    fn kick_all(&self) -> Result<(), KickError> {
        // A thread that has ended, because its vCPU did, has nothing to leave.
        self.threads.iter().filter(|thread| !thread.is_finished()).try_for_each(kvm::kick)
    }
}
