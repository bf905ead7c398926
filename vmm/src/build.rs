//! Wiring: from a build command and its descriptors to a shell whose threads wait in their jails.
//!
//! Called by `control`, once. Decides nothing but the order of things: what needs system calls that
//! guest time does not need (mappings, the KVM shell, rings, threads) happens here, before any filter
//! of the running VM is in place, and before anybody waits for a sandbox.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use mica_units::{Gpa, VcpuCount};
use mica_wire::vm::{self, Ending, FdRole, GUEST_CID, ShellConfig};

use crate::bus::{Bus, device_ending};
use crate::console::{Console, ConsoleError};
use crate::descriptors::{Descriptors, DescriptorsError};
use crate::exchange::{Exchange, ExchangeError};
use crate::generation::Generation;
use crate::jail;
use crate::jail::limits::{self, LimitError};
use crate::jail::seccomp::{Doors, SeccompError, ThreadKind};
use crate::kvm::{Held, KvmError, Machine};
use crate::layout;
use crate::memory::{GuestMemory, Memory, MemoryError, Userfault};
use crate::notices::Notices;
use crate::vcpus::{Starting, ThreadError, VcpuThreads};
use crate::virtio::{
    Balloon, Blk, BlkError, Connector, DeviceKind, DeviceLoop, Event, Gate, MmioDevice, MmioError,
    QUEUE_NOTIFY, Rng, VirtioDevice, Vsock,
};

/// Why the shell was not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The descriptors do not match their list, or one is missing or twice.
    #[error("the build command's descriptors are wrong")]
    Descriptors(#[from] DescriptorsError),
    /// A vCPU count out of bounds.
    #[error(transparent)]
    Vcpus(#[from] mica_units::VcpuCountError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The exchange.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// The disk's ring.
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
    /// A filter.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
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
        let words = causes(self);
        match self {
            Self::Descriptors(_)
            | Self::Vcpus(_)
            | Self::Memory(_)
            | Self::Console(_)
            | Self::Exchange(_)
            | Self::Kvm(KvmError::ApiVersion(_)) => Ending::BadConfig(words),
            Self::Disk(_)
            | Self::Kvm(_)
            | Self::Device(_)
            | Self::Limit(_)
            | Self::Thread(_)
            | Self::Seccomp(_)
            | Self::Make { .. } => Ending::Internal(words),
        }
    }
}

/// An error and everything that caused it, in words.
#[must_use]
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words.push_str(": ");
        words.push_str(&error.to_string());
        cause = error.source();
    }
    words
}

fn make(what: &'static str) -> impl Fn(std::io::Error) -> BuildError {
    move |source| BuildError::Make { what, source }
}

/// A VM that is there in full, and whose threads wait.
#[derive(Debug)]
pub struct Shell {
    /// Guest memory.
    pub memory: Memory,
    /// Its size.
    pub memory_mib: u32,
    /// How many vCPUs there are.
    pub vcpu_count: VcpuCount,
    /// The vCPU threads.
    pub vcpus: VcpuThreads,
    /// The KVM machine around them.
    pub held: Held,
    /// Serial port and virtio devices.
    pub bus: Arc<Bus>,
    /// Parks the device thread.
    pub gate: Arc<Gate>,
    /// Hands sockets to the vsock device.
    pub connector: Connector,
    /// Tells the guest that it is a copy.
    pub generation: Generation,
    /// Plans and states.
    pub exchange: Exchange,
    /// For the shard: tells writes, and has pages served.
    pub userfault: Option<Userfault>,
    /// What the other threads tell.
    pub notices: Arc<Notices>,
    /// What the control thread may do until there is a guest.
    pub doors: Option<Doors>,
    devices: JoinHandle<()>,
    // The socket stays open as long as this does.
    spare: OwnedFd,
}

impl Shell {
    /// What the shard has to know.
    #[must_use]
    pub fn numbers(&self) -> vm::Shell {
        vm::Shell {
            memory_address: self.memory.address(),
            spare_fd: self.spare.as_raw_fd(),
            exchange_fd: self.exchange.fd(),
            console_fd: self.bus.console().fd(),
            userfault_fd: self.userfault.as_ref().map(Userfault::fd),
        }
    }

    /// The root disk, if the shell was made for one.
    #[must_use]
    pub fn disk(&self) -> Option<&Arc<MmioDevice>> {
        self.bus.devices().iter().find(|device| device.kind() == DeviceKind::Blk)
    }

    /// Stops the guest and its devices, in this order, and waits for the threads.
    ///
    /// # Errors
    /// With the ending that it means, when a thread cannot be stopped.
    pub fn stop(self) -> Result<(), Ending> {
        let internal = |error: &dyn std::error::Error| Ending::Internal(causes(error));
        self.vcpus.stop().map_err(|error| internal(&error))?;
        self.gate.stop().map_err(|error| internal(&error))?;
        self.devices.join().map_err(|_| Ending::Internal("the device thread panicked".to_owned()))
    }
}

/// Builds everything.
///
/// # Errors
/// See [`BuildError`].
pub fn build(
    config: &ShellConfig,
    fds: Vec<OwnedFd>,
    notices: &Arc<Notices>,
) -> Result<Shell, BuildError> {
    let allowed = [FdRole::Kvm, FdRole::Console, FdRole::Exchange, FdRole::Spare];
    let mut fds = Descriptors::sort(&config.fds, fds, &allowed)?;
    let vcpu_count = config.vcpu_count()?;
    let memory = Memory::reserve_with(config.memory(), config.log_writes)?;
    limits::allow_address_space(config.memory())?;
    let exchange = Exchange::new(fds.required(FdRole::Exchange)?, config.exchange_bytes)?;
    let console_fd = fds.required(FdRole::Console)?;
    let spare = fds.required(FdRole::Spare)?;
    // With a disk the limit follows when that comes.
    if !config.disk {
        limits::allow_file_bytes(None::<&OwnedFd>)?;
    }

    let machine = Machine::new(fds.required(FdRole::Kvm)?, memory.guest(), vcpu_count)?;
    let (devices, connector) = make_devices(config.disk, memory.guest(), &machine, notices)?;
    let line = Event::new().map_err(make("the serial interrupt"))?;
    machine.interrupt_on_signal(&line, layout::SERIAL_GSI)?;
    let generation = Event::new().map_err(make("the interrupt of the generation id"))?;
    machine.interrupt_on_signal(&generation, layout::GENERATION_GSI)?;
    let console = Console::new(console_fd, config.console_bytes, line, Arc::clone(notices))?;
    let bus = Arc::new(Bus::new(console, devices.clone()));

    let userfault = match jail::take_userfault() {
        Some(fd) => {
            Some(Userfault::new(fd).map_err(|errno| make("the userfaultfd")(errno.into()))?)
        }
        None => None,
    };
    let gate = Arc::new(Gate::new().map_err(make("the gate of the device thread"))?);
    let starting = Starting::default();
    let devices = start_devices(&starting, devices, &gate, notices)?;
    let (held, vcpus) = machine.split();
    let vcpus = VcpuThreads::start(&starting, vcpus, &bus, notices)?;
    starting.all_jailed()?;
    Ok(Shell {
        memory,
        memory_mib: config.memory_mib,
        vcpu_count,
        vcpus,
        held,
        bus,
        gate,
        connector,
        generation: Generation::new(generation),
        exchange,
        userfault,
        notices: Arc::clone(notices),
        doors: Some(Doors::open()?),
        devices,
        spare,
    })
}

/// The disk if there is one, vsock, rng and balloon: in this order in the guest.
fn make_devices(
    disk: bool,
    memory: &GuestMemory,
    machine: &Machine,
    notices: &Arc<Notices>,
) -> Result<(Vec<Arc<MmioDevice>>, Connector), BuildError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    if disk {
        devices.push(Box::new(Blk::new()?));
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

fn start_devices(
    starting: &Starting,
    devices: Vec<Arc<MmioDevice>>,
    gate: &Arc<Gate>,
    notices: &Arc<Notices>,
) -> Result<JoinHandle<()>, BuildError> {
    let device_loop =
        DeviceLoop::new(devices, Arc::clone(gate)).map_err(make("the device loop"))?;
    let (ended, gate) = (Arc::clone(notices), Arc::clone(gate));
    Ok(starting.spawn("devices".to_owned(), ThreadKind::Devices, notices, move || {
        // Dropped last: who learns that the thread is gone finds the reason.
        let gone = gate.on_end();
        if let Err(error) = device_loop.run() {
            ended.end(device_ending(&error));
        }
        drop(gone);
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_name_every_cause_once() {
        let error = BuildError::from(DescriptorsError::Twice);
        let Ending::BadConfig(words) = error.ending() else { panic!("whose fault") };
        assert_eq!(words, "the build command's descriptors are wrong: a role is there twice");
        let error = make("a thing")(std::io::Error::other("the house is on fire"));
        assert_eq!(
            error.ending(),
            Ending::Internal("making a thing failed: the house is on fire".to_owned())
        );
    }
}
