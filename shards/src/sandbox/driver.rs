//! The one task that lives a sandbox: feeds its state machine and performs the effects.
//!
//! Called by `shard`, once for each sandbox; detached, so that no client can cancel it. Refuses to
//! decide: what follows from what is in `state`.

use std::future::{Future, pending};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_lite::FutureExt;
use mica_numa::rt::{self, BlockingError, time};
use mica_storage::Template;
use mica_units::{Mebibytes, SandboxId};
use mica_wire::guest::InitRequest;

use super::link::{self, Events};
use super::prepare::{Boot, Prepared, TakeBackError, VmProcess, chain, ready_of};
use super::state::{Cause, Effect, Event, Ready, State};
use super::{Sandbox, Workshop, from_now};
use crate::shard::Shard;
use crate::{SandboxInfo, ShardError, console};

/// Between two tries to find room on the blocking threads.
const BLOCKING_RETRY: Duration = Duration::from_millis(50);

/// What a piece of work came to.
enum Done {
    Prepared(Result<Box<Prepared>, Cause>),
    Initialised(Result<String, String>),
    TakenBack { safe_uid: bool },
}

type Work = Pin<Box<dyn Future<Output = Done>>>;

struct Driver {
    shard: Rc<Shard>,
    sandbox: Rc<Sandbox>,
    ready: Ready,
    /// The one piece of work at hand. The machine never asks for a second before the first ended,
    /// except that taking back replaces the exchange with the agent, which may be dropped.
    work: Option<Work>,
    events: Option<Events>,
    template: Option<Template>,
    process: Option<VmProcess>,
    console: Option<OwnedFd>,
    boot: Option<Boot>,
    /// An event that an effect caused; seen before all others.
    caused: Option<Event>,
    envd_version: Option<String>,
    console_tail: String,
    complaint: String,
    safe_uid: bool,
}

/// Lives `sandbox` to its end.
pub(crate) async fn drive(shard: Rc<Shard>, sandbox: Rc<Sandbox>) {
    let work = prepare(shard.workshop.clone(), &sandbox);
    let mut driver = Driver {
        shard,
        sandbox,
        ready: Ready::Agent,
        work: Some(work),
        events: None,
        template: None,
        process: None,
        console: None,
        boot: None,
        caused: None,
        envd_version: None,
        console_tail: String::new(),
        complaint: String::new(),
        safe_uid: true,
    };
    loop {
        let Some(event) = driver.next().await else { continue };
        let effects = driver.sandbox.state.borrow_mut().advance(driver.ready, event);
        if driver.sandbox.is_ending() {
            driver.sandbox.unwanted.store(true, Ordering::Relaxed);
        }
        for effect in effects {
            driver.perform(effect).await;
        }
        if matches!(*driver.sandbox.state.borrow(), State::Gone(_)) {
            return;
        }
    }
}

fn prepare(workshop: Workshop, sandbox: &Sandbox) -> Work {
    let (id, uid, template) = (sandbox.id, sandbox.uid, sandbox.request.template.clone());
    let unwanted = Arc::clone(&sandbox.unwanted);
    Box::pin(async move {
        let make = move || {
            // It may have waited for a thread longer than its client waited for it.
            if unwanted.load(Ordering::Relaxed) {
                return Err(Cause::Killed);
            }
            workshop.prepare(&id, &template, uid).map(Box::new)
        };
        let made = rt::blocking(make).await;
        Done::Prepared(made.unwrap_or_else(|error| {
            Err(match error {
                BlockingError::Full => Cause::Busy,
                other => Cause::Failed(format!("making it: {other}")),
            })
        }))
    })
}

fn take_back(workshop: Workshop, id: SandboxId, process: Option<VmProcess>) -> Work {
    Box::pin(async move {
        if let Some(process) = process {
            process.end(&id).await;
        }
        let result = loop {
            let workshop = workshop.clone();
            match rt::blocking(move || workshop.take_back(&id)).await {
                // It must be done, whatever else waits.
                Err(BlockingError::Full) => time::sleep(BLOCKING_RETRY).await,
                Err(error) => {
                    tracing::error!(%id, %error, "cannot take back a sandbox");
                    return Done::TakenBack { safe_uid: false };
                }
                Ok(result) => break result,
            }
        };
        if let Err(error) = &result {
            tracing::error!(%id, error = chain(error), "cannot take back all of a sandbox");
        }
        // A process that may still run must not share its uid with a new one.
        Done::TakenBack { safe_uid: !matches!(result, Err(TakeBackError::Cgroup(_))) }
    })
}

impl Driver {
    /// The next thing that happens; `None` when only the deadline changed.
    async fn next(&mut self) -> Option<Event> {
        if let Some(event) = self.caused.take() {
            return Some(event);
        }
        let ending = self.sandbox.is_ending();
        let deadline = self.sandbox.deadline.get();
        let told = async { (self.sandbox.queue.next().await, None) };
        let done = async {
            match &mut self.work {
                Some(work) => (None, Some(work.await)),
                None => pending().await,
            }
        };
        let said = async {
            match &mut self.events {
                Some(events) => {
                    let event = events.next().await.map_or_else(Event::VmLost, Event::Vm);
                    (Some(event), None)
                }
                None => pending().await,
            }
        };
        let over = async {
            if ending {
                pending::<()>().await;
            }
            time::sleep_until(deadline).await;
            (Some(Event::TimeOver), None)
        };
        let (event, done) = told.or(done).or(said).or(over).await;
        match done {
            Some(done) => {
                self.work = None;
                Some(self.take(done))
            }
            None => event,
        }
    }

    /// Keeps what a piece of work gave.
    fn take(&mut self, done: Done) -> Event {
        match done {
            Done::Prepared(Ok(prepared)) => self.take_prepared(*prepared),
            Done::Prepared(Err(cause)) => Event::PrepareFailed(cause),
            Done::Initialised(Ok(envd_version)) => {
                self.envd_version = Some(envd_version);
                Event::InitDone
            }
            Done::Initialised(Err(why)) => Event::InitFailed(why),
            Done::TakenBack { safe_uid } => {
                self.safe_uid = safe_uid;
                Event::CleanedUp
            }
        }
    }

    fn take_prepared(&mut self, prepared: Prepared) -> Event {
        let Prepared { template, process, control, console, boot } = prepared;
        self.ready = ready_of(&template);
        self.process = Some(process);
        self.console = Some(console);
        self.boot = Some(boot);
        self.template = Some(template);
        let events = Events::new(&control);
        *self.sandbox.control.borrow_mut() = Some(Rc::new(control));
        match events {
            Ok(events) => {
                self.events = Some(events);
                Event::Prepared
            }
            Err(error) => Event::PrepareFailed(Cause::Failed(format!("its socket: {error}"))),
        }
    }

    async fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::SendBoot => self.send_boot().await,
            Effect::Initialise => self.initialise(),
            Effect::Announce => self.announce(),
            Effect::CleanUp => self.clean_up(),
            Effect::Bury => self.bury(),
        }
    }

    async fn send_boot(&mut self) {
        let control = self.sandbox.control.borrow().clone();
        let (Some(control), Some(boot)) = (control, self.boot.take()) else { return };
        if let Err(error) = link::send(&control, &boot.command(), &boot.fds()).await {
            tracing::info!(id = %self.sandbox.id, error = chain(&error), "boot was not sent");
            self.caused = Some(Event::VmLost("the VM process does not take its boot command"));
        }
    }

    fn initialise(&mut self) {
        let Some(control) = self.sandbox.control.borrow().clone() else { return };
        let template_id = self.template.as_ref().map(|t| t.manifest().id.clone());
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let request = InitRequest {
            sandbox_id: self.sandbox.id.to_string(),
            template_id: template_id.unwrap_or_default(),
            access_token: self.sandbox.access_token.clone(),
            env_vars: self.sandbox.request.env_vars.clone(),
            wall_clock_unix_ns: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
        };
        self.work =
            Some(Box::pin(
                async move { Done::Initialised(link::initialise(&control, &request).await) },
            ));
    }

    fn announce(&mut self) {
        let Some(template) = &self.template else { return };
        let manifest = template.manifest();
        let (deadline, end_at) = from_now(self.sandbox.request.timeout);
        let info = SandboxInfo {
            id: self.sandbox.id,
            template_id: manifest.id.clone(),
            template_name: manifest.name.clone(),
            started_at: SystemTime::now(),
            end_at,
            vcpus: manifest.vcpus,
            memory: manifest.memory,
            disk: Mebibytes::covering_bytes(manifest.disk_bytes()).unwrap_or(Mebibytes::new(0)),
            envd_version: self.envd_version.take().unwrap_or_else(|| manifest.envd_version.clone()),
            metadata: self.sandbox.request.metadata.clone(),
            access_token: self.sandbox.access_token.clone(),
        };
        self.sandbox.deadline.set(deadline);
        *self.sandbox.info.borrow_mut() = Some(info.clone());
        self.shard.count_spawn(&manifest.id, info.started_at);
        let maker = self.sandbox.maker.borrow_mut().take();
        let heard = maker.is_some_and(|maker| maker.send(Ok(Box::new(info))).is_ok());
        if !heard {
            // Nobody knows its id, so nobody would ever end it before its time.
            tracing::info!(id = %self.sandbox.id, "who asked for this sandbox is gone");
            self.caused = Some(Event::Kill);
        }
    }

    fn clean_up(&mut self) {
        *self.sandbox.info.borrow_mut() = None;
        *self.sandbox.control.borrow_mut() = None;
        self.events = None;
        self.boot = None;
        if let Some(console) = self.console.take() {
            let bytes = self.shard.workshop.config.console_bytes;
            self.console_tail = console::tail(&console, bytes).unwrap_or_else(|error| {
                tracing::warn!(id = %self.sandbox.id, %error, "cannot read a console");
                String::new()
            });
        }
        let mut process = self.process.take();
        self.complaint = process.as_mut().map(VmProcess::complaint).unwrap_or_default();
        self.work = Some(take_back(self.shard.workshop.clone(), self.sandbox.id, process));
    }

    fn bury(&mut self) {
        let cause = match &*self.sandbox.state.borrow() {
            State::Gone(cause) => cause.clone(),
            other => Cause::Failed(format!("buried while {other:?}")),
        };
        tracing::info!(id = %self.sandbox.id, ?cause, "sandbox is gone");
        self.shard.forget(&self.sandbox, self.safe_uid);
        if let Some(maker) = self.sandbox.maker.borrow_mut().take() {
            // Who made it may be gone; there is nothing left to take back then.
            if maker.send(Err(self.error(cause))).is_err() {
                tracing::debug!(id = %self.sandbox.id, "nobody waits for this failure");
            }
        }
        let mourners = std::mem::take(&mut *self.sandbox.mourners.borrow_mut());
        for mourner in mourners {
            if mourner.send(()).is_err() {
                tracing::trace!(id = %self.sandbox.id, "nobody waits for this end");
            }
        }
    }

    /// Why there is no sandbox, for who asked for one.
    fn error(&self, cause: Cause) -> ShardError {
        let console_tail = self.console_tail.clone();
        let mut reason = match cause {
            Cause::Killed => return ShardError::KilledDuringCreate(self.sandbox.id),
            Cause::Draining => return ShardError::ShuttingDown,
            Cause::Busy => return ShardError::Busy,
            Cause::NoSuchTemplate => {
                return ShardError::NoSuchTemplate(self.sandbox.request.template.clone());
            }
            Cause::BootTimedOut(step) => {
                let deadline = self.shard.workshop.config.boot_deadline;
                return ShardError::BootTimedOut { step, deadline, console_tail };
            }
            Cause::Expired => "its time was over".to_owned(),
            Cause::Failed(why) | Cause::Ended(why) => why,
        };
        if !self.complaint.is_empty() {
            reason = format!("{reason}; the VM process wrote: {}", self.complaint);
        }
        ShardError::BootFailed { reason, console_tail }
    }
}
