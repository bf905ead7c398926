//! The contexts of the interpreter, by id: which exist, which is the default.
//!
//! Called by [`super::http`] for each request. Refuses unknown ids and languages, a working
//! directory that is not there, and more contexts than [`CONTEXTS_MAX`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};

use super::cell::Job;
use super::events::Event;
use super::kernel::{KernelConfig, KernelError, random_id};
use super::languages::{self, Language};
use super::launch::{Launcher, find_program};
use super::session::{self, Handle, SessionConfig, State};
use crate::sandbox::Sandbox;
use crate::users::UserError;

/// Most contexts at once: each is a process.
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
    #[error("language '{asked}' is not available in this template; available: {available}")]
    Language {
        /// What was asked for.
        asked: String,
        /// The languages there are, in one text.
        available: String,
    },
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
    /// The language of its cells.
    pub language: &'static str,
    /// Where its kernel started.
    pub cwd: String,
}

#[derive(Debug)]
struct Context {
    info: ContextInfo,
    handle: Handle,
    /// Clients list contexts in the order that they were made in.
    number: u64,
}

#[derive(Debug, Default)]
struct Contexts {
    by_id: BTreeMap<String, Context>,
    /// By the language that a kernel's own default context has: JavaScript's is TypeScript's too,
    /// because a second Deno would take another 170 MiB.
    defaults: BTreeMap<&'static str, String>,
    made: u64,
}

impl Contexts {
    fn default_of(&self, language: &Language) -> Option<&Context> {
        self.by_id.get(self.defaults.get(language.kind.default_language)?)
    }
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

    /// Starts the template's kernels in the background. Needs a Tokio runtime.
    ///
    /// # Errors
    /// When there is no such language, user or directory.
    pub fn warm(&self) -> Result<(), ContextError> {
        self.warm_languages()?.into_iter().try_for_each(|row| self.default_id(row).map(drop))
    }

    /// The languages that the template wants to be there at once: Python before all.
    fn warm_languages(&self) -> Result<Vec<&'static Language>, ContextError> {
        let named = self.sandbox.settings().services.kernels.iter();
        let mut rows = vec![self.language(None)?];
        for name in named {
            let row = self.language(Some(name))?;
            if !rows.iter().any(|held| held.kind.default_language == row.kind.default_language) {
                rows.push(row);
            }
        }
        Ok(rows)
    }

    /// The row of a language that has its program here.
    fn language(&self, asked: Option<&str>) -> Result<&'static Language, ContextError> {
        let is_here =
            |row: &&Language| find_program(row.kind.program, &self.kernel.python).is_some();
        languages::find(asked).filter(is_here).ok_or_else(|| ContextError::Language {
            asked: asked.unwrap_or_default().to_owned(),
            available: languages::all()
                .filter(is_here)
                .map(|row| row.name)
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    /// Runs what cells commonly do first through the template's kernels, on the way that a client's
    /// cells go, and checks what comes back. Leaves no trace that a later cell could see.
    ///
    /// # Errors
    /// When a kernel does not start, and when a cell does not give what it must.
    pub async fn rehearse(&self) -> Result<(), ContextError> {
        for row in self.warm_languages()? {
            let id = self.default_id(row)?;
            let state = self.lock().by_id.get(&id).map(|context| context.handle.state.clone());
            if let State::Failed(reason) = settled(state).await {
                return Err(ContextError::Kernel(format!("{}: {reason}", row.kind.display)));
            }
            for (code, wanted) in row.kind.rehearsals {
                self.rehearse_cell(&id, code, *wanted).await?;
            }
        }
        Ok(())
    }

    async fn rehearse_cell(
        &self,
        id: &str,
        code: &str,
        wanted: Option<&str>,
    ) -> Result<(), ContextError> {
        let mut result = None;
        let mut events = self.queue(code.to_owned(), BTreeMap::new(), id, true)?;
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

    /// How the first of the template's kernels is.
    pub(super) fn default_state(&self) -> State {
        let contexts = self.lock();
        let default = languages::find(None).and_then(|row| contexts.default_of(row));
        default.map_or(State::Starting, |context| context.handle.state.borrow().clone())
    }

    fn default_id(&self, row: &'static Language) -> Result<String, ContextError> {
        let mut contexts = self.lock();
        if let Some(context) = contexts.default_of(row) {
            return Ok(context.info.id.clone());
        }
        let row = self.language(Some(row.kind.default_language))?;
        let info = self.add(&mut contexts, row, None)?;
        contexts.defaults.insert(row.name, info.id.clone());
        Ok(info.id)
    }

    fn add(
        &self,
        contexts: &mut Contexts,
        row: &'static Language,
        cwd: Option<&str>,
    ) -> Result<ContextInfo, ContextError> {
        if contexts.by_id.len() >= CONTEXTS_MAX {
            return Err(ContextError::TooMany);
        }
        let user = self.sandbox.user(None)?;
        let mut path = self.sandbox.resolve_path(cwd.unwrap_or("~"), &user);
        let shown = path.display().to_string();
        if !path.is_dir() && row.kind.may_miss_cwd && cwd.is_some() {
            path = user.home.clone();
        }
        if !path.is_dir() {
            return Err(ContextError::Cwd(shown));
        }
        let id = random_id().map_err(ContextError::Id)?;
        let info = ContextInfo { id: id.clone(), language: row.name, cwd: shown };
        let handle = session::start(SessionConfig {
            kernel: self.kernel.clone(),
            kind: row.kind,
            sandbox: Arc::clone(&self.sandbox),
            user,
            cwd: path,
        });
        contexts.made += 1;
        let number = contexts.made;
        contexts.by_id.insert(id, Context { info: info.clone(), handle, number });
        Ok(info)
    }

    /// Makes a context and waits until it can run a cell.
    pub(super) async fn create(
        &self,
        language: Option<&str>,
        cwd: Option<&str>,
    ) -> Result<ContextInfo, ContextError> {
        let row = self.language(language)?;
        let (info, state) = {
            let mut contexts = self.lock();
            let info = self.add(&mut contexts, row, cwd)?;
            let state = contexts.by_id.get(&info.id).map(|context| context.handle.state.clone());
            (info, state)
        };
        match settled(state).await {
            State::Failed(reason) => {
                self.lock().by_id.remove(&info.id);
                Err(ContextError::Kernel(reason))
            }
            State::Ready => Ok(info),
            State::Starting => Err(ContextError::NotFound(info.id)),
        }
    }

    /// Every context once, the oldest first.
    pub(super) fn list(&self) -> Vec<ContextInfo> {
        let contexts = self.lock();
        let mut all: Vec<&Context> = contexts.by_id.values().collect();
        all.sort_by_key(|context| context.number);
        all.into_iter().map(|context| context.info.clone()).collect()
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
        let id = match context_id {
            Some(id) => id.to_owned(),
            None => self.default_id(self.language(language)?)?,
        };
        self.queue(code, env, &id, false)
    }

    fn queue(
        &self,
        code: String,
        env: BTreeMap<String, String>,
        id: &str,
        rehearsal: bool,
    ) -> Result<mpsc::Receiver<Event>, ContextError> {
        let contexts = self.lock();
        let context =
            contexts.by_id.get(id).ok_or_else(|| ContextError::NotFound(id.to_owned()))?;
        let (events, receiver) = mpsc::channel(EVENTS_AHEAD);
        let job = Job { code, env, rehearsal, events };
        context.handle.jobs.try_send(job).map_err(|_| ContextError::Busy)?;
        Ok(receiver)
    }
}

/// How the kernel of a context came up; still starting means that the context has gone meanwhile.
async fn settled(state: Option<watch::Receiver<State>>) -> State {
    let Some(mut state) = state else { return State::Starting };
    let settled = state.wait_for(|state| *state != State::Starting).await;
    settled.map_or(State::Starting, |state| state.clone())
}
