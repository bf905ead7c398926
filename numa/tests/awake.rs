//! Cores are kept awake while an executor hands work over densely, and no longer.
//!
//! Run by `cargo test`. Needs io_uring, and root for `/dev/cpu_dma_latency`. Refuses to run beside somebody
//! who keeps the machine's cores awake.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

use common::on_one;
use mica_numa::latency::DenseLatency;
use mica_numa::rt::time;

/// What the tests ask for. Nobody else asks for so much.
const LIMIT_US: i32 = 1_234;

/// As many at once are dense by any measure.
const MANY: u32 = 1_000;

/// As many are not.
const FEW: u32 = 10;

const PATIENCE: Duration = Duration::from_secs(30);

/// The least of what anybody holds now, in microseconds.
fn held_us() -> i32 {
    let mut bytes = [0; 4];
    File::open("/dev/cpu_dma_latency").unwrap().read_exact(&mut bytes).unwrap();
    i32::from_ne_bytes(bytes)
}

fn wish() -> DenseLatency {
    DenseLatency::new(u32::try_from(LIMIT_US).unwrap()).unwrap()
}

#[test]
fn cores_are_kept_awake_while_hand_overs_are_dense_and_no_longer() {
    assert!(held_us() > LIMIT_US, "somebody holds less already");
    on_one(|| async {
        let wish = wish();
        (0..FEW).for_each(|_| wish.handed_over());
        assert!(held_us() > LIMIT_US, "a few are worth nothing");
        assert_eq!(wish.held(), Duration::ZERO);

        (0..MANY).for_each(|_| wish.handed_over());
        assert_eq!(held_us(), LIMIT_US);
        // As long as they come, it is held.
        let (began, goes_on) = (Instant::now(), Duration::from_millis(350));
        while began.elapsed() < goes_on {
            (0..MANY).for_each(|_| wish.handed_over());
            assert_eq!(held_us(), LIMIT_US);
            time::sleep(Duration::from_millis(5)).await;
        }
        assert!(wish.held() >= goes_on);

        let began = Instant::now();
        while held_us() == LIMIT_US {
            assert!(began.elapsed() < PATIENCE, "it is never let go");
            time::sleep(Duration::from_millis(5)).await;
        }
        let held = wish.held();
        time::sleep(Duration::from_millis(20)).await;
        assert_eq!(wish.held(), held, "what is not held is not counted");

        (0..MANY).for_each(|_| wish.handed_over());
        assert_eq!(held_us(), LIMIT_US, "and it may begin again");
    });
    assert!(held_us() > LIMIT_US, "an executor that ends holds nothing");
}

#[test]
fn without_a_wish_nothing_is_counted() {
    on_one(|| async {
        let none = DenseLatency::default();
        (0..MANY).for_each(|_| none.handed_over());
        assert_eq!(none.held(), Duration::ZERO);
    });
}
