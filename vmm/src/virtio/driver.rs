//! A driver for tests: the guest's side of the transport and of split queues, in plain steps.
//!
//! Called by the tests of the devices. Refuses nothing: tests use it to do wrong as well as right.

use std::sync::Arc;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion};

use super::{DeviceError, Event, GuestRam, MmioDevice, Progress, Ready, VirtioDevice};

/// Bytes of guest memory in tests.
pub(super) const MEMORY_BYTES: usize = 8 << 20;
/// Where tests may put buffers; the rings are below.
pub(super) const BUFFERS: u64 = 0x10_0000;

const PAGE: usize = 4096;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
pub(super) const VERSION_1: u64 = 1 << 32;
pub(super) const EVENT_IDX: u64 = 1 << 29;

/// A driver bound to one device.
pub(super) struct Driver {
    pub(super) memory: Arc<GuestRam>,
    pub(super) device: Arc<MmioDevice>,
    pub(super) line: Event,
    pub(super) rings: Vec<Ring>,
}

/// The driver's view of one queue.
#[derive(Clone)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) base: u64,
    next_descriptor: u16,
    pub(super) available: u16,
    used: u16,
}

impl Ring {
    pub(super) fn descriptors(&self) -> u64 {
        self.base
    }
    pub(super) fn driver_area(&self) -> u64 {
        self.base + 0x4000
    }
    pub(super) fn device_area(&self) -> u64 {
        self.base + 0x8000
    }
}

impl Driver {
    /// Puts `device` behind the transport and touches nothing yet.
    pub(super) fn new(device: Box<dyn VirtioDevice>) -> Self {
        let log = AtomicBitmap::new(MEMORY_BYTES, PAGE.try_into().unwrap());
        let region = MmapRegionBuilder::new_with_bitmap(MEMORY_BYTES, Some(log))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        let region = region.build().unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        let memory = Arc::new(GuestRam::from_regions(vec![region]).unwrap());
        let line = Event::new().unwrap();
        let twin = line.try_clone().unwrap();
        let device = MmioDevice::new(device, Arc::clone(&memory), twin).unwrap();
        Self { memory, device, line, rings: Vec::new() }
    }

    /// As [`Driver::new`], and brings it up with all features offered.
    pub(super) fn started(device: Box<dyn VirtioDevice>) -> Self {
        let mut driver = Self::new(device);
        driver.start(u64::MAX);
        driver
    }

    pub(super) fn read(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.device.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    pub(super) fn write(&self, offset: u64, value: u32) {
        self.try_write(offset, value).unwrap();
    }

    pub(super) fn try_write(&self, offset: u64, value: u32) -> Result<(), DeviceError> {
        self.device.write(offset, &value.to_le_bytes())
    }

    pub(super) fn offered(&self) -> u64 {
        self.write(0x14, 1);
        let high = u64::from(self.read(0x10));
        self.write(0x14, 0);
        high << 32 | u64::from(self.read(0x10))
    }

    pub(super) fn negotiate(&self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        let accepted = self.offered() & features;
        self.write(0x24, 0);
        self.write(0x20, u32::try_from(accepted & 0xffff_ffff).unwrap());
        self.write(0x24, 1);
        self.write(0x20, u32::try_from(accepted >> 32).unwrap());
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11, "features were refused");
    }

    /// The whole of virtio 1.2, 3.1.1, with those of `features` that are offered.
    pub(super) fn start(&mut self, features: u64) {
        self.negotiate(features);
        self.rings.clear();
        for (index, _) in (0u32..).zip(self.device.queue_events()) {
            self.write(0x30, index);
            let size = u16::try_from(self.read(0x34)).unwrap();
            assert!(size > 0);
            let base = 0x1_0000 * (u64::from(index) + 1);
            let zeros = vec![0; 0x1_0000];
            self.memory.write_slice(&zeros, GuestAddress(base)).unwrap();
            let ring = Ring { size, base, next_descriptor: 0, available: 0, used: 0 };
            self.describe(&ring);
            self.write(0x44, 1);
            assert_eq!(self.read(0x44), 1);
            self.rings.push(ring);
        }
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15);
    }

    /// Writes a ring's place into the selected queue's registers.
    pub(super) fn describe(&self, ring: &Ring) {
        self.write(0x38, u32::from(ring.size));
        for (offset, address) in
            [(0x80, ring.descriptors()), (0x90, ring.driver_area()), (0xa0, ring.device_area())]
        {
            self.write(offset, u32::try_from(address & 0xffff_ffff).unwrap());
            self.write(offset + 4, u32::try_from(address >> 32).unwrap());
        }
    }

    pub(super) fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub(super) fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub(super) fn put_bytes(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// Writes one descriptor.
    pub(super) fn descriptor(&self, table: u64, index: u16, at: (u64, u32), flags: u16, next: u16) {
        let place = table + 16 * u64::from(index);
        self.put(place, at.0);
        self.put(place + 8, at.1);
        self.put(place + 12, flags);
        self.put(place + 14, next);
    }

    /// Makes a chain available; its head. The caller never has more in flight than fit.
    pub(super) fn add(
        &mut self,
        queue: usize,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
    ) -> u16 {
        let (size, table, first) = {
            let ring = &self.rings[queue];
            (ring.size, ring.base, ring.next_descriptor)
        };
        let all = readable.len() + writable.len();
        let mut index = first;
        for (position, at) in readable.iter().chain(writable).enumerate() {
            let next = (index + 1) % size;
            let write = if position < readable.len() { 0 } else { WRITE };
            let more = if position + 1 < all { NEXT } else { 0 };
            self.descriptor(table, index, *at, write | more, next);
            index = next;
        }
        self.rings[queue].next_descriptor = index;
        self.offer(queue, first);
        first
    }

    /// Makes the chain at `head` available, whatever it is.
    pub(super) fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.driver_area() + 4 + 2 * u64::from(ring.available % ring.size);
        ring.available = ring.available.wrapping_add(1);
        let (index, at) = (ring.available, ring.driver_area() + 2);
        self.put(slot, head);
        self.put(at, index);
    }

    /// The next returned chain: head and length.
    pub(super) fn take_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = self.rings.get_mut(queue)?;
        let area = ring.device_area();
        let index: u16 = self.memory.read_obj(GuestAddress(area + 2)).unwrap();
        if index == ring.used {
            return None;
        }
        let element = area + 4 + 8 * u64::from(ring.used % ring.size);
        ring.used = ring.used.wrapping_add(1);
        // The driver wants an interrupt for the next one.
        let event = ring.driver_area() + 4 + 2 * u64::from(ring.size);
        let seen = ring.used;
        self.put(event, seen);
        let head: u32 = self.memory.read_obj(GuestAddress(element)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(element + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), length))
    }

    pub(super) fn kick(&self, queue: u32) {
        self.write(0x50, queue);
    }

    /// Runs the device until it has nothing to do. Panics when it never stops, and when it wrote a page
    /// that is not in the log of guest memory: a snapshot would miss it.
    pub(super) fn run(&self) -> Result<(), DeviceError> {
        let log = || MmapRegion::bitmap(self.memory.iter().next().unwrap()).as_ref().unwrap();
        let before = self.bytes(0, MEMORY_BYTES);
        log().reset();
        let result = self.run_turns(10_000);
        let after = self.bytes(0, MEMORY_BYTES);
        let pages = before.chunks(PAGE).zip(after.chunks(PAGE)).enumerate();
        for (page, (_, after)) in pages.filter(|(_, (before, after))| before != after) {
            let given_back = after.iter().all(|byte| *byte == 0);
            assert!(given_back || log().is_bit_set(page), "page {page} changed and is not logged");
        }
        result
    }

    pub(super) fn run_turns(&self, turns: usize) -> Result<(), DeviceError> {
        for _ in 0..turns {
            let mut ready = Ready { queues: 0, wake: true };
            for (index, event) in self.device.queue_events().iter().enumerate() {
                if event.clear().unwrap() {
                    ready.queues |= 1 << index;
                }
            }
            if self.device.process(ready)? == Progress::Idle {
                return Ok(());
            }
        }
        panic!("the device did not come to rest");
    }
}
