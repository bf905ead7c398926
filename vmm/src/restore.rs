//! Giving a shell its guest: from a kernel, or from layers of memory and a saved state.
//!
//! Called by `control`, while every thread of the shell waits. The order of a restore:
//!
//! 1. Plan and state are copied out of the exchange and checked in full, before anything is touched.
//! 2. The disk, in a shell that has not run: its file goes into the ring, which is then closed for good.
//! 3. Memory: the plan is carried out.
//! 4. The vCPUs, on their threads; then the interrupt chips, which may pass something on to them, the
//!    clock, the devices, and the serial port.
//! 5. Kicks and interrupts that were on their way are made up for.
//!
//! Refuses whatever does not fit as a bad configuration: a state may come from a damaged or a forged file.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use mica_wire::vm::plan::{self, Entry, PlanError};
use mica_wire::vm::{BootConfig, Ending, FdRole, RestoreConfig};
use vm_memory::GuestMemoryError;

use crate::boot::{self, BootError, Images};
use crate::build::{Shell, causes};
use crate::console::SerialError;
use crate::descriptors::{Descriptors, DescriptorsError};
use crate::exchange::{Exchange, OutsideExchange};
use crate::jail::limits::{self, LimitError};
use crate::kvm::{Cpuid, CpuidError, KvmError, RestoreError};
use crate::memory::{ApplyError, Layer, LayerError};
use crate::state::{StateError, Unfit, VmState};
use crate::vcpus::ThreadError;
use crate::virtio::{BlkError, DeviceError};

/// Why a shell did not get its guest.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The descriptors do not match their list, or one is missing.
    #[error("the command's descriptors are wrong")]
    Descriptors(#[from] DescriptorsError),
    /// A disk for a shell without one, or none for a shell with one.
    #[error("{0}")]
    DiskThere(&'static str),
    /// The images.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] BlkError),
    /// A limit of this process.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// Plan or state are not in the exchange.
    #[error(transparent)]
    Exchange(#[from] OutsideExchange),
    /// The plan is none.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A layer is none.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The plan was not carried out.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The state is none.
    #[error(transparent)]
    State(#[from] StateError),
    /// The state is of another VM.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// The state is of another kind of processor.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// A vCPU.
    #[error(transparent)]
    Vcpus(#[from] ThreadError),
    /// The machine.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The generation id could not be written.
    #[error("writing the generation id failed")]
    Generation(#[from] GuestMemoryError),
    /// Nor could the guest be told.
    #[error("raising the line of the generation id failed")]
    Notify(#[source] std::io::Error),
}

impl StartError {
    /// Whose fault it is: the configuration's, or the host's and ours.
    #[must_use]
    pub fn ending(&self) -> Ending {
        let words = causes(self);
        // What KVM calls invalid are numbers of the state.
        let refused = |error: &KvmError| match error {
            KvmError::Ioctl { source, .. } => source.errno() == libc::EINVAL,
            _ => false,
        };
        let configured = match self {
            Self::Descriptors(_)
            | Self::DiskThere(_)
            | Self::Boot(_)
            | Self::Disk(_)
            | Self::Exchange(_)
            | Self::Plan(_)
            | Self::Layer(_)
            | Self::Apply(ApplyError::Outside(_) | ApplyError::Shrunk)
            | Self::State(_)
            | Self::Unfit(_)
            | Self::Cpuid(_) => true,
            Self::Vcpus(ThreadError::Restore(RestoreError::Kvm(error))) | Self::Kvm(error) => {
                refused(error)
            }
            Self::Vcpus(ThreadError::Restore(_)) => true,
            Self::Apply(_)
            | Self::Limit(_)
            | Self::Vcpus(_)
            | Self::Serial(_)
            | Self::Device(_)
            | Self::Generation(_)
            | Self::Notify(_) => false,
        };
        if configured { Ending::BadConfig(words) } else { Ending::Internal(words) }
    }
}

/// Loads a kernel into a shell that has not run.
///
/// # Errors
/// See [`StartError`]. The shell is of no use then.
pub fn boot(shell: &Shell, config: &BootConfig, fds: Vec<OwnedFd>) -> Result<(), StartError> {
    let allowed = [FdRole::Kernel, FdRole::Initramfs, FdRole::Disk];
    let mut fds = Descriptors::sort(&config.fds, fds, &allowed)?;
    let kernel = File::from(fds.required(FdRole::Kernel)?);
    let initramfs = fds.take(FdRole::Initramfs).map(File::from);
    attach_disk(shell, fds.take(FdRole::Disk), config.disk_read_only)?;
    let images = Images { kernel, initramfs, cmdline: &config.cmdline };
    let devices = shell.bus.devices().len();
    let loaded = boot::load(shell.memory.guest(), images, shell.vcpu_count, devices)?;
    Ok(shell.vcpus.enter_at(loaded.entry)?)
}

/// What a restore is made of, checked.
#[derive(Debug)]
struct Checked {
    plan: Vec<Entry>,
    layers: Vec<Layer>,
    state: VmState,
    cpuid: Option<Arc<Cpuid>>,
}

/// Puts a saved guest into a shell: one that has not run, or a frozen VM, which is rolled back.
///
/// # Errors
/// See [`StartError`]. The shell is of no use then.
pub fn restore(
    shell: &mut Shell,
    config: &RestoreConfig,
    fds: Vec<OwnedFd>,
    has_run: bool,
) -> Result<(), StartError> {
    let allowed = [FdRole::Disk, FdRole::Layer];
    let allowed = if has_run { &allowed[1..] } else { &allowed[..] };
    let mut fds = Descriptors::sort(&config.fds, fds, allowed)?;
    let disk = fds.take(FdRole::Disk);
    let Checked { plan, layers, state, cpuid } = check(shell, config, fds.take_layers())?;
    if !has_run {
        // Whether it is read-only is part of the device's state.
        attach_disk(shell, disk, false)?;
    }
    shell.memory.apply(&plan, &layers)?;

    let VmState { vcpus, machine, serial, devices, .. } = state;
    shell.vcpus.restore(vcpus, cpuid.as_ref())?;
    for (device, saved) in shell.bus.devices().iter().zip(&devices) {
        device.restore(saved)?;
    }
    shell.vcpus.done()?;
    if let Some(cpuid) = cpuid {
        shell.held.set_cpuid(Arc::unwrap_or_clone(cpuid));
    }
    shell.held.restore_chips(&machine)?;
    shell.held.restore_clock(machine.clock_ns)?;
    shell.bus.console().restore(&serial)?;
    shell.generation.set(shell.memory.guest(), config.generation)?;
    shell.generation.notify().map_err(StartError::Notify)?;
    Ok(shell.bus.devices().iter().try_for_each(|device| device.catch_up())?)
}

/// Lets the guest of a shell run.
///
/// # Errors
/// See [`StartError`].
pub fn run(shell: &Shell) -> Result<(), StartError> {
    shell.gate.open().map_err(|source| DeviceError::Host {
        device: crate::virtio::DeviceKind::Vsock,
        operation: "wake the device thread",
        source,
    })?;
    Ok(shell.vcpus.run()?)
}

fn check(
    shell: &Shell,
    config: &RestoreConfig,
    layers: Vec<OwnedFd>,
) -> Result<Checked, StartError> {
    let layers = layers.into_iter().map(Layer::new).collect::<Result<Vec<_>, _>>()?;
    let plan = shell.exchange.read(0, config.plan_bytes)?;
    let plan = plan::decode(&plan, shell.memory.frames(), layers.len())?;
    let at = Exchange::behind(config.plan_bytes);
    let state = VmState::decode(&shell.exchange.read(at, config.state_bytes)?)?;
    if state.memory_mib != shell.memory_mib {
        return Err(Unfit("its memory has another size").into());
    }
    if state.vcpus.len() != usize::from(shell.vcpu_count.get()) {
        return Err(Unfit("it has another number of vCPUs").into());
    }
    if state.devices.len() != shell.bus.devices().len() {
        return Err(Unfit("it has other devices").into());
    }
    let cpuid = shell.held.cpuid_for(&state.cpuid)?.map(Arc::new);
    Ok(Checked { plan, layers, state, cpuid })
}

fn attach_disk(shell: &Shell, disk: Option<OwnedFd>, read_only: bool) -> Result<(), StartError> {
    match (shell.disk(), disk) {
        (Some(device), Some(disk)) => {
            limits::allow_file_bytes(Some(&disk))?;
            Ok(device.attach(File::from(disk), read_only)?)
        }
        (None, None) => Ok(()),
        (Some(_), None) => Err(StartError::DiskThere("the disk is missing")),
        (None, Some(_)) => Err(StartError::DiskThere("the shell was made without a disk")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kvm_calls_invalid_is_the_states_fault() {
        let ioctl = |errno| KvmError::Ioctl {
            operation: "set the segment registers",
            source: vmm_sys_util::errno::Error::new(errno),
        };
        let vcpu = |errno| StartError::from(ThreadError::from(RestoreError::from(ioctl(errno))));
        assert!(matches!(vcpu(libc::EINVAL).ending(), Ending::BadConfig(_)));
        assert!(matches!(vcpu(libc::ENOMEM).ending(), Ending::Internal(_)));
        let unknown = StartError::from(ThreadError::from(RestoreError::UnknownMsr(7)));
        assert!(matches!(unknown.ending(), Ending::BadConfig(_)));
        assert!(matches!(StartError::from(ThreadError::Late).ending(), Ending::Internal(_)));
    }
}
