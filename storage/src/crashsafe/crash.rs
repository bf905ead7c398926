//! Stops the world at one step: that step and every later one fail.
//!
//! Called by tests only. It is the simple half of fault injection: nothing that was done before the
//! step is lost. `simulation.rs` is the other half.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// A power cut that waits for its step.
#[derive(Debug)]
pub(crate) struct Crash {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    left: u32,
    log: Vec<(&'static str, PathBuf)>,
}

impl Crash {
    /// Lets `steps` steps happen, and none after that.
    pub(crate) fn after(steps: u32) -> Self {
        Self { state: Mutex::new(State { left: steps, log: Vec::new() }) }
    }

    pub(super) fn step(&self, operation: &'static str, path: &Path) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        if state.left == 0 {
            return Err(io::Error::other("the machine has stopped"));
        }
        state.left -= 1;
        state.log.push((operation, path.to_path_buf()));
        Ok(())
    }

    /// Whether the cut came.
    pub(crate) fn happened(&self) -> bool {
        self.state.lock().unwrap().left == 0
    }

    /// The steps that happened, in order.
    pub(crate) fn log(&self) -> Vec<(&'static str, PathBuf)> {
        self.state.lock().unwrap().log.clone()
    }
}
