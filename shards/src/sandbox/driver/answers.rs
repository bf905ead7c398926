//! What a driver tells those who asked for an operation, at its end.
//!
//! Called by the driver for the effects that answer. Refuses to answer before what is told is written.

use std::time::Duration;

use mica_numa::rt;
use mica_numa::rt::time::Instant;
use mica_storage::SnapshotKind;

use super::super::Request;
use super::Driver;
use super::keep::Links;
use crate::event::Purpose;
use crate::host::snapshot_info;
use crate::{Lifecycle, OnTimeout, ShardError};

/// After so long a pause that failed is tried again.
const PAUSE_RETRY: Duration = Duration::from_secs(30);

impl Driver {
    pub(super) async fn show_resumed(&mut self) {
        // Until it runs it is what it was: whatever dies on the way, it is paused and on disk. Where the
        // record cannot be written it stays on disk too.
        let written = self.paused_in.is_none() || self.write_record(Links::AsRecorded).await;
        (self.boots, self.disk_alone) = (false, false);
        if let Some(shape) = &self.shape {
            self.sandbox.show_size(shape.vcpus, shape.memory);
        }
        self.sandbox.show(Lifecycle::Running, false);
        self.sandbox.note("resumed".to_owned());
        self.sandbox.paused_at.set(None);
        // Its memory lies on the layers of that snapshot by links of its own.
        if let Some(snapshot) = self.paused_in.take().filter(|_| written) {
            let workshop = self.shard.workshop.clone();
            rt::spawn(async move {
                let name = snapshot.clone();
                let deleted = rt::blocking(move || workshop.delete_pause(&snapshot)).await;
                if !matches!(deleted, Ok(Ok(()))) {
                    tracing::warn!(snapshot = name, ?deleted, "a pause leaves its snapshot behind");
                }
            })
            .detach();
        }
        self.timed(true);
        let Some(Request::Resume(wake, sender)) = self.request.take() else { return };
        self.sandbox.set_life(self.sandbox.life_after_resume(wake.life));
        if let Some(on_timeout) = wake.on_timeout {
            // Who says only that it is to be paused does not say that its memory is to be kept.
            let before = self.sandbox.on_timeout.get();
            let as_before = (before, on_timeout) == (OnTimeout::PauseToDisk, OnTimeout::Pause);
            self.sandbox.on_timeout.set(if as_before { before } else { on_timeout });
        }
        let info = self.sandbox.info().map(Box::new);
        let info = info.ok_or(ShardError::NoSuchSandbox(self.sandbox.id));
        if sender.send(info.map(|info| (info, true))).is_err() {
            tracing::debug!(id = %self.sandbox.id, "nobody waits for a resume");
        }
    }

    /// Tells whoever asked that it is done.
    pub(super) fn answer(&mut self) {
        self.timed(true);
        let made = self.made.take();
        if matches!(&made, Some(made) if made.kind == SnapshotKind::Pause) {
            self.paused_in = made.as_ref().map(|made| made.id.clone());
        }
        // After a snapshot of its disk it has its memory.
        self.disk_alone &= self.paused_in.is_some();
        let heard = match (self.request.take(), made) {
            (Some(Request::Snapshot(purpose, _, sender)), Some(made)) => {
                if matches!(purpose, Purpose::Client(_)) {
                    let how = if made.has_memory() { "" } else { " of its disk" };
                    self.sandbox.note(format!("snapshot {}{how} made", made.id));
                }
                sender.send(Ok(Box::new(snapshot_info(&made)))).is_ok()
            }
            (Some(Request::Pause(_, sender)), _) => sender.send(Ok(())).is_ok(),
            (Some(Request::Rollback(snapshot, sender)), _) => {
                self.sandbox.note(format!("rolled back to snapshot {snapshot}"));
                sender.send(Ok(())).is_ok()
            }
            // Its time was over, and nobody asked.
            (None, _) => true,
            (Some(other), _) => {
                tracing::error!(id = %self.sandbox.id, ?other, "an operation came to another's end");
                other.fail(ShardError::Busy);
                true
            }
        };
        if !heard {
            tracing::debug!(id = %self.sandbox.id, "nobody waits for the end of an operation");
        }
    }

    /// Tells whoever asked why it did not happen.
    pub(super) fn answer_failure(&mut self) {
        self.timed(false);
        self.capture = None;
        self.back = None;
        self.boot = None;
        // A resume that failed leaves it as it was; after a pause that did, it has its memory.
        self.disk_alone &= self.paused_in.is_some();
        let failure = self.failure.take();
        let Some(request) = self.request.take() else {
            // A pause that nobody asked for: it runs on, and is tried again when its time is over.
            tracing::warn!(id = %self.sandbox.id, ?failure, "could not be paused at its end");
            self.sandbox.deadline.set(Instant::now() + PAUSE_RETRY);
            return;
        };
        let failure = failure.unwrap_or_else(|| ShardError::OperationFailed {
            operation: request.name(),
            sandbox: self.sandbox.id,
            reason: "the VM process was lost, or took too long".to_owned(),
        });
        request.fail(failure);
    }
}
