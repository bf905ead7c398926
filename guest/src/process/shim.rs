//! `mica-guest exec-as`: the short-lived program between the agent and a command.
//!
//! Started by `spawn` with a socket as its standard input, over which come the specification and
//! the command's own standard descriptors. It makes the process what the command expects (its own
//! session, terminal, user, directory) and becomes the command. It exists so that none of this
//! needs code between fork and exec. Refuses to run the command half-prepared: any step that
//! fails is reported over the socket, which closes by itself when the command starts.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Gid, Uid};
use serde::{Deserialize, Serialize};

/// Longest specification: a request's message, and JSON's quoting of it.
pub const SPEC_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Standard input, output, error.
pub const FDS: usize = 3;

/// What to become.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// The program: a path, or a name looked up in the command's own `PATH`.
    pub cmd: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// All of its environment.
    pub env: Vec<(String, String)>,
    /// Its directory.
    pub cwd: PathBuf,
    /// Its user, when the agent may choose one.
    pub user: Option<SpecUser>,
    /// Standard input is a terminal and becomes the controlling one.
    pub controlling_terminal: bool,
}

/// Whom to become.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SpecUser {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ShimError {
    #[error("the shim was not started by the agent: {what}")]
    Handover {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("the specification is not in form")]
    Spec(#[source] serde_json::Error),
    #[error("cannot {what}")]
    Prepare {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("cwd '{cwd}' cannot be entered")]
    Cwd {
        cwd: String,
        #[source]
        source: std::io::Error,
    },
    #[error("fork/exec {cmd}")]
    Exec {
        cmd: String,
        #[source]
        source: std::io::Error,
    },
}

/// Becomes the command; returns the program's exit code only when that failed.
#[must_use]
pub fn run() -> std::process::ExitCode {
    let failed = match take_over() {
        Ok((mut socket, spec)) => {
            let error = become_command(&spec);
            socket.write_all(crate::http::error::chain(&error).as_bytes()).err()
        }
        Err(error) => Some(std::io::Error::other(crate::http::error::chain(&error))),
    };
    if let Some(error) = failed {
        eprintln!("mica-guest exec-as: {error}");
    }
    std::process::ExitCode::from(127)
}

/// Receives descriptors and specification, and puts the descriptors in place.
fn take_over() -> Result<(UnixStream, Spec), ShimError> {
    let fail = |what| move |source| ShimError::Handover { what, source };
    // The socket moves out of the way of the command's own standard input.
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .map_err(|errno| fail("standard input cannot be kept")(errno.into()))?;
    let (length, fds) = receive(&socket).map_err(fail("no descriptors came"))?;
    let mut socket = UnixStream::from(socket);
    let mut bytes = vec![0; length];
    socket.read_exact(&mut bytes).map_err(fail("the specification was cut"))?;
    let spec = serde_json::from_slice(&bytes).map_err(ShimError::Spec)?;
    let [stdin, stdout, stderr] = fds;
    rustix::stdio::dup2_stdin(&stdin)
        .and_then(|()| rustix::stdio::dup2_stdout(&stdout))
        .and_then(|()| rustix::stdio::dup2_stderr(&stderr))
        .map_err(|errno| fail("cannot put the descriptors in place")(errno.into()))?;
    Ok((socket, spec))
}

fn receive(socket: &OwnedFd) -> std::io::Result<(usize, [OwnedFd; FDS])> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut length = [0; 4];
    let received = rustix::io::retry_on_intr(|| {
        let mut iov = [IoSliceMut::new(&mut length)];
        recvmsg(socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let fds: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        })
        .flatten()
        .collect();
    let out_of_form = || std::io::Error::from(std::io::ErrorKind::InvalidData);
    let fds = <[OwnedFd; FDS]>::try_from(fds).map_err(|_| out_of_form())?;
    let length = usize::try_from(u32::from_le_bytes(length)).map_err(|_| out_of_form())?;
    if received.bytes != 4 || length > SPEC_BYTES_MAX {
        return Err(out_of_form());
    }
    Ok((length, fds))
}

/// Does every step and execs. Only a failure comes back.
fn become_command(spec: &Spec) -> ShimError {
    if let Err(error) = prepare(spec.user.as_ref(), &spec.cwd, spec.controlling_terminal) {
        return error;
    }
    let source = Command::new(&spec.cmd)
        .args(&spec.args)
        .env_clear()
        .envs(spec.env.iter().map(|(name, value)| (name, value)))
        .exec();
    ShimError::Exec { cmd: spec.cmd.clone(), source }
}

/// Everything between a plain child of the agent and the command: session, terminal, user,
/// directory.
pub(super) fn prepare(
    user: Option<&SpecUser>,
    cwd: &Path,
    controlling_terminal: bool,
) -> Result<(), ShimError> {
    // Its own process group, so that a signal to it never reaches the agent: as a session, unless
    // it was started as the leader of a group already.
    let leads_group = rustix::process::getpgrp() == rustix::process::getpid();
    if !leads_group {
        rustix::process::setsid().map_err(failed("make a session"))?;
    }
    if controlling_terminal {
        rustix::process::ioctl_tiocsctty(std::io::stdin().as_fd())
            .map_err(failed("take the terminal"))?;
    }
    if let Some(user) = user {
        become_user(user, controlling_terminal)?;
    }
    // Nobody could reach a command whose agent is gone. (Changing the user resets this, so it
    // comes after.)
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(failed("tie the command to the agent"))?;
    // As the user, so that a directory it may not enter is refused.
    std::env::set_current_dir(cwd)
        .map_err(|source| ShimError::Cwd { cwd: cwd.display().to_string(), source })
}

fn failed<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> ShimError {
    move |source| ShimError::Prepare { what, source: source.into() }
}

fn become_user(user: &SpecUser, owns_terminal: bool) -> Result<(), ShimError> {
    // The agent is worth more than what it runs: it is neither niced nor the first to be killed.
    std::fs::write("/proc/self/oom_score_adj", b"100").map_err(failed("set oom_score_adj"))?;
    rustix::process::setpriority_process(None, 0).map_err(failed("reset the priority"))?;
    let uid = Uid::from_raw(user.uid);
    if owns_terminal {
        // Programs that open their terminal by name must be allowed to.
        rustix::fs::fchown(std::io::stdin().as_fd(), Some(uid), None)
            .map_err(failed("hand over the terminal"))?;
    }
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    // This process has one thread, so the thread's ids are the process's.
    rustix::thread::set_thread_groups(&groups).map_err(failed("set the groups"))?;
    let gid = Gid::from_raw(user.gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(failed("set the group"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(failed("set the user"))
}
