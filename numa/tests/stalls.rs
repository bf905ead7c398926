//! A task that holds its executor up is noticed, counted, and named in the log.
//!
//! Run by `cargo test`. Refuses nothing.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mica_numa::watchdog::Watchdog;
use mica_numa::{PlanConfig, Shards, StopSignal, plan, rt, seat, topology};

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("nobody panicked with it").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("nobody panicked with it")).into_owned()
    }
}

/// Holds its thread, at work.
#[inline(never)]
fn computes_for_too_long(time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        std::hint::black_box(until);
    }
}

/// Holds its thread, asleep in the kernel.
#[inline(never)]
fn blocks_for_too_long(time: Duration) {
    std::thread::sleep(time);
}

/// Holds the executor up again and again, until it is noticed.
async fn until(what: &str, holds: impl Fn() -> bool, hold_up: impl Fn()) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(60), "not noticed: {what}");
        hold_up();
        rt::time::sleep(Duration::from_millis(50)).await;
    }
}

#[test]
fn a_task_that_computes_and_one_that_blocks_are_noticed_and_named() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).init();
    let machine = topology::read().expect("this machine");
    let wish = PlanConfig { shards: Shards::Total(1), ..PlanConfig::default() };
    let plan = plan(&machine, &wish).expect("a plan");
    let stop = StopSignal::new().expect("a signal");
    let watchdog = Watchdog::start(Duration::from_millis(5)).expect("a watchdog");
    let seen = log.clone();
    let ran = seat::run_all(&plan, vec![watchdog], &stop, move |_, watchdog: Watchdog| {
        let log = seen.clone();
        async move {
            let watching = watchdog.sit("the seat".to_owned()).expect("a seat");
            let before = watching.stalls().count();
            // Where the machine is busy, so is the watchdog: it may miss one of these, and not all.
            until(
                "a stack",
                || log.text().contains("computes_for_too_long"),
                || {
                    computes_for_too_long(Duration::from_millis(20));
                },
            )
            .await;
            let computed = watching.stalls().count();
            assert!(computed > before, "a task that computes");
            let told = || watching.stalls().count() > computed;
            until("a blocked one", told, || blocks_for_too_long(Duration::from_millis(20))).await;
            // It is over when it has answered.
            let total = watching.stalls().total();
            let over = || watching.stalls().total() > total;
            until("its end", over, || blocks_for_too_long(Duration::from_millis(20))).await;
            watching.end().await;
        }
    });
    ran.expect("the seat ran to its end");
}
