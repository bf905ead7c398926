//! What a guest sees of its processors.
//!
//! Called when a VM is built. Starts from what KVM supports on this host, gives every vCPU its own
//! APIC id and one flat socket of single-thread cores, and refuses nested virtualisation and the
//! performance counters: both are attack surface that no sandbox needs.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use mica_units::VcpuCount;

use super::{KvmError, failed};
use crate::state::CpuidLeaf;

/// More leaves than any processor has had; KVM itself allows no more.
const ENTRIES_MAX: usize = kvm_bindings::KVM_MAX_CPUID_ENTRIES;

const LEAF_TOPOLOGY: u32 = 0xb;
/// Leaves that describe the host's topology and would contradict ours.
const LEAVES_DROPPED: [u32; 3] = [0xb, 0x1f, 0x8000_0026];

const ECX1_VMX: u32 = 1 << 5;
const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const EDX1_HTT: u32 = 1 << 28;
const ECX81_CMP_LEGACY: u32 = 1 << 1;
const ECX81_SVM: u32 = 1 << 2;
const ECX81_PERFCTR: u32 = (1 << 23) | (1 << 24) | (1 << 28);

/// A saved table that this host cannot offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuidError {
    /// A processor of another maker.
    #[error("the state was saved on a processor of another vendor")]
    Vendor,
    /// Features that are not here.
    #[error(
        "the state needs processor features that this host lacks: bits {missing:#x} of {register} \
         in CPUID leaf {function:#x}, {index}"
    )]
    Features {
        /// Which leaf.
        function: u32,
        /// Which part of it.
        index: u32,
        /// Which register.
        register: &'static str,
        /// The bits.
        missing: u32,
    },
}

/// Registers of leaves in which each bit is a feature that guest code may rely on: `eax`, `ebx`, `ecx`,
/// `edx`. What is not here says how much there is of something, and to whom it belongs.
const FEATURES: &[(u32, u32, [bool; 4])] = &[
    (0x1, 0, [false, false, true, true]),
    (0x6, 0, [true, false, false, false]),
    (0x7, 0, [false, true, true, true]),
    (0x7, 1, [true, true, true, true]),
    (0x7, 2, [false, false, false, true]),
    (0xd, 0, [true, false, false, true]),
    (0xd, 1, [true, false, true, true]),
    (0x14, 0, [false, true, true, false]),
    (0x4000_0001, 0, [true, false, false, false]),
    (0x8000_0001, 0, [false, false, true, true]),
    (0x8000_0007, 0, [false, false, false, true]),
    (0x8000_0008, 0, [false, true, false, false]),
    (0x8000_0021, 0, [true, false, false, false]),
];
const REGISTERS: [&str; 4] = ["eax", "ebx", "ecx", "edx"];

/// The leaves that all vCPUs of a VM share.
#[derive(Clone, Debug)]
pub struct Base {
    entries: Vec<kvm_cpuid_entry2>,
    vcpus: VcpuCount,
}

impl Base {
    /// Reads what KVM supports and takes out what guests do not get.
    pub fn read(kvm: &Kvm, vcpus: VcpuCount) -> Result<Self, KvmError> {
        let supported =
            kvm.get_supported_cpuid(ENTRIES_MAX).map_err(failed("read the supported CPUID"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self::from_supported(supported.as_slice(), vcpus, tsc_deadline))
    }

    fn from_supported(supported: &[kvm_cpuid_entry2], vcpus: VcpuCount, deadline: bool) -> Self {
        let mut entries: Vec<_> = supported
            .iter()
            .filter(|entry| !LEAVES_DROPPED.contains(&entry.function))
            .copied()
            .collect();
        for entry in &mut entries {
            restrict(entry, vcpus, deadline);
        }
        Self { entries, vcpus }
    }

    /// The table, for a saved state.
    pub fn leaves(&self) -> Vec<CpuidLeaf> {
        let leaf = |entry: &kvm_cpuid_entry2| CpuidLeaf {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
        };
        self.entries.iter().map(leaf).collect()
    }

    /// The saved table, if it is another than this one and this host can offer it.
    pub fn for_saved(&self, saved: &[CpuidLeaf]) -> Result<Option<Self>, CpuidError> {
        let here = self.leaves();
        if here == saved {
            return Ok(None);
        }
        let find = |leaves: &[CpuidLeaf], function, index| {
            let found = leaves.iter().find(|leaf| leaf.function == function && leaf.index == index);
            found.map_or([0; 4], |leaf| leaf.registers)
        };
        let vendor = |leaves| find(leaves, 0, 0)[1..].to_vec();
        if vendor(&here) != vendor(saved) {
            return Err(CpuidError::Vendor);
        }
        for (function, index, registers) in FEATURES.iter().copied() {
            let (have, need) = (find(&here, function, index), find(saved, function, index));
            for at in (0..4).filter(|at| registers[*at]) {
                let missing = need[at] & !have[at];
                if missing != 0 {
                    let register = REGISTERS[at];
                    return Err(CpuidError::Features { function, index, register, missing });
                }
            }
        }
        let entry = |leaf: &CpuidLeaf| {
            let [eax, ebx, ecx, edx] = leaf.registers;
            let CpuidLeaf { function, index, flags, .. } = *leaf;
            kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
        };
        Ok(Some(Self { entries: saved.iter().map(entry).collect(), vcpus: self.vcpus }))
    }

    /// The whole table of one vCPU.
    pub fn of_vcpu(&self, index: u8) -> Result<CpuId, KvmError> {
        let apic_id = u32::from(index);
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                0x1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | (apic_id << 24),
                // AMD: extended APIC id; one thread in each core; node 0 of 1.
                0x8000_001e => {
                    (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id, 0);
                }
                _ => {}
            }
        }
        entries.extend(topology(apic_id, self.vcpus));
        CpuId::from_entries(&entries).map_err(|_| KvmError::CpuidFull)
    }
}

/// Bits of an APIC id that number the cores.
fn core_bits(vcpus: VcpuCount) -> u32 {
    u32::from(vcpus.get()).next_power_of_two().trailing_zeros()
}

fn restrict(entry: &mut kvm_cpuid_entry2, vcpus: VcpuCount, tsc_deadline: bool) {
    let count = u32::from(vcpus.get());
    match entry.function {
        // The topology leaf must be within the highest leaf, or a guest never asks for it.
        0x0 => entry.eax = entry.eax.max(LEAF_TOPOLOGY),
        0x1 => {
            entry.ecx = (entry.ecx & !ECX1_VMX) | ECX1_HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= ECX1_TSC_DEADLINE;
            }
            // Without the number of the processor that KVM read it on; each vCPU gets its own.
            entry.ebx = (entry.ebx & 0x0000_ffff) | (count << 16);
            entry.edx = if count > 1 { entry.edx | EDX1_HTT } else { entry.edx & !EDX1_HTT };
        }
        // Likewise.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // Caches: levels 1 and 2 belong to one core, level 3 to all. Subleaf type 0 ends the list.
        0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            let cores = if entry.function == 0x4 { count - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (cores << 26);
        }
        // Performance counters.
        0xa | 0x8000_0022 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        0x8000_0001 => {
            entry.ecx &= !(ECX81_SVM | ECX81_PERFCTR);
            if count > 1 {
                entry.ecx |= ECX81_CMP_LEGACY;
            }
        }
        0x8000_0008 => {
            entry.ecx = (entry.ecx & !0xf0ff) | (core_bits(vcpus) << 12) | (count - 1);
        }
        _ => {}
    }
}

/// Leaf 0xB: a thread level of one, a core level of all, and the end.
fn topology(apic_id: u32, vcpus: VcpuCount) -> [kvm_cpuid_entry2; 3] {
    const TYPE_THREAD: u32 = 1;
    const TYPE_CORE: u32 = 2;
    let level = |index, shift, count, kind: u32| kvm_cpuid_entry2 {
        function: LEAF_TOPOLOGY,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | (kind << 8),
        edx: apic_id,
        ..Default::default()
    };
    [
        level(0, 0, 1, TYPE_THREAD),
        level(1, core_bits(vcpus), u32::from(vcpus.get()), TYPE_CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ecx: u32::MAX, edx: u32::MAX, ..Default::default() }
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        let vcpus = VcpuCount::new(3).unwrap();
        let host = [leaf(0), leaf(1), leaf(0xb), leaf(0x1f), leaf(0x8000_001e)];
        let base = Base::from_supported(&host, vcpus, true);
        for index in 0..3 {
            let table = base.of_vcpu(index).unwrap();
            let find = |function| table.as_slice().iter().filter(move |e| e.function == function);
            assert_eq!(find(1).next().unwrap().ebx >> 24, u32::from(index));
            assert_eq!(find(0x8000_001e).next().unwrap().eax, u32::from(index));
            assert!(find(0xb).all(|entry| entry.edx == u32::from(index)));
            assert_eq!(find(0xb).count(), 3);
            assert_eq!(find(0x1f).count(), 0);
            assert_eq!(find(0).next().unwrap().eax, 0xb);
        }
    }

    #[test]
    fn nested_virtualisation_and_counters_are_gone() {
        let host = [leaf(1), leaf(0xa), leaf(0x8000_0001)];
        let base = Base::from_supported(&host, VcpuCount::new(1).unwrap(), false);
        let table = base.of_vcpu(0).unwrap();
        let ecx = |function| {
            table.as_slice().iter().find(|entry| entry.function == function).unwrap().ecx
        };
        assert_eq!(ecx(1) & ECX1_VMX, 0);
        assert_ne!(ecx(1) & ECX1_HYPERVISOR, 0);
        assert_eq!(ecx(0x8000_0001) & ECX81_SVM, 0);
        assert_eq!(ecx(0xa), 0);
    }

    #[test]
    fn a_saved_table_is_taken_where_the_host_has_all_of_it() {
        let vcpus = VcpuCount::new(2).unwrap();
        let table = |ecx1: u32, vendor: u32, processor: u32| {
            let leaf = |function| kvm_cpuid_entry2 { function, ..Default::default() };
            let host = [
                kvm_cpuid_entry2 { ebx: vendor, ..leaf(0) },
                kvm_cpuid_entry2 { ebx: processor << 24, ecx: ecx1, ..leaf(1) },
            ];
            Base::from_supported(&host, vcpus, false)
        };
        let (small, large) = (table(0b0101, 7, 1), table(0b1101, 7, 2));
        assert!(small.for_saved(&table(0b0101, 7, 9).leaves()).unwrap().is_none());
        let taken = large.for_saved(&small.leaves()).unwrap().unwrap();
        assert_eq!(taken.leaves(), small.leaves());
        let missing = CpuidError::Features { function: 1, index: 0, register: "ecx", missing: 8 };
        assert_eq!(small.for_saved(&large.leaves()).unwrap_err(), missing);
        let other = table(0b0101, 8, 1);
        assert_eq!(small.for_saved(&other.leaves()).unwrap_err(), CpuidError::Vendor);
        // A table without a leaf lacks what is in it; a saved one without it asks for nothing.
        assert!(large.for_saved(&small.leaves()[..1]).unwrap().is_some());
    }

    #[test]
    fn core_bits_hold_every_apic_id() {
        for (count, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3)] {
            assert_eq!(core_bits(VcpuCount::new(count).unwrap()), bits);
        }
    }
}
