//! Everything that crosses from one shard to another, on one screen.
//!
//! Called by `host`, which sends requests, and `run`, which receives them. Refuses to carry anything
//! that is not owned: after a send the sender has nothing of it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime};

use mica_numa::mailbox::Post;
use mica_storage::LayerId;
use mica_units::{GuestPort, Mebibytes, SandboxId, ShardId, TenantId, VcpuCount};

use crate::memo::{Digest, Memo, MemoKey, MemoTicket};
use crate::metrics::{Asked, Measured};
use crate::replicas::NoCopy;
use crate::shell::PoolCounts;
use crate::{
    BuiltFor, ConnectError, CreateRequest, Epoch, LogLine, NetworkPolicy, OnTimeout, ProcessView,
    SandboxInfo, SandboxProcess, SandboxView, ShardError, ShardView, SnapshotInfo, Usage, Visitor,
    WrongNode,
};

/// Requests that wait in one shard's mailbox. One more is answered with `Busy` by the sender.
pub(crate) const REQUESTS_MAX: usize = 1024;

/// Requests of one shard that have no answer yet. One more is refused by the shard itself.
pub(crate) const OUTSTANDING_MAX: usize = 4096;

/// Answers that wait in one shard's mailbox: it has room for all that can come.
pub(crate) const ANSWERS_MAX: usize = OUTSTANDING_MAX;

const _: () = assert!(ANSWERS_MAX >= OUTSTANDING_MAX);

/// What a shard may be asked to do.
#[derive(Debug)]
pub(crate) enum Operation {
    /// Make this sandbox, whose id hashes to the shard asked. It was asked for at this moment.
    Create(SandboxId, Box<CreateRequest>, Asked),
    /// The same, as one of several copies.
    Copy(SandboxId, Box<CreateRequest>, Asked),
    /// Say whose a sandbox is, also one that is being made.
    TenantOf(SandboxId),
    /// Show a sandbox.
    Get(SandboxId),
    /// Show all of its sandboxes.
    List,
    /// Wake the builds that wait for another to be over.
    BuildOver,
    /// End a sandbox, and answer when nothing of it is left.
    Kill(SandboxId),
    /// Set its remaining time.
    SetTimeout(SandboxId, Duration),
    /// Make its remaining time at least so long.
    Extend(SandboxId, Duration),
    /// Say what was written about it.
    Logs(SandboxId),
    /// Keep what it used, if that is said, and say what it used before.
    Usage(SandboxId, Option<Usage>),
    /// Make a stream to its gateway, which is to go on to this port; or none, if one of this epoch is
    /// still good.
    Connect(SandboxId, GuestPort, Visitor, Option<Epoch>),
    /// Replace what its network is.
    SetNetwork(SandboxId, Box<NetworkPolicy>),
    /// Make a snapshot of it, of all or of its disk alone.
    Snapshot(SandboxId, Purpose, Keeps),
    /// Put it back to this snapshot of its own.
    Rollback(SandboxId, String),
    /// Pause it, keeping that.
    Pause(SandboxId, Keeps),
    /// Let a paused one go on.
    Resume(SandboxId, Wake),
    /// Say what a sandbox was asked for with.
    RequestOf(SandboxId),
    /// Say which process a sandbox is.
    ProcessOf(SandboxId),
    /// Say what of a sandbox is on the wrong node.
    WrongNode(SandboxId),
    /// Let the files of a deleted snapshot go.
    Forget(String),
    /// Say how many sandboxes it made from each template.
    Spawns,
    /// Say what it has, and what its pool did.
    Counts,
    /// Begin what is to be done once under this name.
    MemoBegin(MemoKey, Digest),
    /// Keep what came of it, or let the name go.
    MemoEnd(MemoKey, MemoTicket, Option<Vec<u8>>),
    /// Give the node's copy of this snapshot's base layer.
    Replica(String, LayerId),
    /// Say what it has counted.
    Measure,
    /// Say how it and its sandboxes are.
    View,
    /// Say what the processes of these sandboxes use.
    Uses(Vec<SandboxId>),
}

impl Operation {
    /// Whether a shard answers it from its own memory: without a file, a process or another shard. So too a
    /// visit, most of which find a sandbox that runs and cost one message to its process; the others are
    /// watched for in vain.
    pub(crate) fn is_at_hand(&self) -> bool {
        matches!(
            self,
            Self::TenantOf(_)
                | Self::Get(_)
                | Self::List
                | Self::Extend(..)
                | Self::Usage(..)
                | Self::Connect(..)
                | Self::RequestOf(_)
                | Self::ProcessOf(_)
                | Self::Spawns
                | Self::Counts
                | Self::MemoBegin(..)
                | Self::MemoEnd(..)
        )
    }
}

/// What a snapshot is made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A client's use, under this name.
    Client(Option<String>),
    /// Copies of the sandbox, and nothing after them.
    Copies,
    /// The sandboxes of a template that a client built.
    Built(BuiltFor),
}

/// A way into a guest.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Our end, nothing said on it yet. `None`: the one that the visitor has is as good.
    pub(crate) stream: Option<OwnedFd>,
    /// How long it is good.
    pub(crate) epoch: Epoch,
    /// What the guest's server is to see as `Host`.
    pub(crate) mask: Option<String>,
}

/// How a paused sandbox is to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wake {
    /// For at least so long; `None`: for as long as it was made for.
    pub(crate) life: Option<Duration>,
    /// What happens when its time is over; `None`: what was wished for before.
    pub(crate) on_timeout: Option<OnTimeout>,
    /// What if it runs.
    pub(crate) if_running: IfRunning,
    /// What of a paused one is wanted: of one that has its disk alone, that is all there is.
    pub(crate) from: Keeps,
    /// The size that it is to boot in, where that is not its own. Only of one that boots: in a memory that
    /// is kept there are as many vCPUs and pages as there were.
    pub(crate) size: Option<(VcpuCount, Mebibytes)>,
}

/// What a pause or a snapshot keeps, and what a resume goes on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keeps {
    /// Memory and disk.
    All,
    /// The disk alone.
    Disk,
}

/// What a resume makes of a sandbox that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IfRunning {
    /// An error.
    Refuse,
    /// Only its time is extended.
    Extend,
}

/// What it answers.
#[derive(Debug)]
pub(crate) enum Reply {
    /// To `Create`, `Copy` and `Get`.
    Sandbox(Result<Box<SandboxInfo>, ShardError>),
    /// To `TenantOf`.
    Tenant(Result<TenantId, ShardError>),
    /// To `MemoBegin`.
    Memo(Memo),
    /// To `List`.
    Sandboxes(Vec<SandboxInfo>),
    /// To `Resume`: the sandbox, and whether it was paused.
    Resumed(Result<(Box<SandboxInfo>, bool), ShardError>),
    /// To `Snapshot`.
    Snapshot(Result<Box<SnapshotInfo>, ShardError>),
    /// To `Logs`.
    Logs(Result<Vec<LogLine>, ShardError>),
    /// To `Usage`, oldest first.
    Usages(Result<Vec<Usage>, ShardError>),
    /// To `Kill`, `SetTimeout`, `Extend`, `SetNetwork`, `Rollback`, `Pause`,
    /// `Forget` and `MemoEnd`.
    Done(Result<(), ShardError>),
    /// To `Connect`.
    Stream(Result<Entry, ConnectError>),
    /// To `RequestOf`.
    Request(Result<Box<CreateRequest>, ShardError>),
    /// To `ProcessOf`.
    Process(Result<SandboxProcess, ShardError>),
    /// To `WrongNode`.
    WrongNode(Result<WrongNode, ShardError>),
    /// To `Spawns`, by template id.
    Spawns(BTreeMap<String, Spawned>),
    /// To `Counts`.
    Counts(Counts),
    /// To `Replica`; none where it does not fit, or why there is none.
    Replica(Result<Option<OwnedFd>, NoCopy>),
    /// To `Measure`.
    Measured(Box<Measured>),
    /// To `View`.
    View(Box<(ShardView, Vec<SandboxView>)>),
    /// To `Uses`; without those that have no process.
    Uses(BTreeMap<SandboxId, ProcessView>),
}

/// Numbers of one shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// What its pool did.
    pub(crate) pool: PoolCounts,
    /// VM processes that wait.
    pub(crate) shells: usize,
    /// Sandboxes, paused ones included.
    pub(crate) sandboxes: usize,
}

/// What one shard made of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spawned {
    /// How many sandboxes.
    pub(crate) count: u64,
    /// When the last.
    pub(crate) last: SystemTime,
}

/// One request on its way.
#[derive(Debug)]
pub(crate) struct Request {
    /// Who asks.
    pub(crate) from: ShardId,
    /// What the answer carries, so that the asker knows it again.
    pub(crate) ticket: u64,
    /// What is asked.
    pub(crate) operation: Operation,
}

/// One answer on its way back.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Of the request.
    pub(crate) ticket: u64,
    /// The answer.
    pub(crate) reply: Reply,
}

/// Where a shard can be reached.
#[derive(Clone, Debug)]
pub(crate) struct Address {
    /// Its mailbox for requests.
    pub(crate) requests: Post<Request>,
    /// Its mailbox for answers.
    pub(crate) answers: Post<Answer>,
}
