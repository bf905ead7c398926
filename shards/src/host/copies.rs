//! Sandboxes made from one that runs: clones, which come up whole or not at all, and forks.
//!
//! Called by `http` through [`Host`]. All copies of one request share one snapshot, which no list shows
//! and which goes when they are there; the next start removes one that was left. Refuses to leave
//! anything of a request whose client goes away: a task of its own carries it out, and takes back what
//! was made unless the answer is taken.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use futures_lite::FutureExt;
use mica_numa::rt::{self, Task, oneshot, time};
use mica_storage::{SnapshotKind, SnapshotManifest};
use mica_units::SandboxId;

use super::{Host, out_of_form};
use crate::event::{Keeps, Operation, Purpose, Reply};
use crate::metrics::{self, Phase, Stopwatch};
use crate::{CreateRequest, SandboxInfo, Seat, ShardError};

/// Most sandboxes of one clone or fork.
pub const CLONES_MAX: usize = 1000;

/// Between two tries to delete a snapshot, at first and at last.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LAST: Duration = Duration::from_secs(60);

/// What became of each copy.
type Copies = Vec<Result<SandboxInfo, ShardError>>;

/// The sandboxes that have come up so far.
type Made = Rc<RefCell<Vec<SandboxId>>>;

/// What to copy.
#[derive(Clone, Debug)]
struct Wish {
    source: SandboxId,
    count: usize,
    timeout: Option<Duration>,
    /// What counts them; empty where nobody counts.
    seats: Vec<Seat>,
    /// One that fails ends all others.
    whole: bool,
}

/// A create at work. Dropping this ends it, and what it made.
struct Creating {
    task: Task<()>,
    created: oneshot::Receiver<Result<SandboxInfo, ShardError>>,
}

impl Drop for Creating {
    fn drop(&mut self) {
        self.task.cancel();
    }
}

impl Host {
    /// Makes `count` sandboxes that start where this one is now, and which goes on: all or none.
    /// `timeout` is theirs; otherwise they live as long as this one was made for.
    ///
    /// # Errors
    /// See [`ShardError`]. No sandbox of it is left then.
    pub async fn clone_sandbox(
        &self,
        id: SandboxId,
        count: usize,
        timeout: Option<Duration>,
    ) -> Result<Vec<SandboxInfo>, ShardError> {
        self.clone_counted(id, count, timeout, Vec::new()).await
    }

    /// The same, each of them counted by one of `seats`.
    ///
    /// # Errors
    /// As [`Host::clone_sandbox`].
    pub async fn clone_counted(
        &self,
        id: SandboxId,
        count: usize,
        timeout: Option<Duration>,
        seats: Vec<Seat>,
    ) -> Result<Vec<SandboxInfo>, ShardError> {
        let copies = self.copy(Wish { source: id, count, timeout, seats, whole: true }).await?;
        copies.into_iter().collect()
    }

    /// The same, but each of them may fail for itself.
    ///
    /// # Errors
    /// When none could be tried: see [`ShardError`].
    pub async fn fork(
        &self,
        id: SandboxId,
        count: usize,
        timeout: Option<Duration>,
    ) -> Result<Vec<Result<SandboxInfo, ShardError>>, ShardError> {
        self.fork_counted(id, count, timeout, Vec::new()).await
    }

    /// The same, each of them counted by one of `seats`.
    ///
    /// # Errors
    /// As [`Host::fork`].
    pub async fn fork_counted(
        &self,
        id: SandboxId,
        count: usize,
        timeout: Option<Duration>,
        seats: Vec<Seat>,
    ) -> Result<Vec<Result<SandboxInfo, ShardError>>, ShardError> {
        self.copy(Wish { source: id, count, timeout, seats, whole: false }).await
    }

    /// Starts the task and waits for its answer. Dropped before that, it drops `taken`, which the
    /// task sees.
    async fn copy(&self, wish: Wish) -> Result<Copies, ShardError> {
        let metrics = &self.local().metrics;
        let mut watch = metrics.watch(metrics::Operation::Clone, wish.source);
        let (taken, verdict) = oneshot::channel();
        let (sender, answer) = oneshot::channel();
        let (host, source) = (self.clone(), wish.source);
        let laps = watch.clone();
        rt::spawn(async move { host.carry_out(wish, sender, verdict, &laps).await }).detach();
        let answer = answer.await.unwrap_or(Err(ShardError::ShuttingDown));
        metrics.end(&mut watch, answer.is_ok());
        if taken.send(()).is_err() {
            tracing::error!(%source, "making copies of a sandbox panicked");
        }
        answer
    }

    async fn carry_out(
        self,
        wish: Wish,
        answer: oneshot::Sender<Result<Copies, ShardError>>,
        mut verdict: oneshot::Receiver<()>,
        watch: &Stopwatch,
    ) {
        let (made, source) = (Made::default(), wish.source);
        let outcome = self.make(wish, &made, &mut verdict, watch).await;
        let wanted = answer.send(outcome).is_ok() && verdict.await.is_some();
        if !wanted {
            tracing::info!(%source, "who asked for copies of this sandbox is gone");
            self.end_all(&made).await;
        }
    }

    async fn make(
        &self,
        wish: Wish,
        made: &Made,
        verdict: &mut oneshot::Receiver<()>,
        watch: &Stopwatch,
    ) -> Result<Copies, ShardError> {
        let Wish { source, count, timeout, seats, whole } = wish;
        let mut request = match self.ask(self.owner(source), Operation::RequestOf(source)).await? {
            Reply::Request(result) => *result?,
            other => return Err(out_of_form(&other)),
        };
        let snapshot = self.snapshot_for(source, Purpose::Copies, Keeps::All).await?.id;
        watch.lap(Phase::Snapshot);
        request.template.clone_from(&snapshot);
        request.timeout = timeout.unwrap_or(request.timeout);
        let count = count.min(CLONES_MAX);
        let create = async { Ok(self.create_all(count, &request, seats, made).await) };
        let unwanted = async {
            verdict.await;
            Err(ShardError::ShuttingDown)
        };
        let copies = create.or(unwanted).await;
        // They hold the layers by links of their own. Nobody waits for a device to forget it.
        let host = self.clone();
        rt::spawn(async move { host.delete_passing(&snapshot).await }).detach();
        let copies = copies?;
        let failure = copies.iter().find_map(|copy| copy.as_ref().err());
        match failure.filter(|_| whole) {
            Some(failure) => {
                let failure = failure.clone();
                self.end_all(made).await;
                Err(failure)
            }
            None => Ok(copies),
        }
    }

    /// Deletes what copies were started from: it takes room, and nobody else can see it.
    async fn delete_passing(&self, snapshot: &str) {
        let mut pause = RETRY_FIRST;
        loop {
            let is_copies = |manifest: &SnapshotManifest| manifest.kind == SnapshotKind::Copies;
            match self.delete_if(snapshot, is_copies).await {
                Ok(_) | Err(ShardError::ShuttingDown) => return,
                Err(ShardError::Busy) => {}
                Err(error) => {
                    let again_s = pause.as_secs_f32();
                    tracing::error!(snapshot, %error, again_s, "a snapshot of nobody's stays for now");
                }
            }
            time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_LAST);
        }
    }

    /// Starts all at once; each shard takes what it is given.
    async fn create_all(
        &self,
        count: usize,
        request: &CreateRequest,
        seats: Vec<Seat>,
        made: &Made,
    ) -> Copies {
        let mut seats = seats.into_iter();
        let start = |_| {
            let request = CreateRequest { seat: seats.next(), ..request.clone() };
            let (host, made) = (self.clone(), Rc::clone(made));
            let (sender, created) = oneshot::channel();
            let task = rt::spawn(async move {
                let created = host.one_create().copy(request).await;
                made.borrow_mut().extend(created.as_ref().map(|info| info.id));
                // Unheard, it is in `made`, and ended with the others.
                drop(sender.send(created));
            });
            Creating { task, created }
        };
        let mut started: Vec<Creating> = (0..count).map(start).collect();
        let mut copies = Vec::with_capacity(count);
        for creating in &mut started {
            let copy = (&mut creating.created).await;
            copies.push(copy.unwrap_or(Err(ShardError::ShuttingDown)));
        }
        copies
    }

    /// Ends what was made, all at once, and waits until nothing of it is left.
    async fn end_all(&self, made: &Made) {
        let ids = std::mem::take(&mut *made.borrow_mut());
        let end = |id| {
            let host = self.clone();
            rt::spawn(async move { host.end_unwanted(id).await })
        };
        let ends: Vec<_> = ids.into_iter().map(end).collect();
        for end in ends {
            if end.join().await.is_none() {
                tracing::error!("ending an unwanted sandbox panicked");
            }
        }
    }
}
