//! Wiring: from a boot command and its descriptors to a VM whose threads wait to be let go.
//!
//! Called by `control`, once. Decides nothing but the order of things: what needs system calls that
//! guest time does not need (rings, mappings, KVM shells, threads) happens here, before any filter
//! of the running VM is in place.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use mica_units::{Gpa, VcpuCount};
use mica_wire::vm::{BootConfig, Ending, FdRole, GUEST_CID};

use crate::boot::{self, BootError, Images};
use crate::bus::{Bus, device_ending};
use crate::console::{Console, ConsoleError};
use crate::jail::limits::{self, LimitError};
use crate::jail::seccomp::ThreadKind;
use crate::kvm::{Held, KvmError, Machine};
use crate::layout;
use crate::memory::{self, GuestMemory, MemoryError};
use crate::notices::Notices;
use crate::vcpus::{Starting, ThreadError, VcpuThreads};
use crate::virtio::{
    Balloon, Blk, BlkError, Connector, DeviceLoop, Event, MmioDevice, MmioError, QUEUE_NOTIFY, Rng,
    VirtioDevice, Vsock,
};

/// Why the VM was not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The descriptors do not match their list, or one is missing or twice.
    #[error("the boot command's descriptors are wrong: {0}")]
    Descriptors(&'static str),
    /// A vCPU count out of bounds.
    #[error(transparent)]
    Vcpus(#[from] mica_units::VcpuCountError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The images.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] BlkError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A virtio device.
    #[error(transparent)]
    Device(#[from] MmioError),
    /// A limit of this process.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// A thread.
    #[error(transparent)]
    Thread(#[from] ThreadError),
    /// A descriptor of our own.
    #[error("making {what} failed")]
    Make {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl BuildError {
    /// Whose fault it is: the configuration's, or the host's and ours.
    #[must_use]
    pub fn ending(&self) -> Ending {
        let mut words = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            words.push_str(": ");
            words.push_str(&error.to_string());
            cause = error.source();
        }
        match self {
            Self::Descriptors(_)
            | Self::Vcpus(_)
            | Self::Memory(_)
            | Self::Boot(_)
            | Self::Console(_)
            | Self::Disk(_)
            | Self::Kvm(KvmError::ApiVersion(_)) => Ending::BadConfig(words),
            Self::Kvm(_)
            | Self::Device(_)
            | Self::Limit(_)
            | Self::Thread(_)
            | Self::Make { .. } => Ending::Internal(words),
        }
    }
}

fn make(what: &'static str) -> impl Fn(std::io::Error) -> BuildError {
    move |source| BuildError::Make { what, source }
}

/// The descriptors of a boot command, each under its role.
#[derive(Debug, Default)]
struct Descriptors {
    kvm: Option<OwnedFd>,
    kernel: Option<OwnedFd>,
    initramfs: Option<OwnedFd>,
    disk: Option<OwnedFd>,
    console: Option<OwnedFd>,
}

impl Descriptors {
    fn sort(roles: &[FdRole], fds: Vec<OwnedFd>) -> Result<Self, BuildError> {
        if roles.len() != fds.len() {
            return Err(BuildError::Descriptors("there are more or fewer than the list says"));
        }
        let mut sorted = Self::default();
        for (role, fd) in roles.iter().zip(VecDeque::from(fds)) {
            let slot = match role {
                FdRole::Kvm => &mut sorted.kvm,
                FdRole::Kernel => &mut sorted.kernel,
                FdRole::Initramfs => &mut sorted.initramfs,
                FdRole::Disk => &mut sorted.disk,
                FdRole::Console => &mut sorted.console,
                FdRole::Stream => {
                    return Err(BuildError::Descriptors("a stream does not belong to a boot"));
                }
            };
            if slot.replace(fd).is_some() {
                return Err(BuildError::Descriptors("a role is there twice"));
            }
        }
        Ok(sorted)
    }
}

fn required(fd: Option<OwnedFd>, missing: &'static str) -> Result<OwnedFd, BuildError> {
    fd.ok_or(BuildError::Descriptors(missing))
}

/// A VM whose threads are in their jails and wait.
#[derive(Debug)]
pub struct Built {
    /// Lets the threads go.
    pub starting: Starting,
    /// The running VM.
    pub running: Running,
}

/// A VM whose threads run.
#[derive(Debug)]
pub struct Running {
    /// Hands sockets to the vsock device.
    pub connector: Connector,
    /// The vCPU threads.
    pub vcpus: VcpuThreads,
    devices: JoinHandle<()>,
    stop_devices: Event,
    _held: Held,
}

impl Running {
    /// Stops the guest and its devices, in this order, and waits for the threads.
    ///
    /// # Errors
    /// With the ending that it means, when a thread cannot be stopped.
    pub fn stop(self) -> Result<(), Ending> {
        let internal = |error: &dyn std::error::Error| Ending::Internal(error.to_string());
        self.vcpus.stop().map_err(|error| internal(&error))?;
        self.stop_devices.signal().map_err(|error| internal(&error))?;
        self.devices.join().map_err(|_| Ending::Internal("the device thread panicked".to_owned()))
    }
}

/// Builds everything.
///
/// # Errors
/// See [`BuildError`].
pub fn build(
    config: &BootConfig,
    fds: Vec<OwnedFd>,
    notices: &Arc<Notices>,
) -> Result<Built, BuildError> {
    let fds = Descriptors::sort(&config.fds, fds)?;
    let vcpus = config.vcpu_count()?;
    let memory = memory::map(config.memory())?;
    let kvm = required(fds.kvm, "KVM is missing")?;
    let kernel = required(fds.kernel, "the kernel is missing")?;
    let console = required(fds.console, "the console is missing")?;
    limits::allow_file_bytes(fds.disk.as_ref())?;
    limits::allow_address_space(config.memory())?;

    let machine = Machine::new(kvm, &memory, vcpus)?;
    let (devices, connector) =
        make_devices(fds.disk, config.disk_read_only, &memory, &machine, notices)?;
    let images = Images {
        kernel: File::from(kernel),
        initramfs: fds.initramfs.map(File::from),
        cmdline: &config.cmdline,
    };
    let loaded = boot::load(&memory, images, vcpus, devices.len())?;
    machine.enter_at(loaded.entry)?;

    let line = Event::new().map_err(make("the serial interrupt"))?;
    machine.interrupt_on_signal(&line, layout::SERIAL_GSI)?;
    let console = Console::new(console, config.console_bytes, line, Arc::clone(notices))?;
    let bus = Arc::new(Bus::new(console, devices.clone()));
    start_threads(machine, vcpus, &bus, devices, connector, notices)
}

/// The disk if there is one, vsock, rng and balloon: in this order in the guest.
fn make_devices(
    disk: Option<OwnedFd>,
    read_only: bool,
    memory: &GuestMemory,
    machine: &Machine,
    notices: &Arc<Notices>,
) -> Result<(Vec<Arc<MmioDevice>>, Connector), BuildError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    if let Some(disk) = disk {
        devices.push(Box::new(Blk::new(File::from(disk), read_only)?));
    }
    let doorbell = Arc::clone(notices);
    let (vsock, connector) =
        Vsock::new(GUEST_CID, Box::new(move || doorbell.doorbell())).map_err(make("vsock"))?;
    devices.push(Box::new(vsock));
    devices.push(Box::new(Rng::new()));
    devices.push(Box::new(Balloon::new()));

    let memory = Arc::new(memory.clone());
    let mut attached = Vec::with_capacity(devices.len());
    for (index, device) in (0u32..).zip(devices) {
        let line = Event::new().map_err(make("a device interrupt"))?;
        machine.interrupt_on_signal(&line, layout::FIRST_DEVICE_GSI + index)?;
        let device = MmioDevice::new(device, Arc::clone(&memory), line)?;
        let base = layout::MMIO_DEVICES.raw() + u64::from(index) * layout::MMIO_DEVICE_BYTES;
        for (queue, event) in (0u32..).zip(device.queue_events()) {
            machine.signal_on_write(event, Gpa::new(base + QUEUE_NOTIFY), queue)?;
        }
        attached.push(device);
    }
    Ok((attached, connector))
}

fn start_threads(
    machine: Machine,
    vcpus: VcpuCount,
    bus: &Arc<Bus>,
    devices: Vec<Arc<MmioDevice>>,
    connector: Connector,
    notices: &Arc<Notices>,
) -> Result<Built, BuildError> {
    let mut starting = Starting::new(usize::from(vcpus.get()) + 1);
    let stop_devices = Event::new().map_err(make("the stop event"))?;
    let stop = stop_devices.try_clone().map_err(make("the stop event"))?;
    let device_loop = DeviceLoop::new(devices, stop).map_err(make("the device loop"))?;
    let ended = Arc::clone(notices);
    let devices =
        starting.spawn("devices".to_owned(), ThreadKind::Devices, notices, move || {
            if let Err(error) = device_loop.run() {
                ended.end(device_ending(&error));
            }
        })?;
    let (held, vcpus) = machine.split();
    let vcpus = VcpuThreads::start(&starting, vcpus, bus, notices)?;
    starting.all_jailed()?;
    let running = Running { connector, vcpus, devices, stop_devices, _held: held };
    Ok(Built { starting, running })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn descriptors_are_matched_by_their_list() {
        let roles = [FdRole::Kernel, FdRole::Kvm];
        let sorted = Descriptors::sort(&roles, vec![null(), null()]).unwrap();
        assert!(sorted.kernel.is_some() && sorted.kvm.is_some() && sorted.disk.is_none());
        for (roles, count) in [
            (&[FdRole::Kvm][..], 0),
            (&[FdRole::Kvm][..], 2),
            (&[FdRole::Kvm, FdRole::Kvm][..], 2),
            (&[FdRole::Stream][..], 1),
        ] {
            let fds = (0..count).map(|_| null()).collect();
            assert!(Descriptors::sort(roles, fds).is_err(), "{roles:?} {count}");
        }
    }

    #[test]
    fn endings_name_every_cause_once() {
        let error = BuildError::from(BootError::Read {
            what: "kernel",
            source: std::io::Error::other("the disk is on fire"),
        });
        let words = "reading the kernel failed: the disk is on fire".to_owned();
        assert_eq!(error.ending(), Ending::BadConfig(words));
    }
}
