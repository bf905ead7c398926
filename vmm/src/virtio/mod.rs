//! The virtio devices of one VM: virtio 1.2, modern virtio-mmio only.
//!
//! Called by `mica-vm`'s boot code, which makes the devices, registers their event descriptors with
//! KVM and gives MMIO exits to them, and by the thread that runs the [`DeviceLoop`]. Refuses legacy
//! drivers, and every guest-supplied address, length, index or count that it has not checked.
//!
//! ```text
//!   vCPU threads                          device thread                        host
//!   MMIO exit ──▶ MmioDevice::{read,write}
//!                   │ registers, behind one lock per device
//!   QueueNotify ──▶ queue event (ioeventfd) ──▶ DeviceLoop (epoll) ──▶ VirtioDevice::process
//!                                                 │  used rings           blk: restricted io_uring
//!                 irqfd ◀── Interrupt ◀───────────┘                       vsock: sockets
//!                                                                         rng: getrandom
//!                                                                         balloon: madvise
//! ```
//! Making them:
//! ```text
//! let blk = Blk::new()?; // its file comes later, by MmioDevice::attach
//! let (vsock, connector) = Vsock::new(GUEST_CID, Box::new(move || doorbell()))?;
//! let device = MmioDevice::new(Box::new(blk), Arc::clone(&memory), irq_event)?;
//! // KVM: for (i, event) in device.queue_events(): ioeventfd at base + QUEUE_NOTIFY, datamatch i: u32
//! let devices = vec![device /* , ... */];
//! let looper = DeviceLoop::new(devices, gate)?; // before seccomp
//! // on its own thread, after the filter: looper.run()
//! ```

mod balloon;
mod blk;
mod device_loop;
#[cfg(test)]
mod driver;
mod event;
mod fault;
mod gate;
mod interrupt;
mod mmio;
#[cfg(test)]
mod mmio_tests;
mod queue;
mod rng;
#[cfg(test)]
mod saved_tests;
mod vsock;

use std::fmt;
use std::fs::File;
use std::os::fd::BorrowedFd;

use crate::state::{DeviceState, Unfit};

pub use balloon::Balloon;
pub use blk::{Blk, BlkError};
pub use device_loop::DeviceLoop;
pub use event::Event;
pub use fault::{DeviceError, GuestFault, Rule};
pub use gate::{Gate, GateError};
pub use mmio::{MMIO_BYTES, MmioDevice, MmioError, QUEUE_NOTIFY};
pub use queue::{Chain, Segment, VirtQueue};
pub use rng::Rng;
pub use vsock::{ConnectError, Connector, Vsock};

/// Guest memory as the devices see it. No Rust reference ever points into it: every access is a
/// bounds-checked volatile copy by the `vm-memory` crate.
pub type GuestRam = crate::memory::GuestMemory;

/// Which device, with its number in the virtio specification (1.2, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceKind {
    /// A disk.
    Blk = 2,
    /// A source of randomness.
    Rng = 4,
    /// Reports of free pages.
    Balloon = 5,
    /// Stream sockets between host and guest.
    Vsock = 19,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blk => "blk",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
        })
    }
}

/// What a call of [`VirtioDevice::process`] may have been made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// Bit `n`: the driver kicked queue `n`.
    pub queues: u32,
    /// The device's own descriptor is readable.
    pub wake: bool,
}

/// Whether a device has more to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing until the next event.
    Idle,
    /// It stopped for fairness; call it again without waiting.
    More,
}

/// One device behind the MMIO transport.
///
/// The transport owns the queues and the registers; the device owns what is behind them. All
/// methods are called under the transport's lock, so none of them may wait for anything.
pub trait VirtioDevice: Send + fmt::Debug {
    /// Which device this is.
    fn kind(&self) -> DeviceKind;

    /// The device-specific feature bits offered. The transport adds its own.
    fn features(&self) -> u64;

    /// The largest size of each queue: powers of two, at most 8 queues.
    fn queue_sizes(&self) -> &'static [u16];

    /// Reads the configuration space; bytes outside it read as 0.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// The driver writes the configuration space; what cannot be written is not.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// The driver has said `DRIVER_OK`. `features` are those it accepted.
    fn activate(&mut self, features: u64);

    /// The driver has reset the device. Work in flight must not touch guest memory afterwards.
    fn reset(&mut self);

    /// A descriptor that is readable when the device has something to do.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Gives it the file behind it, once, before the guest runs.
    ///
    /// # Errors
    /// When it takes none, or not this one.
    fn attach(&mut self, _file: File, _read_only: bool) -> Result<(), BlkError> {
        Err(BlkError::NoDisk)
    }

    /// Does a bounded amount of work. Called on the device thread only, also before the driver is
    /// ready and after a reset; the queues are not live then: they give no chains and take none.
    ///
    /// # Errors
    /// When the guest broke a rule, or the host failed. Either ends the VM.
    fn process(
        &mut self,
        queues: &mut [VirtQueue],
        memory: &GuestRam,
        ready: Ready,
    ) -> Result<Progress, DeviceError>;

    /// Brings what is in flight to its end and begins nothing. Called on the device thread while the
    /// VM is being frozen, first at once, then each time [`VirtioDevice::wake_fd`] is readable, until
    /// it says that nothing is in flight any more.
    ///
    /// # Errors
    /// As for [`VirtioDevice::process`].
    fn drain(
        &mut self,
        _queues: &mut [VirtQueue],
        _memory: &GuestRam,
    ) -> Result<bool, DeviceError> {
        Ok(true)
    }

    /// What it keeps beside registers and queues. Called when it is drained.
    fn save(&self) -> DeviceState;

    /// Takes on what was saved, in a device that has not run or that is drained, and forgets what it
    /// was before. [`VirtioDevice::activate`] follows when the saved driver was ready; then every
    /// queue is processed once, so that no kick is lost.
    ///
    /// # Errors
    /// When the state is another device's, or names more than this device can have.
    fn restore(&mut self, state: &DeviceState) -> Result<(), Unfit>;
}

/// Copies `data.len()` bytes at `offset` of a little configuration space; outside it reads 0.
fn read_config_bytes(space: &[u8], offset: usize, data: &mut [u8]) {
    data.fill(0);
    if let Some(rest) = space.get(offset..) {
        let length = rest.len().min(data.len());
        data[..length].copy_from_slice(&rest[..length]);
    }
}
