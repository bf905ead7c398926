//! How a driver ends things: a process, a sandbox, its own care for one that outlives the daemon.
//!
//! Called by the driver for the effects that end something. Whatever was under way is dropped, or
//! waited for where it writes what the next daemon will read. Refuses to lose a process: it is ended
//! again when the work that was ending it is dropped.

use std::rc::Rc;
use std::time::Duration;

use mica_numa::rt::time;
use mica_numa::rt::{self, BlockingError};

use super::super::chain;
use super::super::state::{Cause, State};
use super::Driver;
use super::keep::Links;
use super::work::Done;
use crate::shell::Held;
use crate::{Lifecycle, ShardError, console};

/// Between two tries to find room on the blocking threads.
const BLOCKING_RETRY: Duration = Duration::from_millis(50);

/// Times that files are tried to be removed again.
const TAKE_BACK_TRIES: u32 = 20;

/// How long the daemon's end waits for what is being written just then.
const LEAVE_DEADLINE: Duration = Duration::from_secs(10);

impl Driver {
    /// Ends the process of a paused sandbox.
    pub(super) fn end_process(&mut self) {
        self.events = None;
        self.paging = None;
        let held = self.sandbox.held.borrow_mut().take();
        // Kept beside the work until it has ended: who drops that has to end the process itself.
        let ending = Rc::clone(&self.ending);
        ending.borrow_mut().clone_from(&held);
        let pool = Rc::clone(&self.shard.pool);
        let (store, id) = (self.shard.workshop.store.clone(), self.sandbox.id);
        let record = self.paused_in.clone().zip(self.paused_record());
        let before = self.work.take();
        self.work = Some(Box::pin(async move {
            if let Some(held) = held {
                pool.end(&held).await;
                ending.borrow_mut().take();
            }
            if let Some(before) = before {
                before.await;
            }
            // The record names the process, and one of a resume that was given up, or of half a
            // rollback, says worse.
            if let Some((snapshot, record)) = record {
                let write = move || match record(&snapshot, None) {
                    Ok(record) => store.write_record(&id, &record, true).map_err(|e| chain(&e)),
                    Err(error) => Err(chain(&error)),
                };
                let written = rt::blocking(write).await;
                if !matches!(written, Ok(Ok(()))) {
                    tracing::error!(%id, ?written, "a new daemon may not find this one paused");
                }
            }
            Done::ProcessEnded
        }));
    }

    /// Leaves everything for the next daemon. What is being written is written first.
    pub(super) async fn leave(&mut self) {
        if let Some(work) = self.work.take() {
            match time::timeout(LEAVE_DEADLINE, work).await {
                // One that was found for a resume is in no record.
                Ok(Done::Prepared(Ok((_, shell)))) => {
                    self.shard.pool.end(&shell.held).await;
                }
                Ok(_) => {}
                Err(time::Elapsed) => {
                    tracing::warn!(id = %self.sandbox.id, "left while something was being written");
                }
            }
        } else if self.sandbox.info().is_some_and(|info| info.state == Lifecycle::Running)
            && self.request.is_none()
        {
            self.write_record(Links::Stay).await;
        }
        self.events = None;
        self.capture = None;
        self.paging = None;
        *self.sandbox.held.borrow_mut() = None;
    }

    pub(super) fn clean_up(&mut self) {
        *self.sandbox.info.borrow_mut() = None;
        let ending = self.ending.borrow_mut().take();
        let held = self.sandbox.held.borrow_mut().take().or(ending);
        if let Some(held) = &held {
            let bytes = self.shard.workshop.config.console_bytes;
            self.console_tail = console::tail(&held.console, bytes).unwrap_or_else(|error| {
                tracing::warn!(id = %self.sandbox.id, %error, "cannot read a console");
                String::new()
            });
            self.complaint = held.process.complaint();
        }
        self.events = None;
        self.capture = None;
        // First the work at hand goes: what it commits from now on, it deletes itself.
        self.work = None;
        self.work = Some(self.take_back(held));
    }

    fn take_back(&mut self, held: Option<Rc<Held>>) -> super::Work {
        let (workshop, pool) = (self.shard.workshop.clone(), Rc::clone(&self.shard.pool));
        let (id, paused_in) = (self.sandbox.id, self.paused_in.clone());
        let committing = self.committing.take();
        let settling = self.settling.take();
        self.paging = None;
        Box::pin(async move {
            let mut safe = true;
            // What is still being made would be found by nobody.
            if let Some(settling) = settling {
                settling.task.join().await;
            }
            if let Some(held) = held {
                safe = pool.end(&held).await;
            }
            let mut tries = 0;
            loop {
                let (workshop, paused_in) = (workshop.clone(), paused_in.clone());
                let committing = committing.clone();
                let take_back =
                    move || workshop.take_back(&id, paused_in.as_deref(), committing.as_deref());
                match rt::blocking(take_back).await {
                    // It must be done, whatever else waits.
                    Err(BlockingError::Full) => time::sleep(BLOCKING_RETRY).await,
                    Err(error) => {
                        tracing::error!(%id, %error, "cannot take back a sandbox");
                        safe = false;
                        break;
                    }
                    // A thread may still be writing what the work that was dropped had begun.
                    Ok(Err(error)) if tries < TAKE_BACK_TRIES => {
                        tries += 1;
                        tracing::debug!(%id, error = chain(&error), "taking it back again");
                        time::sleep(BLOCKING_RETRY).await;
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
        self.timed_end(&cause);
        self.shard.forget(&self.sandbox);
        let id = self.sandbox.id;
        let waiting = self.request.take().into_iter().chain(self.sandbox.queue.take_requests());
        for request in waiting {
            request.fail(match cause {
                // It may be there again when the next daemon is.
                Cause::Draining => ShardError::ShuttingDown,
                _ => ShardError::NoSuchSandbox(id),
            });
        }
        if let Some(maker) = self.sandbox.maker.borrow_mut().take() {
            // Who made it may be gone; there is nothing left to take back then.
            if maker.send(Err(self.error(cause))).is_err() {
                tracing::debug!(%id, "nobody waits for this failure");
            }
        }
        let mourners = std::mem::take(&mut *self.sandbox.mourners.borrow_mut());
        for mourner in mourners {
            if mourner.send(()).is_err() {
                tracing::trace!(%id, "nobody waits for this end");
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
            Cause::CannotBoot(why) => {
                return ShardError::CannotBoot { sandbox: self.sandbox.id, why };
            }
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
