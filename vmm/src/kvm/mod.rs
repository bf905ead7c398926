//! The only place that issues KVM ioctls: one VM with its memory, interrupt chips and vCPUs.
//!
//! Called by `build`, `freeze`, `restore` and the vCPU threads. Refuses to know devices, boot protocols or frames. The order of the calls is
//! measured, not taste: memory slots before the interrupt chips, vCPUs before eventfds, no PIT.

#![expect(unsafe_code, reason = "KVM takes raw descriptors and raw memory; each block argues why")]

mod cpuid;
mod kick;
mod plain;
mod registers;
mod state;
mod vcpu;

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use mica_units::{Gpa, VcpuCount};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use crate::memory::GuestMemory;
use crate::state::{CpuidLeaf, MachineState};
use crate::virtio::Event;

pub use cpuid::{Base as Cpuid, CpuidError};
pub use kick::{KickError, install as install_kick, kick};
pub use state::{RestoreError, Shape, Tsc};
pub use vcpu::{Exits, Kick, Parked, Pause, Vcpu};

/// The KVM API version since 2007.
const API_VERSION: i32 = 12;

/// Why a VM could not be built.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// Not `/dev/kvm`, or one from before 2007.
    #[error("the KVM descriptor speaks API version {0}, not {API_VERSION}; pass /dev/kvm")]
    ApiVersion(i32),
    /// A capability is missing.
    #[error("this host's KVM lacks {0:?}; a newer kernel is needed")]
    Missing(Cap),
    /// One ioctl failed.
    #[error("KVM: {operation} failed")]
    Ioctl {
        /// What was being done.
        operation: &'static str,
        /// The error number.
        #[source]
        source: errno::Error,
    },
    /// A guest memory region has no host address.
    #[error("guest memory at {0:?} is not mapped in this process")]
    Unmapped(Gpa),
    /// The kernel accepted only the first `{0}` MSRs.
    #[error("KVM refused MSR number {0} of the boot set")]
    Msr(usize),
    /// The process is out of descriptors.
    #[error("duplicating an event failed")]
    Duplicate(#[source] std::io::Error),
    /// An MSR that could be used when the machine was built.
    #[error("KVM: MSR {0:#x} cannot be used any more")]
    MsrLost(u32),
    /// More extended state than a saved state holds.
    #[error("KVM: the extended state of a vCPU has {0} bytes, more than a saved state holds")]
    Xsave(usize),
    /// The CPUID table is full.
    #[error("the CPUID table has no room for the topology leaves")]
    CpuidFull,
}

pub(crate) fn failed(operation: &'static str) -> impl Fn(errno::Error) -> KvmError {
    move |source| KvmError::Ioctl { operation, source }
}

/// Tries to make a VM before a signal that comes each time is an error.
const CREATE_TRIES_MAX: u32 = 10;

/// Made anew where a signal came in between: the kernel gives up then, whatever the signal's handler asks for,
/// and nothing of the VM is left.
fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let mut tries = 1;
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR && tries < CREATE_TRIES_MAX => tries += 1,
            made => return made.map_err(failed("create the VM")),
        }
    }
}

/// A VM with its memory, interrupt chips and vCPUs in their reset state.
#[derive(Debug)]
pub struct Machine {
    vm: VmFd,
    vcpus: Vec<VcpuFd>,
    shape: Shape,
    cpuid: Cpuid,
    // KVM reads and writes this memory for as long as the VM lives. Declared last, dropped last.
    memory: GuestMemory,
}

impl Machine {
    /// Builds the shell. `kvm` is an open `/dev/kvm`.
    ///
    /// # Errors
    /// See [`KvmError`].
    pub fn new(kvm: OwnedFd, memory: &GuestMemory, vcpus: VcpuCount) -> Result<Self, KvmError> {
        // SAFETY: `into_raw_fd` gives up an open descriptor that nobody else owns, so `Kvm` may
        // close it. A descriptor that is not KVM fails the version check below.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        check_host(&kvm)?;
        let vm = create_vm(&kvm)?;
        vm.set_tss_address(layout::KVM_TSS).map_err(failed("set the TSS address"))?;
        add_memory(&vm, memory)?;
        vm.create_irq_chip().map_err(failed("create the interrupt chips"))?;
        let cpuid = Cpuid::read(&kvm, vcpus)?;
        let vcpus = (0..vcpus.get())
            .map(|index| {
                let vcpu = vm.create_vcpu(u64::from(index)).map_err(failed("create a vCPU"))?;
                vcpu.set_cpuid2(&cpuid.of_vcpu(index)?).map_err(failed("set CPUID"))?;
                registers::reset(&vcpu)?;
                Ok(vcpu)
            })
            .collect::<Result<Vec<_>, KvmError>>()?;
        let boot_vcpu = vcpus.first().ok_or(KvmError::Missing(Cap::NrVcpus))?;
        let shape = Shape::probe(&kvm, &vm, boot_vcpu)?;
        Ok(Self { vm, vcpus, shape, cpuid, memory: memory.clone() })
    }

    /// Makes KVM signal `event` when the guest writes `value` (32 bits) at `address`, without an exit.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn signal_on_write(&self, event: &Event, address: Gpa, value: u32) -> Result<(), KvmError> {
        self.vm
            .register_ioevent(&for_kvm(event)?, &IoEventAddress::Mmio(address.raw()), value)
            .map_err(failed("register an ioeventfd"))
    }

    /// Makes KVM raise the edge-triggered line `gsi` when `event` is signalled.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn interrupt_on_signal(&self, event: &Event, gsi: u32) -> Result<(), KvmError> {
        self.vm.register_irqfd(&for_kvm(event)?, gsi).map_err(failed("register an irqfd"))
    }

    /// Hands the vCPUs to their threads. The VM lives until the last of them is dropped: each holds
    /// it open in the kernel, and [`Held`] keeps the memory mapped.
    #[must_use]
    pub fn split(self) -> (Held, Vec<Vcpu>) {
        let Self { vm, vcpus, shape, cpuid, memory } = self;
        let shape = Arc::new(shape);
        let vcpu = |(index, fd)| Vcpu::new(index, fd, Arc::clone(&shape));
        let vcpus = (0u8..).zip(vcpus).map(vcpu).collect();
        (Held { vm, cpuid, memory }, vcpus)
    }
}

/// What a VM has besides its vCPUs. Keeps it and its memory in place: drop it after every vCPU thread
/// has ended.
#[derive(Debug)]
pub struct Held {
    vm: VmFd,
    cpuid: Cpuid,
    memory: GuestMemory,
}

impl Held {
    /// The CPUID table, for a saved state.
    #[must_use]
    pub fn cpuid(&self) -> Vec<CpuidLeaf> {
        self.cpuid.leaves()
    }

    /// What to do with the CPUID table of a saved state: nothing, when it is the one that the vCPUs
    /// have, or set it, when this host can offer it.
    ///
    /// # Errors
    /// When this host cannot.
    pub fn cpuid_for(&self, saved: &[CpuidLeaf]) -> Result<Option<Cpuid>, CpuidError> {
        self.cpuid.for_saved(saved)
    }

    /// The vCPUs have this table now.
    pub fn set_cpuid(&mut self, cpuid: Cpuid) {
        self.cpuid = cpuid;
    }

    /// Takes what the guest wrote to memory since the last time, or KVM for it: a bit for each frame, in
    /// order (`Documentation/virt/kvm/api.rst`, 4.8). No vCPU runs. Only of memory with a log.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn take_written(&self) -> Result<Vec<u64>, KvmError> {
        let mut words = Vec::new();
        for (slot, region) in (0u32..).zip(self.memory.iter()) {
            let bytes =
                usize::try_from(region.len()).map_err(|_| KvmError::Missing(Cap::UserMemory))?;
            let part = self.vm.get_dirty_log(slot, bytes).map_err(failed("read the dirty log"))?;
            words.extend(part);
        }
        Ok(words)
    }

    /// Reads the interrupt chips and the clock. No vCPU runs.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn save(&self) -> Result<MachineState, KvmError> {
        state::save_machine(&self.vm)
    }

    /// Puts the interrupt chips back, after the vCPUs.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore_chips(&self, state: &MachineState) -> Result<(), KvmError> {
        state::restore_chips(&self.vm, state)
    }

    /// Lets the guest's clock go on from here.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore_clock(&self, clock_ns: u64) -> Result<(), KvmError> {
        state::restore_clock(&self.vm, clock_ns)
    }
}

/// A second descriptor of the event, in the type that kvm-ioctls wants. KVM keeps a reference of its
/// own, so it is closed after the call.
fn for_kvm(event: &Event) -> Result<EventFd, KvmError> {
    let twin = event.try_clone().map_err(KvmError::Duplicate)?;
    // SAFETY: `into_raw_fd` gives up an open eventfd that nobody else owns.
    Ok(unsafe { EventFd::from_raw_fd(OwnedFd::from(twin).into_raw_fd()) })
}

fn check_host(kvm: &Kvm) -> Result<(), KvmError> {
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(KvmError::ApiVersion(version));
    }
    let needed = [Cap::Irqchip, Cap::Ioeventfd, Cap::Irqfd, Cap::UserMemory, Cap::ImmediateExit];
    match needed.into_iter().find(|cap| !kvm.check_extension(*cap)) {
        Some(cap) => Err(KvmError::Missing(cap)),
        None => Ok(()),
    }
}

fn add_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), KvmError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let start = region.start_addr();
        let host = memory
            .get_host_address(start)
            .map_err(|_| KvmError::Unmapped(Gpa::new(start.raw_value())))?;
        let slot = kvm_userspace_memory_region {
            slot,
            flags: if region.bitmap().is_some() { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: start.raw_value(),
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the range is one whole mapping that `memory` owns. `Machine` and then `Held`
        // keep a clone of it (an Arc on each mapping), so it outlives the VM's use of it. No Rust
        // reference into it exists, so the guest writing there breaks no aliasing rule.
        unsafe { vm.set_user_memory_region(slot) }.map_err(failed("add guest memory"))?;
    }
    Ok(())
}
