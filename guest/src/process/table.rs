//! The processes that were started through the service, and what can be done to one.
//!
//! Called by the service. Refuses more than [`PROCESSES_MAX`] entries. An ended process stays to be
//! asked for its exit for [`RETAIN_SECONDS`], or until its place is needed.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Signal, pidfd_send_signal};
use rustix::termios::tcsetwinsize;
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe;
use tokio::sync::Notify;

use super::hub::Hub;
use super::messages::{ListResponse, ProcessConfig, ProcessInfo, PtySize, Selector};
use super::spawn::winsize;
use crate::connect::{Code, ConnectError};

/// Most processes started through the service at once. What they start themselves is the kernel's
/// business.
pub const PROCESSES_MAX: usize = 4096;

/// How long an exit can still be asked for.
pub const RETAIN_SECONDS: u64 = 30;

/// Where input goes.
#[derive(Debug)]
pub enum InputEnd {
    /// Into a pipe, until it is closed.
    Pipe(pipe::Sender),
    /// Into a terminal.
    Pty(pipe::Sender),
    /// Nowhere (any more).
    Closed,
}

/// One process.
#[derive(Debug)]
pub struct Process {
    /// Its process id.
    pub pid: u32,
    /// The tag it was started with.
    pub tag: Option<String>,
    /// What it runs.
    pub config: ProcessConfig,
    /// To signal it.
    pub pidfd: OwnedFd,
    /// Its watchers.
    pub hub: Hub,
    /// Where its input goes. The lock keeps two writers from mixing their bytes.
    pub input: tokio::sync::Mutex<InputEnd>,
    /// Its terminal, for the size, while it runs.
    pub terminal: Mutex<Option<OwnedFd>>,
    /// Somebody ended it; its output need not be waited for.
    pub killed: Notify,
}

fn no_terminal() -> ConnectError {
    ConnectError::new(Code::FailedPrecondition, "tty not assigned to process")
}

impl Process {
    /// Sends a signal. A process that has exited but whose output is still held open by others
    /// counts as ended by a `KILL`.
    ///
    /// # Errors
    /// `not_found` when it is over.
    pub fn signal(&self, signal: Signal) -> Result<(), ConnectError> {
        if self.hub.has_ended() {
            return Err(not_found(&Selector::Pid(self.pid)));
        }
        if signal == Signal::KILL {
            self.killed.notify_one();
        }
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(ConnectError::io("cannot send the signal", &errno.into())),
        }
    }

    /// Writes to its standard input, waiting until it reads or ends.
    ///
    /// # Errors
    /// `failed_precondition` when it has none (any more).
    pub async fn write_stdin(&self, bytes: &[u8]) -> Result<(), ConnectError> {
        match &mut *self.input.lock().await {
            InputEnd::Pipe(pipe) => self.write(pipe, bytes, "error writing to stdin").await,
            InputEnd::Pty(_) => Err(ConnectError::new(
                Code::FailedPrecondition,
                "the process has a terminal; send pty input",
            )),
            InputEnd::Closed => {
                Err(ConnectError::new(Code::FailedPrecondition, "stdin not enabled or closed"))
            }
        }
    }

    /// Writes to its terminal.
    ///
    /// # Errors
    /// `failed_precondition` when it has none.
    pub async fn write_terminal(&self, bytes: &[u8]) -> Result<(), ConnectError> {
        match &mut *self.input.lock().await {
            InputEnd::Pty(pty) => self.write(pty, bytes, "error writing to tty").await,
            _ => Err(no_terminal()),
        }
    }

    /// A child of the process may hold its input open and never read it; the process's own end is
    /// the end of the wait all the same.
    async fn write(
        &self,
        pipe: &mut pipe::Sender,
        bytes: &[u8],
        what: &str,
    ) -> Result<(), ConnectError> {
        let written = tokio::select! {
            biased;
            written = pipe.write_all(bytes) => written,
            () = self.hub.ended() => Err(std::io::ErrorKind::BrokenPipe.into()),
        };
        written.map_err(|error| match error.kind() {
            // That it ended or closed its input is no fault of ours.
            std::io::ErrorKind::BrokenPipe => {
                ConnectError::new(Code::FailedPrecondition, format!("{what}: {error}"))
            }
            _ => ConnectError::io(what, &error),
        })
    }

    /// Closes its standard input. Closing it twice is no error.
    ///
    /// # Errors
    /// `failed_precondition` for a terminal, which ends with a control character instead.
    pub async fn close_stdin(&self) -> Result<(), ConnectError> {
        let mut input = self.input.lock().await;
        if matches!(*input, InputEnd::Pty(_)) {
            return Err(ConnectError::new(
                Code::FailedPrecondition,
                "cannot close stdin for PTY process - send Ctrl+D (0x04) instead",
            ));
        }
        *input = InputEnd::Closed;
        Ok(())
    }

    /// Gives its terminal a size.
    ///
    /// # Errors
    /// `failed_precondition` when it has none.
    pub fn resize(&self, size: PtySize) -> Result<(), ConnectError> {
        let terminal = self.terminal.lock().unwrap_or_else(PoisonError::into_inner);
        let terminal = terminal.as_ref().ok_or_else(no_terminal)?;
        tcsetwinsize(terminal, winsize(size))
            .map_err(|errno| ConnectError::io("error resizing tty", &errno.into()))
    }

    /// Gives the terminal's descriptor back.
    pub fn close_terminal(&self) {
        *self.terminal.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The error for a process that is not there.
#[must_use]
pub fn not_found(selector: &Selector) -> ConnectError {
    ConnectError::not_found(match selector {
        Selector::Pid(pid) => format!("process with pid {pid} not found"),
        Selector::Tag(tag) => format!("process with tag {tag} not found"),
    })
}

/// All of them, by process id.
#[derive(Debug, Default)]
pub struct Table(Mutex<BTreeMap<u32, Arc<Process>>>);

impl Table {
    fn with<R>(&self, work: impl FnOnce(&mut BTreeMap<u32, Arc<Process>>) -> R) -> R {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Refuses when there is no room for another.
    ///
    /// # Errors
    /// `resource_exhausted`.
    pub fn check_room(&self) -> Result<(), ConnectError> {
        self.with(|table| {
            if table.len() >= PROCESSES_MAX {
                table.retain(|_, process| !process.hub.has_ended());
            }
            if table.len() < PROCESSES_MAX {
                return Ok(());
            }
            Err(ConnectError::new(
                Code::ResourceExhausted,
                format!("{PROCESSES_MAX} processes run already; end one first"),
            ))
        })
    }

    /// Adds a process. An ended one with the same reused id gives way.
    pub fn add(&self, process: Arc<Process>) {
        self.with(|table| table.insert(process.pid, process));
    }

    /// Takes this very process out.
    pub fn remove(&self, process: &Arc<Process>) {
        self.with(|table| {
            if table.get(&process.pid).is_some_and(|held| Arc::ptr_eq(held, process)) {
                table.remove(&process.pid);
            }
        });
    }

    /// Finds a process that runs, or ended a short while ago.
    ///
    /// # Errors
    /// `not_found`.
    pub fn find(&self, selector: &Selector) -> Result<Arc<Process>, ConnectError> {
        self.with(|table| match selector {
            Selector::Pid(pid) => table.get(pid).cloned(),
            Selector::Tag(tag) => {
                let has_tag = |process: &&Arc<Process>| process.tag.as_ref() == Some(tag);
                let running = |process: &&Arc<Process>| !process.hub.has_ended();
                let all = || table.values().filter(has_tag);
                all().find(running).or_else(|| all().next()).cloned()
            }
        })
        .ok_or_else(|| not_found(selector))
    }

    /// Finds a process that still runs.
    ///
    /// # Errors
    /// `not_found`.
    pub fn find_running(&self, selector: &Selector) -> Result<Arc<Process>, ConnectError> {
        let process = self.find(selector)?;
        if process.hub.has_ended() { Err(not_found(selector)) } else { Ok(process) }
    }

    /// Every process that runs.
    pub fn list(&self) -> ListResponse {
        let info = |process: &Arc<Process>| ProcessInfo {
            config: Some(process.config.clone()),
            pid: process.pid,
            tag: process.tag.clone(),
        };
        let running = |process: &&Arc<Process>| !process.hub.has_ended();
        ListResponse {
            processes: self.with(|table| table.values().filter(running).map(info).collect()),
        }
    }
}
