//! The disk's io_uring: it can read, write and sync one file, and nothing else.
//!
//! Called by `virtio::blk` only. Refuses, in the kernel, every other operation and every other file:
//! the ring is made disabled; when the file comes, it is registered, the restrictions are set, and only
//! then is the ring enabled.
//! After that no one can register anything with it, so taking over this process does not widen it.
//!
//! Data goes through bounce buffers of this module, not through addresses in guest memory. The
//! reasons, each enough alone:
//! 1. A guest may reset the device, or take its queue back, while the kernel still holds the
//!    request. A kernel that writes into a bounce buffer then harms nobody; one that writes into
//!    guest memory breaks the promise of the reset, and of a snapshot taken at that moment.
//! 2. Nothing unsafe depends on what a guest says or on how long its memory stays mapped: the only
//!    memory the kernel gets from here is this module's own, which lives until the last completion.
//! 3. Guest memory is touched from one thread, at a known time, by checked copies.
//!
//! The price is one copy per byte, an order of magnitude faster than the disk.
//!
//! ```text
//!   acquire ──▶ Slot ──bytes──▶ filled ──read/write/sync──▶ in flight ──complete──▶ Slot ──▶ release
//! ```
//! A [`Slot`] exists only while its buffer is the caller's, so a buffer is never touched from both
//! sides.

#![expect(unsafe_code, reason = "the kernel is given addresses of buffers")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Operations in flight at most, and buffers.
pub(crate) const SLOTS: usize = 32;
/// Bytes of one buffer, so of one operation.
pub(crate) const SLOT_BYTES: usize = 128 * 1024;
/// Kernel threads the ring may have for what cannot be done without waiting: (files, rest).
const WORKERS_MAX: [u32; 2] = [8, 2];
/// The file's index among the registered ones.
const FILE: types::Fixed = types::Fixed(0);
/// Bytes of all buffers: most that can be in flight.
const ARENA_BYTES: usize = SLOTS * SLOT_BYTES;
/// Entries of the submission queue. One operation per slot, so it never runs full; the kernel makes
/// the completion queue twice as long.
const ENTRIES: u32 = 32;

const _: () = assert!(ENTRIES as usize >= SLOTS);
const _: () = assert!(SLOT_BYTES.is_multiple_of(4096));

/// The right to use one buffer. Not `Clone`: whoever holds it is the only one.
#[derive(Debug)]
pub(crate) struct Slot(usize);

impl Slot {
    /// Which one, below [`SLOTS`].
    pub(crate) fn index(&self) -> usize {
        self.0
    }
}

/// The ring and its buffers.
pub(crate) struct DiskRing {
    // Before the arena, so that it is closed when the buffers go.
    ring: IoUring,
    arena: Arena,
    free: Vec<Slot>,
    in_flight: [bool; SLOTS],
    /// Pushed and not yet taken by the kernel.
    unsubmitted: usize,
    /// Highest slot used since the last [`DiskRing::trim`].
    used_to: usize,
}

impl DiskRing {
    /// A ring that signals `done` at each completion. It is disabled: the kernel takes nothing from
    /// it before [`DiskRing::attach`].
    pub(crate) fn new(done: impl AsFd) -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().dontfork().build(ENTRIES)?;
        let submitter = ring.submitter();
        submitter.register_eventfd(done.as_fd().as_raw_fd())?;
        submitter.register_iowq_max_workers(&mut WORKERS_MAX.clone())?;
        Ok(Self {
            ring,
            arena: Arena::new()?,
            // The lowest is taken first: few requests at a time touch few buffers.
            free: (0..SLOTS).rev().map(Slot).collect(),
            in_flight: [false; SLOTS],
            unsubmitted: 0,
            used_to: 0,
        })
    }

    /// Restricts the ring to `file`, and only then enables it. Works once.
    pub(crate) fn attach(&self, file: impl AsFd) -> io::Result<()> {
        let submitter = self.ring.submitter();
        submitter.register_files(&[file.as_fd().as_raw_fd()])?;
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_op(opcode::Write::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            // Required on each entry; no other flag is allowed.
            Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
        ])?;
        submitter.register_enable_rings()
    }

    /// Takes a free buffer. `None` when all are taken.
    pub(crate) fn acquire(&mut self) -> Option<Slot> {
        let slot = self.free.pop()?;
        self.used_to = self.used_to.max(slot.0 + 1);
        Some(slot)
    }

    /// Gives a buffer back.
    pub(crate) fn release(&mut self, slot: Slot) {
        let at = self.free.partition_point(|other| other.0 > slot.0);
        self.free.insert(at, slot);
    }

    /// Whether no buffer is taken.
    pub(crate) fn is_idle(&self) -> bool {
        self.free.len() == SLOTS
    }

    /// Whether every buffer is taken.
    pub(crate) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// The buffer of a slot, [`SLOT_BYTES`] long. Its contents are what this VM's disk or guest left
    /// there, or 0.
    pub(crate) fn bytes(&mut self, slot: &Slot) -> &mut [u8] {
        // A slot cannot be held while in flight; checked because the safety of this rests on it.
        assert!(!self.in_flight[slot.0], "a buffer in flight was touched");
        let start = self.arena.slot(slot.0);
        // SAFETY: `start` is valid for SLOT_BYTES bytes, which are initialised (anonymous memory is
        // zero) and belong to this slot alone. The kernel does not hold them: it gets them by
        // `push`, which sets `in_flight`, and gives them back by the completion that clears it. The
        // exclusive borrow of self keeps the arena alive and everyone else out.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), SLOT_BYTES) }
    }

    /// Queues a read of `length` bytes of the file at `offset` into the buffer.
    pub(crate) fn read(&mut self, slot: Slot, offset: u64, length: usize) {
        let (start, length) = self.buffer(&slot, length);
        self.push(slot, opcode::Read::new(FILE, start, length).offset(offset).build());
    }

    /// Queues a write of the buffer's first `length` bytes to the file at `offset`.
    pub(crate) fn write(&mut self, slot: Slot, offset: u64, length: usize) {
        let (start, length) = self.buffer(&slot, length);
        self.push(slot, opcode::Write::new(FILE, start, length).offset(offset).build());
    }

    /// Queues a sync of the file's data.
    pub(crate) fn sync(&mut self, slot: Slot) {
        let flags = types::FsyncFlags::DATASYNC;
        self.push(slot, opcode::Fsync::new(FILE).flags(flags).build());
    }

    fn buffer(&self, slot: &Slot, length: usize) -> (*mut u8, u32) {
        // The minimum makes the cast lossless and the operation stay inside its buffer.
        let length = u32::try_from(length.min(SLOT_BYTES)).unwrap_or(0);
        (self.arena.slot(slot.0).as_ptr(), length)
    }

    fn push(&mut self, slot: Slot, entry: squeue::Entry) {
        let index = slot.0;
        assert!(!self.in_flight[index], "a slot was queued twice");
        self.in_flight[index] = true;
        let entry = entry.user_data(index as u64);
        // SAFETY: the addresses in the entry are those of this slot's buffer, which stays mapped
        // until `in_flight` is clear (Drop leaks it else) and which nobody touches until then (`bytes`
        // checks; the Slot was consumed). FILE is registered for the life of the ring.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // There are as many entries as slots, and each slot has at most one.
        assert!(pushed.is_ok(), "the submission queue is full");
        self.unsubmitted += 1;
    }

    /// Gives what was queued to the kernel. `false` when it wants to be asked again.
    pub(crate) fn submit(&mut self) -> io::Result<bool> {
        if self.unsubmitted == 0 {
            return Ok(true);
        }
        match self.ring.submit() {
            Ok(taken) => {
                self.unsubmitted = self.unsubmitted.saturating_sub(taken);
                Ok(self.unsubmitted == 0)
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// The next operation that ended: its buffer, and how many bytes it moved.
    pub(crate) fn complete(&mut self) -> Option<(Slot, io::Result<usize>)> {
        let entry = self.ring.completion().next()?;
        let index = usize::try_from(entry.user_data()).ok().filter(|index| *index < SLOTS)?;
        self.in_flight[index] = false;
        let result = match usize::try_from(entry.result()) {
            Ok(bytes) => Ok(bytes),
            Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
        };
        Some((Slot(index), result))
    }

    /// Gives the memory of the buffers back to the host, but for the first two. Does nothing unless
    /// idle.
    pub(crate) fn trim(&mut self) -> io::Result<()> {
        let used_to = std::mem::take(&mut self.used_to);
        if !self.is_idle() || used_to <= 2 {
            self.used_to = used_to;
            return Ok(());
        }
        self.arena.discard(2, used_to)
    }
}

impl Drop for DiskRing {
    /// Does not wait for what is in flight: the thread that drops it may not be allowed to. The
    /// kernel must not write into memory that is given back, so then the memory never is; the
    /// process is about to end.
    fn drop(&mut self) {
        self.arena.leak = self.in_flight.contains(&true);
    }
}

impl std::fmt::Debug for DiskRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskRing").field("free", &self.free.len()).finish_non_exhaustive()
    }
}

/// The buffers: one anonymous mapping, populated as it is touched.
struct Arena {
    start: NonNull<u8>,
    leak: bool,
}

// SAFETY: the mapping is owned by this value alone and is not tied to a thread.
unsafe impl Send for Arena {}

impl Arena {
    fn new() -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a null hint without MAP_FIXED makes a new mapping and touches no other.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), ARENA_BYTES, protection, flags) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, leak: false })
    }

    /// The first byte of a slot's buffer, valid for [`SLOT_BYTES`].
    fn slot(&self, index: usize) -> NonNull<u8> {
        assert!(index < SLOTS, "there is no such slot");
        // SAFETY: index is below SLOTS, so the result is inside the mapping.
        unsafe { self.start.add(index * SLOT_BYTES) }
    }

    /// Makes the buffers `first..end` zero and their memory free.
    fn discard(&mut self, first: usize, end: usize) -> io::Result<()> {
        let length = end.saturating_sub(first) * SLOT_BYTES;
        let start = self.slot(first).as_ptr().cast();
        // SAFETY: the caller ends at most at SLOTS, so the range is inside our own anonymous
        // mapping; no slice into it lives (they borrow the DiskRing, which is borrowed exclusively
        // here) and nothing is in flight (trim checked). Zeroed bytes are as good as the old ones.
        unsafe { madvise(start, length, Advice::LinuxDontNeed) }?;
        Ok(())
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.leak {
            return;
        }
        // SAFETY: this is the mapping made in `new`, whole; nothing is in flight (else `leak`) and
        // no slice outlives the DiskRing that holds this.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), ARENA_BYTES) };
        debug_assert!(unmapped.is_ok(), "the arena was not a mapping");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::OwnedFd;

    fn disk(contents: &[u8]) -> std::fs::File {
        // A memfd: no file name to clean up, and it is a regular file to the ring.
        let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = std::fs::File::from(fd);
        file.write_all(contents).unwrap();
        file
    }

    fn event() -> OwnedFd {
        rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
    }

    fn attached(file: impl AsFd) -> DiskRing {
        let ring = DiskRing::new(event()).unwrap();
        ring.attach(file).unwrap();
        ring
    }

    fn wait(ring: &mut DiskRing) -> (Slot, io::Result<usize>) {
        assert!(ring.submit().unwrap());
        loop {
            if let Some(done) = ring.complete() {
                return done;
            }
            ring.ring.submit_and_wait(1).unwrap();
        }
    }

    #[test]
    fn bytes_go_to_the_file_and_come_back() {
        let file = disk(&[0; 8192]);
        let mut ring = attached(&file);
        let slot = ring.acquire().unwrap();
        ring.bytes(&slot)[..4096].fill(7);
        ring.write(slot, 4096, 4096);
        let (slot, moved) = wait(&mut ring);
        assert_eq!(moved.unwrap(), 4096);
        ring.sync(slot);
        let (slot, moved) = wait(&mut ring);
        assert_eq!(moved.unwrap(), 0);
        ring.bytes(&slot).fill(9);
        ring.read(slot, 4000, SLOT_BYTES);
        let (slot, moved) = wait(&mut ring);
        // The file ends inside the read.
        assert_eq!(moved.unwrap(), 4192);
        assert_eq!(ring.bytes(&slot)[..96], [0; 96]);
        assert_eq!(ring.bytes(&slot)[96..4192], [7; 4096]);
        assert_eq!(ring.bytes(&slot)[4192..], [9; SLOT_BYTES - 4192]);
        ring.release(slot);
        assert!(ring.is_idle());
    }

    /// The point of the restrictions: someone who owns this process still cannot widen the ring.
    #[test]
    fn other_operations_files_and_registrations_are_refused() {
        let file = disk(&[0; 4096]);
        let mut ring = attached(&file);
        let other = disk(b"secret");
        let raw = types::Fd(other.as_raw_fd());
        let mut buffer = [0u8; 16];
        let entries = [
            opcode::Nop::new().build(),
            opcode::Close::new(raw).build(),
            opcode::Read::new(raw, buffer.as_mut_ptr(), 16).build(),
            opcode::Fallocate::new(FILE, 4096).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Fsync::new(FILE).build().flags(squeue::Flags::IO_LINK),
        ];
        for entry in entries {
            // SAFETY: `buffer` outlives the operation, which is waited for below.
            unsafe { ring.ring.submission().push(&entry) }.unwrap();
            ring.ring.submit_and_wait(1).unwrap();
            let done = ring.ring.completion().next().unwrap();
            assert_eq!(done.result(), -libc::EACCES, "{entry:?}");
        }
        assert_eq!(buffer, [0; 16]);
        let submitter = ring.ring.submitter();
        let refused = submitter.register_files_update(0, &[other.as_raw_fd()]).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
        let refused = submitter.unregister_files().unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
        assert!(submitter.register_restrictions(&mut []).is_err());
    }

    /// Between build and attach the ring is open to nobody: the kernel takes nothing from it, and
    /// afterwards no second file.
    #[test]
    fn a_ring_without_a_file_does_nothing_and_takes_one_file() {
        let (first, second) = (disk(b"first"), disk(b"second"));
        let mut ring = DiskRing::new(event()).unwrap();
        let slot = ring.acquire().unwrap();
        ring.read(slot, 0, 4);
        assert_eq!(ring.submit().unwrap_err().raw_os_error(), Some(libc::EBADFD));
        ring.attach(&first).unwrap();
        let (slot, moved) = wait(&mut ring);
        assert_eq!(moved.unwrap(), 4);
        assert_eq!(ring.bytes(&slot)[..4], *b"firs");
        assert!(ring.attach(&second).is_err());
    }

    #[test]
    fn slots_run_out_and_come_back() {
        let file = disk(&[0; 4096]);
        let mut ring = attached(&file);
        let slots: Vec<Slot> = std::iter::from_fn(|| ring.acquire()).collect();
        assert_eq!(slots.len(), SLOTS);
        slots.into_iter().for_each(|slot| ring.read(slot, 0, 4096));
        for _ in 0..SLOTS {
            let (slot, moved) = wait(&mut ring);
            assert_eq!(moved.unwrap(), 4096);
            ring.release(slot);
        }
        assert_eq!(ring.acquire().unwrap().index(), 0, "the lowest comes first");
    }

    #[test]
    fn trimmed_buffers_are_zero_and_work() {
        let file = disk(&[5; 4096]);
        let mut ring = attached(&file);
        let slots: Vec<Slot> = (0..4).filter_map(|_| ring.acquire()).collect();
        slots.iter().for_each(|slot| ring.bytes(slot).fill(1));
        slots.into_iter().for_each(|slot| ring.release(slot));
        ring.trim().unwrap();
        let slots: Vec<Slot> = (0..4).filter_map(|_| ring.acquire()).collect();
        assert_eq!(ring.bytes(&slots[1])[0], 1);
        assert_eq!(ring.bytes(&slots[3])[0], 0);
    }

    /// A ring that is dropped with an operation in flight leaves the buffer to the kernel: here the
    /// read of a pipe, which ends when the pipe is written to.
    #[test]
    fn dropping_leaves_buffers_in_flight_mapped() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let mut ring = attached(&read);
        let slot = ring.acquire().unwrap();
        let start = ring.arena.slot(slot.index()).as_ptr();
        ring.read(slot, 0, 4);
        assert!(ring.submit().unwrap());
        drop(ring);
        rustix::io::write(&write, b"late").unwrap();
        // SAFETY: mincore reads no memory of ours; it writes one byte for the one page asked about.
        let mapped = unsafe { libc::mincore(start.cast(), 4096, [0u8; 1].as_mut_ptr()) };
        assert_eq!(mapped, 0, "the buffer is still mapped");
    }
}
