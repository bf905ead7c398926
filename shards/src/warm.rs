//! Makes the running snapshot of a template: boots it once, waits until it is warm, freezes it, and
//! writes down what it is.
//!
//! Called by `mica template`, in a process of its own and beside a daemon that may run: with a control
//! group of its own. Nothing else boots a guest from a kernel, but for a sandbox that was paused without its
//! memory. Refuses to leave anything of a template that does not come up; what it said on its console is in
//! the error.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mica_numa::io::{Ring, RingConfig};
use mica_numa::process::{ProcessError, RemoteMemory, Wanted};
use mica_numa::rt::{self, time};
use mica_numa::{Placement, Plan, ShardSeat, StopSignal, seat};
use mica_storage::{
    FlatWriter, LayerInfo, ReadyWhen, SnapshotKind, SnapshotManifest, StorageError, Template,
};
use mica_units::{FrameRun, SandboxId, ShardCount, ShardId, frames_len, frames_of};
use mica_wire::guest::ControlRequest;
use mica_wire::vm::{self, BootConfig, Command, FdRole};

use crate::run::{Base, open_base};
use crate::sandbox::{RingFile, chain, read_state, send, tell_agent};
use crate::shell::demand::Demand;
use crate::shell::{NoShell, Shell, Size};
use crate::{HostConfig, RunError, console};

/// Frames that are read at once.
const FRAMES_PER_READ: u32 = 256;

/// Why a template is not warm.
#[derive(Debug, thiserror::Error)]
pub enum WarmError {
    /// The host.
    #[error(transparent)]
    Host(#[from] RunError),
    /// The machine.
    #[error("this machine is not ready to start a guest")]
    Machine(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No such template.
    #[error("template {0:?} does not exist")]
    NoSuchTemplate(String),
    /// The store.
    #[error("the store failed")]
    Storage(#[from] StorageError),
    /// The guest did not come up.
    #[error("the guest did not come up: {why}\n{console}")]
    Guest {
        /// What went wrong.
        why: String,
        /// The end of its console.
        console: String,
    },
    /// Its memory.
    #[error("the memory of the guest could not be read")]
    Memory(#[from] ProcessError),
    /// A blocking thread.
    #[error("a blocking thread did not do its part")]
    Blocking(#[from] rt::BlockingError),
}

/// Warms `template` up and commits its running snapshot. Blocks the calling thread. `plan` is where it
/// runs: its first seat.
///
/// # Errors
/// See [`WarmError`]. Nothing of it is left then.
pub fn warm(
    plan: &Plan,
    config: HostConfig,
    stop: StopSignal,
    template: &str,
) -> Result<(), WarmError> {
    let (base, cgroups) = open_base(config, plan)?;
    // What an earlier run left in its own control group.
    let left: Vec<SandboxId> =
        cgroups.children().map_err(machine)?.into_iter().map(|(name, _)| name).collect();
    cgroups.sweep(&left).map_err(machine)?;
    let plan = Plan { seats: plan.seats.iter().copied().take(1).collect(), ..plan.clone() };
    let node = plan.seats.first().map_or(0, |seat| seat.node);
    let input = (base, Placement::of_node(&plan, node), template.to_owned());
    let signal = stop.clone();
    let ran = seat::run_all(
        &plan,
        vec![input],
        &stop,
        move |_: ShardSeat, (base, placement, template)| {
            let signal = signal.clone();
            async move {
                let stopped = async {
                    signal.stopped().await;
                    Err(guest("it was told to stop", ""))
                };
                futures_lite::future::or(on_seat(base, placement, template), stopped).await
            }
        },
    );
    match ran.map_err(machine)?.pop() {
        Some(outcome) => outcome,
        None => Err(guest("no seat ran", "")),
    }
}

fn machine<E: std::error::Error + Send + Sync + 'static>(error: E) -> WarmError {
    WarmError::Machine(Box::new(error))
}

fn guest(why: impl Into<String>, console: impl Into<String>) -> WarmError {
    WarmError::Guest { why: why.into(), console: console.into() }
}

async fn on_seat(base: Base, placement: Placement, name: String) -> Result<(), WarmError> {
    let store = base.workshop.store.clone();
    let wanted = name.clone();
    let found = rt::blocking(move || store.find_template(&wanted)).await??;
    let template = found.ok_or(WarmError::NoSuchTemplate(name))?;
    let buffers = base.workshop.config.io_buffers;
    let ring = Ring::attach(RingConfig { buffers }).map_err(machine)?;
    let manifest = template.manifest();
    let size = Size { vcpus: manifest.vcpus, memory: manifest.memory, disk: manifest.has_disk() };
    let pool = base.pool(ShardId::new(0), ShardCount::MIN, placement, Demand::default());
    let shell = pool
        .take(size, &manifest.id)
        .await
        .map_err(|error: NoShell| guest(format!("there is no VM process for it: {error}"), ""))?;
    let held = Rc::clone(&shell.held);
    let outcome = warm_up(&base, &ring, &template, shell).await;
    let outcome = outcome.map_err(|error| match error {
        WarmError::Guest { why, .. } => {
            let bytes = base.workshop.config.console_bytes;
            let said = console::tail(&held.console, bytes).unwrap_or_default();
            let complaint = held.process.complaint();
            guest(format!("{why} {complaint}"), said)
        }
        other => other,
    });
    pool.end(&held).await;
    pool.close().await;
    let (store, id) = (base.workshop.store.clone(), held.name);
    rt::blocking(move || store.remove_sandbox(&id)).await??;
    ring.close().await;
    outcome
}

async fn warm_up(
    base: &Base,
    ring: &Rc<Ring>,
    template: &Template,
    mut shell: Shell,
) -> Result<(), WarmError> {
    let disk = boot(base, template, &shell).await?;
    let deadline = base.workshop.config.boot_deadline;
    let manifest = template.manifest();
    tracing::info!(name = %manifest.name, "booting");
    let ready = match manifest.ready {
        ReadyWhen::Agent => vm::Event::Doorbell,
        ReadyWhen::Console => vm::Event::ConsoleStarted,
    };
    wait(&mut shell, deadline, "its boot", |event| *event == ready).await?;
    if manifest.ready == ReadyWhen::Agent {
        tracing::info!(name = %manifest.name, "warming up");
        let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        let request = ControlRequest::Warm { deadline_ms };
        let told = time::timeout(deadline, tell_agent(&shell.held.control, &request)).await;
        told.map_err(|_| guest("its services did not start in time", ""))?
            .map_err(|error| guest(format!("its services did not start: {error}"), ""))?;
    }
    command(&shell, &Command::Freeze, &[]).await?;
    let frozen =
        wait(&mut shell, deadline, "its freeze", |event| matches!(event, vm::Event::Frozen { .. }));
    let vm::Event::Frozen { state_bytes, .. } = frozen.await? else {
        return Err(guest("it broke its protocol", ""));
    };
    let state =
        read_state(&shell.held.exchange, state_bytes).map_err(|error| guest(chain(&error), ""))?;
    tracing::info!(name = %manifest.name, "writing its running snapshot");
    write(base, ring, template, &shell, disk, state).await
}

async fn command(
    shell: &Shell,
    command: &Command,
    fds: &[BorrowedFd<'_>],
) -> Result<(), WarmError> {
    let sent = send(&shell.held.control, command, fds).await;
    sent.map_err(|error| guest(chain(&error), ""))
}

/// Waits for an event; those before it are of no interest, unless they end it.
async fn wait(
    shell: &mut Shell,
    deadline: Duration,
    what: &str,
    is_it: impl Fn(&vm::Event) -> bool,
) -> Result<vm::Event, WarmError> {
    let events = &mut shell.events;
    let coming = async {
        loop {
            match events.next().await {
                Ok(vm::Event::Ended(ending)) => {
                    return Err(guest(format!("during {what} it ended: {ending:?}"), ""));
                }
                Ok(event) if is_it(&event) => return Ok(event),
                Ok(_) => {}
                Err(how) => return Err(guest(how, "")),
            }
        }
    };
    let late = || guest(format!("{what} took longer than {} s", deadline.as_secs()), "");
    time::timeout(deadline, coming).await.map_err(|_| late())?
}

/// Opens everything it boots from, and boots it. Its disk, for the snapshot.
async fn boot(
    base: &Base,
    template: &Template,
    shell: &Shell,
) -> Result<Option<Arc<std::fs::File>>, WarmError> {
    let (store, from, id) = (base.workshop.store.clone(), template.clone(), shell.held.name);
    let open = move || -> Result<_, StorageError> {
        let mut roles = vec![FdRole::Kernel];
        let mut fds = vec![OwnedFd::from(from.open_kernel()?)];
        if let Some(initramfs) = from.open_initramfs()? {
            roles.push(FdRole::Initramfs);
            fds.push(initramfs.into());
        }
        let disk = from.open_disk()?;
        let disk = store.create_sandbox(&id, disk.as_ref())?;
        Ok((roles, fds, disk))
    };
    let (mut roles, mut fds, disk) = rt::blocking(open).await??;
    let disk = disk.map(Arc::new);
    if let Some(disk) = &disk {
        roles.push(FdRole::Disk);
        fds.push(disk.as_fd().try_clone_to_owned().map_err(machine)?);
    }
    let cmdline = template.manifest().cmdline.clone();
    let config = BootConfig { cmdline, disk_read_only: false, fds: roles };
    let beside: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    command(shell, &Command::Boot(config), &beside).await?;
    Ok(disk)
}

async fn write(
    base: &Base,
    ring: &Rc<Ring>,
    template: &Template,
    shell: &Shell,
    disk: Option<Arc<std::fs::File>>,
    state: Vec<u8>,
) -> Result<(), WarmError> {
    let (store, manifest) = (base.workshop.store.clone(), template.manifest().clone());
    let id = manifest.id.clone();
    let stage = move || -> Result<_, StorageError> {
        // An earlier one is replaced: a restore that has it open goes on with it.
        store.delete_snapshot(&id)?;
        let staging = store.stage_snapshot(&id)?;
        let layer = staging.create_layer()?;
        Ok((staging, layer))
    };
    let (staging, (layer, file)) = rt::blocking(stage).await??;
    let frames = frames_of(manifest.memory);
    let writer = FlatWriter::new(RingFile::new(Rc::clone(ring), file), layer, frames);
    let base_layer = write_memory(ring, shell, writer, frames).await?;
    let disk_bytes = manifest.disk_bytes();
    let committed = rt::blocking(move || -> Result<_, StorageError> {
        if let Some(disk) = disk {
            // Copied, not cloned: every sandbox's disk is a clone of this one, and a clone costs as
            // much as its source has pieces.
            staging.copy_disk(&disk)?;
        }
        staging.seal(describe(manifest, base_layer, disk_bytes, state))
    });
    committed.await??;
    Ok(())
}

fn describe(
    template: mica_storage::Manifest,
    base: LayerInfo,
    disk_bytes: u64,
    state: Vec<u8>,
) -> SnapshotManifest {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    SnapshotManifest {
        id: template.id.clone(),
        kind: SnapshotKind::Template,
        name: None,
        template_id: template.id,
        template_name: template.name,
        parent: None,
        sandbox: None,
        tenant: None,
        created_unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        vcpus: template.vcpus,
        memory: template.memory,
        envd_version: template.envd_version,
        ready: template.ready,
        layers: vec![base],
        disk_bytes,
        state,
        record: Vec::new(),
    }
}

/// All of the guest's memory; what it never touched is zero without being read.
async fn write_memory(
    ring: &Rc<Ring>,
    shell: &Shell,
    mut writer: FlatWriter<RingFile>,
    frames: u32,
) -> Result<LayerInfo, WarmError> {
    let process = &shell.held.process;
    let memory = RemoteMemory::new(shell.held.layout.memory_address, frames)
        .ok_or(WarmError::Memory(ProcessError::Range))?;
    let touched = process.pagemap().scan_all(memory, Wanted::Anonymous).await?;
    let zeros = vec![0; frames_len(FRAMES_PER_READ)];
    let mut next = 0;
    let mut buffer = ring.buffer().await;
    for run in touched {
        while next < run.first() {
            let count = (run.first() - next).min(FRAMES_PER_READ);
            writer.push(&zeros[..frames_len(count)]).await?;
            next += count;
        }
        while next < run.end() {
            let count = (run.end() - next).min(FRAMES_PER_READ);
            let part = FrameRun::new(next, count).ok_or(WarmError::Memory(ProcessError::Range))?;
            buffer.clear();
            process.process().read_frames(memory, &[part], &mut buffer)?;
            writer.push(buffer.bytes()).await?;
            next += count;
        }
    }
    Ok(writer.finish().await?)
}
