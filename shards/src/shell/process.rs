//! One VM process, from outside: its death, its pages, its last words.
//!
//! Called by whoever holds a shell. A process may be ours (started by this daemon, and reaped by it)
//! or adopted from one before; both are watched and signalled through a pidfd, never by number.
//! Refuses to leave a process of ours unreaped.

use std::cell::RefCell;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ChildStderr;
use std::time::Duration;

use mica_numa::process::{Pagemap, Process, ProcessError};
use mica_numa::rt::{self, time};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};

use crate::console;

/// How long a killed VM process may take to end before the log says so, again and again.
const END_WARNING: Duration = Duration::from_secs(10);

/// Most bytes of a VM process's standard error that an error carries.
const STDERR_BYTES_MAX: usize = 1024;

/// Why a process cannot be held.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// It is gone, or not ours to look into.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// Its start cannot be read.
    #[error("its entry in /proc cannot be read")]
    Proc(#[from] std::io::Error),
    /// Its standard error cannot be read without waiting.
    #[error("its standard error cannot be set up")]
    Stderr(#[from] Errno),
}

/// A VM process: alive, or dead and not yet reaped.
#[derive(Debug)]
pub(crate) struct VmProcess {
    process: Process,
    start_ticks: u64,
    pagemap: Pagemap,
    stderr: RefCell<Option<ChildStderr>>,
}

impl VmProcess {
    /// Takes hold of a process by its number, which must not have been reaped yet or must be known
    /// to be the one meant. Its standard error is taken only when that works.
    pub(crate) fn open(pid: Pid, stderr: &mut Option<ChildStderr>) -> Result<Self, OpenError> {
        let process = Process::open(pid)?;
        let pagemap = process.pagemap()?;
        let start_ticks = start_ticks(pid)?;
        if let Some(pipe) = stderr {
            rustix::io::ioctl_fionbio(&*pipe, true)?;
        }
        Ok(Self { process, start_ticks, pagemap, stderr: RefCell::new(stderr.take()) })
    }

    /// Its number on this host.
    pub(crate) fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// The process, for its memory.
    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    /// When it was started, in clock ticks since the machine was.
    pub(crate) fn start_ticks(&self) -> u64 {
        self.start_ticks
    }

    /// Whether it has not ended yet.
    pub(crate) fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.process, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A poll that fails says nothing; the first command finds out.
        !matches!(poll(&mut fds, Some(&now)), Ok(1..))
    }

    /// Its pages.
    pub(crate) fn pagemap(&self) -> &Pagemap {
        &self.pagemap
    }

    /// A duplicate of one of its descriptors.
    pub(crate) fn descriptor(&self, number: i32) -> Result<OwnedFd, ProcessError> {
        self.process.getfd(number)
    }

    /// Kills it, waits for its death without blocking, and reaps it if it is ours.
    pub(crate) async fn end(&self, name: &impl std::fmt::Display) {
        if let Err(errno) = rustix::process::pidfd_send_signal(&self.process, Signal::KILL)
            && errno != Errno::SRCH
        {
            tracing::error!(%name, %errno, "cannot kill a VM process");
        }
        loop {
            match time::timeout(END_WARNING, rt::readable(&self.process)).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => {
                    tracing::error!(%name, %error, "cannot wait for a VM process; asking again");
                    time::sleep(Duration::from_millis(100)).await;
                }
                Err(time::Elapsed) => tracing::error!(%name, "a killed VM process does not end"),
            }
        }
        // It is dead, so this does not block.
        let reaped =
            rustix::process::waitid(WaitId::PidFd(self.process.as_fd()), WaitIdOptions::EXITED);
        match reaped {
            // An adopted one is a child of init.
            Ok(_) | Err(Errno::CHILD) => tracing::debug!(%name, "VM process ended"),
            Err(errno) => tracing::error!(%name, %errno, "cannot reap a VM process"),
        }
    }

    /// What it wrote to its standard error, as harmless text; reads once, does not wait.
    pub(crate) fn complaint(&self) -> String {
        self.stderr.borrow_mut().as_mut().map(last_words).unwrap_or_default()
    }
}

/// The first that waits in a pipe that does not block, as harmless text.
pub(super) fn last_words(pipe: &mut ChildStderr) -> String {
    let mut bytes = [0u8; STDERR_BYTES_MAX];
    let length = pipe.read(&mut bytes).unwrap_or(0);
    console::sanitise(&bytes[..length]).trim().to_owned()
}

/// Field 22 of `/proc/PID/stat` (`proc_pid_stat(5)`). The second may hold anything, so what counts
/// comes after its last parenthesis.
pub(crate) fn start_ticks(pid: Pid) -> std::io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))?;
    let rest = stat.rsplit_once(") ").map(|(_, rest)| rest);
    let field = rest.and_then(|rest| rest.split(' ').nth(19)?.parse().ok());
    field.ok_or_else(|| std::io::ErrorKind::InvalidData.into())
}
