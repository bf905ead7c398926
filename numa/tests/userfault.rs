//! On-demand memory: faults of other threads are answered with a source's pages.
//!
//! Run by `cargo test`. Memory of this process plays the guest, touched by threads of its own. Needs
//! userfaultfd, and Linux 6.7 for write tracking.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;

use common::on_one;
use mica_numa::arena::Mapping;
use mica_numa::io::{IoBuf, Ring, RingConfig};
use mica_numa::process::{Process, RemoteMemory, Wanted};
use mica_numa::rt::{self, time};
use mica_numa::userfault::{Content, NEIGHBOURS, PageSource, Pager, Userfault};
use mica_units::FrameRun;

const PAGE: u64 = 4096;
// Not a multiple of the neighbourhood, so that the last one is short.
const FRAMES: u32 = 8 * NEIGHBOURS + 5;
const PATIENCE: Duration = Duration::from_secs(20);

/// A frame is full of its number; the third neighbourhood is zeroes.
fn byte_of(frame: u32) -> u8 {
    if frame / NEIGHBOURS == 3 { 0 } else { u8::try_from(frame).unwrap() }
}

#[derive(Default)]
struct Numbers {
    fills: RefCell<BTreeMap<u32, u32>>,
    at_once: Cell<u32>,
    most_at_once: Cell<u32>,
    fail_at: Cell<Option<u32>>,
}

impl PageSource for Numbers {
    async fn fill(&self, run: FrameRun, mut buffer: IoBuf) -> (IoBuf, io::Result<Content>) {
        assert!(buffer.is_empty() && run.first().is_multiple_of(NEIGHBOURS));
        assert!(run.count() == NEIGHBOURS || run.end() == FRAMES);
        *self.fills.borrow_mut().entry(run.first() / NEIGHBOURS).or_default() += 1;
        self.at_once.set(self.at_once.get() + 1);
        self.most_at_once.set(self.most_at_once.get().max(self.at_once.get()));
        time::sleep(Duration::from_millis(2)).await;
        self.at_once.set(self.at_once.get() - 1);
        if self.fail_at.get() == Some(run.first()) {
            return (buffer, Err(io::ErrorKind::NotFound.into()));
        }
        if run.first() / NEIGHBOURS == 3 {
            return (buffer, Ok(Content::Zeroes));
        }
        for frame in run.first()..run.end() {
            buffer.put(&[byte_of(frame); 4096]);
        }
        (buffer, Ok(Content::Bytes))
    }
}

struct Setup {
    mapping: Mapping,
    memory: RemoteMemory,
    ring: Rc<Ring>,
    numbers: Rc<Numbers>,
    pager: Rc<Pager<Rc<Numbers>>>,
    /// The pager's, once more.
    userfault: Userfault,
}

fn set_up(track: bool) -> Setup {
    let mapping = Mapping::anonymous(u64::from(FRAMES) * PAGE).unwrap();
    let memory = RemoteMemory::new(mapping.address(), FRAMES).unwrap();
    let fd = Userfault::create().unwrap();
    let userfault = Userfault::new(fd.try_clone().unwrap(), memory).unwrap();
    userfault.catch_missing(memory.all().unwrap(), track).unwrap();
    let ring = Ring::attach(RingConfig { buffers: 4 }).unwrap();
    let numbers = Rc::new(Numbers::default());
    let fd = Userfault::new(fd, memory).unwrap();
    let pager = Pager::new(fd, Rc::clone(&numbers), Rc::clone(&ring), track);
    Setup { mapping, memory, ring, numbers, pager, userfault }
}

/// Reads the first byte of frames on a thread of its own, and gives the memory back with them.
fn toucher(mapping: Mapping, frames: Vec<u32>) -> JoinHandle<(Mapping, Vec<u8>)> {
    std::thread::spawn(move || {
        let read = |frame: &u32| {
            let mut byte = [0xff];
            mapping.read(u64::from(*frame) * PAGE + 77, &mut byte).unwrap();
            byte[0]
        };
        let seen = frames.iter().map(read).collect();
        (mapping, seen)
    })
}

async fn joined<T: Send + 'static>(thread: JoinHandle<T>) -> T {
    let work = rt::blocking(move || thread.join().unwrap());
    time::timeout(PATIENCE, work).await.expect("a thread still waits for a page").unwrap()
}

fn served(pager: &Rc<Pager<Rc<Numbers>>>) -> rt::Task<io::Result<()>> {
    let pager = Rc::clone(pager);
    rt::spawn(async move { pager.serve().await })
}

#[test]
fn faults_are_answered_by_neighbourhoods_each_once() {
    on_one(|| async {
        let Setup { mapping, ring, numbers, pager, .. } = set_up(false);
        let server = served(&pager);
        // The same frames and others of their neighbourhoods, and the last of the memory.
        let wanted = vec![5, 6, 5, 40, FRAMES - 1, 0, 50];
        let (mapping, seen) = joined(toucher(mapping, wanted.clone())).await;
        assert_eq!(seen, wanted.iter().map(|frame| byte_of(*frame)).collect::<Vec<_>>());
        let fills: Vec<_> = numbers.fills.borrow().clone().into_iter().collect();
        assert_eq!(fills, [(0, 1), (2, 1), (3, 1), (FRAMES / NEIGHBOURS, 1)]);
        assert!(pager.is_there(1) && pager.is_there(FRAMES - 3) && !pager.is_there(NEIGHBOURS));

        // What the guest discards afterwards is zero, and does not come from the source again.
        mapping.discard(5 * PAGE, PAGE).unwrap();
        let (mapping, seen) = joined(toucher(mapping, vec![5, 6])).await;
        assert_eq!(seen, [0, byte_of(6)]);
        assert_eq!(numbers.fills.borrow().get(&0), Some(&1));
        server.end().await;
        drop(mapping);
        ring.close().await;
    });
}

#[test]
fn faults_and_a_prefetch_that_meet_bring_everything_in_once() {
    on_one(|| async {
        let Setup { mapping, memory, ring, numbers, pager, .. } = set_up(false);
        let server = served(&pager);
        let own = Process::open(rustix::process::getpid()).unwrap();
        let prefetch = rt::spawn({
            let (pager, all) = (Rc::clone(&pager), memory.all().unwrap());
            async move { pager.prefetch(&[all]).await }
        });
        let touching = toucher(mapping, (0..FRAMES).rev().collect());
        prefetch.join().await.unwrap().unwrap();
        let (mapping, seen) = joined(touching).await;
        assert_eq!(seen, (0..FRAMES).rev().map(byte_of).collect::<Vec<_>>());
        assert!(numbers.fills.borrow().values().all(|times| *times == 1));
        assert_eq!(numbers.fills.borrow().len(), FRAMES.div_ceil(NEIGHBOURS) as usize);
        assert!((2..=4).contains(&numbers.most_at_once.get()), "as many as there are buffers");
        // Nothing was protected, so nothing can be told apart from what was written.
        let dirty = own.pagemap().unwrap().scan_all(memory, Wanted::Anonymous).await.unwrap();
        let zeroes = u64::from(NEIGHBOURS);
        let count: u64 = dirty.iter().map(|run| u64::from(run.count())).sum();
        assert_eq!(count, u64::from(FRAMES) - zeroes);
        server.end().await;
        drop(mapping);
        ring.close().await;
    });
}

#[test]
fn pages_that_were_brought_in_do_not_count_as_written() {
    on_one(|| async {
        let Setup { mapping, memory, ring, pager, .. } = set_up(true);
        let server = served(&pager);
        pager.prefetch(&[memory.all().unwrap()]).await.unwrap();
        let (mapping, seen) = joined(toucher(mapping, vec![1, 20, 50, 100])).await;
        assert_eq!(seen, [1, 20, 0, 100]);
        let pagemap = Process::open(rustix::process::getpid()).unwrap().pagemap().unwrap();
        let written = Wanted::AnonymousWritten { rearm: true };
        assert_eq!(pagemap.scan_all(memory, written).await.unwrap(), []);
        // One that was brought in, and one that is the zero page.
        let writer = std::thread::spawn(move || {
            for frame in [20, 50] {
                mapping.write(frame * PAGE, b"x").unwrap();
            }
            mapping
        });
        let mapping = joined(writer).await;
        let runs = pagemap.scan_all(memory, written).await.unwrap();
        let found: Vec<_> = runs.iter().map(|run| (run.first(), run.count())).collect();
        assert_eq!(found, [(20, 1), (50, 1)]);
        server.end().await;
        drop(mapping);
        ring.close().await;
    });
}

#[test]
fn a_source_that_fails_ends_the_service_with_its_error() {
    on_one(|| async {
        let Setup { mapping, memory, ring, numbers, pager, userfault } = set_up(false);
        numbers.fail_at.set(Some(2 * NEIGHBOURS));
        let server = served(&pager);
        let touching = toucher(mapping, vec![2 * NEIGHBOURS + 1]);
        let ended = time::timeout(PATIENCE, server.join()).await.unwrap().unwrap();
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!pager.is_there(2 * NEIGHBOURS) && !touching.is_finished());
        // It can be asked again, and then the thread goes on.
        numbers.fail_at.set(None);
        pager.prefetch(&[FrameRun::new(2 * NEIGHBOURS, 1).unwrap()]).await.unwrap();
        let (mapping, seen) = joined(touching).await;
        assert_eq!(seen, [byte_of(2 * NEIGHBOURS + 1)]);
        // Memory that is not registered any more has nobody to serve, and that is no error. (Not tried
        // by unmapping it: another test's memory could come to lie there.)
        userfault.release(memory.all().unwrap()).unwrap();
        pager.prefetch(&[memory.all().unwrap()]).await.unwrap();
        assert_eq!((numbers.at_once.get(), ring.free_buffers()), (0, 4));
        drop(mapping);
        ring.close().await;
    });
}

#[test]
fn frames_outside_of_the_memory_are_refused() {
    let mapping = Mapping::anonymous(4 * PAGE).unwrap();
    let memory = RemoteMemory::new(mapping.address(), 4).unwrap();
    let userfault = Userfault::new(Userfault::create().unwrap(), memory).unwrap();
    let outside = FrameRun::new(3, 2).unwrap();
    for refused in [
        userfault.track(outside),
        userfault.catch_missing(outside, false),
        userfault.release(outside),
    ] {
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    userfault.catch_missing(memory.all().unwrap(), false).unwrap();
    userfault.release(memory.all().unwrap()).unwrap();
    // Nobody is asked any more.
    let mut byte = [1];
    mapping.read(0, &mut byte).unwrap();
    assert_eq!(byte, [0]);
}
