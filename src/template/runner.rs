//! Runs the build's outside programs: log lines out, cancellation in.
//!
//! Called by every step of a build. Refuses to leave a process behind: each command is the leader
//! of a process group that is killed when the build is cancelled, and that dies with this process.

use std::collections::VecDeque;
use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Log lines that wait to be printed, at most.
const LINES_QUEUED_MAX: usize = 256;
/// Bytes of one log line that are kept.
const LINE_BYTES_MAX: u64 = 4096;
/// Log lines a failure repeats.
const TAIL_LINES: usize = 15;
/// How often a running command is looked at for its end and for a cancellation.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long after a command's end its output may stay open in a process it left behind.
const LINGER: Duration = Duration::from_secs(2);
/// Bytes of output of a command that [`Runner::output`] takes, at most.
const OUTPUT_BYTES_MAX: u64 = 8 << 20;

/// The build was interrupted.
#[derive(Debug)]
pub struct Cancelled;

impl fmt::Display for Cancelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted; nothing was left behind")
    }
}

impl std::error::Error for Cancelled {}

/// Runs commands and prints what they say, each line with its step and the time since the start.
#[derive(Debug)]
pub struct Runner {
    started: Instant,
    cancel: Arc<AtomicBool>,
}

impl Runner {
    /// Starts the clock, and takes SIGINT and SIGTERM as the wish to stop.
    ///
    /// # Errors
    /// When the signals cannot be taken.
    pub fn new() -> Result<Self> {
        let cancel = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&cancel))
                .context("could not watch for SIGINT and SIGTERM")?;
        }
        Ok(Self { started: Instant::now(), cancel })
    }

    /// Prints one line of the build log.
    ///
    /// # Errors
    /// When standard output is closed: nobody watches, so the build stops.
    pub fn say(&self, step: &str, line: &str) -> Result<()> {
        let elapsed = self.started.elapsed().as_secs_f32();
        writeln!(std::io::stdout().lock(), "[{elapsed:7.1}s {step}] {line}")
            .context("could not write the build log to standard output")
    }

    /// Fails when the build was cancelled.
    ///
    /// # Errors
    /// [`Cancelled`].
    pub fn check(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(Cancelled.into());
        }
        Ok(())
    }

    /// Runs a command of `step` to its end and streams its output into the log.
    ///
    /// # Errors
    /// When it cannot be started, fails, or the build is cancelled.
    pub fn run(&self, step: &str, mut command: Command) -> Result<()> {
        self.check()?;
        let program = name_of(&command);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command
            .process_group(0)
            .spawn()
            .with_context(|| format!("could not start `{program}`; is it installed?"))?;
        let mut tail = VecDeque::new();
        let followed = self.follow(step, &mut child, &mut tail);
        if followed.is_err() {
            kill_group(&child);
        }
        let status = child.wait().with_context(|| format!("could not wait for `{program}`"))?;
        followed?;
        if !status.success() {
            let tail = Vec::from(tail).join("\n  ");
            bail!("`{program}` ended with {}; it said last:\n  {tail}", describe(status));
        }
        Ok(())
    }

    /// Runs a short command and returns its standard output.
    ///
    /// # Errors
    /// When it cannot be started or fails.
    pub fn output(&self, mut command: Command) -> Result<String> {
        self.check()?;
        let program = command.get_program().to_string_lossy().into_owned();
        let output = command
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("could not start `{program}`; is it installed?"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("`{program}` ended with {}: {}", describe(output.status), said.trim());
        }
        if output.stdout.len() as u64 > OUTPUT_BYTES_MAX {
            bail!("`{program}` printed more than {OUTPUT_BYTES_MAX} bytes");
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Prints the child's lines until its output ends.
    fn follow(&self, step: &str, child: &mut Child, tail: &mut VecDeque<String>) -> Result<()> {
        let (send, lines) = mpsc::sync_channel(LINES_QUEUED_MAX);
        let stdout = child.stdout.take().context("the child has no standard output")?;
        let stderr = child.stderr.take().context("the child has no standard error")?;
        let second = send.clone();
        std::thread::spawn(move || read_lines(stdout, &send));
        std::thread::spawn(move || read_lines(stderr, &second));
        let mut ended: Option<Instant> = None;
        loop {
            match lines.recv_timeout(LOOK_EVERY) {
                Ok(line) => {
                    self.say(step, &line)?;
                    if tail.len() == TAIL_LINES {
                        tail.pop_front();
                    }
                    tail.push_back(line);
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {
                    if ended.is_none() && child.try_wait()?.is_some() {
                        ended = Some(Instant::now());
                    }
                    if ended.is_some_and(|at| at.elapsed() > LINGER) {
                        return Ok(());
                    }
                }
            }
            self.check()?;
        }
    }
}

/// What a command is called in messages: the program behind the wrappers, which end in `--`.
fn name_of(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    let inner = words.iter().rposition(|word| word == "--").map_or(0, |at| at + 1);
    words.get(inner).map(|word| word.clone().into_owned()).unwrap_or_default()
}

/// Sends each line on, until the end or until nobody listens.
fn read_lines(stream: impl Read, send: &SyncSender<String>) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        // A progress bar draws over itself; its last state is the line.
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end().rsplit('\r').next().unwrap_or_default().to_owned();
        if !text.is_empty() && send.send(text).is_err() {
            return;
        }
    }
}

/// Kills the command and everything it started that is still in its group. When it is the leader
/// of a PID namespace too, the kernel ends all the rest.
fn kill_group(child: &Child) {
    let Some(pid) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) else {
        return;
    };
    if let Err(error) = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL) {
        tracing::warn!(%error, "could not end a build command");
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown status".to_owned(),
    }
}

/// A command that dies with this process, however this process ends.
pub fn bound_to_us(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}
