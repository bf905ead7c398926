//! The run loop of one vCPU: guest code until it needs the host.
//!
//! Called by the vCPU threads. Hands port and MMIO accesses to [`Exits`], turns every other exit
//! into an [`Ending`], and refuses to interpret anything itself. Runs until the guest ends or
//! [`Pause`] says so.

use std::sync::Arc;

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::{VcpuExit, VcpuFd};
use mica_units::Gpa;
use mica_wire::vm::Ending;

use super::kick::Reachable;
use super::state::{self, RestoreError, Shape, Tsc};
use super::{Cpuid, KvmError, failed, registers};
use crate::state::VcpuState;

const RFLAGS_INTERRUPTS: u64 = 1 << 9;

/// What the guest reaches outside its memory. Every byte of it is the guest's.
pub trait Exits {
    /// The guest reads a port; `data` starts zeroed.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// The guest writes a port.
    ///
    /// # Errors
    /// With the ending, when that write ends the guest.
    fn port_write(&self, port: u16, data: &[u8]) -> Result<(), Ending>;
    /// The guest reads an address without memory; `data` starts as all ones.
    ///
    /// # Errors
    /// With the ending, when that read ends the guest.
    fn mmio_read(&self, address: u64, data: &mut [u8]) -> Result<(), Ending>;
    /// The guest writes an address without memory.
    ///
    /// # Errors
    /// With the ending, when that write ends the guest.
    fn mmio_write(&self, address: u64, data: &[u8]) -> Result<(), Ending>;
}

/// Whether a vCPU that was kicked could ever run again by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parked {
    /// It runs, or an interrupt could wake it.
    No,
    /// Halted with interrupts off, never started, or waiting in INIT to be started again: only
    /// another vCPU could wake it.
    ForGood,
}

/// What a vCPU was kicked out of the guest for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kick {
    /// Nothing any more.
    GoOn,
    /// To say whether it could run again by itself.
    Probe,
    /// To leave the run loop.
    Leave,
}

/// Asked before a vCPU first enters the guest, and each time it was kicked out.
pub trait Pause {
    /// What the kick was for.
    fn kicked(&self) -> Kick;
    /// The answer to [`Kick::Probe`].
    fn probed(&self, parked: Parked);
}

/// One vCPU, owned by its thread.
#[derive(Debug)]
pub struct Vcpu {
    index: u8,
    fd: VcpuFd,
    shape: Arc<Shape>,
}

impl Vcpu {
    pub(super) fn new(index: u8, fd: VcpuFd, shape: Arc<Shape>) -> Self {
        Self { index, fd, shape }
    }

    /// Its number, from 0.
    #[must_use]
    pub fn index(&self) -> u8 {
        self.index
    }

    /// Points it at 64-bit code: paging on, interrupts off, `rsi` at the zero page.
    ///
    /// # Errors
    /// When KVM refuses the registers.
    pub fn enter_at(&self, entry: Gpa) -> Result<(), KvmError> {
        registers::enter_64bit(&self.fd, entry)
    }

    /// Everything KVM holds of it. It is out of the guest.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(&self) -> Result<VcpuState, KvmError> {
        state::save(&self.fd, &self.shape)
    }

    /// Becomes a saved vCPU. `cpuid` is the table to set first, where it is another than it has.
    ///
    /// # Errors
    /// When this host's KVM does not take it.
    pub fn restore(&self, state: &VcpuState, cpuid: Option<&Cpuid>) -> Result<(), RestoreError> {
        if let Some(cpuid) = cpuid {
            let table = cpuid.of_vcpu(self.index)?;
            self.fd.set_cpuid2(&table).map_err(failed("set CPUID"))?;
        }
        state::restore(&self.fd, &self.shape, state)
    }

    /// Sets the time stamp counter back.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn rewind(&self, tsc: &Tsc) -> Result<(), KvmError> {
        state::rewind(&self.fd, tsc)
    }

    /// Tells the guest that it was stopped, so that its watchdogs do not take the gap for a hang.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn tell_stopped(&self) -> Result<(), KvmError> {
        match self.fd.kvmclock_ctrl() {
            Ok(()) => Ok(()),
            // A guest that has set up no KVM clock cannot be told, and has no watchdog that asks.
            Err(error) if error.errno() == libc::EINVAL => Ok(()),
            Err(error) => Err(failed("tell the guest that it was stopped")(error)),
        }
    }

    /// Runs guest code. Returns when `pause` says to leave; then no exit is half done.
    ///
    /// # Errors
    /// With the ending, when the guest ended.
    pub fn run(&mut self, exits: &impl Exits, pause: &impl Pause) -> Result<(), Ending> {
        let reachable = Reachable::new(self.fd.get_kvm_run());
        let result = self.run_reachable(exits, pause);
        drop(reachable);
        result
    }

    fn run_reachable(&mut self, exits: &impl Exits, pause: &impl Pause) -> Result<(), Ending> {
        // A kick that came before this thread was reachable is lost; what it was for is not.
        if self.is_to_leave(pause)? {
            return Ok(());
        }
        loop {
            match self.fd.run() {
                Ok(VcpuExit::Intr) => {}
                Ok(exit) => {
                    handle(exit, exits)?;
                    continue;
                }
                // Whatever exit came before was finished on the way in.
                Err(error) if error.errno() == libc::EINTR => {}
                // An application processor was started: enter again.
                Err(error) if error.errno() == libc::EAGAIN => continue,
                Err(error) => return Err(Ending::Internal(format!("KVM_RUN failed: {error}"))),
            }
            self.fd.set_kvm_immediate_exit(0);
            if self.is_to_leave(pause)? {
                return Ok(());
            }
        }
    }

    /// Finishes the exit that was left half done when [`Self::run`] ended with the guest's ending: KVM
    /// does that on the way in, and comes out again before any guest code.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn settle(&mut self) -> Result<(), KvmError> {
        self.fd.set_kvm_immediate_exit(1);
        let came_out = match self.fd.run() {
            Ok(_) => Ok(()),
            Err(error) if error.errno() == libc::EINTR => Ok(()),
            Err(error) => Err(failed("finish an exit")(error)),
        };
        self.fd.set_kvm_immediate_exit(0);
        came_out
    }

    /// Answers all that it was kicked for: two kicks may have come as one.
    fn is_to_leave(&self, pause: &impl Pause) -> Result<bool, Ending> {
        loop {
            match pause.kicked() {
                Kick::GoOn => return Ok(false),
                Kick::Leave => return Ok(true),
                Kick::Probe => pause.probed(self.parked()?),
            }
        }
    }

    fn parked(&self) -> Result<Parked, Ending> {
        let internal = |error| Ending::Internal(format!("reading vCPU state failed: {error}"));
        match self.fd.get_mp_state().map_err(internal)?.mp_state {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Ok(Parked::ForGood),
            KVM_MP_STATE_HALTED => {
                let rflags = self.fd.get_regs().map_err(internal)?.rflags;
                Ok(if rflags & RFLAGS_INTERRUPTS == 0 { Parked::ForGood } else { Parked::No })
            }
            _ => Ok(Parked::No),
        }
    }
}

fn handle(exit: VcpuExit<'_>, exits: &impl Exits) -> Result<(), Ending> {
    match exit {
        VcpuExit::IoOut(port, data) => exits.port_write(port, data),
        VcpuExit::IoIn(port, data) => {
            data.fill(0);
            exits.port_read(port, data);
            Ok(())
        }
        VcpuExit::MmioRead(address, data) => {
            data.fill(0xff);
            exits.mmio_read(address, data)
        }
        VcpuExit::MmioWrite(address, data) => exits.mmio_write(address, data),
        // Only without in-kernel interrupt chips; then nothing could wake this vCPU.
        VcpuExit::Hlt => Err(Ending::Halted),
        VcpuExit::Shutdown => Err(Ending::TripleFault),
        VcpuExit::SystemEvent(..) => Err(Ending::Reset),
        VcpuExit::FailEntry(reason, cpu) => Err(Ending::GuestFault(format!(
            "the processor refused to enter the guest (reason {reason:#x}, host CPU {cpu})"
        ))),
        VcpuExit::InternalError => {
            Err(Ending::GuestFault("KVM could not emulate an instruction of the guest".to_owned()))
        }
        other => Err(Ending::Internal(format!("unexpected exit {other:?}"))),
    }
}
