//! The only place that issues KVM ioctls: one VM with its memory, interrupt chips and vCPUs.
//!
//! Called by `build`. Refuses to know devices, boot protocols or frames. The order of the calls is
//! measured, not taste: memory slots before the interrupt chips, vCPUs before eventfds, no PIT.

#![expect(unsafe_code, reason = "KVM takes raw descriptors and raw memory; each block argues why")]

mod cpuid;
mod kick;
mod registers;
mod vcpu;

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use mica_units::{Gpa, VcpuCount};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use crate::memory::GuestMemory;
use crate::virtio::Event;

pub use kick::{KickError, install as install_kick, kick};
pub use vcpu::{Exits, Parked, Pause, Vcpu};

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
    /// The CPUID table is full.
    #[error("the CPUID table has no room for the topology leaves")]
    CpuidFull,
}

pub(crate) fn failed(operation: &'static str) -> impl Fn(errno::Error) -> KvmError {
    move |source| KvmError::Ioctl { operation, source }
}

/// A VM with its memory, interrupt chips and vCPUs in their reset state.
#[derive(Debug)]
pub struct Machine {
    vm: VmFd,
    vcpus: Vec<VcpuFd>,
    // KVM reads and writes this memory for as long as the VM lives. Declared last, dropped last.
    _memory: GuestMemory,
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
        let vm = kvm.create_vm().map_err(failed("create the VM"))?;
        vm.set_tss_address(layout::KVM_TSS).map_err(failed("set the TSS address"))?;
        add_memory(&vm, memory)?;
        vm.create_irq_chip().map_err(failed("create the interrupt chips"))?;
        let base = cpuid::Base::read(&kvm, vcpus)?;
        let vcpus = (0..vcpus.get())
            .map(|index| {
                let vcpu = vm.create_vcpu(u64::from(index)).map_err(failed("create a vCPU"))?;
                vcpu.set_cpuid2(&base.of_vcpu(index)?).map_err(failed("set CPUID"))?;
                registers::reset(&vcpu)?;
                Ok(vcpu)
            })
            .collect::<Result<Vec<_>, KvmError>>()?;
        Ok(Self { vm, vcpus, _memory: memory.clone() })
    }

    /// Points the boot vCPU at 64-bit code: paging on, interrupts off, `rsi` at the zero page.
    ///
    /// # Errors
    /// When the boot structures do not fit guest memory, or KVM refuses the registers.
    pub fn enter_at(&self, entry: Gpa) -> Result<(), KvmError> {
        let boot_vcpu = self.vcpus.first().ok_or(KvmError::Missing(Cap::NrVcpus))?;
        registers::enter_64bit(boot_vcpu, entry)
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
        let Self { vm, vcpus, _memory } = self;
        let vcpus = (0u8..).zip(vcpus).map(|(index, fd)| Vcpu::new(index, fd)).collect();
        (Held { _vm: vm, _memory }, vcpus)
    }
}

/// Keeps a running VM and its memory in place. Drop it after every vCPU thread has ended.
#[derive(Debug)]
pub struct Held {
    _vm: VmFd,
    _memory: GuestMemory,
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
            flags: 0,
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
