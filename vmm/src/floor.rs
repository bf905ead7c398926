//! The floor of a cold boot, and of the other operations ([`Guest`]): the KVM calls and nothing else.
//!
//! Called by the boot benchmark, to be printed beside the real thing. The same shell, memory, boot
//! structures and eventfds as `build` makes, and one vCPU on the calling thread: no process, no jail,
//! no thread, no device behind the registers. Refuses to serve a guest past its first byte.

mod guest;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use mica_units::{Mebibytes, VcpuCount};
use mica_wire::vm::Ending;
use vm_memory::GuestMemoryError;

use crate::boot::{self, BootError, Images};
use crate::kvm::{Exits, Kick, KvmError, Machine, Parked, Pause, RestoreError};
use crate::layout;
use crate::memory::{ApplyError, Memory, MemoryError};

pub use crate::memory::Layer;
pub use guest::{Guest, Saved};

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum FloorError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The image.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Guest memory again.
    #[error("giving guest memory back failed")]
    Clear(#[source] rustix::io::Errno),
    /// An event.
    #[error("making an event failed")]
    Event(#[source] std::io::Error),
    /// A saved state.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The memory was not mapped.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Guest memory was not read or written.
    #[error("guest memory cannot be accessed there")]
    Access(#[from] GuestMemoryError),
    /// No vCPU, or more than there may be.
    #[error("a guest has at least one vCPU")]
    Vcpus,
    /// The guest ended before it wrote a byte.
    #[error("the guest ended before its first byte: {0:?}")]
    Ended(Ending),
}

/// Stops the guest at its first byte on the serial port.
struct FirstByte;

impl Exits for FirstByte {
    fn port_read(&self, _: u16, _: &mut [u8]) {}

    fn port_write(&self, port: u16, _: &[u8]) -> Result<(), Ending> {
        if port == layout::SERIAL_PORT { Err(Ending::Asked) } else { Ok(()) }
    }

    fn mmio_read(&self, _: u64, _: &mut [u8]) -> Result<(), Ending> {
        Ok(())
    }

    fn mmio_write(&self, _: u64, _: &[u8]) -> Result<(), Ending> {
        Ok(())
    }
}

impl Pause for FirstByte {
    fn kicked(&self) -> Kick {
        Kick::GoOn
    }

    fn probed(&self, _: Parked) {}
}

/// Queues of the devices that a VM without a disk has: three of vsock, one of rng.
const QUEUES: [u32; 2] = [3, 1];

/// Builds a VM with one vCPU, runs it to its first byte, and says how long both took. Taking it down
/// again is not in the time.
///
/// # Errors
/// See [`FloorError`].
pub fn first_byte(
    kvm: OwnedFd,
    kernel: File,
    memory_size: Mebibytes,
) -> Result<Duration, FloorError> {
    let start = Instant::now();
    let vcpus = VcpuCount::new(1).unwrap_or_else(|_| unreachable!("1 is within the bounds"));
    let memory = Memory::reserve(memory_size)?;
    let machine = Machine::new(kvm, memory.guest(), vcpus)?;
    let events = guest::connect(&machine)?;
    let images = Images { kernel, initramfs: None, cmdline: "" };
    let loaded = boot::load(memory.guest(), images, vcpus, QUEUES.len())?;
    let (held, vcpus) = machine.split();
    for mut vcpu in vcpus {
        vcpu.enter_at(loaded.entry)?;
        match vcpu.run(&FirstByte, &FirstByte) {
            Err(Ending::Asked) => {}
            Err(ending) => return Err(FloorError::Ended(ending)),
            Ok(()) => unreachable!("FirstByte never leaves"),
        }
    }
    let took = start.elapsed();
    drop((held, events));
    // The addresses stay reserved; what the guest wrote is given back.
    memory.clear().map_err(FloorError::Clear)?;
    Ok(took)
}
