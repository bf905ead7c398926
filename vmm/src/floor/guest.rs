//! One guest on this thread, to measure the bare calls of a restore, a snapshot, a rollback and an end.
//!
//! Called by the engine benchmark. The machine is the one that `build` makes, without a process, a jail,
//! threads, devices and a protocol around it: each step is a function, so that whoever measures can put
//! the steps of an operation between two looks at the clock. Refuses to run any vCPU but the first, and
//! that one only to its next byte.

use std::fs::File;
use std::os::fd::OwnedFd;

use mica_units::{FrameRun, Gpa, Mebibytes, VcpuCount};
use mica_wire::vm::Ending;
use mica_wire::vm::plan::{Entry, Source};
use vm_memory::{Bytes, GuestAddress};

use super::{FirstByte, FloorError, QUEUES};
use crate::boot::{self, Images};
use crate::kvm::{Held, Machine, Vcpu};
use crate::layout;
use crate::memory::{Layer, Memory};
use crate::state::{MachineState, VcpuState};
use crate::virtio::{Event, QUEUE_NOTIFY};

/// A guest that is out of its vCPUs.
#[derive(Debug)]
pub struct Guest {
    vcpus: Vec<Vcpu>,
    held: Held,
    _events: Vec<Event>,
    memory: Memory,
}

/// What a guest is besides its memory.
#[derive(Clone, Debug)]
pub struct Saved {
    vcpus: Vec<VcpuState>,
    machine: MachineState,
}

impl Guest {
    /// A shell: everything made, nothing run.
    ///
    /// # Errors
    /// See [`FloorError`].
    pub fn shell(kvm: OwnedFd, memory: Mebibytes, vcpus: VcpuCount) -> Result<Self, FloorError> {
        let memory = Memory::reserve(memory)?;
        let machine = Machine::new(kvm, memory.guest(), vcpus)?;
        let events = connect(&machine)?;
        let (held, vcpus) = machine.split();
        Ok(Self { vcpus, held, _events: events, memory })
    }

    /// Loads a kernel and runs it to its first byte.
    ///
    /// # Errors
    /// See [`FloorError`].
    pub fn boot(&mut self, kernel: File) -> Result<(), FloorError> {
        let count = u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX);
        let count = VcpuCount::new(count).map_err(|_| FloorError::Vcpus)?;
        let images = Images { kernel, initramfs: None, cmdline: "" };
        let loaded = boot::load(self.memory.guest(), images, count, QUEUES.len())?;
        self.first()?.enter_at(loaded.entry)?;
        self.run_to_byte()
    }

    fn first(&mut self) -> Result<&mut Vcpu, FloorError> {
        self.vcpus.first_mut().ok_or(FloorError::Vcpus)
    }

    /// Runs the first vCPU to its next byte.
    ///
    /// # Errors
    /// When the guest ends instead.
    pub fn run_to_byte(&mut self) -> Result<(), FloorError> {
        match self.first()?.run(&FirstByte, &FirstByte) {
            Err(Ending::Asked) => Ok(()),
            Err(ending) => Err(FloorError::Ended(ending)),
            Ok(()) => unreachable!("FirstByte never leaves"),
        }
    }

    /// Reads all that KVM holds of the guest.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(&mut self) -> Result<Saved, FloorError> {
        // The write of the last byte is not done yet: the guest would write it again.
        self.first()?.settle()?;
        let vcpus = self.vcpus.iter().map(Vcpu::save).collect::<Result<_, _>>()?;
        Ok(Saved { vcpus, machine: self.held.save()? })
    }

    /// Makes the vCPUs and the machine what was saved.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set(&mut self, saved: &Saved) -> Result<(), FloorError> {
        self.first()?.settle()?;
        for (vcpu, state) in self.vcpus.iter().zip(&saved.vcpus) {
            vcpu.restore(state, None)?;
        }
        self.held.restore_chips(&saved.machine)?;
        Ok(self.held.restore_clock(saved.machine.clock_ns)?)
    }

    /// Maps a layer over all of memory, from its first page on.
    ///
    /// # Errors
    /// When the layer is shorter than the memory.
    pub fn map(&self, layer: &[Layer]) -> Result<(), FloorError> {
        let run = FrameRun::new(0, self.memory.frames()).ok_or(FloorError::Vcpus)?;
        let entry = Entry { run, source: Source::Map { layer: 0, page: 0 } };
        Ok(self.memory.apply(&[entry], layer)?)
    }

    /// Drops what was written to runs.
    ///
    /// # Errors
    /// When a run is outside of the memory.
    pub fn forget(&self, runs: &[FrameRun]) -> Result<(), FloorError> {
        let entry = |run: &FrameRun| Entry { run: *run, source: Source::Drop };
        let plan: Vec<_> = runs.iter().map(entry).collect();
        Ok(self.memory.apply(&plan, &[])?)
    }

    /// The address of frame 0, and how many frames there are.
    #[must_use]
    pub fn place(&self) -> (u64, u32) {
        (self.memory.address(), self.memory.frames())
    }

    /// Copies guest memory. The guest is small enough to have no hole.
    ///
    /// # Errors
    /// When the run is outside of the memory.
    pub fn read(&self, run: FrameRun, into: &mut [u8]) -> Result<(), FloorError> {
        let address = GuestAddress(run.offset_bytes());
        Ok(self.memory.guest().read_slice(into, address)?)
    }

    /// Writes guest memory, as a guest would.
    ///
    /// # Errors
    /// When it is outside of the memory.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), FloorError> {
        Ok(self.memory.guest().write_slice(bytes, GuestAddress(offset))?)
    }

    /// Ends it: the vCPUs, the machine, and what is in its memory.
    ///
    /// # Errors
    /// When the memory cannot be given back.
    pub fn destroy(self) -> Result<(), FloorError> {
        let Self { vcpus, held, _events: events, memory } = self;
        drop((vcpus, held, events));
        memory.clear().map_err(FloorError::Clear)
    }
}

/// The eventfds of the devices of a VM without a disk, and of its serial port.
pub(super) fn connect(machine: &Machine) -> Result<Vec<Event>, FloorError> {
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
    Ok(events)
}
