//! What a driver writes down for the next daemon and for snapshots, and what it tells clients.
//!
//! Called by the driver. Refuses to answer before what is told is written.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mica_numa::rt;
use mica_storage::{
    Layer, LayerInfo, OpenSnapshot, ReadyWhen, Snapshot, SnapshotKind, SnapshotManifest,
    StorageError, Store,
};
use mica_units::{Mebibytes, SandboxId, TemplateName, VcpuCount};
use mica_wire::vm::{self, Command};

use super::super::capture::{CaptureError, OpenedLayers};
use super::super::image::{Opened, pieces_of};
use super::super::memory::Memory;
use super::super::record::{
    Record, RecordError, RecordedEnd, RecordedNetwork, RecordedProcess, RecordedState,
};
use super::super::state::Event;
use super::super::{Request, chain, paging, token_of};
use super::Driver;
use crate::event::Purpose;
use crate::shell::Held;
use crate::{Lifecycle, NEVER, SandboxInfo};

/// What does not change in the life of a sandbox: from the snapshot it was made of, or its record. Its size
/// alone does, where it boots in another.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) template_id: String,
    pub(super) template_name: TemplateName,
    pub(super) vcpus: VcpuCount,
    pub(super) memory: Mebibytes,
    pub(super) disk_bytes: u64,
    pub(super) envd_version: String,
    pub(super) has_agent: bool,
}

impl Shape {
    /// As a snapshot says.
    pub(super) fn of(manifest: &SnapshotManifest) -> Self {
        Self {
            template_id: manifest.template_id.clone(),
            template_name: manifest.template_name.clone(),
            vcpus: manifest.vcpus,
            memory: manifest.memory,
            disk_bytes: manifest.disk_bytes,
            envd_version: manifest.envd_version.clone(),
            has_agent: manifest.ready == ReadyWhen::Agent,
        }
    }

    fn recorded(record: &Record) -> Option<Self> {
        Some(Self {
            template_id: record.template_id.clone(),
            template_name: record.template_name.parse().ok()?,
            vcpus: VcpuCount::new(record.vcpus).ok()?,
            memory: Mebibytes::new(record.memory_mib),
            disk_bytes: record.disk_bytes,
            envd_version: record.envd_version.clone(),
            has_agent: record.has_agent,
        })
    }

    pub(super) fn disk(&self) -> Mebibytes {
        Mebibytes::covering_bytes(self.disk_bytes).unwrap_or(Mebibytes::new(u32::MAX))
    }
}

/// A manifest but for what the capture finds out.
#[derive(Debug)]
pub(super) struct Draft {
    manifest: SnapshotManifest,
}

impl Draft {
    /// With its id, its layers and the state.
    pub(super) fn finish(
        self,
        id: String,
        layers: Vec<LayerInfo>,
        state: Vec<u8>,
    ) -> SnapshotManifest {
        let mut manifest = self.manifest;
        manifest.id = id;
        manifest.layers = layers;
        manifest.state = state;
        manifest
    }
}

/// Makes the record of a paused sandbox of the snapshot's id, and of its layers where those are new.
pub(super) type PausedRecord =
    Box<dyn FnOnce(&str, Option<Vec<LayerInfo>>) -> Result<Vec<u8>, RecordError> + Send>;

/// What becomes of links to layers that a record does not name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Links {
    /// They stay: a capture may just have made them.
    Stay,
    /// They go.
    AsRecorded,
}

/// A snapshot that was committed.
#[derive(Debug)]
pub(super) struct Committed {
    pub(super) manifest: SnapshotManifest,
    pub(super) layers: Vec<Layer>,
    /// For whoever starts from it or goes back to it.
    pub(super) image: Option<Arc<Opened>>,
}

/// A new snapshot as an image, while all of it is at hand. Whoever needs one that is not there opens it.
fn opened(snapshot: &Snapshot, layers: &[Layer]) -> Option<Arc<Opened>> {
    if snapshot.manifest().kind == SnapshotKind::Pause {
        return None;
    }
    let disk = snapshot.open_disk().ok()?.map(Arc::new);
    let open = OpenSnapshot { snapshot: snapshot.clone(), layers: layers.to_vec(), disk };
    Opened::new(open).ok().map(Arc::new)
}

/// Makes what a committed snapshot means for its sandbox last.
pub(super) struct Keeper {
    pub(super) store: Store,
    pub(super) sandbox: SandboxId,
    /// The record of a pause.
    pub(super) paused: Option<PausedRecord>,
}

impl Keeper {
    /// Links the layers, and writes the record of a pause. Where that fails, or nobody waits for it any
    /// more, the snapshot goes again. The layers before stay: the record of a sandbox that runs names
    /// them. Blocks.
    pub(super) fn keep(
        self,
        snapshot: Snapshot,
        layers: OpenedLayers,
        unheard: &dyn Fn() -> bool,
    ) -> Result<Committed, CaptureError> {
        let Self { store, sandbox, paused } = self;
        let manifest = snapshot.manifest().clone();
        let kept = || -> Result<Vec<Layer>, CaptureError> {
            let layers = layers?;
            store.link_layers(&sandbox, &layers)?;
            if unheard() {
                return Err(StorageError::SnapshotGone { id: manifest.id.clone() }.into());
            }
            if let Some(paused) = paused {
                let infos = layers.iter().map(|layer| *layer.info()).collect();
                let record = paused(&manifest.id, Some(infos)).map_err(|error| {
                    CaptureError::State(format!("its record: {}", chain(&error)))
                })?;
                store.write_record(&sandbox, &record, true)?;
            }
            Ok(layers)
        };
        let layers = kept().inspect_err(|_| {
            if let Err(error) = store.delete_snapshot(&manifest.id) {
                let (id, error) = (&manifest.id, chain(&error));
                tracing::error!(id, error, "a snapshot of nobody's stays");
            }
        })?;
        let image = opened(&snapshot, &layers);
        Ok(Committed { manifest, layers, image })
    }
}

/// The snapshot that another can be said to come from: one of a pause goes with that.
fn lasting_id(manifest: &SnapshotManifest) -> Option<String> {
    match manifest.kind {
        SnapshotKind::Pause => manifest.parent.clone(),
        _ => Some(manifest.id.clone()),
    }
}

fn unix_ms(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Tells the answer to this daemon's question from those to others' before it.
pub(super) fn nonce() -> u64 {
    std::process::id().into()
}

impl Driver {
    pub(super) fn manifest_draft(&self, pausing: bool) -> Option<Draft> {
        let shape = self.shape.clone()?;
        let mut template = (shape.template_id, shape.template_name);
        let mut tenant = self.sandbox.identity.request.tenant.clone();
        let (kind, name) = match &self.request {
            _ if pausing => (SnapshotKind::Pause, None),
            Some(Request::Snapshot(Purpose::Built(built), ..)) => {
                template = (built.template_id.clone(), built.template_name.clone());
                tenant = built.tenant.clone();
                (SnapshotKind::Built, None)
            }
            Some(Request::Snapshot(Purpose::Client(name), ..)) => {
                (SnapshotKind::Snapshot, name.clone())
            }
            _ => (SnapshotKind::Copies, None),
        };
        let manifest = SnapshotManifest {
            // The staging draws it.
            id: String::new(),
            kind,
            name,
            template_id: template.0,
            template_name: template.1,
            parent: self.image.as_ref().and_then(|image| lasting_id(&image.manifest)),
            sandbox: Some(self.sandbox.id),
            tenant: Some(tenant),
            created_unix_ms: unix_ms(SystemTime::now()),
            vcpus: shape.vcpus,
            memory: shape.memory,
            envd_version: shape.envd_version,
            ready: if shape.has_agent { ReadyWhen::Agent } else { ReadyWhen::Console },
            layers: Vec::new(),
            disk_bytes: shape.disk_bytes,
            state: Vec::new(),
            record: Vec::new(),
        };
        Some(Draft { manifest })
    }

    fn record(&self, state: RecordedState) -> Result<Record, RecordError> {
        let shape = self.shape.as_ref().ok_or(RecordError::Contents)?;
        let identity = &self.sandbox.identity;
        let request = &identity.request;
        let now = SystemTime::now();
        let times = self.sandbox.info.borrow().as_ref().map(|info| (info.started_at, info.end_at));
        let (started_at, end_at) = times.or(self.born).unwrap_or((now, Some(now)));
        Ok(Record {
            state,
            process: self.held().as_deref().map(recorded),
            template: request.template.clone(),
            template_id: shape.template_id.clone(),
            template_name: shape.template_name.as_str().to_owned(),
            envd_version: shape.envd_version.clone(),
            has_agent: shape.has_agent,
            vcpus: u32::from(shape.vcpus.get()),
            memory_mib: shape.memory.count(),
            disk_bytes: shape.disk_bytes,
            started_unix_ms: unix_ms(started_at),
            end_unix_ms: end_at.map(unix_ms),
            timeout_ms: whole_ms(request.timeout),
            idle: request.idle,
            life_ms: whole_ms(self.sandbox.life()),
            at_end: RecordedEnd::from(self.sandbox.on_timeout.get()),
            auto_resume: request.auto_resume,
            tenant: request.tenant.as_str().to_owned(),
            account: request.seat.as_ref().map(|seat| seat.account().id().to_owned()),
            network: RecordedNetwork::from(&*self.sandbox.network.borrow()),
            traffic_token: identity.traffic_token.clone(),
            secure: request.secure,
            access_token: identity.access_token.clone(),
            machine_id: identity.machine_id.clone(),
            metadata: request.metadata.clone(),
            env_vars: request.env_vars.clone(),
            on_demand: self.memory.on_demand,
            layers: self.memory.layers.iter().map(|layer| *layer.info()).collect(),
            once: Record::once_of(request.once.as_ref(), self.came_up),
        })
    }

    /// The record of it as it runs.
    pub(super) fn record_bytes(&self) -> Result<Vec<u8>, RecordError> {
        self.record(RecordedState::Running)?.encode()
    }

    pub(super) fn rolling_back_record(&self, snapshot: &str) -> Result<Vec<u8>, RecordError> {
        self.record(RecordedState::RollingBack { snapshot: snapshot.to_owned() })?.encode()
    }

    pub(super) fn paused_record(&self) -> Option<PausedRecord> {
        let mut record = self.record(RecordedState::Running).ok()?;
        let disk_alone = self.disk_alone;
        Some(Box::new(move |snapshot, layers| {
            record.layers = layers.unwrap_or(record.layers);
            let snapshot = snapshot.to_owned();
            record.state = match disk_alone {
                true => RecordedState::OnDisk { snapshot },
                false => RecordedState::Paused { snapshot },
            };
            record.encode()
        }))
    }

    /// Shows what a record says.
    pub(super) fn show_record(&mut self, record: &Record) {
        let at = |unix_ms: u64| UNIX_EPOCH + Duration::from_millis(unix_ms);
        let end_at = record.end_unix_ms.map(at);
        let left =
            end_at.map_or(NEVER, |end| end.duration_since(SystemTime::now()).unwrap_or_default());
        self.sandbox.goes_on_for(left, Duration::from_millis(record.life_ms));
        let state = match record.state {
            RecordedState::Running => Lifecycle::Running,
            RecordedState::Paused { .. }
            | RecordedState::RollingBack { .. }
            | RecordedState::OnDisk { .. } => Lifecycle::Paused,
        };
        let Some(shape) = Shape::recorded(record) else {
            tracing::error!(id = %self.sandbox.id, "a record is out of its bounds");
            self.caused.push_back(Event::Kill);
            return;
        };
        self.came_up = record.once.as_ref().is_none_or(|once| once.came_up);
        *self.sandbox.info.borrow_mut() = Some(SandboxInfo {
            started_at: at(record.started_unix_ms),
            end_at,
            state,
            disk_alone: matches!(record.state, RecordedState::OnDisk { .. }),
            ..self.info_of(&shape)
        });
        self.shape = Some(shape);
    }

    /// What clients see of a sandbox that starts now.
    pub(super) fn info_of(&self, shape: &Shape) -> SandboxInfo {
        let now = SystemTime::now();
        SandboxInfo {
            id: self.sandbox.id,
            template_id: shape.template_id.clone(),
            template_name: shape.template_name.clone(),
            started_at: now,
            end_at: Some(now),
            state: Lifecycle::Running,
            disk_alone: false,
            vcpus: shape.vcpus,
            memory: shape.memory,
            disk: shape.disk(),
            envd_version: shape.envd_version.clone(),
            metadata: self.sandbox.identity.request.metadata.clone(),
            access_token: self.sandbox.identity.access_token.clone(),
            traffic_token: token_of(&self.sandbox.identity, &self.sandbox.network.borrow()),
            on_timeout: self.sandbox.on_timeout.get(),
            auto_resume: self.sandbox.identity.request.auto_resume,
            tenant: self.sandbox.identity.request.tenant.clone(),
            network: self.sandbox.network.borrow().clone(),
        }
    }

    /// Takes over a process that runs or is frozen, with its disk and its memory, and asks it how far it
    /// is.
    pub(super) async fn adopt(&mut self, held: Rc<Held>, memory: Memory) {
        self.memory = memory;
        let (store, id) = (self.shard.workshop.store.clone(), self.sandbox.id);
        match rt::blocking(move || store.open_sandbox_disk(&id)).await {
            Ok(Ok(disk)) => self.disk = disk.map(std::sync::Arc::new),
            Ok(Err(error)) => {
                tracing::error!(%id, error = chain(&error), "the disk of a sandbox is not there");
                self.caused.push_back(Event::VmLost("its disk cannot be opened"));
            }
            Err(error) => {
                tracing::error!(%id, %error, "a sandbox cannot be taken over");
                self.caused.push_back(Event::VmLost("it could not be taken over"));
            }
        }
        if self.memory.on_demand
            && let Err(error) = self.page_again(&held)
        {
            tracing::error!(%id, error, "the memory of a sandbox cannot be brought in");
            self.caused.push_back(Event::VmLost("its memory cannot be brought in"));
        }
        self.hold(held);
        self.command(&Command::Report { nonce: nonce() }, &[]).await;
    }

    /// Goes on with memory on demand where a daemon before this one stopped.
    fn page_again(&mut self, held: &Held) -> Result<(), String> {
        let layers = self.memory.layers.clone();
        let pieces = pieces_of(&layers, self.frames());
        self.page(held, &layers, &pieces, None)?;
        paging::wake(held, self.frames()).map_err(|error| error.to_string())
    }

    /// Writes the record again where it matters: the end of its time was moved.
    pub(super) async fn keep_record(&mut self) {
        // Not those who come while it is written.
        let keepers = self.sandbox.queue.take_keepers();
        // Of one that waits, its snapshot has the record.
        let is_kept = !self.runs() || self.write_record(Links::Stay).await;
        for keeper in keepers {
            if keeper.send(is_kept).is_err() {
                // Its client went away.
            }
        }
    }

    /// Whether it is recorded as one that runs.
    pub(super) fn runs(&self) -> bool {
        let state = self.sandbox.state.borrow();
        matches!(*state, super::State::Running | super::State::Snapshotting(_))
    }

    /// Writes the record of it as it runs. Whether it is written.
    pub(super) async fn write_record(&mut self, links: Links) -> bool {
        let Ok(record) = self.record_bytes() else { return false };
        let (store, id) = (self.shard.workshop.store.clone(), self.sandbox.id);
        let layers = self.memory.layers.clone();
        let write = move || {
            store.write_record(&id, &record, false)?;
            if links == Links::AsRecorded
                && let Err(error) = store.keep_only_layers(&id, &layers)
            {
                tracing::warn!(%id, error = chain(&error), "layers that nothing names take room");
            }
            Ok::<(), StorageError>(())
        };
        let written = rt::blocking(write).await;
        if !matches!(written, Ok(Ok(()))) {
            tracing::warn!(%id, ?written, "a record was not written; a new daemon sees the old one");
            return false;
        }
        true
    }
}

fn recorded(held: &Held) -> RecordedProcess {
    let vm::Shell { memory_address, spare_fd, exchange_fd, console_fd, userfault_fd } = held.layout;
    RecordedProcess {
        name: held.name.to_string(),
        uid: held.uid,
        pid: u32::try_from(held.process.pid().as_raw_nonzero().get()).unwrap_or(0),
        start_ticks: held.process.start_ticks(),
        memory_address,
        spare_fd,
        exchange_fd,
        console_fd,
        userfault_fd,
    }
}
