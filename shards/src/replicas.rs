//! Copies of base layers in sealed memory, one for each memory node.
//!
//! Kept by the first shard of a node for all shards there; asked through messages. A base layer that
//! many guests map is then one inode in that node's own memory, checked once against its checksums,
//! and no guest waits for the drive. Within a budget: the copy that was asked for longest ago makes
//! room. Guests that map one keep it. A copy is made by a task of its own, whoever asks may go away
//! meanwhile. Refuses a layer whose bytes are not what was written.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use mica_numa::MemoryPolicy;
use mica_numa::io::IoFile;
use mica_numa::memfd::{self, Extent};
use mica_numa::rt::{self, BlockingError, oneshot};
use mica_storage::{CHUNK_BYTES, Layer, LayerId, LayerKind, StorageError};
use rustix::fs::OFlags;

use crate::pressure;
use crate::sandbox::chain;
use crate::shard::Shard;

/// Copies that are being made or waited for at one time, at the most.
const ENTRIES_MAX: usize = 256;

/// A copy that cannot be made is asked for again by every create; the log has so long a rest.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// Why there is no copy, where there should be one
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum NoCopy {
    /// The snapshot that it was to be made from is not there any more. Another may lie on the same layer.
    #[error("its snapshot is gone")]
    Gone,
    /// Copies that are being made have the room. Asked again later, there may be some.
    #[error("other copies are being made in its room")]
    Full,
    /// No thread had room for it.
    #[error("the host is busy")]
    Busy,
    /// Nobody is there to make it.
    #[error("the host is shutting down")]
    ShuttingDown,
    /// It was tried.
    #[error("{0}")]
    Failed(String),
}

impl From<BlockingError> for NoCopy {
    fn from(error: BlockingError) -> Self {
        match error {
            BlockingError::Full => Self::Busy,
            other => Self::Failed(other.to_string()),
        }
    }
}

/// The copies of one node.
#[derive(Debug)]
pub(crate) struct Replicas {
    node: u32,
    budget_bytes: u64,
    /// The last asked for at the end.
    entries: RefCell<Vec<Entry>>,
    logged: Cell<Option<Instant>>,
}

#[derive(Debug)]
struct Entry {
    layer: LayerId,
    bytes: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Being made, and who waits: they hear why it was not, or look again.
    Coming(Vec<oneshot::Sender<Result<(), NoCopy>>>),
    There(OwnedFd),
    /// It is none that is kept, or does not fit; asked again, the answer is the same until a restart.
    Refused,
}

/// A copy and its length; none where there shall be none; or why there is none.
type Made = Result<Option<(OwnedFd, u64)>, NoCopy>;

impl Replicas {
    /// No copies yet.
    pub(crate) fn new(node: u32, budget_bytes: u64) -> Self {
        Self { node, budget_bytes, entries: RefCell::default(), logged: Cell::new(None) }
    }

    /// A copy of a snapshot's base layer, made now if it is not there. None where it does not fit.
    ///
    /// # Errors
    /// With why it could not be made; asked again, it is tried again.
    pub(crate) async fn get(
        shard: &Rc<Shard>,
        snapshot: String,
        layer: LayerId,
    ) -> Result<Option<OwnedFd>, NoCopy> {
        let begin = || {
            let (shard, snapshot) = (Rc::clone(shard), snapshot.clone());
            let making = async move {
                let made = make(&shard, snapshot, layer).await;
                shard.replicas.settle(layer, made);
            };
            // Who asked may be a create that ends first, and others wait for the same copy.
            rt::spawn(making).detach();
        };
        shard.replicas.get_or(layer, begin).await
    }

    /// The copy, once it is there. Where nobody makes it yet, `begin` does.
    async fn get_or(&self, layer: LayerId, begin: impl Fn()) -> Result<Option<OwnedFd>, NoCopy> {
        loop {
            let (waiting, is_own) = match self.look(layer) {
                Look::There(copy) => {
                    return copy.map_err(|error| NoCopy::Failed(error.to_string()));
                }
                Look::Coming(waiting) => (waiting, false),
                Look::Absent(waiting) => {
                    begin();
                    (waiting, true)
                }
            };
            match waiting.await.unwrap_or(Err(NoCopy::ShuttingDown)) {
                // That was another's snapshot: ours is still there, or we shall hear it.
                Err(NoCopy::Gone) if !is_own => {}
                told => told?,
            }
        }
    }

    fn look(&self, layer: LayerId) -> Look {
        let mut entries = self.entries.borrow_mut();
        let Some(at) = entries.iter().position(|entry| entry.layer == layer) else {
            if entries.len() >= ENTRIES_MAX {
                entries.retain(|entry| !matches!(entry.state, State::Refused));
            }
            let (sender, receiver) = oneshot::channel();
            entries.push(Entry { layer, bytes: 0, state: State::Coming(vec![sender]) });
            return Look::Absent(receiver);
        };
        let mut entry = entries.remove(at);
        let look = match &mut entry.state {
            State::There(copy) => Look::There(copy.try_clone().map(Some)),
            State::Refused => Look::There(Ok(None)),
            State::Coming(waiting) => {
                let (sender, receiver) = oneshot::channel();
                waiting.push(sender);
                Look::Coming(receiver)
            }
        };
        entries.push(entry);
        look
    }

    /// Lets old copies go until there is room, tells `gone` of each, and takes the room. Whether there is.
    fn make_room(&self, layer: LayerId, bytes: u64, mut gone: impl FnMut(LayerId)) -> bool {
        if bytes > self.budget_bytes {
            return false;
        }
        let mut entries = self.entries.borrow_mut();
        while entries.iter().map(|entry| entry.bytes).sum::<u64>() + bytes > self.budget_bytes {
            let oldest = entries.iter().position(|entry| matches!(entry.state, State::There(_)));
            match oldest {
                Some(at) => gone(entries.remove(at).layer),
                None => return false,
            }
        }
        // From now on, so that copies that are made at the same time share the budget.
        if let Some(own) = entries.iter_mut().find(|entry| entry.layer == layer) {
            own.bytes = bytes;
        }
        true
    }

    fn settle(&self, layer: LayerId, made: Made) {
        let mut entries = self.entries.borrow_mut();
        let Some(at) = entries.iter().position(|entry| entry.layer == layer) else { return };
        let told = made.as_ref().map(drop).map_err(NoCopy::clone);
        let before = match made {
            Ok(Some((copy, bytes))) => {
                entries[at].bytes = bytes;
                std::mem::replace(&mut entries[at].state, State::There(copy))
            }
            Ok(None) => std::mem::replace(&mut entries[at].state, State::Refused),
            // Whoever asks next tries again.
            Err(error) => {
                self.log(&error);
                entries.remove(at).state
            }
        };
        drop(entries);
        let State::Coming(waiting) = before else { return };
        for waiter in waiting {
            if waiter.send(told.clone()).is_err() {
                tracing::trace!("nobody waits for this copy any more");
            }
        }
    }

    fn log(&self, error: &NoCopy) {
        let NoCopy::Failed(why) = error else { return };
        if self.logged.get().is_none_or(|last| last.elapsed() >= LOG_EVERY) {
            self.logged.set(Some(Instant::now()));
            tracing::error!(node = self.node, "no copy of a base layer: {why}");
        }
    }
}

enum Look {
    There(std::io::Result<Option<OwnedFd>>),
    Coming(oneshot::Receiver<Result<(), NoCopy>>),
    /// It is to be made by who asked, who waits as the others do.
    Absent(oneshot::Receiver<Result<(), NoCopy>>),
}

/// Makes the copy, if it is one that is kept and there is room.
async fn make(shard: &Rc<Shard>, snapshot: String, layer: LayerId) -> Made {
    let store = shard.workshop.store.clone();
    let opened = rt::blocking(move || -> Result<_, StorageError> {
        let found = store.open_snapshot(&snapshot)?;
        let mut layers = found.into_iter().flat_map(|found| found.layers);
        Ok(layers.find(|open| open.info().id == layer))
    });
    let found = opened.await?.map_err(|error| failed("cannot be opened", &error))?;
    // Deleted or flattened meanwhile.
    let found = found.ok_or(NoCopy::Gone)?;
    if found.info().kind != LayerKind::Flat {
        return Ok(None);
    }
    let read = rt::blocking(move || source(found)).await?;
    let (layer, file, extents) = read.map_err(|error| failed("cannot be read", &error))?;
    let bytes: u64 = extents.iter().map(|extent| extent.bytes).sum();
    let replicas = &shard.replicas;
    if bytes > replicas.budget_bytes {
        return Ok(None);
    }
    // Asked of the first shard of a node: what it shows is of all of them.
    let gone = |layer| shard.choice.loads().drop_near(shard.id, layer);
    if !replicas.make_room(layer.info().id, bytes, gone) {
        return Err(NoCopy::Full);
    }
    let (node, policy) = (replicas.node, shard.pool.placement().memory);
    if policy == MemoryPolicy::Bind {
        has_room(node, bytes).await?;
    }
    let (file, whole) = (IoFile::from(file), layer.data_bytes());
    let check = move |offset, piece: &[u8]| layer.is_intact(offset, piece);
    let place = (node, policy);
    let filled = memfd::fill_sealed(&shard.ring, &file, whole, &extents, place, check).await;
    let copy = filled.map_err(|error| failed("was not copied to memory", &error))?;
    tracing::info!(node, bytes, "a base layer is in memory");
    Ok(Some((copy, bytes)))
}

/// Refuses a copy that a node has no room for: where memory is bound, the kernel would end a process that has
/// memory there, whichever it likes.
async fn has_room(node: u32, bytes: u64) -> Result<(), NoCopy> {
    let memory = rt::blocking(move || pressure::memory(node)).await?;
    let (_, free) = memory.map_err(|error| failed("was not begun", &error))?;
    if free > bytes {
        return Ok(());
    }
    Err(NoCopy::Failed(format!("it takes {bytes} bytes, and the node has {free} left")))
}

fn failed(what: &str, error: &dyn std::error::Error) -> NoCopy {
    NoCopy::Failed(format!("a base layer {what}: {}", chain(error)))
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

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::{block_on, poll_once, zip};

    fn layer(character: &str) -> LayerId {
        character.repeat(20).parse().unwrap()
    }

    fn copy() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    /// Asks for a copy that is absent, and takes its room. Whether there is.
    fn begin(replicas: &Replicas, name: &str, bytes: u64) -> bool {
        assert!(matches!(replicas.look(layer(name)), Look::Absent(_)), "{name}");
        replicas.make_room(layer(name), bytes, |_| {})
    }

    #[test]
    fn one_whose_room_others_have_that_come_is_tried_again() {
        let replicas = Replicas::new(0, 100);
        assert!(begin(&replicas, "a", 80));
        for _ in 0..2 {
            assert!(!begin(&replicas, "b", 40), "the other is being made");
            replicas.settle(layer("b"), Err(NoCopy::Full));
        }
        replicas.settle(layer("a"), Ok(Some((copy(), 80))));
        assert!(begin(&replicas, "b", 40), "the other is there, and makes room");
        replicas.settle(layer("b"), Ok(Some((copy(), 40))));
        assert!(matches!(replicas.look(layer("b")), Look::There(Ok(Some(_)))));
        // What does not fit, or is none that is kept, is not tried again.
        assert!(!begin(&replicas, "c", 101));
        replicas.settle(layer("c"), Ok(None));
        assert!(matches!(replicas.look(layer("c")), Look::There(Ok(None))));
    }

    #[test]
    fn one_that_comes_to_nothing_gives_its_room_back() {
        for why in [NoCopy::Gone, NoCopy::Busy, NoCopy::Failed("damaged".to_owned())] {
            let replicas = Replicas::new(0, 100);
            assert!(begin(&replicas, "a", 80));
            assert!(!begin(&replicas, "b", 40));
            replicas.settle(layer("b"), Err(NoCopy::Full));
            replicas.settle(layer("a"), Err(why));
            assert!(begin(&replicas, "b", 40), "nobody has the room now");
            assert!(begin(&replicas, "a", 60), "and what is left is left for the other");
        }
    }

    #[test]
    fn where_anothers_snapshot_went_away_the_copy_is_made_from_ones_own() {
        let replicas = Replicas::new(0, 100);
        let begun = RefCell::new(Vec::new());
        let ask = |who: &'static str| {
            let begun = &begun;
            replicas.get_or(layer("a"), move || begun.borrow_mut().push(who))
        };
        let (first, second) = (ask("first"), ask("second"));
        let mut both = Box::pin(zip(first, second));
        block_on(async {
            assert!(poll_once(&mut both).await.is_none());
            assert_eq!(*begun.borrow(), ["first"], "the other waits for the same copy");
            assert!(replicas.make_room(layer("a"), 80, |_| {}));
            replicas.settle(layer("a"), Err(NoCopy::Gone));
            assert!(poll_once(&mut both).await.is_none());
            assert_eq!(*begun.borrow(), ["first", "second"]);
            assert!(replicas.make_room(layer("a"), 80, |_| {}), "the room is there again");
            replicas.settle(layer("a"), Ok(Some((copy(), 80))));
            let (first, second) = both.await;
            assert!(matches!(first, Err(NoCopy::Gone)), "its own went away: {first:?}");
            assert!(matches!(second, Ok(Some(_))), "{second:?}");
        });
    }

    #[test]
    fn what_makes_room_is_told_and_what_is_being_made_stays() {
        let replicas = Replicas::new(0, 100);
        let there = || State::There(copy());
        let add = |name, bytes, state| {
            replicas.entries.borrow_mut().push(Entry { layer: layer(name), bytes, state });
        };
        add("o", 40, there());
        add("n", 40, there());
        let room = |name, bytes| {
            add(name, 0, State::Coming(Vec::new()));
            let mut gone = Vec::new();
            (replicas.make_room(layer(name), bytes, |layer| gone.push(layer)), gone)
        };
        assert_eq!(room("a", 20), (true, vec![]));
        assert_eq!(room("b", 101), (false, vec![]), "it never fits");
        assert_eq!(room("c", 30), (true, vec![layer("o")]), "the one asked for longest ago");
        assert_eq!(room("d", 55), (false, vec![layer("n")]), "two that come have 50 of 100");
    }
}
