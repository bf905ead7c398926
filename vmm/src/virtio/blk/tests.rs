//! Tests of the disk: good requests, bad ones, and guests that let go in the middle.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use proptest::prelude::*;

use super::{Blk, BlkError};
use crate::virtio::driver::{BUFFERS, Driver, MEMORY_BYTES};
use crate::virtio::{DeviceError, DeviceLoop, Gate, Rule};

const DISK_BYTES: usize = 1 << 20;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 16;
const DATA: u64 = BUFFERS + 0x1000;

/// A file without a name, with byte `n` of sector `s` equal to `s + n`.
fn disk() -> File {
    let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(contents()).unwrap();
    file
}

fn contents() -> &'static [u8] {
    static CONTENTS: OnceLock<Vec<u8>> = OnceLock::new();
    CONTENTS.get_or_init(|| {
        (0..DISK_BYTES).map(|at| u8::try_from((at / 512 + at % 512) % 251).unwrap()).collect()
    })
}

fn driver(file: &File, read_only: bool) -> Driver {
    Driver::started(Box::new(Blk::of_file(file.try_clone().unwrap(), read_only).unwrap()))
}

fn header(driver: &Driver, at: u64, operation: u32, sector: u64) {
    driver.put(at, operation);
    driver.put(at + 4, 0u32);
    driver.put(at + 8, sector);
}

/// Waits for the next answer: the ring works in its own time.
fn answer(driver: &mut Driver) -> (u16, u32) {
    let begun = std::time::Instant::now();
    while begun.elapsed() < std::time::Duration::from_secs(20) {
        driver.run().unwrap();
        if let Some(used) = driver.take_used(0) {
            return used;
        }
        std::thread::yield_now();
    }
    panic!("no answer");
}

/// One request with one data buffer: (status, used length).
fn request(driver: &mut Driver, operation: u32, sector: u64, data: (u64, u32)) -> (u8, u32) {
    header(driver, HEADER, operation, sector);
    driver.put(STATUS, 0xffu8);
    if operation == 1 {
        driver.add(0, &[(HEADER, 16), data], &[(STATUS, 1)]);
    } else {
        driver.add(0, &[(HEADER, 16)], &[data, (STATUS, 1)]);
    }
    driver.kick(0);
    let (_, length) = answer(driver);
    (driver.bytes(STATUS, 1)[0], length)
}

#[test]
fn the_configuration_says_how_large_the_disk_is() {
    let driver = driver(&disk(), false);
    let mut space = [0; 24];
    driver.device.read(0x100, &mut space);
    assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), 2048);
    assert_eq!(u32::from_le_bytes(space[12..16].try_into().unwrap()), 126);
    assert_eq!(u32::from_le_bytes(space[20..].try_into().unwrap()), 512);
    let mut past = [9; 8];
    driver.device.read(0x1fc, &mut past);
    assert_eq!(past, [0; 8]);
    assert_eq!(driver.offered() & (1 << 5), 0, "not read-only");
}

#[test]
fn reads_writes_and_flushes_reach_the_file() {
    let mut file = disk();
    let mut driver = driver(&file, false);
    assert_eq!(request(&mut driver, 0, 3, (DATA, 1024)), (0, 1025));
    assert_eq!(driver.bytes(DATA, 1024), contents()[1536..2560]);

    let new: Vec<u8> = (0..4096u32).map(|n| u8::try_from(n % 13).unwrap()).collect();
    driver.put_bytes(DATA, &new);
    assert_eq!(request(&mut driver, 1, 8, (DATA, 4096)), (0, 1));
    assert_eq!(request(&mut driver, 4, 0, (DATA, 0)), (0, 1));
    let mut back = vec![0; 4096];
    file.seek(SeekFrom::Start(4096)).unwrap();
    file.read_exact(&mut back).unwrap();
    assert_eq!(back, new);
    assert_eq!(request(&mut driver, 0, 2046, (DATA, 1024)), (0, 1025), "the last sectors");
}

#[test]
fn long_and_scattered_requests_go_in_steps() {
    let file = disk();
    let mut driver = driver(&file, false);
    // 600 KiB, so five steps, into buffers of odd sizes, with the header and the status split.
    header(&driver, HEADER, 0, 1);
    let sizes = [1u32, 511, 65_536, 131_073, 300_000, 117_279];
    let total = sizes.iter().sum::<u32>();
    assert_eq!(total % 512, 0);
    let mut at = DATA;
    let mut writable = Vec::new();
    for bytes in sizes {
        writable.push((at, bytes));
        at += u64::from(bytes);
    }
    writable.push((STATUS, 0));
    writable.push((STATUS, 1));
    driver.put(STATUS, 9u8);
    driver.add(0, &[(HEADER, 3), (HEADER + 3, 13)], &writable);
    assert_eq!(answer(&mut driver), (0, total + 1));
    assert_eq!(driver.bytes(STATUS, 1), [0]);
    let length = usize::try_from(total).unwrap();
    assert_eq!(driver.bytes(DATA, length), contents()[512..512 + length]);
}

#[test]
fn requests_the_disk_cannot_serve_get_a_status() {
    let file = disk();
    let mut driver = driver(&file, false);
    for (operation, sector, length, status) in [
        (0, 2048, 512, 1),
        (0, 2047, 1024, 1),
        (1, 2048, 512, 1),
        (0, u64::MAX, 512, 1),
        (0, u64::MAX / 512, 512, 1),
        (0, 0, 511, 1),
        (0, 0, 513, 1),
        (0, 0, 0, 1),
        (1, 0, 100, 1),
        (11, 0, 512, 2),
        (u32::MAX, 0, 512, 2),
    ] {
        let (got, _) = request(&mut driver, operation, sector, (DATA, length));
        assert_eq!(got, status, "{operation} {sector} {length}");
    }
    assert_eq!(request(&mut driver, 8, 0, (DATA, 20)), (0, 21));
    assert_eq!(&driver.bytes(DATA, 9), b"mica-root");
    let mut after = Vec::new();
    let mut file = file;
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut after).unwrap();
    assert_eq!(after, contents(), "nothing was written");
}

#[test]
fn a_read_only_disk_is_not_written() {
    let file = disk();
    let mut driver = driver(&file, true);
    assert_ne!(driver.offered() & (1 << 5), 0);
    assert_eq!(request(&mut driver, 1, 0, (DATA, 512)).0, 1);
    assert_eq!(request(&mut driver, 0, 0, (DATA, 512)).0, 0);
}

#[test]
fn a_file_that_shrank_is_an_error_and_not_a_loop() {
    let file = disk();
    let mut driver = driver(&file, false);
    file.set_len(1024).unwrap();
    assert_eq!(request(&mut driver, 0, 1, (DATA, 1024)).0, 1);
    assert_eq!(request(&mut driver, 0, 1, (DATA, 512)).0, 0);
}

#[test]
fn requests_without_their_fixed_parts_are_faults() {
    type Chain = (&'static [(u64, u32)], &'static [(u64, u32)]);
    let chains: [Chain; 3] = [
        (&[(HEADER, 15)], &[(STATUS, 1)]),
        (&[(HEADER, 16)], &[]),
        (&[(HEADER, 16)], &[(STATUS, 0)]),
    ];
    for (readable, writable) in chains {
        let mut driver = driver(&disk(), false);
        driver.add(0, readable, writable);
        match driver.run() {
            Err(DeviceError::Guest(fault)) => assert_eq!(fault.rule, Rule::RequestTooShort),
            other => panic!("expected a fault, got {other:?}"),
        }
    }
}

#[test]
fn many_requests_at_once_are_all_answered_once() {
    let mut driver = driver(&disk(), false);
    let mut wanted = Vec::new();
    for number in 0..42u64 {
        let at = DATA + number * 0x2_0000;
        header(&driver, at, 0, number * 7);
        wanted.push(driver.add(0, &[(at, 16)], &[(at + 0x1000, 1024), (at + 16, 1)]));
    }
    driver.kick(0);
    let mut got: Vec<u16> = (0..42).map(|_| answer(&mut driver).0).collect();
    got.sort_unstable();
    assert_eq!(got, wanted);
    for number in 0..42u64 {
        let at = DATA + number * 0x2_0000;
        let start = usize::try_from(number * 7 * 512).unwrap();
        assert_eq!(driver.bytes(at + 16, 1), [0]);
        assert_eq!(driver.bytes(at + 0x1000, 1024), contents()[start..start + 1024]);
    }
    driver.run().unwrap();
    assert_eq!(driver.take_used(0), None);
}

/// After a reset the old request must not write into what is now someone else's memory.
#[test]
fn nothing_of_a_request_arrives_after_a_reset() {
    // A pipe as the disk file is never done reading until it is written to. Its length is 0, so the
    // device is made on a file, and the ring then on the pipe.
    let (read, write) = rustix::pipe::pipe().unwrap();
    let mut blk = Blk::of_file(disk(), false).unwrap();
    blk.ring = crate::ring::DiskRing::new(&blk.done).unwrap();
    blk.ring.attach(&read).unwrap();
    let mut driver = Driver::started(Box::new(blk));
    header(&driver, HEADER, 0, 0);
    driver.put(STATUS, 0xffu8);
    driver.add(0, &[(HEADER, 16)], &[(DATA, 512), (STATUS, 1)]);
    driver.run().unwrap();
    driver.start(u64::MAX);
    rustix::io::write(&write, &[7; 512]).unwrap();
    for _ in 0..1000 {
        driver.run().unwrap();
        std::thread::yield_now();
    }
    assert_eq!(driver.take_used(0), None);
    assert_eq!(driver.bytes(DATA, 512), [0; 512]);
    assert_eq!(driver.bytes(STATUS, 1), [0xff]);
}

/// A disk that never answers does not hold up a freeze for ever: the VM ends, and says why.
#[test]
fn parking_does_not_wait_for_ever() {
    let (read, _write) = rustix::pipe::pipe().unwrap();
    let mut blk = Blk::of_file(disk(), false).unwrap();
    blk.ring = crate::ring::DiskRing::new(&blk.done).unwrap();
    blk.ring.attach(&read).unwrap();
    let mut driver = Driver::started(Box::new(blk));
    header(&driver, HEADER, 0, 0);
    driver.add(0, &[(HEADER, 16)], &[(DATA, 512), (STATUS, 1)]);
    driver.run().unwrap();
    let gate = Arc::new(Gate::new().unwrap());
    let device_loop = DeviceLoop::new(vec![Arc::clone(&driver.device)], Arc::clone(&gate));
    // It starts parked, so it drains at once.
    match device_loop.unwrap().with_drain_max(Duration::from_millis(50)).run() {
        Err(DeviceError::Host { operation: "finish what is in flight", source, .. }) => {
            assert_eq!(source.kind(), std::io::ErrorKind::TimedOut);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn disks_of_odd_length_are_refused() {
    for length in [0, 100, 513] {
        let file = disk();
        file.set_len(length).unwrap();
        assert!(matches!(Blk::of_file(file, false), Err(BlkError::Length(got)) if got == length));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]
    /// Any bytes in the descriptor table and the available ring: an answer or a fault, in bounded
    /// time, and the disk keeps its length.
    #[test]
    fn random_rings_do_no_harm(
        descriptors in prop::collection::vec(
            (
                prop_oneof![
                    BUFFERS..BUFFERS + 0x8000,
                    0..u64::try_from(MEMORY_BYTES).unwrap() + 64,
                    any::<u64>(),
                ],
                prop_oneof![Just(16u32), Just(1), Just(512), 0..0x8000u32, any::<u32>()],
                prop_oneof![0u16..4, 0u16..8],
                0u16..20,
            ),
            16,
        ),
        heads in prop::collection::vec(0u16..20, 1..40),
        headers in prop::collection::vec((0u32..10, 0u64..2100), 16),
    ) {
        let file = disk();
        let mut driver = driver(&file, false);
        for (number, (operation, sector)) in (0u64..).zip(headers) {
            header(&driver, BUFFERS + number * 16, operation, sector);
        }
        for (index, (address, length, flags, next)) in (0u16..).zip(descriptors) {
            let table = driver.rings[0].descriptors();
            driver.descriptor(table, index, (address, length), flags, next);
        }
        for head in heads {
            driver.offer(0, head);
            driver.kick(0);
            if driver.run().is_err() {
                break;
            }
        }
        prop_assert_eq!(file.metadata().unwrap().len(), DISK_BYTES as u64);
    }
}
