//! What clients ask of a sandbox, and where their answers go.
//!
//! Made by `shard`, answered by the driver. Refuses to keep an answer that nobody waits for.

use mica_numa::rt::oneshot::Sender;

use super::state::{Ask, Refusal};
use crate::event::{Keeps, Purpose, Wake};
use crate::{SandboxInfo, ShardError, SnapshotInfo};

/// The answer to a resume: the sandbox, and whether it was paused.
pub(crate) type Resumed = Result<(Box<SandboxInfo>, bool), ShardError>;

/// One request.
#[derive(Debug)]
pub(crate) enum Request {
    /// A snapshot, of all or of the disk alone.
    Snapshot(Purpose, Keeps, Sender<Result<Box<SnapshotInfo>, ShardError>>),
    /// To go back to a snapshot.
    Rollback(String, Sender<Result<(), ShardError>>),
    /// To be paused.
    Pause(Keeps, Sender<Result<(), ShardError>>),
    /// To go on.
    Resume(Wake, Sender<Resumed>),
}

impl Request {
    /// As the state machine knows it.
    pub(crate) fn kind(&self) -> Ask {
        match self {
            Self::Snapshot(_, Keeps::All, _) => Ask::Snapshot,
            Self::Snapshot(_, Keeps::Disk, _) => Ask::SnapshotDisk,
            Self::Rollback(..) => Ask::Rollback,
            Self::Pause(Keeps::All, _) => Ask::Pause,
            Self::Pause(Keeps::Disk, _) => Ask::PauseToDisk,
            Self::Resume(Wake { from: Keeps::All, .. }, _) => Ask::Resume,
            Self::Resume(Wake { from: Keeps::Disk, .. }, _) => Ask::Boot,
        }
    }

    /// A word for errors.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Snapshot(..) => "a snapshot",
            Self::Rollback(..) => "a rollback",
            Self::Pause(..) => "a pause",
            Self::Resume(..) => "a resume",
        }
    }

    /// Answers that it did not happen.
    pub(crate) fn fail(self, error: ShardError) {
        let heard = match self {
            Self::Snapshot(.., sender) => sender.send(Err(error)).is_ok(),
            Self::Rollback(_, sender) | Self::Pause(_, sender) => sender.send(Err(error)).is_ok(),
            Self::Resume(_, sender) => sender.send(Err(error)).is_ok(),
        };
        if !heard {
            tracing::debug!("nobody waits for the failure of an operation");
        }
    }
}

/// The error that a refusal is.
pub(crate) fn error_of(refusal: Refusal, sandbox: mica_units::SandboxId) -> ShardError {
    match refusal {
        Refusal::Busy(doing) => ShardError::Conflict { sandbox, doing },
        Refusal::IsPaused => ShardError::IsPaused(sandbox),
        Refusal::AlreadyPaused => ShardError::AlreadyPaused(sandbox),
        Refusal::AlreadyRunning => ShardError::AlreadyRunning(sandbox),
        Refusal::Gone => ShardError::NoSuchSandbox(sandbox),
    }
}
