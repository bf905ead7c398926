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
//! never used costs nothing, and the answer that a client waits for does not wait for Python. It
//! travels in the cell's own message, so it costs no round trip either.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use super::cell::{Cell, Ending, Job, Restart, Run};
use super::events::Event;
use super::kernel::{Kernel, KernelConfig, KernelError, Signalled};
use super::protocol::{Body, Request};
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
        let config = &self.config;
        let mut kernel = Kernel::start(&config.kernel, &config.user, &config.cwd, env).await?;
        // IPython makes a few things at its first cell only; now they are made before anyone waits.
        match silent(&mut kernel, "pass").await {
            Ok(()) => Ok(kernel),
            Err(Silent::Ended(status)) => {
                kernel.stop().await;
                Err(KernelError::EndedEarly { status, output: "none".to_owned() })
            }
            // It answers, and what a cell of its client does is the client's to see.
            Err(Silent::Failed) => Ok(kernel),
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
            // Python would otherwise hold back what a child process prints after it.
            ("PYTHONUNBUFFERED", "1".to_owned()),
            ("MPLBACKEND", "module://matplotlib_inline.backend_inline".to_owned()),
        ] {
            env.entry(name.to_owned()).or_insert(value);
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
        let standing = self.config.sandbox.standing();
        let wanted = self.environment(&standing);
        let reseed = standing.sandboxes != self.sandboxes;
        let orders =
            Orders { become_: Changes::between(&self.env, &wanted, reseed), push: &run.env };
        // Texts, lists and maps of texts always serialise.
        let orders = serde_json::to_value(&orders).unwrap_or_default();
        let (code, unnumbered) = (run.code.as_str(), run.rehearsal);
        let sent = kernel.send(&Request::Execute { code, unnumbered, orders: &orders }).await;
        (self.env, self.sandboxes) = (wanted, standing.sandboxes);
        let outcome = match sent {
            Ok(id) => run.drive(kernel, &id, &mut self.restarts).await,
            Err(error) => Err(Ending::Died(error.to_string())),
        };
        if let Err(ending) = outcome {
            return run.broken(ending).await;
        }
        let settled = if run.rehearsal {
            silent(kernel, "__import__('_mica').settle()").await
        } else {
            Ok(())
        };
        run.finish().await;
        match settled {
            Ok(()) | Err(Silent::Failed) => Cell::Done,
            Err(Silent::Ended(status)) => Cell::Broken(Ending::Died(status)),
            Err(Silent::Kernel(error)) => Cell::Broken(Ending::Died(error.to_string())),
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

/// What a kernel that has been saved in one sandbox and restored in another must change.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Changes<'a> {
    set: BTreeMap<&'a str, &'a str>,
    unset: Vec<&'a str>,
    /// Every kernel restored from the same state would draw the same random numbers.
    reseed: bool,
}

impl<'a> Changes<'a> {
    /// None, where nothing changes. What stays the same is left alone: a cell may have changed it,
    /// and then it is the user's.
    fn between(
        held: &'a BTreeMap<String, String>,
        wanted: &'a BTreeMap<String, String>,
        reseed: bool,
    ) -> Option<Self> {
        if !reseed && held == wanted {
            return None;
        }
        let differs = |(name, value): &(&String, &String)| held.get(*name) != Some(*value);
        let pair = |(name, value): (&'a String, &'a String)| (name.as_str(), value.as_str());
        let gone = |name: &&String| !wanted.contains_key(*name);
        Some(Self {
            set: wanted.iter().filter(differs).map(pair).collect(),
            unset: held.keys().filter(gone).map(String::as_str).collect(),
            reseed,
        })
    }
}

/// The agent's own search path, with the kernel's Python first: `!pip` in a cell must install for
/// the kernel that the cell runs in.
fn search_path(python: &Path) -> String {
    let own = std::env::var("PATH").unwrap_or_else(|_| {
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()
    });
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
    Failed,
    Kernel(KernelError),
}

/// Runs code that no client sees, to its end.
async fn silent(kernel: &mut Kernel, code: &str) -> Result<(), Silent> {
    timeout(SILENT_MAX, silent_unbounded(kernel, code))
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
                Body::ReplyError { .. } | Body::ReplyAborted => return Err(Silent::Failed),
                _ => {}
            },
            Signalled::Message(_) | Signalled::Unreadable(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_changed() {
        let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let held = map(&[("GONE", "1"), ("SAME", "1"), ("OTHER", "1")]);
        let wanted = map(&[("SAME", "1"), ("OTHER", "2"), ("NEW", "1")]);
        let changes = Changes::between(&held, &wanted, true).unwrap();
        assert_eq!(changes.set, BTreeMap::from([("NEW", "1"), ("OTHER", "2")]));
        assert_eq!((changes.unset, changes.reseed), (vec!["GONE"], true));
        assert_eq!(Changes::between(&held, &held, false), None);
        assert!(Changes::between(&held, &held, true).unwrap().set.is_empty());
    }
}
