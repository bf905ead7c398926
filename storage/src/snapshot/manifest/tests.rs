//! The manifest's format holds, and no damage gets through.

use super::*;
use crate::layer::LayerId;

const GOLDEN: &[u8] = include_bytes!("../../../tests/goldens/snapshot-v2.bin");
const GOLDEN_V1: &[u8] = include_bytes!("../../../tests/goldens/snapshot-v1.bin");

fn layer(id: &str, kind: LayerKind) -> LayerInfo {
    let id: LayerId = id.parse().unwrap();
    LayerInfo { id, kind, frames_held: 77, file_bytes: 1 << 30 }
}

pub(crate) fn sample() -> SnapshotManifest {
    SnapshotManifest {
        id: "0123456789abcdefghij".to_owned(),
        kind: SnapshotKind::Snapshot,
        name: Some("before the upgrade".to_owned()),
        template_id: "tttttttttttttttttttt".to_owned(),
        template_name: "code-interpreter-v1".parse().unwrap(),
        parent: Some("pppppppppppppppppppp".to_owned()),
        sandbox: Some(SandboxId::from_random([7; mica_units::SANDBOX_ID_CHARS])),
        tenant: Some("acme-1".parse().unwrap()),
        created_unix_ms: 1_790_000_000_123,
        vcpus: VcpuCount::new(2).unwrap(),
        memory: Mebibytes::new(2048),
        envd_version: "0.5.7".to_owned(),
        ready: ReadyWhen::Agent,
        layers: vec![
            layer("base0base0base0base0", LayerKind::Flat),
            layer("diff0diff0diff0diff0", LayerKind::Packed),
        ],
        disk_bytes: 4 << 30,
        state: (0..=255).collect(),
        record: b"opaque".to_vec(),
    }
}

#[test]
fn the_golden_file_is_read_and_written_the_same() {
    // `MICA_WRITE_GOLDENS=1` writes it, for a new version of the format only.
    if std::env::var_os("MICA_WRITE_GOLDENS").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/snapshot-v2.bin");
        std::fs::write(path, sample().encode().unwrap()).unwrap();
        return;
    }
    assert_eq!(SnapshotManifest::decode(GOLDEN).unwrap(), sample());
    assert_eq!(sample().encode().unwrap(), GOLDEN);
}

#[test]
fn one_of_the_time_before_tenants_is_nobodys() {
    let of_old = SnapshotManifest { tenant: None, ..sample() };
    assert_eq!(SnapshotManifest::decode(GOLDEN_V1).unwrap(), of_old);
}

#[test]
fn the_smallest_and_the_largest_round_trip() {
    let small = SnapshotManifest {
        kind: SnapshotKind::Template,
        id: sample().template_id,
        name: None,
        parent: None,
        sandbox: None,
        tenant: None,
        layers: vec![layer("base0base0base0base0", LayerKind::Flat)],
        disk_bytes: 0,
        state: Vec::new(),
        record: Vec::new(),
        ..sample()
    };
    assert!(!small.has_disk());
    assert_eq!(SnapshotManifest::decode(&small.encode().unwrap()).unwrap(), small);
    let mut large = SnapshotManifest {
        name: Some("n".repeat(NAME_BYTES_MAX)),
        state: vec![1; STATE_BYTES_MAX],
        record: vec![2; RECORD_BYTES_MAX],
        ..sample()
    };
    for n in 2..LAYERS_MAX {
        large.layers.push(layer(&format!("{n:020}"), LayerKind::Packed));
    }
    assert_eq!(SnapshotManifest::decode(&large.encode().unwrap()).unwrap(), large);
}

#[test]
fn every_flipped_bit_and_every_truncation_is_found() {
    let good = sample().encode().unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(SnapshotManifest::decode(&bad).is_err(), "byte {at}");
        let cut = SnapshotManifest::decode(&good[..at]).unwrap_err();
        assert!(matches!(cut, ManifestError::Length { .. }), "{at}: {cut:?}");
    }
}

#[test]
fn a_body_that_lies_never_panics_and_never_breaks_a_bound() {
    let good = sample().encode().unwrap();
    let body = &good[crate::envelope::HEADER_BYTES..];
    let (mut refused, mut taken) = (0, 0);
    for at in 0..body.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff, body[at] ^ 1] {
            let mut bad = body.to_vec();
            bad[at] = value;
            match SnapshotManifest::decode(&ENVELOPE.seal(&bad).unwrap()) {
                // What is taken is within its bounds, so it can be written again.
                Ok(manifest) => {
                    taken += 1;
                    assert!(manifest.encode().is_ok(), "byte {at} value {value}");
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 300 && taken > 300, "{refused} refused, {taken} taken");
    assert!(SnapshotManifest::decode(&ENVELOPE.seal(&[]).unwrap()).is_err());
}

#[test]
fn fields_out_of_bounds_are_not_written() {
    let flat = layer("base0base0base0base0", LayerKind::Flat);
    let packed = layer("diff0diff0diff0diff0", LayerKind::Packed);
    let many = (0..=LAYERS_MAX).map(|n| layer(&format!("{n:020}"), LayerKind::Packed));
    let layers = |layers: &[LayerInfo]| SnapshotManifest { layers: layers.to_vec(), ..sample() };
    let disk_alone = SnapshotManifest {
        kind: SnapshotKind::Pause,
        state: Vec::new(),
        disk_bytes: 512,
        ..layers(&[])
    };
    for kind in [SnapshotKind::Pause, SnapshotKind::Snapshot] {
        let kept = SnapshotManifest { kind, ..disk_alone.clone() };
        assert!(kept.encode().is_ok(), "{kind:?} may have no memory");
    }
    let of = |kind| SnapshotManifest { kind, ..disk_alone.clone() };
    let cases = [
        ("id", SnapshotManifest { id: "../../../../../../etc".to_owned(), ..sample() }),
        ("id", SnapshotManifest { kind: SnapshotKind::Template, ..sample() }),
        ("id", SnapshotManifest { id: sample().template_id, ..sample() }),
        ("template_id", SnapshotManifest { template_id: String::new(), ..sample() }),
        ("parent", SnapshotManifest { parent: Some("..".to_owned()), ..sample() }),
        ("name", SnapshotManifest { name: Some("a\nb".to_owned()), ..sample() }),
        ("envd_version", SnapshotManifest { envd_version: "1".repeat(33), ..sample() }),
        ("memory", SnapshotManifest { memory: Mebibytes::new(0), ..sample() }),
        ("disk_bytes", SnapshotManifest { disk_bytes: 513, ..sample() }),
        ("disk_bytes", SnapshotManifest { disk_bytes: 1 << 60, ..sample() }),
        ("state", SnapshotManifest { state: vec![0; STATE_BYTES_MAX + 1], ..sample() }),
        ("record", SnapshotManifest { record: vec![0; RECORD_BYTES_MAX + 1], ..sample() }),
        ("layers", layers(&[])),
        ("layers", SnapshotManifest { kind: SnapshotKind::Pause, ..layers(&[]) }),
        ("layers", of(SnapshotKind::Copies)),
        ("layers", of(SnapshotKind::Built)),
        ("layers", SnapshotManifest { disk_bytes: 0, ..disk_alone.clone() }),
        ("layers", layers(&[packed])),
        ("layers", layers(&[flat, flat])),
        ("layers", layers(&[flat, packed, packed])),
        ("layers", layers(&std::iter::once(flat).chain(many).collect::<Vec<_>>())),
    ];
    for (name, manifest) in cases {
        match manifest.encode() {
            Err(ManifestError::Field { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}
