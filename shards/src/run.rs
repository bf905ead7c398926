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
    _plan: &Plan,
    config: HostConfig,
    _stop: StopSignal,
    _serve: S,
) -> Result<(), RunError>
where
    S: Fn(Host, StopSignal) -> F + Clone + Send + 'static,
    F: Future<Output = ()> + 'static,
{
    config.check()
}
