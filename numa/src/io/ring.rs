//! The io_uring itself: what is in flight, and who owns its buffer and file meanwhile.
//!
//! Called by `io` only, from one thread. An operation owns its buffer and a share of its file from the
//! moment it is started until the kernel says that it is complete: that is what makes the addresses and
//! descriptor numbers in an entry good, so this module holds both sides of it, the entries and the
//! owners. Refuses entries for anything but a buffer of its pool.

#![expect(unsafe_code, reason = "entries hold addresses of buffers and numbers of descriptors")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};

use super::buf::{IO_BUF_BYTES, IoBuf, Pool};
use super::stats::{RingCounts, WorkKind};

/// Operations that the kernel has at a time; those beyond wait here.
pub(super) const ENTRIES: u32 = 256;

/// Operations that are not complete, in the kernel or waiting.
pub const OPERATIONS_MAX: usize = 4096;

/// Kernel threads for what cannot be done without waiting (syncs above all): (files, rest).
const WORKERS_MAX: [u32; 2] = [32, 4];

const _: () = assert!(ENTRIES as usize <= OPERATIONS_MAX);
// An entry's length is 32 bits.
const _: () = assert!(IO_BUF_BYTES <= u32::MAX as usize);

/// A file that operations can share. Closed when the last of them and the last handle is gone.
#[derive(Clone, Debug)]
pub struct IoFile(Rc<OwnedFd>);

impl From<OwnedFd> for IoFile {
    fn from(fd: OwnedFd) -> Self {
        Self(Rc::new(fd))
    }
}

impl From<std::fs::File> for IoFile {
    fn from(file: std::fs::File) -> Self {
        Self::from(OwnedFd::from(file))
    }
}

impl AsFd for IoFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What to do with a file.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    /// Read into the buffer's room, at most `length` bytes.
    Read {
        /// How many.
        length: usize,
        /// Where in the file.
        offset: u64,
    },
    /// Write `length` of the buffer's bytes, from `skip` on.
    Write {
        /// Bytes of the buffer before those.
        skip: usize,
        /// How many.
        length: usize,
        /// Where in the file.
        offset: u64,
    },
    /// Sync.
    Sync {
        /// Whether the times and the like may stay behind.
        data_only: bool,
    },
    /// fallocate(2).
    Allocate {
        /// Its mode.
        mode: i32,
        /// Where.
        offset: u64,
        /// How much.
        length: u64,
    },
}

impl Work {
    fn kind(self) -> WorkKind {
        match self {
            Self::Read { .. } => WorkKind::Read,
            Self::Write { .. } => WorkKind::Write,
            Self::Sync { .. } => WorkKind::Sync,
            Self::Allocate { .. } => WorkKind::Allocate,
        }
    }
}

/// An operation that ended.
#[derive(Debug)]
pub(super) struct Finished<T> {
    pub(super) token: T,
    pub(super) buffer: Option<IoBuf>,
    pub(super) result: io::Result<usize>,
}

struct Operation<T> {
    work: Work,
    buffer: Option<IoBuf>,
    file: IoFile,
    token: T,
    started: Instant,
}

/// The ring and what is in flight. `T` goes with an operation and comes back with it.
pub(super) struct KernelRing<T> {
    // Before the operations: closed first. What the kernel still has then, `Drop` waited for.
    ring: IoUring,
    /// By number, which is the entry's user data. `None`: the number is free.
    operations: Vec<Option<Operation<T>>>,
    free: Vec<usize>,
    /// Started and not yet given to the ring.
    waiting: VecDeque<usize>,
    /// Pushed and not complete.
    in_ring: usize,
    /// Of those, not yet taken by the kernel.
    unsubmitted: usize,
    /// The kernel refuses it for good.
    broken: bool,
    /// What it did.
    counts: RingCounts,
}

impl<T> KernelRing<T> {
    /// A ring without buffers yet.
    pub(super) fn new() -> io::Result<Self> {
        // Submitted to and reaped by this thread alone; completions are counted when it next enters the
        // kernel, and not by interrupting it.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_submit_all()
            .dontfork()
            .build(ENTRIES)?;
        ring.submitter().register_iowq_max_workers(&mut WORKERS_MAX.clone())?;
        Ok(Self {
            ring,
            operations: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            in_ring: 0,
            unsubmitted: 0,
            broken: false,
            counts: RingCounts::default(),
        })
    }

    /// Has the kernel pin those buffers of `pool` that are to be, once. Operations take buffers of this pool
    /// only.
    pub(super) fn register(&self, pool: &Pool) -> io::Result<()> {
        // SAFETY: the ranges are parts of the pool's mapping. They need not stay mapped for the ring's
        // sake: the kernel pins the pages and uses those, and the addresses only to compute places in
        // them. They do stay mapped while any buffer lives.
        unsafe { self.ring.submitter().register_buffers(&pool.ranges()) }
    }

    /// A descriptor that is readable when something is complete.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        let raw = self.ring.as_raw_fd();
        // SAFETY: the ring owns this descriptor, which stays open as long as the ring, which the
        // result borrows.
        unsafe { BorrowedFd::borrow_raw(raw) }
    }

    /// Whether everything that was started is complete.
    pub(super) fn is_idle(&self) -> bool {
        self.in_ring == 0 && self.waiting.is_empty()
    }

    /// Whether the kernel took nothing of what it was given, so that no completion will come.
    pub(super) fn is_stuck(&self) -> bool {
        self.unsubmitted > 0 && self.unsubmitted == self.in_ring
    }

    /// What it did since it was made.
    pub(super) fn counts(&self) -> &RingCounts {
        &self.counts
    }

    /// Operations that are not complete.
    pub(super) fn unfinished(&self) -> usize {
        self.in_ring + self.waiting.len()
    }

    /// Takes an operation on. It comes back whole when there are [`OPERATIONS_MAX`] already.
    pub(super) fn start(
        &mut self,
        work: Work,
        file: IoFile,
        buffer: Option<IoBuf>,
        token: T,
    ) -> Result<(), (Option<IoBuf>, T)> {
        if self.broken || self.unfinished() >= OPERATIONS_MAX {
            return Err((buffer, token));
        }
        let started = Instant::now();
        let operation = Some(Operation { work, buffer, file, token, started });
        let number = match self.free.pop() {
            Some(number) => {
                self.operations[number] = operation;
                number
            }
            None => {
                self.operations.push(operation);
                self.operations.len() - 1
            }
        };
        self.waiting.push_back(number);
        Ok(())
    }

    /// Gives the kernel what fits. What it does not take now is given with the next call.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        while self.in_ring < ENTRIES as usize
            && let Some(number) = self.waiting.pop_front()
        {
            self.push(number);
        }
        if self.unsubmitted == 0 {
            return Ok(());
        }
        match self.ring.submit() {
            Ok(taken) => {
                self.counts.submitted(taken);
                self.unsubmitted = self.unsubmitted.saturating_sub(taken);
                Ok(())
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Takes nothing on any more, and drops what the kernel does not have yet.
    pub(super) fn give_up(&mut self) {
        self.broken = true;
        for number in self.waiting.drain(..) {
            if let Some(operation) = self.operations.get_mut(number) {
                drop(operation.take());
            }
        }
    }

    fn push(&mut self, number: usize) {
        let Some(operation) = self.operations.get_mut(number).and_then(Option::as_mut) else {
            debug_assert!(false, "a number without an operation waited");
            return;
        };
        let entry = entry(operation).user_data(number as u64);
        // SAFETY: the entry names a descriptor and a part of a buffer, both owned by
        // `operations[number]`, which is taken out by `complete` when the kernel is done, or after
        // `Drop` waited for that. Nobody can touch the buffer meanwhile: the IoBuf in there is the
        // only way to it.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // There are as many entries as may be in the ring at a time.
        assert!(pushed.is_ok(), "the submission queue is full");
        self.in_ring += 1;
        self.unsubmitted += 1;
    }

    /// The next operation that ended.
    pub(super) fn complete(&mut self) -> Option<Finished<T>> {
        loop {
            let entry = self.ring.completion().next()?;
            let number = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let operation = self.operations.get_mut(number).and_then(Option::take);
            let Some(Operation { work, mut buffer, file: _, token, started }) = operation else {
                debug_assert!(false, "a completion of nothing");
                continue;
            };
            self.free.push(number);
            self.in_ring = self.in_ring.saturating_sub(1);
            self.counts.completed(work.kind(), started.elapsed());
            let result = match usize::try_from(entry.result()) {
                Ok(bytes) => Ok(bytes),
                Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
            };
            if let (Work::Read { .. }, Some(buffer), Ok(bytes)) = (work, &mut buffer, &result) {
                buffer.filled(*bytes);
            }
            return Some(Finished { token, buffer, result });
        }
    }
}

/// The entry of an operation, which has to own what it names until it is complete.
fn entry<T>(operation: &mut Operation<T>) -> squeue::Entry {
    let file = Fd(operation.file.as_fd().as_raw_fd());
    let buffer = operation.buffer.as_mut();
    match (operation.work, buffer) {
        (Work::Read { length, offset }, Some(buffer)) => {
            let registered = buffer.registered();
            let room = buffer.room_mut();
            let length = u32::try_from(length.min(room.len())).unwrap_or(0);
            let start = room.as_mut_ptr();
            match registered {
                Some(index) => {
                    opcode::ReadFixed::new(file, start, length, index).offset(offset).build()
                }
                None => opcode::Read::new(file, start, length).offset(offset).build(),
            }
        }
        (Work::Write { skip, length, offset }, Some(buffer)) => {
            let bytes = buffer.bytes().get(skip..).unwrap_or_default();
            let length = u32::try_from(length.min(bytes.len())).unwrap_or(0);
            let start = bytes.as_ptr();
            match buffer.registered() {
                Some(index) => {
                    opcode::WriteFixed::new(file, start, length, index).offset(offset).build()
                }
                None => opcode::Write::new(file, start, length).offset(offset).build(),
            }
        }
        (Work::Sync { data_only }, _) => {
            let flags = if data_only { FsyncFlags::DATASYNC } else { FsyncFlags::empty() };
            opcode::Fsync::new(file).flags(flags).build()
        }
        (Work::Allocate { mode, offset, length }, _) => {
            opcode::Fallocate::new(file, length).offset(offset).mode(mode).build()
        }
        // Read and write are started with a buffer; without, there is nothing to do.
        (Work::Read { .. } | Work::Write { .. }, None) => opcode::Nop::new().build(),
    }
}

impl<T> Drop for KernelRing<T> {
    /// Waits for what is in flight: all of it is work on files, which ends by itself.
    fn drop(&mut self) {
        while self.in_ring > 0 {
            // Reaping must not depend on the error, or this would not end.
            if let Err(error) = self.ring.submit_and_wait(1)
                && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
            {
                // The kernel goes on with pages and files of its own; what it writes to the buffers
                // must not become another's, so they are never given back, and stay mapped.
                tracing::error!(%error, "a ring was dropped with work in flight");
                self.operations.drain(..).for_each(std::mem::forget);
                return;
            }
            while self.complete().is_some() {}
        }
    }
}

impl<T> std::fmt::Debug for KernelRing<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelRing").field("unfinished", &self.unfinished()).finish()
    }
}
