//! What the other threads tell the control thread: the first ending, and the one-time events.
//!
//! Called by vCPU threads and the device thread to tell, by `control` to hear. Bounded by its shape:
//! one slot for each thing that can be told. Refuses a second ending: the first one is the cause.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use mica_wire::vm::Ending;

use crate::panics;
use crate::virtio::Event;

/// Shared by all threads of the process.
#[derive(Debug)]
pub struct Notices {
    wake: Event,
    ending: Mutex<Option<Ending>>,
    console_started: AtomicBool,
    doorbell: AtomicBool,
}

/// What was told since the last call of [`Notices::take`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct News {
    /// The guest wrote its first byte to the console.
    pub console_started: bool,
    /// The guest's agent rang.
    pub doorbell: bool,
    /// Why the guest ended.
    pub ending: Option<Ending>,
}

impl Notices {
    /// Nothing told yet.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            wake: Event::new()?,
            ending: Mutex::new(None),
            console_started: AtomicBool::new(false),
            doorbell: AtomicBool::new(false),
        })
    }

    /// What the control thread waits on.
    pub fn event(&self) -> &Event {
        &self.wake
    }

    /// The guest ended. Only the first call counts.
    pub fn end(&self, ending: Ending) {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(ending);
        self.wake();
    }

    /// The guest wrote its first byte to the console.
    pub fn console_started(&self) {
        self.console_started.store(true, Ordering::Release);
        self.wake();
    }

    /// The guest's agent rang.
    pub fn doorbell(&self) {
        self.doorbell.store(true, Ordering::Release);
        self.wake();
    }

    /// Why the guest ended, if it has.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What was told since the last call. An ending stays.
    pub fn take(&self) -> std::io::Result<News> {
        self.wake.clear()?;
        Ok(News {
            console_started: self.console_started.swap(false, Ordering::Acquire),
            doorbell: self.doorbell.swap(false, Ordering::Acquire),
            ending: self.ending(),
        })
    }

    fn wake(&self) {
        // The descriptor is an event of our own, so this fails only if it is not one any more, and
        // then the control thread could never be told anything again.
        if self.wake.signal().is_err() {
            std::process::abort();
        }
    }

    /// Turns a panic of the current thread into an ending, when dropped.
    pub fn on_panic(&self, thread: &'static str) -> EndOnPanic<'_> {
        EndOnPanic { notices: self, thread }
    }
}

/// See [`Notices::on_panic`].
#[derive(Debug)]
pub struct EndOnPanic<'a> {
    notices: &'a Notices,
    thread: &'static str,
}

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let words = format!("the {} thread panicked: {}", self.thread, panics::first());
            self.notices.end(Ending::Internal(words));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ending_stays_and_events_come_once() {
        let notices = Notices::new().unwrap();
        assert_eq!(notices.take().unwrap(), News::default());
        notices.console_started();
        notices.end(Ending::TripleFault);
        notices.end(Ending::Reset);
        let news = notices.take().unwrap();
        assert!(news.console_started && !news.doorbell);
        assert_eq!(news.ending, Some(Ending::TripleFault));
        let news = notices.take().unwrap();
        assert!(!news.console_started);
        assert_eq!(news.ending, Some(Ending::TripleFault));
    }

    #[test]
    fn a_panic_is_an_ending() {
        let notices = Notices::new().unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let _guard = notices.on_panic("test");
                panic!("on purpose");
            });
            assert!(thread.join().is_err());
        });
        assert!(matches!(notices.take().unwrap().ending, Some(Ending::Internal(_))));
    }
}
