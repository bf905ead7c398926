//! The end of a sandbox, and of its process: what is taken back, and who is told.
//!
//! Called by the driver. Refuses to give up on taking back because a thread is busy.

use std::rc::Rc;
use std::time::Duration;

use mica_numa::rt::time;
use mica_numa::rt::{self, BlockingError};

use super::super::chain;
use super::super::state::{Cause, State};
use super::Driver;
use super::work::Done;
use crate::shell::Held;
use crate::{ShardError, console};

/// Between two tries to find room on the blocking threads.
const BLOCKING_RETRY: Duration = Duration::from_millis(50);

impl Driver {
    pub(super) fn end_process(&mut self) {
        self.events = None;
        let held = self.sandbox.held.borrow_mut().take();
        let pool = Rc::clone(&self.shard.pool);
        self.work = Some(Box::pin(async move {
            if let Some(held) = held {
                // A task of its own: a kill drops this work, and the process must end all the same.
                let ending = rt::spawn(async move { pool.end(&held).await });
                ending.join().await;
            }
            Done::ProcessEnded
        }));
    }

    pub(super) fn clean_up(&mut self) {
        *self.sandbox.info.borrow_mut() = None;
        let held = self.sandbox.held.borrow_mut().take();
        if let Some(held) = &held {
            let bytes = self.shard.workshop.config.console_bytes;
            self.console_tail = console::tail(&held.console, bytes).unwrap_or_else(|error| {
                tracing::warn!(id = %self.sandbox.id, %error, "cannot read a console");
                String::new()
            });
            self.complaint = held.process.complaint();
        }
        self.events = None;
        self.paging = None;
        self.capture = None;
        self.work = Some(self.take_back(held));
    }

    fn take_back(&self, held: Option<Rc<Held>>) -> super::Work {
        let (workshop, pool) = (self.shard.workshop.clone(), Rc::clone(&self.shard.pool));
        let (id, paused_in) = (self.sandbox.id, self.paused_in.clone());
        Box::pin(async move {
            let mut safe = true;
            if let Some(held) = held {
                safe = pool.end(&held).await;
            }
            loop {
                let (workshop, paused_in) = (workshop.clone(), paused_in.clone());
                let taken = rt::blocking(move || workshop.take_back(&id, paused_in.as_deref()));
                match taken.await {
                    // It must be done, whatever else waits.
                    Err(BlockingError::Full) => time::sleep(BLOCKING_RETRY).await,
                    Err(error) => {
                        tracing::error!(%id, %error, "cannot take back a sandbox");
                        safe = false;
                        break;
                    }
                    Ok(Err(error)) => {
                        let error = chain(&error);
                        tracing::error!(%id, error, "files of a sandbox stay until the next start");
                        safe = false;
                        break;
                    }
                    Ok(Ok(())) => break,
                }
            }
            Done::TakenBack { safe }
        })
    }

    pub(super) fn bury(&mut self) {
        let cause = match &*self.sandbox.state.borrow() {
            State::Gone(cause) => cause.clone(),
            other => Cause::Failed(format!("buried while {other:?}")),
        };
        tracing::info!(id = %self.sandbox.id, ?cause, safe = self.safe, "sandbox is gone");
        self.shard.forget(&self.sandbox);
        if let Some(request) = self.request.take() {
            request.fail(ShardError::NoSuchSandbox(self.sandbox.id));
        }
        for request in self.sandbox.queue.take_requests() {
            request.fail(ShardError::NoSuchSandbox(self.sandbox.id));
        }
        if let Some(maker) = self.sandbox.maker.borrow_mut().take() {
            // Who made it may be gone; there is nothing left to take back then.
            if maker.send(Err(self.error(cause))).is_err() {
                tracing::debug!(id = %self.sandbox.id, "nobody waits for this failure");
            }
        }
        let mourners = std::mem::take(&mut *self.sandbox.mourners.borrow_mut());
        for mourner in mourners {
            if mourner.send(()).is_err() {
                tracing::trace!(id = %self.sandbox.id, "nobody waits for this end");
            }
        }
    }

    /// Why there is no sandbox, for who asked for one.
    pub(super) fn error(&self, cause: Cause) -> ShardError {
        let template = || self.sandbox.identity.request.template.clone();
        let console_tail = self.console_tail.clone();
        let mut reason = match cause {
            Cause::Killed => return ShardError::KilledDuringCreate(self.sandbox.id),
            Cause::Draining => return ShardError::ShuttingDown,
            Cause::Busy => return ShardError::Busy,
            Cause::NoSuchTemplate => return ShardError::NoSuchTemplate(template()),
            Cause::NotWarm => return ShardError::TemplateNotWarm(template()),
            Cause::NoSpace => return ShardError::NoSpace,
            Cause::TimedOut(step) => {
                let deadline = self.shard.workshop.config.boot_deadline;
                return ShardError::BootTimedOut { step, deadline, console_tail };
            }
            Cause::Expired => "its time was over".to_owned(),
            Cause::Failed(why) | Cause::Ended(why) => why,
        };
        if !self.complaint.is_empty() {
            reason = format!("{reason}; the VM process wrote: {}", self.complaint);
        }
        ShardError::BootFailed { reason, console_tail }
    }
}
