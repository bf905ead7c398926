//! A layer file written with plain system calls, for threads that may block.
//!
//! Called by `flatten` and by template builds, which have no ring. Refuses nothing. Each operation is
//! done before its future is returned, so that [`run_blocking`] never has to wait.

use std::cell::RefCell;
use std::fs::File;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::{LayerFile, Pending};
use crate::crashsafe::Disk;
use crate::error::{Result, StorageError};
use crate::layer::PAGE;

/// Length of a buffer: 1 MiB.
const BUFFER_BYTES: usize = 1 << 20;
const ALIGNMENT: usize = PAGE;

/// A file, and one buffer for it.
#[derive(Debug)]
pub struct BlockingFile {
    file: File,
    disk: Disk,
    /// For messages.
    path: PathBuf,
    spare: Rc<RefCell<Option<Aligned>>>,
}

impl BlockingFile {
    /// Writes to `file`, which may be open with `O_DIRECT`.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self::on(Disk::default(), file, PathBuf::from("a layer"))
    }

    pub(crate) fn on(disk: Disk, file: File, path: PathBuf) -> Self {
        Self { file, disk, path, spare: Rc::default() }
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

fn done<T: 'static>(result: Result<T>) -> Pending<T> {
    // The writer adds operation and path again, so the system's error is all that it needs.
    Box::pin(std::future::ready(result.map_err(|error| match error {
        StorageError::Io { source, .. } | StorageError::NoSpace { source, .. } => source,
        other => io::Error::other(other),
    })))
}

impl LayerFile for BlockingFile {
    type Chunk = Aligned;

    fn reserve(&self) -> Pending<Aligned> {
        done(Ok(self.spare.borrow_mut().take().unwrap_or_else(Aligned::new)))
    }

    fn allocate(&self, bytes: u64) -> Pending<()> {
        done(self.disk.allocate(&self.path, &self.file, bytes))
    }

    fn write_at(&self, chunk: Aligned, len: usize, offset: u64) -> Pending<()> {
        let written = self.disk.write_at(&self.path, &self.file, &chunk.as_ref()[..len], offset);
        *self.spare.borrow_mut() = Some(chunk);
        done(written)
    }

    fn set_len(&self, bytes: u64) -> Pending<()> {
        done(self.disk.set_len(&self.path, &self.file, bytes))
    }

    fn sync(&self) -> Pending<()> {
        done(self.disk.sync_file(&self.path, &self.file))
    }
}

/// Runs a future whose operations are all done at once, as those over a [`BlockingFile`] are.
///
/// # Errors
/// The future's own, or [`io::ErrorKind::WouldBlock`] as a storage error when it waits after all.
pub fn run_blocking<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => Err(StorageError::io(
            "write without a ring",
            std::path::Path::new("a layer"),
            io::ErrorKind::WouldBlock.into(),
        )),
    }
}
