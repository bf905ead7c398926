//! Saving and restoring what KVM holds of a vCPU, and of the machine around the vCPUs.
//!
//! Called by each vCPU's own thread for its vCPU, so that they work side by side, and by the control
//! thread for the rest. Refuses registers that this host does not have, by name. The order of a restore
//! is not free:
//! CPUID first, because what else is accepted depends on it; the local APIC after the segment registers,
//! which hold its base and mode; MSRs after the local APIC, because the deadline of its timer is one;
//! the time stamp counter before that deadline; what is on its way last, so that nothing before it takes
//! it off.

use std::collections::BTreeSet;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, Xsave, kvm_clock_data,
    kvm_irqchip, kvm_mp_state, kvm_msr_entry, kvm_xsave, kvm_xsave2,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::plain::{from_bytes, to_bytes};
use super::{KvmError, failed};
use crate::state::{MSRS_MAX, MachineState, MsrState, VcpuState, XSAVE_BYTES_MAX};

/// Most MSRs of one request, a limit of the kernel's.
const MSRS_PER_REQUEST: usize = 256;
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Writing these makes KVM write the wall clock into guest memory: an order, not a register. A guest
/// writes it each time before it reads.
const MSRS_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];
/// MSRs of Hyper-V, which no guest here is offered. KVM sets up its emulation of it, with memory for
/// each vCPU, as soon as one is touched.
const MSRS_HYPER_V: std::ops::Range<u32> = 0x4000_0000..0x4000_0200;
/// MSRs that a guest can change and that not every kernel lists: memory types, variable, fixed and default.
const MSRS_UNLISTED: [std::ops::RangeInclusive<u32>; 6] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x277..=0x277, 0x2ff..=0x2ff];
/// A frequency within this many parts of a million is the same: the guest's clock is kept right by
/// other means. As QEMU has it.
const TSC_TOLERANCE_PPM: u64 = 250;
/// Where the counter cannot be scaled, so much is taken for the host's own doubt: it measures its
/// counter anew at every start, emulated machines by up to parts of a percent otherwise. Guests that are
/// Linux keep their time by the KVM clock, which is right in any case.
const TSC_DOUBT_PPM: u64 = 10_000;

/// What a save reads on this host, found out once, when the machine is built.
#[derive(Clone, Debug)]
pub struct Shape {
    /// In the order in which they are restored.
    msrs: Vec<u32>,
    known: BTreeSet<u32>,
    /// Bytes of the extended state.
    xsave_bytes: usize,
    tsc_khz: u32,
    tsc_can_be_set: bool,
}

/// A state that this host's KVM cannot take.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A register that is not here.
    #[error("the saved state has MSR {0:#x}, which this host's KVM does not offer")]
    UnknownMsr(u32),
    /// A value that is refused.
    #[error("this host's KVM refuses the saved value of MSR {0:#x}")]
    Msr(u32),
    /// Extended state of another size.
    #[error("the saved extended state has {saved} bytes, this host's has {here}")]
    Xsave {
        /// Of the state.
        saved: usize,
        /// Of this host.
        here: usize,
    },
    /// A time stamp counter that runs at another speed.
    #[error("the saved time stamp counter runs at {saved} kHz, this host's at {here}")]
    Tsc {
        /// Of the state.
        saved: u32,
        /// Of this host.
        here: u32,
    },
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

impl Shape {
    /// Finds out what there is, on a vCPU that has not run.
    pub(super) fn probe(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let needed = [Cap::Xcrs, Cap::Debugregs, Cap::VcpuEvents, Cap::AdjustClock, Cap::MpState];
        if let Some(cap) = needed.into_iter().find(|cap| !kvm.check_extension(*cap)) {
            return Err(KvmError::Missing(cap));
        }
        let xsave_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let shape = Self {
            msrs: Vec::new(),
            known: BTreeSet::new(),
            // 0 where the kernel is older than the extension, and then it is the fixed size.
            xsave_bytes: xsave_bytes.max(size_of::<kvm_xsave>()),
            tsc_khz: vcpu.get_tsc_khz().map_err(failed("read the frequency of the TSC"))?,
            tsc_can_be_set: kvm.check_extension(Cap::TscControl),
        };
        if shape.xsave_bytes > XSAVE_BYTES_MAX {
            return Err(KvmError::Xsave(shape.xsave_bytes));
        }
        let msrs = usable_msrs(kvm, vcpu)?;
        Ok(Self { known: msrs.iter().copied().collect(), msrs, ..shape })
    }
}

/// The MSRs that KVM lists and that can be read and written on this host, in order.
fn usable_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, KvmError> {
    let listed = kvm.get_msr_index_list().map_err(failed("list the MSRs"))?;
    let mut indices: Vec<u32> = listed
        .as_slice()
        .iter()
        .copied()
        .chain(MSRS_UNLISTED.into_iter().flatten())
        .filter(|index| !MSRS_WALL_CLOCK.contains(index) && !MSRS_HYPER_V.contains(index))
        .collect();
    indices.sort_unstable_by_key(|index| match *index {
        MSR_TSC => (0, *index),
        MSR_TSC_DEADLINE => (2, *index),
        other => (1, other),
    });
    indices.dedup();
    // KVM lists by what it was built with, and reads by what the processor and the CPUID table have.
    let mut readable = read_what_can_be(vcpu, &indices)?;
    // And some are only ever read. The TSC itself is not tried: writing it moves it.
    readable.retain(|msr| msr.index != MSR_TSC);
    let mut usable = vec![MSR_TSC];
    usable.extend(write_what_can_be(vcpu, &readable)?);
    if usable.len() > MSRS_MAX { Err(KvmError::Msr(usable.len())) } else { Ok(usable) }
}

fn read_what_can_be(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<MsrState>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted = &rest[..rest.len().min(MSRS_PER_REQUEST)];
        let read = read_msrs(vcpu, wanted, &mut values)?;
        // The one that it stopped at is left out.
        let stopped = usize::from(read < wanted.len());
        rest = rest.get(read + stopped..).unwrap_or_default();
    }
    Ok(values)
}

fn write_what_can_be(vcpu: &VcpuFd, values: &[MsrState]) -> Result<Vec<u32>, KvmError> {
    let mut usable = Vec::with_capacity(values.len());
    let mut rest = values;
    while !rest.is_empty() {
        let wanted = &rest[..rest.len().min(MSRS_PER_REQUEST)];
        let written = write_msrs(vcpu, wanted)?;
        usable.extend(wanted[..written].iter().map(|msr| msr.index));
        let stopped = usize::from(written < wanted.len());
        rest = rest.get(written + stopped..).unwrap_or_default();
    }
    Ok(usable)
}

/// Appends the values of at most [`MSRS_PER_REQUEST`] MSRs, up to the first that cannot be read; how many.
fn read_msrs(
    vcpu: &VcpuFd,
    indices: &[u32],
    values: &mut Vec<MsrState>,
) -> Result<usize, KvmError> {
    let wanted: Vec<_> =
        indices.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&wanted).map_err(|_| KvmError::Msr(wanted.len()))?;
    let read = vcpu.get_msrs(&mut msrs).map_err(failed("read MSRs"))?;
    let read = read.min(wanted.len());
    let entry = |msr: &kvm_msr_entry| MsrState { index: msr.index, value: msr.data };
    values.extend(msrs.as_slice()[..read].iter().map(entry));
    Ok(read)
}

/// Writes at most [`MSRS_PER_REQUEST`] MSRs, up to the first that is refused; how many.
fn write_msrs(vcpu: &VcpuFd, values: &[MsrState]) -> Result<usize, KvmError> {
    let entry =
        |msr: &MsrState| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() };
    let wanted: Vec<_> = values.iter().map(entry).collect();
    let msrs = Msrs::from_entries(&wanted).map_err(|_| KvmError::Msr(wanted.len()))?;
    Ok(vcpu.set_msrs(&msrs).map_err(failed("write MSRs"))?.min(wanted.len()))
}

/// Everything of a vCPU that is out of the guest and has no exit half done.
pub(super) fn save(vcpu: &VcpuFd, shape: &Shape) -> Result<VcpuState, KvmError> {
    // First: reading it may change what the others give.
    let mp_state = vcpu.get_mp_state().map_err(failed("read the run state"))?.mp_state;
    let regs = vcpu.get_regs().map_err(failed("read the registers"))?;
    let sregs = vcpu.get_sregs().map_err(failed("read the segment registers"))?;
    let xcrs = vcpu.get_xcrs().map_err(failed("read the extended control registers"))?;
    let debugregs = vcpu.get_debug_regs().map_err(failed("read the debug registers"))?;
    let lapic = vcpu.get_lapic().map_err(failed("read the local APIC"))?;
    let mut msrs = Vec::with_capacity(shape.msrs.len());
    for wanted in shape.msrs.chunks(MSRS_PER_REQUEST) {
        let read = read_msrs(vcpu, wanted, &mut msrs)?;
        if let Some(index) = wanted.get(read) {
            return Err(KvmError::MsrLost(*index));
        }
    }
    let events = vcpu.get_vcpu_events().map_err(failed("read what is on its way"))?;
    Ok(VcpuState {
        regs: to_bytes(&regs),
        sregs: to_bytes(&sregs),
        xcrs: to_bytes(&xcrs),
        debugregs: to_bytes(&debugregs),
        lapic: to_bytes(&lapic),
        events: to_bytes(&events),
        xsave: save_xsave(vcpu, shape)?,
        mp_state,
        tsc_khz: shape.tsc_khz,
        msrs,
    })
}

/// Puts a saved vCPU into this one, whatever it was before. The CPUID table is in place already.
pub(super) fn restore(vcpu: &VcpuFd, shape: &Shape, state: &VcpuState) -> Result<(), RestoreError> {
    restore_tsc_khz(vcpu, shape, state.tsc_khz)?;
    vcpu.set_sregs(&from_bytes(&state.sregs)).map_err(failed("set the segment registers"))?;
    vcpu.set_xcrs(&from_bytes(&state.xcrs))
        .map_err(failed("set the extended control registers"))?;
    restore_xsave(vcpu, shape, &state.xsave)?;
    vcpu.set_regs(&from_bytes(&state.regs)).map_err(failed("set the registers"))?;
    vcpu.set_debug_regs(&from_bytes(&state.debugregs))
        .map_err(failed("set the debug registers"))?;
    vcpu.set_lapic(&from_bytes(&state.lapic)).map_err(failed("set the local APIC"))?;
    restore_msrs(vcpu, shape, &state.msrs)?;
    vcpu.set_vcpu_events(&from_bytes(&state.events)).map_err(failed("set what is on its way"))?;
    let mp_state = kvm_mp_state { mp_state: state.mp_state };
    vcpu.set_mp_state(mp_state).map_err(failed("set the run state"))?;
    Ok(())
}

fn restore_msrs(vcpu: &VcpuFd, shape: &Shape, msrs: &[MsrState]) -> Result<(), RestoreError> {
    if let Some(msr) = msrs.iter().find(|msr| !shape.known.contains(&msr.index)) {
        return Err(RestoreError::UnknownMsr(msr.index));
    }
    // In the order in which they were saved; a shape sorts them.
    for wanted in msrs.chunks(MSRS_PER_REQUEST) {
        let written = write_msrs(vcpu, wanted)?;
        if let Some(msr) = wanted.get(written) {
            return Err(RestoreError::Msr(msr.index));
        }
    }
    Ok(())
}

fn restore_tsc_khz(vcpu: &VcpuFd, shape: &Shape, saved: u32) -> Result<(), RestoreError> {
    let here = shape.tsc_khz;
    if is_within(TSC_TOLERANCE_PPM, here, saved) {
        return Ok(());
    }
    if shape.tsc_can_be_set {
        return Ok(vcpu.set_tsc_khz(saved).map_err(failed("set the frequency of the TSC"))?);
    }
    if is_within(TSC_DOUBT_PPM, here, saved) {
        return Ok(());
    }
    Err(RestoreError::Tsc { saved, here })
}

fn is_within(ppm: u64, here_khz: u32, saved_khz: u32) -> bool {
    u64::from(here_khz.abs_diff(saved_khz)) <= u64::from(here_khz) * ppm / 1_000_000
}

/// Words of the extended state beyond the fixed part.
fn extra_words(shape: &Shape) -> usize {
    (shape.xsave_bytes - size_of::<kvm_xsave>()).div_ceil(size_of::<u32>())
}

fn save_xsave(vcpu: &VcpuFd, shape: &Shape) -> Result<Vec<u8>, KvmError> {
    let refused = failed("read the extended state");
    let words = extra_words(shape);
    let mut bytes = Vec::with_capacity(shape.xsave_bytes);
    let mut append = |word: &u32| bytes.extend_from_slice(&word.to_le_bytes());
    if words == 0 {
        // The older request; it gives the fixed size, which is all there is.
        vcpu.get_xsave().map_err(refused)?.region.iter().for_each(append);
        return Ok(bytes);
    }
    let mut xsave = Xsave::new(words).map_err(|_| KvmError::Xsave(shape.xsave_bytes))?;
    // SAFETY: there is room for `xsave_bytes`, which is what KVM_CAP_XSAVE2 of this VM says that the
    // kernel writes.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(refused)?;
    xsave.as_fam_struct_ref().xsave.region.iter().for_each(&mut append);
    xsave.as_slice().iter().for_each(append);
    Ok(bytes)
}

fn restore_xsave(vcpu: &VcpuFd, shape: &Shape, bytes: &[u8]) -> Result<(), RestoreError> {
    let words = extra_words(shape);
    let here = size_of::<kvm_xsave>() + words * size_of::<u32>();
    if bytes.len() != here {
        return Err(RestoreError::Xsave { saved: bytes.len(), here });
    }
    let mut source = bytes.chunks_exact(size_of::<u32>()).map(|word| {
        let mut number = [0; 4];
        number.copy_from_slice(word);
        u32::from_le_bytes(number)
    });
    let mut fixed = kvm_xsave::default();
    fixed.region.iter_mut().zip(&mut source).for_each(|(word, saved)| *word = saved);
    let mut xsave = Xsave::new(words).map_err(|_| KvmError::Xsave(here))?;
    xsave.as_mut_slice().iter_mut().zip(source).for_each(|(word, saved)| *word = saved);
    // SAFETY: the length of the flexible part, which this does not touch, says how much room there is.
    let whole: &mut kvm_xsave2 = unsafe { xsave.as_mut_fam_struct() };
    whole.xsave.region = fixed.region;
    // SAFETY: it is as long as KVM_CAP_XSAVE2 of this VM says that the kernel reads (checked above).
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(failed("set the extended state"))?;
    Ok(())
}

/// The time stamp counter and its deadline, as a saved state has them.
#[derive(Clone, Copy, Debug)]
pub struct Tsc {
    counter: Option<MsrState>,
    deadline: Option<MsrState>,
}

impl Tsc {
    /// Of a state.
    #[must_use]
    pub fn of(state: &VcpuState) -> Self {
        let find = |index| state.msrs.iter().find(|msr| msr.index == index).copied();
        Self { counter: find(MSR_TSC), deadline: find(MSR_TSC_DEADLINE) }
    }
}

/// Sets the time stamp counter back to where it was saved, and with it the timer that counts on it.
pub(super) fn rewind(vcpu: &VcpuFd, tsc: &Tsc) -> Result<(), KvmError> {
    for msr in [tsc.counter, tsc.deadline].into_iter().flatten() {
        if write_msrs(vcpu, &[msr])? == 0 {
            return Err(KvmError::MsrLost(msr.index));
        }
    }
    Ok(())
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// The interrupt chips and the clock, while no vCPU runs.
pub(super) fn save_machine(vm: &VmFd) -> Result<MachineState, KvmError> {
    let mut chips = [[0; 512]; 3];
    for (chip, id) in chips.iter_mut().zip(CHIPS) {
        let mut state = kvm_irqchip { chip_id: id, ..Default::default() };
        vm.get_irqchip(&mut state).map_err(failed("read an interrupt chip"))?;
        let bytes: [u8; 520] = to_bytes(&state);
        // Behind the number and the padding.
        chip.copy_from_slice(&bytes[8..]);
    }
    let clock = vm.get_clock().map_err(failed("read the clock"))?;
    Ok(MachineState { chips, clock_ns: clock.clock })
}

/// Puts the interrupt chips back. Local APICs are restored before: an interrupt that the I/O APIC holds
/// is passed on to them.
pub(super) fn restore_chips(vm: &VmFd, state: &MachineState) -> Result<(), KvmError> {
    for (chip, id) in state.chips.iter().zip(CHIPS) {
        let mut bytes = [0; 520];
        bytes[..4].copy_from_slice(&id.to_ne_bytes());
        bytes[8..].copy_from_slice(chip);
        let state: kvm_irqchip = from_bytes(&bytes);
        vm.set_irqchip(&state).map_err(failed("set an interrupt chip"))?;
    }
    Ok(())
}

/// Lets the guest's clock go on from here.
pub(super) fn restore_clock(vm: &VmFd, clock_ns: u64) -> Result<(), KvmError> {
    // Without the flag that asks for the time since to be added: the guest did not live it.
    let clock = kvm_clock_data { clock: clock_ns, flags: 0, ..Default::default() };
    vm.set_clock(&clock).map_err(failed("set the clock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_was_measured_otherwise_is_not_another_machine() {
        assert!(is_within(TSC_DOUBT_PPM, 2_592_125, 2_596_214), "two starts of one emulated host");
        assert!(!is_within(TSC_TOLERANCE_PPM, 2_592_125, 2_596_214));
        assert!(!is_within(TSC_DOUBT_PPM, 2_600_000, 3_000_000));
    }
}
