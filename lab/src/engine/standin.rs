//! `mica serve` with the stand-in as its VM program, on a store of its own.
//!
//! Called by the benchmarks of what has no need of a VM: `bench-proxy` and `mica bench scale`. Refuses to
//! leave anything behind.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use mica_storage::{
    BlockingFile, FlatWriter, Part, ReadyWhen, SnapshotKind, SnapshotManifest, Store, TemplateSpec,
    run_blocking,
};
use mica_units::{Mebibytes, TemplateName, VcpuCount, frames_of};

use super::client::Client;
use crate::served::{Places, Serve, Served};

const TEMPLATE: &str = "base";
const MEMORY: Mebibytes = Mebibytes::new(16);
const DISK_BYTES: usize = 1 << 20;
/// A state of the stand-in: its magic, and that it was stopped once.
const STANDIN_STATE: [u8; 16] = *b"STANDIN1\x01\0\0\0\0\0\0\0";

/// How many daemons this process has started: each has places of its own.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// Where they have them.
#[must_use]
pub fn directory() -> PathBuf {
    std::env::temp_dir()
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    served: Served,
    /// Where it listens.
    pub address: SocketAddr,
    /// Goes after the daemon.
    _places: Places,
}

impl Daemon {
    /// Starts one with so many shards and no pool.
    ///
    /// # Errors
    /// When it does not come to listen.
    pub fn start(mica: &Path, standin: &Path, shards: u16) -> Result<Self> {
        Self::start_with(mica, standin, shards, None)
    }

    /// The same, with that `--cpu-latency-us`.
    ///
    /// # Errors
    /// When it does not come to listen.
    pub fn start_with(
        mica: &Path,
        standin: &Path,
        shards: u16,
        cpu_latency: Option<&str>,
    ) -> Result<Self> {
        let latency = cpu_latency.map(|said| format!("--cpu-latency-us={said}"));
        Self::start_more(mica, standin, shards, latency.as_deref().as_slice())
    }

    /// The same, with these options more of `mica serve`.
    ///
    /// # Errors
    /// When it does not come to listen.
    pub fn start_more(mica: &Path, standin: &Path, shards: u16, more: &[&str]) -> Result<Self> {
        let standin = fs::canonicalize(standin).context("--standin")?;
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let name = format!("mica-bench-standin-{}-{number}", std::process::id());
        let places = Places::make(directory().join(&name))?;
        make_template(&places.directory)?;
        let script = places.path("vm");
        let text = format!("#!/bin/sh\nexec '{}' --builtin-agent \"$@\"\n", standin.display());
        fs::write(&script, text)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let (store, keys) = (places.path("store"), places.path("keys"));
        let cgroup = &places.cgroup;
        let serve = Serve { mica, store: &store, keys: &keys, cgroup, vm_program: &script };
        let shards = shards.to_string();
        let usual =
            ["--without-cgroup-limits", "--pool-min", "0", "--pool-max", "0", "--drain", "1"];
        let ours = ["--connections-max", "100000", "--shards", &shards];
        let served = Served::start(&serve, [&usual[..], &ours, more].concat())?;
        Ok(Self { address: served.address, served, _places: places })
    }

    /// A connection to its API, with its key.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn client(&self) -> Result<Client> {
        self.served.client(&[])
    }

    /// Makes a sandbox and gives its id.
    ///
    /// # Errors
    /// When it is not made.
    pub fn create(&self) -> Result<String> {
        create(&mut self.client()?)
    }

    /// How much of its memory is resident: all, and without files and what it shares with VM processes.
    ///
    /// # Errors
    /// When it has ended.
    pub fn resident_bytes(&self) -> Result<(u64, u64)> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.served.process().pid))?;
        let bytes = |name: &'static str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            kib.map(|kib| kib * 1024).context(name)
        };
        Ok((bytes("VmRSS:")?, bytes("RssAnon:")?))
    }

    /// The one core that a shard's thread may run on.
    ///
    /// # Errors
    /// When there is no such thread, or several cores are its.
    pub fn core_of_shard(&self, shard: usize) -> Result<usize> {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.served.process().pid));
        for task in fs::read_dir(tasks)?.flatten() {
            let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
            let field = |name: &str| {
                status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()))
            };
            if field("Name:") == Some(format!("shard-{shard}")) {
                let cores = field("Cpus_allowed_list:").context("no list of cores")?;
                return cores.parse().with_context(|| format!("shard {shard} has cores {cores}"));
            }
        }
        bail!("there is no thread shard-{shard}")
    }

    /// The time that its threads have run, with their names. Finer than what its process says, which is
    /// counted in ticks.
    ///
    /// # Errors
    /// When it has ended.
    pub fn threads(&self) -> Result<Vec<(String, Duration)>> {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.served.process().pid));
        let mut threads = Vec::new();
        for task in fs::read_dir(tasks)?.flatten() {
            // One may end while they are looked at.
            let Ok(name) = fs::read_to_string(task.path().join("comm")) else { continue };
            let Ok(times) = fs::read_to_string(task.path().join("schedstat")) else { continue };
            let ran = times.split(' ').next().and_then(|ran| ran.parse().ok());
            let ran = Duration::from_nanos(ran.context("no schedstat")?);
            threads.push((name.trim().to_owned(), ran));
        }
        Ok(threads)
    }

    /// The time that all of them have run.
    ///
    /// # Errors
    /// When it has ended.
    pub fn ran(&self) -> Result<Duration> {
        self.served.process().cpu()
    }
}

/// Makes a sandbox of a connection's host and gives its id.
///
/// # Errors
/// When it is not made.
pub fn create(client: &mut Client) -> Result<String> {
    let body = format!(r#"{{"templateID":"{TEMPLATE}","timeout":3600,"secure":false}}"#);
    let answer = client.call("POST", "/sandboxes", body.as_bytes(), 201)?;
    let made: serde_json::Value = serde_json::from_slice(&answer).context("no JSON")?;
    Ok(made["sandboxID"].as_str().context("no sandbox")?.to_owned())
}

/// A template that the stand-in takes for one, with a snapshot that sandboxes start from.
fn make_template(directory: &Path) -> Result<()> {
    let store = Store::open(&directory.join("store"))?;
    let (kernel, disk) = (directory.join("kernel"), directory.join("disk"));
    fs::write(&kernel, b"not a kernel: the stand-in VM does not look")?;
    fs::write(&disk, vec![0x5a; DISK_BYTES])?;
    let name: TemplateName = TEMPLATE.parse()?;
    let staging = store.stage(&name, false)?;
    staging.copy_part(Part::Kernel, &kernel)?;
    staging.copy_part(Part::Disk, &disk)?;
    let spec = TemplateSpec {
        name: name.clone(),
        vcpus: VcpuCount::new(1)?,
        memory: MEMORY,
        cmdline: "console=ttyS0".to_owned(),
        envd_version: mica_wire::guest::ENVD_VERSION.to_owned(),
        ready: ReadyWhen::Agent,
        inputs_hash: String::new(),
    };
    let id = staging.commit(&spec)?.manifest().id.clone();
    let staging = store.stage_snapshot(&id)?;
    let (layer, file) = staging.create_layer()?;
    let base = FlatWriter::new(BlockingFile::new(file), layer, frames_of(MEMORY));
    let base = run_blocking(base.finish())?;
    staging.clone_disk(&File::open(&disk)?)?;
    let since = SystemTime::now().duration_since(UNIX_EPOCH)?;
    staging.seal(SnapshotManifest {
        id: id.clone(),
        kind: SnapshotKind::Template,
        name: None,
        template_id: id,
        template_name: name,
        parent: None,
        sandbox: None,
        tenant: None,
        created_unix_ms: u64::try_from(since.as_millis())?,
        vcpus: spec.vcpus,
        memory: spec.memory,
        envd_version: spec.envd_version,
        ready: spec.ready,
        layers: vec![base],
        disk_bytes: u64::try_from(DISK_BYTES)?,
        state: STANDIN_STATE.to_vec(),
        record: Vec::new(),
    })?;
    Ok(())
}
