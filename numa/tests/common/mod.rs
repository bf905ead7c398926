//! One seat on any core, for tests of what runs on it.
//!
//! Called by the tests beside it. Refuses nothing.

use mica_numa::plan::VcpuCores;
use mica_numa::seat::run_all;
use mica_numa::{Plan, ShardSeat, StopSignal, topology};
use mica_units::ShardId;

/// Runs `work` on one seat and gives its result.
pub fn on_one<T, F>(work: impl Fn() -> F + Clone + Send + 'static) -> T
where
    T: Send + 'static,
    F: Future<Output = T> + 'static,
{
    let core = topology::read().unwrap().nodes[0].cores[0].cpu();
    let seat = ShardSeat::new(ShardId::new(0), core, 0);
    let vcpus = VcpuCores::new(0, vec![core], true);
    let plan = Plan { seats: vec![seat], vcpus: vec![vcpus], ..Plan::default() };
    let stop = StopSignal::new().unwrap();
    run_all(&plan, vec![()], &stop, move |_, ()| work()).unwrap().pop().unwrap()
}
