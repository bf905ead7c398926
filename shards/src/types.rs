//! What a caller asks for and what it gets back.
//!
//! Called by `http`, which turns these into JSON. Refuses anything that is not checked: names and
//! counts are types of `units`.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime};

use mica_units::{Mebibytes, SandboxId, TemplateName, TenantId, VcpuCount};
use mica_wire::guest::Defaults;

use crate::{Digest, Seat};

/// The life of a sandbox that never ends by itself.
pub const NEVER: Duration = Duration::MAX;

/// What happens to a sandbox whose time is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// It ends.
    #[default]
    Kill,
    /// It is paused, and waits.
    Pause,
    /// The same, with its disk alone: its memory is not kept.
    PauseToDisk,
}

/// What a sandbox is doing, as a client may know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lifecycle {
    /// It runs, or is stopped for a moment for a snapshot.
    Running,
    /// It waits, on disk and maybe still in memory.
    Paused,
}

/// Who may reach a sandbox, and whom it may reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Whether its ports are open to whoever knows its id. Otherwise they take a token, but for envd's,
    /// which has its own.
    pub allow_public_traffic: bool,
    /// What its servers see as `Host`; `${PORT}` stands for the port.
    pub mask_request_host: Option<String>,
    /// Whether it may reach the world at all.
    pub allow_internet_access: bool,
    /// Addresses and names it may reach.
    pub allow_out: Vec<String>,
    /// Addresses it may not.
    pub deny_out: Vec<String>,
    /// What else was wished for, by its name in the API, as JSON: kept for who asks, and not applied.
    pub unapplied: BTreeMap<String, String>,
}

impl Default for NetworkPolicy {
    fn default() -> Self {
        Self {
            allow_public_traffic: true,
            mask_request_host: None,
            allow_internet_access: true,
            allow_out: Vec::new(),
            deny_out: Vec::new(),
            unapplied: BTreeMap::new(),
        }
    }
}

/// Who wants a stream into a sandbox.
#[derive(Clone, PartialEq, Eq)]
pub enum Visitor {
    /// The host itself.
    Host,
    /// A client, with the traffic token it showed.
    Client(Option<String>),
}

// The token is a secret.
impl std::fmt::Debug for Visitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Host => "Host",
            Self::Client(None) => "Client without a token",
            Self::Client(Some(_)) => "Client with a token",
        })
    }
}

/// A sandbox to be made.
#[derive(Clone, PartialEq, Eq)]
pub struct CreateRequest {
    /// Id or name of a template, or the id of a snapshot.
    pub template: String,
    /// How long it lives, from the moment it is ready; [`NEVER`]: until somebody ends it.
    pub timeout: Duration,
    /// Whether that time starts again with every request to it.
    pub idle: bool,
    /// Whether its agent demands an access token, which is then drawn here.
    pub secure: bool,
    /// Free labels, given back as they are.
    pub metadata: BTreeMap<String, String>,
    /// Environment of every process in the sandbox.
    pub env_vars: BTreeMap<String, String>,
    /// What happens when its time is over.
    pub on_timeout: OnTimeout,
    /// Whether a request for it wakes it when it is paused.
    pub auto_resume: bool,
    /// Whose it is.
    pub tenant: TenantId,
    /// Who may reach it, and whom it may reach.
    pub network: NetworkPolicy,
    /// What counts it, where somebody counts.
    pub seat: Option<Seat>,
    /// What a built template says that its processes start with. In no record: the agent keeps it, in
    /// memory that is saved with the sandbox.
    pub defaults: Option<Defaults>,
    /// The name under which it was asked for once, where it has one. Of the sandbox itself: none of its copies'.
    pub once: Option<OnceName>,
}

/// The name under which a client asked for a create once, and what it asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnceName {
    /// What the client calls it, among its tenant's.
    pub name: String,
    /// A hash of what was asked for.
    pub digest: Digest,
}

impl CreateRequest {
    /// One of this template that lives so long, and has nothing out of the ordinary.
    #[must_use]
    pub fn new(template: &str, timeout: Duration) -> Self {
        Self {
            template: template.to_owned(),
            timeout,
            idle: false,
            secure: false,
            metadata: BTreeMap::new(),
            env_vars: BTreeMap::new(),
            on_timeout: OnTimeout::default(),
            auto_resume: false,
            tenant: TenantId::default(),
            network: NetworkPolicy::default(),
            seat: None,
            defaults: None,
            once: None,
        }
    }
}

// Environment values are secrets more often than not, so they stay out of logs.
impl std::fmt::Debug for CreateRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreateRequest")
            .field("template", &self.template)
            .field("timeout", &self.timeout)
            .field("idle", &self.idle)
            .field("secure", &self.secure)
            .field("metadata", &self.metadata)
            .field("env_vars", &self.env_vars.keys())
            .field("on_timeout", &self.on_timeout)
            .field("auto_resume", &self.auto_resume)
            .field("tenant", &self.tenant)
            .field("network", &self.network)
            .field("seat", &self.seat)
            .finish()
    }
}

/// A sandbox that runs or is paused.
#[derive(Clone, PartialEq, Eq)]
pub struct SandboxInfo {
    /// Its id, which also names its shard.
    pub id: SandboxId,
    /// Id of the template it was made from.
    pub template_id: String,
    /// Name of that template.
    pub template_name: TemplateName,
    /// When its create was answered.
    pub started_at: SystemTime,
    /// When its time is over; none of one that never ends by itself. Of a paused sandbox: what it was
    /// when it was paused.
    pub end_at: Option<SystemTime>,
    /// Whether it runs.
    pub state: Lifecycle,
    /// Whether it is paused with its disk alone: then it boots when it goes on, and no request wakes it.
    pub disk_alone: bool,
    /// Number of vCPUs.
    pub vcpus: VcpuCount,
    /// Guest memory.
    pub memory: Mebibytes,
    /// Root disk.
    pub disk: Mebibytes,
    /// Version of the envd protocol its agent speaks.
    pub envd_version: String,
    /// Labels given at create.
    pub metadata: BTreeMap<String, String>,
    /// What requests to its agent must carry, if it is secure.
    pub access_token: Option<String>,
    /// What requests to its other ports must carry, if they are not public.
    pub traffic_token: Option<String>,
    /// What happens when its time is over.
    pub on_timeout: OnTimeout,
    /// Whether a request for it wakes it when it is paused.
    pub auto_resume: bool,
    /// Whose it is.
    pub tenant: TenantId,
    /// Who may reach it, and whom it may reach.
    pub network: NetworkPolicy,
}

// The tokens are secrets.
impl std::fmt::Debug for SandboxInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SandboxInfo")
            .field("id", &self.id)
            .field("template_name", &self.template_name)
            .field("started_at", &self.started_at)
            .field("end_at", &self.end_at)
            .field("secure", &self.access_token.is_some())
            .finish_non_exhaustive()
    }
}

/// What was written about a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// When it happened; of a line of the console: when this host first looked at it.
    pub at: SystemTime,
    /// The text.
    pub text: String,
    /// Who wrote it.
    pub source: LogSource,
}

/// Who writes about a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogSource {
    /// The guest, on its serial console.
    Console,
    /// The host, about the sandbox's life.
    Host,
}

/// What a sandbox used at a moment, as its agent says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Seconds since 1970.
    pub at_unix_s: u64,
    /// Processors.
    pub cpu_count: u32,
    /// How busy they were, all together, in percent.
    pub cpu_used_percent: f64,
    /// Memory it has.
    pub memory_total_bytes: u64,
    /// Memory that programs hold.
    pub memory_used_bytes: u64,
    /// Memory that caches files.
    pub memory_cache_bytes: u64,
    /// Its root disk.
    pub disk_total_bytes: u64,
    /// What of it is in use.
    pub disk_used_bytes: u64,
}

/// A template that sandboxes can be made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateInfo {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: TemplateName,
    /// vCPUs of its sandboxes.
    pub vcpus: VcpuCount,
    /// Memory of its sandboxes.
    pub memory: Mebibytes,
    /// Root disk of its sandboxes.
    pub disk: Mebibytes,
    /// Version of the envd protocol its agent speaks.
    pub envd_version: String,
    /// When it was built.
    pub created_at: SystemTime,
    /// Sandboxes made from it since the daemon started.
    pub spawn_count: u64,
    /// When the last of them was made.
    pub last_spawned_at: Option<SystemTime>,
    /// Builds of it that came to their end; 1 of one of the operator's, whose builds nobody counts.
    pub build_count: u32,
    /// Whether other tenants may make sandboxes of it.
    pub public: bool,
    /// The build that it is; none of one of the operator's.
    pub build_id: Option<String>,
}

/// Whose the sandboxes are in which templates are built: no client's, so that none sees them. The next start
/// removes what is left of them.
pub const BUILD_TENANT: &str = "mica-builds";

/// The template that a snapshot is made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuiltFor {
    /// Its id.
    pub template_id: String,
    /// Its name.
    pub template_name: TemplateName,
    /// Whose it is.
    pub tenant: TenantId,
}

/// A snapshot that a client made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its id, usable wherever the id of a template is.
    pub id: String,
    /// The name it was given.
    pub name: Option<String>,
    /// The sandbox it was made of.
    pub sandbox: Option<SandboxId>,
    /// Id of that sandbox's template.
    pub template_id: String,
    /// Whose that sandbox was. None of the time before there were tenants.
    pub tenant: Option<TenantId>,
    /// When it was committed.
    pub created_at: SystemTime,
}

/// The VM process of a sandbox, for benchmarks and tests that look at it from outside.
#[derive(Debug)]
pub struct SandboxProcess {
    /// Its number. It may end at any moment, and another process may come to have it.
    pub pid: u32,
    /// Where guest memory starts in its address space.
    pub memory_address: u64,
    /// What the guest's serial port writes to: see [`mica_wire::vm::console`].
    pub console: OwnedFd,
}

/// Numbers of a host, all shards together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostCounters {
    /// Creates and resumes that found a VM process ready.
    pub pool_hits: u64,
    /// Those that had to wait for one to be made.
    pub pool_misses: u64,
    /// VM processes that wait for a guest.
    pub shells: u64,
    /// Sandboxes, paused ones included.
    pub sandboxes: u64,
    /// Disks that were copied because the store's file system does not clone.
    pub disk_copies: u64,
}
