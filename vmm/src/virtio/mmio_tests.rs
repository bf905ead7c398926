//! Tests of the transport: the order of things, and guests that do not keep it.

use proptest::prelude::*;

use super::driver::{Driver, EVENT_IDX, VERSION_1};
use super::{DeviceError, GuestFault, Rng, Rule};

/// Where the driver puts the descriptor table of queue 0.
const TABLE: u64 = 0x1_0000;

fn rng() -> Driver {
    Driver::new(Box::new(Rng::new()))
}

fn fault(result: Result<(), DeviceError>) -> GuestFault {
    match result {
        Err(DeviceError::Guest(fault)) => fault,
        other => panic!("expected a guest's fault, got {other:?}"),
    }
}

#[test]
fn identity_registers() {
    let driver = rng();
    assert_eq!(driver.read(0), 0x7472_6976);
    assert_eq!(driver.read(4), 2);
    assert_eq!(driver.read(8), 4);
    assert_eq!(driver.offered() & (VERSION_1 | EVENT_IDX), VERSION_1 | EVENT_IDX);
    assert_eq!(driver.read(0xb0), u32::MAX, "no shared memory");
    let mut odd = [9; 3];
    driver.device.read(0, &mut odd);
    assert_eq!(odd, [0; 3], "only aligned words are registers");
}

#[test]
fn a_driver_comes_up_gets_bytes_and_an_interrupt() {
    for features in [u64::MAX, VERSION_1] {
        let mut driver = rng();
        driver.start(features);
        driver.add(0, &[], &[(0x10_0000, 64)]);
        driver.kick(0);
        driver.run().unwrap();
        let (head, length) = driver.take_used(0).unwrap();
        assert_eq!((head, length), (0, 64));
        assert_ne!(driver.bytes(0x10_0000, 64), [0; 64]);
        assert_eq!(driver.bytes(0x10_0040, 8), [0; 8], "not a byte more");
        assert!(driver.line.clear().unwrap());
        assert_eq!(driver.read(0x60), 1);
        driver.write(0x64, 1);
        assert_eq!(driver.read(0x60), 0);
    }
}

#[test]
fn nothing_is_served_before_driver_ok_nor_once_a_reset_is_due() {
    let mut driver = rng();
    driver.start(u64::MAX);
    // Once more by hand, up to the last step.
    driver.negotiate(u64::MAX);
    driver.describe(&driver.rings[0]);
    driver.write(0x44, 1);
    driver.add(0, &[], &[(0x10_0000, 64)]);
    driver.kick(0);
    driver.run().unwrap();
    assert_eq!(driver.take_used(0), None, "not before DRIVER_OK");
    assert!(!driver.line.clear().unwrap());
    driver.write(0x70, 15);
    driver.run().unwrap();
    assert_eq!(driver.take_used(0), Some((0, 64)), "what waited is served then");
    for (status, why) in [(1, "needs a reset"), (0x8f, "has failed")] {
        driver.start(u64::MAX);
        driver.write(0x70, status);
        driver.add(0, &[], &[(0x10_0000, 64)]);
        driver.kick(0);
        driver.run().unwrap();
        assert_eq!(driver.take_used(0), None, "{why}");
    }
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let mut driver = rng();
    driver.start(VERSION_1);
    let flags = driver.rings[0].driver_area();
    driver.put(flags, 1u16);
    driver.add(0, &[], &[(0x10_0000, 64)]);
    driver.run().unwrap();
    assert!(driver.take_used(0).is_some());
    assert!(!driver.line.clear().unwrap());
}

#[test]
fn the_event_index_says_when_the_next_interrupt_is_due() {
    let mut driver = rng();
    driver.start(VERSION_1 | EVENT_IDX);
    let event = driver.rings[0].driver_area() + 4 + 2 * 64;
    driver.put(event, 2u16);
    for number in 0..3 {
        assert!(!driver.line.clear().unwrap(), "no interrupt after {number}");
        driver.add(0, &[], &[(0x10_0000, 64)]);
        driver.run().unwrap();
    }
    assert!(driver.line.clear().unwrap(), "the third is the one it asked for");
}

#[test]
fn features_not_offered_or_legacy_are_refused() {
    for features in [1 << 50 | VERSION_1, 0] {
        let driver = rng();
        driver.write(0x70, 1);
        driver.write(0x70, 3);
        driver.write(0x24, 0);
        driver.write(0x20, u32::try_from(features & 0xffff_ffff).unwrap());
        driver.write(0x24, 1);
        driver.write(0x20, u32::try_from(features >> 32).unwrap());
        driver.write(0x70, 11);
        assert_eq!(driver.read(0x70), 3);
    }
}

#[test]
fn steps_out_of_order_need_a_reset() {
    // DRIVER_OK before FEATURES_OK; FEATURES_OK before DRIVER; a bit taken back; an unknown bit.
    let orders: [&[u32]; 4] = [&[1, 3, 7], &[1, 9], &[3, 1], &[1, 17]];
    for order in orders {
        let driver = rng();
        order.iter().for_each(|status| driver.write(0x70, *status));
        assert_ne!(driver.read(0x70) & 64, 0, "{order:?}");
        assert!(driver.line.clear().unwrap(), "the driver is told");
        assert_eq!(driver.read(0x60), 2);
        driver.write(0x70, 1);
        assert_ne!(driver.read(0x70) & 64, 0, "it stays until reset");
        driver.write(0x70, 0);
        assert_eq!((driver.read(0x70), driver.read(0x60)), (0, 0));
    }
}

#[test]
fn queue_registers_open_after_features_and_close_at_driver_ok() {
    let mut driver = rng();
    driver.write(0x44, 1);
    assert_eq!(driver.read(0x44), 0, "not before FEATURES_OK");
    driver.start(u64::MAX);
    driver.write(0x44, 0);
    assert_eq!(driver.read(0x44), 0, "a queue can be taken back");
    driver.write(0x44, 1);
    assert_eq!(driver.read(0x44), 0, "and not be given again");
    driver.add(0, &[], &[(0x10_0000, 64)]);
    driver.kick(0);
    driver.run().unwrap();
    assert_eq!(driver.take_used(0), None);
    driver.write(0x30, 1);
    assert_eq!(driver.read(0x34), 0, "there is no queue 1");
}

#[test]
fn a_reset_device_forgets_and_comes_up_again() {
    let mut driver = Driver::started(Box::new(Rng::new()));
    driver.add(0, &[], &[(0x10_0000, 64)]);
    driver.write(0x70, 0);
    driver.run().unwrap();
    assert_eq!(driver.read(0x44), 0);
    driver.start(u64::MAX);
    driver.add(0, &[], &[(0x10_0000, 64)]);
    driver.run().unwrap();
    assert_eq!(driver.take_used(0), Some((0, 64)));
}

#[test]
fn rings_outside_memory_or_out_of_form_are_faults() {
    let cases = [
        (0x38, 0, Rule::QueueSize),
        (0x38, 3, Rule::QueueSize),
        (0x38, 0x1_0040, Rule::QueueSize),
        (0x38, 128, Rule::QueueSize),
        (0x80, 8, Rule::QueueAddress),
        (0x90, 0, Rule::QueueAddress),
        (0x90, 0x2_0001, Rule::QueueAddress),
        (0xa0, 0x2_0002, Rule::QueueAddress),
        (0x84, 1, Rule::QueueOutsideMemory),
        (0xa4, u32::MAX, Rule::QueueOutsideMemory),
        (0x80, (8 << 20) - 16, Rule::QueueOutsideMemory),
    ];
    for (offset, value, rule) in cases {
        let driver = rng();
        driver.negotiate(u64::MAX);
        for (offset, value) in [(0x38, 64), (0x80, 0x1_0000), (0x90, 0x1_4000), (0xa0, 0x1_8000)] {
            driver.write(offset, value);
        }
        driver.write(offset, value);
        assert_eq!(fault(driver.try_write(0x44, 1)).rule, rule, "{offset:#x} {value:#x}");
        assert_eq!(driver.read(0x44), 0);
    }
}

#[test]
fn rings_and_chains_that_lie_are_faults() {
    type Lie = fn(&mut Driver);

    let lies: [(Lie, Rule); 9] = [
        // The index runs ahead.
        (|d| d.put(0x1_4002, 65u16), Rule::AvailIndex),
        // A head outside the table.
        (|d| d.offer(0, 64), Rule::ChainBroken),
        (|d| d.offer(0, u16::MAX), Rule::ChainBroken),
        // A loop.
        (
            |d| {
                d.descriptor(TABLE, 0, (0x10_0000, 8), 3, 1);
                d.descriptor(TABLE, 1, (0x10_0000, 8), 3, 0);
                d.offer(0, 0);
            },
            Rule::ChainBroken,
        ),
        // A buffer past the end, and one around the end of the address space.
        (|d| assert_eq!(d.add(0, &[], &[((8 << 20) - 8, 9)]), 0), Rule::BufferOutsideMemory),
        (|d| assert_eq!(d.add(0, &[], &[(u64::MAX - 3, 8)]), 0), Rule::BufferOutsideMemory),
        // Readable after writable.
        (
            |d| {
                d.descriptor(TABLE, 0, (0x10_0000, 8), 3, 1);
                d.descriptor(TABLE, 1, (0x10_0000, 8), 0, 0);
                d.offer(0, 0);
            },
            Rule::ChainOrder,
        ),
        // An indirect table whose length is no multiple of 16, and one outside memory.
        (
            |d| {
                d.descriptor(TABLE, 0, (0x10_0000, 24), 4, 0);
                d.offer(0, 0);
            },
            Rule::ChainBroken,
        ),
        (
            |d| {
                d.descriptor(TABLE, 0, (u64::MAX - 15, 16), 4, 0);
                d.offer(0, 0);
            },
            Rule::ChainBroken,
        ),
    ];
    for (number, (lie, rule)) in lies.into_iter().enumerate() {
        let mut driver = Driver::started(Box::new(Rng::new()));
        lie(&mut driver);
        driver.kick(0);
        assert_eq!(fault(driver.run()).rule, rule, "lie {number}");
    }
}

#[test]
fn an_indirect_table_that_points_at_itself_ends() {
    let mut driver = Driver::started(Box::new(Rng::new()));
    // An indirect descriptor inside an indirect table, and a table of 65,535 looping entries.
    driver.descriptor(0x10_0000, 0, (0x10_0000, 16), 4, 0);
    driver.descriptor(0x1_0000, 0, (0x10_0000, 16), 4, 0);
    driver.offer(0, 0);
    assert_eq!(fault(driver.run()).rule, Rule::ChainBroken);

    let mut driver = Driver::started(Box::new(Rng::new()));
    driver.descriptor(0x10_0000, 0, (0x20_0000, 1), 3, 0);
    driver.descriptor(0x1_0000, 0, (0x10_0000, 65_535 * 16), 4, 0);
    driver.offer(0, 0);
    assert_eq!(fault(driver.run()).rule, Rule::ChainBroken);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]
    /// Any writes to any registers: no panic, and the device still answers.
    #[test]
    fn random_register_writes_do_no_harm(
        writes in prop::collection::vec(
            (prop_oneof![0u64..0x40, 0u64..0x80].prop_map(|word| word * 4), any::<u32>(), 0u32..16),
            0..200,
        )
    ) {
        let mut driver = rng();
        for (offset, value, small) in writes {
            // Mostly small numbers: those are the ones that get somewhere.
            let value = if value & 3 == 0 { value } else { small };
            if driver.try_write(offset, value).is_err() {
                break;
            }
            driver.read(offset);
            if driver.run_turns(2_000).is_err() {
                break;
            }
        }
        driver.write(0x70, 0);
        driver.start(u64::MAX);
        driver.add(0, &[], &[(0x10_0000, 16)]);
        driver.run().unwrap();
        prop_assert_eq!(driver.take_used(0), Some((0, 16)));
    }
}
