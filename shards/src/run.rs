//! Brings a host up and down.
//!
//! Called by the binary, once. Refuses to start on a machine that lacks what sandboxes need.
//!
//! ```text
//!  check ─▶ lock cgroup root ─▶ kill leftovers ─▶ open store ─▶ sweep disks ─▶ executors ─▶ serve
//!  stop  ─▶ creates refused ─▶ serve ends ─▶ sandboxes killed ─▶ executors end
//! ```

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use mica_numa::mailbox::{Mailbox, mailbox};
use mica_numa::rt;
use mica_numa::seat::{self, SeatError};
use mica_numa::{Plan, ShardSeat, StopSignal};
use mica_storage::Store;
use mica_units::PerShard;

use crate::cgroup::Cgroups;
use crate::event::{ANSWERS_MAX, Address, Answer, REQUESTS_MAX, Request};
use crate::sandbox::{Workshop, check_program};
use crate::shard::{Loads, Shard};
use crate::{Host, HostConfig, RunError};

/// What one seat starts with.
struct Input {
    workshop: Workshop,
    addresses: PerShard<Address>,
    requests: Mailbox<Request>,
    answers: Mailbox<Answer>,
    loads: Loads,
}

/// Runs the host until `stop`: one executor for each seat of `plan`, and on each `serve`. Where
/// `serve` ends before the stop signal, it gives it. Blocks the calling thread.
///
/// # Errors
/// See [`RunError`].
pub fn run<S, F>(
    plan: &Plan,
    config: HostConfig,
    stop: StopSignal,
    serve: S,
) -> Result<(), RunError>
where
    S: Fn(Host, StopSignal) -> F + Clone + Send + 'static,
    F: Future<Output = ()> + 'static,
{
    config.check()?;
    let workshop = open(config)?;
    let inputs = inputs(plan, &workshop)?;
    let shards = plan.shard_count();
    let signal = stop.clone();
    let ran = seat::run_all(plan, inputs, &stop, move |seat: ShardSeat, input: Input| {
        let (serve, stop) = (serve.clone(), signal.clone());
        async move {
            let Input { workshop, addresses, requests, answers, loads } = input;
            let shard = Rc::new(Shard::new(seat.shard, shards, workshop, loads));
            let host = Host::new(Rc::clone(&shard), addresses.clone());
            let tasks = [
                rt::spawn(take_requests(Rc::clone(&shard), addresses, requests)),
                rt::spawn(take_answers(host.clone(), answers)),
                rt::spawn(refuse_at_stop(Rc::clone(&shard), stop.clone())),
            ];
            serve(host, stop.clone()).await;
            stop.stop();
            shard.drain().await;
            // The executor would not drop what they hold.
            for task in tasks {
                task.end().await;
            }
        }
    });
    match ran {
        Ok(_) => Ok(()),
        Err(SeatError::Panicked(shard)) => Err(RunError::Panicked(shard)),
        Err(error) => Err(RunError::Machine(Box::new(error))),
    }
}

/// Everything that can fail before a shard starts.
fn open(config: HostConfig) -> Result<Workshop, RunError> {
    check_program(&config).map_err(|error| {
        let program = config.vm_program.display();
        RunError::Config(format!("vm_program {program} cannot be run: {error}"))
    })?;
    // First: its lock says that no other daemon's sandboxes are about to be killed.
    let machine = |error| RunError::Machine(Box::new(error));
    let cgroups = Cgroups::open(&config.cgroup_root, config.cgroup_limits_required);
    let cgroups = cgroups.map_err(machine)?;
    let killed = cgroups.sweep().map_err(machine)?;
    let root = config.store_root.clone();
    let unusable = |source| RunError::Store { path: root.clone(), source: Box::new(source) };
    let store = Store::open(&root).map_err(unusable)?;
    let disks = store.sweep_sandboxes().map_err(unusable)?;
    if killed + disks > 0 {
        tracing::info!(killed, disks, "removed what an earlier run left");
    }
    Ok(Workshop { config: Arc::new(config), store, cgroups })
}

/// Connects every shard with every other.
fn inputs(plan: &Plan, workshop: &Workshop) -> Result<Vec<Input>, RunError> {
    let shards = plan.shard_count();
    let mut boxes = Vec::new();
    for _ in &plan.seats {
        let ends = mailbox(REQUESTS_MAX).and_then(|requests| Ok((requests, mailbox(ANSWERS_MAX)?)));
        boxes.push(ends.map_err(|error| RunError::Machine(Box::new(error)))?);
    }
    let loads: Loads = Arc::new(PerShard::from_fn(shards, |_| AtomicU32::new(0)));
    let addresses = PerShard::from_fn(shards, |shard| {
        let ((requests, _), (answers, _)) = &boxes[usize::from(shard.index())];
        Address { requests: requests.clone(), answers: answers.clone() }
    });
    let input = |((_, requests), (_, answers))| Input {
        workshop: workshop.clone(),
        addresses: addresses.clone(),
        requests,
        answers,
        loads: Arc::clone(&loads),
    };
    Ok(boxes.into_iter().map(input).collect())
}

/// Takes requests of other shards, each as its own task: one that waits for a boot must not hold
/// up the others. Their number is bounded by what the others may have outstanding.
async fn take_requests(shard: Rc<Shard>, addresses: PerShard<Address>, requests: Mailbox<Request>) {
    let mut inbox = requests.attach();
    while let Some(Request { from, ticket, operation }) = inbox.next().await {
        let (shard, post) = (Rc::clone(&shard), addresses[from].answers.clone());
        rt::spawn(async move {
            let reply = shard.perform(operation).await;
            if let Err(returned) = post.send(Answer { ticket, reply }) {
                // Full cannot be: see ANSWERS_MAX. Closed: who asked has ended.
                tracing::debug!(%returned, "an answer has no taker");
            }
        })
        .detach();
    }
}

async fn take_answers(host: Host, answers: Mailbox<Answer>) {
    let mut inbox = answers.attach();
    while let Some(answer) = inbox.next().await {
        host.answered(answer);
    }
}

async fn refuse_at_stop(shard: Rc<Shard>, stop: StopSignal) {
    stop.stopped().await;
    shard.refuse_creates();
}
