//! Pieces of work that a driver waits for, and what becomes of their results.
//!
//! Called by the driver. Each is a future that may be dropped at any await: what it had made by then
//! is taken back by what owns it. Refuses to touch the sandbox: a piece of work owns what it needs.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use mica_numa::rt::{self, BlockingError};
use mica_storage::SnapshotKind;

use super::super::capture::{Capture, CaptureError, Copied, DiskCapture};
use super::super::memory::Memory;
use super::super::prepare::{Boot, Found};
use super::super::rollback::{Back, BackError};
use super::super::state::{Birth, Cause, Event, State};
use super::super::{Request, chain};
use super::keep::{Committed, Shape};
use super::{Begun, Driver};
use crate::ShardError;
use crate::metrics::Operation;
use crate::shell::Shell;

/// What a piece of work came to.
pub(super) enum Done {
    /// A snapshot was found, a disk made, a shell taken.
    Prepared(Result<(Found, Shell), Cause>),
    /// The agent has answered: its envd version; and the record is written.
    Initialised(Result<Option<String>, Cause>),
    /// Its agent has written what is to stay, and this is what it would boot from.
    Synced(Result<mica_storage::BootFiles, ShardError>),
    /// Memory and disk.
    Copied(Memory, Result<Copied, CaptureError>),
    /// The disk alone.
    DiskCopied(Result<DiskCapture, CaptureError>),
    /// The most of the memory.
    Precopied(Memory, Result<Capture, CaptureError>),
    /// It exists, and what its layers are.
    Committed(Result<Box<Committed>, ShardError>),
    /// What a rollback has to do.
    Replaced(Memory, Result<Back, BackError>),
    /// The process of a paused sandbox is gone.
    ProcessEnded,
    /// Everything is.
    TakenBack {
        /// Whether nothing can run or lie about any more.
        safe: bool,
    },
}

pub(super) type Work = Pin<Box<dyn Future<Output = Done>>>;

/// Runs blocking work whose error says why a sandbox does not come up.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Cause> + Send + 'static,
) -> Result<T, Cause> {
    rt::blocking(work).await.unwrap_or_else(|error| {
        Err(match error {
            BlockingError::Full => Cause::Busy,
            other => Cause::Failed(other.to_string()),
        })
    })
}

impl Driver {
    /// Keeps what a piece of work gave.
    pub(super) fn take(&mut self, done: Done) -> Event {
        match done {
            Done::Prepared(Ok((found, shell))) => self.take_prepared(found, shell),
            Done::Prepared(Err(cause)) => {
                self.failure = Some(self.error(cause.clone()));
                Event::PrepareFailed(cause)
            }
            Done::Initialised(Ok(envd_version)) => {
                self.envd_version = envd_version;
                if let (false, Some(image), Some(held)) = (self.boots, &self.image, self.held()) {
                    crate::warmth::note_working_set(&self.shard, image, &held);
                }
                Event::InitDone
            }
            Done::Initialised(Err(cause)) => {
                self.failure = Some(self.error(cause.clone()));
                Event::InitFailed(cause)
            }
            Done::Synced(Ok(files)) => {
                self.boot = Some(files);
                Event::Synced
            }
            Done::Synced(Err(error)) => {
                self.failure = Some(error);
                Event::SyncFailed
            }
            Done::Copied(memory, copied) => {
                self.memory = memory;
                self.take_copied(copied)
            }
            Done::DiskCopied(Ok(capture)) => {
                self.capture = Some(Begun::OfDisk(capture));
                Event::Copied
            }
            Done::DiskCopied(Err(error)) => self.copy_failed(&error),
            Done::Precopied(memory, copied) => {
                self.memory = memory;
                match copied {
                    Ok(capture) => {
                        self.capture = Some(Begun::Here(Box::new(capture)));
                        Event::Precopied
                    }
                    Err(error) => self.copy_failed(&error),
                }
            }
            Done::Committed(Ok(made)) => {
                self.take_committed(*made);
                Event::Committed
            }
            Done::Committed(Err(error)) => {
                self.committing = None;
                self.memory.gave_up();
                self.failure = Some(error);
                Event::CommitFailed
            }
            Done::Replaced(memory, back) => {
                self.memory = memory;
                self.take_replaced(back)
            }
            Done::ProcessEnded => Event::ProcessEnded,
            Done::TakenBack { safe } => {
                self.safe = safe;
                Event::CleanedUp
            }
        }
    }

    fn take_prepared(&mut self, found: Found, shell: Shell) -> Event {
        let kind = found.image.manifest.kind;
        let is_new = matches!(*self.sandbox.state.borrow(), State::Starting(Birth::Create));
        if is_new && matches!(kind, SnapshotKind::Snapshot | SnapshotKind::Copies) {
            self.watch.is_rather(Operation::Restore);
        }
        self.image = Some(Arc::clone(&found.image));
        let shape = self.shape.get_or_insert_with(|| Shape::of(&found.image.manifest));
        // Also back from another size, where a boot in that came to nothing.
        (shape.vcpus, shape.memory) = (found.size.vcpus, found.size.memory);
        self.disk = found.disk;
        self.has_directory = found.has_directory;
        self.boots = found.boot.is_some();
        self.memory = match found.boot {
            Some(Boot { files, memory }) => {
                self.boot = Some(files);
                Memory::empty(memory)
            }
            None => Memory {
                layers: found.image.layers.clone(),
                mapped: Some(found.image.mapped.clone()),
                mapped_layers: found.image.layers.clone(),
                logged: Some(Vec::new()),
                ..Memory::default()
            },
        };
        // Its events were read from its making on, and go on being.
        self.events = Some(shell.events);
        self.claim = shell.claim;
        *self.sandbox.held.borrow_mut() = Some(Rc::clone(&shell.held));
        Event::Prepared
    }

    fn take_committed(&mut self, made: Committed) {
        self.committing = None;
        let Committed { manifest, layers, image } = made;
        if let Some(image) = image {
            self.shard.images.keep(&manifest.id, &image, None);
        }
        let is_pause = manifest.kind == SnapshotKind::Pause;
        // One that goes on after a snapshot of its disk has the memory that it had.
        if is_pause || manifest.has_memory() {
            let stays =
                |old: &mica_storage::Layer| layers.iter().any(|new| new.info().id == old.info().id);
            // The record of a pause is written already.
            self.record_is_old |= !is_pause && !self.memory.layers.iter().all(stays);
            self.memory.committed(layers);
        }
        self.made = Some(manifest);
    }

    fn take_copied(&mut self, copied: Result<Copied, CaptureError>) -> Event {
        match copied {
            Ok(Copied::All(capture)) => {
                self.capture = Some(Begun::Here(Box::new(capture)));
                Event::Copied
            }
            Ok(Copied::TooMuch(capture)) => {
                self.capture = Some(Begun::Here(Box::new(capture)));
                Event::TooMuch
            }
            Err(error) => self.copy_failed(&error),
        }
    }

    fn copy_failed(&mut self, error: &CaptureError) -> Event {
        self.memory.gave_up();
        let name = self.operation_name();
        self.failure = Some(capture_error(error, name, self.sandbox.id));
        Event::CopyFailed
    }

    fn take_replaced(&mut self, back: Result<Back, BackError>) -> Event {
        match back {
            Ok(back) => {
                self.back = Some(back);
                Event::Copied
            }
            Err(error) => {
                let broken = matches!(error, BackError::Broken(_));
                self.failure = Some(error.for_client(self.sandbox.id));
                match (broken, &self.request) {
                    (true, Some(Request::Rollback(snapshot, _))) => {
                        self.paused_in = Some(snapshot.clone());
                        Event::ReplaceBroke
                    }
                    _ => Event::CopyFailed,
                }
            }
        }
    }
}

/// A failed capture, for who asked for it.
pub(super) fn capture_error(
    error: &CaptureError,
    operation: &'static str,
    sandbox: mica_units::SandboxId,
) -> ShardError {
    match error {
        CaptureError::Storage(mica_storage::StorageError::NoSpace { .. }) => ShardError::NoSpace,
        CaptureError::Blocking(BlockingError::Full) => ShardError::Busy,
        error => ShardError::OperationFailed { operation, sandbox, reason: chain(error) },
    }
}
