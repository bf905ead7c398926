//! What a driver does when its state machine says so.
//!
//! Called by the driver for each effect, in order. Sends commands, starts pieces of work, answers
//! clients. Refuses to wait for anything but room in a socket: what takes time is work.

use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mica_numa::process::ProcessError;
use mica_numa::rt::time::{self, Instant};
use mica_numa::rt::{self, BlockingError, oneshot};
use mica_wire::guest::{ControlRequest, InitRequest};
use mica_wire::vm::Command;

use super::super::capture::{Capture, Source};
use super::super::memory::{Memory, Place};
use super::super::prepare::{Found, cause};
use super::super::state::{Birth, Cause, Effect, Event, State};
use super::super::{Request, chain, from_now};
use super::super::{link, paging, rollback};
use super::cold::{self, warm};
use super::keep::{Committed, Draft, Keeper, Links};
use super::work::{Done, capture_error};
use super::{Begun, Driver, Settling};
use crate::metrics::Phase;
use crate::shell::Held;
use crate::{Lifecycle, upkeep, warmth};

/// Tries to reach an agent whose old connections are being reset, and the time between them.
const AGENT_TRIES: u32 = 20;
const AGENT_RETRY: Duration = Duration::from_millis(25);

impl Driver {
    pub(super) async fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Prepare => self.prepare(),
            Effect::SendRestore => self.send_restore().await,
            Effect::Initialise => self.initialise(),
            Effect::Announce => self.announce().await,
            Effect::Sync => self.sync(),
            Effect::Freeze => self.freeze().await,
            Effect::Copy => self.copy(),
            Effect::Precopy => self.precopy(),
            Effect::Replace => self.replace(),
            Effect::Thaw => self.command(&Command::Thaw, &[]).await,
            Effect::Commit => self.commit(),
            Effect::ShowPaused => {
                self.sandbox.show(Lifecycle::Paused, self.disk_alone);
                self.sandbox.paused_at.set(Some(Instant::now()));
                let how = if self.disk_alone { "paused without its memory" } else { "paused" };
                self.sandbox.note(how.to_owned());
            }
            Effect::ShowResumed => self.show_resumed().await,
            Effect::Answer => self.answer(),
            Effect::AnswerFailure => self.answer_failure(),
            // Answered where the request is at hand.
            Effect::Refuse(_) => {}
            Effect::EndProcess => self.end_process(),
            Effect::CleanUp => self.clean_up(),
            Effect::Leave => self.leave().await,
            Effect::Bury => self.bury(),
        }
    }

    pub(super) fn prepare(&mut self) {
        let (workshop, pool) = (self.shard.workshop.clone(), Rc::clone(&self.shard.pool));
        let (id, shard) = (self.sandbox.id, Rc::clone(&self.shard));
        let paused_in = self.paused_in.clone();
        let asked =
            paused_in.clone().unwrap_or_else(|| self.sandbox.identity.request.template.clone());
        let (sandbox, origin) = (Rc::clone(&self.sandbox), self.sandbox.origin());
        let wish = self.boot_wish();
        let watch = self.watch.clone();
        self.work = Some(Box::pin(async move {
            let unchanged = match paused_in {
                None => shard
                    .images
                    .get_unchanged(&asked)
                    .filter(|image| origin.may_use(&image.manifest))
                    .and_then(Found::without_disk),
                Some(_) => None,
            };
            let found = match unchanged {
                Some(found) => found,
                None => {
                    let known = shard.images.get(&asked);
                    let name = asked.clone();
                    let make = move || match paused_in {
                        Some(snapshot) => workshop.prepare_resume(&id, &snapshot, known, wish),
                        None => workshop.prepare(&id, &name, &origin, known),
                    };
                    let mut found = match super::work::blocking(make).await {
                        Ok(found) => found,
                        Err(cause) => return Done::Prepared(Err(cause)),
                    };
                    shard.images.keep(&asked, &found.image, found.stamp.take());
                    found
                }
            };
            // What boots has none of that memory.
            if found.boot.is_none()
                && let Err(cause) = warmth::at_hand(&shard, &found.image, &sandbox).await
            {
                return Done::Prepared(Err(cause));
            }
            // It may have waited longer than its client did.
            if sandbox.is_ending() {
                return Done::Prepared(Err(Cause::Killed));
            }
            let template = found.image.manifest.template_id.clone();
            watch.lap(Phase::Layers);
            let shell = match found.size == found.image.size() {
                true => pool.take(found.size, &template).await,
                // Nobody else wants one like it.
                false => pool.take_once(found.size).await,
            };
            Done::Prepared(shell.map(|shell| (found, shell)).map_err(|error| match error {
                crate::shell::NoShell::Busy => Cause::Busy,
                error => Cause::Failed(error.to_string()),
            }))
        }));
    }

    /// Sends a command; a process that does not take it is lost.
    pub(super) async fn command(&mut self, command: &Command, fds: &[BorrowedFd<'_>]) {
        let Some(held) = self.held() else { return };
        if let Err(error) = link::send(&held.control, command, fds).await {
            tracing::info!(id = %self.sandbox.id, error = chain(&error), "a command was not sent");
            self.caused.push_back(Event::VmLost("the VM process does not take its commands"));
        }
    }

    /// The agent is told who it is, and what the next daemon has to know is written.
    fn initialise(&mut self) {
        let Some(held) = self.held() else { return };
        let new_sandbox =
            matches!(*self.sandbox.state.borrow(), State::Initialising(Birth::Create));
        let has_agent = self.shape.as_ref().is_some_and(|shape| shape.has_agent);
        // One that was thawed, and not restored, is only running again; one that booted is new by now.
        if self.settling.as_ref().is_none_or(|settling| settling.outcome.is_none()) {
            self.settle();
        }
        let outcome = self.settling.as_mut().and_then(|settling| settling.outcome.take());
        let (request, services_wait) = (self.init_request(new_sandbox), self.services_wait());
        self.work = Some(Box::pin(async move {
            let settled = async {
                match outcome {
                    Some(outcome) => outcome.await,
                    None => None,
                }
            };
            let told = async {
                if !has_agent {
                    return Ok::<_, String>(None);
                }
                let version = tell_agent(&held, &request).await?;
                if let Some(patience) = services_wait {
                    warm(&held, patience).await?;
                }
                Ok(Some(version))
            };
            let (settled, told) = futures_lite::future::zip(settled, told).await;
            Done::Initialised(match settled {
                Some(Ok(())) => {
                    told.map_err(|why| Cause::Failed(format!("the agent's start: {why}")))
                }
                Some(Err(cause)) => Err(cause),
                None => Err(Cause::Failed("its record was not written".to_owned())),
            })
        }));
    }

    /// Starts to write what the next daemon needs.
    pub(super) fn settle(&mut self) {
        let is_new = matches!(
            *self.sandbox.state.borrow(),
            State::Restoring(Birth::Create) | State::Initialising(Birth::Create)
        );
        if is_new {
            let now = SystemTime::now();
            self.born = Some((now, from_now(self.sandbox.identity.request.timeout).1));
        }
        // One that was paused is so until it runs.
        let record = match self.paused_in {
            Some(_) => Ok(None),
            None => self.record_bytes().map(Some),
        };
        let (workshop, id) = (self.shard.workshop.clone(), self.sandbox.id);
        let (layers, has_directory) = (self.memory.layers.clone(), self.has_directory);
        self.has_directory = true;
        let (sender, outcome) = oneshot::channel();
        let task = rt::spawn(async move {
            let settled = match record {
                Ok(record) => {
                    let settle = move || {
                        let settled =
                            workshop.settle(&id, has_directory, &layers, record.as_deref());
                        settled.map_err(|error| cause("writing its record", &error))
                    };
                    super::work::blocking(settle).await
                }
                Err(error) => Err(Cause::Failed(format!("its record: {error}"))),
            };
            if sender.send(settled).is_err() {
                tracing::debug!(%id, "the sandbox of this record is on its way out");
            }
        });
        self.settling = Some(Settling { task, outcome: Some(outcome) });
    }

    fn init_request(&self, new_sandbox: bool) -> InitRequest {
        let identity = &self.sandbox.identity;
        InitRequest {
            sandbox_id: self.sandbox.id.to_string(),
            template_id: self.shape.as_ref().map(|s| s.template_id.clone()).unwrap_or_default(),
            machine_id: identity.machine_id.clone(),
            access_token: identity.access_token.clone(),
            env_vars: identity.request.env_vars.clone(),
            wall_clock_unix_ns: unix_ns(),
            new_sandbox,
            defaults: identity.request.defaults.clone(),
        }
    }

    async fn announce(&mut self) {
        let Some(mut shape) = self.shape.take() else { return };
        if let Some(version) = self.envd_version.take() {
            shape.envd_version = version;
        }
        let mut info = self.info_of(&shape);
        if let Some((started_at, end_at)) = self.born {
            (info.started_at, info.end_at) = (started_at, end_at);
        }
        let life = self.sandbox.identity.request.timeout;
        self.sandbox.goes_on_for(life, life);
        *self.sandbox.info.borrow_mut() = Some(info.clone());
        // From now on it is one that runs, however it came up.
        self.boots = false;
        self.sandbox.note(format!("created from template {}", shape.template_id));
        self.shard.count_spawn(&shape.template_id, info.started_at);
        self.shape = Some(shape);
        self.came_up = true;
        // Before it is answered: who asks again, of the next daemon, is to hear what came of it.
        if self.sandbox.identity.request.once.is_some() {
            self.write_record(Links::Stay).await;
        }
        self.timed(true);
        let maker = self.sandbox.maker.borrow_mut().take();
        let heard = maker.is_some_and(|maker| maker.send(Ok(Box::new(info))).is_ok());
        if !heard {
            // Nobody knows its id, so nobody would ever end it before its time.
            tracing::info!(id = %self.sandbox.id, "who asked for this sandbox is gone");
            self.caused.push_back(Event::Kill);
        }
    }

    async fn freeze(&mut self) {
        let captures =
            matches!(*self.sandbox.state.borrow(), State::Snapshotting(_) | State::Pausing(_));
        if captures && !self.disk_alone && self.capture.is_none() {
            let (store, ring) = (self.shard.workshop.store.clone(), Rc::clone(&self.shard.ring));
            let (layers, frames) = (self.memory.layers.clone(), self.frames());
            let watch = self.watch.clone();
            let begin = async move { Capture::begin(&store, &ring, layers, frames, watch).await };
            self.capture = Some(Begun::Beginning(rt::spawn(begin)));
        }
        self.command(&Command::Freeze, &[]).await;
    }

    pub(super) fn frames(&self) -> u32 {
        self.shape.as_ref().map_or(0, |shape| mica_units::frames_of(shape.memory))
    }

    fn copy(&mut self) {
        if self.disk_alone {
            self.copy_disk();
            return;
        }
        let (Some(held), Some(begun)) = (self.held(), self.capture.take()) else { return };
        let mut memory = std::mem::take(&mut self.memory);
        let (frames, state_bytes, disk) = (self.frames(), self.state_bytes, self.disk.clone());
        let budget_pages = self.shard.workshop.config.capture_budget_pages();
        self.work = Some(Box::pin(async move {
            let capture = match begun {
                Begun::Here(capture) => Ok(*capture),
                Begun::Beginning(task) => task
                    .join()
                    .await
                    .unwrap_or(Err(super::CaptureError::Blocking(BlockingError::NoSeat))),
                Begun::OfDisk(_) => Err(super::CaptureError::Shared),
            };
            let copied = match (capture, place(&held, frames)) {
                (Ok(capture), Some(place)) => {
                    track(&held, frames, &mut memory);
                    let exchange = &held.exchange;
                    let source = Source { place, exchange, state_bytes, disk, budget_pages };
                    capture.copy(source, &mut memory).await
                }
                (Err(error), _) => Err(error),
                (Ok(_), None) => Err(super::CaptureError::Process(ProcessError::Range)),
            };
            Done::Copied(memory, copied)
        }));
    }

    fn precopy(&mut self) {
        let (Some(held), Some(Begun::Here(capture))) = (self.held(), self.capture.take()) else {
            return;
        };
        let mut memory = std::mem::take(&mut self.memory);
        let frames = self.frames();
        self.work = Some(Box::pin(async move {
            let copied = match place(&held, frames) {
                Some(place) => capture.precopy(place, &mut memory).await,
                None => Err(super::CaptureError::Process(ProcessError::Range)),
            };
            Done::Precopied(memory, copied)
        }));
    }

    fn commit(&mut self) {
        let pausing = matches!(*self.sandbox.state.borrow(), State::Pausing(_));
        let paused = if pausing { self.paused_record().map(Some) } else { Some(None) };
        let (Some(begun), Some(draft), Some(paused)) =
            (self.capture.take(), self.manifest_draft(pausing), paused)
        else {
            self.caused.push_back(Event::CommitFailed);
            return;
        };
        self.committing = begun.id();
        let (store, id) = (self.shard.workshop.store.clone(), self.sandbox.id);
        let shard = Rc::clone(&self.shard);
        let operation = self.operation_name();
        self.work = Some(Box::pin(async move {
            let keeper = Keeper { store, sandbox: id, paused };
            let committed = match begun {
                Begun::Here(capture) => commit(*capture, draft, keeper).await,
                Begun::OfDisk(capture) => cold::commit(capture, draft, keeper).await,
                Begun::Beginning(_) => Err(super::CaptureError::Shared),
            };
            let committed = committed.map_err(|error| capture_error(&error, operation, id));
            if let Ok(made) = &committed {
                upkeep::look_at(&shard, &made.manifest.id, &made.layers);
            }
            Done::Committed(committed)
        }));
    }

    /// A word for the errors of the operation at hand: where nobody asked, it is the pause at its end.
    pub(super) fn operation_name(&self) -> &'static str {
        self.request.as_ref().map_or("a pause", Request::name)
    }

    fn replace(&mut self) {
        let (Some(held), Some(Request::Rollback(snapshot, _))) = (self.held(), &self.request)
        else {
            return;
        };
        let (shard, id, snapshot) = (Rc::clone(&self.shard), self.sandbox.id, snapshot.clone());
        let (record, tenant) = (self.rolling_back_record(&snapshot), self.sandbox.tenant().clone());
        let known = self.shard.images.get(&snapshot);
        let mut memory = std::mem::take(&mut self.memory);
        let (frames, disk) = (self.frames(), self.disk.clone());
        self.work = Some(Box::pin(async move {
            let back = match (record, place(&held, frames)) {
                (Ok(record), Some(place)) => {
                    track(&held, frames, &mut memory);
                    let job = rollback::Job { shard, id, tenant, snapshot, known, record, disk };
                    rollback::replace(job, place, &mut memory).await
                }
                (Err(error), _) => Err(rollback::BackError::Other(error.to_string())),
                (Ok(_), None) => Err(rollback::BackError::Process(ProcessError::Range)),
            };
            Done::Replaced(memory, back)
        }));
    }
}

/// Makes the snapshot exist, and what it means for its sandbox last.
async fn commit(
    capture: Capture,
    draft: Draft,
    keeper: Keeper,
) -> Result<Box<Committed>, super::CaptureError> {
    let describe = |id, layers, state| draft.finish(id, layers, state);
    let keep = move |snapshot, layers, unheard: &dyn Fn() -> bool| {
        keeper.keep(snapshot, layers, unheard).map(Box::new)
    };
    capture.commit(describe, keep).await
}

/// Sees to it that writes can be told, where the kernel can do that: while the guest is frozen, before
/// anyone looks for what it changed. What was mapped since the last time, by a rollback, is registered
/// again here, and all that was written to it before that counts as written.
fn track(held: &Held, frames: u32, memory: &mut Memory) {
    if memory.logs {
        return;
    }
    let registered = paging::track(held, frames);
    if let Err(error) = &registered {
        tracing::debug!(%error, "writes are not told apart");
    }
    // A guest on demand was registered when it began, and more than this.
    memory.tracked = registered.is_ok() || (memory.tracked && memory.on_demand);
}

fn place(held: &Held, frames: u32) -> Option<Place<'_>> {
    Place::new(&held.process, held.layout, frames)
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Connections of the time before a restore are reset first; one that is made meanwhile may be, too.
/// Each try tells the time of that try.
async fn tell_agent(held: &Held, request: &InitRequest) -> Result<String, String> {
    let mut last = String::new();
    for _ in 0..AGENT_TRIES {
        let request = InitRequest { wall_clock_unix_ns: unix_ns(), ..request.clone() };
        match link::tell_agent(&held.control, &ControlRequest::Init(request)).await {
            Err(error) if error.is_broken() => last = error.to_string(),
            other => return other.map_err(|error| error.to_string()),
        }
        time::sleep(AGENT_RETRY).await;
    }
    Err(last)
}
