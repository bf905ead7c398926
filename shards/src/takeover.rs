//! Takes a sandbox of an earlier daemon over.
//!
//! Called on the shard that the sandbox's id names, before it serves. Its process kept a duplicate of
//! everything the daemon held; what is told there is as hostile as everything from a VM process.
//! Refuses to give up a paused sandbox because of its process: then it is resumed from disk.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mica_numa::rt::{self, oneshot};
use mica_storage::Layer;
use mica_units::SandboxId;
use mica_wire::vm::{self, ControlSocket};
use rustix::process::Pid;

use crate::event::{IfRunning, Keeps, Wake};
use crate::recovery::Survivor;
use crate::sandbox::{
    Identity, Memory, Record, RecordedProcess, RecordedState, Request, Sandbox, Start, chain,
};
use crate::shard::Shard;
use crate::shell::{Held, OpenError, VmProcess};
use crate::{
    Account, Accounts, CreateRequest, Digest, MemoKey, NEVER, NetworkPolicy, OnTimeout, OnceName,
};

/// Why a process cannot be taken over.
#[derive(Debug, thiserror::Error)]
enum TakeoverError {
    /// It is gone, or not readable.
    #[error("its process cannot be held")]
    Process(#[from] OpenError),
    /// One of its descriptors.
    #[error("its descriptors cannot be taken")]
    Descriptor(#[from] mica_numa::process::ProcessError),
    /// Its record names no process.
    #[error("its record is not in form")]
    Record,
    /// What it runs on.
    #[error("the layers of its memory are not there")]
    Layers(#[from] mica_storage::StorageError),
}

/// Begins the life of a survivor.
pub(crate) async fn take_over(shard: &Rc<Shard>, survivor: Survivor) {
    let Survivor { id, record, alive } = survivor;
    let sandbox = Sandbox::new(id, identity(&record, &shard.workshop.config.accounts), None);
    let process = match hold(shard, id, &record, alive).await {
        Ok(process) => process,
        Err(StillThere) => {
            tracing::error!(%id, "this sandbox is left to the next start: its process does not end");
            return;
        }
    };
    let start = match (&record.state, process) {
        (RecordedState::Running, Some((held, memory))) => {
            Start::Adopt(Box::new(record), held, memory)
        }
        (RecordedState::Running, None) => {
            tracing::error!(%id, "a running sandbox could not be taken over");
            Start::Lost(Box::new(record))
        }
        (RecordedState::Paused { .. }, process) => Start::Paused(Box::new(record), process),
        (RecordedState::OnDisk { .. }, _) => Start::Paused(Box::new(record), None),
        (RecordedState::RollingBack { .. }, _) => {
            let life = Some(left(&record));
            let (if_running, from) = (IfRunning::Refuse, Keeps::All);
            let wake = Wake { life, on_timeout: None, if_running, from, size: None };
            let (sender, _nobody) = oneshot::channel();
            sandbox.ask(Request::Resume(wake, sender));
            Start::Paused(Box::new(record), None)
        }
    };
    shard.begin(sandbox, start);
}

/// A process that can be neither held nor ended. It may still write to its disk.
struct StillThere;

/// Takes hold of the process of a sandbox, if it lives. One that cannot be held is ended first: it may
/// have died since it was looked for, and nobody else will find its cgroup; or it may run, and nothing
/// else may use its disk before it is gone.
async fn hold(
    shard: &Rc<Shard>,
    id: SandboxId,
    record: &Record,
    alive: bool,
) -> Result<Option<(Rc<Held>, Memory)>, StillThere> {
    let Some(process) = record.process.clone().filter(|_| alive) else { return Ok(None) };
    let why = match open(shard, id, record, process.clone()).await {
        Ok(found) => return Ok(Some(found)),
        Err(why) => why,
    };
    tracing::error!(%id, why, "a VM process cannot be taken over; it is ended");
    // Its name is that of a cgroup which was found.
    let Ok(name) = process.name.parse() else { return Err(StillThere) };
    match shard.pool.take_back(name, process.uid).await {
        true => Ok(None),
        false => Err(StillThere),
    }
}

async fn open(
    shard: &Rc<Shard>,
    id: SandboxId,
    record: &Record,
    process: RecordedProcess,
) -> Result<(Rc<Held>, Memory), String> {
    let store = shard.workshop.store.clone();
    let infos = record.layers.clone();
    let opened = rt::blocking(move || -> Result<(Held, Vec<Layer>), TakeoverError> {
        let layers = store.open_lineage(&id, &infos)?;
        Ok((held(&process)?, layers))
    });
    let (held, layers) =
        opened.await.map_err(|error| error.to_string())?.map_err(|error| chain(&error))?;
    let on_demand = record.on_demand;
    let memory = Memory { layers, on_demand, doubted: true, ..Memory::default() };
    shard.pool.pin(&held).await;
    Ok((Rc::new(held), memory))
}

fn held(recorded: &RecordedProcess) -> Result<Held, TakeoverError> {
    let pid = i32::try_from(recorded.pid).ok().and_then(Pid::from_raw);
    let process = VmProcess::open(pid.ok_or(TakeoverError::Record)?, &mut None)?;
    let descriptor = |number| -> Result<OwnedFd, TakeoverError> { Ok(process.descriptor(number)?) };
    let (control, exchange, console) = (
        descriptor(recorded.spare_fd)?,
        descriptor(recorded.exchange_fd)?,
        descriptor(recorded.console_fd)?,
    );
    let layout = vm::Shell {
        memory_address: recorded.memory_address,
        spare_fd: recorded.spare_fd,
        exchange_fd: recorded.exchange_fd,
        console_fd: recorded.console_fd,
        userfault_fd: recorded.userfault_fd,
    };
    let name = recorded.name.parse().map_err(|_| TakeoverError::Record)?;
    let control = ControlSocket::from_fd(control);
    let (uid, taken_back, pinned) = (recorded.uid, Cell::new(false), RefCell::new(None));
    Ok(Held { name, uid, process, control, console, exchange, layout, pinned, taken_back })
}

fn identity(record: &Record, accounts: &Accounts) -> Identity {
    let account = record.account.as_ref().and_then(|account| accounts.get(account));
    let request = CreateRequest {
        template: record.template.clone(),
        timeout: Duration::from_millis(record.timeout_ms),
        idle: record.idle,
        secure: record.secure,
        metadata: record.metadata.clone(),
        env_vars: record.env_vars.clone(),
        on_timeout: OnTimeout::from(record.at_end),
        auto_resume: record.auto_resume,
        // Its checksum holds, so this is what was written.
        tenant: record.tenant.parse().unwrap_or_default(),
        network: NetworkPolicy::from(&record.network),
        // The key of an account may have been revoked meanwhile: then nobody counts.
        seat: account.map(Account::resume),
        defaults: None,
        once: record.once.as_ref().map(OnceName::from),
    };
    Identity {
        request,
        of_copies: false,
        access_token: record.access_token.clone(),
        traffic_token: record.traffic_token.clone(),
        machine_id: record.machine_id.clone(),
    }
}

/// A create that an earlier daemon was asked for under a name, and what came of it.
#[derive(Debug)]
pub(crate) struct Left {
    pub(crate) key: MemoKey,
    pub(crate) digest: Digest,
    /// None of one that may not have been ready.
    pub(crate) sandbox: Option<SandboxId>,
    /// How long ago.
    pub(crate) age: Duration,
}

impl Left {
    /// What the record of a survivor says of its create.
    pub(crate) fn of(survivor: &Survivor) -> Option<Self> {
        let Survivor { id, record, .. } = survivor;
        let once = record.once.as_ref()?;
        let OnceName { name, digest } = once.into();
        let sandbox = once.came_up.then_some(*id);
        let key = MemoKey { tenant: record.tenant.parse().ok()?, name };
        let made = UNIX_EPOCH + Duration::from_millis(record.started_unix_ms);
        let age = SystemTime::now().duration_since(made).unwrap_or_default();
        Some(Self { key, digest, sandbox, age })
    }
}

/// What is left of its time.
fn left(record: &Record) -> Duration {
    let Some(end_unix_ms) = record.end_unix_ms else { return NEVER };
    let end = UNIX_EPOCH + Duration::from_millis(end_unix_ms);
    end.duration_since(SystemTime::now()).unwrap_or_default()
}
