//! The run loop of one vCPU: guest code until it needs the host.
//!
//! Called by the vCPU threads. Hands port and MMIO accesses to [`Exits`], turns every other exit
//! into an [`Ending`], and refuses to interpret anything itself. Runs until the guest ends or
//! [`Pause`] says so.

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::{VcpuExit, VcpuFd};
use mica_wire::vm::Ending;

use super::kick::Reachable;

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

/// Asked before a vCPU first enters the guest, and each time it was kicked out.
pub trait Pause {
    /// Whether to leave the run loop.
    fn leave(&self, parked: Parked) -> bool;
}

/// One vCPU, owned by its thread.
#[derive(Debug)]
pub struct Vcpu {
    index: u8,
    fd: VcpuFd,
}

impl Vcpu {
    pub(super) fn new(index: u8, fd: VcpuFd) -> Self {
        Self { index, fd }
    }

    /// Its number, from 0.
    #[must_use]
    pub fn index(&self) -> u8 {
        self.index
    }

    /// Runs guest code. Returns when `pause` says to leave.
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
        if pause.leave(Parked::No) {
            return Ok(());
        }
        loop {
            match self.fd.run() {
                Ok(VcpuExit::Intr) => {}
                Ok(exit) => {
                    handle(exit, exits)?;
                    continue;
                }
                Err(error) if error.errno() == libc::EINTR => {}
                // An application processor was started: enter again.
                Err(error) if error.errno() == libc::EAGAIN => continue,
                Err(error) => return Err(Ending::Internal(format!("KVM_RUN failed: {error}"))),
            }
            self.fd.set_kvm_immediate_exit(0);
            if pause.leave(self.parked()?) {
                return Ok(());
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
