//! Brings a host up and down.
//!
//! Called by the binary, once. Refuses to start on a machine that lacks what sandboxes need.

use std::future::Future;

use mica_numa::{Plan, StopSignal};

use crate::{Host, HostConfig, RunError};

/// Runs the host until `stop`: one executor for each seat of `plan`, and on each `serve`, which
/// must end soon after `stop`. Blocks the calling thread.
///
/// # Errors
/// See [`RunError`].
pub fn run<S, F>(
    plan: &Plan,
    config: HostConfig,
    stop: StopSignal,
    serve: S,
) -> Result<(), RunError>
where
    S: Fn(Host, StopSignal) -> F + Clone + Send + 'static,
    F: Future<Output = ()> + 'static,
{
    config.check()?;
    let inputs = plan.seats.iter().map(|_| ()).collect();
    let st = stop.clone();
    mica_numa::seat::run_all(plan, inputs, &stop, move |seat, ()| serve(Host::hack(seat.shard), st.clone()))
        .map_err(|e| RunError::Machine(Box::new(e)))?;
    Ok(())
}
