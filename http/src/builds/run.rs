//! One build from its start to its end: waits for its turn, makes a sandbox of the base, carries the steps
//! out in it, and makes a template of it as it runs.
//!
//! Spawned when a client starts a build; goes on when that client is gone. The sandbox is nobody's that a
//! client could name, and goes whatever happens. What the build says is in the store, where every shard finds
//! it. Refuses to run longer than [`BUILD_TIME_MAX`].

use std::cell::Cell;
use std::time::Duration;

use mica_shards::rt::{self, time};
use mica_shards::{
    BUILD_TENANT, BuildPhase, BuildRecord, BuildSlot, Built, BuiltDefaults, BuiltFor,
    CreateRequest, Host, SandboxInfo, defaults_for_agent,
};
use mica_units::{SandboxId, TenantId};

use super::guest::Guest;
use super::log::{Level, Log};
use super::steps::{Site, StepError};
use super::wish::Started;
use super::{base, forget_snapshots};
use crate::config::Limits;

/// How long a build may take from its turn on.
const BUILD_TIME_MAX: Duration = Duration::from_secs(4 * 3600);
/// More than that, so that it is the build that ends its sandbox.
const SANDBOX_LIFE: Duration = Duration::from_secs(4 * 3600 + 600);
/// How long a build waits to be woken before it looks by itself whether it is its turn: a shard that is
/// overrun may not have been told.
const TURN_UNTOLD_MAX: Duration = Duration::from_secs(30);
/// Tries to end the sandbox while its shard is busy, and the time between them.
const KILL_TRIES: u32 = 50;
const KILL_RETRY: Duration = Duration::from_millis(200);

/// What went wrong, and where: `base`, `finalize`, or the number of a step.
struct Failure {
    step: String,
    error: StepError,
}

impl Failure {
    fn at(step: impl ToString) -> impl Fn(StepError) -> Self {
        let step = step.to_string();
        move |error| Self { step: step.clone(), error }
    }
}

/// Lets a build run on its own.
pub fn spawn(host: Host, limits: &Limits, record: BuildRecord, wanted: Started) {
    let (at_once, memory_mib_max) = (limits.builds_at_once, limits.build_memory_mib_max);
    rt::spawn(async move {
        let build = Build { host, record, memory_mib_max, sandbox: Cell::new(None) };
        build.carry_out(at_once, &wanted).await;
    })
    .detach();
}

struct Build {
    host: Host,
    record: BuildRecord,
    memory_mib_max: u32,
    sandbox: Cell<Option<SandboxId>>,
}

impl Build {
    async fn carry_out(self, at_once: usize, wanted: &Started) {
        let mut log = Log::new(self.host.clone(), self.record.id.clone());
        let tenant: TenantId = self.record.tenant.parse().unwrap_or_default();
        let slot = self.wait_for_turn(&tenant, at_once, &mut log).await;
        self.set_phase(BuildPhase::Building).await;
        let built = self.within_time(&tenant, log, wanted).await;
        self.end_sandbox().await;
        // Its sandbox ends with the host, and whatever that looks like from here, this is why.
        if built.is_err() && self.host.is_stopping() {
            tracing::info!(build = self.record.id, "a build ends with the host, which says so");
            return;
        }
        let phase = match built {
            Ok(()) => BuildPhase::Ready,
            Err(Failure { step, error: StepError(message) }) => {
                BuildPhase::Failed { message, step: Some(step) }
            }
        };
        tracing::info!(build = self.record.id, ?phase, "a build is over");
        self.set_phase(phase).await;
        drop(slot);
        self.host.build_over().await;
    }

    /// Waits until fewer builds of the tenant run than may. Where the host ends first, the next start ends
    /// the build.
    async fn wait_for_turn(&self, tenant: &TenantId, at_once: usize, log: &mut Log) -> BuildSlot {
        let mut said = false;
        loop {
            // Before it looks, so that no end in between is missed.
            let next = self.host.next_turn();
            let tenant = tenant.clone();
            let slot = self.host.with_builds(move |builds| Ok(builds.take_slot(&tenant, at_once)?));
            match slot.await {
                Ok(Ok(Some(slot))) => return slot,
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::error!(%error, "a build waits: its turn cannot be told"),
                Err(error) => tracing::debug!(%error, "a build waits"),
            }
            if !std::mem::replace(&mut said, true) {
                let text = format!("Waiting: {at_once} builds run at once, and others came first");
                log.say(Level::Info, &text).await;
            }
            if time::timeout(TURN_UNTOLD_MAX, next).await.is_err() {
                tracing::debug!(build = self.record.id, "a build looks by itself for its turn");
            }
        }
    }

    async fn within_time(
        &self,
        tenant: &TenantId,
        log: Log,
        wanted: &Started,
    ) -> Result<(), Failure> {
        let built = time::timeout(BUILD_TIME_MAX, Box::pin(self.build(tenant, log, wanted))).await;
        built.unwrap_or_else(|_| {
            let hours = BUILD_TIME_MAX.as_secs() / 3600;
            let error = StepError(format!("the build did not end within {hours} hours"));
            Err(Failure { step: "finalize".to_owned(), error })
        })
    }

    async fn build(
        &self,
        tenant: &TenantId,
        mut log: Log,
        wanted: &Started,
    ) -> Result<(), Failure> {
        log.set_step(Some("base".to_owned()));
        let made = Box::pin(self.make_sandbox(tenant, wanted, &mut log)).await;
        let (info, defaults) = match made {
            Ok(made) => made,
            Err(error) => return Err(self.tell(&mut log, Failure::at("base")(error)).await),
        };
        let guest = Guest::new(self.host.clone(), info.id, info.access_token.clone());
        let mut site =
            Site { host: self.host.clone(), tenant: tenant.clone(), guest, log, defaults };
        let outcome = self.in_sandbox(&mut site, &info, wanted).await;
        match outcome {
            Ok(()) => Ok(()),
            Err(failure) => Err(self.tell(&mut site.log, failure).await),
        }
    }

    /// Puts a failure into the log.
    async fn tell(&self, log: &mut Log, failure: Failure) -> Failure {
        log.say(Level::Error, &failure.error.0).await;
        failure
    }

    async fn make_sandbox(
        &self,
        tenant: &TenantId,
        wanted: &Started,
        log: &mut Log,
    ) -> Result<(SandboxInfo, BuiltDefaults), StepError> {
        let size = (self.record.vcpus, self.record.memory_mib);
        let base =
            base::of_build(&self.host, tenant, &wanted.from, size, self.memory_mib_max).await?;
        log.say(Level::Info, "Starting a sandbox of the base").await;
        let defaults = base.defaults.unwrap_or_default();
        let request = CreateRequest {
            secure: true,
            tenant: BUILD_TENANT.parse().unwrap_or_default(),
            defaults: Some(defaults_for_agent(&defaults)),
            ..CreateRequest::new(&base.template, SANDBOX_LIFE)
        };
        let mut info = self.host.create(request).await?;
        self.sandbox.set(Some(info.id));
        if let Some(size) = base.boots_in {
            let (vcpus, memory) = size;
            let text = format!(
                "Booting it with {vcpus} vCPUs and {memory}; what ran in the base does not run there"
            );
            log.say(Level::Info, &text).await;
            info = self.host.boot_resized(info.id, size).await?;
        }
        Ok((info, defaults))
    }

    async fn in_sandbox(
        &self,
        site: &mut Site,
        info: &SandboxInfo,
        wanted: &Started,
    ) -> Result<(), Failure> {
        let count = wanted.steps.len();
        for (number, step) in (1..).zip(&wanted.steps) {
            site.log.set_step(Some(number.to_string()));
            site.log.say(Level::Info, &format!("[{number}/{count}] {}", step.shown())).await;
            site.carry_out(step).await.map_err(Failure::at(number))?;
        }
        site.log.set_step(Some("finalize".to_owned()));
        let finalize = Failure::at("finalize");
        site.bring_up(wanted.start.as_deref(), wanted.ready.as_deref()).await.map_err(&finalize)?;
        site.log.say(Level::Info, "Saving the sandbox as it runs").await;
        self.keep(info, site.defaults.clone()).await.map_err(finalize)?;
        site.log.say(Level::Info, "The template is ready").await;
        Ok(())
    }

    /// Saves the sandbox, and lets the template's tags stand for that.
    async fn keep(&self, info: &SandboxInfo, defaults: BuiltDefaults) -> Result<(), StepError> {
        let unnamed = |_| StepError("the template's name is out of form".to_owned());
        let record = self.record.clone();
        let built_for = BuiltFor {
            template_id: record.template_id.clone(),
            template_name: record.name.parse().map_err(unnamed)?,
            tenant: record.tenant.parse().map_err(unnamed)?,
        };
        let snapshot = self.host.snapshot_built(info.id, built_for).await?.id;
        let built = Built {
            build_id: record.id.clone(),
            snapshot_id: snapshot.clone(),
            created_unix_ms: record.created_unix_ms,
            finished_unix_ms: super::now_unix_ms(),
            vcpus: u32::from(info.vcpus.get()),
            memory_mib: info.memory.count(),
            disk_mib: info.disk.count(),
            envd_version: info.envd_version.clone(),
            defaults,
        };
        let added = self
            .host
            .with_builds(move |builds| builds.add_built(&record.template_id, &record.tags, built));
        let gone = match added.await {
            Ok(Ok(Some(freed))) => {
                forget_snapshots(&self.host, freed).await;
                return Ok(());
            }
            Ok(Ok(None)) => StepError("the template was deleted while it was built".to_owned()),
            Ok(Err(error)) => error.into(),
            Err(error) => error.into(),
        };
        forget_snapshots(&self.host, vec![snapshot]).await;
        Err(gone)
    }

    async fn end_sandbox(&self) {
        let Some(id) = self.sandbox.take() else { return };
        for _ in 0..KILL_TRIES {
            match self.host.kill(id).await {
                Err(mica_shards::ShardError::Busy) => time::sleep(KILL_RETRY).await,
                // Gone by itself, or with the host.
                _ => return,
            }
        }
        tracing::warn!(%id, "a build's sandbox lives until its time is over");
    }

    async fn set_phase(&self, phase: BuildPhase) {
        let record = self.record.clone();
        let set = self.host.with_builds(move |builds| Ok(builds.set_phase(record, phase)?)).await;
        if !matches!(set, Ok(Ok(_))) {
            // Where the host ends, the next start writes it.
            tracing::warn!(build = self.record.id, ?set, "how far a build is cannot be written");
        }
    }
}
