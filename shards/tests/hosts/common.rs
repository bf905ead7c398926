//! A host for one test: its own store, its own cgroup, VM processes played by the double.
//!
//! Called by the tests of this folder. Needs root and a writable cgroup v2; says so and fails where
//! there is none.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use mica_numa::plan::VcpuCores;
use mica_numa::{Plan, PlanConfig, ShardSeat, Shards, StopSignal, plan, topology};
use mica_shards::{CreateRequest, Host, HostConfig, RunError, run};
use mica_storage::{
    BlockingFile, FlatWriter, FlattenLimits, Part, ReadyWhen, SnapshotKind, SnapshotManifest,
    Store, TemplateSpec, run_blocking,
};
use mica_units::{GuestPort, Mebibytes, PAGE_BYTES, SandboxId, ShardId, VcpuCount, frames_of};

/// The double.
pub const DOUBLE: &str = env!("CARGO_BIN_EXE_mica-shards-double");

/// Length of a template's disk: not a whole number of MiB, so that rounding shows.
pub const DISK_BYTES: u64 = (3 << 20) - 512;

/// Memory of a template's sandboxes.
pub const MEMORY: Mebibytes = Mebibytes::new(16);

/// The number of frames of that.
pub const FRAMES: u32 = 4096;

/// Frames that the running snapshot of a template has content in; each is full of [`base_byte`].
pub const BASE: std::ops::Range<u32> = 100..164;

/// What a frame is full of in a running snapshot.
pub fn base_byte(frame: u32) -> u8 {
    if BASE.contains(&frame) { u8::try_from(frame % 200 + 1).unwrap() } else { 0 }
}

/// What the double's register holds in a running snapshot.
pub const BASE_REGISTER: u64 = 7;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// The places one test works in.
#[derive(Clone)]
pub struct Places {
    pub root: PathBuf,
    pub cgroup: PathBuf,
}

/// The same, removed with it.
pub struct Bench {
    places: Places,
    has_mount: bool,
}

impl std::ops::Deref for Bench {
    type Target = Places;
    fn deref(&self) -> &Places {
        &self.places
    }
}

impl Bench {
    /// A store with the templates `agent` and `console`, both with a running snapshot, and `cold`
    /// without one.
    pub fn new() -> Self {
        let bench = Self::empty();
        bench.fill_store();
        bench
    }

    fn empty() -> Self {
        let name = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let root = std::env::temp_dir().join(format!("mica-shards-test-{name}"));
        fs::create_dir(&root).unwrap();
        let cgroup = cgroup_mount().join(format!("mica-test-{name}"));
        let bench = Self { places: Places { root, cgroup }, has_mount: false };
        bench.set_mood("good");
        bench
    }

    /// The same, with the store on a file system of its own of so many MiB.
    pub fn on_small_disk(mib: u32) -> Self {
        let mut bench = Self::empty();
        fs::create_dir(bench.store()).unwrap();
        let size = std::ffi::CString::new(format!("size={mib}m")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", bench.store(), "tmpfs", flags, size.as_c_str()).unwrap();
        bench.has_mount = true;
        bench.fill_store();
        bench
    }

    /// Makes templates in the store, which may be on a file system of its own by now.
    fn fill_store(&self) {
        let store = Store::open(&self.store()).unwrap();
        for (name, ready) in [("agent", ReadyWhen::Agent), ("console", ReadyWhen::Console)] {
            add_warm(&store, &spec(name, ready), BASE.end);
        }
        add_template(&store, &spec("cold", ReadyWhen::Agent));
    }

    /// One more template, `large`, with so much memory, all of it with content: to copy it takes a while.
    /// The file that its memory is in.
    pub fn add_large(&self, memory: Mebibytes) -> PathBuf {
        let store = Store::open(&self.store()).unwrap();
        let spec = TemplateSpec { memory, ..spec("large", ReadyWhen::Agent) };
        let id = add_warm(&store, &spec, frames_of(memory));
        let opened = store.open_snapshot(&id).unwrap().unwrap();
        let base = opened.layers.first().unwrap();
        let link = format!("/proc/self/fd/{}", base.file().as_fd().as_raw_fd());
        fs::read_link(link).unwrap()
    }

    pub fn config(&self) -> HostConfig {
        HostConfig {
            cgroup_limits_required: false,
            uid_first: 30_000,
            sandboxes_max: 64,
            console_bytes: 8192,
            boot_deadline: Duration::from_secs(20),
            pool_floor: 0,
            pool_ceiling: 0,
            keep_sandboxes: false,
            capture_budget_mib: 4,
            io_buffers: 8,
            replica_budget_mib: 0,
            on_demand_over_mib: 0,
            log_writes: false,
            flatten: FlattenLimits::default(),
            memory_reserve_mib: 0,
            ..HostConfig::new(self.store(), self.program(), self.cgroup.clone())
        }
    }

    /// Runs `test` on shard 0 of a host of two shards, with VM processes in this mood at first.
    pub fn host<F>(&self, mood: &str, test: impl FnOnce(Host) -> F + Send + 'static)
    where
        F: Future<Output = ()> + 'static,
    {
        self.set_mood(mood);
        self.host_with(self.config(), test).unwrap();
        assert_eq!(self.leftovers(), Leftovers::default(), "after the host's end");
    }

    pub fn host_with<F>(
        &self,
        config: HostConfig,
        test: impl FnOnce(Host) -> F + Send + 'static,
    ) -> Result<(), RunError>
    where
        F: Future<Output = ()> + 'static,
    {
        self.host_on(&two_seats(), config, test)
    }

    /// The same, on another plan, which has a shard 0.
    pub fn host_on<F>(
        &self,
        plan: &Plan,
        config: HostConfig,
        test: impl FnOnce(Host) -> F + Send + 'static,
    ) -> Result<(), RunError>
    where
        F: Future<Output = ()> + 'static,
    {
        let test = std::sync::Arc::new(std::sync::Mutex::new(Some(test)));
        let stop = StopSignal::new().unwrap();
        run(plan, config, stop, move |host, stop| {
            let test =
                (host.shard() == ShardId::new(0)).then(|| test.lock().unwrap().take()).flatten();
            async move {
                match test {
                    Some(test) => test(host).await,
                    None => stop.stopped().await,
                }
            }
        })
    }
}

impl Places {
    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// From now on every VM process behaves like this.
    pub fn set_mood(&self, mood: &str) {
        let (path, new) = (self.root.join("mood"), self.root.join("mood.new"));
        fs::write(&new, mood).unwrap();
        fs::rename(&new, &path).unwrap();
    }

    /// A program that is the double.
    pub fn program(&self) -> PathBuf {
        let path = self.root.join("vm");
        if !path.exists() {
            self.write_program("");
        }
        path
    }

    /// The same, which runs a line of shell first.
    pub fn write_program(&self, line: &str) {
        let (path, new) = (self.root.join("vm"), self.root.join("vm.new"));
        let mood = self.root.join("mood");
        let text = format!("#!/bin/sh\n{line}\nexec {DOUBLE} vm {} \"$@\"\n", mood.display());
        fs::write(&new, text).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&new, &path).unwrap();
    }

    /// What sandboxes have left in the places that a test can look at.
    pub fn leftovers(&self) -> Leftovers {
        let count = |path: &Path| fs::read_dir(path).map(Iterator::count).unwrap_or(0);
        let snapshots = count(&self.store().join("snapshots"));
        Leftovers {
            cgroups: self.cgroups().len(),
            sandboxes: count(&self.store().join("sandboxes")),
            // The running snapshots of the templates.
            snapshots: snapshots.saturating_sub(2),
        }
    }

    /// The cgroups of VM processes, by name.
    pub fn cgroups(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.cgroup) else { return Vec::new() };
        let dirs = entries.map(Result::unwrap).filter(|entry| entry.file_type().unwrap().is_dir());
        dirs.map(|entry| entry.file_name().into_string().unwrap()).collect()
    }

    /// The processes in them.
    pub fn pids(&self) -> Vec<u32> {
        let groups = self.cgroups();
        let procs = groups.iter().map(|group| self.cgroup.join(group).join("cgroup.procs"));
        // One may go while it is looked at.
        let texts = procs.map(|procs| fs::read_to_string(procs).unwrap_or_default());
        texts
            .flat_map(|text| text.lines().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
            .collect()
    }
}

/// Counts that are zero when nothing is left.
#[derive(Debug, Default, PartialEq, Eq, Clone, Copy)]
pub struct Leftovers {
    pub cgroups: usize,
    pub sandboxes: usize,
    pub snapshots: usize,
}

impl Drop for Bench {
    fn drop(&mut self) {
        if self.has_mount {
            let flags = rustix::mount::UnmountFlags::empty();
            if let Err(errno) = rustix::mount::unmount(self.store(), flags) {
                eprintln!("{} stays mounted: {errno}", self.store().display());
            }
        }
        for path in [&self.root, &self.cgroup] {
            let removed =
                if path == &self.cgroup { fs::remove_dir(path) } else { fs::remove_dir_all(path) };
            if let Err(error) = removed {
                eprintln!("{} stays: {error}", path.display());
            }
        }
    }
}

/// Where cgroup v2 is mounted: not always `/sys/fs/cgroup`.
pub fn cgroup_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mount = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    mount.expect("these tests need cgroup v2: mount -t cgroup2 none /sys/fs/cgroup")
}

fn spec(name: &str, ready: ReadyWhen) -> TemplateSpec {
    TemplateSpec {
        name: name.parse().unwrap(),
        vcpus: VcpuCount::new(2).unwrap(),
        memory: MEMORY,
        cmdline: "console=ttyS0".to_owned(),
        envd_version: "0.0.1".to_owned(),
        ready,
        inputs_hash: String::new(),
    }
}

fn add_template(store: &Store, spec: &TemplateSpec) -> String {
    let staging = store.stage(&spec.name, false).unwrap();
    for (part, length) in [(Part::Kernel, 4096), (Part::Initramfs, 512), (Part::Disk, DISK_BYTES)] {
        let mut file = staging.create_part(part).unwrap();
        file.write_all(b"template").unwrap();
        file.set_len(length).unwrap();
    }
    staging.commit(spec).unwrap().manifest().id.clone()
}

/// A template and what a warm-up leaves: memory, disk, and a state as the double saves it. Of its memory,
/// so many frames are written, most of which are empty in small ones. Its id.
fn add_warm(store: &Store, spec: &TemplateSpec, written: u32) -> String {
    let id = add_template(store, spec);
    let template = store.find_template(spec.name.as_str()).unwrap().unwrap();
    let staging = store.stage_snapshot(&id).unwrap();
    let (layer, file) = staging.create_layer().unwrap();
    assert_eq!(frames_of(MEMORY), FRAMES);
    let frames = frames_of(spec.memory);
    let mut base = FlatWriter::new(BlockingFile::new(file), layer, frames);
    let written = async {
        for frame in 0..written {
            let byte = if frames > FRAMES { 1 } else { base_byte(frame) };
            let page = vec![byte; usize::try_from(PAGE_BYTES).unwrap()];
            base.push(&page).await?;
        }
        base.finish().await
    };
    let base = run_blocking(written).unwrap();
    staging.clone_disk(&template.open_disk().unwrap().unwrap()).unwrap();
    let manifest = SnapshotManifest {
        id: id.clone(),
        kind: SnapshotKind::Template,
        name: None,
        template_id: id.clone(),
        template_name: spec.name.clone(),
        parent: None,
        sandbox: None,
        tenant: None,
        created_unix_ms: 1,
        vcpus: spec.vcpus,
        memory: spec.memory,
        envd_version: spec.envd_version.clone(),
        ready: spec.ready,
        layers: vec![base],
        disk_bytes: DISK_BYTES,
        state: state(BASE_REGISTER),
        record: Vec::new(),
    };
    staging.seal(manifest).unwrap();
    id
}

/// A state as the double saves it at its first freeze.
fn state(register: u64) -> Vec<u8> {
    let mut state = b"MDOUBLE1".to_vec();
    state.extend_from_slice(&register.to_le_bytes());
    state.extend_from_slice(&1u64.to_le_bytes());
    state.resize(5000, register.to_le_bytes()[0]);
    state
}

/// Two shards, sharing a core where there is but one.
pub fn two_seats() -> Plan {
    let topology = topology::read().unwrap();
    let wish = PlanConfig { shards: Shards::Total(2), ..PlanConfig::default() };
    plan(&topology, &wish).unwrap_or_else(|_| {
        let core = topology.nodes[0].cores[0].cpu();
        let seat = |index| ShardSeat::new(ShardId::new(index), core, 0);
        let vcpus = VcpuCores::new(0, vec![core], true);
        Plan { seats: vec![seat(0), seat(1)], vcpus: vec![vcpus], ..Plan::default() }
    })
}

pub fn request(template: &str) -> CreateRequest {
    CreateRequest {
        metadata: BTreeMap::from([("who".to_owned(), "a test".to_owned())]),
        env_vars: BTreeMap::from([("COLOUR".to_owned(), "green".to_owned())]),
        ..CreateRequest::new(template, Duration::from_secs(600))
    }
}

pub fn port(number: u16) -> GuestPort {
    GuestPort::new(number).unwrap()
}

/// Everything that a port says.
pub async fn read_all(host: &Host, id: SandboxId, number: u16) -> String {
    let mut stream = host.connect(id, port(number)).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// Has the program in the guest carry a line out; what it says.
pub async fn tell(host: &Host, id: SandboxId, line: &str) -> String {
    let mut stream = host.connect(id, port(16)).await.unwrap();
    stream.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).await.unwrap();
    said
}

/// What each frame of the guest is full of.
pub async fn memory(host: &Host, id: SandboxId) -> Vec<u8> {
    bytes(&tell(host, id, &format!("look 0 {FRAMES}")).await)
}

/// Reads what the double says to `look`.
pub fn bytes(text: &str) -> Vec<u8> {
    assert_eq!(text.len(), 2 * usize::try_from(FRAMES).unwrap(), "{text}");
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    text.as_bytes().chunks(2).map(byte).collect()
}

/// The memory of a sandbox that has just been made of a template.
pub fn base_memory() -> Vec<u8> {
    (0..FRAMES).map(base_byte).collect()
}

/// Fails where a guest's memory is not what it should be, and says in which frames.
#[track_caller]
pub fn assert_memory(found: &[u8], expected: &[u8], what: &str) {
    let differs = |frame: &usize| found[*frame] != expected[*frame];
    let frames: Vec<usize> = (0..expected.len()).filter(differs).collect();
    let shown: Vec<(usize, u8, u8)> =
        frames.iter().take(8).map(|frame| (*frame, found[*frame], expected[*frame])).collect();
    assert!(
        frames.is_empty() && found.len() == expected.len(),
        "{what}: {} frames differ; frame, found, expected: {shown:?}",
        frames.len()
    );
}

/// Ends a VM process from outside.
pub fn kill_process(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    match rustix::process::kill_process(pid, rustix::process::Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(errno) => panic!("cannot kill {pid:?}: {errno}"),
    }
}
