//! The MMIO transport: the register page of one device (virtio 1.2, 4.2.2).
//!
//! Called by vCPU threads on MMIO exits, and by the device loop to run the device. Refuses the
//! legacy interface, registers out of turn, and queues that are not wholly in guest memory.
//!
//! ```text
//!   0 ──ACKNOWLEDGE, DRIVER──▶ negotiate ──FEATURES_OK──▶ set up queues ──DRIVER_OK──▶ live
//!   ▲   (any order)            (feature registers open)   (queue registers open)       │
//!   └──────────────── write 0: reset, from every state ◀───────────────────────────────┘
//! ```
//! A bit once set stays until reset. `FEATURES_OK` is taken back when the driver accepted what was
//! not offered, or not VERSION_1. Any other order puts the device into `DEVICE_NEEDS_RESET`, where
//! it does nothing until it is reset. A ring outside guest memory is a [`GuestFault`].

mod saved;

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::interrupt::Interrupt;
use super::queue::QueueSetup;
use super::{
    BlkError, DeviceError, DeviceKind, Event, GuestFault, GuestRam, Progress, Ready, VirtQueue,
    VirtioDevice,
};

/// Bytes of the register page: registers to 0x100, then the configuration space.
pub const MMIO_BYTES: u64 = 0x200;

/// Offset of the register a driver kicks a queue with. A 4-byte write of the queue's index may be
/// turned into that queue's event by KVM, or arrive at [`MmioDevice::write`].
pub const QUEUE_NOTIFY: u64 = reg::QUEUE_NOTIFY;

/// Most queues of one device.
const QUEUES_MAX: usize = 8;

/// Offered by the transport for every device.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Register offsets (virtio 1.2, table 4.1).
mod reg {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Status bits (virtio 1.2, 2.1).
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
    pub const KNOWN: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// One device as the guest sees it. Shared between the vCPU threads and the device thread.
#[derive(Debug)]
pub struct MmioDevice {
    kind: DeviceKind,
    memory: Arc<GuestRam>,
    interrupt: Interrupt,
    queue_events: Vec<Event>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    device: Box<dyn VirtioDevice>,
    queues: Vec<VirtQueue>,
    setups: Vec<QueueSetup>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
}

/// Why a device could not be put behind the transport.
#[derive(Debug, thiserror::Error)]
pub enum MmioError {
    /// A mistake in a device of ours.
    #[error("device {0} asks for queues the transport does not have; fix its queue_sizes")]
    Queues(DeviceKind),
    /// No descriptor for a queue event.
    #[error("cannot make a queue event; raise the limit of open files")]
    Event(#[source] std::io::Error),
}

impl MmioDevice {
    /// Puts `device` behind a register page. `line` is the irqfd's event: one write, one interrupt
    /// (edge-triggered), made from (a duplicate of) an [`Event`].
    ///
    /// # Errors
    /// When queue events cannot be made.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestRam>,
        line: Event,
    ) -> Result<Arc<Self>, MmioError> {
        let kind = device.kind();
        let sizes = device.queue_sizes();
        let queues: Option<Vec<VirtQueue>> =
            (0..).zip(sizes).map(|(index, size)| VirtQueue::new(kind, index, *size)).collect();
        let queues = queues
            .filter(|queues| matches!(queues.len(), 1..=QUEUES_MAX))
            .ok_or(MmioError::Queues(kind))?;
        let queue_events = sizes
            .iter()
            .map(|_| Event::new())
            .collect::<Result<_, _>>()
            .map_err(MmioError::Event)?;
        let state = State {
            device,
            setups: vec![QueueSetup::default(); queues.len()],
            queues,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
        };
        let interrupt = Interrupt::new(line);
        Ok(Arc::new(Self { kind, memory, interrupt, queue_events, state: Mutex::new(state) }))
    }

    /// Which device it is.
    #[must_use]
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// One event per queue, in order: what an ioeventfd on [`QUEUE_NOTIFY`] signals.
    #[must_use]
    pub fn queue_events(&self) -> &[Event] {
        &self.queue_events
    }

    /// A guest's read at `offset` of the page. What is not a register reads as 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(reg::CONFIG) {
            if let Ok(at) = usize::try_from(at) {
                self.lock().device.read_config(at, data);
            }
            return;
        }
        // Registers are read 4 aligned bytes at a time (4.2.2.2); anything else gets nothing.
        if let (Ok(word), true) = (<&mut [u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    /// A guest's write at `offset` of the page. What is not a register is not written.
    ///
    /// # Errors
    /// [`DeviceError::Guest`] when the guest broke a rule that kills its VM,
    /// [`DeviceError::Host`] when an event could not be signalled.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        if let Some(at) = offset.checked_sub(reg::CONFIG) {
            if let Ok(at) = usize::try_from(at) {
                self.lock().device.write_config(at, data);
            }
            return Ok(());
        }
        match (<[u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            (Ok(word), true) => self.write_register(offset, u32::from_le_bytes(word)),
            _ => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Only a panic poisons it, and then the process is going down anyway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            reg::MAGIC => u32::from_le_bytes(*b"virt"),
            reg::VERSION => 2,
            reg::DEVICE_ID => self.kind as u32,
            reg::VENDOR_ID => u32::from_le_bytes(*b"mica"),
            // Before the lock: an interrupt handler reads it each time.
            reg::INTERRUPT_STATUS => self.interrupt.status(),
            // No device here has shared memory regions: length and base are all ones (4.2.2.1).
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => u32::MAX,
            // No configuration space here ever changes while the VM runs.
            reg::CONFIG_GENERATION => 0,
            _ => self.lock().read_register(offset),
        }
    }

    fn write_register(&self, offset: u64, value: u32) -> Result<(), DeviceError> {
        match offset {
            reg::QUEUE_NOTIFY => self.kick(value),
            reg::INTERRUPT_ACK => {
                self.interrupt.acknowledge(value);
                Ok(())
            }
            reg::STATUS => self.write_status(value),
            _ => {
                self.lock().write_register(offset, value, &self.memory)?;
                Ok(())
            }
        }
    }

    fn kick(&self, queue: u32) -> Result<(), DeviceError> {
        let event = usize::try_from(queue).ok().and_then(|queue| self.queue_events.get(queue));
        event.map_or(Ok(()), Event::signal).map_err(self.host("signal a queue event"))
    }

    fn write_status(&self, value: u32) -> Result<(), DeviceError> {
        let mut state = self.lock();
        if value == 0 {
            state.reset();
            self.interrupt.reset();
            return Ok(());
        }
        match state.write_status(value) {
            StatusChange::Nothing => Ok(()),
            // The device may have work that waited for the driver; any queue event runs it.
            StatusChange::Live => self.kick(0),
            StatusChange::Broken => {
                self.interrupt.config_change().map_err(self.host("signal an interrupt"))
            }
        }
    }

    /// The device's own event source, for the loop. It stays open as long as the device.
    pub(super) fn with_wake_fd<T>(&self, use_fd: impl FnOnce(BorrowedFd<'_>) -> T) -> Option<T> {
        self.lock().device.wake_fd().map(use_fd)
    }

    /// Runs the device once, and interrupts the driver if that is due.
    pub(super) fn process(&self, ready: Ready) -> Result<Progress, DeviceError> {
        self.with_queues(|device, queues, memory| device.process(queues, memory, ready))
    }

    fn with_queues<T>(
        &self,
        work: impl FnOnce(&mut dyn VirtioDevice, &mut [VirtQueue], &GuestRam) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let mut guard = self.lock();
        // Nothing is taken or given before DRIVER_OK (3.1.1), nor once a reset is due.
        let live = guard.is_between(status::DRIVER_OK, status::FAILED);
        let State { device, queues, .. } = &mut *guard;
        queues.iter_mut().for_each(|queue| queue.set_live(live));
        let outcome = work(&mut **device, queues, &self.memory)?;
        let mut interrupt = false;
        for queue in queues {
            interrupt |= queue.take_interrupt(&self.memory)?;
        }
        if interrupt {
            self.interrupt.used_buffer().map_err(self.host("signal an interrupt"))?;
        }
        Ok(outcome)
    }

    /// Gives the device the file behind it.
    ///
    /// # Errors
    /// See [`VirtioDevice::attach`].
    pub fn attach(&self, file: File, read_only: bool) -> Result<(), BlkError> {
        self.lock().device.attach(file, read_only)
    }

    /// Ends what is in flight and begins nothing; whether nothing is in flight any more.
    pub(super) fn drain(&self) -> Result<bool, DeviceError> {
        self.with_queues(|device, queues, memory| device.drain(queues, memory))
    }

    pub(super) fn host(
        &self,
        operation: &'static str,
    ) -> impl Fn(std::io::Error) -> DeviceError + use<> {
        let device = self.kind;
        move |source| DeviceError::Host { device, operation, source }
    }
}

enum StatusChange {
    Nothing,
    Live,
    Broken,
}

impl State {
    fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    /// The status bits say that `yes` are set, `no` are not, and the device is not broken.
    fn is_between(&self, yes: u32, no: u32) -> bool {
        self.status & yes == yes && self.status & (no | status::NEEDS_RESET) == 0
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(VirtQueue::reset);
        self.setups.fill(QueueSetup::default());
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
    }

    fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_sel).ok().filter(|index| *index < self.queues.len())
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.selected();
        match offset {
            reg::DEVICE_FEATURES => half(self.offered(), self.device_features_sel),
            reg::QUEUE_NUM_MAX => queue.map_or(0, |index| u32::from(self.queues[index].size_max())),
            reg::QUEUE_READY => queue.map_or(0, |index| u32::from(self.queues[index].is_ready())),
            reg::STATUS => self.status,
            _ => 0,
        }
    }

    fn write_register(
        &mut self,
        offset: u64,
        value: u32,
        memory: &GuestRam,
    ) -> Result<(), GuestFault> {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::DRIVER_FEATURES => {
                if self.is_between(status::DRIVER, status::FEATURES_OK) {
                    set_half(&mut self.driver_features, self.driver_features_sel, value);
                }
            }
            reg::QUEUE_SEL => self.queue_sel = value,
            reg::QUEUE_READY => return self.write_queue_ready(value, memory),
            _ => self.write_queue_setup(offset, value),
        }
        Ok(())
    }

    fn write_queue_setup(&mut self, offset: u64, value: u32) {
        let open = self.is_between(status::FEATURES_OK, status::DRIVER_OK);
        let Some(index) = self.selected().filter(|_| open) else { return };
        if self.queues[index].is_ready() {
            return;
        }
        let setup = &mut self.setups[index];
        match offset {
            // A size above 16 bits becomes 0, which set-up refuses.
            reg::QUEUE_NUM => setup.size = u16::try_from(value).unwrap_or(0),
            reg::QUEUE_DESC_LOW => set_half(&mut setup.descriptors, 0, value),
            reg::QUEUE_DESC_HIGH => set_half(&mut setup.descriptors, 1, value),
            reg::QUEUE_DRIVER_LOW => set_half(&mut setup.driver, 0, value),
            reg::QUEUE_DRIVER_HIGH => set_half(&mut setup.driver, 1, value),
            reg::QUEUE_DEVICE_LOW => set_half(&mut setup.device, 0, value),
            reg::QUEUE_DEVICE_HIGH => set_half(&mut setup.device, 1, value),
            _ => {}
        }
    }

    fn write_queue_ready(&mut self, value: u32, memory: &GuestRam) -> Result<(), GuestFault> {
        let Some(index) = self.selected() else { return Ok(()) };
        let open = self.is_between(status::FEATURES_OK, status::DRIVER_OK);
        let queue = &mut self.queues[index];
        match (value, queue.is_ready()) {
            // Taking a queue back is legal at any time; it stays unusable until reset.
            (0, _) => queue.reset(),
            (1, false) if open => {
                let setup = &mut self.setups[index];
                setup.event_index = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
                queue.set_up(setup, memory).map_err(|rule| queue.fault(rule))?;
            }
            _ => {}
        }
        Ok(())
    }

    fn write_status(&mut self, value: u32) -> StatusChange {
        let was = self.status;
        if was & status::NEEDS_RESET != 0 {
            return StatusChange::Nothing;
        }
        let added = value & !was;
        let in_order = value & was == was
            && value & !status::KNOWN == 0
            && (added & status::FEATURES_OK == 0 || was & status::DRIVER != 0)
            && (added & status::DRIVER_OK == 0 || was & status::FEATURES_OK != 0);
        if !in_order {
            self.status |= status::NEEDS_RESET;
            return StatusChange::Broken;
        }
        self.status = value;
        if added & status::FEATURES_OK != 0 && !self.features_are_good() {
            self.status &= !status::FEATURES_OK;
        }
        if added & status::DRIVER_OK != 0 && value & status::FAILED == 0 {
            self.device.activate(self.driver_features);
            return StatusChange::Live;
        }
        StatusChange::Nothing
    }

    fn features_are_good(&self) -> bool {
        let accepted = self.driver_features;
        accepted & !self.offered() == 0 && accepted & (1 << VIRTIO_F_VERSION_1) != 0
    }
}

/// 32 of 64 bits: the low ones for selector 0, the high ones for 1, zero above.
fn half(bits: u64, selector: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = bits.to_le_bytes();
    match selector {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

/// The counterpart of [`half`]; a selector above 1 changes nothing.
fn set_half(bits: &mut u64, selector: u32, value: u32) {
    match selector {
        0 => *bits = *bits & !u64::from(u32::MAX) | u64::from(value),
        1 => *bits = *bits & u64::from(u32::MAX) | u64::from(value) << 32,
        _ => {}
    }
}
