//! One idle VM that the emulated host holds for as long as it runs.
//!
//! Called by `mica-lab inside`. KVM patches the kernel's scheduler and its own interrupt path when the
//! first VM comes and the last one goes (static keys: preempt notifiers, APICs that are off). Under
//! software emulation with a thread for each CPU, a CPU can still execute the breakpoint of such a
//! patch after it is gone, and the host's kernel dies in `__schedule` with `Oops: int3`. A VM that
//! never goes keeps the keys where they are. Refuses to run anything in it.

use anyhow::{Context as _, Result};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// Bit 11 of IA32_APIC_BASE: the APIC is on (Intel SDM vol. 3, 11.4.4).
const APIC_ENABLED: u64 = 1 << 11;

/// Holds the keys until it is dropped.
#[derive(Debug)]
pub struct IdleVm {
    _vcpu: VcpuFd,
    _vm: VmFd,
}

/// Makes the VM, with one vCPU whose APIC is off.
pub fn hold() -> Result<IdleVm> {
    let vm = Kvm::new().context("open /dev/kvm")?.create_vm().context("make an idle VM")?;
    vm.create_irq_chip().context("give the idle VM its interrupt controllers")?;
    let vcpu = vm.create_vcpu(0).context("make the idle VM's vCPU")?;
    let mut registers = vcpu.get_sregs().context("read the idle vCPU's registers")?;
    registers.apic_base &= !APIC_ENABLED;
    vcpu.set_sregs(&registers).context("switch the idle vCPU's APIC off")?;
    Ok(IdleVm { _vcpu: vcpu, _vm: vm })
}
