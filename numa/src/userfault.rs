//! Another process's missing pages and first writes, through its userfaultfd.
//!
//! Called by `shards` with a userfaultfd that it took from a VM process (`Process::getfd`). Two uses, on
//! the same descriptor:
//! 1. Write tracking: memory that is registered with [`Userfault::track`] can be scanned for what was
//!    written since the last scan (`process::Wanted::AnonymousWritten`). No fault reaches us for it.
//! 2. On-demand restore: memory that is registered with [`Userfault::catch_missing`] is anonymous and
//!    empty; a fault on it comes here as an event, and a [`Pager`] puts the 64 KiB around it there.
//!
//! Registrations are made from here, so that the VM process needs no right to make any: a process that
//! could register memory could also make us wait for it when we read that memory.
//!
//! The other process is hostile. It can fault as often as it has threads, discard what was put, unmap,
//! and end: each is an answer of the kernel that is handled below. Refuses addresses outside of the
//! memory it was told of.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::task::{Poll, Waker};

use futures_lite::FutureExt;
use mica_units::{FrameRun, PAGE_BYTES};

use crate::io::{IoBuf, Ring};
use crate::process::RemoteMemory;
use crate::rt::oneshot;
use crate::sys::{self, RemoteRange};

/// Frames that one fault brings in, and their alignment: 64 KiB. Less costs more faults, more costs
/// reads that nobody needs; several others have measured and came to the same.
pub const NEIGHBOURS: u32 = 16;

/// Neighbourhoods of one memory that are on their way in at a time.
const LOADS_MAX: usize = 32;

/// Times that a page is put again when the kernel says that the moment is bad.
const TRIES_MAX: u32 = 1000;

/// Events that one read takes.
const EVENTS: usize = 32;
/// `sizeof(struct uffd_msg)`.
const EVENT_BYTES: usize = 32;
/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;

// Features (linux/userfaultfd.h).
const FEATURE_WP: u64 = 1 << 0;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
// Modes of a registration.
const REGISTER_MISSING: u64 = 1 << 0;
const REGISTER_WP: u64 = 1 << 1;
/// UFFDIO_COPY puts the page write-protected.
const COPY_WP: u64 = 1 << 1;

/// A userfaultfd of another process, and the memory of that process that it is for.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    memory: RemoteMemory,
}

impl Userfault {
    /// A new userfaultfd of this process. With write tracking where the kernel has it (6.7), else
    /// for missing pages only.
    ///
    /// # Errors
    /// When this process may not have one, or has no descriptor left.
    pub fn create() -> io::Result<OwnedFd> {
        let fd = sys::userfaultfd()?;
        let Err(refused) = sys::uffd_api(fd.as_fd(), FEATURE_WP | FEATURE_WP_ASYNC) else {
            return Ok(fd);
        };
        tracing::debug!(%refused, "no asynchronous write protection");
        // After a refusal the descriptor is used up.
        let fd = sys::userfaultfd()?;
        sys::uffd_api(fd.as_fd(), 0)?;
        Ok(fd)
    }

    /// A userfaultfd whose process has this memory. Only frames of it are ever touched.
    ///
    /// # Errors
    /// When it is no descriptor that can be made non-blocking.
    pub fn new(fd: OwnedFd, memory: RemoteMemory) -> io::Result<Self> {
        // A poll of a blocking one fails.
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd, memory })
    }

    /// Registers frames for write tracking. Again after each change of their mapping.
    ///
    /// # Errors
    /// What the kernel says: `NotFound` (ESRCH) when the process is gone, `InvalidInput` when the
    /// descriptor does not track writes or something else is mapped there.
    pub fn track(&self, run: FrameRun) -> io::Result<()> {
        sys::uffd_register(self.fd.as_fd(), self.range(run)?, REGISTER_WP)
    }

    /// Registers frames, which are anonymous memory, for faults on missing pages, and for write tracking
    /// if asked for.
    ///
    /// # Errors
    /// As [`Self::track`].
    pub fn catch_missing(&self, run: FrameRun, track: bool) -> io::Result<()> {
        let mode = if track { REGISTER_MISSING | REGISTER_WP } else { REGISTER_MISSING };
        sys::uffd_register(self.fd.as_fd(), self.range(run)?, mode)
    }

    /// Lets who waits for a missing frame try again: whoever was to answer may be gone.
    ///
    /// # Errors
    /// As [`Self::track`].
    pub fn wake(&self, run: FrameRun) -> io::Result<()> {
        sys::uffd_wake(self.fd.as_fd(), self.range(run)?)
    }

    /// Ends all that was registered for frames.
    ///
    /// # Errors
    /// As [`Self::track`].
    pub fn release(&self, run: FrameRun) -> io::Result<()> {
        sys::uffd_unregister(self.fd.as_fd(), self.range(run)?)
    }

    fn range(&self, run: FrameRun) -> io::Result<RemoteRange> {
        self.memory.range(run).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// The addresses of the faults that wait now; none when there are none.
    fn faults(&self) -> io::Result<Vec<u64>> {
        let mut bytes = [0u8; EVENTS * EVENT_BYTES];
        let read = match rustix::io::read(&self.fd, &mut bytes) {
            Ok(read) => read,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        Ok(bytes[..read].chunks_exact(EVENT_BYTES).filter_map(fault_address).collect())
    }

    /// Puts `bytes`, whole frames from `first` on, where pages are missing, and wakes who waits for
    /// any of them. Pages that are there already stay.
    fn put(&self, first: u32, bytes: &[u8], mode: u64) -> io::Result<()> {
        let frame = usize::try_from(PAGE_BYTES).unwrap_or(usize::MAX);
        self.fill(first, bytes.len() as u64, |range, done| {
            let rest = usize::try_from(done).ok().and_then(|done| bytes.get(done..));
            let rest = rest.unwrap_or_default();
            debug_assert!(rest.len().is_multiple_of(frame), "whole frames");
            sys::uffd_copy(self.fd.as_fd(), range.address, rest, mode)
        })
    }

    /// As [`Self::put`], with the zero page.
    fn put_zeroes(&self, run: FrameRun) -> io::Result<()> {
        self.fill(run.first(), run.bytes(), |range, _| sys::uffd_zeropage(self.fd.as_fd(), range))
    }

    /// Calls `step` with what is left, and how much is not, until nothing is.
    fn fill(
        &self,
        first: u32,
        bytes: u64,
        mut step: impl FnMut(RemoteRange, u64) -> (u64, io::Result<()>),
    ) -> io::Result<()> {
        let count = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        let run = FrameRun::new(first, count).ok_or(io::ErrorKind::InvalidInput)?;
        let whole = self.range(run)?;
        let mut done = 0;
        let mut tries = 0;
        while done < whole.bytes {
            let left = RemoteRange { address: whole.address + done, bytes: whole.bytes - done };
            let (more, result) = step(left, done);
            done += more;
            tries = if more > 0 { 0 } else { tries + 1 };
            let Err(error) = result else { continue };
            match error.raw_os_error() {
                // Part of it, or none because the other's mappings are changing at the moment: that
                // passes, unless the other keeps it so.
                Some(libc::EAGAIN) if tries < TRIES_MAX => {}
                // The next one is there. Whoever waits for it came too late to be woken by its arrival.
                Some(libc::EEXIST) => {
                    let there = RemoteRange { address: whole.address + done, bytes: PAGE_BYTES };
                    sys::uffd_wake(self.fd.as_fd(), there)?;
                    done += PAGE_BYTES;
                }
                _ => return Err(error),
            }
        }
        Ok(())
    }
}

/// The address in an event, if it is a page fault (`struct uffd_msg`).
fn fault_address(event: &[u8]) -> Option<u64> {
    let is_fault = event.first() == Some(&EVENT_PAGEFAULT);
    let address = event.get(16..24)?.try_into().ok().map(u64::from_ne_bytes)?;
    is_fault.then_some(address)
}

/// A page of zeroes.
const ZEROES: [u8; 4096] = [0; 4096];

const _: () = assert!(ZEROES.len() as u64 == PAGE_BYTES);

/// What a run of frames holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// What was put into the buffer: all of the run's bytes.
    Bytes,
    /// Zeroes only, and nothing was put into the buffer.
    Zeroes,
}

/// Where missing frames come from.
pub trait PageSource {
    /// Puts the bytes of `run` into the empty buffer, or says that they are zeroes. The run is at most
    /// [`NEIGHBOURS`] frames, does not cross a multiple of that, and may end with the memory.
    fn fill(
        &self,
        run: FrameRun,
        buffer: IoBuf,
    ) -> impl Future<Output = (IoBuf, io::Result<Content>)>;
}

impl<S: PageSource> PageSource for Rc<S> {
    async fn fill(&self, run: FrameRun, buffer: IoBuf) -> (IoBuf, io::Result<Content>) {
        S::fill(self, run, buffer).await
    }
}

/// How far a neighbourhood is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    Missing,
    Coming,
    There,
}

/// Brings missing frames in.
pub struct Pager<S> {
    userfault: Userfault,
    source: S,
    ring: Rc<Ring>,
    /// Pages are put write-protected, so that they do not count as written.
    mode: u64,
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    loads: Vec<Load>,
    coming: usize,
    /// Who waits for the next arrival.
    waiting: Vec<oneshot::Sender<()>>,
    failed: Option<io::Error>,
    /// Who waits for `failed`.
    on_failure: Option<Waker>,
}

impl<S: PageSource + 'static> Pager<S> {
    /// A pager for memory none of which is there. `track`: as it was registered.
    #[must_use]
    pub fn new(userfault: Userfault, source: S, ring: Rc<Ring>, track: bool) -> Rc<Self> {
        let count = userfault.memory.frames().div_ceil(NEIGHBOURS) as usize;
        let loads = vec![Load::Missing; count];
        let state = State { loads, coming: 0, waiting: Vec::new(), failed: None, on_failure: None };
        let mode = if track { COPY_WP } else { 0 };
        Rc::new(Self { userfault, source, ring, mode, state: RefCell::new(state) })
    }

    /// Answers faults until something fails. Does not end with the process, whose userfaultfd stays
    /// open here: cancel it then. Dropped at an await, it leaves what is coming to come, and can be
    /// called again.
    ///
    /// # Errors
    /// When the source failed, or the kernel refused a page for a reason other than the process's end.
    /// Threads that wait for a page then wait on: end the process.
    pub async fn serve(self: &Rc<Self>) -> io::Result<()> {
        loop {
            let faults = self.userfault.faults()?;
            if faults.is_empty() {
                let polled = crate::rt::polled(self.userfault.fd.try_clone()?);
                polled.or(self.failure()).await;
            }
            for address in faults {
                // Outside cannot be: only this memory is registered.
                if let Some(frame) = self.userfault.memory.frame_at(address) {
                    self.fault(frame).await?;
                }
            }
            self.take_failure()?;
            // A process that discards what it was given faults for ever; others have their turn.
            crate::rt::yield_now().await;
        }
    }

    /// Brings in the neighbourhoods of `runs` that are missing, in order, before anyone waits for them.
    /// Ends when all are there.
    ///
    /// # Errors
    /// As [`Self::serve`].
    pub async fn prefetch(self: &Rc<Self>, runs: &[FrameRun]) -> io::Result<()> {
        let neighbourhoods =
            |run: &FrameRun| run.first() / NEIGHBOURS..run.end().div_ceil(NEIGHBOURS);
        for neighbourhood in runs.iter().flat_map(neighbourhoods) {
            self.load(neighbourhood).await;
            self.take_failure()?;
        }
        for neighbourhood in runs.iter().flat_map(neighbourhoods) {
            while self.load_of(neighbourhood) == Some(Load::Coming) {
                self.next_arrival().await;
            }
            self.take_failure()?;
        }
        Ok(())
    }

    fn load_of(&self, neighbourhood: u32) -> Option<Load> {
        self.state.borrow().loads.get(neighbourhood as usize).copied()
    }

    fn take_failure(&self) -> io::Result<()> {
        self.state.borrow_mut().failed.take().map_or(Ok(()), Err)
    }

    /// Waits until something that was coming is there, or failed.
    async fn next_arrival(&self) {
        let (sender, arrival) = oneshot::channel();
        self.state.borrow_mut().waiting.push(sender);
        // The sender is dropped, and gives nothing.
        let _nothing: Option<()> = arrival.await;
    }

    /// Whether the neighbourhood of a frame was brought in.
    #[must_use]
    pub fn is_there(&self, frame: u32) -> bool {
        self.load_of(frame / NEIGHBOURS) == Some(Load::There)
    }

    /// Ends when a neighbourhood could not be brought in.
    async fn failure(&self) {
        std::future::poll_fn(|cx| {
            let mut state = self.state.borrow_mut();
            if state.failed.is_some() {
                return Poll::Ready(());
            }
            state.on_failure = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    async fn fault(self: &Rc<Self>, frame: u32) -> io::Result<()> {
        if self.is_there(frame) {
            // It came while the fault was on its way here, or the process has discarded the page since
            // and gets a new one, which counts as written. Either way nobody waits any more. Copied: where
            // the discarded page was protected, the kernel keeps a mark of that, over which it puts a
            // copied page but no zero page.
            return gone_is_fine(self.userfault.put(frame, &ZEROES, 0));
        }
        self.load(frame / NEIGHBOURS).await;
        Ok(())
    }

    /// Starts to bring a neighbourhood in, if it is missing. Waits while too many are coming.
    async fn load(self: &Rc<Self>, neighbourhood: u32) {
        let index = neighbourhood as usize;
        loop {
            if self.load_of(neighbourhood) != Some(Load::Missing) {
                return;
            }
            if self.state.borrow().coming < LOADS_MAX {
                break;
            }
            self.next_arrival().await;
        }
        // No await since the check.
        {
            let mut state = self.state.borrow_mut();
            state.coming += 1;
            state.loads[index] = Load::Coming;
        }
        let pager = Rc::clone(self);
        crate::rt::spawn(async move {
            let brought = pager.bring(neighbourhood).await;
            let mut state = pager.state.borrow_mut();
            state.coming -= 1;
            state.loads[index] = if brought.is_ok() { Load::There } else { Load::Missing };
            if let Err(error) = brought {
                tracing::error!(%error, neighbourhood, "a guest's memory cannot be brought in");
                state.failed = Some(error);
                state.on_failure.take().inspect(Waker::wake_by_ref);
            }
            let waiting = std::mem::take(&mut state.waiting);
            drop(state);
            // A sender that is dropped wakes.
            drop(waiting);
        })
        .detach();
    }

    async fn bring(&self, neighbourhood: u32) -> io::Result<()> {
        let first = neighbourhood * NEIGHBOURS;
        let count = NEIGHBOURS.min(self.userfault.memory.frames().saturating_sub(first));
        let run = FrameRun::new(first, count).ok_or(io::ErrorKind::InvalidInput)?;
        let buffer = self.ring.buffer().await;
        let (buffer, content) = self.source.fill(run, buffer).await;
        let put = match content? {
            Content::Zeroes => self.userfault.put_zeroes(run),
            Content::Bytes if buffer.len() as u64 == run.bytes() => {
                self.userfault.put(first, buffer.bytes(), self.mode)
            }
            Content::Bytes => return Err(io::ErrorKind::UnexpectedEof.into()),
        };
        gone_is_fine(put)
    }
}

/// The process may end, or unmap the memory, at any time: there is nobody to serve then.
fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => Ok(()),
        other => other,
    }
}

impl<S> std::fmt::Debug for Pager<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pager").field("userfault", &self.userfault).finish_non_exhaustive()
    }
}
