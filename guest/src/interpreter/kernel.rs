//! One ipykernel process and its ZeroMQ connection.
//!
//! Called by [`super::session`]. The sockets are unix sockets in a directory that only the
//! kernel's user and root may enter, so no other user of the guest can speak to a kernel and no
//! port of the guest is taken. Refuses to wait longer than its deadline for a kernel to come up.
//!
//! A message's size is looked at when it has been received: the `zeromq` crate has no limit of its
//! own. So user code that writes an endless frame into a kernel's socket can exhaust the guest's
//! memory, which it can do in any process of its sandbox, and in its own sandbox only.

use std::collections::VecDeque;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Child;
use tokio::time::{Instant, sleep, timeout_at};
use zeromq::{DealerSocket, Socket as _, SocketRecv as _, SocketSend as _, SubSocket, ZmqMessage};

use super::launch::{LaunchError, LaunchSpec, Launcher};
use super::protocol::{self, Body, Incoming, Key, ProtocolError, Request};
use crate::users::User;

/// What every kernel process runs. Written beside its connection file: the agent brings its own,
/// whatever template it is in.
const PROGRAM: &str = include_str!("kernel.py");

/// How long a kernel may take to come up. A guest under nested emulation needs over a minute.
pub const START_DEADLINE: Duration = Duration::from_secs(600);

/// How often the start looks whether the kernel has made its sockets.
const POLL: Duration = Duration::from_millis(10);

/// How long one question for the kernel's state waits before it is asked again. A subscription
/// may reach the kernel after its first answers have gone out.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// What is kept of the process's own output, to explain a start that failed.
const OUTPUT_TAIL_BYTES: usize = 4096;

/// The end of what a process wrote.
type Tail = Arc<Mutex<VecDeque<u8>>>;

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
    /// A message that could not be read; the connection goes on.
    Unreadable(ProtocolError),
    /// The process has ended: its status, as text.
    Ended(String),
}

/// A kernel that has answered.
pub struct Kernel {
    child: Child,
    pid: Option<Pid>,
    shell: DealerSocket,
    iopub: SubSocket,
    key: Key,
    session: String,
    directory: PathBuf,
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
        user: &User,
        cwd: &Path,
        env: std::collections::BTreeMap<String, String>,
    ) -> Result<Self, KernelError> {
        let deadline = Instant::now() + START_DEADLINE;
        let directory = config.directory.join(protocol::hex(&random::<6>()?));
        let key = Key::new(protocol::hex(&random::<32>()?));
        let (program, connection) = make_directory(&directory, &key, user)?;
        let spec = LaunchSpec {
            program: config.python.clone(),
            args: vec![
                program.into_os_string(),
                "-f".into(),
                connection.into_os_string(),
                // Kernels would share one history file, each writing to the disk for every cell.
                "--HistoryManager.hist_file=:memory:".into(),
            ],
            env,
            cwd: cwd.to_owned(),
            user: user.clone(),
        };
        let started = Self::spawn(config, spec, directory.clone(), key);
        let mut kernel = match started {
            Ok(kernel) => kernel,
            Err(error) => {
                remove_directory(&directory);
                return Err(error);
            }
        };
        match kernel.come_up(deadline).await {
            Ok(()) => Ok(kernel),
            Err(error) => {
                kernel.stop().await;
                Err(error)
            }
        }
    }

    fn spawn(
        config: &KernelConfig,
        spec: LaunchSpec,
        directory: PathBuf,
        key: Key,
    ) -> Result<Self, KernelError> {
        let mut command = (config.launcher)(&spec).map_err(KernelError::Launch)?;
        command
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .kill_on_drop(true);
        let mut child = command
            .spawn()
            .map_err(|source| KernelError::Spawn { program: spec.program.clone(), source })?;
        let tail = Tail::default();
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(keep_tail(stdout, Arc::clone(&tail)));
        }
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(keep_tail(stderr, Arc::clone(&tail)));
        }
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        Ok(Self {
            child,
            pid,
            shell: DealerSocket::new(),
            iopub: SubSocket::new(),
            key,
            session: random_id()?,
            directory,
            tail,
        })
    }

    async fn come_up(&mut self, deadline: Instant) -> Result<(), KernelError> {
        for port in [Port::Shell, Port::Iopub] {
            let path = port.path(&self.directory);
            while !path.exists() {
                self.still_starting(deadline, POLL).await?;
            }
        }
        let shell = endpoint(Port::Shell, &self.directory);
        let iopub = endpoint(Port::Iopub, &self.directory);
        let connect = async {
            self.iopub.connect(&iopub).await?;
            self.iopub.subscribe("").await?;
            self.shell.connect(&shell).await
        };
        match timeout_at(deadline, connect).await {
            Ok(connected) => connected.map_err(KernelError::Connection)?,
            Err(_) => return Err(KernelError::TimedOut { output: text(&self.tail) }),
        }
        let (mut answered, mut heard) = (false, false);
        while !(answered && heard) {
            let asked = self.send(&Request::KernelInfo).await?;
            let again = Instant::now() + ASK_AGAIN;
            while !(answered && heard) && Instant::now() < again {
                match timeout_at(again, self.next()).await {
                    Ok(Signalled::Message(message)) => match message.body {
                        Body::KernelInfo => answered = true,
                        Body::Busy | Body::Idle if message.parent_id == asked => heard = true,
                        _ => {}
                    },
                    Ok(Signalled::Unreadable(_)) | Err(_) => {}
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
        let id = random_id()?;
        let frames = protocol::encode(request, &id, &self.session, &now(), &self.key);
        // `encode` always makes six frames, so this is never the empty message.
        let message = ZmqMessage::try_from(frames).map_err(|_| {
            KernelError::Connection(zeromq::ZmqError::Other("a request without frames"))
        })?;
        self.shell.send(message).await.map_err(KernelError::Connection)?;
        Ok(id)
    }

    /// The next thing that happens. May be dropped and called again at any point.
    pub async fn next(&mut self) -> Signalled {
        let received = tokio::select! {
            biased;
            message = self.iopub.recv() => message,
            message = self.shell.recv() => message,
            status = self.child.wait() => return Signalled::Ended(status_text(status)),
        };
        // The sockets fail when the process ends; its end is reported, not their failure.
        let Ok(message) = received else {
            return Signalled::Ended(status_text(self.child.wait().await));
        };
        let frames: Vec<Bytes> = message.into_vec();
        match protocol::decode(&frames, &self.key) {
            Ok(message) => Signalled::Message(message),
            Err(error) => Signalled::Unreadable(error),
        }
    }

    /// Raises `KeyboardInterrupt` in the cell, and interrupts what it has started.
    pub fn interrupt(&self) {
        self.signal(Signal::INT);
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
        remove_directory(&self.directory);
    }
}

/// A start that is given up half-way leaves nothing behind either.
impl Drop for Kernel {
    fn drop(&mut self) {
        self.end();
    }
}

/// The channels of a kernel, by the number in the name of their sockets.
#[derive(Clone, Copy, Debug)]
enum Port {
    Shell = 1,
    Iopub = 2,
    Stdin = 3,
    Control = 4,
    Heartbeat = 5,
}

impl Port {
    /// Jupyter puts a dash and the port behind the `ip` of an ipc connection.
    fn path(self, directory: &Path) -> PathBuf {
        directory.join(format!("k-{}", self as u8))
    }
}

fn endpoint(port: Port, directory: &Path) -> String {
    format!("ipc://{}", port.path(directory).display())
}

/// Makes the kernel's directory, with its program and its connection file in it.
fn make_directory(
    directory: &Path,
    key: &Key,
    user: &User,
) -> Result<(PathBuf, PathBuf), KernelError> {
    let fail = |source| KernelError::Directory { path: directory.to_owned(), source };
    if let Some(parent) = directory.parent() {
        std::fs::create_dir_all(parent).map_err(fail)?;
    }
    std::fs::DirBuilder::new().mode(0o700).create(directory).map_err(fail)?;
    let program = directory.join("kernel.py");
    let path = directory.join("connection.json");
    let connection = json!({
        "transport": "ipc",
        "ip": directory.join("k").display().to_string(),
        "shell_port": Port::Shell as u8,
        "iopub_port": Port::Iopub as u8,
        "stdin_port": Port::Stdin as u8,
        "control_port": Port::Control as u8,
        "hb_port": Port::Heartbeat as u8,
        "key": key.text(),
        "signature_scheme": "hmac-sha256",
        "kernel_name": "python3",
    });
    let made = write_private(&path, connection.to_string().as_bytes())
        .and_then(|()| write_private(&program, PROGRAM.as_bytes()))
        .and_then(|()| give(&path, user))
        .and_then(|()| give(&program, user))
        .and_then(|()| give(directory, user));
    if let Err(source) = made {
        remove_directory(directory);
        return Err(fail(source));
    }
    Ok((program, path))
}

fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600).open(path)?.write_all(bytes)
}

fn give(path: &Path, user: &User) -> std::io::Result<()> {
    std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid))
}

fn remove_directory(directory: &Path) {
    // What cannot be removed is a few empty sockets in the guest's own memory file system; the
    // name is never used again.
    drop(std::fs::remove_dir_all(directory));
}

fn status_text(status: std::io::Result<std::process::ExitStatus>) -> String {
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}

/// Reads a process's output to its end and keeps the last of it.
async fn keep_tail(mut output: impl AsyncRead + Unpin, tail: Tail) {
    let mut buffer = [0_u8; 1024];
    while let Ok(count @ 1..) = output.read(&mut buffer).await {
        let Ok(mut tail) = tail.lock() else { return };
        tail.extend(buffer.iter().take(count));
        let excess = tail.len().saturating_sub(OUTPUT_TAIL_BYTES);
        tail.drain(..excess);
    }
}

fn text(tail: &Tail) -> String {
    let bytes: Vec<u8> = tail.lock().map(|tail| tail.iter().copied().collect()).unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim().to_owned()
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

    #[tokio::test]
    async fn only_the_end_of_the_output_is_kept() {
        let tail = Tail::default();
        let mut output = vec![b'a'; 10_000];
        output.extend(b"the end");
        keep_tail(&output[..], Arc::clone(&tail)).await;
        let kept = text(&tail);
        assert_eq!(kept.len(), OUTPUT_TAIL_BYTES);
        assert!(kept.ends_with("the end"));
    }

    #[test]
    fn the_directory_is_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let base = std::env::temp_dir().join(format!("mica-kernel-{}", random_id().unwrap()));
        let user = crate::users::find("root").unwrap();
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root to give files away");
            return;
        }
        let directory = base.join("x");
        let (_, connection) = make_directory(&directory, &Key::new("k".into()), &user).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(mode(&connection), 0o600);
        assert!(make_directory(&directory, &Key::new("k".into()), &user).is_err(), "taken");
        std::fs::remove_dir_all(base).unwrap();
    }
}
