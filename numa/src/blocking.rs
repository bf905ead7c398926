//! Threads for what would block a shard: spawning, file systems, waiting for a process.
//!
//! Called by `shards` as `blocking(f).await`. Each seat has its own few threads, bound to the cores
//! of its node that run vCPUs or to the siblings of the shard's thread, never to the shard's own. They
//! are started before the seat pins itself. Refuses work beyond [`JOBS_MAX`].

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::thread::CpuSet;

use crate::mailbox::{Mailbox, Post, mailbox};
use crate::placement::{prefer_memory, set_of};
use crate::rt::{Task, oneshot};

/// Threads of one seat.
pub const THREADS_PER_SEAT: usize = 4;

/// Most jobs of one seat whose result the executor has not taken yet. So both queues, of jobs and
/// of results, have room for all that can come.
pub const JOBS_MAX: usize = 4096;

/// Why a job gave no result
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockingError {
    /// [`JOBS_MAX`] others are not done.
    #[error("too much blocking work waits on this shard; try again in a moment")]
    Full,
    /// The job panicked; the thread goes on.
    #[error("a blocking job panicked; its log line says where")]
    Panicked,
    /// The seat is ending, or this thread is no seat.
    #[error("this thread has no blocking threads (any more)")]
    NoSeat,
}

type Value = Box<dyn Any + Send>;
type Work = Box<dyn FnOnce() -> Option<Value> + Send>;

struct Job {
    id: u64,
    work: Work,
}

#[derive(Debug)]
struct Done {
    id: u64,
    value: Option<Value>,
}

/// A seat's threads, before its executor runs.
#[derive(Debug)]
pub(crate) struct Pool {
    jobs: SyncSender<Job>,
    done: Mailbox<Done>,
    threads: Vec<JoinHandle<()>>,
}

type Waiting = RefCell<HashMap<u64, oneshot::Sender<Option<Value>>>>;

/// The same, on the executor's thread.
struct Local {
    jobs: SyncSender<Job>,
    waiting: Rc<Waiting>,
    next_id: Cell<u64>,
}

thread_local! {
    static LOCAL: RefCell<Option<Rc<Local>>> = const { RefCell::new(None) };
}

/// Ends the threads, once their present jobs are done.
#[derive(Debug)]
pub(crate) struct Closer {
    threads: Vec<JoinHandle<()>>,
    results: Task<()>,
}

impl Pool {
    /// Starts the threads on `cpus`, with memory of a node.
    pub(crate) fn start(cpus: &[u32], memory_node: u32) -> io::Result<Self> {
        let (jobs, queue) = sync_channel(JOBS_MAX);
        let queue = Arc::new(Mutex::new(queue));
        let (post, done) = mailbox(JOBS_MAX)?;
        let set = set_of(&cpus.iter().copied().collect());
        let mut threads = Vec::with_capacity(THREADS_PER_SEAT);
        for _ in 0..THREADS_PER_SEAT {
            let (queue, post) = (Arc::clone(&queue), post.clone());
            let body = move || work(&queue, &post, &set, memory_node);
            threads.push(std::thread::Builder::new().name("blocking".to_owned()).spawn(body)?);
        }
        Ok(Self { jobs, done, threads })
    }

    /// Makes this thread's executor the one that the results go to. Call inside the executor.
    pub(crate) fn attach(self) -> Closer {
        let waiting = Rc::new(Waiting::default());
        // The task below must not hold `jobs`: the threads end when the last sender is gone.
        let local = Local { jobs: self.jobs, waiting: Rc::clone(&waiting), next_id: Cell::new(0) };
        LOCAL.with_borrow_mut(|slot| *slot = Some(Rc::new(local)));
        let mut done = self.done.attach();
        let results = crate::rt::spawn(async move {
            while let Some(Done { id, value }) = done.next().await {
                let waiter = waiting.borrow_mut().remove(&id);
                // Nobody may wait any more: the value is dropped then, and closes what it holds.
                if let Some(Err(unwanted)) = waiter.map(|waiter| waiter.send(value)) {
                    drop(unwanted);
                }
            }
        });
        Closer { threads: self.threads, results }
    }
}

impl Closer {
    /// Takes the pool from this executor, whose last work this is, and waits for the threads.
    pub(crate) async fn close(self) {
        self.results.end().await;
        LOCAL.with_borrow_mut(|slot| *slot = None);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a blocking thread panicked outside a job");
            }
        }
    }
}

fn work(queue: &Mutex<Receiver<Job>>, post: &Post<Done>, cpus: &CpuSet, memory_node: u32) {
    if let Err(error) = rustix::thread::sched_setaffinity(None, cpus) {
        tracing::warn!(%error, "a blocking thread is not bound to its node's cores");
    }
    prefer_memory(memory_node);
    loop {
        // Jobs run unlocked; one thread at a time waits for the next.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { id, work }) = job else { return };
        let value = catch_unwind(AssertUnwindSafe(work)).unwrap_or(None);
        if let Err(error) = post.send(Done { id, value }) {
            // Full cannot be: see JOBS_MAX. Closed: the seat is gone, and so is who asked.
            tracing::debug!(%error, "a blocking job outlived its seat");
        }
    }
}

/// Runs `work` on one of this seat's threads. Dropping the future does not stop the work; its
/// result is then dropped when it comes.
///
/// # Errors
/// See [`BlockingError`].
pub async fn blocking<T, F>(work: F) -> Result<T, BlockingError>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let local = LOCAL.with_borrow(Clone::clone).ok_or(BlockingError::NoSeat)?;
    if local.waiting.borrow().len() >= JOBS_MAX {
        return Err(BlockingError::Full);
    }
    let id = local.next_id.replace(local.next_id.get().wrapping_add(1));
    let work: Work = Box::new(move || Some(Box::new(work()) as Value));
    local.jobs.try_send(Job { id, work }).map_err(|error| match error {
        TrySendError::Full(_) => BlockingError::Full,
        TrySendError::Disconnected(_) => BlockingError::NoSeat,
    })?;
    // No await between the send and this line, so the result cannot come before its waiter.
    let (sender, receiver) = oneshot::channel();
    local.waiting.borrow_mut().insert(id, sender);
    // Kept over the wait, it would keep the threads from ending.
    drop(local);
    let value = receiver.await.ok_or(BlockingError::NoSeat)?.ok_or(BlockingError::Panicked)?;
    value.downcast().map(|value| *value).map_err(|_| BlockingError::Panicked)
}
