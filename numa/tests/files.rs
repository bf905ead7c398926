//! The ring for files, on real files: direct I/O, many at a time, dropped half way, a full disk, and
//! one tenant's bytes never in another's file.
//!
//! Run by `cargo test`. Needs a temporary directory on a disk's file system, and root for a small
//! tmpfs that nobody else sees.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use std::fs::File;
use std::future::Future;
use std::io::{ErrorKind, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use common::on_one;
use mica_numa::io::{IO_BUF_BYTES, IoBuf, IoFile, OPERATIONS_MAX, Ring, RingConfig};
use mica_numa::rt;
use proptest::prelude::*;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

const BLOCK: usize = 4096;

fn ring(buffers: u16) -> Rc<Ring> {
    Ring::attach(RingConfig { buffers }).unwrap()
}

/// A file without a name in `dir`, open for direct I/O.
fn file_in(dir: impl AsFd) -> File {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    File::from(rustix::fs::openat(dir, ".", flags, Mode::RUSR | Mode::WUSR).unwrap())
}

/// A file without a name on the disk, and a second descriptor of it to look at it with.
fn file() -> (IoFile, File) {
    let file = file_in(File::open(std::env::temp_dir()).unwrap());
    let look = file.try_clone().unwrap();
    (IoFile::from(file), look)
}

/// All of a file that is open for direct I/O.
fn contents(file: &File) -> Vec<u8> {
    let flags = rustix::fs::fcntl_getfl(file).unwrap();
    rustix::fs::fcntl_setfl(file, flags - OFlags::DIRECT).unwrap();
    let mut bytes = Vec::new();
    let mut file = file;
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    rustix::fs::fcntl_setfl(file, flags).unwrap();
    bytes
}

fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|at| seed.wrapping_add(at.to_le_bytes()[0]) ^ at.to_le_bytes()[1]).collect()
}

/// Descriptors of this process that are this file. Other tests' files are not counted.
fn descriptors_of(file: &File) -> usize {
    let same = |number: &std::fs::DirEntry| {
        let of = file.metadata().unwrap();
        // Another test may have closed it meanwhile.
        number.path().metadata().is_ok_and(|it| (it.dev(), it.ino()) == (of.dev(), of.ino()))
    };
    std::fs::read_dir("/proc/self/fd").unwrap().flatten().filter(same).count()
}

/// Polls once, and never again.
fn poll_once<F: Future>(future: F) -> bool {
    let mut cx = Context::from_waker(Waker::noop());
    matches!(pin!(future).poll(&mut cx), Poll::Ready(_))
}

#[test]
fn bytes_go_to_the_file_and_come_back() {
    on_one(|| async {
        let ring = ring(2);
        let (file, look) = file();
        let mut buffer = ring.buffer().await;
        let bytes = pattern(3, IO_BUF_BYTES);
        assert_eq!(buffer.put(&bytes), IO_BUF_BYTES);
        ring.allocate(&file, 0, 4 * IO_BUF_BYTES as u64).await.unwrap();
        let (buffer, wrote) = ring.write_all_at(&file, buffer, IO_BUF_BYTES, BLOCK as u64).await;
        wrote.unwrap();
        assert_eq!(buffer.bytes(), bytes, "the buffer is as it was");
        ring.sync(&file, true).await.unwrap();
        ring.sync(&file, false).await.unwrap();
        assert_eq!(look.metadata().unwrap().len(), 4 * IO_BUF_BYTES as u64);
        assert_eq!(contents(&look)[BLOCK..BLOCK + IO_BUF_BYTES], bytes);

        // Two reads, one behind the other.
        let mut buffer = ring.buffer().await;
        for (offset, length) in [(BLOCK, 2 * BLOCK), (4 * BLOCK, BLOCK)] {
            let (back, read) = ring.read_exact_at(&file, buffer, length, offset as u64).await;
            read.unwrap();
            buffer = back;
        }
        assert_eq!(buffer.bytes()[..2 * BLOCK], bytes[..2 * BLOCK]);
        assert_eq!(buffer.bytes()[2 * BLOCK..], bytes[3 * BLOCK..4 * BLOCK]);
        ring.close().await;
    });
}

#[test]
fn a_read_stops_at_the_end_of_the_file_and_a_long_one_is_refused() {
    on_one(|| async {
        let ring = ring(1);
        let (file, look) = file();
        rustix::fs::ftruncate(&look, 2 * BLOCK as u64 + 100).unwrap();
        let buffer = ring.buffer().await;
        let (buffer, read) = ring.read_at(&file, buffer, IO_BUF_BYTES, BLOCK as u64).await;
        assert_eq!((read.unwrap(), buffer.len()), (BLOCK + 100, BLOCK + 100));
        let (mut buffer, read) = ring.read_at(&file, buffer, BLOCK, 1 << 30).await;
        // Behind the end, and the buffer's length is no multiple of a block: either is an answer.
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        buffer.clear();
        let (buffer, read) = ring.read_exact_at(&file, buffer, 4 * BLOCK, 0).await;
        assert_eq!(read.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(buffer.len(), 2 * BLOCK + 100);
        let (buffer, read) = ring.read_exact_at(&file, buffer, IO_BUF_BYTES, 0).await;
        assert_eq!(read.unwrap_err().kind(), ErrorKind::InvalidInput);
        let (buffer, wrote) = ring.write_at(&file, buffer, IO_BUF_BYTES + 1, 0).await;
        assert_eq!(wrote.unwrap_err().kind(), ErrorKind::InvalidInput);
        drop(buffer);
        assert_eq!(ring.free_buffers(), 1);
        ring.close().await;
    });
}

#[test]
fn what_a_write_needs_beyond_the_bytes_is_zero() {
    on_one(|| async {
        let ring = ring(1);
        let (first, _) = file();
        let mut secret = ring.buffer().await;
        secret.put(&vec![0x5e; IO_BUF_BYTES]);
        let (secret, wrote) = ring.write_at(&first, secret, IO_BUF_BYTES, 0).await;
        assert_eq!(wrote.unwrap(), IO_BUF_BYTES);
        drop(secret);

        let (second, look) = file();
        let mut buffer = ring.buffer().await;
        buffer.put(b"mine");
        let (buffer, wrote) = ring.write_all_at(&second, buffer, 3 * BLOCK, 0).await;
        wrote.unwrap();
        assert_eq!(buffer.len(), 3 * BLOCK);
        let found = contents(&look);
        assert_eq!(found[..4], *b"mine");
        assert_eq!((found.len(), found[4..].iter().max()), (3 * BLOCK, Some(&0)));
        drop(buffer);
        ring.close().await;
    });
}

/// What a tenant may do with a buffer.
#[derive(Clone, Debug)]
enum Step {
    Put(usize),
    Zero(usize),
    Truncate(usize),
    Read { blocks: usize, from: usize },
    Write { blocks: usize },
    Renew,
}

fn step() -> impl Strategy<Value = Step> {
    let length = 0..4 * BLOCK;
    prop_oneof![
        length.clone().prop_map(Step::Put),
        length.clone().prop_map(Step::Zero),
        length.prop_map(Step::Truncate),
        (0..5usize, 0..5usize).prop_map(|(blocks, from)| Step::Read { blocks, from }),
        (1..5usize).prop_map(|blocks| Step::Write { blocks }),
        Just(Step::Renew),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Two tenants share one buffer. Each has a file of its own that holds its own letter, writes only
    /// its letter, and must find nothing but its letter and zeroes.
    #[test]
    fn no_byte_of_one_tenant_reaches_another(
        steps in proptest::collection::vec((0..2usize, step()), 1..24),
    ) {
        let clean = on_one(move || {
            let steps = steps.clone();
            async move { two_tenants(&steps).await }
        });
        prop_assert_eq!(clean, Ok(()));
    }
}

async fn two_tenants(steps: &[(usize, Step)]) -> Result<(), String> {
    let ring = ring(1);
    let letters = [b'A', b'B'];
    let files = [file(), file()];
    for ((_, look), letter) in files.iter().zip(letters) {
        let plain = rustix::fs::fcntl_getfl(look).unwrap();
        rustix::fs::fcntl_setfl(look, plain - OFlags::DIRECT).unwrap();
        look.write_all_at(&vec![letter; 6 * BLOCK], 0).unwrap();
        look.sync_all().unwrap();
    }
    let mut turn = 0;
    let mut buffer = ring.buffer().await;
    for (tenant, step) in steps {
        if *tenant != turn {
            turn = *tenant;
            drop(buffer);
            buffer = ring.buffer().await;
        }
        let (letter, (file, _)) = (letters[turn], &files[turn]);
        buffer = one_step(&ring, buffer, file, letter, step).await;
        if buffer.bytes().iter().any(|byte| *byte != letter && *byte != 0) {
            return Err(format!("{step:?} showed another's bytes"));
        }
    }
    drop(buffer);
    for ((_, look), letter) in files.iter().zip(letters) {
        if contents(look).iter().any(|byte| *byte != letter && *byte != 0) {
            return Err(format!("another's bytes in the file of {}", char::from(letter)));
        }
    }
    ring.close().await;
    Ok(())
}

async fn one_step(ring: &Ring, mut buffer: IoBuf, file: &IoFile, letter: u8, step: &Step) -> IoBuf {
    match *step {
        Step::Put(length) => {
            buffer.put(&vec![letter; length]);
        }
        Step::Zero(length) => buffer.zero_to(length),
        Step::Truncate(length) => buffer.truncate(length),
        Step::Renew => {
            drop(buffer);
            buffer = ring.buffer().await;
        }
        Step::Read { blocks, from } => {
            (buffer, _) = ring.read_at(file, buffer, blocks * BLOCK, (from * BLOCK) as u64).await;
        }
        Step::Write { blocks } => {
            (buffer, _) = ring.write_at(file, buffer, blocks * BLOCK, 0).await;
        }
    }
    buffer
}

#[test]
fn many_operations_share_few_buffers() {
    const PIECES: usize = 64;
    on_one(|| async {
        let ring = ring(4);
        let (file, look) = file();
        let tasks: Vec<_> = (0..PIECES)
            .map(|piece| {
                let (ring, file) = (Rc::clone(&ring), file.clone());
                rt::spawn(async move {
                    let seed = u8::try_from(piece).unwrap();
                    let mut buffer = ring.buffer().await;
                    buffer.put(&pattern(seed, 2 * BLOCK));
                    let offset = (piece * 2 * BLOCK) as u64;
                    let (mut buffer, wrote) =
                        ring.write_all_at(&file, buffer, 2 * BLOCK, offset).await;
                    wrote.unwrap();
                    buffer.clear();
                    let (buffer, read) = ring.read_exact_at(&file, buffer, 2 * BLOCK, offset).await;
                    read.unwrap();
                    assert_eq!(buffer.bytes(), pattern(seed, 2 * BLOCK));
                })
            })
            .collect();
        for task in tasks {
            task.join().await.unwrap();
        }
        let found = contents(&look);
        for (piece, bytes) in found.chunks(2 * BLOCK).enumerate() {
            assert_eq!(bytes, pattern(u8::try_from(piece).unwrap(), 2 * BLOCK));
        }
        assert_eq!((found.len(), ring.free_buffers()), (PIECES * 2 * BLOCK, 4));
        ring.close().await;
    });
}

/// The number of a descriptor that is closed while an operation waits can come back as another file.
#[test]
fn a_dropped_operation_goes_on_with_the_file_it_had() {
    on_one(|| async {
        let ring = ring(1);
        let (file, look) = file();
        let mut buffer = ring.buffer().await;
        buffer.put(&[0x77; BLOCK]);
        // Polled once: queued, and not yet submitted.
        assert!(!poll_once(ring.write_at(&file, buffer, BLOCK, 0)));
        assert_eq!((ring.unfinished(), ring.free_buffers()), (1, 0));
        drop(file);
        assert_eq!(descriptors_of(&look), 2, "the operation has one");
        let (_other, other_look) = self::file();
        let buffer = ring.buffer().await;
        assert_eq!((buffer.len(), ring.unfinished()), (0, 0));
        assert_eq!(contents(&look), [0x77; BLOCK]);
        assert_eq!(contents(&other_look), []);
        assert_eq!(descriptors_of(&look), 1, "the operation closed it when it ended");
        drop(buffer);
        ring.close().await;
    });
}

#[test]
fn a_ring_that_closes_or_is_dropped_lets_its_operations_end() {
    on_one(|| async {
        for how in ["close", "drop"] {
            let ring = ring(8);
            let (file, look) = file();
            for piece in 0..8u8 {
                let mut buffer = ring.buffer().await;
                buffer.put(&vec![piece + 1; IO_BUF_BYTES]);
                let offset = u64::from(piece) * IO_BUF_BYTES as u64;
                assert!(!poll_once(ring.write_at(&file, buffer, IO_BUF_BYTES, offset)));
            }
            if how == "close" {
                ring.close().await;
            } else {
                // Its turn, so that the kernel has them.
                rt::yield_now().await;
                drop(ring);
            }
            let found = contents(&look);
            let pieces = found.chunks(IO_BUF_BYTES).zip(1u8..);
            assert!(pieces.clone().all(|(piece, fill)| piece.iter().all(|byte| *byte == fill)));
            assert_eq!(pieces.count(), 8, "{how}");
            drop(file);
            assert_eq!(descriptors_of(&look), 1, "{how}");
        }
    });
}

#[test]
fn more_operations_than_may_wait_are_an_error() {
    on_one(|| async {
        let ring = ring(1);
        let (file, _) = file();
        for _ in 0..OPERATIONS_MAX {
            assert!(!poll_once(ring.sync(&file, true)));
        }
        assert_eq!(ring.sync(&file, true).await.unwrap_err().kind(), ErrorKind::ResourceBusy);
        let buffer = ring.buffer().await;
        let (buffer, wrote) = ring.write_at(&file, buffer, BLOCK, 0).await;
        assert_eq!(wrote.unwrap_err().kind(), ErrorKind::ResourceBusy);
        drop(buffer);
        while ring.unfinished() > 0 {
            rt::yield_now().await;
        }
        ring.sync(&file, true).await.unwrap();
        ring.close().await;
    });
}

/// A tmpfs of `bytes`, mounted nowhere.
fn small_disk(bytes: usize) -> OwnedFd {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    rustix::mount::fsconfig_set_string(context.as_fd(), "size", bytes.to_string()).unwrap();
    rustix::mount::fsconfig_create(context.as_fd()).unwrap();
    let (flags, attributes) = (FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
    rustix::mount::fsmount(context.as_fd(), flags, attributes).unwrap()
}

#[test]
fn a_full_disk_is_an_error_and_harms_nothing_else() {
    on_one(|| async {
        let ring = ring(2);
        let disk = small_disk(IO_BUF_BYTES + 4 * BLOCK);
        let full = file_in(&disk);
        let look = full.try_clone().unwrap();
        let full = IoFile::from(full);
        let mut buffer = ring.buffer().await;
        buffer.put(&vec![1; IO_BUF_BYTES]);
        let (buffer, wrote) = ring.write_all_at(&full, buffer, IO_BUF_BYTES, 0).await;
        wrote.unwrap();
        // Four blocks fit, and the rest does not: a short write, then the error.
        let at = IO_BUF_BYTES as u64;
        let (buffer, wrote) = ring.write_all_at(&full, buffer, 8 * BLOCK, at).await;
        assert_eq!(wrote.unwrap_err().kind(), ErrorKind::StorageFull);
        assert_eq!(contents(&look), vec![1; IO_BUF_BYTES + 4 * BLOCK]);
        let more = ring.allocate(&full, 0, 4 * at).await;
        assert_eq!(more.unwrap_err().kind(), ErrorKind::StorageFull);
        let (file, _) = file();
        let (buffer, wrote) = ring.write_all_at(&file, buffer, IO_BUF_BYTES, 0).await;
        wrote.unwrap();
        drop(buffer);
        assert_eq!(ring.free_buffers(), 2);
        ring.close().await;
    });
}

#[test]
fn directories_can_be_synced_and_errors_are_the_kernels() {
    on_one(|| async {
        let ring = ring(1);
        let dir = IoFile::from(File::open(std::env::temp_dir()).unwrap());
        ring.sync(&dir, false).await.unwrap();
        let buffer = ring.buffer().await;
        let (buffer, read) = ring.read_at(&dir, buffer, BLOCK, 0).await;
        assert_eq!(read.unwrap_err().kind(), ErrorKind::IsADirectory);
        let (file, _) = file();
        // Direct I/O at an odd place.
        let (buffer, wrote) = ring.write_all_at(&file, buffer, BLOCK, 7).await;
        assert_eq!(wrote.unwrap_err().kind(), ErrorKind::InvalidInput);
        drop(buffer);
        ring.close().await;
    });
}
