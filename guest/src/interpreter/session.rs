//! One context: a task that owns one kernel, runs cells one after another, interrupts, restarts.
//!
//! Started by [`super::contexts`]. Refuses a cell when [`WAITING_CELLS_MAX`] wait already. A cell
//! whose client has gone is interrupted, and skipped when it has not begun. A kernel that does not
//! give way to interrupts is replaced, so one cell cannot hold a context for ever.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::events::Event;
use super::kernel::{Kernel, KernelConfig, KernelError, Signalled};
use super::protocol::{Body, Incoming, Request};
use crate::sandbox::Sandbox;
use crate::users::User;

/// Most cells that wait for one context.
pub const WAITING_CELLS_MAX: usize = 64;

/// Most bytes of events that wait for a slow client before the kernel's output is left unread.
const PENDING_BYTES_MAX: usize = 8 * 1024 * 1024;

/// After the reply to a cell, how long to wait for the rest of its output without hearing any.
/// The kernel drops output when it is not read fast enough, and the end marker with it.
const SILENCE_AFTER_REPLY: Duration = Duration::from_secs(10);

/// A cell that nobody waits for is interrupted again this often...
const INTERRUPT_EVERY: Duration = Duration::from_secs(5);

/// ...and its kernel replaced after so many times.
const INTERRUPTS_MAX: u32 = 12;

/// A kernel that dies sooner than this after its start is started again only for a cell.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// One cell.
#[derive(Debug)]
pub struct Job {
    pub code: String,
    pub env: BTreeMap<String, String>,
    /// Dropping the receiver means that the client has gone.
    pub events: mpsc::Sender<Event>,
}

/// A request to end the kernel and start another; the answer is sent when it is up.
pub type Restart = oneshot::Sender<Result<(), String>>;

/// Whether a context can run a cell at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Starting,
    Ready,
    Failed(String),
}

/// The ends that the registry keeps. Dropping them ends the session and its kernel.
#[derive(Debug)]
pub struct Handle {
    pub jobs: mpsc::Sender<Job>,
    pub restarts: mpsc::Sender<Restart>,
    pub state: watch::Receiver<State>,
}

/// What a session needs to start kernels.
#[derive(Clone)]
pub struct SessionConfig {
    pub kernel: KernelConfig,
    pub sandbox: Arc<Sandbox>,
    pub user: User,
    pub cwd: PathBuf,
}

/// Starts a session; its first kernel starts at once.
pub fn start(config: SessionConfig) -> Handle {
    let (jobs, jobs_in) = mpsc::channel(WAITING_CELLS_MAX);
    let (restarts, restarts_in) = mpsc::channel(4);
    let (state_out, state) = watch::channel(State::Starting);
    let session = Session {
        config,
        jobs: jobs_in,
        restarts: restarts_in,
        state: state_out,
        base_env: BTreeMap::new(),
    };
    tokio::spawn(session.run());
    Handle { jobs, restarts, state }
}

struct Session {
    config: SessionConfig,
    jobs: mpsc::Receiver<Job>,
    restarts: mpsc::Receiver<Restart>,
    state: watch::Sender<State>,
    /// The sandbox's variables as the kernel has them.
    base_env: BTreeMap<String, String>,
}

/// Why a kernel is no longer used.
enum Ending {
    /// The context is gone.
    Closed,
    Restart(Restart),
    /// It ended by itself, or its connection did.
    Died(String),
}

/// How a cell went.
enum Cell {
    Done,
    Broken(Ending),
}

impl Session {
    async fn run(mut self) {
        let mut waiting_restart: Option<Restart> = None;
        loop {
            self.state.send_replace(State::Starting);
            // The registry drops all its ends together, so one of them tells.
            let state = self.state.clone();
            let started = tokio::select! {
                started = self.start_kernel() => started,
                () = state.closed() => return,
            };
            let kernel = match started {
                Ok(kernel) => kernel,
                Err(error) => {
                    let reason = crate::http::error::chain(&error);
                    if let Some(reply) = waiting_restart.take() {
                        // The asker may have gone, and then nobody needs the answer.
                        drop(reply.send(Err(reason.clone())));
                    }
                    match self.wait_after_failure(reason).await {
                        Ending::Closed => return,
                        Ending::Restart(reply) => waiting_restart = Some(reply),
                        Ending::Died(_) => {}
                    }
                    continue;
                }
            };
            self.state.send_replace(State::Ready);
            if let Some(reply) = waiting_restart.take() {
                drop(reply.send(Ok(())));
            }
            match self.serve(kernel).await {
                Ending::Closed => return,
                Ending::Restart(reply) => waiting_restart = Some(reply),
                Ending::Died(_) => {}
            }
        }
    }

    async fn start_kernel(&mut self) -> Result<Kernel, KernelError> {
        let mut env = self.config.sandbox.environment();
        self.base_env.clone_from(&env);
        let user = &self.config.user;
        let path = std::env::var("PATH")
            .unwrap_or_else(|_| "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin".to_owned());
        for (name, value) in [
            ("HOME", user.home.display().to_string()),
            ("USER", user.name.clone()),
            ("LOGNAME", user.name.clone()),
            ("PATH", path),
            ("LANG", "C.UTF-8".to_owned()),
            // Python would otherwise hold back what a child process prints after it.
            ("PYTHONUNBUFFERED", "1".to_owned()),
            ("MPLBACKEND", "module://matplotlib_inline.backend_inline".to_owned()),
        ] {
            env.entry(name.to_owned()).or_insert(value);
        }
        let config = &self.config;
        let mut kernel = Kernel::start(&config.kernel, &config.user, &config.cwd, env).await?;
        match silent(&mut kernel, Kernel::bootstrap()).await {
            Ok(()) => Ok(kernel),
            Err(Silent::Ended(status)) => {
                kernel.stop().await;
                Err(KernelError::EndedEarly { status, output: "none".to_owned() })
            }
            // Without the hooks a cell still runs, so the kernel is used as it is.
            Err(Silent::Failed) => Ok(kernel),
            Err(Silent::Kernel(error)) => {
                kernel.stop().await;
                Err(error)
            }
        }
    }

    /// A kernel could not be started: the next cell is told why, and then it is tried again.
    async fn wait_after_failure(&mut self, reason: String) -> Ending {
        self.state.send_replace(State::Failed(reason.clone()));
        tokio::select! {
            job = self.jobs.recv() => match job {
                None => Ending::Closed,
                Some(job) => {
                    let lost = [Event::synthetic("KernelUnavailable", reason.clone()),
                        Event::EndOfExecution];
                    for event in lost {
                        // A full channel belongs to a client that does not read.
                        drop(job.events.try_send(event));
                    }
                    Ending::Died(reason)
                }
            },
            restart = self.restarts.recv() => restart.map_or(Ending::Closed, Ending::Restart),
        }
    }

    async fn serve(&mut self, mut kernel: Kernel) -> Ending {
        let since = Instant::now();
        let ending = loop {
            tokio::select! {
                biased;
                restart = self.restarts.recv() => {
                    break restart.map_or(Ending::Closed, Ending::Restart);
                }
                signalled = kernel.next() => {
                    // Between cells a kernel may still print from a thread; nobody asked for it.
                    if let Signalled::Ended(status) = signalled {
                        break Ending::Died(status);
                    }
                }
                job = self.jobs.recv() => {
                    let Some(job) = job else { break Ending::Closed };
                    if job.events.is_closed() {
                        continue;
                    }
                    if let Cell::Broken(ending) = self.cell(&mut kernel, job).await {
                        break ending;
                    }
                }
            }
        };
        kernel.stop().await;
        match ending {
            Ending::Died(status) if since.elapsed() < STABLE_AFTER => {
                self.wait_for_demand(status).await
            }
            other => other,
        }
    }

    /// The kernel died young. Another is started when a cell wants it, not before.
    async fn wait_for_demand(&mut self, status: String) -> Ending {
        self.state.send_replace(State::Failed(format!("the kernel ended: {status}")));
        loop {
            if !self.jobs.is_empty() {
                return Ending::Died(status);
            }
            tokio::select! {
                restart = self.restarts.recv() => {
                    return restart.map_or(Ending::Closed, Ending::Restart);
                }
                () = wait_for_job(&self.jobs) => {}
            }
        }
    }

    async fn cell(&mut self, kernel: &mut Kernel, job: Job) -> Cell {
        let mut run = Run::new(job);
        if let Err(ending) = self.prepare(kernel, &run.env).await {
            return run.broken(ending).await;
        }
        let outcome = match kernel.send(&Request::Execute { code: &run.code }).await {
            Ok(id) => run.drive(kernel, &id, &mut self.restarts).await,
            Err(error) => Err(Ending::Died(error.to_string())),
        };
        if let Err(ending) = outcome {
            return run.broken(ending).await;
        }
        // The environment is put back before the client learns of the end, so that its next
        // cell cannot overtake it.
        let restored = if run.env.is_empty() {
            Ok(())
        } else {
            silent(kernel, "__import__('_mica').pop()").await
        };
        run.finish().await;
        match restored {
            Ok(()) | Err(Silent::Failed) => Cell::Done,
            Err(Silent::Ended(status)) => Cell::Broken(Ending::Died(status)),
            Err(Silent::Kernel(error)) => Cell::Broken(Ending::Died(error.to_string())),
        }
    }

    /// Brings the kernel's environment up to date before a cell.
    async fn prepare(
        &mut self,
        kernel: &mut Kernel,
        env: &BTreeMap<String, String>,
    ) -> Result<(), Ending> {
        let base = self.config.sandbox.environment();
        let mut code = String::new();
        if base != self.base_env {
            code.push_str(&call("base", &base));
            self.base_env = base;
        }
        if !env.is_empty() {
            code.push_str(&call("push", env));
        }
        if code.is_empty() {
            return Ok(());
        }
        match silent(kernel, &code).await {
            Ok(()) | Err(Silent::Failed) => Ok(()),
            Err(Silent::Ended(status)) => Err(Ending::Died(status)),
            Err(Silent::Kernel(error)) => Err(Ending::Died(error.to_string())),
        }
    }
}

/// Python that hands a map of texts to a function of the bootstrap's module. The map travels as
/// JSON inside a Python literal of bytes, so no character of it can be read as code.
fn call(function: &str, variables: &BTreeMap<String, String>) -> String {
    let json = serde_json::to_vec(variables).unwrap_or_else(|_| b"{}".to_vec());
    let hex = super::protocol::hex(&json);
    format!("__import__('_mica').{function}(__import__('json').loads(bytes.fromhex('{hex}')))\n")
}

/// Resolves when a job waits. The queue has no such call without taking the job, so look again
/// at intervals; this is the rare path of a kernel that dies at once.
async fn wait_for_job(jobs: &mpsc::Receiver<Job>) {
    const LOOK_EVERY: Duration = Duration::from_millis(50);
    while jobs.is_empty() && !jobs.is_closed() {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Why a silent request did not succeed.
enum Silent {
    Ended(String),
    Failed,
    Kernel(KernelError),
}

/// Runs code that no client sees, to its end.
async fn silent(kernel: &mut Kernel, code: &str) -> Result<(), Silent> {
    let id = kernel.send(&Request::Silent { code }).await.map_err(Silent::Kernel)?;
    loop {
        match kernel.next().await {
            Signalled::Ended(status) => return Err(Silent::Ended(status)),
            Signalled::Message(message) if message.parent_id == id => match message.body {
                Body::ReplyOk => return Ok(()),
                Body::ReplyError { .. } | Body::ReplyAborted => return Err(Silent::Failed),
                _ => {}
            },
            Signalled::Message(_) | Signalled::Unreadable(_) => {}
        }
    }
}

/// A cell while it runs: what has come out of it and has not reached the client yet.
struct Run {
    code: String,
    env: BTreeMap<String, String>,
    events: mpsc::Sender<Event>,
    pending: VecDeque<Event>,
    pending_bytes: usize,
    begun: bool,
    errored: bool,
    idle: bool,
    replied_at: Option<Instant>,
    interrupts: u32,
    next_interrupt: Instant,
}

impl Run {
    fn new(job: Job) -> Self {
        Self {
            code: job.code,
            env: job.env,
            events: job.events,
            pending: VecDeque::new(),
            pending_bytes: 0,
            begun: false,
            errored: false,
            idle: false,
            replied_at: None,
            interrupts: 0,
            next_interrupt: Instant::now(),
        }
    }

    /// Runs until the kernel is idle again and all of its output is on its way.
    async fn drive(
        &mut self,
        kernel: &mut Kernel,
        id: &str,
        restarts: &mut mpsc::Receiver<Restart>,
    ) -> Result<(), Ending> {
        // A copy, so that waiting on it does not borrow the run.
        let events = self.events.clone();
        loop {
            if self.idle && self.replied_at.is_some() {
                return Ok(());
            }
            let gone = events.is_closed();
            if gone {
                self.pending.clear();
                self.pending_bytes = 0;
            }
            let wake = match (gone, self.replied_at) {
                (true, _) => self.next_interrupt,
                (false, Some(at)) => at + SILENCE_AFTER_REPLY,
                (false, None) => Instant::now() + Duration::from_secs(3600),
            };
            tokio::select! {
                biased;
                restart = restarts.recv() => {
                    return Err(restart.map_or(Ending::Closed, Ending::Restart));
                }
                permit = events.reserve(), if !self.pending.is_empty() => {
                    if let (Ok(permit), Some(event)) = (permit, self.pending.pop_front()) {
                        self.pending_bytes = self.pending_bytes.saturating_sub(event.weight());
                        permit.send(event);
                    }
                }
                signalled = kernel.next(), if self.pending_bytes < PENDING_BYTES_MAX => {
                    match signalled {
                        Signalled::Message(message) if message.parent_id == id => {
                            self.take(message);
                        }
                        Signalled::Message(_) => {}
                        Signalled::Unreadable(error) => self.note(&error.to_string()),
                        Signalled::Ended(status) => return Err(Ending::Died(status)),
                    }
                }
                () = events.closed(), if !gone => self.next_interrupt = Instant::now(),
                () = sleep_until(wake) => {
                    if gone {
                        self.interrupt(kernel)?;
                    } else if self.replied_at.is_some() && self.pending.is_empty() {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn interrupt(&mut self, kernel: &Kernel) -> Result<(), Ending> {
        if self.interrupts >= INTERRUPTS_MAX {
            return Err(Ending::Died("it did not give way to interrupts".to_owned()));
        }
        self.interrupts += 1;
        self.next_interrupt = Instant::now() + INTERRUPT_EVERY;
        kernel.interrupt();
        Ok(())
    }

    fn take(&mut self, message: Incoming) {
        if self.replied_at.is_some() {
            self.replied_at = Some(Instant::now());
        }
        let timestamp = message.date;
        match message.body {
            Body::Input { execution_count } => {
                self.begun = true;
                self.push(Event::NumberOfExecutions { execution_count });
            }
            Body::Stdout(text) => self.push(Event::Stdout { text, timestamp }),
            Body::Stderr(text) => self.push(Event::Stderr { text, timestamp }),
            Body::Display(bundle) => self.push(Event::result(bundle, false)),
            Body::MainResult(bundle) => self.push(Event::result(bundle, true)),
            Body::Error { name, value, traceback } => self.error(name, value, traceback),
            Body::ReplyError { name, value, traceback } => {
                self.replied_at = Some(Instant::now());
                self.error(name, value, traceback);
            }
            Body::ReplyAborted => {
                self.replied_at = Some(Instant::now());
                let value = "Execution was aborted".to_owned();
                self.error("ExecutionAborted".to_owned(), value, String::new());
                // An aborted cell never begins, so there is no end of it to wait for.
                self.idle = true;
            }
            Body::ReplyOk => self.replied_at = Some(Instant::now()),
            Body::Idle => self.idle = true,
            Body::Unreadable => self.note("its content is not valid JSON"),
            Body::Busy | Body::KernelInfo | Body::Other => {}
        }
    }

    /// The same error comes on both channels; one is enough.
    fn error(&mut self, name: String, value: String, traceback: String) {
        if !self.errored {
            self.errored = true;
            self.push(Event::Error { name, value, traceback });
        }
    }

    fn note(&mut self, reason: &str) {
        let text = format!("a message of the kernel was left out: {reason}\n");
        self.push(Event::Stderr { text, timestamp: super::kernel::now() });
    }

    fn push(&mut self, event: Event) {
        self.pending_bytes += event.weight();
        self.pending.push_back(event);
    }

    /// The kernel is gone in the middle of the cell: say so in the words that E2B uses.
    async fn broken(mut self, ending: Ending) -> Cell {
        let (name, value) = match &ending {
            Ending::Closed => (
                "ExecutionAborted",
                "The context was removed before the execution was finished".to_owned(),
            ),
            Ending::Restart(_) => ("ContextRestarting", "Context was restarted".to_owned()),
            Ending::Died(status) => (
                "UnexpectedEndOfExecution",
                "Connection to the execution was closed before the execution was finished: \
                 the kernel ended ("
                    .to_owned()
                    + status
                    + ")",
            ),
        };
        self.push(Event::synthetic(name, value));
        self.finish().await;
        Cell::Broken(ending)
    }

    /// Hands over the rest and the end, without letting a slow client hold up the context.
    async fn finish(mut self) {
        self.push(Event::EndOfExecution);
        if self.events.is_closed() {
            return;
        }
        let (events, mut pending) = (self.events, self.pending);
        let deliver = async move {
            while let Some(event) = pending.pop_front() {
                if events.send(event).await.is_err() {
                    return;
                }
            }
        };
        // What is left is bounded by PENDING_BYTES_MAX, and goes when the client does.
        tokio::spawn(deliver);
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc::error::TryRecvError;

    fn run() -> (Run, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(16);
        (Run::new(Job { code: String::new(), env: BTreeMap::new(), events }), receiver)
    }

    fn message(body: Body) -> Incoming {
        Incoming { parent_id: "p".into(), date: "d".into(), body }
    }

    fn error() -> Body {
        Body::Error { name: "E".into(), value: "v".into(), traceback: "t".into() }
    }

    #[tokio::test]
    async fn an_error_on_both_channels_is_told_once() {
        let (mut run, mut receiver) = run();
        run.take(message(Body::Input { execution_count: 4 }));
        run.take(message(error()));
        run.take(message(Body::ReplyError {
            name: "E".into(),
            value: "v".into(),
            traceback: "t".into(),
        }));
        run.take(message(Body::Idle));
        assert!(run.begun && run.idle && run.replied_at.is_some());
        run.finish().await;
        assert_eq!(receiver.recv().await, Some(Event::NumberOfExecutions { execution_count: 4 }));
        assert!(matches!(receiver.recv().await, Some(Event::Error { .. })));
        assert_eq!(receiver.recv().await, Some(Event::EndOfExecution));
        assert_eq!(receiver.recv().await, None);
    }

    #[tokio::test]
    async fn an_aborted_reply_ends_the_cell() {
        let (mut run, mut receiver) = run();
        run.take(message(Body::ReplyAborted));
        assert!(run.idle);
        run.finish().await;
        let Some(Event::Error { name, .. }) = receiver.recv().await else { panic!("no error") };
        assert_eq!(name, "ExecutionAborted");
    }

    #[tokio::test]
    async fn the_end_of_the_kernel_is_told_in_the_words_of_e2b() {
        for (ending, wanted) in [
            (Ending::Died("signal: 9".into()), "UnexpectedEndOfExecution"),
            (Ending::Restart(oneshot::channel().0), "ContextRestarting"),
            (Ending::Closed, "ExecutionAborted"),
        ] {
            let (run, mut receiver) = run();
            assert!(matches!(run.broken(ending).await, Cell::Broken(_)));
            let Some(Event::Error { name, .. }) = receiver.recv().await else { panic!("none") };
            assert_eq!(name, wanted);
            assert_eq!(receiver.recv().await, Some(Event::EndOfExecution));
        }
    }

    #[tokio::test]
    async fn what_waits_is_counted() {
        let (mut run, mut receiver) = run();
        run.take(message(Body::Stdout("x".repeat(5000))));
        assert!(run.pending_bytes > 5000);
        assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
    }

    #[test]
    fn variables_cannot_break_out_of_their_call() {
        let variables = BTreeMap::from([("A'); boom('".to_owned(), "\"\n')".to_owned())]);
        let code = call("push", &variables);
        assert_eq!(code.matches('\n').count(), 1);
        assert!(!code.contains("boom"), "{code}");
    }
}
