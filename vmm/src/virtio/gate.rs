//! Parking the device thread, so that devices can be saved and restored while nobody runs them.
//!
//! Called by the control thread (to ask) and by the device loop (to answer). The thread starts parked.
//! Refuses to wait for longer than it is told, and for a thread that has ended.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Event;

/// What the device thread is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Run the devices.
    Run,
    /// Bring what is in flight to its end, and stay away from the devices.
    Park,
    /// End.
    Stop,
}

/// Why the device thread is not parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GateError {
    /// It has ended; a notice says why.
    #[error("the device thread has ended")]
    Gone,
    /// It takes too long.
    #[error("the device thread did not come to rest in time")]
    Late,
}

/// Shared by the two threads.
#[derive(Debug)]
pub struct Gate {
    wake: Event,
    turn: Mutex<Turn>,
    changed: Condvar,
}

#[derive(Debug)]
struct Turn {
    wanted: Wanted,
    parked: bool,
    gone: bool,
}

impl Gate {
    /// A gate that is closed.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> std::io::Result<Self> {
        let turn = Turn { wanted: Wanted::Park, parked: false, gone: false };
        Ok(Self { wake: Event::new()?, turn: Mutex::new(turn), changed: Condvar::new() })
    }

    /// Asks the thread to park, without waiting for it.
    ///
    /// # Errors
    /// When it cannot be woken.
    pub fn park(&self) -> std::io::Result<()> {
        self.want(Wanted::Park)
    }

    /// Waits until the thread is parked.
    ///
    /// # Errors
    /// See [`GateError`].
    pub fn wait_parked(&self, patience: Duration) -> Result<(), GateError> {
        let deadline = Instant::now() + patience;
        let mut turn = self.lock();
        loop {
            if turn.gone {
                return Err(GateError::Gone);
            }
            if turn.parked {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(GateError::Late);
            }
            let waited = self.changed.wait_timeout(turn, left);
            turn = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets the thread go on.
    ///
    /// # Errors
    /// When it cannot be woken.
    pub fn open(&self) -> std::io::Result<()> {
        self.want(Wanted::Run)
    }

    /// Ends the thread.
    ///
    /// # Errors
    /// When it cannot be woken.
    pub fn stop(&self) -> std::io::Result<()> {
        self.want(Wanted::Stop)
    }

    fn want(&self, wanted: Wanted) -> std::io::Result<()> {
        self.lock().wanted = wanted;
        self.changed.notify_all();
        self.wake.signal()
    }

    fn lock(&self) -> MutexGuard<'_, Turn> {
        // It holds three plain values, which are whole at any time.
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the device thread waits on beside its devices.
    pub(super) fn event(&self) -> &Event {
        &self.wake
    }

    /// What is wanted now. Takes the signal off the event first, so that no change is missed.
    pub(super) fn wanted(&self) -> std::io::Result<Wanted> {
        self.wake.clear()?;
        Ok(self.lock().wanted)
    }

    /// The device thread is parked, until something else is wanted.
    pub(super) fn stay(&self) -> Wanted {
        let mut turn = self.lock();
        turn.parked = true;
        self.changed.notify_all();
        while turn.wanted == Wanted::Park {
            turn = self.changed.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
        turn.parked = false;
        turn.wanted
    }

    /// Says, when dropped, that the device thread has ended.
    #[must_use]
    pub fn on_end(&self) -> GoneOnDrop<'_> {
        GoneOnDrop(self)
    }
}

/// See [`Gate::on_end`].
#[derive(Debug)]
pub struct GoneOnDrop<'a>(&'a Gate);

impl Drop for GoneOnDrop<'_> {
    fn drop(&mut self) {
        self.0.lock().gone = true;
        self.0.changed.notify_all();
    }
}
