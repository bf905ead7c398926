//! One kernel process and its ZeroMQ connection.
//!
//! Called by [`super::session`]. What it starts and how it speaks to it stands in the kernel's row
//! (`languages`), where they meet in `endpoints`. Refuses to wait longer than its deadline for a
//! kernel to come up.
//!
//! A message's size is looked at when it has been received: the `zeromq` crate has no limit of its
//! own. So user code that writes an endless frame into a kernel's socket can exhaust the guest's
//! memory, which it can do in any process of its sandbox, and in its own sandbox only.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::Child;
use tokio::time::{Instant, sleep, timeout_at};
use zeromq::{DealerSocket, Socket as _, SocketRecv as _, SocketSend as _, SubSocket, ZmqMessage};

use super::endpoints::{self, Channel, Endpoints, Home};
use super::languages::{Arg, Interrupt, Kind};
use super::launch::{LaunchError, LaunchSpec, Launcher, find_program, find_shared};
use super::output::{OwnOutput, PIPE_BYTES, Tail, keep_tail, text};
use super::protocol::{self, Body, Incoming, Key, ProtocolError, Request};
use crate::users::User;

/// How long a kernel may take to come up. A guest under nested emulation needs over a minute.
pub const START_DEADLINE: Duration = Duration::from_secs(600);

/// How often the start looks whether the kernel has made its sockets.
const POLL: Duration = Duration::from_millis(10);

/// How long one question for the kernel's state waits before it is asked again. A subscription
/// may reach the kernel after its first answers have gone out.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// How often a kernel is started that ends at once: somebody may have taken a port of its own in
/// the moment between the choice and the start.
const STARTS_MAX: usize = 3;

/// Why a kernel is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("cannot make the kernel's directory {path}")]
    Directory {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot prepare the kernel process")]
    Launch(#[source] LaunchError),
    #[error("{name} is not in this template")]
    Missing { name: &'static str },
    #[error("cannot choose ports for the kernel")]
    Ports(#[source] std::io::Error),
    #[error("cannot start {program}; the template needs Python with ipykernel")]
    Spawn {
        program: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the kernel ended ({status}) before it answered; its last output: {output}")]
    EndedEarly { status: String, output: String },
    #[error("the kernel did not answer within {} s; its last output: {output}", START_DEADLINE.as_secs())]
    TimedOut { output: String },
    #[error("cannot draw random bytes for the kernel's key")]
    Random(#[source] rustix::io::Errno),
    #[error("the connection to the kernel failed")]
    Connection(#[source] zeromq::ZmqError),
}

/// What all kernels of an interpreter have in common.
#[derive(Clone)]
pub struct KernelConfig {
    pub launcher: Launcher,
    pub python: PathBuf,
    /// Parent of the kernels' own directories; unix socket paths are short, so this must be too.
    pub directory: PathBuf,
}

/// What comes out of a kernel while a cell runs.
#[derive(Debug)]
pub enum Signalled {
    Message(Incoming),
    /// What the process itself, or one that it started, wrote to its standard output.
    OwnStdout(String),
    /// A message that could not be read; the connection goes on.
    Unreadable(ProtocolError),
    /// The process has ended: its status, as text.
    Ended(String),
}

/// A kernel that has answered.
pub struct Kernel {
    child: Child,
    pid: Option<Pid>,
    interrupt: Interrupt,
    shell: DealerSocket,
    iopub: SubSocket,
    control: DealerSocket,
    key: Key,
    session: String,
    directory: PathBuf,
    endpoints: Endpoints,
    /// Read here where it is the cell's output, and otherwise for the tail.
    own: OwnOutput,
    /// What has happened, and is told when what was written before it has been.
    held: Option<Signalled>,
    /// Bytes of own output since then.
    own_since_held: usize,
    tail: Tail,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// A random identifier in the form of a UUID.
///
/// # Errors
/// When the system gives no random bytes.
pub fn random_id() -> Result<String, KernelError> {
    let bytes = random::<16>()?;
    let text = protocol::hex(&bytes);
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32];
    Ok(parts.map(|range| text.get(range).unwrap_or_default().to_owned()).join("-"))
}

fn random<const N: usize>() -> Result<[u8; N], KernelError> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())
            .map_err(KernelError::Random)?;
    }
    Ok(bytes)
}

impl Kernel {
    /// Starts a kernel and waits until it answers and its output can be heard.
    ///
    /// # Errors
    /// See [`KernelError`]; nothing is left behind.
    pub async fn start(
        config: &KernelConfig,
        kind: &Kind,
        user: &User,
        cwd: &Path,
        env: BTreeMap<String, String>,
    ) -> Result<Self, KernelError> {
        let deadline = Instant::now() + START_DEADLINE;
        let mut starts = 0;
        loop {
            starts += 1;
            let mut kernel = Self::spawn(config, kind, user, cwd, env.clone())?;
            let Err(error) = kernel.come_up(deadline).await else { return Ok(kernel) };
            let is_tcp = matches!(kernel.endpoints, Endpoints::Tcp(_));
            kernel.stop().await;
            let may_be_taken = is_tcp && matches!(error, KernelError::EndedEarly { .. });
            if !may_be_taken || starts == STARTS_MAX {
                return Err(error);
            }
        }
    }

    fn spawn(
        config: &KernelConfig,
        kind: &Kind,
        user: &User,
        cwd: &Path,
        env: BTreeMap<String, String>,
    ) -> Result<Self, KernelError> {
        let program = find_program(kind.program, &config.python)
            .ok_or(KernelError::Missing { name: kind.display })?;
        let directory = config.directory.join(protocol::hex(&random::<6>()?));
        let key = Key::new(protocol::hex(&random::<32>()?));
        let session = random_id()?;
        let endpoints =
            Endpoints::choose(kind.transport, &directory).map_err(KernelError::Ports)?;
        let home = Home::make(directory, kind, &endpoints, &key, user)?;
        let args = arguments(kind, &home, &config.python);
        let spec = LaunchSpec { program, args, env, cwd: cwd.to_owned(), user: user.clone() };
        let child = match start_process(config, &spec) {
            Ok(child) => child,
            Err(error) => {
                endpoints::remove(&home.directory);
                return Err(error);
            }
        };
        let mut kernel = Self {
            pid: child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw),
            child,
            interrupt: kind.interrupt,
            shell: DealerSocket::new(),
            iopub: SubSocket::new(),
            control: DealerSocket::new(),
            key,
            session,
            directory: home.directory,
            endpoints,
            own: OwnOutput::default(),
            held: None,
            own_since_held: 0,
            tail: Tail::default(),
        };
        kernel.read_output(kind.shows_own_stdout);
        Ok(kernel)
    }

    fn read_output(&mut self, shows_own_stdout: bool) {
        if let Some(stderr) = self.child.stderr.take() {
            tokio::spawn(keep_tail(stderr, Arc::clone(&self.tail)));
        }
        match self.child.stdout.take() {
            Some(stdout) if shows_own_stdout => self.own = OwnOutput::of(stdout),
            Some(stdout) => drop(tokio::spawn(keep_tail(stdout, Arc::clone(&self.tail)))),
            None => {}
        }
    }

    async fn come_up(&mut self, deadline: Instant) -> Result<(), KernelError> {
        for channel in [Channel::Shell, Channel::Iopub, Channel::Control] {
            while !self.endpoints.is_open(channel).await {
                self.still_starting(deadline, POLL).await?;
            }
        }
        let address = |channel| self.endpoints.address(channel);
        let connect = async {
            self.iopub.connect(&address(Channel::Iopub)).await?;
            self.iopub.subscribe("").await?;
            if self.interrupt == Interrupt::Message {
                self.control.connect(&address(Channel::Control)).await?;
            }
            self.shell.connect(&address(Channel::Shell)).await
        };
        match timeout_at(deadline, connect).await {
            Ok(connected) => connected.map_err(KernelError::Connection)?,
            Err(_) => return Err(KernelError::TimedOut { output: text(&self.tail) }),
        }
        let (mut answered, mut heard) = (false, false);
        let (mut asked, mut pause) = (Vec::new(), ASK_AGAIN);
        while !(answered && heard) {
            asked.push(self.send(&Request::KernelInfo).await?);
            let again = (Instant::now() + pause).min(deadline);
            // A slow kernel must get through what it is asked faster than it is asked more.
            pause *= 2;
            while !(answered && heard) && Instant::now() < again {
                match timeout_at(again, self.next()).await {
                    Ok(Signalled::Message(message)) => match message.body {
                        Body::KernelInfo => answered = true,
                        Body::Busy | Body::Idle if asked.contains(&message.parent_id) => {
                            heard = true;
                        }
                        _ => {}
                    },
                    Ok(Signalled::Unreadable(_) | Signalled::OwnStdout(_)) | Err(_) => {}
                    Ok(Signalled::Ended(status)) => {
                        return Err(KernelError::EndedEarly { status, output: text(&self.tail) });
                    }
                }
            }
            if Instant::now() >= deadline {
                return Err(KernelError::TimedOut { output: text(&self.tail) });
            }
        }
        Ok(())
    }

    /// Waits a moment, unless the process ends or the deadline passes.
    async fn still_starting(
        &mut self,
        deadline: Instant,
        moment: Duration,
    ) -> Result<(), KernelError> {
        tokio::select! {
            status = self.child.wait() => {
                let status = status_text(status);
                Err(KernelError::EndedEarly { status, output: text(&self.tail) })
            }
            () = sleep(moment) => {
                if Instant::now() < deadline {
                    Ok(())
                } else {
                    Err(KernelError::TimedOut { output: text(&self.tail) })
                }
            }
        }
    }

    /// Sends a request on the shell channel; the answers carry the id that comes back.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn send(&mut self, request: &Request<'_>) -> Result<String, KernelError> {
        let (id, message) = self.message(request)?;
        self.shell.send(message).await.map_err(KernelError::Connection)?;
        Ok(id)
    }

    fn message(&self, request: &Request<'_>) -> Result<(String, ZmqMessage), KernelError> {
        let id = random_id()?;
        let frames = protocol::encode(request, &id, &self.session, &now(), &self.key);
        // `encode` always makes six frames, so this is never the empty message.
        let message = ZmqMessage::try_from(frames).map_err(|_| {
            KernelError::Connection(zeromq::ZmqError::Other("a request without frames"))
        })?;
        Ok((id, message))
    }

    /// The next thing that happens. May be dropped and called again at any point.
    pub async fn next(&mut self) -> Signalled {
        loop {
            // What was written before a message is there before it. But that is no more than a pipe holds:
            // who writes without pause must not hold back that his cell is over.
            if self.held.is_some() {
                if self.own_since_held < PIPE_BYTES
                    && let Some((text, count)) = self.own.at_once()
                {
                    self.own_since_held += count;
                    return Signalled::OwnStdout(text);
                }
                self.own_since_held = 0;
                if let Some(held) = self.held.take() {
                    return held;
                }
            }
            let received = tokio::select! {
                biased;
                message = self.iopub.recv() => message,
                message = self.shell.recv() => message,
                status = self.child.wait() => {
                    self.held = Some(Signalled::Ended(status_text(status)));
                    continue;
                }
                text = self.own.next(), if self.own.is_open() => {
                    return Signalled::OwnStdout(text);
                }
            };
            self.held = Some(match received {
                Ok(message) => self.read(message),
                // The sockets fail when the process ends; its end is reported, not their failure.
                Err(_) => Signalled::Ended(status_text(self.child.wait().await)),
            });
        }
    }

    fn read(&self, message: ZmqMessage) -> Signalled {
        let frames: Vec<Bytes> = message.into_vec();
        match protocol::decode(&frames, &self.key) {
            Ok(message) => Signalled::Message(message),
            Err(error) => Signalled::Unreadable(error),
        }
    }

    /// Has the kernel give up its cell; by signal, what the cell has started is interrupted too.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn interrupt(&mut self) -> Result<(), KernelError> {
        if self.interrupt == Interrupt::Signal {
            self.signal(Signal::INT);
            return Ok(());
        }
        let (_, message) = self.message(&Request::Interrupt)?;
        self.control.send(message).await.map_err(KernelError::Connection)
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid {
            // The group may be gone already, and then there is nothing to signal.
            kill_process_group(pid, signal).unwrap_or_default();
        }
    }

    /// Ends the process and what it has started, removes the kernel's directory, and waits until
    /// the process is gone.
    pub async fn stop(mut self) {
        self.end();
        // An error here means that the process has been waited for before.
        drop(self.child.wait().await);
    }

    fn end(&mut self) {
        self.signal(Signal::KILL);
        // The number may become another process's from here on.
        self.pid = None;
        // One that has only just begun does not lead a group yet. It may also have ended.
        self.child.start_kill().unwrap_or_default();
        endpoints::remove(&self.directory);
    }
}

/// A start that is given up half-way leaves nothing behind either.
impl Drop for Kernel {
    fn drop(&mut self) {
        self.end();
    }
}

fn start_process(config: &KernelConfig, spec: &LaunchSpec) -> Result<Child, KernelError> {
    let mut command = (config.launcher)(spec).map_err(KernelError::Launch)?;
    command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .kill_on_drop(true);
    command.spawn().map_err(|source| KernelError::Spawn { program: spec.program.clone(), source })
}

fn arguments(kind: &Kind, home: &Home, python: &Path) -> Vec<OsString> {
    let argument = |arg: &Arg| match arg {
        Arg::Text(text) => OsString::from(text),
        Arg::File(name, _) => home.directory.join(name).into_os_string(),
        Arg::Connection => home.connection.clone().into_os_string(),
        // Where it is not there, the program says which file it misses.
        Arg::Shared(name) => {
            find_shared(name, python).unwrap_or_else(|| PathBuf::from(name)).into_os_string()
        }
    };
    kind.args.iter().map(argument).collect()
}

fn status_text(status: std::io::Result<std::process::ExitStatus>) -> String {
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}

/// The current time in ISO 8601.
pub fn now() -> String {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    crate::filesystem::rfc3339(since.as_secs().try_into().unwrap_or(0), since.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_the_form_of_a_uuid_and_differ() {
        let (a, b) = (random_id().unwrap(), random_id().unwrap());
        assert_ne!(a, b);
        let lengths: Vec<usize> = a.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12]);
    }
}
