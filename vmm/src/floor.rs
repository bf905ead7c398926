//! The floor of a cold boot: the KVM calls of a VM and nothing else.
//!
//! Called by the boot benchmark, to be printed beside the real thing. The same shell, memory, boot
//! structures and eventfds as `build` makes, and one vCPU on the calling thread: no process, no jail,
//! no thread, no device behind the registers. Refuses to serve a guest past its first byte.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use mica_units::{Gpa, Mebibytes, VcpuCount};
use mica_wire::vm::Ending;

use crate::boot::{self, BootError, Images};
use crate::kvm::{Exits, Kick, KvmError, Machine, Parked, Pause};
use crate::layout;
use crate::memory::{Memory, MemoryError};
use crate::virtio::{Event, QUEUE_NOTIFY};

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
    let mut events = Vec::new();
    let mut event = || -> Result<Event, FloorError> {
        let event = Event::new().map_err(FloorError::Event)?;
        events.push(event.try_clone().map_err(FloorError::Event)?);
        Ok(event)
    };
    machine.interrupt_on_signal(&event()?, layout::SERIAL_GSI)?;
    for (device, queues) in (0u32..).zip(QUEUES) {
        machine.interrupt_on_signal(&event()?, layout::FIRST_DEVICE_GSI + device)?;
        let base = layout::MMIO_DEVICES.raw() + u64::from(device) * layout::MMIO_DEVICE_BYTES;
        for queue in 0..queues {
            machine.signal_on_write(&event()?, Gpa::new(base + QUEUE_NOTIFY), queue)?;
        }
    }
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
    drop(held);
    // The addresses stay reserved; what the guest wrote is given back.
    memory.clear().map_err(FloorError::Clear)?;
    Ok(took)
}
