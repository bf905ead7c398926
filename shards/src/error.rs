//! Everything that can go wrong for a caller, by what the caller can do about it.
//!
//! Called by `http`, where one function maps these to status codes, and by the binary. Refuses
//! free text where a caller must branch.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mica_units::{GuestPort, SandboxId};

/// Why an operation on sandboxes or templates failed. `Clone` and `Send`, for it crosses shards.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ShardError {
    /// It never was, was killed, timed out, or ended by itself.
    #[error("sandbox {0} does not exist")]
    NoSuchSandbox(SandboxId),
    /// Neither an id nor a name of a template.
    #[error("template {0:?} does not exist; list the templates for what does")]
    NoSuchTemplate(String),
    /// The template was never started and frozen, so nothing can be restored from it.
    #[error("template {0:?} has no running snapshot; run `mica template warm {0}` on this host")]
    TemplateNotWarm(String),
    /// No snapshot of that id.
    #[error("snapshot {0:?} does not exist")]
    NoSuchSnapshot(String),
    /// The snapshot is of another sandbox, so this one cannot go back to it.
    #[error(
        "snapshot {snapshot:?} is not of sandbox {sandbox}; a rollback goes to one of its own \
         snapshots"
    )]
    ForeignSnapshot {
        /// What was asked for.
        snapshot: String,
        /// Who cannot go there.
        sandbox: SandboxId,
    },
    /// A sandbox cannot go back in place to a snapshot that would have to boot.
    #[error(
        "snapshot {0:?} is of a disk alone, and a rollback needs the memory as well; make a sandbox from it"
    )]
    SnapshotOfDisk(String),
    /// Another operation has the sandbox just now.
    #[error("sandbox {sandbox} is busy: {doing}; try again when that is done")]
    Conflict {
        /// Which.
        sandbox: SandboxId,
        /// What is going on.
        doing: &'static str,
    },
    /// It is paused already.
    #[error("Error pausing sandbox - sandbox '{0}' is already paused")]
    AlreadyPaused(SandboxId),
    /// It runs already.
    #[error("sandbox '{0}' is already running")]
    AlreadyRunning(SandboxId),
    /// It is paused, and what was asked needs it to run.
    #[error("sandbox {0} is paused; resume it first")]
    IsPaused(SandboxId),
    /// Without its memory it would have to boot, and cannot.
    #[error("sandbox {sandbox} cannot go on from its disk alone: {why}")]
    CannotBoot {
        /// Which.
        sandbox: SandboxId,
        /// Why not.
        why: &'static str,
    },
    /// The store's file system is full. Nothing was changed.
    #[error("the host's disk is full; delete snapshots or sandboxes, or enlarge the store")]
    NoSpace,
    /// An operation on a running sandbox failed; the sandbox goes on as it was.
    #[error("{operation} of sandbox {sandbox} failed: {reason}")]
    OperationFailed {
        /// What was asked.
        operation: &'static str,
        /// Of which sandbox.
        sandbox: SandboxId,
        /// Why it did not work.
        reason: String,
    },
    /// A queue between shards is full.
    #[error("the host is too busy; try again in a moment")]
    Busy,
    /// `sandboxes_max` of them run already.
    #[error(
        "this host already runs {sandboxes_max} sandboxes, as many as it may; kill one, or raise \
         sandboxes_max"
    )]
    AtCapacity {
        /// The bound.
        sandboxes_max: u32,
    },
    /// The sandbox did not come up. Nothing of it is left.
    #[error("the sandbox did not start: {reason}")]
    BootFailed {
        /// The step that failed and why.
        reason: String,
        /// The end of what the guest wrote to its console, printable characters only.
        console_tail: String,
    },
    /// The sandbox was not ready in time. Nothing of it is left.
    #[error("the sandbox was not ready within {} s, while {step}", .deadline.as_secs())]
    BootTimedOut {
        /// What it was waiting for.
        step: &'static str,
        /// The bound: `boot_deadline`.
        deadline: Duration,
        /// The end of what the guest wrote to its console, printable characters only.
        console_tail: String,
    },
    /// It was killed while it was being made.
    #[error("sandbox {0} was killed while it was starting")]
    KilledDuringCreate(SandboxId),
    /// The template store failed.
    #[error("{operation} failed in the template store")]
    Storage {
        /// What was being done.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The daemon is draining.
    #[error("the host is shutting down")]
    ShuttingDown,
}

/// Why there is no stream to a port of a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// As [`ShardError::NoSuchSandbox`].
    #[error("sandbox {0} does not exist")]
    NoSuchSandbox(SandboxId),
    /// It is paused, or on its way there or back.
    #[error("sandbox {0} is paused")]
    IsPaused(SandboxId),
    /// It is paused, a request for it wakes it, and this one could not.
    #[error("sandbox {sandbox} could not be resumed: {reason}")]
    NotWoken {
        /// Which.
        sandbox: SandboxId,
        /// Why it did not come up, or not in time.
        reason: String,
    },
    /// Its ports are not public, and the visitor's token is not its.
    #[error("sandbox {0} takes no visitor without its traffic token")]
    NotAdmitted(SandboxId),
    /// Nothing listens there, in a guest that answers.
    #[error("nothing listens on port {0} of the sandbox")]
    PortNotOpen(GuestPort),
    /// The guest did not answer, or not in form, within the deadline.
    #[error("the sandbox does not answer")]
    Unreachable,
    /// A queue is full.
    #[error("the host is too busy; try again in a moment")]
    Busy,
}

/// Why the host does not come up, or went down other than by its stop signal.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A number in the configuration is out of bounds.
    #[error("configuration: {0}")]
    Config(String),
    /// The template store does not open.
    #[error("cannot use the store at {}", path.display())]
    Store {
        /// Its root.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The machine lacks something: cgroups, io_uring, locked memory, a core.
    #[error("this machine is not ready to host sandboxes")]
    Machine(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A shard's thread panicked. All others were stopped.
    #[error("shard {0} panicked; its log line says where")]
    Panicked(u16),
}
