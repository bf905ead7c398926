//! A stand-in for `mica-vm` on machines that cannot run a Linux guest: a test double, no sandbox.
//!
//! Called by the daemon through `--vm-program`, in tests and when an SDK is tried natively. It speaks
//! the frames of a VM process on descriptor 0 and pretends that a guest runs; the "guest" is an
//! ordinary process of this machine. Refuses to isolate anything: it ignores the user id, the
//! kernel, the disk and every limit, so nobody's code belongs in it but your own.
//!
//! The agent behind it is one of two:
//! - `mica-guest agent --unix …`, run as a child: real commands, files and code, natively;
//! - `--builtin-agent`: answers the control exchange and connects to TCP ports of this machine's
//!   loopback. What is tested then is the daemon and its proxy alone.
//!
//! Guest memory is real but holds nothing of the agent's: a few pages of it change with every stop, so
//! that a snapshot has something to find. A rollback takes the streams, and leaves the agent as it is.

#![forbid(unsafe_code)]

mod agent;
mod machine;
mod memory;
mod streams;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use mica_wire::vm::{Command, ControlSocket, Ending, Event, SocketError};

use machine::Machine;

#[derive(Parser, Debug)]
#[command(about = "A stand-in for mica-vm, for tests. It isolates nothing.")]
struct Args {
    /// Given by the daemon; ignored.
    #[arg(long)]
    uid: Option<u32>,
    /// Given by the daemon; ignored.
    #[arg(long)]
    gid: Option<u32>,
    /// Given by the daemon; ignored.
    #[arg(long)]
    netns: Option<i32>,
    /// Never answer this command: what a VM process that hangs looks like.
    #[arg(long, value_name = "COMMAND")]
    hang: Option<Hang>,
    /// Be the agent, instead of running mica-guest.
    #[arg(long)]
    builtin_agent: bool,
    /// The mica-guest executable. Default: beside this one.
    #[arg(long, env = "MICA_GUEST")]
    guest: Option<PathBuf>,
}

/// Where to hang.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Hang {
    Build,
    Restore,
    Freeze,
    Thaw,
}

impl Hang {
    fn is_at(self, command: &Command) -> bool {
        match self {
            Self::Build => matches!(command, Command::Build(_)),
            Self::Restore => matches!(command, Command::Restore(_)),
            Self::Freeze => matches!(command, Command::Freeze),
            Self::Thaw => matches!(command, Command::Thaw),
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let socket = match control_socket() {
        Ok(socket) => socket,
        Err(error) => {
            complain(&error);
            return ExitCode::FAILURE;
        }
    };
    let ending = serve(&socket, args);
    let failed = ending.is_err();
    let ending = ending.unwrap_or_else(|error| {
        complain(&error);
        Ending::Internal(format!("{error:#}"))
    });
    match socket.send_event(&Event::Ended(ending)) {
        Ok(()) if !failed => ExitCode::SUCCESS,
        // A shard that is gone cannot be told, and the exit code says the same.
        Ok(()) | Err(_) => ExitCode::FAILURE,
    }
}

/// Takes commands until the end.
fn serve(socket: &ControlSocket, args: Args) -> Result<Ending> {
    // It puts itself into no namespace, so its number is everyone's.
    socket.send_event(&Event::Spawned { pid: std::process::id() })?;
    socket.send_event(&Event::Jailed)?;
    let mut machine = Machine::new((!args.builtin_agent).then_some(args.guest.clone()));
    let ending = loop {
        let (command, fds) = match socket.receive_command() {
            Ok(received) => received,
            // Only before the spare descriptor has come: later the socket outlives the daemon.
            Err(SocketError::Closed) => break Ending::Asked,
            Err(error) => return Err(error).context("the control socket failed"),
        };
        if args.hang.is_some_and(|hang| hang.is_at(&command)) {
            continue;
        }
        let said = machine.obey(command, fds);
        let (events, ending) = said.context("a command was not carried out")?;
        for event in &events {
            socket.send_event(event)?;
        }
        if let Some(ending) = ending {
            break ending;
        }
    };
    machine.stop();
    Ok(ending)
}

/// Descriptor 0, as a socket of our own. Duplicated, because standard input owns the number.
fn control_socket() -> Result<ControlSocket> {
    let fd = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3)
        .context("descriptor 0 is not open; the daemon starts this program, not a person")?;
    Ok(ControlSocket::from_fd(fd))
}

/// To standard error, if somebody still reads it: this program outlives the daemon that started it.
fn complain(error: &anyhow::Error) {
    drop(writeln!(std::io::stderr(), "stand-in VM: {error:#}"));
}
