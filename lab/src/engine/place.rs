//! Where the engine benchmark works: a store with a warm template of the tiny guest, a control group,
//! and hosts that run on them one after the other.
//!
//! Called by the benchmark's program. Refuses a store that is there already, and a file system without
//! direct I/O: what a benchmark then measures is something else.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use mica_numa::{Plan, PlanConfig, Shards, StopSignal, plan, topology};
use mica_shards::{CreateRequest, Host, HostConfig, run, warm};
use mica_storage::{FlattenLimits, Part, ReadyWhen, Store, TemplateSpec};
use mica_units::{Mebibytes, ShardId, VcpuCount};
use rustix::fs::{Mode, OFlags};

use crate::tiny_guest::{Then, vmlinux};

/// The template that is measured.
pub const TEMPLATE: &str = "tiny";
/// Its memory.
pub const MEMORY: Mebibytes = Mebibytes::new(2048);
/// User ids of the VM processes start here, far from a daemon's that may run beside.
const UID_FIRST: u32 = 700_000;
/// Most sandboxes at a time.
const SANDBOXES_MAX: u32 = 1024;
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// The places of one run, removed with it.
#[derive(Debug)]
pub struct Places {
    root: PathBuf,
    /// Below the mount point of cgroup v2.
    pub cgroup: PathBuf,
    vm_program: PathBuf,
    plan: Plan,
}

/// The vCPUs of the template.
///
/// # Errors
/// None: the number is within the bounds.
pub fn vcpus() -> Result<VcpuCount> {
    Ok(VcpuCount::new(2)?)
}

impl Places {
    /// Makes the store in `root`, which must not be there, and warms the template.
    ///
    /// # Errors
    /// When the machine cannot: the message says what it lacks.
    pub fn make(root: &Path, vm_program: &Path, shards: u16) -> Result<Self> {
        fs::create_dir(root).with_context(|| format!("make {}", root.display()))?;
        let mount = cgroup_mount()?;
        let wish = PlanConfig { shards: Shards::Total(shards), ..PlanConfig::default() };
        let places = Self {
            root: root.to_owned(),
            cgroup: mount.join(format!("mica-bench-{}", std::process::id())),
            vm_program: std::path::absolute(vm_program)?,
            plan: plan(&topology::read()?, &wish)?,
        };
        places.check_direct_io()?;
        fs::create_dir(places.floor())?;
        places.add_template()?;
        let stop = StopSignal::new()?;
        warm(&places.plan, places.config(0), stop, TEMPLATE).context("warm the template")?;
        Ok(places)
    }

    /// The store's root.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// A directory on the same file system, for the floor.
    #[must_use]
    pub fn floor(&self) -> PathBuf {
        self.root.join("floor")
    }

    /// A directory for anything else.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The program of the VMs.
    #[must_use]
    pub fn vm_program(&self) -> &Path {
        &self.vm_program
    }

    fn check_direct_io(&self) -> Result<()> {
        let path = self.root.join("direct");
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
        rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .with_context(|| format!("{} has no direct I/O; use --store", self.root.display()))?;
        Ok(fs::remove_file(&path)?)
    }

    fn add_template(&self) -> Result<()> {
        let store = Store::open(&self.store())?;
        let name = TEMPLATE.parse()?;
        let staging = store.stage(&name, false)?;
        let kernel = self.root.join("kernel");
        // It says that it is up, is frozen there, and says one byte more after each restore.
        fs::write(&kernel, vmlinux("up\n", Then::WaitForGeneration))?;
        staging.copy_part(Part::Kernel, &kernel)?;
        let spec = TemplateSpec {
            name,
            vcpus: vcpus()?,
            memory: MEMORY,
            cmdline: String::new(),
            envd_version: String::new(),
            ready: ReadyWhen::Console,
            inputs_hash: String::new(),
        };
        staging.commit(&spec)?;
        Ok(())
    }

    /// A host that keeps exactly `pool` shells.
    fn config(&self, pool: u32) -> HostConfig {
        HostConfig {
            store_root: self.store(),
            vm_program: self.vm_program.clone(),
            cgroup_root: self.cgroup.clone(),
            cgroup_limits_required: false,
            uid_first: UID_FIRST,
            sandboxes_max: SANDBOXES_MAX,
            console_bytes: 64 << 10,
            boot_deadline: PATIENCE,
            pool_floor: pool,
            pool_ceiling: pool,
            keep_sandboxes: false,
            capture_budget_mib: 16,
            io_buffers: 32,
            replica_budget_mib: 1024,
            on_demand_over_mib: 0,
            log_writes: false,
            flatten: FlattenLimits::default(),
            memory_reserve_mib: 256,
            accounts: mica_shards::Accounts::new(),
            // The floor's bare calls hold a shard up on purpose; a watchdog would interrupt them, and make the
            // floor look higher than it is.
            metrics: false,
            dense_latency_us: None,
        }
    }

    /// Runs `work` on shard 0 of a host that keeps `pool` shells on each shard.
    ///
    /// # Errors
    /// The host's, or those of `work`.
    pub fn on_host<T, W, F>(&self, pool: u32, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(Host) -> F + Send + 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        let work = Arc::new(Mutex::new(Some(work)));
        let outcome = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&outcome);
        run(&self.plan, self.config(pool), StopSignal::new()?, move |host, stop| {
            let is_first = host.shard() == ShardId::new(0);
            let work = is_first.then(|| lock(&work).take()).flatten();
            let slot = Arc::clone(&slot);
            async move {
                match work {
                    Some(work) => {
                        let done = work(host).await;
                        *lock(&slot) = Some(done);
                    }
                    None => stop.stopped().await,
                }
            }
        })?;
        let done = lock(&outcome).take();
        done.unwrap_or_else(|| Err(anyhow!("the host ended before the work was done")))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Places {
    fn drop(&mut self) {
        if let Err(error) = end_what_is_left(&self.cgroup) {
            eprintln!("mica-bench: VM processes may be left: {error:#}");
        }
        for (what, removed) in [
            (&self.root, fs::remove_dir_all(&self.root)),
            (&self.cgroup, fs::remove_dir(&self.cgroup)),
        ] {
            match removed {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => eprintln!("mica-bench: {} stays: {error}", what.display()),
            }
        }
    }
}

/// VM processes outlive a host that panicked, for the next one to take over. There is none here.
///
/// # Errors
/// When a control group stays.
pub fn end_what_is_left(cgroup: &Path) -> Result<()> {
    let entries = match fs::read_dir(cgroup) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let groups: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    for group in groups.iter().filter(|path| path.is_dir()) {
        fs::write(group.join("cgroup.kill"), "1")?;
        let begun = std::time::Instant::now();
        while let Err(error) = fs::remove_dir(group) {
            ensure!(begun.elapsed() < PATIENCE, "{} stays: {error}", group.display());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

/// Where cgroup v2 is mounted: not always `/sys/fs/cgroup`.
///
/// # Errors
/// When it is not.
pub fn cgroup_mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mount = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    mount.context("cgroup v2 is not mounted")
}

/// A create of the template, or of a snapshot.
#[must_use]
pub fn request(of: &str) -> CreateRequest {
    CreateRequest::new(of, Duration::from_secs(3600))
}

/// Waits until the pool of every shard is full and nothing is being made.
///
/// # Errors
/// When that takes too long.
pub async fn quiet(host: &Host, shells: u64) -> Result<()> {
    let begun = std::time::Instant::now();
    while host.counters().await?.shells < shells {
        ensure!(begun.elapsed() < PATIENCE, "the pool does not fill");
        mica_shards::rt::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}
