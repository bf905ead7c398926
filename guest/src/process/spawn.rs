//! Starts a command through the shim and waits until it runs.
//!
//! Called by the service for `Start`. Refuses a command that does not exec, with the reason, before
//! anyone is told of a process.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Stdio;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

use super::messages::PtySize;
use super::shim::{FDS, SPEC_BYTES_MAX, Spec};

/// Longest failure that a shim can tell.
const FAILURE_BYTES_MAX: u64 = 4096;

/// Why a command was not started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The command itself cannot be run.
    #[error("error starting process: {0}")]
    Refused(String),
    /// The agent or the kernel cannot.
    #[error("cannot {what}")]
    Os {
        /// The step.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

fn os(what: &'static str) -> impl FnOnce(std::io::Error) -> SpawnError {
    move |source| SpawnError::Os { what, source }
}

/// What the command's standard descriptors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terminal {
    /// Pipes; standard input is `/dev/null` without `stdin`.
    Pipes {
        /// Whether it can be fed.
        stdin: bool,
    },
    /// One pseudo-terminal for all three.
    Pty(PtySize),
}

/// The agent's ends.
#[derive(Debug)]
pub enum Ends {
    /// Of the pipes.
    Pipes {
        /// What the command reads.
        stdin: Option<pipe::Sender>,
        /// What it writes.
        stdout: pipe::Receiver,
        /// What it writes to standard error.
        stderr: pipe::Receiver,
    },
    /// Of the terminal: its master, once for each use. tokio's pipe ends read and write whatever
    /// can be waited for, which a terminal can.
    Pty {
        /// What the command reads.
        input: pipe::Sender,
        /// What it writes.
        output: pipe::Receiver,
        /// To set the size of.
        control: OwnedFd,
    },
}

/// A command that runs.
#[derive(Debug)]
pub struct Spawned {
    /// To wait for.
    pub child: Child,
    /// Its process id.
    pub pid: u32,
    /// To signal, without ever meeting another process of the same id.
    pub pidfd: OwnedFd,
    /// To read and write.
    pub ends: Ends,
}

/// Starts `spec`.
///
/// # Errors
/// [`SpawnError`]; no process is left then.
pub async fn spawn(spec: &Spec, terminal: Terminal) -> Result<Spawned, SpawnError> {
    let (ends, fds) = descriptors(terminal).map_err(os("make pipes or a terminal"))?;
    let (near, far) = std::os::unix::net::UnixStream::pair().map_err(os("make a socket"))?;
    let mut child = Command::new("/proc/self/exe")
        .arg("exec-as")
        .env_clear()
        .stdin(Stdio::from(OwnedFd::from(far)))
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()
        .map_err(os("start the shim"))?;
    let pid = child.id().ok_or_else(|| gone("the shim"))?;
    let pidfd = open_pidfd(pid)?;
    match hand_over(near, spec, &fds).await {
        Ok(None) => Ok(Spawned { child, pid, pidfd, ends }),
        Ok(Some(reason)) => {
            child.wait().await.map_err(os("wait for the shim"))?;
            Err(SpawnError::Refused(reason))
        }
        Err(source) => {
            child.kill().await.map_err(os("end the shim"))?;
            Err(os("talk to the shim")(source))
        }
    }
}

fn gone(what: &str) -> SpawnError {
    let source = std::io::Error::other(format!("{what} is gone already"));
    SpawnError::Os { what: "start the shim", source }
}

fn open_pidfd(pid: u32) -> Result<OwnedFd, SpawnError> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| gone("the shim"))?;
    pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| os("open a pidfd")(errno.into()))
}

/// The agent's ends, and the three descriptors of the command.
fn descriptors(terminal: Terminal) -> std::io::Result<(Ends, [OwnedFd; FDS])> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(std::io::Error::from);
    match terminal {
        Terminal::Pipes { stdin } => {
            let (their_stdin, stdin) = if stdin {
                let (theirs, ours) = pipe()?;
                (theirs, Some(pipe::Sender::from_owned_fd(nonblocking(ours)?)?))
            } else {
                (std::fs::File::open("/dev/null")?.into(), None)
            };
            let (stdout, their_stdout) = pipe()?;
            let (stderr, their_stderr) = pipe()?;
            let stdout = pipe::Receiver::from_owned_fd(nonblocking(stdout)?)?;
            let stderr = pipe::Receiver::from_owned_fd(nonblocking(stderr)?)?;
            Ok((Ends::Pipes { stdin, stdout, stderr }, [their_stdin, their_stdout, their_stderr]))
        }
        Terminal::Pty(size) => {
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let ours = openpt(flags)?;
            grantpt(&ours)?;
            unlockpt(&ours)?;
            let theirs = ioctl_tiocgptpeer(&ours, flags)?;
            tcsetwinsize(&ours, winsize(size))?;
            let copies = [theirs.try_clone()?, theirs.try_clone()?, theirs];
            let control = nonblocking(ours)?;
            let input = pipe::Sender::from_owned_fd_unchecked(control.try_clone()?)?;
            let output = pipe::Receiver::from_owned_fd_unchecked(control.try_clone()?)?;
            Ok((Ends::Pty { input, output, control }, copies))
        }
    }
}

fn nonblocking(fd: OwnedFd) -> std::io::Result<OwnedFd> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
    Ok(fd)
}

/// A terminal size as the kernel has it; what does not fit is the largest that does.
#[must_use]
pub fn winsize(size: PtySize) -> Winsize {
    let side = |cells| u16::try_from(cells).unwrap_or(u16::MAX);
    Winsize { ws_row: side(size.rows), ws_col: side(size.cols), ws_xpixel: 0, ws_ypixel: 0 }
}

/// Sends everything and reads what the shim says: nothing at all once the command runs.
async fn hand_over(
    near: std::os::unix::net::UnixStream,
    spec: &Spec,
    fds: &[OwnedFd; FDS],
) -> std::io::Result<Option<String>> {
    let bytes = serde_json::to_vec(spec).map_err(std::io::Error::other)?;
    let too_long = || std::io::Error::other("the command's arguments are too long");
    let length = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= SPEC_BYTES_MAX);
    send_fds(&near, length.ok_or_else(too_long)?, fds)?;
    near.set_nonblocking(true)?;
    let mut near = tokio::net::UnixStream::from_std(near)?;
    near.write_all(&bytes).await?;
    let mut failure = Vec::new();
    match near.take(FAILURE_BYTES_MAX).read_to_end(&mut failure).await {
        Ok(_) => {}
        // The shim died with bytes unread; what it left is on the console.
        Err(error) if failure.is_empty() => return Err(error),
        Err(_) => {}
    }
    Ok((!failure.is_empty()).then(|| String::from_utf8_lossy(&failure).into_owned()))
}

/// Four bytes into an empty socket never wait.
fn send_fds(
    socket: &std::os::unix::net::UnixStream,
    length: u32,
    fds: &[OwnedFd; FDS],
) -> std::io::Result<()> {
    let borrowed: [BorrowedFd<'_>; FDS] = fds.each_ref().map(AsFd::as_fd);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(std::io::Error::other("three descriptors do not fit a control message"));
    }
    let length = length.to_le_bytes();
    let iov = [IoSlice::new(&length)];
    rustix::io::retry_on_intr(|| sendmsg(socket, &iov, &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}
