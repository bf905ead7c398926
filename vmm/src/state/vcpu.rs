//! What is saved of the processors, the interrupt chips and the clock.
//!
//! Made and taken back by `kvm`. What the kernel gives and takes as one structure is kept as its bytes:
//! those layouts are the kernel's promise to programs and do not change. The kernel checks what is in
//! them when it takes them back. Refuses nothing by itself.

use rkyv::{Archive, Deserialize, Serialize};

/// Most MSRs of one vCPU. The kernel lists about half as many.
pub const MSRS_MAX: usize = 512;
/// Most bytes of one vCPU's extended state: the fixed 4096, and room for tiles.
pub const XSAVE_BYTES_MAX: usize = 16 * 1024;
/// Most leaves of a CPUID table: the kernel takes no more.
pub const CPUID_LEAVES_MAX: usize = 256;

/// One vCPU.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct VcpuState {
    /// `struct kvm_regs`: the general registers.
    pub regs: [u8; 144],
    /// `struct kvm_sregs`: segments, control registers, the APIC's base.
    pub sregs: [u8; 312],
    /// `struct kvm_xcrs`: which extended state is on.
    pub xcrs: [u8; 392],
    /// `struct kvm_debugregs`.
    pub debugregs: [u8; 128],
    /// `struct kvm_lapic_state`: the local APIC.
    pub lapic: [u8; 1024],
    /// `struct kvm_vcpu_events`: exceptions and interrupts that are on their way.
    pub events: [u8; 64],
    /// `struct kvm_xsave`: the extended state, FPU first.
    pub xsave: Vec<u8>,
    /// Runnable, halted, or waiting to be started.
    pub mp_state: u32,
    /// Frequency of the time stamp counter.
    pub tsc_khz: u32,
    /// Model-specific registers, the time stamp counter first and its deadline last.
    pub msrs: Vec<MsrState>,
}

/// One model-specific register.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrState {
    /// Which.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// One leaf of the CPUID table that all vCPUs share.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidLeaf {
    /// `eax` of the question.
    pub function: u32,
    /// `ecx` of the question.
    pub index: u32,
    /// Whether `index` counts.
    pub flags: u32,
    /// Answers: `eax`, `ebx`, `ecx`, `edx`.
    pub registers: [u32; 4],
}

/// What all vCPUs share.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct MachineState {
    /// The first PIC, the second, and the I/O APIC.
    pub chips: [[u8; 512]; 3],
    /// Nanoseconds of the guest's clock.
    pub clock_ns: u64,
}

/// The registers of the serial port.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SerialState {
    /// Low and high byte of the divisor.
    pub divisor: [u8; 2],
    /// Which interrupts are on.
    pub interrupt_enable: u8,
    /// Which interrupt there is.
    pub interrupt_identification: u8,
    /// Line control.
    pub line_control: u8,
    /// Line status.
    pub line_status: u8,
    /// Modem control.
    pub modem_control: u8,
    /// Modem status.
    pub modem_status: u8,
    /// A byte the guest may keep there.
    pub scratch: u8,
}
