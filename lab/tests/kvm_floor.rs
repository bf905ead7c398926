//! The floor of the engine benchmark, once through: it measures what it says.
//!
//! Run by `cargo test`. Needs `/dev/kvm` and a temporary directory on a disk. The checks of what was found
//! and written are in the floor itself, which fails rather than measure something else.

use std::time::Duration;

use mica_lab::engine::floor::{Config, measure};
use mica_units::{Mebibytes, VcpuCount};

#[test]
fn every_operation_is_measured() {
    let config = Config {
        directory: std::env::temp_dir(),
        rounds: 2,
        memory: Mebibytes::new(1024),
        vcpus: VcpuCount::new(2).unwrap(),
    };
    let all = measure(&config).unwrap();
    let names: Vec<_> = all.iter().map(|measured| measured.op).collect();
    let expected = [
        "restore_pool_hit",
        "restore_pool_miss",
        "resume",
        "destroy",
        "pause",
        "snapshot_7mb",
        "rollback_7mb",
        "snapshot_7mb_dense",
        "snapshot_64mb",
        "snapshot_256mb",
        "snapshot_next_1mb",
    ];
    assert_eq!(names, expected);
    for measured in all {
        assert_eq!(measured.times.len(), 2, "{}", measured.op);
        assert!(measured.percentile(50) > Duration::ZERO, "{}", measured.op);
        assert!(measured.percentile(50) <= measured.percentile(99), "{}", measured.op);
    }
}
