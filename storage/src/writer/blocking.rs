//! A layer file written with plain system calls, for threads that may block.
//!
//! Called by `flatten` and by template builds, which have no ring. Refuses nothing. Each operation is
//! done before its future is returned, so that [`run_blocking`] never has to wait.

use std::cell::RefCell;
use std::fs::File;
use std::future::Future;
use std::io;
use std::os::unix::fs::FileExt;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::{LayerFile, Pending};
use crate::layer::PAGE;

/// Length of a buffer: 1 MiB.
const BUFFER_BYTES: usize = 1 << 20;
const ALIGNMENT: usize = PAGE;

/// A file, and one buffer for it.
#[derive(Debug)]
pub struct BlockingFile {
    file: File,
    spare: Rc<RefCell<Option<Aligned>>>,
}

impl BlockingFile {
    /// Writes to `file`, which may be open with `O_DIRECT`.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self { file, spare: Rc::default() }
    }
}

/// A buffer that starts at a multiple of 4096.
#[derive(Debug)]
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new() -> Self {
        let memory = vec![0; BUFFER_BYTES + ALIGNMENT];
        // The allocation does not move when the vector does.
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { memory, start }
    }
}

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        &self.memory[self.start..self.start + BUFFER_BYTES]
    }
}

impl AsMut<[u8]> for Aligned {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + BUFFER_BYTES]
    }
}

fn done<T: 'static>(result: io::Result<T>) -> Pending<T> {
    Box::pin(std::future::ready(result))
}

/// Reserves space; a file system that cannot is no failure, the writes will tell.
pub(super) fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl LayerFile for BlockingFile {
    type Chunk = Aligned;

    fn reserve(&self) -> Pending<Aligned> {
        done(Ok(self.spare.borrow_mut().take().unwrap_or_else(Aligned::new)))
    }

    fn allocate(&self, bytes: u64) -> Pending<()> {
        done(allocate(&self.file, bytes))
    }

    fn write_at(&self, chunk: Aligned, len: usize, offset: u64) -> Pending<()> {
        let written = self.file.write_all_at(&chunk.as_ref()[..len], offset);
        *self.spare.borrow_mut() = Some(chunk);
        done(written)
    }

    fn set_len(&self, bytes: u64) -> Pending<()> {
        done(self.file.set_len(bytes))
    }

    fn sync(&self) -> Pending<()> {
        done(self.file.sync_all())
    }
}

/// Runs a future whose operations are all done at once, as those over a [`BlockingFile`] are.
///
/// # Errors
/// The future's own, or [`io::ErrorKind::WouldBlock`] as a storage error when it waits after all.
pub fn run_blocking<T>(future: impl Future<Output = crate::Result<T>>) -> crate::Result<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => Err(crate::StorageError::io(
            "write without a ring",
            std::path::Path::new("a layer"),
            io::ErrorKind::WouldBlock.into(),
        )),
    }
}
