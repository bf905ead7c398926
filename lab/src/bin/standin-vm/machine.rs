//! The pretended VM: how far it is, and what every command of a shard makes of it.
//!
//! Called by `main`. Refuses a command out of turn, a plan that does not decode, and a state that it
//! did not write itself.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use mica_wire::guest::GATEWAY_PORT;
use mica_wire::vm::{
    BootConfig, Command, EXCHANGE_PART_BYTES_MAX, Ending, Event, FdRole, Phase, RestoreConfig,
    Shell, ShellConfig, console, plan,
};

use crate::agent::Agent;
use crate::complain;
use crate::memory::Memory;
use crate::streams::Streams;

/// What the "serial port" says.
const CONSOLE_TEXT: &[u8] = b"stand-in VM: no guest, no isolation\n";

/// A saved state: this, and how often the machine was stopped, little endian.
const STATE_MAGIC: [u8; 8] = *b"STANDIN1";
const STATE_BYTES: usize = 16;

/// Where a state starts after a plan: at a multiple of this.
const STATE_ALIGNMENT: u64 = 4096;

/// What to say to the shard, and why it is over if it is.
type Said = (Vec<Event>, Option<Ending>);

/// One pretended VM.
#[derive(Debug)]
pub struct Machine {
    /// The `mica-guest` to run as the agent; `None`: the agent is built in.
    guest: Option<Option<PathBuf>>,
    agent: Option<Arc<Agent>>,
    streams: Streams,
    built: Option<Built>,
    phase: Phase,
    stops: u64,
}

/// What a shell has.
#[derive(Debug)]
struct Built {
    memory: Memory,
    shell: Shell,
    exchange: File,
    console: File,
    /// Kept open, so that the socket outlives the daemon and the next one finds it.
    _spare: OwnedFd,
}

impl Machine {
    /// A machine that is not built.
    pub fn new(guest: Option<Option<PathBuf>>) -> Self {
        let (agent, streams, built) = (None, Streams::default(), None);
        Self { guest, agent, streams, built, phase: Phase::Idle, stops: 0 }
    }

    /// Carries a command out.
    pub fn obey(&mut self, command: Command, fds: Vec<OwnedFd>) -> Result<Said> {
        let events = match command {
            Command::Build(config) => vec![self.build(&config, fds)?],
            Command::Boot(config) => self.boot(&config, &fds)?,
            Command::Restore(config) => match self.restore(&config, &fds) {
                Ok(()) => vec![Event::Started],
                // As a real one would say of a state that does not fit it.
                Err(error) => return Ok((vec![], Some(Ending::BadConfig(format!("{error:#}"))))),
            },
            Command::OpenStream { vsock_port } => {
                self.open_stream(vsock_port, fds)?;
                vec![]
            }
            Command::Freeze => vec![self.freeze()?],
            Command::Thaw => {
                ensure!(self.phase == Phase::Frozen, "Thaw while {:?}", self.phase);
                self.run();
                vec![Event::Thawed]
            }
            Command::Report { nonce } => {
                let shell = self.built.as_ref().map(|built| built.shell);
                vec![Event::Status { nonce, phase: self.phase, shell }]
            }
            Command::Stop => return Ok((vec![], Some(Ending::Asked))),
        };
        Ok((events, None))
    }

    /// Ends what it started.
    pub fn stop(self) {
        if let Some(agent) = self.agent {
            agent.stop();
        }
    }

    fn build(&mut self, config: &ShellConfig, fds: Vec<OwnedFd>) -> Result<Event> {
        ensure!(self.built.is_none(), "a second Build");
        ensure!(config.fds.len() == fds.len(), "Build names other descriptors than it brings");
        let (mut spare, mut exchange, mut console) = (None, None, None);
        for (role, fd) in config.fds.iter().zip(fds) {
            match role {
                FdRole::Spare => spare = Some(fd),
                FdRole::Exchange => exchange = Some(fd),
                FdRole::Console => console = Some(fd),
                FdRole::Kvm => {}
                other => bail!("Build brings {other:?}"),
            }
        }
        let spare = spare.context("Build without the spare socket")?;
        let exchange = File::from(exchange.context("Build without an exchange")?);
        let console = File::from(console.context("Build without a console")?);
        let memory = Memory::new(config.memory())?;
        let shell = Shell {
            memory_address: memory.address()?,
            spare_fd: spare.as_raw_fd(),
            exchange_fd: exchange.as_raw_fd(),
            console_fd: console.as_raw_fd(),
            userfault_fd: None,
        };
        self.built = Some(Built { memory, shell, exchange, console, _spare: spare });
        Ok(Event::Built(shell))
    }

    fn boot(&mut self, config: &BootConfig, fds: &[OwnedFd]) -> Result<Vec<Event>> {
        ensure!(self.phase == Phase::Idle, "Boot while {:?}", self.phase);
        ensure!(config.fds.len() == fds.len(), "Boot names other descriptors than it brings");
        ensure!(config.fds.contains(&FdRole::Kernel), "Boot without a kernel");
        write_console(&self.built()?.console)?;
        self.start_agent()?;
        self.run();
        Ok(vec![Event::Started, Event::ConsoleStarted, Event::Doorbell])
    }

    fn restore(&mut self, config: &RestoreConfig, fds: &[OwnedFd]) -> Result<()> {
        ensure!(self.phase != Phase::Running, "Restore while {:?}", self.phase);
        ensure!(config.fds.len() == fds.len(), "Restore names other descriptors than it brings");
        let layers = config.fds.iter().filter(|role| **role == FdRole::Layer).count();
        let built = self.built()?;
        let plan = read_part(&built.exchange, 0, config.plan_bytes).context("the plan")?;
        plan::decode(&plan, built.memory.frames()?, layers).context("the plan")?;
        let at = config.plan_bytes.next_multiple_of(STATE_ALIGNMENT);
        let state = read_part(&built.exchange, at, config.state_bytes).context("the state")?;
        let stops = decode_state(&state)?;
        if self.phase == Phase::Frozen {
            self.streams.cut();
        } else {
            self.start_agent()?;
        }
        self.stops = stops;
        self.mark()?;
        self.run();
        Ok(())
    }

    fn freeze(&mut self) -> Result<Event> {
        ensure!(self.phase == Phase::Running, "Freeze while {:?}", self.phase);
        self.streams.freeze();
        self.phase = Phase::Frozen;
        self.stops += 1;
        self.mark()?;
        let state = encode_state(self.stops);
        self.built()?.exchange.write_all_at(&state, 0).context("the exchange")?;
        Ok(Event::Frozen { state_bytes: u64::try_from(state.len())?, log_bytes: 0 })
    }

    fn run(&mut self) {
        self.phase = Phase::Running;
        self.streams.thaw();
    }

    fn mark(&mut self) -> Result<()> {
        let stops = self.stops;
        self.built.as_mut().context("it is not built")?.memory.mark(stops);
        Ok(())
    }

    fn built(&self) -> Result<&Built> {
        self.built.as_ref().context("it is not built")
    }

    fn start_agent(&mut self) -> Result<()> {
        let agent = match self.guest.clone() {
            Some(guest) => Agent::start(guest)?,
            None => Agent::Builtin,
        };
        self.agent = Some(Arc::new(agent));
        Ok(())
    }

    fn open_stream(&self, vsock_port: u32, mut fds: Vec<OwnedFd>) -> Result<()> {
        let agent = self.agent.as_ref().context("OpenStream before there is a guest")?;
        let stream = fds.pop().context("OpenStream without a descriptor")?;
        // Only the gateway listens; a guest closes anything else, and so does the drop.
        if vsock_port == GATEWAY_PORT {
            let (agent, passage) = (Arc::clone(agent), self.streams.enter(stream.into())?);
            thread::spawn(move || {
                if let Err(error) = agent.connect(passage) {
                    complain(&error.context("a stream"));
                }
            });
        }
        Ok(())
    }
}

fn encode_state(stops: u64) -> [u8; STATE_BYTES] {
    let mut state = [0; STATE_BYTES];
    state[..8].copy_from_slice(&STATE_MAGIC);
    state[8..].copy_from_slice(&stops.to_le_bytes());
    state
}

fn decode_state(state: &[u8]) -> Result<u64> {
    let stops = state.strip_prefix(&STATE_MAGIC).and_then(|stops| stops.try_into().ok());
    Ok(u64::from_le_bytes(stops.context("the state is not one of this program")?))
}

fn read_part(exchange: &File, at: u64, bytes: u64) -> Result<Vec<u8>> {
    ensure!(bytes <= EXCHANGE_PART_BYTES_MAX, "it has {bytes} bytes");
    let mut part = vec![0; usize::try_from(bytes)?];
    exchange.read_exact_at(&mut part, at)?;
    Ok(part)
}

/// Writes what a booting kernel would: proof of life, and a tail for error messages.
fn write_console(console: &File) -> Result<()> {
    console.write_all_at(CONSOLE_TEXT, console::HEADER_BYTES)?;
    let total = u64::try_from(CONSOLE_TEXT.len())?;
    console.write_all_at(&total.to_le_bytes(), 0)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_round_trip_and_others_are_refused() {
        assert_eq!(decode_state(&encode_state(7)).ok(), Some(7));
        for bad in
            [&b""[..], b"STANDIN1", b"STANDIN2\0\0\0\0\0\0\0\0", b"STANDIN1\0\0\0\0\0\0\0\0\0"]
        {
            assert!(decode_state(bad).is_err(), "{bad:?}");
        }
    }
}
