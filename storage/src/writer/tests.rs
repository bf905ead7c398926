//! Writers over a file whose writes end in any order, with few buffers, and over one that fails.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::layer::{Layer, groups};
use crate::testing::TempDir;

/// A file each of whose writes needs some polls, and which has four buffers.
#[derive(Clone)]
struct Slow(Rc<State>);

struct State {
    file: std::fs::File,
    free: RefCell<Vec<Vec<u8>>>,
    in_flight: Cell<usize>,
    most: Cell<usize>,
    written: Cell<usize>,
    synced_after: Cell<Option<usize>>,
    /// The write that fails, and how.
    fails: Option<(usize, i32)>,
}

const BUFFERS: usize = 4;
const BUFFER: usize = 2 * CHUNK_BYTES;

impl Slow {
    fn new(path: &Path, fails: Option<(usize, i32)>) -> Self {
        let file =
            std::fs::File::options().read(true).write(true).create_new(true).open(path).unwrap();
        Self(Rc::new(State {
            file,
            free: RefCell::new(vec![vec![0xee; BUFFER]; BUFFERS]),
            in_flight: Cell::new(0),
            most: Cell::new(0),
            written: Cell::new(0),
            synced_after: Cell::new(None),
            fails,
        }))
    }
}

impl LayerFile for Slow {
    type Chunk = Vec<u8>;

    fn reserve(&self) -> Pending<Vec<u8>> {
        let state = Rc::clone(&self.0);
        Box::pin(poll_fn(move |cx| match state.free.borrow_mut().pop() {
            Some(buffer) => Poll::Ready(Ok(buffer)),
            None => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        }))
    }

    fn allocate(&self, bytes: u64) -> Pending<()> {
        Box::pin(std::future::ready(self.0.file.set_len(bytes)))
    }

    fn write_at(&self, chunk: Vec<u8>, len: usize, offset: u64) -> Pending<()> {
        assert!(len.is_multiple_of(4096) && offset.is_multiple_of(4096) && len > 0);
        let state = Rc::clone(&self.0);
        let mut chunk = Some(chunk);
        // Earlier ones take longer, so that they end out of order.
        let mut polls = 1 + (offset / BUFFER as u64 * 7) % 11;
        let mut begun = false;
        Box::pin(poll_fn(move |cx| {
            if !begun {
                begun = true;
                state.in_flight.set(state.in_flight.get() + 1);
                state.most.set(state.most.get().max(state.in_flight.get()));
            }
            polls -= 1;
            if polls > 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let chunk = chunk.take().unwrap();
            let number = state.written.get();
            state.written.set(number + 1);
            state.in_flight.set(state.in_flight.get() - 1);
            let done = match state.fails {
                Some((at, errno)) if at == number => Err(io::Error::from_raw_os_error(errno)),
                _ => state.file.write_all_at(&chunk[..len], offset),
            };
            state.free.borrow_mut().push(chunk);
            Poll::Ready(done)
        }))
    }

    fn set_len(&self, bytes: u64) -> Pending<()> {
        Box::pin(std::future::ready(self.0.file.set_len(bytes)))
    }

    fn sync(&self) -> Pending<()> {
        assert_eq!(self.0.in_flight.get(), 0, "synced before all was written");
        self.0.synced_after.set(Some(self.0.written.get()));
        Box::pin(std::future::ready(self.0.file.sync_all()))
    }
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..100_000 {
        if let Poll::Ready(done) = future.as_mut().poll(&mut cx) {
            return done;
        }
    }
    panic!("it waits for something that does not come");
}

fn id() -> LayerId {
    "0123456789abcdefghij".parse().unwrap()
}

fn run(first: u32, count: u32) -> FrameRun {
    FrameRun::new(first, count).unwrap()
}

/// Frame `n` is full of `n`'s low byte, and starts with all of it.
fn page_of(frame: u32) -> [u8; 4096] {
    let mut page = [frame.to_le_bytes()[0]; 4096];
    page[..4].copy_from_slice(&frame.to_le_bytes());
    page
}

const FRAMES: u32 = 4096;

async fn write(file: Slow, runs: &[FrameRun]) -> crate::Result<LayerInfo> {
    let mut writer = PackedWriter::new(file, id(), FRAMES);
    let pages = runs.iter().map(|run| run.count()).sum();
    writer.allocate(pages, u32::try_from(runs.len()).unwrap()).await?;
    let mut cut: Vec<_> = groups(runs, u32::try_from(BUFFER / 4096).unwrap()).collect();
    // Whatever the order, but for the last one, which is not full.
    let last = cut.len() - 1;
    cut[..last].reverse();
    for group in cut {
        let mut chunk = writer.reserve().await?;
        let frames = group.iter().flat_map(|run| run.first()..run.end());
        for (page, frame) in chunk.chunks_exact_mut(4096).zip(frames) {
            page.copy_from_slice(&page_of(frame));
        }
        writer.push(&group, chunk).await?;
    }
    writer.finish().await
}

#[test]
fn many_writes_are_in_flight_and_all_are_done_before_the_sync() {
    let dir = TempDir::new();
    let path = dir.join(&id().file_name());
    let file = Slow::new(&path, None);
    let runs: Vec<FrameRun> = (0..90).map(|n| run(n * 40, 1 + n % 23)).collect();
    let info = wait(write(file.clone(), &runs)).unwrap();
    let state = &file.0;
    assert!(state.most.get() >= 3, "only {} at once", state.most.get());
    assert_eq!(state.free.borrow().len(), BUFFERS, "a buffer was lost");
    assert_eq!(state.synced_after.get(), Some(state.written.get()));
    let layer = Layer::open_in(dir.path(), &info).unwrap();
    layer.verify().unwrap();
    let frames: Vec<u32> =
        layer.table().extents().iter().flat_map(|e| e.run.first()..e.run.end()).collect();
    let expected: Vec<u32> = runs.iter().flat_map(|run| run.first()..run.end()).collect();
    assert_eq!(frames, expected);
    for extent in layer.table().extents() {
        for n in 0..extent.run.count() {
            let mut page = [0; 4096];
            let at = u64::from(extent.page + n) * 4096;
            layer.file().read_exact_at(&mut page, at).unwrap();
            assert!(page == page_of(extent.run.first() + n), "frame {}", extent.run.first() + n);
        }
    }
}

#[test]
fn a_failed_write_fails_the_layer_and_gives_every_buffer_back() {
    let dir = TempDir::new();
    let runs = [run(0, 1000)];
    let full = rustix::io::Errno::NOSPC.raw_os_error();
    // Write 0, 1, ... until all writes get through.
    for at in 0.. {
        let file = Slow::new(&dir.join(&at.to_string()), Some((at, full)));
        let done = wait(write(file.clone(), &runs));
        if file.0.written.get() <= at {
            done.unwrap();
            assert!(at > 30, "too few writes: {at}");
            return;
        }
        let error = done.unwrap_err();
        assert!(matches!(error, StorageError::NoSpace { .. }), "{error}");
        assert_eq!(file.0.synced_after.get(), None, "synced what is not whole");
    }
}

#[test]
fn a_file_that_was_made_too_long_is_cut() {
    let dir = TempDir::new();
    let path = dir.join(&id().file_name());
    let mut writer = PackedWriter::new(Slow::new(&path, None), id(), FRAMES);
    let info = wait(async {
        writer.allocate(1000, 4000).await?;
        let chunk = writer.reserve().await?;
        writer.push(&[run(7, 2)], chunk).await?;
        writer.finish().await
    });
    let info = info.unwrap();
    assert_eq!(info.file_bytes, (2 + 1 + 1) * 4096);
    Layer::open_in(dir.path(), &info).unwrap().verify().unwrap();
}

#[test]
fn pages_that_do_not_fit_are_refused() {
    let dir = TempDir::new();
    let refused = |name: &str, runs: &[&[FrameRun]]| {
        let mut writer = PackedWriter::new(Slow::new(&dir.join(name), None), id(), 64);
        let done = wait(async {
            for runs in runs {
                let chunk = writer.reserve().await?;
                writer.push(runs, chunk).await?;
            }
            writer.finish().await
        });
        assert!(matches!(done, Err(StorageError::Layer { .. })), "{name}: {done:?}");
    };
    refused("outside", &[&[run(60, 5)]]);
    refused("longer than the buffer", &[&[run(0, 33)]]);
    refused("twice", &[&[run(0, 2)], &[run(1, 2)]]);
    refused("more than there are", &[&[run(0, 32)], &[run(0, 32)], &[run(0, 32)]]);
}

#[test]
fn what_is_pushed_again_counts_the_last_time() {
    let dir = TempDir::new();
    let path = dir.join(&id().file_name());
    // Each round is the frames and the byte they are full of.
    let rounds: [&[(u32, u32, u8)]; 4] =
        [&[(0, 20, 1), (30, 10, 2)], &[], &[(5, 3, 3), (35, 10, 4)], &[(6, 1, 5), (60, 1, 6)]];
    let mut expected = [0u8; 64];
    let mut writer = PackedWriter::new(Slow::new(&path, None), id(), 64);
    let info = wait(async {
        for (number, round) in rounds.iter().enumerate() {
            if number > 0 {
                writer.begin_round();
            }
            for (first, count, byte) in *round {
                let mut chunk = writer.reserve().await?;
                chunk.fill(*byte);
                writer.push(&[run(*first, *count)], chunk).await?;
                expected[*first as usize..][..*count as usize].fill(*byte);
            }
        }
        writer.finish().await
    });
    let info = info.unwrap();
    assert_eq!(info.frames_held, 20 + 15 + 1);
    let layer = Layer::open_in(dir.path(), &info).unwrap();
    layer.verify().unwrap();
    assert_eq!(layer.table().data_pages(), 45, "what was hidden stays in the file");
    let mut found = [0u8; 64];
    for extent in layer.table().extents() {
        for n in 0..extent.run.count() {
            let at = (extent.run.first() + n) as usize;
            let page = u64::from(extent.page + n) * 4096;
            layer.file().read_exact_at(&mut found[at..=at], page).unwrap();
        }
    }
    assert_eq!(found, expected);

    let mut writer = PackedWriter::new(Slow::new(&dir.join("again"), None), id(), 64);
    for _ in 0..=ROUNDS_MAX {
        writer.begin_round();
    }
    assert!(matches!(wait(writer.finish()), Err(StorageError::Layer { .. })), "too many rounds");
}

#[test]
fn an_empty_layer_and_a_long_table_are_layers() {
    let dir = TempDir::new();
    let path = dir.join(&id().file_name());
    let file = Slow::new(&path, None);
    let info = wait(PackedWriter::new(file, id(), FRAMES).finish()).unwrap();
    assert_eq!(Layer::open_in(dir.path(), &info).unwrap().table().extents(), []);

    std::fs::remove_file(&path).unwrap();
    // The tables alone are longer than a buffer.
    let runs: Vec<FrameRun> = (0..10_000).map(|n| run(n * 2, 1)).collect();
    let file = Slow::new(&path, None);
    let mut writer = PackedWriter::new(file, id(), 20_000);
    let info = wait(async {
        for group in groups(&runs, 32) {
            let chunk = writer.reserve().await?;
            writer.push(&group, chunk).await?;
        }
        writer.finish().await
    });
    let layer = Layer::open_in(dir.path(), &info.unwrap()).unwrap();
    assert_eq!(layer.table().extents().len(), 10_000);
    layer.verify().unwrap();
}

#[test]
fn zeros_of_a_flat_layer_are_holes() {
    use std::os::unix::fs::MetadataExt;
    let dir = TempDir::new();
    let path = dir.join(&id().file_name());
    let mut writer = FlatWriter::new(Slow::new(&path, None), id(), FRAMES);
    let mut image = vec![0; FRAMES as usize * 4096];
    for frame in [0u32, 1, 9, 700, 2047] {
        image[frame as usize * 4096..][..4096].copy_from_slice(&page_of(frame | 1 << 20));
    }
    let info = wait(async {
        for part in image[..2048 * 4096].chunks(300 * 4096) {
            writer.push(part).await?;
        }
        writer.finish().await
    });
    let info = info.unwrap();
    assert_eq!(info.frames_held, 5);
    let layer = Layer::open_in(dir.path(), &info).unwrap();
    layer.verify().unwrap();
    let mut bytes = vec![1; image.len()];
    layer.file().read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == image);
    assert!(layer.file().metadata().unwrap().blocks() * 512 < 1 << 20, "the zeros were written");
}
