//! Stopping a VM so that everything of it can be told, and letting it go on.
//!
//! Called by `control`. The order of a freeze:
//!
//! 1. The device thread is asked to park and the vCPUs are kicked out, all at once. Parking ends what is
//!    in flight; a vCPU that is out has no exit half done.
//! 2. When both are done nothing changes any more. The vCPUs save themselves on their threads; meanwhile
//!    the interrupt chips, the clock, the serial port and the devices are saved here.
//! 3. The state goes into the exchange.
//!
//! Refuses to take longer than its parts may: see [`PATIENCE`] and the device loop.

use std::time::{Duration, Instant};

use mica_wire::vm::{EXCHANGE_PART_BYTES_MAX, Ending};

use crate::build::{Shell, causes};
use crate::exchange::{Exchange, OutsideExchange};
use crate::kvm::{KvmError, Tsc};
use crate::state::{StateError, VmState};
use crate::vcpus::{PATIENCE, ThreadError};
use crate::virtio::GateError;

/// A freeze longer than this is one the guest should not notice: its clocks are set back. KVM takes a
/// smaller step of a time stamp counter for an attempt to synchronise it, and ignores it.
const GAP_MAX: Duration = Duration::from_secs(1);

/// Why a VM was not frozen, or does not go on.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The guest ended.
    #[error("the guest ended while it was being frozen")]
    Ended(Ending),
    /// A vCPU.
    #[error(transparent)]
    Vcpus(#[from] ThreadError),
    /// The devices.
    #[error(transparent)]
    Devices(#[from] GateError),
    /// The device thread could not be woken.
    #[error("waking the device thread failed")]
    Wake(#[from] std::io::Error),
    /// The machine.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The state does not fit where it belongs.
    #[error("the state cannot be handed over: {0}")]
    HandOver(String),
}

impl FreezeError {
    /// What it means for the VM.
    #[must_use]
    pub fn ending(self) -> Ending {
        match self {
            Self::Ended(ending) => ending,
            error => Ending::Internal(causes(&error)),
        }
    }
}

impl From<StateError> for FreezeError {
    fn from(error: StateError) -> Self {
        Self::HandOver(error.to_string())
    }
}

/// A frozen VM, and where its clocks stopped.
#[derive(Debug)]
pub struct Frozen {
    since: Instant,
    clock_ns: u64,
    tscs: Vec<Tsc>,
}

/// What a freeze left in the exchange: a state, and behind it a log. Their lengths.
#[derive(Clone, Copy, Debug)]
pub struct Left {
    /// Of the state.
    pub state_bytes: u64,
    /// Of the log; 0 where there is none.
    pub log_bytes: u64,
}

/// Freezes a running VM, and says what it left in the exchange.
///
/// # Errors
/// See [`FreezeError`]. The VM must end then.
pub fn freeze(shell: &Shell) -> Result<(Frozen, Left), FreezeError> {
    shell.gate.park()?;
    shell.vcpus.leave()?;
    shell.vcpus.done()?;
    let parked = shell.gate.wait_parked(PATIENCE);
    // A device that failed, or a vCPU that met its end, has left word.
    if let Some(ending) = shell.notices.ending() {
        return Err(FreezeError::Ended(ending));
    }
    parked?;
    let since = Instant::now();
    let state = save(shell)?;
    let left = hand_over(shell, &state)?;
    let tscs = state.vcpus.iter().map(Tsc::of).collect();
    let frozen = Frozen { since, clock_ns: state.machine.clock_ns, tscs };
    Ok((frozen, left))
}

/// Puts a state into the exchange, and what was written to memory.
fn hand_over(shell: &Shell, state: &VmState) -> Result<Left, FreezeError> {
    let outside = |error: OutsideExchange| FreezeError::HandOver(error.to_string());
    let bytes = state.encode()?;
    shell.exchange.write(&bytes).map_err(outside)?;
    let state_bytes = bytes.len() as u64;
    let Some(by_devices) = shell.memory.take_written() else {
        return Ok(Left { state_bytes, log_bytes: 0 });
    };
    let by_guest = shell.held.take_written()?;
    let both = by_guest.iter().zip(by_devices).map(|(guest, devices)| guest | devices);
    let log: Vec<u8> = both.flat_map(u64::to_le_bytes).collect();
    if log.len() as u64 > EXCHANGE_PART_BYTES_MAX {
        return Ok(Left { state_bytes, log_bytes: 0 });
    }
    shell.exchange.write_at(&log, Exchange::behind(state_bytes)).map_err(outside)?;
    Ok(Left { state_bytes, log_bytes: log.len() as u64 })
}

/// Everything of a VM of which no thread runs.
fn save(shell: &Shell) -> Result<VmState, FreezeError> {
    shell.vcpus.save()?;
    Ok(VmState {
        memory_mib: shell.memory_mib,
        cpuid: shell.held.cpuid(),
        machine: shell.held.save()?,
        serial: shell.bus.console().save(),
        devices: shell.bus.devices().iter().map(|device| device.save()).collect(),
        vcpus: shell.vcpus.saved()?,
    })
}

/// Saves a shell that has not run and puts it back, which changes nothing. So a KVM that refuses one
/// of the requests is found out when the shell is made, and all that a restore needs has been touched
/// once before somebody waits for it.
///
/// # Errors
/// See [`FreezeError`]. The shell is of no use then.
pub fn rehearse(shell: &Shell) -> Result<(), FreezeError> {
    let state = save(shell)?;
    hand_over(shell, &state)?;
    let state = VmState::decode(&state.encode()?)?;
    shell.vcpus.restore(state.vcpus, None)?;
    shell.vcpus.done()?;
    shell.held.restore_chips(&state.machine)?;
    Ok(shell.held.restore_clock(state.machine.clock_ns)?)
}

/// Lets a frozen VM go on.
///
/// # Errors
/// See [`FreezeError`]. The VM must end then.
pub fn thaw(shell: &Shell, frozen: &Frozen) -> Result<(), FreezeError> {
    let long = frozen.since.elapsed() > GAP_MAX;
    shell.vcpus.thaw(long.then_some(&frozen.tscs))?;
    shell.vcpus.done()?;
    if long {
        shell.held.restore_clock(frozen.clock_ns)?;
    }
    shell.gate.open()?;
    Ok(shell.vcpus.run()?)
}
