//! Tests of saving devices and taking them back: nothing is lost, nothing comes twice, and no state makes
//! a device do what no driver could.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use proptest::prelude::*;

use super::driver::{BUFFERS, Driver, MEMORY_BYTES};
use super::{Balloon, Blk, Connector, DeviceKind, MmioDevice, Rng, VirtioDevice, Vsock};
use crate::state::{BlkState, DeviceState, PortPair, QueueState, TransportState, VsockState};

/// Another device with this state, in the place of the driver's own; as after a restore in another
/// process, the driver knows nothing of it.
fn move_to(driver: &mut Driver, device: Box<dyn VirtioDevice>) {
    let state = driver.device.save();
    let twin = driver.line.try_clone().unwrap();
    driver.device = MmioDevice::new(device, Arc::clone(&driver.memory), twin).unwrap();
    driver.device.restore(&state).unwrap();
    assert_eq!(driver.device.save(), state);
    driver.device.catch_up().unwrap();
}

fn disk(bytes: u64) -> std::fs::File {
    let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = std::fs::File::from(fd);
    file.set_len(bytes).unwrap();
    file
}

#[test]
fn a_queue_goes_on_where_it_stopped_and_no_kick_is_lost() {
    let mut driver = Driver::started(Box::new(Rng::new()));
    for round in 0..40 {
        driver.add(0, &[], &[(BUFFERS, 64)]);
        // Half of the time the kick is still on its way.
        driver.kick(0);
        if round % 2 == 0 {
            driver.run().unwrap();
            assert_eq!(driver.take_used(0).unwrap().1, 64);
            driver.line.clear().unwrap();
        }
        move_to(&mut driver, Box::new(Rng::new()));
        if round % 2 == 1 {
            driver.run().unwrap();
            assert_eq!(driver.take_used(0).unwrap().1, 64);
            assert!(driver.line.clear().unwrap());
        }
        assert!(driver.take_used(0).is_none());
        // The driver acknowledges, as after every interrupt.
        driver.write(0x64, 3);
    }
}

#[test]
fn an_interrupt_that_was_not_acknowledged_is_raised_again() {
    let mut driver = Driver::started(Box::new(Rng::new()));
    driver.add(0, &[], &[(BUFFERS, 64)]);
    driver.kick(0);
    driver.run().unwrap();
    // The edge was lost with the interrupt chips.
    assert!(driver.line.clear().unwrap());
    move_to(&mut driver, Box::new(Rng::new()));
    assert!(driver.line.clear().unwrap());
    assert_eq!(driver.read(0x60), 1);
    driver.write(0x64, 1);
    move_to(&mut driver, Box::new(Rng::new()));
    assert!(!driver.line.clear().unwrap(), "one that was acknowledged is not");
}

#[test]
fn a_device_in_the_middle_of_its_negotiation_goes_on_with_it() {
    let mut driver = Driver::new(Box::new(Rng::new()));
    driver.negotiate(u64::MAX);
    driver.write(0x30, 0);
    driver.write(0x38, 16);
    driver.write(0x80, 0x1000);
    move_to(&mut driver, Box::new(Rng::new()));
    assert_eq!((driver.read(0x70), driver.read(0x44)), (11, 0));
    driver.write(0x90, 0x2000);
    driver.write(0xa0, 0x3000);
    driver.write(0x44, 1);
    assert_eq!(driver.read(0x44), 1);
    driver.write(0x70, 15);
    assert_eq!(driver.read(0x70), 15);
}

#[test]
fn a_disk_must_be_as_long_as_it_was_and_stays_read_only() {
    let driver = Driver::started(Box::new(Blk::of_file(disk(8192), true).unwrap()));
    let state = driver.device.save();
    assert_eq!(state.own, DeviceState::Blk(BlkState { bytes: 8192, read_only: true }));
    let other = Driver::new(Box::new(Blk::of_file(disk(4096), false).unwrap()));
    assert!(other.device.restore(&state).is_err());
    let same = Driver::new(Box::new(Blk::of_file(disk(8192), false).unwrap()));
    same.device.restore(&state).unwrap();
    assert_ne!(same.offered() & (1 << 5), 0, "read-only");
}

#[test]
fn only_a_disk_takes_a_file() {
    assert!(Driver::new(Box::new(Rng::new())).device.attach(disk(4096), false).is_err());
}

/// A vsock device and what goes with it.
fn vsock() -> (Box<Vsock>, Connector) {
    let (vsock, connector) = Vsock::new(3, Box::new(|| {})).unwrap();
    (Box::new(vsock), connector)
}

/// The next packet to the guest: operation, host-side port, guest port.
fn packet(driver: &mut Driver) -> Option<(u16, u32, u32)> {
    driver.run().unwrap();
    driver.take_used(0)?;
    let bytes = driver.bytes(BUFFERS, 44);
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    driver.add(0, &[], &[(BUFFERS, 4096)]);
    Some((u16::from_le_bytes(bytes[30..32].try_into().unwrap()), word(16), word(20)))
}

#[test]
fn streams_of_the_time_before_are_reset_first_and_ports_never_come_again() {
    const REQUEST: u16 = 1;
    const RESET: u16 = 3;
    let (device, connector) = vsock();
    let mut driver = Driver::started(device);
    driver.add(0, &[], &[(BUFFERS, 4096)]);
    let open = |connector: &Connector, port| {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        connector.connect(far.into(), port).unwrap();
        near
    };
    let mut known = open(&connector, 7);
    let Some((REQUEST, first, 7)) = packet(&mut driver) else { panic!("no request") };

    // In another process: the guest hears of the end, and then of new streams.
    let (device, connector) = vsock();
    move_to(&mut driver, device);
    assert_eq!(known.read(&mut [0]).unwrap(), 0, "the old process closed its end");
    let _second = open(&connector, 8);
    assert_eq!(packet(&mut driver), Some((RESET, first, 7)));
    let Some((REQUEST, second, 8)) = packet(&mut driver) else { panic!("no request") };
    assert!(second > first);

    // In the same one, a rollback: what is open now, known to the guest or not, ends here.
    let state = driver.device.save();
    let (memory, rings) = (driver.bytes(0, MEMORY_BYTES), driver.rings.clone());
    let mut later = open(&connector, 9);
    let Some((REQUEST, third, 9)) = packet(&mut driver) else { panic!("no request") };
    let mut waiting = open(&connector, 10);
    driver.put_bytes(0, &memory);
    driver.rings = rings;
    driver.device.restore(&state).unwrap();
    driver.device.catch_up().unwrap();
    for stream in [&mut later, &mut waiting] {
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    let _fourth = open(&connector, 11);
    assert_eq!(packet(&mut driver), Some((RESET, second, 8)));
    let Some((REQUEST, fourth, 11)) = packet(&mut driver) else { panic!("no request") };
    assert!(fourth > third, "a port that the guest met after the save is not used again");
    assert_eq!(packet(&mut driver), None);
}

#[test]
fn a_doorbell_that_was_rung_stays_rung() {
    use std::sync::atomic::{AtomicU32, Ordering};
    let rings = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&rings);
    let bell = Box::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let (vsock, _connector) = Vsock::new(3, bell).unwrap();
    let mut driver = Driver::started(Box::new(vsock));
    let open = vec![PortPair { host: 1025, guest: 5 }];
    let mut state = driver.device.save();
    state.own = DeviceState::Vsock(VsockState { generation: 5, rung: true, open });
    driver.device.restore(&state).unwrap();
    assert_eq!(driver.device.save(), state);
    let request = [3u64, 2].map(u64::to_le_bytes).concat();
    driver.put_bytes(BUFFERS, &request);
    driver.put_bytes(BUFFERS + 20, &mica_wire::guest::DOORBELL_PORT.to_le_bytes());
    driver.put_bytes(BUFFERS + 28, &[1, 0, 1, 0]);
    driver.add(1, &[(BUFFERS, 44)], &[]);
    driver.run().unwrap();
    assert_eq!(rings.load(Ordering::SeqCst), 0);
}

/// Each kind of device, fresh.
fn fresh(kind: DeviceKind) -> Box<dyn VirtioDevice> {
    match kind {
        DeviceKind::Blk => Box::new(Blk::of_file(disk(4096), false).unwrap()),
        DeviceKind::Rng => Box::new(Rng::new()),
        DeviceKind::Balloon => Box::new(Balloon::new()),
        DeviceKind::Vsock => vsock().0,
    }
}

const KINDS: [DeviceKind; 4] =
    [DeviceKind::Blk, DeviceKind::Rng, DeviceKind::Balloon, DeviceKind::Vsock];

#[test]
fn the_state_of_one_kind_is_refused_by_every_other() {
    for from in KINDS {
        let state = Driver::started(fresh(from)).device.save();
        for to in KINDS {
            let restored = Driver::new(fresh(to)).device.restore(&state);
            assert_eq!(restored.is_ok(), from == to, "{from} to {to}");
            // With the number of the other, only what is the device's own tells them apart.
            let queues = Driver::new(fresh(to)).device.save().queues;
            let forged = TransportState { kind: to as u32, queues, ..state.clone() };
            assert_eq!(Driver::new(fresh(to)).device.restore(&forged).is_ok(), from == to);
        }
    }
}

fn any_queue() -> impl Strategy<Value = QueueState> {
    let size = prop_oneof![Just(0u16), Just(16), Just(128), any::<u16>()];
    let place = prop_oneof![(0..0x800u64).prop_map(|page| page << 12), any::<u64>()];
    let places = (place.clone(), place.clone(), place);
    (any::<bool>(), size, places, any::<u16>(), any::<u16>()).prop_map(
        |(ready, size, (descriptors, driver, device), next_available, next_used)| QueueState {
            ready,
            size,
            descriptors,
            driver,
            device,
            next_available,
            next_used,
        },
    )
}

fn any_state() -> impl Strategy<Value = (DeviceKind, TransportState)> {
    let kind = prop::sample::select(&KINDS[..]);
    let status = prop_oneof![Just(15u32), 0..256u32, any::<u32>()];
    let features = prop_oneof![Just(1u64 << 32), Just(3u64 << 28 | 1 << 32), any::<u64>()];
    let ports = (any::<u32>(), any::<u32>()).prop_map(|(host, guest)| PortPair { host, guest });
    let streams = (any::<u32>(), prop::collection::vec(ports, 0..700));
    let selectors = (any::<u32>(), any::<u32>(), any::<u32>(), any::<u32>());
    let queues = prop::collection::vec(any_queue(), 0..5);
    (kind, status, features, selectors, queues, streams).prop_map(
        |(kind, status, driver_features, selectors, mut queues, (generation, open))| {
            let fitting = Driver::new(fresh(kind)).device.queue_events().len();
            if status % 4 != 0 {
                queues.resize(fitting, QueueState { ready: false, ..EMPTY });
            }
            let own = match kind {
                DeviceKind::Blk => DeviceState::Blk(BlkState { bytes: 4096, read_only: false }),
                DeviceKind::Rng => DeviceState::Rng,
                DeviceKind::Balloon => DeviceState::Balloon,
                DeviceKind::Vsock => {
                    DeviceState::Vsock(VsockState { generation, rung: true, open })
                }
            };
            let state = TransportState {
                kind: kind as u32,
                status,
                interrupt: selectors.0,
                device_features_sel: selectors.1,
                driver_features_sel: selectors.2,
                driver_features,
                queue_sel: selectors.3,
                queues,
                own,
            };
            (kind, state)
        },
    )
}

const EMPTY: QueueState = QueueState {
    ready: false,
    size: 0,
    descriptors: 0,
    driver: 0,
    device: 0,
    next_available: 0,
    next_used: 0,
};

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any state: refused, or a device that a driver could have brought there. Running it then ends in
    /// rest or in a fault of the guest.
    #[test]
    fn no_state_makes_a_device_panic((kind, state) in any_state()) {
        let driver = Driver::new(fresh(kind));
        if driver.device.restore(&state).is_ok() {
            let again = driver.device.save();
            for (again, saved) in again.queues.iter().zip(&state.queues) {
                // How far a queue has come is known of a ready one only.
                prop_assert!(again == saved || !saved.ready && !again.ready);
            }
            driver.device.catch_up().unwrap();
            for index in 0..8 {
                driver.write(0x30, index);
                driver.read(0x44);
                driver.kick(index);
            }
            let outcome = driver.run();
            prop_assert!(!matches!(outcome, Err(super::DeviceError::Host { .. })), "{:?}", outcome);
        }
    }
}
