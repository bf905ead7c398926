//! Register state of a vCPU: what every one starts with, and 64-bit entry for the first.
//!
//! Called when a VM is built. Knows the x86 boot protocol's register contract and nothing of images.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use mica_units::Gpa;

use super::{KvmError, failed};
use crate::boot::tables::{self, Descriptor};
use crate::layout;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back.
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;

const LAPIC_LVT0: usize = 0x350;
const LAPIC_LVT1: usize = 0x360;
const DELIVERY_MODE_MASK: u32 = 0x700;
const DELIVERY_NMI: u32 = 0x400;
const DELIVERY_EXTINT: u32 = 0x700;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; interrupts are off.
const RFLAGS_RESET: u64 = 2;

/// What every vCPU gets before it runs.
pub fn reset(vcpu: &VcpuFd) -> Result<(), KvmError> {
    set_msrs(vcpu)?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(failed("set the FPU state"))?;
    set_local_interrupts(vcpu)
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let wanted = [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&wanted).map_err(|_| KvmError::Msr(0))?;
    let set = vcpu.set_msrs(&msrs).map_err(failed("set MSRs"))?;
    if set == wanted.len() { Ok(()) } else { Err(KvmError::Msr(set)) }
}

/// LINT0 takes the (absent) legacy PIC, LINT1 the NMI, as firmware leaves them.
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut lapic = vcpu.get_lapic().map_err(failed("read the local APIC"))?;
    for (at, mode) in [(LAPIC_LVT0, DELIVERY_EXTINT), (LAPIC_LVT1, DELIVERY_NMI)] {
        let mut bytes = [0; 4];
        for (byte, reg) in bytes.iter_mut().zip(&lapic.regs[at..at + 4]) {
            *byte = reg.cast_unsigned();
        }
        let value = (u32::from_le_bytes(bytes) & !DELIVERY_MODE_MASK) | mode;
        for (reg, byte) in lapic.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
            *reg = byte.cast_signed();
        }
    }
    vcpu.set_lapic(&lapic).map_err(failed("set the local APIC"))
}

/// 64-bit mode with the identity map and descriptors that [`tables`] wrote, at `entry`.
pub fn enter_64bit(vcpu: &VcpuFd, entry: Gpa) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(failed("read the segment registers"))?;
    let code = segment(tables::CODE_SELECTOR, tables::CODE);
    let data = segment(tables::DATA_SELECTOR, tables::DATA);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(tables::TSS_SELECTOR, tables::TSS);
    sregs.gdt.base = layout::GDT.raw();
    sregs.gdt.limit = tables::GDT_BYTES - 1;
    sregs.idt.base = layout::IDT.raw();
    sregs.idt.limit = tables::IDT_BYTES - 1;
    sregs.cr3 = layout::PAGE_TABLES.raw();
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(failed("set the segment registers"))?;
    let regs = kvm_regs {
        rip: entry.raw(),
        rsi: layout::ZERO_PAGE.raw(),
        rsp: layout::BOOT_STACK.raw(),
        rbp: layout::BOOT_STACK.raw(),
        rflags: RFLAGS_RESET,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(failed("set the registers"))
}

fn segment(selector: u16, descriptor: Descriptor) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: if descriptor.pages { 0xffff_ffff } else { 0xffff },
        selector,
        type_: descriptor.kind,
        present: 1,
        dpl: 0,
        db: u8::from(descriptor.pages && !descriptor.long),
        s: u8::from(descriptor.code_or_data),
        l: u8::from(descriptor.long),
        g: u8::from(descriptor.pages),
        ..Default::default()
    }
}
