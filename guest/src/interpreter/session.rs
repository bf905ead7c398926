//! One context: a task that owns one kernel, runs cells one after another, interrupts, restarts.
//!
//! Started by [`super::contexts`]. Refuses a cell when [`WAITING_CELLS_MAX`] wait already. A cell
//! whose client has gone is interrupted, and skipped when it has not begun. A kernel that does not
//! give way to interrupts is replaced, so one cell cannot hold a context for ever.
//!
//! A kernel outlives the sandbox it was started in: saved with the guest, it goes on in every
//! sandbox that is restored from there. What it has of the former one, environment and random
//! state, is made good with its next cell and not when the sandbox gets its identity: most of a
//! kernel's memory is shared between all that were restored from it until it runs, so one that is
//! never used costs nothing, and the answer that a client waits for does not wait for it. Where a
//! part of the kernel is ours it travels in the cell's own message, so it costs no round trip
//! either; other kernels are told in silent cells of their language around the client's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use super::cell::{ABORTS_MAX, Cell, Ending, Job, Restart, Run};
use super::events::Event;
use super::kernel::{Kernel, KernelConfig, KernelError, Signalled};
use super::languages::{Kind, Upkeep};
use super::output::PIPE_BYTES;
use super::protocol::{Body, Request};
use super::snippets::{Changes, Snippets};
use crate::sandbox::{Sandbox, Standing};
use crate::users::User;

/// Most cells that wait for one context.
pub const WAITING_CELLS_MAX: usize = 64;

/// A kernel that dies sooner than this after its start is started again only for a cell.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// How long our own code may take in a kernel. It is a few lines; a kernel that does not get through
/// them is stuck.
const SILENT_MAX: Duration = Duration::from_secs(120);

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
    pub kind: &'static Kind,
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
        env: BTreeMap::new(),
        born: BTreeMap::new(),
        sandboxes: 0,
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
    env: BTreeMap<String, String>,
    /// What it was started with.
    born: BTreeMap<String, String>,
    /// [`Standing::sandboxes`] when the kernel's random state was made.
    sandboxes: u64,
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
        let standing = self.config.sandbox.standing();
        let env = self.environment(&standing);
        self.sandboxes = standing.sandboxes;
        self.env.clone_from(&env);
        self.born.clone_from(&env);
        let config = &self.config;
        let (kind, user, cwd) = (config.kind, &config.user, &config.cwd);
        let mut kernel = Kernel::start(&config.kernel, kind, user, cwd, env).await?;
        match silent(&mut kernel, kind.begin).await {
            Ok(()) => Ok(kernel),
            Err(Silent::Ended(status)) => {
                kernel.stop().await;
                Err(KernelError::EndedEarly { status, output: "none".to_owned() })
            }
            // It answers, and what a cell of its client does is the client's to see.
            Err(Silent::Failed(_)) => Ok(kernel),
            Err(Silent::Kernel(error)) => {
                kernel.stop().await;
                Err(error)
            }
        }
    }

    /// The whole environment of a kernel, but for what cells add.
    fn environment(&self, standing: &Standing) -> BTreeMap<String, String> {
        let mut env = self.config.sandbox.environment_of(standing.identity.as_deref());
        let user = &self.config.user;
        for (name, value) in [
            ("HOME", user.home.display().to_string()),
            ("USER", user.name.clone()),
            ("LOGNAME", user.name.clone()),
            ("PATH", search_path(&self.config.kernel.python)),
            ("LANG", "C.UTF-8".to_owned()),
        ] {
            env.entry(name.to_owned()).or_insert(value);
        }
        for (name, value) in self.config.kind.env {
            env.entry((*name).to_owned()).or_insert_with(|| (*value).to_owned());
        }
        env
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
        // Bytes that were printed without a pause.
        let mut printed = 0;
        let ending = loop {
            // First the kernel, to see that it has ended; but not for as long as somebody prints.
            let is_heard = printed < PIPE_BYTES;
            tokio::select! {
                biased;
                restart = self.restarts.recv() => {
                    break restart.map_or(Ending::Closed, Ending::Restart);
                }
                signalled = kernel.next(), if is_heard => {
                    // Between cells a kernel may still print from a thread; nobody asked for it.
                    match signalled {
                        Signalled::Ended(status) => break Ending::Died(status),
                        Signalled::OwnStdout(text) => printed += text.len(),
                        Signalled::Message(_) | Signalled::Unreadable(_) => printed = 0,
                    }
                }
                job = self.jobs.recv() => {
                    printed = 0;
                    let Some(job) = job else { break Ending::Closed };
                    if job.events.is_closed() {
                        continue;
                    }
                    if let Cell::Broken(ending) = self.cell(&mut kernel, job).await {
                        break ending;
                    }
                }
                () = std::future::ready(()), if !is_heard => printed = 0,
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
        let mut run = Run::new(job, self.config.kind);
        let standing = self.config.sandbox.standing();
        let wanted = self.environment(&standing);
        let reseed = standing.sandboxes != self.sandboxes;
        let changes = Changes::between(&self.env, &wanted, reseed);
        let outcome = match self.config.kind.upkeep {
            Upkeep::Orders => {
                let orders = Orders { become_: changes, push: &run.env };
                // Texts, lists and maps of texts always serialise.
                let orders = serde_json::to_value(&orders).unwrap_or_default();
                execute(kernel, &mut run, &orders, &mut self.restarts).await
            }
            Upkeep::Code(snippets) => {
                let before = snippets.before(changes.as_ref(), &run.env);
                let restarts = &mut self.restarts;
                around(kernel, &mut run, snippets, &before, &wanted, restarts).await
            }
        };
        let held = if run.is_anew { self.born.clone() } else { wanted };
        (self.env, self.sandboxes) = (held, standing.sandboxes);
        if let Err(ending) = outcome {
            return run.broken(ending).await;
        }
        let settled =
            if run.rehearsal { silent(kernel, self.config.kind.settle).await } else { Ok(()) };
        run.finish().await;
        match settled.map_err(Silent::ending) {
            Err(Some(ending)) => Cell::Broken(ending),
            Ok(()) | Err(None) => Cell::Done,
        }
    }
}

/// Runs the cell itself; once more where the kernel gave it back.
async fn execute(
    kernel: &mut Kernel,
    run: &mut Run,
    orders: &Value,
    restarts: &mut mpsc::Receiver<Restart>,
) -> Result<(), Ending> {
    loop {
        let (code, unnumbered) = (run.code.as_str(), run.rehearsal);
        let request = Request::Execute { code, unnumbered, orders };
        let id = kernel.send(&request).await.map_err(|error| Ending::Died(error.to_string()))?;
        run.drive(kernel, &id, restarts).await?;
        if !run.begins_again() {
            return Ok(());
        }
    }
}

/// Runs the cell between silent ones that set its variables and put them back.
async fn around(
    kernel: &mut Kernel,
    run: &mut Run,
    snippets: &Snippets,
    before: &str,
    standing: &BTreeMap<String, String>,
    restarts: &mut mpsc::Receiver<Restart>,
) -> Result<(), Ending> {
    if let Some(ending) = silent(kernel, before).await.err().and_then(Silent::ending) {
        return Err(ending);
    }
    execute(kernel, run, &Value::Null, restarts).await?;
    if let (Some((_, reason)), true) = (snippets.unread, run.is_unread()) {
        let why = silent(kernel, &reason(&run.code)).await;
        match why {
            Ok(()) => run.explain(None),
            Err(Silent::Failed(error)) => run.explain(Some(*error)),
            Err(other) => return Err(other.ending().unwrap_or(Ending::Closed)),
        }
    }
    let after = snippets.after(&run.env, standing);
    if after.is_empty() {
        return Ok(());
    }
    loop {
        let request = Request::Silent { code: &after };
        let id = kernel.send(&request).await.map_err(|error| Ending::Died(error.to_string()))?;
        run.drain(kernel, id, !snippets.flush.is_empty(), restarts).await?;
        if !run.begins_again() {
            return Ok(());
        }
    }
}

/// What comes with a cell for our own part of the kernel: it carries the first out before the cell,
/// and sets the variables of the second for as long as the cell runs.
#[derive(Debug, Serialize)]
struct Orders<'a> {
    #[serde(rename = "become", skip_serializing_if = "Option::is_none")]
    become_: Option<Changes<'a>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    push: &'a BTreeMap<String, String>,
}

/// The agent's own search path, with the kernel's Python first: `!pip` in a cell must install for
/// the kernel that the cell runs in.
fn search_path(python: &Path) -> String {
    let own = std::env::var("PATH").unwrap_or_else(|_| super::SEARCH_PATH.to_owned());
    match python.parent().filter(|parent| parent.is_absolute()) {
        Some(parent) => format!("{}:{own}", parent.display()),
        None => own,
    }
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
    /// It raised what the body says.
    Failed(Box<Body>),
    Kernel(KernelError),
}

impl Silent {
    /// Whether the kernel did not run it.
    fn is_given_back(&self) -> bool {
        matches!(self, Self::Failed(body) if matches!(**body, Body::ReplyAborted))
    }

    /// None, where the kernel goes on.
    fn ending(self) -> Option<Ending> {
        match self {
            Self::Ended(status) => Some(Ending::Died(status)),
            Self::Kernel(error) => Some(Ending::Died(error.to_string())),
            Self::Failed(_) => None,
        }
    }
}

/// Runs code that no client sees, to its end. No code is none.
async fn silent(kernel: &mut Kernel, code: &str) -> Result<(), Silent> {
    if code.is_empty() {
        return Ok(());
    }
    let sent = async {
        let mut sent = silent_unbounded(kernel, code).await;
        for _ in 0..ABORTS_MAX {
            if !sent.as_ref().is_err_and(Silent::is_given_back) {
                break;
            }
            sent = silent_unbounded(kernel, code).await;
        }
        sent
    };
    timeout(SILENT_MAX, sent)
        .await
        .unwrap_or_else(|_| Err(Silent::Ended("it did not answer in time".to_owned())))
}

async fn silent_unbounded(kernel: &mut Kernel, code: &str) -> Result<(), Silent> {
    let id = kernel.send(&Request::Silent { code }).await.map_err(Silent::Kernel)?;
    loop {
        match kernel.next().await {
            Signalled::Ended(status) => return Err(Silent::Ended(status)),
            Signalled::Message(message) if message.parent_id == id => match message.body {
                Body::ReplyOk => return Ok(()),
                body @ (Body::ReplyError { .. } | Body::ReplyAborted) => {
                    return Err(Silent::Failed(Box::new(body)));
                }
                _ => {}
            },
            Signalled::Message(_) | Signalled::Unreadable(_) | Signalled::OwnStdout(_) => {}
        }
    }
}
