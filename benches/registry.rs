//! The registry's operations under criterion, by the names and sizes of Fast Sandbox's own benchmarks.
//!
//! Called by `cargo bench -p mica-lab`, and once each by `cargo test`. What is done is in
//! `lab/src/engine/registry.rs`, so that `mica bench registry` measures the same. Refuses to judge.

use criterion::{Criterion, criterion_group, criterion_main};
use mica_lab::engine::registry::{ALL, Pool};

fn registry(criterion: &mut Criterion) {
    for work in ALL {
        let mut pool = Pool::new(work.hosts).expect("a pool of that size");
        criterion.bench_function(work.name, |bencher| {
            bencher.iter_custom(|count| work.run(&mut pool, count).expect("the pool has room"));
        });
    }
}

criterion_group!(benches, registry);
criterion_main!(benches);
