//! SIGTERM and SIGINT.
//!
//! Called by `mica serve`. The first one asks everything to drain, the second one ends the process
//! at once. Refuses to do work in a signal handler: a thread waits for them.

use std::process;
use std::thread;

use anyhow::{Context, Result};
use mica_shards::StopSignal;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// What a shell reports for a process that a signal ended.
const EXIT_AFTER_SIGNAL: i32 = 128;

/// Turns the signals into `stop`.
///
/// # Errors
/// When the handlers cannot be set.
pub fn stop_on_signals(stop: StopSignal) -> Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot handle signals")?;
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                if stop.is_stopped() {
                    tracing::warn!(signal, "asked to stop a second time; not draining");
                    process::exit(EXIT_AFTER_SIGNAL + signal);
                }
                tracing::info!(signal, "stopping: draining what runs");
                stop.stop();
            }
        })
        .context("cannot start the signal thread")?;
    Ok(())
}
