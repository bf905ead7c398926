//! The manifest's format holds, and no damage gets through.

use super::*;
use crate::envelope::HEADER_BYTES;

const GOLDEN: &[u8] = include_bytes!("../../tests/goldens/manifest-v1.bin");

pub(crate) fn sample() -> Manifest {
    Manifest {
        id: "0123456789abcdefghij".to_owned(),
        name: "code-interpreter-v1".parse().unwrap(),
        created_unix_ms: 1_790_000_000_123,
        vcpus: VcpuCount::new(2).unwrap(),
        memory: Mebibytes::new(1024),
        cmdline: "console=ttyS0 quiet".to_owned(),
        envd_version: "0.5.7".to_owned(),
        ready: ReadyWhen::Agent,
        inputs_hash: "00ff".repeat(16),
        kernel: PartInfo { bytes: 11_655_104, crc32c: 0x1234_5678 },
        initramfs: Some(PartInfo { bytes: 4_000_000, crc32c: 1 }),
        disk: Some(PartInfo { bytes: 4 << 30, crc32c: u32::MAX }),
    }
}

#[test]
fn the_golden_file_is_read_and_written_the_same() {
    // `MICA_WRITE_GOLDENS=1` writes it, for a new version of the format only.
    if std::env::var_os("MICA_WRITE_GOLDENS").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/manifest-v1.bin");
        std::fs::write(path, sample().encode().unwrap()).unwrap();
        return;
    }
    assert_eq!(Manifest::decode(GOLDEN).unwrap(), sample());
    assert_eq!(sample().encode().unwrap(), GOLDEN);
}

#[test]
fn templates_without_disk_and_initramfs_round_trip() {
    let manifest = Manifest {
        initramfs: None,
        disk: None,
        ready: ReadyWhen::Console,
        inputs_hash: String::new(),
        envd_version: String::new(),
        ..sample()
    };
    assert!(!manifest.has_disk());
    assert_eq!(manifest.disk_bytes(), 0);
    assert_eq!(Manifest::decode(&manifest.encode().unwrap()).unwrap(), manifest);
}

#[test]
fn every_flipped_bit_is_found() {
    let good = sample().encode().unwrap();
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            let error = Manifest::decode(&bad).unwrap_err();
            let right = match at {
                0..8 => matches!(error, ManifestError::Magic),
                8..12 => matches!(error, ManifestError::Version(_)),
                12..16 => matches!(error, ManifestError::Length { .. }),
                _ => matches!(error, ManifestError::Checksum),
            };
            assert!(right, "byte {at} bit {bit}: {error:?}");
        }
    }
}

#[test]
fn every_truncation_and_extension_is_found() {
    let good = sample().encode().unwrap();
    for len in 0..good.len() {
        let error = Manifest::decode(&good[..len]).unwrap_err();
        assert!(matches!(error, ManifestError::Length { .. }), "{len}: {error:?}");
    }
    let mut long = good;
    long.push(0);
    assert!(matches!(Manifest::decode(&long), Err(ManifestError::Length { .. })));
}

/// Gives a body a header whose checksum is right, as an attacker would.
fn sealed(body: &[u8]) -> Vec<u8> {
    ENVELOPE.seal(body).unwrap()
}

#[test]
fn a_body_that_lies_never_panics_and_never_breaks_a_bound() {
    let good = sample().encode().unwrap();
    let body = &good[HEADER_BYTES..];
    let (mut refused, mut taken) = (0, 0);
    for at in 0..body.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff, body[at] ^ 1] {
            let mut bad = body.to_vec();
            bad[at] = value;
            match Manifest::decode(&sealed(&bad)) {
                // What is taken is within its bounds, so it can be written again.
                Ok(manifest) => {
                    taken += 1;
                    assert!(manifest.encode().is_ok(), "byte {at} value {value}");
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 300 && taken > 100, "{refused} refused, {taken} taken");
    assert!(Manifest::decode(&sealed(&[])).is_err());
    assert!(Manifest::decode(&sealed(&[0xff; 512])).is_err());
}

#[test]
fn fields_out_of_bounds_are_not_written() {
    let long = "a".repeat(CMDLINE_BYTES_MAX + 1);
    let zero = PartInfo { bytes: 0, crc32c: 0 };
    let cases = [
        ("id", Manifest { id: "../../../../../../etc".to_owned(), ..sample() }),
        ("id", Manifest { id: String::new(), ..sample() }),
        ("memory", Manifest { memory: Mebibytes::new(0), ..sample() }),
        ("memory", Manifest { memory: Mebibytes::new(u32::MAX), ..sample() }),
        ("cmdline", Manifest { cmdline: long, ..sample() }),
        ("cmdline", Manifest { cmdline: "a\nb".to_owned(), ..sample() }),
        ("cmdline", Manifest { cmdline: "a\0b".to_owned(), ..sample() }),
        ("envd_version", Manifest { envd_version: "1".repeat(33), ..sample() }),
        ("inputs_hash", Manifest { inputs_hash: "XYZ".to_owned(), ..sample() }),
        ("kernel", Manifest { kernel: zero, ..sample() }),
        ("initramfs", Manifest { initramfs: Some(zero), ..sample() }),
        ("disk", Manifest { disk: Some(PartInfo { bytes: 513, crc32c: 0 }), ..sample() }),
        ("disk", Manifest { disk: Some(PartInfo { bytes: 1 << 60, crc32c: 0 }), ..sample() }),
    ];
    for (name, manifest) in cases {
        match manifest.encode() {
            Err(ManifestError::Field { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn sameness_ignores_only_id_and_date() {
    let other = Manifest { id: "z".repeat(20), created_unix_ms: 1, ..sample() };
    assert!(sample().same_content(&other));
    assert!(!sample().same_content(&Manifest { vcpus: VcpuCount::new(1).unwrap(), ..sample() }));
    let disk = Some(PartInfo { bytes: 4 << 30, crc32c: 0 });
    assert!(!sample().same_content(&Manifest { disk, ..sample() }));
}
