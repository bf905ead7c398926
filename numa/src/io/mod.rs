//! Files of a shard: reads, writes and syncs by an io_uring with buffers of its own.
//!
//! Called by whoever writes snapshots and fills replicas. A second ring beside glommio's, because
//! glommio has no registered buffers and lets stale bytes of a buffer be read. Driven by one task: what
//! is started in a turn of the executor is submitted in one system call, and the ring's own descriptor,
//! polled by glommio's ring, says when something is complete.
//!
//! ```text
//!   write_at ─▶ operation (owns buffer and file) ─▶ ring ─▶ kernel ─▶ completion ─▶ oneshot ─▶ caller
//!                       │  future dropped: goes on to here ──────────────────┘ buffer back to the pool
//! ```
//!
//! Any future here may be dropped at any await: the operation goes on, and whether it took place is then
//! not known. Refuses to open files: that blocks, and is done on blocking threads.

mod buf;
mod ring;
mod stats;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

pub use buf::{IO_BUF_BYTES, IO_BUFS_MAX, IoBuf};
pub use ring::{IoFile, OPERATIONS_MAX};
pub use stats::{RingStats, WorkKind};

use crate::rt::{Task, oneshot};
use buf::Pool;
use ring::{Finished, KernelRing, Work};

/// How a ring is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// Buffers of [`IO_BUF_BYTES`]: how much this seat can have in flight. Half of that is memory that it
    /// keeps pinned, the other half comes when it is first used. 1 to [`IO_BUFS_MAX`].
    pub buffers: u16,
}

impl Default for RingConfig {
    /// 32 MiB: what a fast drive needs in flight, twice.
    fn default() -> Self {
        Self { buffers: 32 }
    }
}

/// Why a ring was not made.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The ring or its descriptors.
    #[error("cannot make an io_uring for files")]
    Ring(#[source] io::Error),
    /// The memory.
    #[error("cannot map {bytes} bytes for I/O buffers")]
    Memory {
        /// How much.
        bytes: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The limit on locked memory, most likely.
    #[error(
        "cannot pin {bytes} bytes of I/O buffers; run as root, or set LimitMEMLOCK=infinity in the \
         unit file"
    )]
    Pin {
        /// How much.
        bytes: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
}

type Reply = oneshot::Sender<(Option<IoBuf>, io::Result<usize>)>;

/// A seat's ring for files.
#[derive(Debug)]
pub struct Ring {
    kernel: RefCell<KernelRing<Reply>>,
    pool: Rc<Pool>,
    driver: Driver,
    task: RefCell<Option<Task<()>>>,
}

/// How the driver is called.
#[derive(Debug, Default)]
struct Driver {
    waker: RefCell<Option<Waker>>,
    /// Called, and has not come yet.
    called: Cell<bool>,
    closing: Cell<bool>,
}

impl Driver {
    fn call(&self) {
        if !self.called.replace(true)
            && let Some(waker) = self.waker.borrow().as_ref()
        {
            waker.wake_by_ref();
        }
    }
}

impl Ring {
    /// Makes the ring of this seat. Its buffers lie on this thread's memory node.
    ///
    /// # Errors
    /// See [`RingError`].
    pub fn attach(config: RingConfig) -> Result<Rc<Self>, RingError> {
        let bytes = usize::from(config.buffers) * IO_BUF_BYTES;
        let pool =
            Pool::new(config.buffers).map_err(|source| RingError::Memory { bytes, source })?;
        let kernel = KernelRing::new().map_err(RingError::Ring)?;
        pin_buffers(&kernel, &pool).map_err(|source| RingError::Pin { bytes, source })?;
        let completions = kernel.descriptor().try_clone_to_owned().map_err(RingError::Ring)?;
        let ring = Rc::new(Self {
            kernel: RefCell::new(kernel),
            pool,
            driver: Driver::default(),
            task: RefCell::new(None),
        });
        // Weak: the ring ends with its last user, whatever the driver does.
        let driver = drive(Rc::downgrade(&ring), completions);
        ring.task.replace(Some(crate::rt::spawn(driver)));
        Ok(ring)
    }

    /// Waits until all that was started is complete, and ends the driver. Without it, the driver's
    /// task and its descriptor stay until the seat ends.
    pub async fn close(self: Rc<Self>) {
        self.driver.closing.set(true);
        self.driver.call();
        let task = self.task.take();
        if let Some(task) = task {
            task.join().await;
        }
    }

    /// A buffer; waits for one to come back when all are taken. First come, first served. A task that
    /// waits while it holds one can wait for ever if all the others do the same.
    pub async fn buffer(&self) -> IoBuf {
        loop {
            if let Some(buffer) = self.pool.take() {
                return buffer;
            }
            // None cannot be: the sender lies in the pool until it gives a buffer.
            if let Some(buffer) = self.pool.wait().await {
                return buffer;
            }
        }
    }

    /// A buffer, if one is free.
    #[must_use]
    pub fn try_buffer(&self) -> Option<IoBuf> {
        self.pool.take()
    }

    /// Buffers that nobody has.
    #[must_use]
    pub fn free_buffers(&self) -> usize {
        self.pool.free()
    }

    /// What it did since it was made.
    #[must_use]
    pub fn stats(&self) -> RingStats {
        let kernel = self.kernel.borrow();
        kernel.counts().stats(kernel.unfinished(), self.free_buffers())
    }

    /// Operations that are not complete.
    #[must_use]
    pub fn unfinished(&self) -> usize {
        self.kernel.borrow().unfinished()
    }

    /// Reads at most `length` bytes of the file from `offset` on, behind what the buffer holds. The
    /// buffer is longer by the result, which is 0 at the end of the file. For a file that is open for
    /// direct I/O, `offset`, `length` and the buffer's length are multiples of its block.
    ///
    /// # Errors
    /// What the file system says; `ResourceBusy` above [`OPERATIONS_MAX`] operations.
    pub async fn read_at(
        &self,
        file: &IoFile,
        buffer: IoBuf,
        length: usize,
        offset: u64,
    ) -> (IoBuf, io::Result<usize>) {
        self.with_buffer(Work::Read { length, offset }, file, buffer).await
    }

    /// As [`Self::read_at`], until all `length` bytes are there.
    ///
    /// # Errors
    /// Also `UnexpectedEof` when the file ends before, and `InvalidInput` when the buffer has no room
    /// for them. The buffer then holds what was read.
    pub async fn read_exact_at(
        &self,
        file: &IoFile,
        mut buffer: IoBuf,
        length: usize,
        offset: u64,
    ) -> (IoBuf, io::Result<()>) {
        if length > buffer.room() {
            return (buffer, Err(io::ErrorKind::InvalidInput.into()));
        }
        let mut done = 0;
        while done < length {
            let from = offset.saturating_add(done as u64);
            let (back, read) = self.read_at(file, buffer, length - done, from).await;
            buffer = back;
            match read {
                Ok(0) => return (buffer, Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (buffer, Err(error)),
            }
        }
        (buffer, Ok(()))
    }

    /// Writes the first `length` bytes of the buffer to the file at `offset`. Where the buffer is
    /// shorter than that, zeroes are put behind its bytes first, so that a write of whole blocks carries
    /// nobody else's bytes. The result is how many were written.
    ///
    /// # Errors
    /// What the file system says, `StorageFull` among it; `InvalidInput` above [`IO_BUF_BYTES`];
    /// `ResourceBusy` above [`OPERATIONS_MAX`] operations.
    pub async fn write_at(
        &self,
        file: &IoFile,
        buffer: IoBuf,
        length: usize,
        offset: u64,
    ) -> (IoBuf, io::Result<usize>) {
        self.write_part(file, buffer, 0, length, offset).await
    }

    /// As [`Self::write_at`], until all `length` bytes are written.
    ///
    /// # Errors
    /// Also `WriteZero` when the file takes no more and does not say why.
    pub async fn write_all_at(
        &self,
        file: &IoFile,
        mut buffer: IoBuf,
        length: usize,
        offset: u64,
    ) -> (IoBuf, io::Result<()>) {
        let mut done = 0;
        while done < length {
            let to = offset.saturating_add(done as u64);
            let (back, wrote) = self.write_part(file, buffer, done, length - done, to).await;
            buffer = back;
            match wrote {
                Ok(0) => return (buffer, Err(io::ErrorKind::WriteZero.into())),
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (buffer, Err(error)),
            }
        }
        (buffer, Ok(()))
    }

    async fn write_part(
        &self,
        file: &IoFile,
        mut buffer: IoBuf,
        skip: usize,
        length: usize,
        offset: u64,
    ) -> (IoBuf, io::Result<usize>) {
        if skip.saturating_add(length) > IO_BUF_BYTES {
            return (buffer, Err(io::ErrorKind::InvalidInput.into()));
        }
        buffer.zero_to(skip + length);
        self.with_buffer(Work::Write { skip, length, offset }, file, buffer).await
    }

    /// Makes what was written to the file, or to the directory, last. `data_only` leaves behind what
    /// is not needed to read it (times).
    ///
    /// # Errors
    /// What the file system says. After an error it is unknown what lasts, and a second sync that
    /// succeeds says nothing about it.
    pub async fn sync(&self, file: &IoFile, data_only: bool) -> io::Result<()> {
        self.without_buffer(Work::Sync { data_only }, file).await
    }

    /// Gives the file room for `length` bytes from `offset` on, and at least that size.
    ///
    /// # Errors
    /// What the file system says, `StorageFull` among it.
    pub async fn allocate(&self, file: &IoFile, offset: u64, length: u64) -> io::Result<()> {
        self.without_buffer(Work::Allocate { mode: 0, offset, length }, file).await
    }

    async fn with_buffer(
        &self,
        work: Work,
        file: &IoFile,
        buffer: IoBuf,
    ) -> (IoBuf, io::Result<usize>) {
        let (buffer, result) = self.operate(work, file, Some(buffer)).await;
        match buffer {
            Some(buffer) => (buffer, result),
            // The ring gives back what it got; it ended before only if it was taken down by force.
            None => (self.buffer().await, Err(result.err().unwrap_or_else(ring_is_gone))),
        }
    }

    async fn without_buffer(&self, work: Work, file: &IoFile) -> io::Result<()> {
        self.operate(work, file, None).await.1.map(drop)
    }

    async fn operate(
        &self,
        work: Work,
        file: &IoFile,
        buffer: Option<IoBuf>,
    ) -> (Option<IoBuf>, io::Result<usize>) {
        let (reply, answer) = oneshot::channel();
        let started = self.kernel.borrow_mut().start(work, file.clone(), buffer, reply);
        if let Err((buffer, _)) = started {
            return (buffer, Err(io::ErrorKind::ResourceBusy.into()));
        }
        self.driver.call();
        answer.await.unwrap_or_else(|| (None, Err(ring_is_gone())))
    }

    /// Submits what was started and answers what is complete. Called by the driver, at its turn.
    fn turn(&self) -> io::Result<()> {
        loop {
            self.kernel.borrow_mut().submit()?;
            let mut any = false;
            // Not a `while let` over the borrow: an answer may wake or drop what starts the next.
            loop {
                let finished = self.kernel.borrow_mut().complete();
                let Some(Finished { token, buffer, result }) = finished else { break };
                any = true;
                // Nobody waits any more: the buffer goes back to the pool here.
                if let Err(unwanted) = token.send((buffer, result)) {
                    drop(unwanted);
                }
            }
            // Not all and nothing complete: the kernel has no memory for more until something ends.
            if !any {
                return Ok(());
            }
        }
    }
}

fn ring_is_gone() -> io::Error {
    io::Error::other("the ring ended before the operation")
}

/// Registers the buffers, raising the limit on locked memory where that is what is missing.
fn pin_buffers(kernel: &KernelRing<Reply>, pool: &Pool) -> io::Result<()> {
    match kernel.register(pool) {
        Err(error) if error.kind() == io::ErrorKind::OutOfMemory => {
            crate::preflight::raise_memlock_by(u64::from(pool.count()) * IO_BUF_BYTES as u64);
            kernel.register(pool)
        }
        other => other,
    }
}

/// Drives a ring until it is gone, or closing and idle.
async fn drive(ring: Weak<Ring>, completions: OwnedFd) {
    let mut polled: Option<Pin<Box<dyn Future<Output = io::Result<()>>>>> = None;
    let turn = |cx: &mut Context<'_>| {
        loop {
            let Some(ring) = ring.upgrade() else { return Poll::Ready(()) };
            ring.driver.called.set(false);
            *ring.driver.waker.borrow_mut() = Some(cx.waker().clone());
            if let Err(error) = ring.turn() {
                tracing::error!(%error, "the ring for files does not take operations");
                ring.kernel.borrow_mut().give_up();
                return Poll::Ready(());
            }
            if ring.kernel.borrow().is_idle() {
                return if ring.driver.closing.get() { Poll::Ready(()) } else { Poll::Pending };
            }
            if ring.kernel.borrow().is_stuck() {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let wait = polled.get_or_insert_with(|| {
                let descriptor = completions.as_fd().try_clone_to_owned();
                Box::pin(async move {
                    crate::rt::polled(descriptor?).await;
                    Ok(())
                })
            });
            match pin!(wait).poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) => polled = None,
                Poll::Ready(Err(error)) => {
                    tracing::warn!(%error, "no descriptor left to wait for the ring; asking again");
                    polled = None;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
            }
        }
    };
    std::future::poll_fn(turn).await;
}
