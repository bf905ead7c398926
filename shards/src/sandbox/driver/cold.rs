//! Pauses and snapshots that keep the disk alone, and what a boot from it needs.
//!
//! Called by the driver. What is kept is the disk, with a kernel of its own, so that it does not depend on a
//! template; nothing of the memory is looked at. Refuses to begin where no boot could follow: the guest goes
//! on then.

use std::rc::Rc;
use std::time::Duration;

use mica_numa::rt::time;
use mica_storage::{BootFiles, Store};
use mica_units::SandboxId;
use mica_wire::guest::ControlRequest;

use super::super::capture::{CaptureError, DiskCapture};
use super::super::prepare::{BootWish, NO_DISK, Workshop};
use super::super::state::{Cause, Event, State, Terms, UpBy};
use super::super::{Request, chain, link};
use super::Driver;
use super::keep::{Committed, Draft, Keeper};
use super::work::{Done, blocking};
use crate::event::{Keeps, Wake};
use crate::shell::Held;
use crate::{OnTimeout, ShardError};

/// How long the services of a template may take to be up after a boot in another size: what a template's own
/// warming gives them.
const SERVICES_DEADLINE: Duration = Duration::from_secs(600);

impl Driver {
    /// What the state machine has to know beside the state.
    pub(super) fn terms(&self) -> Terms {
        let on_timeout = self.sandbox.on_timeout.get();
        let is_pausing = matches!(*self.sandbox.state.borrow(), State::Pausing(_));
        let has_agent = self.shape.as_ref().is_some_and(|shape| shape.has_agent);
        Terms {
            pause_at_end: on_timeout != OnTimeout::Kill,
            outlives_daemon: self.shard.workshop.config.keep_sandboxes,
            disk_alone: match is_pausing {
                true => self.disk_alone,
                false => on_timeout == OnTimeout::PauseToDisk,
            },
            up_by: match (self.boots, has_agent) {
                (false, _) => UpBy::Started,
                (true, true) => UpBy::Doorbell,
                (true, false) => UpBy::Console,
            },
        }
    }

    /// How it is to boot, where whoever resumes it wants nothing of its memory.
    pub(super) fn boot_wish(&self) -> Option<BootWish> {
        match self.request {
            Some(Request::Resume(Wake { from: Keeps::Disk, size, .. }, _)) => {
                Some(BootWish { kernel_of: self.boot_ids(), size })
            }
            _ => None,
        }
    }

    /// How long its services may take to be up before it counts as resumed. `None`: nobody waits for them.
    /// Of a boot in another size a template is made, whose sandboxes are to find them up.
    pub(super) fn services_wait(&self) -> Option<Duration> {
        let resized = matches!(self.request, Some(Request::Resume(Wake { size: Some(_), .. }, _)));
        let has_agent = self.shape.as_ref().is_some_and(|shape| shape.has_agent);
        (resized && self.boots && has_agent).then_some(SERVICES_DEADLINE)
    }

    /// How long the step that begins may take.
    pub(super) fn step_patience(&self) -> Duration {
        let usual = self.shard.workshop.config.boot_deadline;
        let waits = matches!(*self.sandbox.state.borrow(), State::Initialising(_));
        // Longer than the agent waits, whose words say what was not up.
        usual + self.services_wait().filter(|_| waits).unwrap_or_default()
    }

    /// By what its kernel can be found, the best first: its template; what it was made from; what else has
    /// that template's name now.
    pub(super) fn boot_ids(&self) -> Vec<String> {
        let shape = self.shape.as_ref();
        let parent = self.image.as_ref().and_then(|image| image.manifest.parent.clone());
        let mut ids: Vec<String> =
            shape.map(|shape| shape.template_id.clone()).into_iter().collect();
        ids.extend(self.image.as_ref().map(|image| image.manifest.id.clone()));
        ids.extend(parent);
        ids.push(self.sandbox.identity.request.template.clone());
        ids.extend(shape.map(|shape| shape.template_name.as_str().to_owned()));
        ids
    }

    /// Has its agent write to the disk what is to stay, where it has one.
    pub(super) fn sync(&mut self) {
        self.disk_alone = true;
        let Some(held) = self.held() else { return };
        let has_agent = self.shape.as_ref().is_some_and(|shape| shape.has_agent);
        let agent = has_agent.then_some(held);
        let (workshop, ids) = (self.shard.workshop.clone(), self.boot_ids());
        let (sandbox, has_disk) = (self.sandbox.id, self.disk.is_some());
        let operation = self.operation_name();
        self.work = Some(Box::pin(async move {
            let synced = match has_disk {
                true => sync(workshop, ids, agent).await,
                false => Err(Cause::CannotBoot(NO_DISK)),
            };
            Done::Synced(synced.map_err(|cause| failed(cause, operation, sandbox)))
        }));
    }

    /// Copies the disk, while the guest stands still.
    pub(super) fn copy_disk(&mut self) {
        let (Some(disk), Some(files)) = (self.disk.clone(), self.boot.take()) else {
            self.caused.push_back(Event::CopyFailed);
            return;
        };
        let store = self.shard.workshop.store.clone();
        self.work =
            Some(Box::pin(
                async move { Done::DiskCopied(DiskCapture::copy(store, disk, files).await) },
            ));
    }
}

/// Makes the snapshot exist, and what it means for its sandbox last.
pub(super) async fn commit(
    capture: DiskCapture,
    draft: Draft,
    keeper: Keeper,
) -> Result<Box<Committed>, CaptureError> {
    let describe = |id| draft.finish(id, Vec::new(), Vec::new());
    let keep = move |snapshot, unheard: &dyn Fn() -> bool| {
        let (store, id) = (keeper.store.clone(), keeper.sandbox);
        let is_pause = keeper.paused.is_some();
        let committed = keeper.keep(snapshot, Ok(Vec::new()), unheard)?;
        if is_pause {
            drop_memory(&store, &id);
        }
        Ok(Box::new(committed))
    };
    capture.commit(describe, keep).await
}

/// Lets go of the layers that its memory lay on. Its record names none by now.
fn drop_memory(store: &Store, id: &SandboxId) {
    if let Err(error) = store.keep_only_layers(id, &[]) {
        tracing::warn!(%id, error = chain(&error), "layers that nothing names take room");
    }
}

/// Finds what it would boot from, and then has the agent write.
async fn sync(
    workshop: Workshop,
    ids: Vec<String>,
    agent: Option<Rc<Held>>,
) -> Result<BootFiles, Cause> {
    let patience = workshop.config.boot_deadline;
    let files = blocking(move || workshop.find_boot(&ids)).await?;
    if let Some(held) = agent {
        tell_to_sync(&held, patience).await?;
    }
    Ok(files)
}

async fn tell_to_sync(held: &Held, patience: Duration) -> Result<(), Cause> {
    let told = link::tell_agent(&held.control, &ControlRequest::Sync);
    match time::timeout(patience, told).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(why)) => Err(Cause::Failed(format!("its agent did not write its disk: {why}"))),
        Err(_) => {
            let seconds = patience.as_secs();
            Err(Cause::Failed(format!("its agent did not write its disk within {seconds} s")))
        }
    }
}

/// Has its agent start every service of the template.
pub(super) async fn warm(held: &Held, patience: Duration) -> Result<(), String> {
    let deadline_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
    let told = link::tell_agent(&held.control, &ControlRequest::Warm { deadline_ms }).await;
    told.map(drop).map_err(|why| format!("its services: {why}"))
}

/// Why the disk is not kept, for who asked for it.
fn failed(cause: Cause, operation: &'static str, sandbox: SandboxId) -> ShardError {
    match cause {
        Cause::CannotBoot(why) => ShardError::CannotBoot { sandbox, why },
        Cause::Busy => ShardError::Busy,
        Cause::NoSpace => ShardError::NoSpace,
        Cause::Failed(reason) => ShardError::OperationFailed { operation, sandbox, reason },
        other => {
            let reason = format!("{other:?}");
            ShardError::OperationFailed { operation, sandbox, reason }
        }
    }
}
