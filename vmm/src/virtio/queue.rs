//! One split virtqueue: chains in, used elements out.
//!
//! Called by the devices. Refuses, with a [`GuestFault`], every chain that is not wholly in form:
//! a device sees only segments that lie in guest memory, in the right order, bounded in number.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use super::{DeviceKind, GuestFault, GuestRam, Rule};

/// Most descriptors of one chain, indirect ones included. A driver may use at most the queue size
/// (virtio 1.2, 2.7.5.3.1), and no queue here is longer.
pub const CHAIN_SEGMENTS_MAX: usize = 256;

/// One buffer of a chain; it lies in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts.
    pub address: GuestAddress,
    /// How long it is. May be 0.
    pub bytes: u32,
}

/// One request: what the device may read, then what it may write. Reused from request to request,
/// so that taking one allocates nothing.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    readable: usize,
}

impl Chain {
    /// The index that names the chain in the used ring.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers for the device to read.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// Buffers for the device to write.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }
}

/// Bytes of all segments together. Cannot overflow: 256 times 2^32.
#[must_use]
pub fn total_bytes(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.bytes)).sum()
}

/// The segments from byte `skip` on. Lies within them, so no address can overflow.
pub(super) fn pieces(segments: &[Segment], skip: u64) -> impl Iterator<Item = Segment> {
    let mut skip = skip;
    segments.iter().filter_map(move |segment| {
        let here = skip.min(u64::from(segment.bytes));
        skip -= here;
        let bytes = u32::try_from(u64::from(segment.bytes) - here).ok()?;
        let address = segment.address.checked_add(here)?;
        (bytes > 0).then_some(Segment { address, bytes })
    })
}

/// Fills `buffer` from the segments, starting at byte `skip`; how much there was.
pub(super) fn copy_from_guest(
    memory: &GuestRam,
    segments: &[Segment],
    skip: u64,
    buffer: &mut [u8],
) -> Result<usize, GuestMemoryError> {
    let mut copied = 0;
    for piece in pieces(segments, skip) {
        let rest = buffer.get_mut(copied..).unwrap_or_default();
        let length = rest.len().min(usize::try_from(piece.bytes).unwrap_or(usize::MAX));
        if length == 0 {
            break;
        }
        memory.read_slice(&mut rest[..length], piece.address)?;
        copied += length;
    }
    Ok(copied)
}

/// Copies `data` into the segments, starting at byte `skip`; how much had room.
pub(super) fn copy_to_guest(
    memory: &GuestRam,
    segments: &[Segment],
    skip: u64,
    data: &[u8],
) -> Result<usize, GuestMemoryError> {
    let mut copied = 0;
    for piece in pieces(segments, skip) {
        let rest = data.get(copied..).unwrap_or_default();
        let length = rest.len().min(usize::try_from(piece.bytes).unwrap_or(usize::MAX));
        if length == 0 {
            break;
        }
        memory.write_slice(&rest[..length], piece.address)?;
        copied += length;
    }
    Ok(copied)
}

/// One queue of one device.
#[derive(Debug)]
pub struct VirtQueue {
    device: DeviceKind,
    index: u16,
    queue: Queue,
    live: bool,
    used_since_interrupt: bool,
}

impl VirtQueue {
    /// An unconfigured queue of at most `size_max` entries. `None` unless that is a power of two
    /// up to [`CHAIN_SEGMENTS_MAX`].
    pub(super) fn new(device: DeviceKind, index: u16, size_max: u16) -> Option<Self> {
        if usize::from(size_max) > CHAIN_SEGMENTS_MAX {
            return None;
        }
        let queue = Queue::new(size_max).ok()?;
        Some(Self { device, index, queue, live: false, used_since_interrupt: false })
    }

    /// The fault of breaking `rule` on this queue.
    #[must_use]
    pub fn fault(&self, rule: Rule) -> GuestFault {
        GuestFault { device: self.device, queue: self.index, rule }
    }

    /// Whether the driver has set it up and not taken it back.
    pub(super) fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// Whether the device may touch it: it is ready, and so is the driver. A driver may set a queue
    /// up and take it back as often as it likes before that.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.live && self.queue.ready()
    }

    /// Says whether the driver is ready.
    pub(super) fn set_live(&mut self, live: bool) {
        self.live = live;
    }

    pub(super) fn size_max(&self) -> u16 {
        self.queue.max_size()
    }

    /// Makes the queue ready as the driver described it.
    pub(super) fn set_up(&mut self, setup: &QueueSetup, memory: &GuestRam) -> Result<(), Rule> {
        self.reset();
        self.queue.try_set_size(setup.size).map_err(|_| Rule::QueueSize)?;
        // The crate takes an available ring at address 0 for "not configured".
        if setup.driver == 0 {
            return Err(Rule::QueueAddress);
        }
        let queue = &mut self.queue;
        queue
            .try_set_desc_table_address(GuestAddress(setup.descriptors))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(setup.driver)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(setup.device)))
            .map_err(|_| Rule::QueueAddress)?;
        queue.set_event_idx(setup.event_index);
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            self.reset();
            return Err(Rule::QueueOutsideMemory);
        }
        Ok(())
    }

    /// How far it has come: the numbers of the next chain to take and to return.
    pub(super) fn position(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Goes on from such a position, in a queue that has just been set up.
    pub(super) fn go_on_from(&mut self, (next_available, next_used): (u16, u16)) {
        self.queue.set_next_avail(next_available);
        self.queue.set_next_used(next_used);
    }

    /// Forgets everything. Chains taken before must not be returned afterwards; the devices see to
    /// it with their own `reset`.
    pub(super) fn reset(&mut self) {
        self.queue.reset();
        self.used_since_interrupt = false;
    }

    /// Takes the next chain into `chain`. `false` when there is none.
    ///
    /// # Errors
    /// When the ring or the chain is not in form.
    pub fn pop(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<bool, GuestFault> {
        if !self.is_live() {
            return Ok(false);
        }
        let next = match self.queue.iter(memory) {
            Ok(mut available) => available.next(),
            Err(virtio_queue::Error::InvalidAvailRingIndex) => {
                return Err(self.fault(Rule::AvailIndex));
            }
            Err(_) => return Err(self.fault(Rule::QueueOutsideMemory)),
        };
        let Some(descriptors) = next else { return Ok(false) };
        chain.head = descriptors.head_index();
        chain.segments.clear();
        chain.readable = 0;
        // The iterator ends both at a proper end and where it cannot go on; the flag of the last
        // descriptor tells which. It stops by itself after as many steps as the table has entries.
        let mut expects_more = true;
        for descriptor in descriptors {
            expects_more = descriptor.has_next();
            if chain.segments.len() == CHAIN_SEGMENTS_MAX {
                return Err(self.fault(Rule::ChainBroken));
            }
            let segment = Segment { address: descriptor.addr(), bytes: descriptor.len() };
            let access = if descriptor.is_write_only() {
                Permissions::Write
            } else if chain.readable == chain.segments.len() {
                chain.readable += 1;
                Permissions::Read
            } else {
                return Err(self.fault(Rule::ChainOrder));
            };
            let in_memory = usize::try_from(segment.bytes)
                .is_ok_and(|bytes| memory.check_range(segment.address, bytes, access));
            if !in_memory {
                return Err(self.fault(Rule::BufferOutsideMemory));
            }
            chain.segments.push(segment);
        }
        if expects_more { Err(self.fault(Rule::ChainBroken)) } else { Ok(true) }
    }

    /// Puts the chain taken last back, to be taken again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain with `bytes` written. Does nothing when the queue is not live any more.
    ///
    /// # Errors
    /// When the used ring is gone from memory, which set-up excludes.
    pub fn push_used(
        &mut self,
        memory: &GuestRam,
        head: u16,
        bytes: u32,
    ) -> Result<(), GuestFault> {
        if !self.is_live() {
            return Ok(());
        }
        self.used_since_interrupt = true;
        self.queue.add_used(memory, head, bytes).map_err(|_| self.fault(Rule::QueueOutsideMemory))
    }

    /// Asks the driver not to kick while the device looks at the queue anyway.
    ///
    /// # Errors
    /// When the ring is gone from memory, which set-up excludes.
    pub fn disable_kicks(&mut self, memory: &GuestRam) -> Result<(), GuestFault> {
        if !self.is_live() {
            return Ok(());
        }
        self.queue.disable_notification(memory).map_err(|_| self.fault(Rule::QueueOutsideMemory))
    }

    /// Asks the driver to kick again. `true` when a chain arrived meanwhile: look once more.
    ///
    /// # Errors
    /// When the ring is gone from memory, which set-up excludes.
    pub fn enable_kicks(&mut self, memory: &GuestRam) -> Result<bool, GuestFault> {
        if !self.is_live() {
            return Ok(false);
        }
        self.queue.enable_notification(memory).map_err(|_| self.fault(Rule::QueueOutsideMemory))
    }

    /// Whether the driver wants an interrupt for what was returned since the last call.
    pub(super) fn take_interrupt(&mut self, memory: &GuestRam) -> Result<bool, GuestFault> {
        if !std::mem::take(&mut self.used_since_interrupt) || !self.is_live() {
            return Ok(false);
        }
        let suppressed = !self.queue.event_idx_enabled() && self.interrupts_off(memory)?;
        let wanted = self
            .queue
            .needs_notification(memory)
            .map_err(|_| self.fault(Rule::QueueOutsideMemory))?;
        Ok(wanted && !suppressed)
    }

    // Without the event index a driver can still say "no interrupts" by a flag
    // (VIRTQ_AVAIL_F_NO_INTERRUPT, 2.7.7); the crate does not read it.
    fn interrupts_off(&self, memory: &GuestRam) -> Result<bool, GuestFault> {
        std::sync::atomic::fence(Ordering::SeqCst);
        let flags: u16 = memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|_| self.fault(Rule::QueueOutsideMemory))?;
        Ok(u16::from_le(flags) & 1 != 0)
    }
}

/// A queue as the driver described it through the registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct QueueSetup {
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    pub(super) event_index: bool,
}
