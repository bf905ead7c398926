//! Buffers for files, half of which the kernel has pinned once, and the memory they lie in.
//!
//! Called by `io` for every read and write, and by `process` and `userfault` to fill one. The bytes of
//! one tenant must never reach another's file or eyes, so a buffer knows how many of its bytes were
//! put there since it was taken from the pool ([`IoBuf::len`]), and nothing reads, hands out or writes
//! a byte beyond that: what a write needs beyond it is zeroed first. Refuses to grow: the pool has as
//! many buffers as it was made with.

#![expect(unsafe_code, reason = "buffers are parts of one mapping, which operations work on")]

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::rc::Rc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::rt::oneshot;

/// Bytes of one buffer. Large enough that the device, not the number of operations, is the limit; a
/// power of two, so that two of them make a huge page.
pub const IO_BUF_BYTES: usize = 1 << 20;

/// Most buffers of one pool: a kernel's limit on registered buffers is 16,384, and this is 1 GiB of
/// pinned memory.
pub const IO_BUFS_MAX: u16 = 1024;

/// One buffer in so many is pinned from the start: what a shard that does little can do with. The others have
/// no memory before they are first used, and the kernel pins them for each operation.
const PINNED_PART: u16 = 2;

/// Arenas start at a multiple of this, so that the kernel can back them with huge pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

const _: () = assert!(HUGE_PAGE_BYTES.is_multiple_of(IO_BUF_BYTES));

/// The mapping that holds the buffers of one pool.
struct Arena {
    start: NonNull<u8>,
    bytes: usize,
}

impl Arena {
    fn new(buffers: u16) -> io::Result<Self> {
        let bytes = usize::from(buffers) * IO_BUF_BYTES;
        let bytes = bytes.next_multiple_of(HUGE_PAGE_BYTES);
        let reserved = bytes + HUGE_PAGE_BYTES;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a null hint without MAP_FIXED makes a new mapping and touches no other.
        let mapped = unsafe {
            mmap_anonymous(std::ptr::null_mut(), reserved, protection, MapFlags::PRIVATE)
        }?;
        let before = mapped.addr().next_multiple_of(HUGE_PAGE_BYTES) - mapped.addr();
        let start = mapped.wrapping_byte_add(before);
        // Owned from here on, so that an error below unmaps it.
        let arena =
            Self { start: NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?, bytes };
        let after = reserved - before - bytes;
        for (start, length) in [(mapped, before), (start.wrapping_byte_add(bytes), after)] {
            if length > 0 {
                // SAFETY: the range is part of the mapping made above, outside of what the arena
                // keeps, and nobody has an address in it.
                unsafe { munmap(start, length) }?;
            }
        }
        // A child must not get these pages: those of others' files are in them, and the kernel would
        // copy every pinned page at fork, because it cannot share them.
        // SAFETY: the range is this arena's mapping; the advice changes no byte of this process's.
        unsafe { madvise(start, bytes, Advice::LinuxDontFork) }?;
        // SAFETY: as above.
        if let Err(error) = unsafe { madvise(start, bytes, Advice::LinuxHugepage) } {
            tracing::debug!(%error, "I/O buffers lie in small pages");
        }
        Ok(arena)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: this is the arena's own mapping, whole. Nobody has an address in it: each buffer
        // holds the pool, which holds this. The kernel does not need it either: it has pinned the pages
        // of registered buffers and goes on using those, mapped or not.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "the arena was not a mapping");
    }
}

/// The buffers of one ring.
pub(crate) struct Pool {
    arena: Arena,
    count: u16,
    pinned: u16,
    free: RefCell<BinaryHeap<Reverse<u16>>>,
    waiting: RefCell<VecDeque<oneshot::Sender<IoBuf>>>,
}

impl Pool {
    /// A pool of `count` buffers, at least one and at most [`IO_BUFS_MAX`].
    pub(crate) fn new(count: u16) -> io::Result<Rc<Self>> {
        let count = count.clamp(1, IO_BUFS_MAX);
        Ok(Rc::new(Self {
            arena: Arena::new(count)?,
            count,
            pinned: count.div_ceil(PINNED_PART),
            // The lowest first: those are pinned, and few buffers in use touch few huge pages.
            free: RefCell::new((0..count).map(Reverse).collect()),
            waiting: RefCell::default(),
        }))
    }

    /// What to register with the kernel: one range for each buffer that is to be pinned, in the order of
    /// their indexes.
    pub(super) fn ranges(&self) -> Vec<libc::iovec> {
        (0..self.pinned)
            .map(|index| libc::iovec {
                iov_base: self.start_of(index).as_ptr().cast(),
                iov_len: IO_BUF_BYTES,
            })
            .collect()
    }

    /// How many buffers there are.
    pub(crate) fn count(&self) -> u16 {
        self.count
    }

    /// How many of them nobody has.
    pub(crate) fn free(&self) -> usize {
        self.free.borrow().len()
    }

    /// A buffer, if one is free.
    pub(crate) fn take(self: &Rc<Self>) -> Option<IoBuf> {
        let Reverse(index) = self.free.borrow_mut().pop()?;
        Some(self.buffer(index))
    }

    /// The next buffer that comes back, first come, first served.
    pub(crate) fn wait(&self) -> oneshot::Receiver<IoBuf> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.borrow_mut();
        waiting.retain(|waiter| !waiter.is_closed());
        waiting.push_back(sender);
        receiver
    }

    fn start_of(&self, index: u16) -> NonNull<u8> {
        assert!(index < self.count, "there is no such buffer");
        // SAFETY: the index is below the count, so the offset is inside the mapping.
        unsafe { self.arena.start.add(usize::from(index) * IO_BUF_BYTES) }
    }

    fn buffer(self: &Rc<Self>, index: u16) -> IoBuf {
        IoBuf { pool: Rc::clone(self), index, length: 0 }
    }

    fn give_back(self: &Rc<Self>, index: u16) {
        let next = {
            let mut waiting = self.waiting.borrow_mut();
            std::iter::from_fn(|| waiting.pop_front()).find(|waiter| !waiter.is_closed())
        };
        let Some(waiter) = next else {
            self.free.borrow_mut().push(Reverse(index));
            return;
        };
        if let Err(unwanted) = waiter.send(self.buffer(index)) {
            // Cannot be, it was not closed. Its drop comes back here.
            drop(unwanted);
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, free) = (self.count, self.free());
        f.debug_struct("Pool").field("count", &count).field("free", &free).finish()
    }
}

/// One buffer of [`IO_BUF_BYTES`], owned. Goes back to its pool when dropped.
///
/// It has a length, the bytes put into it since it was taken. Those can be read; the rest may hold what
/// another sandbox left and cannot.
pub struct IoBuf {
    pool: Rc<Pool>,
    index: u16,
    length: usize,
}

impl IoBuf {
    /// Bytes that were put into it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing was.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes that still fit.
    #[must_use]
    pub fn room(&self) -> usize {
        IO_BUF_BYTES - self.length
    }

    /// The bytes that were put into it.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range is this buffer's part of the mapping, at most IO_BUF_BYTES long, and
        // initialised (anonymous memory is zero). The mapping lives as long as the pool we hold. The
        // kernel does not write to it meanwhile: an operation owns its buffer from before it is queued
        // until it is complete, so nobody can borrow from it then.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.length) }
    }

    /// The same, to change in place.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let length = self.length;
        &mut self.whole()[..length]
    }

    /// Forgets the bytes.
    pub fn clear(&mut self) {
        self.length = 0;
    }

    /// Forgets the bytes from `length` on. Does nothing when there are no more than that.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Puts as many of `bytes` behind the others as fit, and says how many that were.
    pub fn put(&mut self, bytes: &[u8]) -> usize {
        let fit = bytes.len().min(self.room());
        self.room_mut()[..fit].copy_from_slice(&bytes[..fit]);
        self.length += fit;
        fit
    }

    /// Puts as many zeroes behind the others as bring the length to `length`, which is at most
    /// [`IO_BUF_BYTES`]. Does nothing when it is that long already.
    pub fn zero_to(&mut self, length: usize) {
        let length = length.min(IO_BUF_BYTES);
        if let Some(more) = length.checked_sub(self.length) {
            self.room_mut()[..more].fill(0);
            self.length = length;
        }
    }

    /// The bytes behind the length, for a system call that fills them. Whoever gets this writes to it
    /// and then says with [`Self::filled`] how far; reading it would show another tenant's bytes.
    pub(crate) fn room_mut(&mut self) -> &mut [u8] {
        let length = self.length;
        &mut self.whole()[length..]
    }

    /// Makes the next `more` bytes part of the buffer: they were just written.
    pub(crate) fn filled(&mut self, more: usize) {
        debug_assert!(more <= self.room(), "more bytes than there was room for");
        self.length = self.length.saturating_add(more).min(IO_BUF_BYTES);
    }

    /// Its number among the registered ones, if it is one.
    pub(super) fn registered(&self) -> Option<u16> {
        (self.index < self.pool.pinned).then_some(self.index)
    }

    /// Its first byte.
    pub(super) fn start(&self) -> NonNull<u8> {
        self.pool.start_of(self.index)
    }

    fn whole(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; exclusive, because the buffer is borrowed exclusively and no two
        // buffers have the same index (an index is in the free list or in one buffer).
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), IO_BUF_BYTES) }
    }
}

impl Drop for IoBuf {
    fn drop(&mut self) {
        let pool = Rc::clone(&self.pool);
        pool.give_back(self.index);
    }
}

impl fmt::Debug for IoBuf {
    // Not the bytes: they are a guest's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (index, length) = (self.index, self.length);
        f.debug_struct("IoBuf").field("index", &index).field("len", &length).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_shows_only_what_was_put_into_it() {
        let pool = Pool::new(1).unwrap();
        let mut secret = pool.take().unwrap();
        assert_eq!(secret.put(&[7; 100]), 100);
        drop(secret);
        let mut next = pool.take().unwrap();
        assert_eq!((next.len(), next.bytes()), (0, &[][..]));
        next.put(b"ab");
        next.zero_to(5);
        assert_eq!(next.bytes(), b"ab\0\0\0");
        next.zero_to(3);
        assert_eq!(next.len(), 5);
        next.truncate(1);
        next.zero_to(2);
        assert_eq!(next.bytes(), b"a\0");
        next.zero_to(usize::MAX);
        assert_eq!((next.len(), next.room(), next.put(b"x")), (IO_BUF_BYTES, 0, 0));
        assert!(next.bytes()[2..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn half_of_the_buffers_are_registered_and_those_come_first() {
        let pool = Pool::new(5).unwrap();
        assert_eq!(pool.ranges().len(), 3);
        let mut all: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        let numbers = |all: &[IoBuf]| all.iter().map(IoBuf::registered).collect::<Vec<_>>();
        assert_eq!(numbers(&all), [Some(0), Some(1), Some(2), None, None]);
        // In whatever order they come back.
        all.rotate_left(2);
        drop(all);
        let two = [pool.take().unwrap(), pool.take().unwrap()];
        assert_eq!(numbers(&two), [Some(0), Some(1)]);
    }

    #[test]
    fn buffers_are_apart_and_come_back() {
        let pool = Pool::new(3).unwrap();
        let mut all: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!((all.len(), pool.free()), (3, 0));
        for (buffer, fill) in all.iter_mut().zip([1u8, 2, 3]) {
            buffer.put(&vec![fill; IO_BUF_BYTES]);
        }
        for (buffer, fill) in all.iter().zip([1u8, 2, 3]) {
            assert!(buffer.bytes().iter().all(|byte| *byte == fill));
            assert!(buffer.start().addr().get().is_multiple_of(IO_BUF_BYTES));
        }
        drop(all);
        assert_eq!(pool.free(), 3);
    }

    #[test]
    fn waiters_get_buffers_in_turn_and_those_who_left_get_none() {
        futures_lite::future::block_on(async {
            let pool = Pool::new(1).unwrap();
            let held = pool.take().unwrap();
            let gone = pool.wait();
            let first = pool.wait();
            let second = pool.wait();
            drop(gone);
            drop(held);
            assert_eq!(pool.free(), 0, "the first has it");
            drop(first);
            let buffer = second.await.unwrap();
            assert_eq!((buffer.len(), pool.free()), (0, 0));
            drop(buffer);
            assert_eq!(pool.free(), 1);
        });
    }
}
