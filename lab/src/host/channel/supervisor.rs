//! Keeps the daemon running inside the host.
//!
//! Used by the exec channel's server only. One thread owns the child process. A daemon that ends
//! by itself is started again after `RESTART_PAUSE`, as a service manager would; one that ends
//! `QUICK_ENDS_MAX` times in a row without having run for `STEADY` is given up, so that a broken
//! build does not spin for ever. A daemon that was killed did not end by itself, and does not count.

use anyhow::{Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Where the daemon's output goes, inside the host.
pub const DAEMON_LOG: &str = "/var/log/mica.log";

const RESTART_PAUSE: Duration = Duration::from_millis(200);
const STEADY: Duration = Duration::from_secs(10);
const QUICK_ENDS_MAX: u32 = 5;
/// A daemon that drains gracefully gets this long before SIGKILL.
const TERM_MAX: Duration = Duration::from_secs(20);
const KILL_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    NeverStarted,
    Runs { pid: u32, starts: u32 },
    Stopped { last: String },
}

impl Status {
    pub fn runs(&self) -> bool {
        matches!(self, Status::Runs { .. })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Status::NeverStarted => f.write_str("never started"),
            Status::Runs { pid, starts } => write!(f, "runs as pid {pid}, started {starts} times"),
            Status::Stopped { last } => write!(f, "stopped: {last}"),
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    /// What should run; `None` when nothing should.
    wanted: Option<Vec<String>>,
    pid: Option<u32>,
    starts: u32,
    quick_ends: u32,
    /// How it last ended, or why it could not start.
    last: Option<String>,
}

#[derive(Debug, Default)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Shared {
    /// A thread that panicked leaves plain data behind, which is still true.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, at most `patience`. Says whether it came true.
    fn wait(&self, patience: Duration, done: impl Fn(&Inner) -> bool) -> bool {
        let (inner, _) = self
            .changed
            .wait_timeout_while(self.lock(), patience, |inner| !done(inner))
            .unwrap_or_else(PoisonError::into_inner);
        done(&inner)
    }
}

#[derive(Debug)]
pub struct Supervisor {
    shared: Arc<Shared>,
    log: String,
}

impl Supervisor {
    pub fn start() -> Supervisor {
        Supervisor::with_log(DAEMON_LOG)
    }

    fn with_log(log: &str) -> Supervisor {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let path = log.to_owned();
        thread::spawn(move || keep(&theirs, &path));
        Supervisor { shared, log: log.to_owned() }
    }

    /// Stops what runs and starts `argv`. Returns when it was started, not when it is ready.
    pub fn restart(&self, argv: Vec<String>) -> Result<()> {
        if argv.is_empty() {
            bail!("there is no daemon program to start");
        }
        self.stop()?;
        let mut inner = self.shared.lock();
        let before = inner.starts;
        inner.wanted = Some(argv);
        inner.quick_ends = 0;
        inner.last = None;
        drop(inner);
        self.shared.changed.notify_all();
        let begun = |inner: &Inner| inner.starts > before || inner.last.is_some();
        self.shared.wait(KILL_MAX, begun);
        match self.status() {
            Status::Runs { .. } => Ok(()),
            other => {
                bail!("the daemon did not start ({other}); its log is {} in the host", self.log)
            }
        }
    }

    /// SIGTERM, then SIGKILL. Fine when nothing runs.
    pub fn stop(&self) -> Result<()> {
        let mut inner = self.shared.lock();
        inner.wanted = None;
        drop(inner);
        self.shared.changed.notify_all();
        for (signal, patience) in [(Signal::TERM, TERM_MAX), (Signal::KILL, KILL_MAX)] {
            self.signal(signal);
            if self.shared.wait(patience, |inner| inner.pid.is_none()) {
                return Ok(());
            }
        }
        bail!("the daemon survived SIGKILL for {KILL_MAX:?}")
    }

    pub fn status(&self) -> Status {
        let inner = self.shared.lock();
        match (inner.pid, &inner.last) {
            (Some(pid), _) => Status::Runs { pid, starts: inner.starts },
            (None, Some(last)) => Status::Stopped { last: last.clone() },
            (None, None) => Status::NeverStarted,
        }
    }

    /// The lock is held, and the keeper reaps under it: the pid cannot be somebody else's yet.
    fn signal(&self, signal: Signal) {
        let inner = self.shared.lock();
        let pid = inner.pid.and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid
            && let Err(error) = kill_process(pid, signal)
        {
            eprintln!("mica-lab inside: {signal:?} to the daemon: {error}");
        }
    }
}

/// The thread that owns the child.
fn keep(shared: &Shared, log: &str) {
    loop {
        let inner = shared
            .changed
            .wait_while(shared.lock(), |inner| inner.wanted.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        let argv = inner.wanted.clone().unwrap_or_default();
        drop(inner);
        let started = Instant::now();
        let (ended, killed) = match spawn(&argv, log) {
            Ok(child) => watch(shared, child),
            Err(error) => (format!("cannot start {}: {error}", argv.join(" ")), false),
        };
        eprintln!("mica-lab inside: daemon: {ended}");
        let quick = started.elapsed() < STEADY && !killed;
        let mut inner = shared.lock();
        inner.pid = None;
        inner.last = Some(ended);
        inner.quick_ends = if quick { inner.quick_ends + 1 } else { 0 };
        if inner.quick_ends >= QUICK_ENDS_MAX {
            inner.wanted = None;
        }
        drop(inner);
        shared.changed.notify_all();
        // A pause that a stop cuts short.
        shared.wait(RESTART_PAUSE, |inner| inner.wanted.is_none());
    }
}

fn spawn(argv: &[String], log: &str) -> io::Result<Child> {
    let (program, arguments) =
        argv.split_first().ok_or_else(|| io::Error::other("empty command"))?;
    let file = OpenOptions::new().create(true).append(true).open(log)?;
    Command::new(program)
        .args(arguments)
        .current_dir("/")
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
}

/// Waits without reaping first, so that the pid stays ours until the lock is held. How it ended, and
/// whether somebody killed it.
fn watch(shared: &Shared, mut child: Child) -> (String, bool) {
    let mut inner = shared.lock();
    inner.pid = Some(child.id());
    inner.starts += 1;
    drop(inner);
    shared.changed.notify_all();
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let seen = rustix::process::waitid(
            rustix::process::WaitId::Pid(pid),
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
        );
        if let Err(error) = seen {
            eprintln!("mica-lab inside: wait for the daemon: {error}");
        }
    }
    let mut inner = shared.lock();
    inner.pid = None;
    match child.wait() {
        Ok(status) => (status.to_string(), status.signal() == Some(Signal::KILL.as_raw())),
        Err(error) => (format!("lost track of it: {error}"), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supervisor() -> Supervisor {
        Supervisor::with_log("/dev/null")
    }

    fn argv(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn starts_stops_and_starts_again_after_a_crash() {
        let it = supervisor();
        assert_eq!(it.status(), Status::NeverStarted);
        it.restart(argv(&["/bin/sleep", "1000"])).unwrap();
        // More often than a broken one is started: a killed one is not given up.
        for start in 1..=QUICK_ENDS_MAX + 2 {
            let Status::Runs { pid, starts } = it.status() else { panic!("{}", it.status()) };
            assert_eq!(starts, start);
            let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
            kill_process(pid, Signal::KILL).unwrap();
            let again = |inner: &Inner| inner.starts == start + 1 && inner.pid.is_some();
            assert!(it.shared.wait(Duration::from_secs(10), again));
        }
        it.stop().unwrap();
        assert!(!it.status().runs());
        assert!(it.status().to_string().contains("signal: 15"), "{}", it.status());
    }

    #[test]
    fn one_that_ends_by_itself_at_once_is_given_up() {
        let it = supervisor();
        it.restart(argv(&["/bin/sh", "-c", "sleep 0.1; exit 1"])).unwrap();
        let given_up = |inner: &Inner| inner.wanted.is_none();
        assert!(it.shared.wait(Duration::from_secs(30), given_up));
        assert_eq!(it.shared.lock().starts, QUICK_ENDS_MAX);
        assert!(it.status().to_string().contains("exit status: 1"), "{}", it.status());
    }

    #[test]
    fn a_missing_program_is_an_error_that_names_it() {
        let error = supervisor().restart(argv(&["/nonexistent/mica"])).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/mica"), "{error}");
    }
}
