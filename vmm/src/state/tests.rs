//! Tests of the saved state: its bytes, and what is not one.

use super::*;

/// A state with every part in it, small numbers everywhere.
fn sample() -> VmState {
    let vcpu = |n: u8| VcpuState {
        regs: [n; 144],
        sregs: [n + 1; 312],
        xcrs: [n + 2; 392],
        debugregs: [n + 3; 128],
        lapic: [n + 4; 1024],
        events: [n + 5; 64],
        xsave: vec![n + 6; 32],
        mp_state: u32::from(n),
        tsc_khz: 2_450_000,
        msrs: vec![MsrState { index: 0x10, value: 7 }, MsrState { index: 0x6e0, value: 8 }],
    };
    let queue = QueueState {
        ready: true,
        size: 128,
        descriptors: 0x1000,
        driver: 0x2000,
        device: 0x3000,
        next_available: 5,
        next_used: 4,
    };
    let device = |kind, own| TransportState {
        kind,
        status: 15,
        interrupt: 1,
        device_features_sel: 1,
        driver_features_sel: 0,
        driver_features: 1 << 32,
        queue_sel: 2,
        queues: vec![queue; 2],
        own,
    };
    let streams = VsockState {
        generation: 9,
        rung: true,
        open: vec![PortPair { host: 1024, guest: 1024 }; 3],
    };
    VmState {
        memory_mib: 2048,
        cpuid: vec![CpuidLeaf { function: 1, index: 0, flags: 0, registers: [1, 2, 3, 4] }; 4],
        vcpus: vec![vcpu(1), vcpu(2)],
        machine: MachineState { chips: [[1; 512], [2; 512], [3; 512]], clock_ns: 123_456_789 },
        serial: SerialState { divisor: [12, 0], line_status: 0x60, ..SerialState::default() },
        devices: vec![
            device(2, DeviceState::Blk(BlkState { bytes: 4096, read_only: false })),
            device(19, DeviceState::Vsock(streams)),
            device(4, DeviceState::Rng),
            device(5, DeviceState::Balloon),
        ],
    }
}

/// Writes a fresh checksum over bytes that were changed.
fn mended(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc32c::crc32c(&bytes[CHECKED_FROM..]);
    bytes[CRC_AT..CHECKED_FROM].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn states_round_trip() {
    let bytes = sample().encode().unwrap();
    // Not `assert_eq`: nobody reads a state in words.
    assert!(VmState::decode(&bytes) == Ok(sample()));
}

/// Golden: a state written by an earlier build must read back in this one. When this fails, the
/// format has changed: raise [`VERSION`], and write the new file from `sample()`.
#[test]
fn the_form_has_not_changed() {
    let golden = include_bytes!("../../goldens/state-1.bin");
    assert_eq!(VERSION, 1);
    assert!(VmState::decode(golden) == Ok(sample()));
    assert!(sample().encode().unwrap() == golden, "the same state is written in another way");
}

/// What a structure in the archive costs: a field that is added, moved or widened changes one of them.
#[test]
fn archived_sizes_are_these() {
    let sizes = [
        size_of::<ArchivedVmState>(),
        size_of::<rkyv::Archived<VcpuState>>(),
        size_of::<rkyv::Archived<MachineState>>(),
        size_of::<rkyv::Archived<TransportState>>(),
        size_of::<rkyv::Archived<QueueState>>(),
        size_of::<rkyv::Archived<DeviceState>>(),
        size_of::<rkyv::Archived<CpuidLeaf>>(),
        size_of::<rkyv::Archived<MsrState>>(),
    ];
    assert_eq!(sizes, [1592, 2088, 1544, 72, 40, 24, 28, 16]);
}

#[test]
fn no_truncation_and_no_changed_byte_panics() {
    let good = sample().encode().unwrap();
    for length in 0..good.len() {
        assert!(VmState::decode(&good[..length]).is_err(), "{length} bytes");
        if length >= HEADER_BYTES && length % 5 == 0 {
            // With a header that fits the shorter archive, too.
            let mut cut = good[..length].to_vec();
            cut[16..24].copy_from_slice(&((length - HEADER_BYTES) as u64).to_le_bytes());
            assert!(VmState::decode(&mended(cut)).is_err(), "{length} bytes, header mended");
        }
    }
    let mut taken = 0;
    for at in 0..good.len() {
        for value in [0u8, 0x7f, 0xff] {
            let mut changed = good.clone();
            changed[at] = value;
            if changed != good {
                assert!(VmState::decode(&changed).is_err(), "byte {at}");
            }
            // Bytes of registers may be anything; pointers and lengths of the archive may not.
            taken += usize::from(at > HEADER_BYTES && VmState::decode(&mended(changed)).is_ok());
        }
    }
    assert!(taken > 0, "the changed bytes were all refused by something before the archive");
}

#[test]
fn other_formats_versions_and_counts_are_told_apart() {
    let good = sample().encode().unwrap();
    let mut other = good.clone();
    other[0] = b'X';
    assert_eq!(VmState::decode(&other), Err(StateError::Form));
    let mut other = good.clone();
    other[8] = 2;
    assert_eq!(VmState::decode(&other), Err(StateError::Version(2)));
    let mut other = good.clone();
    *other.last_mut().unwrap() ^= 1;
    assert_eq!(VmState::decode(&other), Err(StateError::Checksum));
    assert_eq!(VmState::decode(b""), Err(StateError::Form));

    let refusal = |change: fn(&mut VmState)| {
        let mut state = sample();
        change(&mut state);
        VmState::decode(&state.encode().unwrap()).unwrap_err()
    };
    let bounds = [
        refusal(|state| state.vcpus.clear()),
        refusal(|state| state.vcpus = vec![state.vcpus[0].clone(); 9]),
        refusal(|state| state.vcpus[0].msrs = vec![MsrState { index: 0, value: 0 }; 513]),
        refusal(|state| state.vcpus[1].xsave = vec![0; 16 * 1024 + 1]),
        refusal(|state| state.cpuid = vec![state.cpuid[0]; 257]),
        refusal(|state| state.devices = vec![state.devices[0].clone(); 9]),
        refusal(|state| state.devices[1].queues = vec![state.devices[0].queues[0]; 9]),
    ];
    assert!(bounds.iter().all(|error| matches!(error, StateError::Bound(_))), "{bounds:?}");
}
