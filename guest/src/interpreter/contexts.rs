//! The contexts of the interpreter, by id: which exist, which is the default.
//!
//! Called by [`super::http`] for each request. Refuses unknown ids and languages, a working
//! directory that is not there, and more contexts than [`CONTEXTS_MAX`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::PYTHON;
use super::cell::Job;
use super::events::Event;
use super::kernel::{KernelConfig, KernelError, random_id};
use super::launch::Launcher;
use super::session::{self, Handle, SessionConfig, State};
use crate::sandbox::Sandbox;
use crate::users::UserError;

/// Most contexts at once: each is a Python process.
pub const CONTEXTS_MAX: usize = 64;

/// Events a client may be behind before its cell's output is gathered in the session.
const EVENTS_AHEAD: usize = 64;

/// Why a context cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// No context has this id.
    #[error("Context {0} not found")]
    NotFound(String),
    /// No kernel for this language.
    #[error("language '{0}' is not available in this template; available: {PYTHON}")]
    Language(String),
    /// The directory is missing.
    #[error("cwd '{0}' does not exist or is not a directory")]
    Cwd(String),
    /// The limit is reached.
    #[error("there are {CONTEXTS_MAX} contexts already; remove one first")]
    TooMany,
    /// The queue is full.
    #[error("{max} cells wait for this context already; wait for one to end", max = session::WAITING_CELLS_MAX)]
    Busy,
    /// The kernel of a context did not come up.
    #[error("the kernel did not start: {0}")]
    Kernel(String),
    /// No such user.
    #[error(transparent)]
    User(#[from] UserError),
    /// No random bytes.
    #[error("cannot make an id for the context")]
    Id(#[source] KernelError),
}

/// A context as clients see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ContextInfo {
    /// Names it in requests.
    pub id: String,
    /// Always Python for now.
    pub language: &'static str,
    /// Where its kernel started.
    pub cwd: String,
}

#[derive(Debug)]
struct Context {
    info: ContextInfo,
    handle: Handle,
}

#[derive(Debug, Default)]
struct Contexts {
    by_id: BTreeMap<String, Context>,
    default: Option<String>,
}

/// The interpreter of one sandbox.
pub struct Interpreter {
    sandbox: Arc<Sandbox>,
    kernel: KernelConfig,
    contexts: Mutex<Contexts>,
}

impl std::fmt::Debug for Interpreter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Interpreter").field("python", &self.kernel.python).finish_non_exhaustive()
    }
}

impl Interpreter {
    /// An interpreter without a kernel yet; call [`Interpreter::warm`] to start the first.
    #[must_use]
    pub fn new(
        sandbox: Arc<Sandbox>,
        launcher: Launcher,
        python: PathBuf,
        directory: PathBuf,
    ) -> Self {
        let kernel = KernelConfig { launcher, python, directory };
        Self { sandbox, kernel, contexts: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Contexts> {
        // Nothing panics while it holds the lock; if it did, the maps are whole all the same.
        self.contexts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the default kernel in the background. Needs a Tokio runtime.
    ///
    /// # Errors
    /// When there is no such user or directory.
    pub fn warm(&self) -> Result<(), ContextError> {
        self.default_id().map(drop)
    }

    /// Runs what cells commonly do first through the default kernel, on the way that a client's
    /// cells go, and checks what comes back. Leaves no trace that a later cell could see.
    ///
    /// # Errors
    /// When a cell does not give what it must.
    pub async fn rehearse(&self) -> Result<(), ContextError> {
        self.rehearse_cell("1+1", Some("2")).await?;
        self.rehearse_cell("__import__('_mica').warm()", None).await
    }

    async fn rehearse_cell(&self, code: &str, wanted: Option<&str>) -> Result<(), ContextError> {
        let mut result = None;
        let mut events = self.queue(code.to_owned(), BTreeMap::new(), None, true)?;
        while let Some(event) = events.recv().await {
            match event {
                Event::Error { name, value, .. } => {
                    return Err(ContextError::Kernel(format!("{name}: {value}")));
                }
                Event::Result(mut fields) => result = fields.remove("text"),
                _ => {}
            }
        }
        let given = result.as_ref().and_then(serde_json::Value::as_str);
        if given == wanted {
            return Ok(());
        }
        Err(ContextError::Kernel(format!("`{code}` gave {given:?} and not {wanted:?}")))
    }

    /// How the default kernel is.
    pub(super) fn default_state(&self) -> State {
        let contexts = self.lock();
        let default = contexts.default.as_ref().and_then(|id| contexts.by_id.get(id));
        default.map_or(State::Starting, |context| context.handle.state.borrow().clone())
    }

    fn default_id(&self) -> Result<String, ContextError> {
        let mut contexts = self.lock();
        let held = contexts.default.clone().filter(|id| contexts.by_id.contains_key(id));
        if let Some(id) = held {
            return Ok(id);
        }
        let info = self.add(&mut contexts, None)?;
        contexts.default = Some(info.id.clone());
        Ok(info.id)
    }

    fn add(&self, contexts: &mut Contexts, cwd: Option<&str>) -> Result<ContextInfo, ContextError> {
        if contexts.by_id.len() >= CONTEXTS_MAX {
            return Err(ContextError::TooMany);
        }
        let user = self.sandbox.user(None)?;
        let path = self.sandbox.resolve_path(cwd.unwrap_or("~"), &user);
        if !path.is_dir() {
            return Err(ContextError::Cwd(path.display().to_string()));
        }
        let id = random_id().map_err(ContextError::Id)?;
        let info =
            ContextInfo { id: id.clone(), language: PYTHON, cwd: path.display().to_string() };
        let handle = session::start(SessionConfig {
            kernel: self.kernel.clone(),
            sandbox: Arc::clone(&self.sandbox),
            user,
            cwd: path,
        });
        contexts.by_id.insert(id, Context { info: info.clone(), handle });
        Ok(info)
    }

    /// Makes a context and waits until it can run a cell.
    pub(super) async fn create(
        &self,
        language: Option<&str>,
        cwd: Option<&str>,
    ) -> Result<ContextInfo, ContextError> {
        check_language(language)?;
        let (info, mut state) = {
            let mut contexts = self.lock();
            let info = self.add(&mut contexts, cwd)?;
            let state = contexts.by_id.get(&info.id).map(|context| context.handle.state.clone());
            (info, state)
        };
        let settled = match &mut state {
            Some(state) => state.wait_for(|state| *state != State::Starting).await.ok(),
            None => None,
        };
        match settled.map(|state| state.clone()) {
            Some(State::Failed(reason)) => {
                self.lock().by_id.remove(&info.id);
                Err(ContextError::Kernel(reason))
            }
            Some(_) => Ok(info),
            None => Err(ContextError::NotFound(info.id)),
        }
    }

    /// Every context once.
    pub(super) fn list(&self) -> Vec<ContextInfo> {
        self.lock().by_id.values().map(|context| context.info.clone()).collect()
    }

    /// Ends a context and its kernel.
    pub(super) fn remove(&self, id: &str) -> Result<(), ContextError> {
        let removed = self.lock().by_id.remove(id);
        removed.map(drop).ok_or_else(|| ContextError::NotFound(id.to_owned()))
    }

    /// Replaces the kernel of a context and waits for the new one.
    pub(super) async fn restart(&self, id: &str) -> Result<(), ContextError> {
        let not_found = || ContextError::NotFound(id.to_owned());
        let restarts = {
            let contexts = self.lock();
            contexts.by_id.get(id).ok_or_else(not_found)?.handle.restarts.clone()
        };
        let (reply, answer) = oneshot::channel();
        restarts.send(reply).await.map_err(|_| not_found())?;
        drop(restarts);
        answer.await.map_err(|_| not_found())?.map_err(ContextError::Kernel)
    }

    /// Queues a cell; its events come out of the receiver, and dropping that gives it up.
    pub(super) fn execute(
        &self,
        code: String,
        env: BTreeMap<String, String>,
        context_id: Option<&str>,
        language: Option<&str>,
    ) -> Result<mpsc::Receiver<Event>, ContextError> {
        check_language(language)?;
        self.queue(code, env, context_id, false)
    }

    fn queue(
        &self,
        code: String,
        env: BTreeMap<String, String>,
        context_id: Option<&str>,
        rehearsal: bool,
    ) -> Result<mpsc::Receiver<Event>, ContextError> {
        let id = match context_id {
            Some(id) => id.to_owned(),
            None => self.default_id()?,
        };
        let contexts = self.lock();
        let context = contexts.by_id.get(&id).ok_or(ContextError::NotFound(id))?;
        let (events, receiver) = mpsc::channel(EVENTS_AHEAD);
        let job = Job { code, env, rehearsal, events };
        context.handle.jobs.try_send(job).map_err(|_| ContextError::Busy)?;
        Ok(receiver)
    }
}

fn check_language(language: Option<&str>) -> Result<(), ContextError> {
    let wanted = language.unwrap_or("").trim().to_lowercase();
    match wanted.as_str() {
        "" | PYTHON | "py" | "python3" => Ok(()),
        _ => Err(ContextError::Language(wanted)),
    }
}
