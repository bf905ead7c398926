//! The one task that lives a sandbox: feeds its state machine and performs the effects.
//!
//! Called by `shard`, once for each sandbox; detached, so that no client can cancel it. Refuses to
//! decide: what follows from what is in `state`.

mod answers;
mod cold;
mod effects;
mod ends;
mod keep;
mod restore;
mod timing;
mod work;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use futures_lite::FutureExt;
use mica_numa::rt::oneshot;
use mica_numa::rt::time::{self, Instant};
use mica_wire::vm;

use super::capture::{Capture, CaptureError, DiskCapture};
use super::image::Opened;
use super::link::Events;
use super::log::read_log;
use super::memory::Memory;
use super::paging::Paging;
use super::record::{Record, RecordedState};
use super::rollback::Back;
use super::state::{Cause, Event, Process, Refusal, State, Step};
use super::{Request, Sandbox, asks};
use crate::ShardError;
use crate::event::{IfRunning, Wake};
use crate::metrics::{Asked, Phase, Stopwatch};
use crate::shard::Shard;
use crate::shell::{Claim, Held};
use keep::Links;
use work::{Done, Work};

/// How a driver begins.
#[derive(Debug)]
pub(crate) enum Start {
    /// A create, and when it was asked for.
    Create(Asked),
    /// It runs in a process that the daemon before this one started.
    Adopt(Box<Record>, Rc<Held>, Memory),
    /// It ran, and its process cannot be had.
    Lost(Box<Record>),
    /// It is paused, maybe with its process.
    Paused(Box<Record>, Option<(Rc<Held>, Memory)>),
}

/// Lives one sandbox.
struct Driver {
    shard: Rc<Shard>,
    sandbox: Rc<Sandbox>,
    /// The one piece of work at hand. The machine never asks for a second before the first ended, but
    /// for an end, which drops it: every one of them may be dropped at any await.
    work: Option<Work>,
    events: Option<Events>,
    /// While its guest is coming up in a shell of the pool.
    claim: Option<Claim>,
    /// Events that effects caused; seen before all others.
    caused: VecDeque<Event>,
    /// When the step at hand has taken too long.
    step_deadline: Instant,
    shape: Option<keep::Shape>,
    /// When it came up, and when its time is over: as its record has them.
    born: Option<(SystemTime, Option<SystemTime>)>,
    image: Option<Arc<Opened>>,
    disk: Option<Arc<File>>,
    memory: Memory,
    /// Brings its pages in when they are touched, where they are not mapped.
    paging: Option<Paging>,
    /// Whether its directory in the store is there.
    has_directory: bool,
    /// Whether it was ready once, so that its create could be answered.
    came_up: bool,
    /// Whether it names layers that the sandbox lies on no more.
    record_is_old: bool,
    /// What it needs there is being made, while the VM process restores it.
    settling: Option<Settling>,
    /// The operation at hand, and who waits for it.
    request: Option<Request>,
    /// Why it failed, until it is answered.
    failure: Option<ShardError>,
    capture: Option<Begun>,
    /// Length of the state in the exchange, after a freeze.
    state_bytes: u64,
    back: Option<Back>,
    /// The snapshot that may exist from now on, until its operation is over.
    committing: Option<String>,
    /// A process that the work at hand ends.
    ending: Rc<RefCell<Option<Rc<Held>>>>,
    /// The snapshot that the operation made.
    made: Option<mica_storage::SnapshotManifest>,
    /// The snapshot it is paused in.
    paused_in: Option<String>,
    /// Whether that has its disk alone; or will have, of a pause that is at hand, or a snapshot.
    disk_alone: bool,
    /// What it boots from: when it does, or what is made of its disk just now.
    boot: Option<mica_storage::BootFiles>,
    /// Whether its coming up is a boot.
    boots: bool,
    envd_version: Option<String>,
    console_tail: String,
    complaint: String,
    safe: bool,
    /// Times the operation at hand.
    watch: Stopwatch,
}

/// A capture, and where it is.
enum Begun {
    /// Its directory is being made, while the guest is being stopped.
    Beginning(mica_numa::rt::Task<Result<Capture, CaptureError>>),
    /// It is at hand.
    Here(Box<Capture>),
    /// The same, of one that has no memory.
    OfDisk(DiskCapture),
}

impl Begun {
    /// The id of what it makes, as soon as it is at hand.
    fn id(&self) -> Option<String> {
        match self {
            Self::Beginning(_) => None,
            Self::Here(capture) => capture.id(),
            Self::OfDisk(capture) => capture.id(),
        }
    }
}

/// Links and record on their way. A task of its own: an end waits for it, before it removes them.
struct Settling {
    task: mica_numa::rt::Task<()>,
    outcome: Option<oneshot::Receiver<Result<(), Cause>>>,
}

/// Lives `sandbox` to its end, or until the daemon leaves it.
pub(crate) async fn drive(shard: Rc<Shard>, sandbox: Rc<Sandbox>, start: Start) {
    let mut driver = Driver::new(shard, sandbox);
    driver.begin(start).await;
    loop {
        let Some((event, request)) = driver.next().await else {
            driver.keep_record().await;
            continue;
        };
        let terms = driver.terms();
        let before = driver.sandbox.state.borrow().clone();
        let effects = driver.sandbox.state.borrow_mut().advance(terms, event);
        if *driver.sandbox.state.borrow() != before {
            // With times of microseconds, these lines say where an operation spends them.
            tracing::trace!(id = %driver.sandbox.id, from = ?before, to = ?driver.sandbox.state.borrow());
            driver.step_deadline = Instant::now() + driver.step_patience();
            driver.sandbox.state_changed();
            driver.time(&before);
        }
        driver.take_request(request, &effects);
        for effect in effects {
            driver.perform(effect).await;
        }
        if std::mem::take(&mut driver.record_is_old) && driver.runs() {
            driver.write_record(Links::AsRecorded).await;
        }
        if !driver.sandbox.state.borrow().is_coming_up() {
            driver.claim = None;
        }
        if matches!(*driver.sandbox.state.borrow(), State::Gone(_)) {
            return;
        }
    }
}

/// What the next wait ended with.
enum Heard {
    Event(Event),
    Request(Request),
    Done(Box<Done>),
    Nudge,
}

impl Driver {
    fn new(shard: Rc<Shard>, sandbox: Rc<Sandbox>) -> Self {
        let step_deadline = Instant::now() + shard.workshop.config.boot_deadline;
        Self {
            shard,
            sandbox,
            work: None,
            events: None,
            claim: None,
            caused: VecDeque::new(),
            step_deadline,
            shape: None,
            born: None,
            image: None,
            disk: None,
            memory: Memory::default(),
            paging: None,
            has_directory: true,
            came_up: false,
            record_is_old: false,
            settling: None,
            request: None,
            failure: None,
            capture: None,
            state_bytes: 0,
            back: None,
            committing: None,
            ending: Rc::default(),
            made: None,
            paused_in: None,
            disk_alone: false,
            boot: None,
            boots: false,
            envd_version: None,
            console_tail: String::new(),
            complaint: String::new(),
            safe: true,
            watch: Stopwatch::off(),
        }
    }

    async fn begin(&mut self, start: Start) {
        match start {
            Start::Create(asked) => {
                let id = self.sandbox.id;
                self.watch = self.shard.metrics.watch_create(id, asked);
                self.watch.lap(Phase::Route);
                self.prepare();
            }
            Start::Adopt(record, held, memory) => {
                self.show_record(&record);
                self.adopt(held, memory).await;
            }
            Start::Lost(record) => {
                self.show_record(&record);
                self.caused.push_back(Event::VmLost("its process could not be taken over"));
            }
            Start::Paused(record, process) => {
                self.show_record(&record);
                self.paused_in = match &record.state {
                    RecordedState::Paused { snapshot }
                    | RecordedState::RollingBack { snapshot }
                    | RecordedState::OnDisk { snapshot } => Some(snapshot.clone()),
                    RecordedState::Running => None,
                };
                self.disk_alone = matches!(record.state, RecordedState::OnDisk { .. });
                let at = if process.is_some() { Process::Asked } else { Process::None };
                *self.sandbox.state.borrow_mut() = State::Paused(at);
                self.sandbox.paused_at.set(Some(Instant::now()));
                if let Some((held, memory)) = process {
                    // It was frozen when its daemon wrote this; a resume may have begun since.
                    self.adopt(held, memory).await;
                }
            }
        }
    }

    /// What a process says was written, when it says that it is frozen.
    fn take_log(&mut self, log_bytes: u64) {
        let Some(held) = self.held() else { return };
        let frames = self.frames();
        self.memory.told(read_log(&held.exchange, self.state_bytes, log_bytes, frames));
    }

    /// The process, while there is one.
    fn held(&self) -> Option<Rc<Held>> {
        self.sandbox.held.borrow().clone()
    }

    /// The next thing that happens, with the request that it is; `None` when only the deadline or
    /// what others see has changed.
    async fn next(&mut self) -> Option<(Event, Option<Request>)> {
        if let Some(event) = self.caused.pop_front() {
            return Some((event, None));
        }
        let heard = self.hear().await;
        match heard {
            Heard::Event(event) => {
                if let Event::Vm(vm::Event::Frozen { state_bytes, log_bytes }) = event {
                    self.state_bytes = state_bytes;
                    self.take_log(log_bytes);
                }
                Some((event, None))
            }
            Heard::Request(request) => Some((Event::Ask(request.kind()), Some(request))),
            Heard::Done(done) => {
                self.work = None;
                Some((self.take(*done), None))
            }
            Heard::Nudge => None,
        }
    }

    async fn hear(&mut self) -> Heard {
        let deadline = self.deadline();
        let told = async {
            match self.sandbox.queue.next().await {
                super::queue::Told::Event(event) => Heard::Event(event),
                super::queue::Told::Request(request) => Heard::Request(request),
                super::queue::Told::Nudge => Heard::Nudge,
            }
        };
        let done = async {
            match &mut self.work {
                Some(work) => Heard::Done(Box::new(work.await)),
                None => pending().await,
            }
        };
        let said = async {
            match &mut self.events {
                Some(events) => loop {
                    match events.next().await {
                        // Asked for by a daemon before this one, which was killed before it heard.
                        Ok(vm::Event::Status { nonce, .. }) if nonce != keep::nonce() => {}
                        Ok(event) => break Heard::Event(Event::Vm(event)),
                        Err(why) => break Heard::Event(Event::VmLost(why)),
                    }
                },
                None => pending().await,
            }
        };
        let lives = matches!(*self.sandbox.state.borrow(), State::Running);
        let sandbox = &self.sandbox;
        let over = async {
            let Some(mut deadline) = deadline else { return pending().await };
            loop {
                time::sleep_until(deadline).await;
                // Requests put the end of one that lives by them off, and tell nobody.
                match sandbox.deadline.get() {
                    later if lives && later > deadline => deadline = later,
                    _ => return Heard::Event(Event::TimeOver),
                }
            }
        };
        told.or(done).or(said).or(over).await
    }

    /// When the state at hand is over: a life for one that runs, none for one that waits or ends, and none
    /// where the guest is well and only the device is slow.
    fn deadline(&self) -> Option<Instant> {
        match &*self.sandbox.state.borrow() {
            State::Running => Some(self.sandbox.deadline.get()),
            State::Paused(
                Process::Frozen | Process::None | Process::Ending | Process::Unwanted,
            )
            | State::Snapshotting(
                Step::Syncing | Step::Precopying | Step::Copying | Step::Finishing,
            )
            | State::Pausing(Step::Syncing | Step::Precopying | Step::Copying | Step::Committing)
            | State::Cancelling(_)
            | State::Stopping(_)
            | State::Gone(_) => None,
            _ => Some(self.step_deadline),
        }
    }

    /// Keeps a request whose operation begins; answers one that is refused.
    fn take_request(&mut self, request: Option<Request>, effects: &[super::state::Effect]) {
        let Some(request) = request else { return };
        let refusal = effects.iter().find_map(|effect| match effect {
            super::state::Effect::Refuse(refusal) => Some(*refusal),
            _ => None,
        });
        match (refusal, request) {
            (None, request) => self.request = Some(request),
            (
                Some(Refusal::AlreadyRunning),
                Request::Resume(Wake { life, if_running: IfRunning::Extend, .. }, sender),
            ) => {
                let life = self.sandbox.life_wanted(life);
                let info = self.sandbox.extend_life(life).map(Box::new);
                let info = info.ok_or(ShardError::NoSuchSandbox(self.sandbox.id));
                if sender.send(info.map(|info| (info, false))).is_err() {
                    tracing::debug!(id = %self.sandbox.id, "nobody waits for a connect");
                }
            }
            (Some(refusal), request) => {
                self.shard.metrics.refused(timing::operation_of(request.kind()));
                request.fail(asks::error_of(refusal, self.sandbox.id));
            }
        }
    }

    /// Takes hold of a process.
    fn hold(&mut self, held: Rc<Held>) {
        match Events::new(&held.control) {
            Ok(events) => self.events = Some(events),
            Err(error) => {
                tracing::warn!(id = %self.sandbox.id, %error, "cannot listen to a VM process");
                self.caused.push_back(Event::VmLost("its socket cannot be read"));
            }
        }
        *self.sandbox.held.borrow_mut() = Some(held);
    }
}
