//! The shells of one shard that wait for a guest, for each size.
//!
//! Called by the driver to take one and to give a spent one back for burial, and by the shard, which
//! runs [`Pool::keep`]. An empty pool builds on the path of who asks, and counts it. Refuses more
//! shells than the ceiling, and more builds at once than [`BUILDS_MAX`].

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mica_numa::rt::{self, BlockingError, time};
use mica_numa::{Placement, VcpuPin};
use mica_units::{Durations, SANDBOX_ID_CHARS, SandboxId};
use mica_wire::vm;

use super::demand::{Bounds, Demand};
use super::{Held, Launched, Launcher, Shell, Size, VmProcess, pins};
use crate::random::random;
use crate::sandbox::{Events, send};
use crate::uids::Uids;

/// Shells that the pool makes at the same time, beside those that a create waits for.
const BUILDS_MAX: usize = 2;

/// How long a process may take to become a shell.
const BUILD_DEADLINE: Duration = Duration::from_secs(30);

/// How often the pool looks at the hour, and lets one shell too many go.
const REVIEW_EVERY: Duration = Duration::from_secs(5);

/// How long making shells for a burst takes, as far as the pool plans for it.
const REFILL_S: f64 = 2.0;

/// Least time between two tries when shells cannot be made.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// Why there is no shell.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoShell {
    /// Every uid is taken.
    #[error("this shard has as many VM processes as it may")]
    Full,
    /// No blocking thread has room.
    #[error("too much work waits")]
    Busy,
    /// It could not be made.
    #[error("{0}")]
    Failed(String),
}

/// What the pool did since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PoolCounts {
    /// Shells that were there when asked for.
    pub(crate) hits: u64,
    /// Shells that had to be made on the path.
    pub(crate) misses: u64,
}

/// Held while the guest of a shell that was taken is coming up. Making the next shell takes more of a
/// processor than bringing a guest up, so it waits until then.
#[derive(Debug)]
pub(crate) struct Claim(Rc<Pool>);

impl Claim {
    fn new(pool: &Rc<Pool>) -> Self {
        pool.claims.set(pool.claims.get() + 1);
        Self(Rc::clone(pool))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.claims.set(self.0.claims.get().saturating_sub(1));
        self.0.nudge();
    }
}

/// The pool.
#[derive(Debug)]
pub(crate) struct Pool {
    launcher: Launcher,
    bounds: Bounds,
    uids: RefCell<Uids>,
    ready: RefCell<BTreeMap<Size, VecDeque<Shell>>>,
    /// Sizes to keep shells of, and the templates that want them.
    wanted: RefCell<BTreeMap<Size, BTreeSet<String>>>,
    building: RefCell<BTreeMap<Size, usize>>,
    demand: RefCell<Demand>,
    counts: Cell<PoolCounts>,
    /// How long shells took to be made.
    spawns: Durations,
    /// Guests that are coming up.
    claims: Cell<usize>,
    closed: Cell<bool>,
    /// How often something changed, and who waits for the next time: the keeper, and who closes.
    nudges: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Pool {
    /// A pool without shells yet.
    pub(crate) fn new(launcher: Launcher, bounds: Bounds, uids: Uids, demand: Demand) -> Self {
        Self {
            launcher,
            bounds,
            uids: RefCell::new(uids),
            ready: RefCell::default(),
            wanted: RefCell::default(),
            building: RefCell::default(),
            demand: RefCell::new(demand),
            counts: Cell::default(),
            spawns: Durations::default(),
            claims: Cell::new(0),
            closed: Cell::new(false),
            nudges: Cell::default(),
            waiting: RefCell::default(),
        }
    }

    /// What it did.
    pub(crate) fn counts(&self) -> PoolCounts {
        self.counts.get()
    }

    /// How long shells took to be made.
    pub(crate) fn spawns(&self) -> &Durations {
        &self.spawns
    }

    /// Shells that are being made for it.
    pub(crate) fn building(&self) -> usize {
        self.building.borrow().values().sum()
    }

    /// Shells that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.ready.borrow().values().map(VecDeque::len).sum()
    }

    /// The hours of demand, to be kept.
    pub(crate) fn demand_text(&self) -> String {
        self.demand.borrow().to_text()
    }

    /// From now on shells of this size are kept for this template.
    pub(crate) fn want(&self, size: Size, template: &str) {
        let mut wanted = self.wanted.borrow_mut();
        if wanted.entry(size).or_default().insert(template.to_owned()) {
            self.nudge();
        }
    }

    /// A shell: one that waits, or one made now.
    pub(crate) async fn take(
        self: &Rc<Self>,
        size: Size,
        template: &str,
    ) -> Result<Shell, NoShell> {
        self.demand.borrow_mut().record(template, now_s());
        self.want(size, template);
        self.take_once(size).await
    }

    /// The same where no other guest of this size is to be expected: no shell is kept for one.
    pub(crate) async fn take_once(self: &Rc<Self>, size: Size) -> Result<Shell, NoShell> {
        let mut counts = self.counts.get();
        loop {
            let waiting = self.ready.borrow_mut().get_mut(&size).and_then(VecDeque::pop_front);
            let Some(shell) = waiting else { break };
            if shell.held.process.is_alive() {
                counts.hits += 1;
                self.counts.set(counts);
                let claim = Claim::new(self);
                self.pin(&shell.held).await;
                return Ok(Shell { claim: Some(claim), ..shell });
            }
            self.nudge();
            tracing::warn!(name = %shell.held.name, "a shell died while it waited");
            self.bury(shell.held);
        }
        counts.misses += 1;
        self.counts.set(counts);
        let claim = Claim::new(self);
        let shell = self.build(size).await?;
        self.pin(&shell.held).await;
        Ok(Shell { claim: Some(claim), ..shell })
    }

    /// Where the processes of this pool run, and where their memory comes from.
    pub(crate) fn placement(&self) -> &Placement {
        &self.launcher.placement
    }

    /// Gives each vCPU of a process that is about to have a guest its hardware thread, where the plan
    /// wants that. Not before: shells that wait run nothing.
    pub(crate) async fn pin(&self, held: &Held) {
        let placement = self.placement();
        if placement.pin != VcpuPin::Core {
            return;
        }
        let (pins, among) = (self.launcher.pins.clone(), placement.near_cpus.clone());
        let pid = held.process.pid();
        let name = held.name;
        match rt::blocking(move || pins::pin_vcpus(&pins, &among, pid)).await {
            Ok(Ok(pinned)) => *held.pinned.borrow_mut() = Some(pinned),
            Ok(Err(error)) => tracing::warn!(%name, %error, "vCPUs run on any core of their node"),
            Err(error) => tracing::warn!(%name, %error, "vCPUs run on any core of their node"),
        }
    }

    /// Makes a shell.
    async fn build(self: &Rc<Self>, size: Size) -> Result<Shell, NoShell> {
        let began = Instant::now();
        let uid = self.uids.borrow_mut().take().ok_or(NoShell::Full)?;
        let name = match draw_name() {
            Ok(name) => name,
            Err(why) => {
                self.uids.borrow_mut().give_back(uid);
                return Err(NoShell::Failed(why));
            }
        };
        let launcher = self.launcher.clone();
        let launched = match rt::blocking(move || launcher.launch(name, uid, size)).await {
            Ok(Ok(launched)) => launched,
            Ok(Err(error)) => {
                if !error.leaves_process {
                    self.uids.borrow_mut().give_back(uid);
                }
                return Err(NoShell::Failed(crate::sandbox::chain(&error)));
            }
            Err(error @ BlockingError::Panicked) => {
                // Nobody knows how far it came.
                self.take_back(name, uid).await;
                return Err(NoShell::Failed(error.to_string()));
            }
            Err(error) => {
                self.uids.borrow_mut().give_back(uid);
                return Err(match error {
                    BlockingError::Full => NoShell::Busy,
                    other => NoShell::Failed(other.to_string()),
                });
            }
        };
        let shell = self.finish(launched).await?;
        self.spawns.record(began.elapsed());
        Ok(shell)
    }

    /// Waits until the process says that it is a shell. Only called from tasks that are not dropped.
    async fn finish(self: &Rc<Self>, launched: Launched) -> Result<Shell, NoShell> {
        let command = launched.command();
        let build = async {
            let mut events = Events::new(&launched.control).map_err(|error| error.to_string())?;
            send(&launched.control, &command, &launched.fds())
                .await
                .map_err(|error| crate::sandbox::chain(&error))?;
            let layout = wait_built(&mut events).await?;
            Ok((layout, events))
        };
        let patience = BUILD_DEADLINE.min(self.launcher.config.boot_deadline);
        let built = time::timeout(patience, build).await;
        let built = built.unwrap_or_else(|_| Err("it took too long".to_owned()));
        let Launched { name, uid, process, control, console, exchange, .. } = launched;
        match built {
            Ok((layout, events)) => {
                let held = Held {
                    name,
                    uid,
                    process,
                    control,
                    console,
                    exchange,
                    layout,
                    pinned: RefCell::new(None),
                    taken_back: Cell::new(false),
                };
                Ok(Shell { held: Rc::new(held), events, claim: None })
            }
            Err(why) => {
                let complaint = process.complaint();
                let pool = Rc::clone(self);
                rt::spawn(async move { pool.end_process(name, uid, &process).await }).detach();
                let separator = if complaint.is_empty() { "" } else { "; it wrote: " };
                Err(NoShell::Failed(format!("making a shell: {why}{separator}{complaint}")))
            }
        }
    }

    /// Ends a process and takes everything of it back, off the path.
    pub(crate) fn bury(self: &Rc<Self>, held: Rc<Held>) {
        let pool = Rc::clone(self);
        rt::spawn(async move { pool.end(&held).await }).detach();
    }

    /// The same, and waits until nothing of it is left. Whether its uid can be used again.
    pub(crate) async fn end(&self, held: &Held) -> bool {
        // Who was dropped while he waited for this may be followed by another.
        if held.taken_back.get() {
            return true;
        }
        let safe = self.end_process(held.name, held.uid, &held.process).await;
        held.taken_back.set(safe);
        *held.pinned.borrow_mut() = None;
        safe
    }

    async fn end_process(&self, name: SandboxId, uid: u32, process: &VmProcess) -> bool {
        process.end(&name).await;
        self.take_back(name, uid).await
    }

    /// Kills what is left of a process that nobody holds, and takes its cgroup and uid back. Whether
    /// its uid can be used again.
    pub(crate) async fn take_back(&self, name: SandboxId, uid: u32) -> bool {
        loop {
            let launcher = self.launcher.clone();
            match rt::blocking(move || launcher.take_back(&name)).await {
                // It must be done, whatever else waits.
                Err(BlockingError::Full) => time::sleep(Duration::from_millis(50)).await,
                Ok(Ok(())) => {
                    self.uids.borrow_mut().give_back(uid);
                    return true;
                }
                Ok(Err(error)) => {
                    let error = crate::sandbox::chain(&error);
                    tracing::error!(%name, uid, error, "a VM process leaves its cgroup and uid");
                    return false;
                }
                Err(error) => {
                    tracing::error!(%name, uid, %error, "a VM process leaves its cgroup and uid");
                    return false;
                }
            }
        }
    }

    /// Keeps as many shells as demand wants, until it is closed. Runs on the shard as its own task.
    pub(crate) async fn keep(self: Rc<Self>) {
        let mut seen = 0;
        while !self.closed.get() {
            let missing = self.missing();
            for size in &missing {
                let (pool, size) = (Rc::clone(&self), *size);
                *pool.building.borrow_mut().entry(size).or_default() += 1;
                rt::spawn(async move { pool.build_for_pool(size).await }).detach();
            }
            if missing.is_empty() {
                self.let_one_go();
            }
            // A nudge, or the next look at the hour: both lead to the top.
            match time::timeout(REVIEW_EVERY, self.nudged(&mut seen)).await {
                Ok(()) | Err(time::Elapsed) => {}
            }
        }
    }

    async fn build_for_pool(self: Rc<Self>, size: Size) {
        let built = self.build(size).await;
        match built {
            Ok(shell) if self.closed.get() => {
                self.end(&shell.held).await;
            }
            Ok(shell) => self.ready.borrow_mut().entry(size).or_default().push_back(shell),
            Err(error) => {
                tracing::warn!(%size, %error, "no shell for the pool; trying again");
                time::sleep(RETRY_AFTER).await;
            }
        }
        if let Some(building) = self.building.borrow_mut().get_mut(&size) {
            *building = building.saturating_sub(1);
        }
        self.nudge();
    }

    /// Sizes to start building now, one entry for each shell.
    fn missing(&self) -> Vec<Size> {
        let building = self.building.borrow();
        let mut room = BUILDS_MAX.saturating_sub(building.values().sum());
        let mut missing = Vec::new();
        for (size, templates) in &*self.wanted.borrow() {
            let held = self.held(*size) + building.get(size).copied().unwrap_or(0);
            let target = self.target(templates);
            if self.claims.get() > 0 && held > target / 2 {
                // There are enough for as long as a guest takes to come up.
                continue;
            }
            let more = target.saturating_sub(held).min(room);
            missing.extend(std::iter::repeat_n(*size, more));
            room -= more;
        }
        missing
    }

    fn held(&self, size: Size) -> usize {
        self.ready.borrow().get(&size).map_or(0, VecDeque::len)
    }

    fn target(&self, templates: &BTreeSet<String>) -> usize {
        let templates = templates.iter().map(String::as_str);
        self.demand.borrow().target(templates, now_s(), REFILL_S, self.bounds)
    }

    /// Demand falls slowly, and so does the pool: one shell at each review.
    fn let_one_go(self: &Rc<Self>) {
        let too_many = self.wanted.borrow().iter().find_map(|(size, templates)| {
            (self.held(*size) > self.target(templates)).then_some(*size)
        });
        let shell = too_many.and_then(|size| self.ready.borrow_mut().get_mut(&size)?.pop_back());
        if let Some(shell) = shell {
            self.bury(shell.held);
        }
    }

    /// Ends every shell that waits, and makes no more.
    pub(crate) async fn close(self: &Rc<Self>) {
        self.closed.set(true);
        self.nudge();
        let all: Vec<Shell> =
            std::mem::take(&mut *self.ready.borrow_mut()).into_values().flatten().collect();
        let end = |shell: Shell| {
            let pool = Rc::clone(self);
            rt::spawn(async move { pool.end(&shell.held).await })
        };
        let ends: Vec<_> = all.into_iter().map(end).collect();
        for end in ends {
            end.join().await;
        }
        let mut seen = 0;
        while self.building.borrow().values().any(|building| *building > 0) {
            self.nudged(&mut seen).await;
        }
    }

    fn nudge(&self) {
        self.nudges.set(self.nudges.get().wrapping_add(1));
        for waker in std::mem::take(&mut *self.waiting.borrow_mut()) {
            waker.wake();
        }
    }

    /// Waits until there were other nudges than `seen`, and counts them as seen.
    async fn nudged(&self, seen: &mut u64) {
        poll_fn(|cx| {
            let nudges = self.nudges.get();
            if nudges != *seen {
                *seen = nudges;
                return Poll::Ready(());
            }
            let mut waiting = self.waiting.borrow_mut();
            waiting.retain(|waker| !waker.will_wake(cx.waker()));
            waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

async fn wait_built(events: &mut Events) -> Result<vm::Shell, String> {
    loop {
        match events.next().await {
            Ok(vm::Event::Jailed) => {}
            Ok(vm::Event::Built(layout)) => return Ok(layout),
            Ok(vm::Event::Ended(ending)) => return Err(format!("it ended: {ending:?}")),
            Ok(_) => return Err("it broke its protocol".to_owned()),
            Err(how) => return Err(how.to_owned()),
        }
    }
}

fn draw_name() -> Result<SandboxId, String> {
    let mut bytes = [0u8; SANDBOX_ID_CHARS];
    random(&mut bytes).map_err(|error| error.to_string())?;
    Ok(SandboxId::from_random(bytes))
}

/// Seconds since 1970.
pub(crate) fn now_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
