//! A stand-in for `mica-vm` on machines that cannot run a Linux guest: a test double, no sandbox.
//!
//! Called by the daemon through `--vm-program`, in tests and when an SDK is tried natively. It speaks
//! the frames of a VM process on descriptor 0 and pretends that a guest booted; the "guest" is an
//! ordinary process of this machine. Refuses to isolate anything: it ignores the user id, the
//! kernel, the disk and every limit, so nobody's code belongs in it but your own.
//!
//! The agent behind it is one of two:
//! - `mica-guest agent --unix …`, run as a child: real commands, files and code, natively;
//! - `--builtin-agent`: answers the control exchange and connects to TCP ports of this machine's
//!   loopback. What is tested then is the daemon and its proxy alone.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use clap::Parser;
use mica_units::GuestPort;
use mica_wire::guest::{
    CONTROL_LINE_BYTES_MAX, ControlReply, ControlRequest, ENVD_VERSION, GATEWAY_PORT,
    PREAMBLE_BYTES, Preamble, Verdict,
};
use mica_wire::vm::{
    BootConfig, Command, ControlSocket, Ending, Event, FdRole, SocketError, console,
};

/// What the "serial port" says.
const CONSOLE_TEXT: &[u8] = b"stand-in VM: no guest, no isolation\n";

/// In the directory for temporary files, followed by the process id.
const DIRECTORY_PREFIX: &str = "mica-standin-";

#[derive(Parser, Debug)]
#[command(about = "A stand-in for mica-vm, for tests. It isolates nothing.")]
struct Args {
    /// Given by the daemon; ignored.
    #[arg(long)]
    uid: Option<u32>,
    /// Given by the daemon; ignored.
    #[arg(long)]
    gid: Option<u32>,
    /// Be the agent, instead of running mica-guest.
    #[arg(long)]
    builtin_agent: bool,
    /// The mica-guest executable. Default: beside this one.
    #[arg(long, env = "MICA_GUEST")]
    guest: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let socket = control_socket()?;
    socket.send_event(&Event::Jailed)?;
    let (command, fds) = socket.receive_command()?;
    let Command::Boot(config) = command else { bail!("the first command is not Boot") };
    write_console(&config, fds)?;
    socket.send_event(&Event::Started)?;
    socket.send_event(&Event::ConsoleStarted)?;
    let agent = if args.builtin_agent { Agent::Builtin } else { Agent::start(args.guest)? };
    socket.send_event(&Event::Doorbell)?;
    let agent = Arc::new(agent);
    let ending = serve(&socket, &agent)?;
    agent.stop();
    if let Some(ending) = ending {
        socket.send_event(&Event::Ended(ending))?;
    }
    Ok(())
}

/// Descriptor 0, as a socket of our own. Duplicated, because standard input owns the number.
fn control_socket() -> Result<ControlSocket> {
    let fd = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3)
        .context("descriptor 0 is not open; the daemon starts this program, not a person")?;
    Ok(ControlSocket::from_fd(fd))
}

/// Takes commands until the end. `None`: the daemon is gone and wants no answer.
fn serve(socket: &ControlSocket, agent: &Arc<Agent>) -> Result<Option<Ending>> {
    loop {
        match socket.receive_command() {
            Ok((Command::Boot(_), _)) => bail!("a second Boot"),
            Ok((Command::Stop, _)) => return Ok(Some(Ending::Asked)),
            Ok((Command::OpenStream { vsock_port }, mut fds)) => {
                let Some(stream) = fds.pop() else { bail!("OpenStream without a descriptor") };
                // Only the gateway listens; a guest closes anything else, and so does the drop.
                if vsock_port == GATEWAY_PORT {
                    let agent = Arc::clone(agent);
                    let stream = UnixStream::from(stream);
                    // The shard made it for a ring; a thread wants to wait.
                    stream.set_nonblocking(false)?;
                    thread::spawn(move || agent.connect(stream));
                }
            }
            Err(SocketError::Closed) => return Ok(None),
            Err(error) => return Err(error).context("the control socket failed"),
        }
    }
}

/// Writes what a booting kernel would: proof of life, and a tail for error messages.
fn write_console(config: &BootConfig, fds: Vec<OwnedFd>) -> Result<()> {
    let at = config.fds.iter().position(|role| *role == FdRole::Console);
    let console = at.and_then(|at| fds.into_iter().nth(at)).context("Boot without a console")?;
    let console = File::from(console);
    console.write_all_at(CONSOLE_TEXT, console::HEADER_BYTES)?;
    let total = u64::try_from(CONSOLE_TEXT.len())?;
    console.write_all_at(&total.to_le_bytes(), 0)?;
    Ok(())
}

#[derive(Debug)]
enum Agent {
    Builtin,
    Guest { child: std::sync::Mutex<Child>, directory: PathBuf },
}

impl Agent {
    /// Starts `mica-guest agent` and waits until it says that it listens.
    fn start(guest: Option<PathBuf>) -> Result<Self> {
        let guest = guest.map_or_else(beside_this_program, Ok)?;
        remove_what_the_dead_left();
        let directory =
            std::env::temp_dir().join(format!("{DIRECTORY_PREFIX}{}", std::process::id()));
        std::fs::create_dir(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        // setpriv, so that the agent dies with this process even when that is killed outright.
        let mut child = Process::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&guest)
            .args(["agent", "--root-user", "--envd-tcp", "none", "--interpreter-tcp", "none"])
            .arg("--unix")
            .arg(socket_path(&directory))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", guest.display()))?;
        let stdout = child.stdout.take().context("the agent has no standard output")?;
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        stdout.by_ref().take(1024).read_line(&mut line)?;
        if line.trim() != "ready" {
            bail!("the agent said {line:?} instead of `ready`");
        }
        thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
        Ok(Self::Guest { child: std::sync::Mutex::new(child), directory })
    }

    /// Serves one stream of the gateway.
    fn connect(&self, stream: UnixStream) {
        let outcome = match self {
            Self::Builtin => builtin(stream),
            Self::Guest { directory, .. } => UnixStream::connect(socket_path(directory))
                .context("the agent does not take connections")
                .and_then(|agent| splice(stream.into(), agent.into())),
        };
        if let Err(error) = outcome {
            eprintln!("stand-in VM: stream: {error:#}");
        }
    }

    fn stop(&self) {
        let Self::Guest { child, directory } = self else { return };
        if let Ok(mut child) = child.lock()
            && let Err(error) = child.kill().and_then(|()| child.wait())
        {
            eprintln!("stand-in VM: cannot stop the agent: {error}");
        }
        if let Err(error) = std::fs::remove_dir_all(directory) {
            eprintln!("stand-in VM: cannot remove {}: {error}", directory.display());
        }
    }
}

/// A daemon ends this program with SIGKILL, and then the agent's socket stays behind.
fn remove_what_the_dead_left() {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(DIRECTORY_PREFIX));
        let Some(Ok(process)) = process.map(str::parse::<u32>) else { continue };
        if !Path::new(&format!("/proc/{process}")).exists() {
            // Another stand-in may be doing the same.
            drop(std::fs::remove_dir_all(entry.path()));
        }
    }
}

fn beside_this_program() -> Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name("mica-guest"))
}

fn socket_path(directory: &Path) -> PathBuf {
    directory.join("agent")
}

/// The gateway protocol, as `mica-guest` speaks it, over this machine's loopback.
fn builtin(mut stream: UnixStream) -> Result<()> {
    let mut preamble = [0; PREAMBLE_BYTES];
    stream.read_exact(&mut preamble)?;
    match Preamble::decode(preamble) {
        Ok(Preamble::Control) => builtin_control(stream),
        Ok(Preamble::Tcp(port)) => builtin_tcp(stream, port),
        Err(_) => Ok(stream.write_all(&[Verdict::BadPreamble as u8])?),
    }
}

fn builtin_control(mut stream: UnixStream) -> Result<()> {
    stream.write_all(&[Verdict::Open as u8])?;
    let limit = u64::try_from(CONTROL_LINE_BYTES_MAX)?;
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).take(limit).read_line(&mut line)?;
    let _request: ControlRequest = serde_json::from_str(&line).context("a control request")?;
    let reply = ControlReply { envd_version: ENVD_VERSION.to_owned(), error: None };
    let mut line = serde_json::to_vec(&reply)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

fn builtin_tcp(mut stream: UnixStream, port: GuestPort) -> Result<()> {
    match TcpStream::connect(("127.0.0.1", port.get())) {
        Ok(server) => {
            server.set_nodelay(true)?;
            stream.write_all(&[Verdict::Open as u8])?;
            splice(stream.into(), server.into())
        }
        Err(_) => Ok(stream.write_all(&[Verdict::Refused as u8])?),
    }
}

/// Copies both ways until both ends are done. An end that breaks ends the other at once.
fn splice(near: OwnedFd, far: OwnedFd) -> Result<()> {
    let (near, far) = (UnixStream::from(near), UnixStream::from(far));
    let (near_reader, far_writer) = (near.try_clone()?, far.try_clone()?);
    let onward = thread::spawn(move || copy(near_reader, far_writer));
    copy(far, near);
    if onward.join().is_err() {
        bail!("a copying thread panicked");
    }
    Ok(())
}

/// One direction. The sockets may be TCP: shutdown, read and write are the same calls.
fn copy(mut from: UnixStream, mut to: UnixStream) {
    let copied = std::io::copy(&mut from, &mut to);
    let how = if copied.is_ok() { Shutdown::Write } else { Shutdown::Both };
    // An end that is already closed cannot be shut down, and need not be.
    drop(to.shutdown(how));
    if copied.is_err() {
        drop(from.shutdown(Shutdown::Both));
    }
}
