//! The inner end of the exec channel: `mica-lab inside`, started by the host's init script.
//!
//! One thread per connection, a bounded number of them. It runs what it is told as root, but only
//! for a caller that knows the token. It keeps no state except the daemon's supervisor.

use super::frame::{self, Frame, Kind};
use super::supervisor::Supervisor;
use super::{Hello, Request};
use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use rustix::system::{RebootCommand, reboot};
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const CONNECTIONS_MAX: usize = 64;
/// A connection that says nothing must not hold a thread for ever.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// A client closes as soon as it has the exit code.
const DRAIN_MAX: Duration = Duration::from_secs(5);

/// Programs run with this, whatever the init script had.
const PATH: &str = "/opt/mica/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug)]
struct Server {
    token: String,
    supervisor: Supervisor,
    connections: AtomicUsize,
}

/// Serves until the machine is switched off. Returns only on an error.
pub fn serve(listener: &TcpListener, token: String) -> Result<()> {
    let server = Arc::new(Server {
        token,
        supervisor: Supervisor::start(),
        connections: AtomicUsize::new(0),
    });
    loop {
        let (stream, _) = listener.accept().context("accept on the exec channel")?;
        let server = Arc::clone(&server);
        thread::spawn(move || {
            let before = server.connections.fetch_add(1, Ordering::SeqCst);
            let outcome = if before < CONNECTIONS_MAX {
                handle(&server, stream)
            } else {
                fail(&stream, "too many programs run at once in the host; wait for one to end")
            };
            server.connections.fetch_sub(1, Ordering::SeqCst);
            if let Err(error) = outcome {
                eprintln!("mica-lab inside: {error:#}");
            }
        });
    }
}

fn handle(server: &Server, mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true).context("set TCP_NODELAY")?;
    stream.set_read_timeout(Some(HELLO_MAX)).context("set the read timeout")?;
    let Some(first) = frame::read(&mut stream).context("read a request")? else {
        return Ok(()); // A port probe.
    };
    stream.set_read_timeout(None).context("clear the read timeout")?;
    let hello = match parse_hello(&first, &server.token) {
        Ok(hello) => hello,
        Err(error) => return fail(&stream, &format!("{error:#}")),
    };
    let outcome = match hello.request {
        Request::Ping => exit(&stream, 0),
        Request::Exec { argv } => exec(&stream, &argv),
        Request::DaemonStart { argv } => answer(&stream, server.supervisor.restart(argv)),
        Request::DaemonStop => answer(&stream, server.supervisor.stop()),
        Request::DaemonStatus => status(&stream, &server.supervisor),
        Request::PowerOff => power_off(&stream, &server.supervisor),
    };
    outcome.or_else(|error| fail(&stream, &format!("{error:#}")))?;
    drain(&stream)
}

/// Reads what the client still sends until it closes. A socket that is closed with unread bytes is
/// reset, and the reset could overtake the answer.
fn drain(mut stream: &TcpStream) -> Result<()> {
    stream.shutdown(Shutdown::Write).context("end the answer")?;
    stream.set_read_timeout(Some(DRAIN_MAX)).context("set the read timeout")?;
    let mut scrap = vec![0; 64 * 1024];
    let deadline = Instant::now() + DRAIN_MAX;
    while Instant::now() < deadline && stream.read(&mut scrap).is_ok_and(|count| count > 0) {}
    Ok(())
}

fn parse_hello(first: &Frame, token: &str) -> Result<Hello> {
    if first.kind != Kind::Hello {
        bail!("the first frame of a connection must be a hello");
    }
    let hello: Hello = serde_json::from_slice(&first.payload)
        .context("this request is not understood; is mica-lab newer than the running host? Run `mica lab down` and `mica lab up`")?;
    if hello.token != token {
        bail!("wrong token: this lab was started by somebody else, or anew");
    }
    Ok(hello)
}

fn exec(stream: &TcpStream, argv: &[String]) -> Result<()> {
    let Some((program, arguments)) = argv.split_first() else {
        bail!("there is no program to run");
    };
    let child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .current_dir("/root")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        // The codes that a shell uses.
        Err(error) => {
            let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
            let text = format!("mica-lab: cannot run {program}: {error}\n");
            frame::write(&mut &*stream, Kind::Stderr, text.as_bytes()).context("answer")?;
            return exit(stream, code);
        }
    };
    let status = carry(stream, &mut child)?;
    exit(stream, exit_code(status))
}

/// Carries the three streams until the program ends, then says how it ended.
fn carry(stream: &TcpStream, child: &mut Child) -> Result<ExitStatus> {
    let raw = i32::try_from(child.id()).context("a process id is out of range")?;
    let pid = Pid::from_raw(raw).context("a process id is zero")?;
    let ended = pidfd_open(pid, PidfdFlags::empty()).context("open a pidfd of the program")?;
    let writer = Mutex::new(stream.try_clone().context("clone the socket")?);
    let stdin = child.stdin.take();
    let stdout = child.stdout.take().map(OwnedFd::from).context("the program has no stdout")?;
    let stderr = child.stderr.take().map(OwnedFd::from).context("the program has no stderr")?;
    let input = stream.try_clone().context("clone the socket")?;
    // Not joined: it sits in a read until the client closes, which is after Exit.
    let group = ended.try_clone().context("clone a pidfd")?;
    thread::spawn(move || feed(input, stdin, pid, &group));
    thread::scope(|scope| {
        scope.spawn(|| pump(&stdout, &ended, &writer, Kind::Stdout));
        scope.spawn(|| pump(&stderr, &ended, &writer, Kind::Stderr));
    });
    child.wait().context("wait for the program")
}

/// Moves one output stream to the client. Ends at end of file, or when the program has ended and
/// nothing more is in the pipe: a background process may hold the pipe open for ever.
fn pump(from: &OwnedFd, ended: &OwnedFd, writer: &Mutex<TcpStream>, kind: Kind) {
    let mut file = match from.try_clone() {
        Ok(fd) => File::from(fd),
        Err(error) => return eprintln!("mica-lab inside: clone a pipe: {error}"),
    };
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let mut watched = [PollFd::new(from, PollFlags::IN), PollFd::new(ended, PollFlags::IN)];
        match poll(&mut watched, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return eprintln!("mica-lab inside: poll: {error}"),
        }
        if watched[0].revents().is_empty() {
            return; // Only the end of the program woke us: the pipe is drained.
        }
        let count = match file.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        let Ok(mut writer) = writer.lock() else { return };
        if frame::write(&mut *writer, kind, &buffer[..count]).is_err() {
            return; // The client went away; `feed` sees it too and kills the program.
        }
    }
}

/// Moves the client's input to the program; kills the program when the client goes away first.
fn feed(mut from: TcpStream, stdin: Option<ChildStdin>, group: Pid, ended: &OwnedFd) {
    let mut stdin = stdin;
    loop {
        match frame::read(&mut from) {
            Ok(Some(Frame { kind: Kind::Stdin, payload })) => {
                // A program may close its input early; the rest is then dropped.
                if stdin.as_mut().is_some_and(|pipe| pipe.write_all(&payload).is_err()) {
                    stdin = None;
                }
            }
            Ok(Some(Frame { kind: Kind::StdinEnd, .. })) => stdin = None,
            Ok(Some(_)) | Ok(None) | Err(_) => break,
        }
    }
    if !has_ended(ended) && kill_process_group(group, Signal::KILL).is_err() {
        eprintln!("mica-lab inside: process group {group:?} was gone before it was killed");
    }
}

fn has_ended(pidfd: &impl AsFd) -> bool {
    let mut watched = [PollFd::new(pidfd, PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut watched, Some(&now)).is_ok_and(|count| count > 0)
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(255)
}

fn answer(stream: &TcpStream, outcome: Result<()>) -> Result<()> {
    outcome.and_then(|()| exit(stream, 0))
}

fn status(stream: &TcpStream, supervisor: &Supervisor) -> Result<()> {
    let status = supervisor.status();
    let text = format!("{status}\n");
    frame::write(&mut &*stream, Kind::Stdout, text.as_bytes()).context("answer")?;
    exit(stream, i32::from(!status.runs()))
}

/// Leaves the store clean. What cannot be unmounted is synced, and the power goes off all the same.
fn power_off(stream: &TcpStream, supervisor: &Supervisor) -> Result<()> {
    if let Err(error) = supervisor.stop() {
        eprintln!("mica-lab inside: {error:#}");
    }
    rustix::fs::sync();
    match Command::new("umount").arg("/var/lib/mica").status() {
        Ok(status) if status.success() => {}
        other => eprintln!("mica-lab inside: the store stays mounted: {other:?}"),
    }
    exit(stream, 0)?;
    rustix::fs::sync();
    reboot(RebootCommand::PowerOff).context("switch the machine off")
}

fn exit(mut stream: &TcpStream, code: i32) -> Result<()> {
    frame::write(&mut stream, Kind::Exit, &code.to_be_bytes()).context("send an exit code")
}

fn fail(mut stream: &TcpStream, reason: &str) -> Result<()> {
    frame::write(&mut stream, Kind::Failed, reason.as_bytes()).context("send a failure")
}
