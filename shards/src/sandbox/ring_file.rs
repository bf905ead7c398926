//! A layer's file, written through the shard's ring.
//!
//! Called by the writers of `storage`, which say what they need as a trait. Refuses nothing by itself.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;

use mica_numa::io::{IoBuf, IoFile, Ring};
use mica_storage::{LayerFile, Pending};

/// A file, and the ring it is written through.
#[derive(Clone, Debug)]
pub(crate) struct RingFile {
    ring: Rc<Ring>,
    file: IoFile,
}

impl RingFile {
    /// Takes a file that is open for writing.
    pub(crate) fn new(ring: Rc<Ring>, file: File) -> Self {
        Self { ring, file: IoFile::from(file) }
    }
}

/// A registered buffer, as long as it was filled.
#[derive(Debug)]
pub(crate) struct Chunk(pub(crate) IoBuf);

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl AsMut<[u8]> for Chunk {
    /// All of it: what was not filled is zero.
    fn as_mut(&mut self) -> &mut [u8] {
        self.0.zero_to(mica_numa::io::IO_BUF_BYTES);
        self.0.bytes_mut()
    }
}

impl LayerFile for RingFile {
    type Chunk = Chunk;

    fn reserve(&self) -> Pending<Chunk> {
        let ring = Rc::clone(&self.ring);
        Box::pin(async move { Ok(Chunk(ring.buffer().await)) })
    }

    fn allocate(&self, bytes: u64) -> Pending<()> {
        let this = self.clone();
        Box::pin(async move { this.ring.allocate(&this.file, 0, bytes).await })
    }

    fn write_at(&self, chunk: Chunk, len: usize, offset: u64) -> Pending<()> {
        let this = self.clone();
        // A task: the buffer is free again when the write is done, whether or not its capture looks.
        let write = mica_numa::rt::spawn(async move {
            this.ring.write_all_at(&this.file, chunk.0, len, offset).await.1
        });
        Box::pin(async move {
            write.join().await.unwrap_or_else(|| Err(io::Error::other("the write was dropped")))
        })
    }

    fn set_len(&self, bytes: u64) -> Pending<()> {
        let twin = self.file.as_fd().try_clone_to_owned();
        Box::pin(async move {
            let twin = twin?;
            mica_numa::rt::blocking(move || rustix::fs::ftruncate(&twin, bytes))
                .await
                .map_err(io::Error::other)?
                .map_err(io::Error::from)
        })
    }

    fn sync(&self) -> Pending<()> {
        let this = self.clone();
        Box::pin(async move { this.ring.sync(&this.file, true).await })
    }
}
