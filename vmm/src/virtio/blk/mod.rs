//! virtio-blk (virtio 1.2, 5.2): the root disk.
//!
//! Called through the transport. Refuses everything but read, write, flush and "get id", and any
//! place outside the disk.
//!
//! A request takes one slot of the [`DiskRing`] and keeps it until it is answered; a long one goes
//! through it in steps of [`SLOT_BYTES`]. So at most [`SLOTS`] requests and [`SLOTS`] times
//! [`SLOT_BYTES`] bytes are in flight whatever a guest asks for; further chains wait in its queue.
//!
//! ```text
//!   chain ──parse──▶ refused: status
//!            │
//!            └──▶ slot ──(write: copy in)──▶ ring ──▶ done? ──(read: copy out)──▶ more left? ─┐
//!                          ▲                                                    │ no          │
//!                          └────────────────────────────────────────────────────┼── yes ◀─────┘
//!                                                                               ▼
//!                                                                       status, used ring
//! ```
//! After a reset the steps in flight still end, but nothing of them reaches the guest: each
//! remembers the generation it was started in.

mod request;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
};

use crate::ring::{DiskRing, SLOT_BYTES, SLOTS, Slot};
use crate::state::{BlkState, DeviceState, Unfit};

use super::{
    Chain, DeviceError, DeviceKind, Event, GuestRam, Progress, Ready, Rule, VirtQueue,
    VirtioDevice, read_config_bytes,
};
use request::{Disk, Operation, Request, SECTOR_BYTES, Status};

/// Entries of the request queue.
const QUEUE_SIZE: u16 = 128;
/// Data segments of one request: the queue's size but for header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of the configuration space up to and with the block size.
const CONFIG_BYTES: usize = 24;
/// What "get id" answers, 20 bytes at most (5.2.6).
const DISK_ID: &[u8; 20] = b"mica-root\0\0\0\0\0\0\0\0\0\0\0";
/// Chains, and completions, handled in one round.
const STEPS_PER_ROUND: usize = 64;
/// Looks at the ring in one turn: what the page cache has is complete as soon as it is submitted.
const ROUNDS_PER_TURN: usize = 4;
/// Times a step that the kernel could not take just now is tried again.
const RETRIES_MAX: u32 = 64;
/// Least time between two returns of bounce memory to the host: often enough for an idle VM, not
/// so often that a busy one pays for it.
const TRIM_EVERY: Duration = Duration::from_secs(1);

/// Why the disk cannot be a device.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// Its length is no whole number of sectors.
    #[error("the disk is {0} bytes long; make it a multiple of 512 and not empty")]
    Length(u64),
    /// The device is none that has a file.
    #[error("a file came for a device that has none")]
    NoDisk,
    /// The kernel refused.
    #[error("cannot {operation}")]
    Os {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

fn os(operation: &'static str) -> impl Fn(std::io::Error) -> BlkError {
    move |source| BlkError::Os { operation, source }
}

/// The device.
#[derive(Debug)]
pub struct Blk {
    disk: Disk,
    ring: DiskRing,
    done: Event,
    chain: Chain,
    /// The request that holds each slot.
    requests: Vec<Request>,
    /// The generation in which each slot's request began.
    began: [u64; SLOTS],
    generation: u64,
    trimmed: Instant,
}

impl Blk {
    /// A disk whose file comes later, by [`VirtioDevice::attach`]. Call it before the seccomp filter:
    /// it makes a ring of its own, disabled. The kernel may run up to 10 threads for the ring, which
    /// count in the process's cgroup.
    ///
    /// # Errors
    /// When the ring cannot be made.
    pub fn new() -> Result<Self, BlkError> {
        let done = Event::new().map_err(os("make an event; raise the limit of open files"))?;
        let ring = DiskRing::new(&done)
            .map_err(os("make a restricted io_uring; it needs Linux 5.10 and io_uring enabled"))?;
        Ok(Self {
            disk: Disk { bytes: 0, read_only: true },
            ring,
            done,
            chain: Chain::default(),
            requests: (0..SLOTS).map(|_| Request::default()).collect(),
            began: [0; SLOTS],
            generation: 0,
            trimmed: Instant::now(),
        })
    }

    /// A disk that has its file.
    #[cfg(test)]
    pub(super) fn of_file(file: File, read_only: bool) -> Result<Self, BlkError> {
        let mut blk = Self::new()?;
        blk.attach(file, read_only)?;
        Ok(blk)
    }

    /// Takes chains while there are slots; how many were taken.
    fn take_chains(
        &mut self,
        queue: &mut VirtQueue,
        memory: &GuestRam,
    ) -> Result<usize, DeviceError> {
        let mut taken = 0;
        while taken < STEPS_PER_ROUND {
            let Some(slot) = self.ring.acquire() else { break };
            match queue.pop(memory, &mut self.chain) {
                Ok(true) => {}
                Ok(false) => {
                    self.ring.release(slot);
                    break;
                }
                Err(fault) => {
                    self.ring.release(slot);
                    return Err(fault.into());
                }
            }
            taken += 1;
            let index = slot.index();
            self.began[index] = self.generation;
            match self.requests[index].parse(&self.chain, memory, &self.disk) {
                Ok(Ok(())) => self.start(slot, queue, memory)?,
                Ok(Err(status)) => self.answer(slot, status, queue, memory)?,
                Err(rule) => {
                    self.ring.release(slot);
                    return Err(queue.fault(rule).into());
                }
            }
        }
        Ok(taken)
    }

    /// Begins, or goes on with, the request of a slot.
    fn start(
        &mut self,
        slot: Slot,
        queue: &mut VirtQueue,
        memory: &GuestRam,
    ) -> Result<(), DeviceError> {
        let request = &mut self.requests[slot.index()];
        let length = usize::try_from(request.left()).unwrap_or(usize::MAX).min(SLOT_BYTES);
        let offset = request.offset + request.done;
        match request.operation {
            Operation::Read => self.ring.read(slot, offset, length),
            Operation::Write => {
                let buffer = &mut self.ring.bytes(&slot)[..length];
                let copied = request
                    .copy_in(memory, buffer)
                    .map_err(|_| queue.fault(Rule::BufferOutsideMemory))?;
                self.ring.write(slot, offset, copied);
            }
            Operation::Flush => self.ring.sync(slot),
            Operation::GetId => {
                let copied = request
                    .copy_out(memory, DISK_ID)
                    .map_err(|_| queue.fault(Rule::BufferOutsideMemory))?;
                request.done = copied as u64;
                self.answer(slot, Status::Ok, queue, memory)?;
            }
        }
        Ok(())
    }

    /// Ends the request of a slot.
    fn answer(
        &mut self,
        slot: Slot,
        status: Status,
        queue: &mut VirtQueue,
        memory: &GuestRam,
    ) -> Result<(), DeviceError> {
        let request = &self.requests[slot.index()];
        let written =
            request.finish(memory, status).map_err(|_| queue.fault(Rule::BufferOutsideMemory))?;
        queue.push_used(memory, request.head, written)?;
        self.ring.release(slot);
        Ok(())
    }

    /// Handles operations that ended; how many.
    fn take_completions(
        &mut self,
        queue: &mut VirtQueue,
        memory: &GuestRam,
    ) -> Result<usize, DeviceError> {
        let mut taken = 0;
        while taken < STEPS_PER_ROUND {
            let Some((slot, moved)) = self.ring.complete() else { break };
            taken += 1;
            let live = self.began[slot.index()] == self.generation && queue.is_live();
            if live {
                self.advance(slot, moved, queue, memory)?;
            } else {
                self.ring.release(slot);
            }
        }
        Ok(taken)
    }

    fn advance(
        &mut self,
        slot: Slot,
        moved: std::io::Result<usize>,
        queue: &mut VirtQueue,
        memory: &GuestRam,
    ) -> Result<(), DeviceError> {
        let request = &mut self.requests[slot.index()];
        let status = match (request.operation, moved) {
            (_, Err(error)) if is_transient(&error) && request.retries < RETRIES_MAX => {
                request.retries += 1;
                return self.start(slot, queue, memory);
            }
            // Nothing moved: the file is shorter than it was. It will not get longer.
            (_, Err(_)) | (Operation::Read | Operation::Write, Ok(0)) => Status::IoError,
            (Operation::Read, Ok(bytes)) => {
                let data = self.ring.bytes(&slot).get(..bytes).unwrap_or_default();
                let copied = request
                    .copy_out(memory, data)
                    .map_err(|_| queue.fault(Rule::BufferOutsideMemory))?;
                request.done += copied as u64;
                request.retries = 0;
                Status::Ok
            }
            (Operation::Write, Ok(bytes)) => {
                request.done += bytes as u64;
                request.retries = 0;
                Status::Ok
            }
            (Operation::Flush | Operation::GetId, Ok(_)) => Status::Ok,
        };
        if status == Status::Ok && request.left() > 0 {
            return self.start(slot, queue, memory);
        }
        self.answer(slot, status, queue, memory)
    }

    fn trim(&mut self) -> std::io::Result<()> {
        if self.ring.is_idle() && self.trimmed.elapsed() >= TRIM_EVERY {
            self.ring.trim()?;
            self.trimmed = Instant::now();
        }
        Ok(())
    }
}

/// Whether trying again can help.
fn is_transient(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR))
}

fn host(operation: &'static str) -> impl Fn(std::io::Error) -> DeviceError {
    move |source| DeviceError::Host { device: DeviceKind::Blk, operation, source }
}

impl VirtioDevice for Blk {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Blk
    }

    fn features(&self) -> u64 {
        let features =
            1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        features | u64::from(self.disk.read_only) << VIRTIO_BLK_F_RO
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut space = [0u8; CONFIG_BYTES];
        space[..8].copy_from_slice(&(self.disk.bytes / SECTOR_BYTES).to_le_bytes());
        // 8: size_max and 16: geometry are not offered.
        space[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        space[20..].copy_from_slice(&512u32.to_le_bytes());
        read_config_bytes(&space, offset, data);
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.generation += 1;
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.done.as_fd())
    }

    fn process(
        &mut self,
        queues: &mut [VirtQueue],
        memory: &GuestRam,
        ready: Ready,
    ) -> Result<Progress, DeviceError> {
        let Some(queue) = queues.first_mut() else { return Ok(Progress::Idle) };
        if ready.wake {
            self.done.clear().map_err(host("read the disk's event"))?;
        }
        queue.disable_kicks(memory)?;
        let mut idle = false;
        for _ in 0..ROUNDS_PER_TURN {
            let ended = self.take_completions(queue, memory)?;
            let taken = self.take_chains(queue, memory)?;
            let submitted = self.ring.submit().map_err(host("submit to the disk's ring"))?;
            idle = ended + taken == 0 && submitted;
            if idle {
                break;
            }
        }
        if !idle {
            return Ok(Progress::More);
        }
        self.trim().map_err(host("give memory back"))?;
        // While every slot is taken the next completion looks at the queue; no kick is needed.
        let more = queue.enable_kicks(memory)? && !self.ring.is_full();
        Ok(if more { Progress::More } else { Progress::Idle })
    }

    fn drain(&mut self, queues: &mut [VirtQueue], memory: &GuestRam) -> Result<bool, DeviceError> {
        let Some(queue) = queues.first_mut() else { return Ok(true) };
        self.done.clear().map_err(host("read the disk's event"))?;
        // What the page cache has is complete as soon as it is submitted; the rest signals.
        while self.take_completions(queue, memory)? > 0 {
            self.ring.submit().map_err(host("submit to the disk's ring"))?;
        }
        // Whatever the ring did not take just now it is offered again, here and at the next call.
        self.ring.submit().map_err(host("submit to the disk's ring"))?;
        Ok(self.ring.is_idle())
    }

    fn attach(&mut self, file: File, read_only: bool) -> Result<(), BlkError> {
        let bytes = file.metadata().map_err(os("look at the disk"))?.len();
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(BlkError::Length(bytes));
        }
        // The ring keeps the file open; the descriptor itself is not needed any more.
        self.ring.attach(&file).map_err(os("restrict the disk's ring to its file"))?;
        self.disk = Disk { bytes, read_only };
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Blk(BlkState { bytes: self.disk.bytes, read_only: self.disk.read_only })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), Unfit> {
        let DeviceState::Blk(state) = state else {
            return Err(Unfit("the state of another device is where that of the disk belongs"));
        };
        if state.bytes != self.disk.bytes {
            return Err(Unfit("the disk is not as long as the one that was saved"));
        }
        self.disk.read_only = state.read_only;
        // Nothing is in flight; a completion of the time before could reach nobody.
        self.generation += 1;
        Ok(())
    }
}
