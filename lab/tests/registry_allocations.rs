//! Choosing a host takes no memory, and neither does giving it back.
//!
//! Called by `cargo test`. Alone in its program, because what counts here is every allocation of the process.
//! Refuses to pass when the counter does not count.

use mica_lab::engine::registry::Pool;

#[global_allocator]
static COUNTED: dhat::Alloc = dhat::Alloc;

#[test]
fn a_choice_takes_no_memory() {
    let mut pools = [100, 1000].map(|hosts| Pool::new(hosts).unwrap());
    let counting = dhat::Profiler::builder().testing().build();
    let blocks = || dhat::HeapStats::get().total_blocks;
    let seen = Box::new(1u8);
    assert_eq!((blocks(), *seen), (1, 1), "the counter does not count");
    for pool in &mut pools {
        // Twice: slots that are used for the first time, and such as are used again.
        for _ in 0..2 {
            pool.allocate(2000, Pool::of_template).unwrap();
            pool.release().unwrap();
            pool.allocate(2000, Pool::with_ports).unwrap();
            pool.release().unwrap();
            pool.allocate(2000, Pool::of_none).unwrap();
            pool.release().unwrap();
        }
    }
    assert_eq!(blocks(), 1, "choosing took memory");
    drop(counting);
}
