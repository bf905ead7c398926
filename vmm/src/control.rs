//! The control thread: frames from the shard in, events out, until the guest ends.
//!
//! Called by `main` once the process is in its jail. Refuses any order of frames but the one drawn in
//! `mica_wire::vm`. Waits in one place, for three things: a frame, a notice, or a guest that shows no
//! sign of life.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use mica_wire::vm::{BootConfig, Command, ControlSocket, Ending, Event, SocketError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use rustix::time::{ClockId, clock_gettime};

use crate::build::{self, Built, Running};
use crate::jail::seccomp::{self, ThreadKind};
use crate::notices::Notices;
use crate::virtio::ConnectError;

/// How long a guest shows no sign of life before its vCPUs are asked. The wait doubles each time,
/// so that an idle guest is left alone, and starts short, because a guest that dies at boot does so
/// early.
const SILENCE_MIN: Duration = Duration::from_millis(250);
const SILENCE_MAX: Duration = Duration::from_secs(8);
/// Less processor time than this is no sign of life. A guest that idles so deeply is asked for
/// nothing, and answers that an interrupt could wake it.
const NOISE: Duration = Duration::from_micros(200);

/// Reads the processor clocks once. The first reading looks for the kernel's fast path with system
/// calls that no filter allows, so it belongs before the jail.
pub fn warm_clocks() {
    std::hint::black_box([ClockId::ProcessCPUTime, ClockId::ThreadCPUTime].map(clock_gettime));
}

/// Serves one VM from the first frame to the last. Everything that ends it is an [`Ending`], which
/// is sent before this returns.
///
/// # Errors
/// When the shard is gone, so that nobody can be told.
pub fn serve(socket: &ControlSocket) -> Result<(), SocketError> {
    socket.send_event(&Event::Jailed)?;
    let ending = match first_frame(socket) {
        Ok((config, fds)) => boot(socket, &config, fds),
        Err(ending) => ending,
    };
    stop_listening(socket)?;
    socket.send_event(&Event::Ended(ending))
}

/// Refuses further frames and throws away those that wait. A socket that is closed with frames unread
/// resets the connection, and the other end is told of that before it gets the last event.
fn stop_listening(socket: &ControlSocket) -> Result<(), SocketError> {
    shutdown(socket, Shutdown::Read)?;
    loop {
        match socket.receive_command() {
            Ok(_) | Err(SocketError::Frame(_) | SocketError::Truncated) => {}
            Err(SocketError::Closed) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn first_frame(socket: &ControlSocket) -> Result<(BootConfig, Vec<OwnedFd>), Ending> {
    match socket.receive_command() {
        Ok((Command::Boot(config), fds)) => Ok((config, fds)),
        Ok((Command::Stop, _)) | Err(SocketError::Closed) => Err(Ending::Asked),
        Ok((Command::OpenStream { .. }, _)) => Err(protocol("a stream came before the boot")),
        Err(error) => Err(broken(&error)),
    }
}

fn protocol(what: &str) -> Ending {
    Ending::Internal(format!("the shard broke the protocol: {what}"))
}

fn broken(error: &SocketError) -> Ending {
    Ending::Internal(format!("reading from the shard failed: {error}"))
}

fn boot(socket: &ControlSocket, config: &BootConfig, fds: Vec<OwnedFd>) -> Ending {
    let notices = match Notices::new() {
        Ok(notices) => Arc::new(notices),
        Err(error) => return Ending::Internal(format!("making an event failed: {error}")),
    };
    let built = match build::build(config, fds, &notices) {
        Ok(built) => built,
        Err(error) => return error.ending(),
    };
    let Built { starting, running } = built;
    if let Err(error) = seccomp::install(ThreadKind::Control) {
        return Ending::Internal(format!("closing the jail failed: {error}"));
    }
    if let Err(error) = socket.send_event(&Event::Started) {
        return broken(&error);
    }
    starting.go();
    #[cfg(feature = "breakout")]
    crate::breakout::attempt(ThreadKind::Control, &notices);
    let why = run(socket, &running, &notices).unwrap_or_else(|ending| ending);
    // The first ending is the cause; stopping can only add noise.
    match running.stop() {
        Ok(()) => why,
        Err(ending) => {
            if matches!(why, Ending::Asked) {
                ending
            } else {
                why
            }
        }
    }
}

/// Runs until the guest ends, which is the value either way: `Err` is the short way out.
fn run(socket: &ControlSocket, running: &Running, notices: &Notices) -> Result<Ending, Ending> {
    let mut pulse = Pulse::new();
    loop {
        let (frame, notice) = wait(socket, notices, pulse.silence)?;
        if notice {
            let news = notices.take().map_err(|error| Ending::Internal(error.to_string()))?;
            tell(socket, news.console_started, &Event::ConsoleStarted)?;
            tell(socket, news.doorbell, &Event::Doorbell)?;
            if let Some(ending) = news.ending {
                return Ok(ending);
            }
        }
        if frame && let Some(ending) = take_frame(socket, running)? {
            return Ok(ending);
        }
        if !frame && !notice && pulse.is_silent()? {
            running.vcpus.probe().map_err(|error| Ending::Internal(error.to_string()))?;
        }
    }
}

/// Which of the two is ready: a frame, a notice. Neither after `timeout`.
fn wait(
    socket: &ControlSocket,
    notices: &Notices,
    timeout: Duration,
) -> Result<(bool, bool), Ending> {
    let event = notices.event().as_fd();
    let mut fds =
        [PollFd::new(socket, PollFlags::IN), PollFd::from_borrowed_fd(event, PollFlags::IN)];
    let timeout = Timespec::try_from(timeout).map_err(|e| Ending::Internal(e.to_string()))?;
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(Ending::Internal(format!("waiting failed: {errno}"))),
    }
    let [socket, event] = fds.map(|fd| !fd.revents().is_empty());
    Ok((socket, event))
}

fn tell(socket: &ControlSocket, happened: bool, event: &Event) -> Result<(), Ending> {
    if !happened {
        return Ok(());
    }
    socket.send_event(event).map_err(|error| broken(&error))
}

/// Carries out one frame. An ending is asked for, or is the protocol's.
fn take_frame(socket: &ControlSocket, running: &Running) -> Result<Option<Ending>, Ending> {
    match socket.receive_command() {
        Ok((Command::OpenStream { vsock_port }, mut fds)) => {
            let (Some(stream), true) = (fds.pop(), fds.is_empty()) else {
                return Err(protocol("a stream comes with one descriptor"));
            };
            // A refusal closes the descriptor, which tells whoever holds its other end.
            match running.connector.connect(stream, vsock_port) {
                // A thread that is gone said why in a notice.
                Ok(()) | Err(ConnectError::Busy | ConnectError::Gone) => Ok(None),
                Err(error) => Err(Ending::Internal(error.to_string())),
            }
        }
        Ok((Command::Stop, _)) | Err(SocketError::Closed) => Ok(Some(Ending::Asked)),
        Ok((Command::Boot(_), _)) => Err(protocol("it booted twice")),
        Err(error) => Err(broken(&error)),
    }
}

/// Whether the threads of the VM use any processor time.
struct Pulse {
    silence: Duration,
    last: Duration,
}

impl Pulse {
    fn new() -> Self {
        Self { silence: SILENCE_MIN, last: Duration::ZERO }
    }

    /// Whether nothing but this thread ran since the last call.
    fn is_silent(&mut self) -> Result<bool, Ending> {
        let read = |clock| {
            Duration::try_from(clock_gettime(clock)).map_err(|e| Ending::Internal(e.to_string()))
        };
        // The two clocks are read one after the other: not quite the same instant.
        let process = read(ClockId::ProcessCPUTime)?;
        let others = process.saturating_sub(read(ClockId::ThreadCPUTime)?);
        let silent = others.abs_diff(self.last) < NOISE;
        self.last = others;
        self.silence = (self.silence * 2).min(SILENCE_MAX);
        Ok(silent)
    }
}
