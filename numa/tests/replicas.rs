//! Replicas of files in sealed memory.
//!
//! Run by `cargo test`. Needs a temporary directory on a disk's file system.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::rc::Rc;
use std::time::Instant;

use common::on_one;
use mica_numa::arena::Mapping;
use mica_numa::io::{IO_BUF_BYTES, IoFile, Ring, RingConfig};
use mica_numa::memfd::{Extent, ReplicaError, extents, fill_sealed};
use mica_numa::{MemoryPolicy, rt};
use rustix::fs::{Mode, OFlags, SealFlags};

const MIB: u64 = IO_BUF_BYTES as u64;
/// Where copies lie.
const NEAR: (u32, MemoryPolicy) = (0, MemoryPolicy::Bind);

/// A file without a name, and the same open for direct I/O.
fn file_of(bytes: u64, parts: &[(u64, u64)]) -> (File, IoFile) {
    let dir = File::open(std::env::temp_dir()).unwrap();
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::openat(dir, ".", flags, Mode::RUSR | Mode::WUSR).unwrap();
    let file = File::from(file);
    file.set_len(bytes).unwrap();
    for (offset, length) in parts {
        let mut seed = *offset;
        let mut byte = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed.to_be_bytes()[0]
        };
        let part: Vec<u8> = (0..*length).map(|_| byte()).collect();
        file.write_all_at(&part, *offset).unwrap();
    }
    file.sync_all().unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let direct = rustix::fs::open(path, flags, Mode::empty()).unwrap();
    (file, IoFile::from(direct))
}

fn all_of(mut file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_replica_is_the_file_and_cannot_be_changed() {
    on_one(|| async {
        let ring = Ring::attach(RingConfig { buffers: 3 }).unwrap();
        let parts = [(4096, 3 * MIB), (6 * MIB + 8192, 4096), (9 * MIB - 4096, 4096)];
        let (file, direct) = file_of(9 * MIB, &parts);
        let found = extents(&file, 9 * MIB).unwrap();
        let sum: u64 = found.iter().map(|extent| extent.bytes).sum();
        assert!((3 * MIB + 8192..6 * MIB).contains(&sum), "{found:?}");
        let seen = Rc::new(RefCell::new(Vec::new()));
        let check = {
            let (seen, expected) = (Rc::clone(&seen), all_of(&file));
            move |offset: u64, bytes: &[u8]| {
                seen.borrow_mut().push(Extent { offset, bytes: bytes.len() as u64 });
                let at = usize::try_from(offset).unwrap();
                expected[at..at + bytes.len()] == *bytes
            }
        };
        let replica = fill_sealed(&ring, &direct, 9 * MIB, &found, NEAR, check).await.unwrap();
        let seen: u64 = seen.borrow().iter().map(|extent| extent.bytes).sum();
        assert_eq!(seen, sum);
        let replica = File::from(replica);
        assert!(all_of(&replica) == all_of(&file));
        assert_eq!(replica.metadata().unwrap().blocks() * 512, sum, "holes stay holes");

        let seals = rustix::fs::fcntl_get_seals(&replica).unwrap();
        let wanted = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        assert!(seals.contains(wanted));
        let refused = (&replica).write(b"x").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
        assert!(replica.set_len(0).is_err());
        assert!(Mapping::shared(&replica, MIB).is_err());
        let private = Mapping::private(&replica, 9 * MIB).unwrap();
        private.write(0, b"mine").unwrap();
        assert_eq!(all_of(&replica)[..4], [0; 4]);
        assert_eq!(ring.free_buffers(), 3);
        ring.close().await;
    });
}

#[test]
fn damage_and_impossible_shapes_are_errors_and_leave_nothing() {
    on_one(|| async {
        let ring = Ring::attach(RingConfig { buffers: 2 }).unwrap();
        let (file, direct) = file_of(8 * MIB, &[(0, 8 * MIB)]);
        let all = extents(&file, 8 * MIB).unwrap();
        let fill = |bytes, extents: Vec<Extent>, bad: Option<u64>| {
            let (ring, direct) = (Rc::clone(&ring), direct.clone());
            async move {
                let check = move |offset, _: &[u8]| Some(offset) != bad;
                fill_sealed(&ring, &direct, bytes, &extents, NEAR, check).await
            }
        };
        let damaged = fill(8 * MIB, all.clone(), Some(5 * MIB)).await;
        assert!(matches!(damaged, Err(ReplicaError::Damaged { offset }) if offset == 5 * MIB));
        for bytes in [0, 8 * MIB - 1, 8 * MIB - 4096] {
            assert!(matches!(fill(bytes, all.clone(), None).await, Err(ReplicaError::Shape)));
        }
        // The file is shorter than it was said to be.
        let longer = vec![Extent { offset: 7 * MIB, bytes: 2 * MIB }];
        let short = fill(9 * MIB, longer, None).await;
        assert!(
            matches!(&short, Err(ReplicaError::Copy { source, .. })
                if source.kind() == ErrorKind::UnexpectedEof),
            "{short:?}"
        );
        assert_eq!(ring.free_buffers(), 2);
        ring.close().await;
    });
}

#[test]
fn a_copy_that_nobody_waits_for_stops() {
    on_one(|| async {
        let ring = Ring::attach(RingConfig { buffers: 1 }).unwrap();
        let (file, direct) = file_of(16 * MIB, &[(0, 16 * MIB)]);
        let all = extents(&file, 16 * MIB).unwrap();
        let pieces = Rc::new(Cell::new(0));
        let count = Rc::clone(&pieces);
        let check = move |_, _: &[u8]| {
            count.set(count.get() + 1);
            true
        };
        let task = {
            let ring = Rc::clone(&ring);
            rt::spawn(async move { fill_sealed(&ring, &direct, 16 * MIB, &all, NEAR, check).await })
        };
        while pieces.get() == 0 {
            rt::yield_now().await;
        }
        task.end().await;
        // Its tasks hold the count until they have ended.
        while Rc::strong_count(&pieces) > 1 {
            rt::yield_now().await;
        }
        assert!(pieces.get() < 16, "{}", pieces.get());
        assert_eq!(ring.free_buffers(), 1);
        ring.close().await;
    });
}

/// What a replica costs, printed, beside a plain copy by the thread itself.
#[test]
fn figures_of_a_replica() {
    on_one(|| async {
        const BYTES: u64 = 64 * MIB;
        let ring = Ring::attach(RingConfig { buffers: 16 }).unwrap();
        let (file, direct) = file_of(BYTES, &[(0, BYTES)]);
        let all = extents(&file, BYTES).unwrap();
        let begun = Instant::now();
        let fill = fill_sealed(&ring, &direct, BYTES, &all, NEAR, |_, _| true);
        let replica = fill.await.unwrap();
        let ours = begun.elapsed();
        let begun = Instant::now();
        let plain = copied_by_hand(direct.as_fd().try_clone_to_owned().unwrap(), BYTES);
        let plain_time = begun.elapsed();
        assert!(all_of(&File::from(replica)) == all_of(&plain));
        println!("replica of 64 MiB {ours:?}, by read and write in turn {plain_time:?}");
        ring.close().await;
    });
}

fn copied_by_hand(from: OwnedFd, bytes: u64) -> File {
    let from = File::from(from);
    let to = rustix::fs::memfd_create("plain", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let to = File::from(to);
    // Aligned, as direct I/O wants it.
    let mut room = vec![0u8; 2 * IO_BUF_BYTES];
    let skip = room.as_ptr().align_offset(4096);
    let piece = &mut room[skip..skip + IO_BUF_BYTES];
    for offset in (0..bytes).step_by(IO_BUF_BYTES) {
        from.read_exact_at(piece, offset).unwrap();
        to.write_all_at(piece, offset).unwrap();
    }
    to
}

#[test]
fn memory_that_is_bound_to_a_node_is_on_it_or_is_not_there() {
    if !std::fs::exists("/proc/self/numa_maps").unwrap() {
        // A kernel without nodes has no wrong one.
        return;
    }
    on_one(|| async {
        let ring = Ring::attach(RingConfig { buffers: 3 }).unwrap();
        let (file, direct) = file_of(MIB, &[(0, MIB)]);
        let all = extents(&file, MIB).unwrap();
        // No machine has so many nodes.
        let fill = |policy| fill_sealed(&ring, &direct, MIB, &all, (1000, policy), |_, _| true);
        let refused = fill(MemoryPolicy::Bind).await;
        assert!(matches!(refused, Err(ReplicaError::Memory { .. })), "{refused:?}");
        assert!(fill(MemoryPolicy::Preferred).await.is_ok(), "it is only preferred");
        ring.close().await;
    });
}
