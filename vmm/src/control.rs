//! The control thread: frames from the shard in, events out, until the guest ends.
//!
//! Called by `main` once the process is in its jail. Refuses any order of frames but the one drawn in
//! `mica_wire::vm`. Waits in one place, for three things: a frame, a notice, or a guest that shows no
//! sign of life.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use mica_wire::vm::{
    BootConfig, Command, ControlSocket, Ending, Event, Phase, RestoreConfig, ShellConfig,
    SocketError,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use rustix::time::{ClockId, clock_gettime};

use crate::build::{self, Shell, causes};
use crate::freeze::{self, FreezeError, Frozen, Left};
use crate::jail::seccomp::{self, Doors, SeccompError, ThreadKind};
use crate::notices::Notices;
use crate::restore;
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
    let ending = match Notices::new() {
        Ok(notices) => Control::new(socket, Arc::new(notices)).run_to_end(),
        Err(error) => Ending::Internal(format!("making an event failed: {error}")),
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

fn protocol(what: &str) -> Ending {
    Ending::Internal(format!("the shard broke the protocol: {what}"))
}

fn broken(error: &SocketError) -> Ending {
    Ending::Internal(format!("reading from the shard failed: {error}"))
}

/// How far the VM is.
enum Stage {
    /// Nothing is built.
    Empty,
    /// A shell that has not run.
    Idle(Shell),
    /// vCPUs run.
    Running(Shell, Pulse),
    /// They do not.
    Frozen(Shell, Frozen),
    /// It could not be made, or is being taken down.
    Over,
}

impl Stage {
    fn shell(&self) -> Option<&Shell> {
        match self {
            Self::Idle(shell) | Self::Running(shell, _) | Self::Frozen(shell, _) => Some(shell),
            Self::Empty | Self::Over => None,
        }
    }

    fn phase(&self) -> Phase {
        match self {
            Self::Running(..) => Phase::Running,
            Self::Frozen(..) => Phase::Frozen,
            Self::Empty | Self::Idle(_) | Self::Over => Phase::Idle,
        }
    }
}

/// The control thread.
struct Control<'a> {
    socket: &'a ControlSocket,
    notices: Arc<Notices>,
    stage: Stage,
}

impl<'a> Control<'a> {
    fn new(socket: &'a ControlSocket, notices: Arc<Notices>) -> Self {
        #[cfg(feature = "breakout")]
        crate::breakout::tell(&notices);
        Self { socket, notices, stage: Stage::Empty }
    }

    /// Why it ended, after everything has stopped.
    fn run_to_end(mut self) -> Ending {
        let why = self.run();
        let stopped = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Idle(shell) | Stage::Running(shell, _) | Stage::Frozen(shell, _) => shell.stop(),
            Stage::Empty | Stage::Over => Ok(()),
        };
        // The first ending is the cause; stopping can only add noise.
        match stopped {
            Err(ending) if matches!(why, Ending::Asked) => ending,
            Ok(()) | Err(_) => why,
        }
    }

    /// Runs until the VM ends.
    fn run(&mut self) -> Ending {
        loop {
            if let Err(ending) = self.turn() {
                return ending;
            }
        }
    }

    /// Waits once, and sees to what came. The ending is the short way out.
    fn turn(&mut self) -> Result<(), Ending> {
        let (frame, notice) = self.wait()?;
        if notice {
            let news = self.notices.take().map_err(|error| Ending::Internal(error.to_string()))?;
            if news.console_started {
                self.tell(&Event::ConsoleStarted)?;
            }
            if news.doorbell {
                self.tell(&Event::Doorbell)?;
            }
            if let Some(ending) = news.ending {
                return Err(ending);
            }
        }
        if frame {
            return self.take_frame();
        }
        if let (Stage::Running(shell, pulse), false) = (&mut self.stage, notice)
            && pulse.is_silent()?
        {
            shell.vcpus.probe().map_err(|error| Ending::Internal(causes(&error)))?;
        }
        Ok(())
    }

    /// Which of the two is ready: a frame, a notice. Neither when a guest that runs gave no sign of
    /// life for a while.
    fn wait(&self) -> Result<(bool, bool), Ending> {
        let event = self.notices.event().as_fd();
        let mut fds = [
            PollFd::new(self.socket, PollFlags::IN),
            PollFd::from_borrowed_fd(event, PollFlags::IN),
        ];
        let timeout = match &self.stage {
            Stage::Running(_, pulse) => Some(
                Timespec::try_from(pulse.silence).map_err(|e| Ending::Internal(e.to_string()))?,
            ),
            _ => None,
        };
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Ending::Internal(format!("waiting failed: {errno}"))),
        }
        let [socket, event] = fds.map(|fd| !fd.revents().is_empty());
        Ok((socket, event))
    }

    fn tell(&self, event: &Event) -> Result<(), Ending> {
        self.socket.send_event(event).map_err(|error| broken(&error))
    }

    /// Carries out one frame. Any order of frames but the one drawn in `mica_wire::vm` is an ending.
    fn take_frame(&mut self) -> Result<(), Ending> {
        let (command, fds) = match self.socket.receive_command() {
            Ok(received) => received,
            // Before the spare is here: nobody will ever ask for anything again.
            Err(SocketError::Closed) => return Err(Ending::Asked),
            Err(error) => return Err(broken(&error)),
        };
        match command {
            Command::Stop => return Err(Ending::Asked),
            Command::Report { nonce } => return self.report(nonce),
            Command::OpenStream { vsock_port } => return self.open_stream(vsock_port, fds),
            Command::Build(_) | Command::Boot(_) | Command::Restore(_) => {}
            Command::Freeze | Command::Thaw => {}
        }
        // An error on the way must not leave half a stage behind.
        let stage = std::mem::replace(&mut self.stage, Stage::Over);
        self.stage = match (command, stage) {
            (Command::Build(config), Stage::Empty) => self.build(&config, fds)?,
            (Command::Boot(config), Stage::Idle(shell)) => self.boot(shell, &config, fds)?,
            (Command::Restore(config), Stage::Idle(shell)) => {
                self.restore(shell, &config, fds, false)?
            }
            (Command::Restore(config), Stage::Frozen(shell, _)) => {
                self.restore(shell, &config, fds, true)?
            }
            (Command::Freeze, Stage::Running(shell, _)) => self.freeze(shell)?,
            (Command::Thaw, Stage::Frozen(shell, frozen)) => self.thaw(shell, &frozen)?,
            (command, stage) => {
                self.stage = stage;
                return Err(protocol(&out_of_turn(&command, self.stage.phase())));
            }
        };
        Ok(())
    }

    fn report(&self, nonce: u64) -> Result<(), Ending> {
        let (phase, shell) = (self.stage.phase(), self.stage.shell().map(Shell::numbers));
        self.tell(&Event::Status { nonce, phase, shell })
    }

    fn open_stream(&self, vsock_port: u32, mut fds: Vec<OwnedFd>) -> Result<(), Ending> {
        let (Some(stream), true) = (fds.pop(), fds.is_empty()) else {
            return Err(protocol("a stream comes with one descriptor"));
        };
        let shell = match &self.stage {
            Stage::Running(shell, _) | Stage::Frozen(shell, _) => shell,
            _ => return Err(protocol("a stream came before there was a guest")),
        };
        // A refusal closes the descriptor, which tells whoever holds its other end.
        match shell.connector.connect(stream, vsock_port) {
            // A thread that is gone said why in a notice.
            Ok(()) | Err(ConnectError::Busy | ConnectError::Gone) => Ok(()),
            Err(error) => Err(Ending::Internal(error.to_string())),
        }
    }

    fn build(&self, config: &ShellConfig, fds: Vec<OwnedFd>) -> Result<Stage, Ending> {
        let shell = build::build(config, fds, &self.notices).map_err(|error| error.ending())?;
        stopping(shell, |shell| {
            freeze::rehearse(shell).map_err(FreezeError::ending)?;
            seccomp::install(ThreadKind::Control).map_err(|error| not_closed(&error))?;
            self.tell(&Event::Built(shell.numbers()))
        })
        .map(|(shell, ())| Stage::Idle(shell))
    }

    fn boot(&self, shell: Shell, config: &BootConfig, fds: Vec<OwnedFd>) -> Result<Stage, Ending> {
        stopping(shell, |shell| {
            restore::boot(shell, config, fds).map_err(|error| error.ending())?;
            shut_doors(shell)?;
            restore::run(shell).map_err(|error| error.ending())?;
            #[cfg(feature = "breakout")]
            crate::breakout::attempt(ThreadKind::Control);
            self.tell(&Event::Started)
        })
        .map(|(shell, ())| Stage::Running(shell, Pulse::new()))
    }

    fn restore(
        &self,
        shell: Shell,
        config: &RestoreConfig,
        fds: Vec<OwnedFd>,
        has_run: bool,
    ) -> Result<Stage, Ending> {
        stopping(shell, |shell| {
            restore::restore(shell, config, fds, has_run).map_err(|error| error.ending())?;
            if !has_run {
                shut_doors(shell)?;
            }
            restore::run(shell).map_err(|error| error.ending())?;
            self.tell(&Event::Started)
        })
        .map(|(shell, ())| Stage::Running(shell, Pulse::new()))
    }

    fn freeze(&self, shell: Shell) -> Result<Stage, Ending> {
        stopping(shell, |shell| {
            let (frozen, left) = freeze::freeze(shell).map_err(FreezeError::ending)?;
            let Left { state_bytes, log_bytes } = left;
            self.tell(&Event::Frozen { state_bytes, log_bytes })?;
            Ok(frozen)
        })
        .map(|(shell, frozen)| Stage::Frozen(shell, frozen))
    }

    fn thaw(&self, shell: Shell, frozen: &Frozen) -> Result<Stage, Ending> {
        stopping(shell, |shell| {
            freeze::thaw(shell, frozen).map_err(FreezeError::ending)?;
            self.tell(&Event::Thawed)
        })
        .map(|(shell, ())| Stage::Running(shell, Pulse::new()))
    }
}

/// Does something with a shell, and takes the shell down if that fails.
fn stopping<T>(
    mut shell: Shell,
    work: impl FnOnce(&mut Shell) -> Result<T, Ending>,
) -> Result<(Shell, T), Ending> {
    match work(&mut shell) {
        Ok(value) => Ok((shell, value)),
        Err(ending) => {
            // The first ending is the cause.
            shell.stop().ok();
            Err(ending)
        }
    }
}

/// From here on this thread may do only what a VM with a guest needs.
fn shut_doors(shell: &mut Shell) -> Result<(), Ending> {
    shell.doors.take().map_or(Ok(()), Doors::shut).map_err(|error| not_closed(&error))
}

fn not_closed(error: &SeccompError) -> Ending {
    Ending::Internal(format!("closing the jail failed: {}", causes(error)))
}

fn out_of_turn(command: &Command, phase: Phase) -> String {
    let name = match command {
        Command::Build(_) => "a build",
        Command::Boot(_) => "a boot",
        Command::Restore(_) => "a restore",
        Command::OpenStream { .. } => "a stream",
        Command::Freeze => "a freeze",
        Command::Thaw => "a thaw",
        Command::Report { .. } => "a question",
        Command::Stop => "a stop",
    };
    format!("{name} came out of turn: the VM is {phase:?}")
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
