//! Brings a host up and down.
//!
//! Called by the binary, once. Refuses to start on a machine that lacks what sandboxes need.
//!
//! ```text
//!  check ─▶ lock cgroup root ─▶ open store ─▶ recover ─▶ executors ─▶ take over ─▶ serve
//!  stop  ─▶ creates refused ─▶ serve ends ─▶ sandboxes killed or left ─▶ executors end
//! ```

use std::collections::BTreeSet;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use mica_numa::io::{Ring, RingConfig};
use mica_numa::latency::DenseLatency;
use mica_numa::mailbox::{Inbox, Mailbox, mailbox};
use mica_numa::rt;
use mica_numa::seat::{self, SeatError};
use mica_numa::watchdog::{Watchdog, Watching};
use mica_numa::{Placement, Plan, ShardSeat, StopSignal};
use mica_storage::{SnapshotKind, Store};
use mica_units::{PerShard, ShardCount, ShardId};

use crate::cgroup::Cgroups;
use crate::choice::Choice;
use crate::event::{ANSWERS_MAX, Address, Answer, REQUESTS_MAX, Request};
use crate::loads::Loads;
use crate::random::random;
use crate::recovery::{Survivor, recover};
use crate::rounds::MachineNodes;
use crate::sandbox::Workshop;
use crate::shard::{Place, Shard};
use crate::shell::demand::{Bounds, Demand};
use crate::shell::{Launcher, Pins, Pool, Size, empty_network, now_s};
use crate::takeover::Left;
use crate::uids::Uids;
use crate::{Host, HostConfig, RunError, hours, metrics, pressure, rounds, takeover, warmth};

/// A shard that does not turn for so long is told of.
const STALL_MIN: Duration = Duration::from_millis(5);

/// How long a shard stays awake for requests of others that come densely.
const WATCH_FOR_REQUESTS: Duration = Duration::from_micros(200);

/// What one seat starts with.
struct Input {
    base: Base,
    /// Notices when the shard does not turn.
    watchdog: Option<Watchdog>,
    /// Sandboxes of an earlier daemon that are this shard's.
    survivors: Vec<Survivor>,
    /// Creates that it was asked for under names that are this shard's.
    left: Vec<Left>,
    /// The first shard of its node.
    librarian: ShardId,
    addresses: PerShard<Address>,
    requests: Mailbox<Request>,
    answers: Mailbox<Answer>,
    loads: Arc<Loads>,
    placement: Placement,
}

/// What all shards, and the making of templates, need of a host.
#[derive(Clone, Debug)]
pub(crate) struct Base {
    pub(crate) workshop: Workshop,
    cgroups: Cgroups,
    /// The network namespace of all VM processes.
    netns: Arc<OwnedFd>,
    pins: Pins,
    /// Uids of processes that are taken over.
    pub(crate) taken: Arc<BTreeSet<u32>>,
}

impl Base {
    /// The pool of one shard, with what it remembers of demand.
    pub(crate) fn pool(
        &self,
        shard: ShardId,
        shards: ShardCount,
        placement: Placement,
        demand: Demand,
    ) -> Rc<Pool> {
        let config = &self.workshop.config;
        let size = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
        let bounds = Bounds { floor: size(config.pool_floor), ceiling: size(config.pool_ceiling) };
        // One for each sandbox, and as many again as pools may hold and graves may wait.
        let total = config.sandboxes_max.saturating_mul(2).saturating_add(1024);
        let uids = Uids::share(config.uid_first, total, shard, shards, &self.taken);
        let launcher = Launcher {
            config: Arc::clone(config),
            cgroups: self.cgroups.clone(),
            netns: Arc::clone(&self.netns),
            placement: Arc::new(placement),
            pins: self.pins.clone(),
        };
        Rc::new(Pool::new(launcher, bounds, uids, demand))
    }
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
    let (mut base, survivors) = open(config, plan)?;
    base.workshop.nodes = plan.vcpus.iter().map(|vcpus| (vcpus.node, vcpus.cpus.len())).collect();
    base.workshop.machine = Arc::new(MachineNodes::read());
    // Lives until all seats have ended.
    let watchdog = watchdog(&base.workshop.config);
    let inputs = inputs(plan, &base, survivors, watchdog.as_ref())?;
    let shards = plan.shard_count();
    let signal = stop.clone();
    let ran = seat::run_all(plan, inputs, &stop, move |seat: ShardSeat, input: Input| {
        let (serve, stop) = (serve.clone(), signal.clone());
        async move {
            let Input {
                base, watchdog, survivors, librarian, addresses, requests, answers, ..
            } = input;
            let Input { loads, placement, left, .. } = input;
            let ShardSeat { shard: id, core, node, memory_node } = seat;
            let place = Place { id, shards, node, memory_node, core, librarian };
            let (shard, templates) = match seat_shard(&base, place, placement, loads).await {
                Ok(made) => made,
                Err(error) => {
                    // The other shards must not go on without this one's sandboxes.
                    tracing::error!(shard = seat.shard.index(), %error, "a shard cannot start");
                    stop.stop();
                    return false;
                }
            };
            left.into_iter().for_each(|left| shard.memos.remember(left));
            let watching = watch(&shard, watchdog);
            let answers = answers.attach();
            let host = Host::new(Rc::clone(&shard), addresses.clone(), answers.lookout(), &stop);
            shard.set_host(Some(host.clone()));
            for survivor in survivors {
                takeover::take_over(&shard, survivor).await;
            }
            let tasks = [
                rt::spawn(take_requests(Rc::clone(&shard), addresses, requests)),
                rt::spawn(take_answers(host.clone(), answers)),
                rt::spawn(refuse_at_stop(Rc::clone(&shard), stop.clone())),
                rt::spawn(pressure::watch(Rc::clone(&shard), memory_node, stop.clone())),
                rt::spawn(rounds::keep(Rc::clone(&shard), stop.clone())),
                rt::spawn(hours::keep(Rc::clone(&shard), stop.clone())),
                rt::spawn(warmth::bring_in_all(Rc::clone(&shard), templates)),
            ];
            let pool = rt::spawn(Rc::clone(&shard.pool).keep());
            serve(host, stop.clone()).await;
            stop.stop();
            shard.drain().await;
            hours::write(&shard).await;
            // The executor would not drop what they hold.
            for task in tasks {
                task.end().await;
            }
            pool.end().await;
            shard.set_host(None);
            if let Some(watching) = watching {
                watching.end().await;
            }
            Rc::clone(&shard.ring).close().await;
            true
        }
    });
    if ran.is_ok()
        && let Err(error) = base.workshop.store.builds().end_at_stop()
    {
        let error = crate::sandbox::chain(&error);
        tracing::warn!(error, "builds that ran are not marked as over; the next start does it");
    }
    match ran {
        Ok(started) if started.iter().all(|started| *started) => Ok(()),
        Ok(_) => Err(RunError::Machine("a shard could not start; the log says why".into())),
        Err(SeatError::Panicked(shard)) => Err(RunError::Panicked(shard)),
        Err(error) => Err(RunError::Machine(Box::new(error))),
    }
}

/// Everything that can fail before a shard starts.
fn open(config: HostConfig, plan: &Plan) -> Result<(Base, Vec<Survivor>), RunError> {
    // First: its lock says that no other daemon's sandboxes are about to be killed.
    let (base, cgroups) = open_base(config, plan)?;
    let survivors = recover(&base.workshop.store, &cgroups)
        .map_err(|error| RunError::Machine(Box::new(error)))?;
    let uid = |survivor: &Survivor| Some(survivor.record.process.as_ref()?.uid);
    let taken = survivors.iter().filter(|survivor| survivor.alive).filter_map(uid).collect();
    Ok((Base { taken: Arc::new(taken), ..base }, survivors))
}

/// Checks the configuration and opens what it names.
pub(crate) fn open_base(config: HostConfig, plan: &Plan) -> Result<(Base, Cgroups), RunError> {
    config.check()?;
    check_program(&config).map_err(|error| {
        let program = config.vm_program.display();
        RunError::Config(format!("vm_program {program} cannot be run: {error}"))
    })?;
    let machine = |error| RunError::Machine(error);
    let cgroups = Cgroups::open(&config.cgroup_root, config.cgroup_limits_required)
        .map_err(|error| machine(Box::new(error)))?;
    let root = config.store_root.clone();
    let store = Store::open(&root)
        .map_err(|source| RunError::Store { path: root.clone(), source: Box::new(source) })?;
    // The first process of a VM ends at once, and its child becomes ours.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|error| machine(Box::new(error)))?;
    let netns = empty_network().map_err(|error| machine(Box::new(error)))?;
    let config = Arc::new(config);
    let workshop = Workshop { config, store, nodes: Arc::default(), machine: Arc::default() };
    let (netns, pins) = (Arc::new(netns), Pins::new(plan));
    let base = Base { workshop, cgroups: cgroups.clone(), netns, pins, taken: Arc::default() };
    Ok((base, cgroups))
}

/// Checks that the VM program can be run at all, at start and not at the first create.
fn check_program(config: &HostConfig) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = std::fs::File::open(&config.vm_program)?.metadata()?;
    let runnable = metadata.is_file() && metadata.permissions().mode() & 0o111 != 0;
    if runnable { Ok(()) } else { Err(std::io::Error::other("it is not an executable file")) }
}

/// Makes a shard on its seat, and keeps VM processes for every template from the start.
async fn seat_shard(
    base: &Base,
    place: Place,
    placement: Placement,
    loads: Arc<Loads>,
) -> Result<(Rc<Shard>, Vec<String>), String> {
    let buffers = base.workshop.config.io_buffers;
    let ring =
        Ring::attach(RingConfig { buffers }).map_err(|error| crate::sandbox::chain(&error))?;
    let (store, index) = (base.workshop.store.clone(), place.id.index());
    let found = rt::blocking(move || {
        let hours = hours::read(&store, index);
        let warm = store.select_snapshots(|manifest| {
            let disk = manifest.has_disk();
            let size = Size { vcpus: manifest.vcpus, memory: manifest.memory, disk };
            (manifest.kind == SnapshotKind::Template).then(|| (size, manifest.id.clone()))
        });
        warm.map(|warm| (warm, hours))
    });
    let (warm, hours) = found
        .await
        .map_err(|error| error.to_string())?
        .map_err(|error| crate::sandbox::chain(&error))?;
    let pool = base.pool(place.id, place.shards, placement, Demand::from_text(&hours, now_s()));
    let mut templates = Vec::with_capacity(warm.len());
    for (size, template) in warm {
        pool.want(size, &template);
        templates.push(template);
    }
    let mut seed = [0; 8];
    random(&mut seed).map_err(|error| error.to_string())?;
    let sandboxes_max = base.workshop.config.sandboxes_max;
    let choice =
        Choice::new(place.id, place.shards, sandboxes_max, loads, u64::from_le_bytes(seed))
            .map_err(|error| error.to_string())?;
    let limit_us = base.workshop.config.dense_latency_us;
    let awake = limit_us.map(DenseLatency::new).transpose();
    let awake =
        awake.map_err(|error| format!("/dev/cpu_dma_latency: {error}"))?.unwrap_or_default();
    let shard = Shard::new(place, base.workshop.clone(), pool, ring, choice, awake);
    Ok((Rc::new(shard), templates))
}

/// Connects every shard with every other.
fn inputs(
    plan: &Plan,
    base: &Base,
    survivors: Vec<Survivor>,
    watchdog: Option<&Watchdog>,
) -> Result<Vec<Input>, RunError> {
    let shards = plan.shard_count();
    let mut boxes = Vec::new();
    for _ in &plan.seats {
        let ends = mailbox(REQUESTS_MAX).and_then(|requests| Ok((requests, mailbox(ANSWERS_MAX)?)));
        boxes.push(ends.map_err(|error| RunError::Machine(Box::new(error)))?);
    }
    let loads = Loads::new(shards, |shard| first_of_node(plan, shard));
    let addresses = PerShard::from_fn(shards, |shard| {
        let ((requests, _), (answers, _)) = &boxes[usize::from(shard.index())];
        Address { requests: requests.clone(), answers: answers.clone() }
    });
    let mut left: Vec<Left> = survivors.iter().filter_map(Left::of).collect();
    left.sort_by_key(|left| std::cmp::Reverse(left.age));
    let mut left_by_shard = PerShard::from_fn(shards, |_| Vec::new());
    for left in left {
        left_by_shard[left.key.shard(shards)].push(left);
    }
    // The id says the shard: with another number of shards than before, another one takes over.
    let mut by_shard = PerShard::from_fn(shards, |_| Vec::new());
    for survivor in survivors {
        by_shard[survivor.id.shard(shards)].push(survivor);
    }
    let input = |(shard, ((_, requests), (_, answers)))| Input {
        base: base.clone(),
        watchdog: watchdog.cloned(),
        survivors: std::mem::take(&mut by_shard[ShardId::new(shard)]),
        left: std::mem::take(&mut left_by_shard[ShardId::new(shard)]),
        librarian: first_of_node(plan, ShardId::new(shard)),
        addresses: addresses.clone(),
        requests,
        answers,
        loads: Arc::clone(&loads),
        placement: Placement::of_node(plan, node_of(plan, ShardId::new(shard))),
    };
    Ok((0..).zip(boxes).map(input).collect())
}

/// The node of a shard, which has a seat.
fn node_of(plan: &Plan, shard: ShardId) -> u32 {
    let seat = plan.seats.iter().find(|seat| seat.shard == shard);
    seat.map_or(0, |seat| seat.node)
}

/// What notices shards that do not turn. The host does without where it cannot be had.
fn watchdog(config: &HostConfig) -> Option<Watchdog> {
    let started = config.metrics.then(|| Watchdog::start(STALL_MIN))?;
    started.inspect_err(|error| tracing::warn!(%error, "stalls of shards go unnoticed")).ok()
}

/// Sits the watchdog beside a shard.
fn watch(shard: &Shard, watchdog: Option<Watchdog>) -> Option<Watching> {
    let watching = watchdog?.sit(format!("shard-{}", shard.id.index()));
    let watching = watching
        .inspect_err(|error| tracing::warn!(%error, "stalls of a shard go unnoticed"))
        .ok()?;
    if shard.metrics.stalls.set(Arc::clone(watching.stalls())).is_err() {
        tracing::error!("a shard is watched twice");
    }
    Some(watching)
}

/// The first shard on the node of this one.
fn first_of_node(plan: &Plan, shard: ShardId) -> ShardId {
    let node = node_of(plan, shard);
    let first = plan.seats.iter().find(|seat| seat.node == node);
    first.map_or(shard, |seat| seat.shard)
}

/// Takes requests of other shards, each as its own task: one that waits for a boot must not hold
/// up the others. Their number is bounded by what the others may have outstanding.
async fn take_requests(shard: Rc<Shard>, addresses: PerShard<Address>, requests: Mailbox<Request>) {
    let mut inbox = requests.attach().watching(WATCH_FOR_REQUESTS);
    while let Some(Request { from, ticket, operation }) = inbox.next().await {
        metrics::add(&shard.metrics.taken, 1);
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

async fn take_answers(host: Host, mut answers: Inbox<Answer>) {
    while let Some(answer) = answers.next().await {
        host.answered(answer);
    }
}

async fn refuse_at_stop(shard: Rc<Shard>, stop: StopSignal) {
    stop.stopped().await;
    shard.refuse_creates();
}
