//! Copies of base layers in sealed memory, one for each memory node.
//!
//! Kept by the first shard of a node for all shards there; asked through messages. A base layer that
//! many guests map is then one inode in that node's own memory, checked once against its checksums,
//! and no guest waits for the drive. Within a budget: the copy that was asked for longest ago makes
//! room. Guests that map one keep it. Refuses a layer whose bytes are not what was written.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::rc::Rc;

use mica_numa::io::IoFile;
use mica_numa::memfd::{self, Extent};
use mica_numa::rt::{self, oneshot};
use mica_storage::{CHUNK_BYTES, Layer, LayerId, LayerKind, StorageError};
use rustix::fs::OFlags;

use crate::sandbox::chain;
use crate::shard::Shard;

/// Copies that are being made or waited for at one time, at the most.
const ENTRIES_MAX: usize = 256;

/// The copies of one node.
#[derive(Debug)]
pub(crate) struct Replicas {
    node: u32,
    budget_bytes: u64,
    /// The last asked for at the end.
    entries: RefCell<Vec<Entry>>,
}

#[derive(Debug)]
struct Entry {
    layer: LayerId,
    bytes: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Being made, and who waits.
    Coming(Vec<oneshot::Sender<()>>),
    There(OwnedFd),
    /// It does not fit, or could not be made; asked again, the answer is the same until a restart.
    Refused,
}

impl Replicas {
    /// No copies yet.
    pub(crate) fn new(node: u32, budget_bytes: u64) -> Self {
        Self { node, budget_bytes, entries: RefCell::default() }
    }

    /// A copy of a snapshot's base layer, made now if it is not there. `None` when it does not fit.
    pub(crate) async fn get(
        &self,
        shard: &Rc<Shard>,
        snapshot: String,
        layer: LayerId,
    ) -> Option<OwnedFd> {
        loop {
            let waiting = match self.look(layer) {
                Look::There(copy) => return copy,
                Look::Coming(waiting) => waiting,
                Look::Absent => break,
            };
            // Dropped or given, it is the same: look again.
            waiting.await.unwrap_or(());
        }
        let made = self.make(shard, snapshot, layer).await;
        let copy = made.as_ref().and_then(|(copy, _)| copy.try_clone().ok());
        self.settle(layer, made);
        copy
    }

    fn look(&self, layer: LayerId) -> Look {
        let mut entries = self.entries.borrow_mut();
        let Some(at) = entries.iter().position(|entry| entry.layer == layer) else {
            if entries.len() >= ENTRIES_MAX {
                entries.retain(|entry| !matches!(entry.state, State::Refused));
            }
            entries.push(Entry { layer, bytes: 0, state: State::Coming(Vec::new()) });
            return Look::Absent;
        };
        let mut entry = entries.remove(at);
        let look = match &mut entry.state {
            State::There(copy) => Look::There(copy.try_clone().ok()),
            State::Refused => Look::There(None),
            State::Coming(waiting) => {
                let (sender, receiver) = oneshot::channel();
                waiting.push(sender);
                Look::Coming(receiver)
            }
        };
        entries.push(entry);
        look
    }

    async fn make(
        &self,
        shard: &Rc<Shard>,
        snapshot: String,
        layer: LayerId,
    ) -> Option<(OwnedFd, u64)> {
        let store = shard.workshop.store.clone();
        let opened = rt::blocking(move || -> Result<_, StorageError> {
            let Some(found) = store.open_snapshot(&snapshot)? else { return Ok(None) };
            let layer = found.layers.into_iter().find(|open| open.info().id == layer);
            Ok(layer.filter(|layer| layer.info().kind == LayerKind::Flat).map(source))
        });
        let (layer, file, extents) = match opened.await {
            Ok(Ok(Some(Ok(source)))) => source,
            Ok(Ok(Some(Err(error)))) => {
                tracing::warn!(%error, "a base layer cannot be read for a copy in memory");
                return None;
            }
            Ok(Ok(None)) => return None,
            Ok(Err(error)) => {
                tracing::warn!(error = chain(&error), "a snapshot cannot be opened for a copy");
                return None;
            }
            Err(error) => {
                tracing::warn!(%error, "a base layer was not looked at");
                return None;
            }
        };
        let bytes: u64 = extents.iter().map(|extent| extent.bytes).sum();
        if !self.make_room(bytes) {
            return None;
        }
        let (file, whole) = (IoFile::from(file), layer.data_bytes());
        let check = move |offset, piece: &[u8]| layer.is_intact(offset, piece);
        let filled =
            memfd::fill_sealed(&shard.ring, &file, whole, &extents, self.node, check).await;
        match filled {
            Ok(copy) => {
                tracing::info!(node = self.node, bytes, "a base layer is in memory");
                Some((copy, bytes))
            }
            Err(error) => {
                tracing::error!(error = chain(&error), "a base layer was not copied to memory");
                None
            }
        }
    }

    /// Lets old copies go until there is room. Whether there is.
    fn make_room(&self, bytes: u64) -> bool {
        if bytes > self.budget_bytes {
            return false;
        }
        let mut entries = self.entries.borrow_mut();
        while entries.iter().map(|entry| entry.bytes).sum::<u64>() + bytes > self.budget_bytes {
            let oldest = entries.iter().position(|entry| matches!(entry.state, State::There(_)));
            match oldest {
                Some(at) => drop(entries.remove(at)),
                None => return false,
            }
        }
        true
    }

    fn settle(&self, layer: LayerId, made: Option<(OwnedFd, u64)>) {
        let mut entries = self.entries.borrow_mut();
        let Some(entry) = entries.iter_mut().find(|entry| entry.layer == layer) else { return };
        let (state, bytes) = match made {
            Some((copy, bytes)) => (State::There(copy), bytes),
            None => (State::Refused, 0),
        };
        entry.bytes = bytes;
        if let State::Coming(waiting) = std::mem::replace(&mut entry.state, state) {
            for waiter in waiting {
                if waiter.send(()).is_err() {
                    tracing::trace!("nobody waits for this copy any more");
                }
            }
        }
    }
}

enum Look {
    There(Option<OwnedFd>),
    Coming(oneshot::Receiver<()>),
    /// It is to be made by who asked.
    Absent,
}

/// The layer's file past the page cache, and what of it is no hole, in whole checksummed chunks.
fn source(layer: Layer) -> std::io::Result<(Layer, File, Vec<Extent>)> {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&layer.file().as_fd()));
    let direct = OFlags::DIRECT.bits().cast_signed();
    let opened = File::options().read(true).custom_flags(direct).open(&path);
    // Some file systems have no direct I/O.
    let file = opened.or_else(|_| File::open(&path))?;
    let chunk = CHUNK_BYTES as u64;
    let mut whole: Vec<Extent> = Vec::new();
    for extent in memfd::extents(&file, layer.data_bytes())? {
        let start = extent.offset / chunk * chunk;
        let end = (extent.offset + extent.bytes).next_multiple_of(chunk).min(layer.data_bytes());
        match whole.last_mut() {
            Some(last) if last.offset + last.bytes >= start => {
                last.bytes = end.max(last.offset + last.bytes) - last.offset;
            }
            _ => whole.push(Extent { offset: start, bytes: end - start }),
        }
    }
    Ok((layer, file, whole))
}
