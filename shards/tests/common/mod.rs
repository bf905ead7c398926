//! A host for one test: its own store, its own cgroup, VM processes played by the double.
//!
//! Called by the tests of this folder. Needs root and a writable cgroup v2; says so and fails where
//! there is none.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mica_numa::plan::VcpuCores;
use mica_numa::{Plan, PlanConfig, Reserved, ShardSeat, Shards, StopSignal, plan, topology};
use mica_shards::{CreateRequest, Host, HostConfig, RunError, run};
use mica_storage::{Part, ReadyWhen, Store, TemplateSpec};
use mica_units::{Mebibytes, ShardId, VcpuCount};

/// The double.
pub const DOUBLE: &str = env!("CARGO_BIN_EXE_mica-shards-double");

/// Length of a template's disk: not a whole number of MiB, so that rounding shows.
pub const DISK_BYTES: u64 = (3 << 20) - 512;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// The places one test works in.
#[derive(Clone)]
pub struct Places {
    pub root: PathBuf,
    pub cgroup: PathBuf,
}

/// The same, removed with it.
pub struct Bench(Places);

impl std::ops::Deref for Bench {
    type Target = Places;
    fn deref(&self) -> &Places {
        &self.0
    }
}

impl Bench {
    /// A store with the templates `agent` and `console`.
    pub fn new() -> Self {
        let name = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let root = std::env::temp_dir().join(format!("mica-shards-test-{name}"));
        fs::create_dir(&root).unwrap();
        let cgroup = cgroup_mount().join(format!("mica-test-{name}"));
        let bench = Self(Places { root, cgroup });
        let store = Store::open(&bench.store()).unwrap();
        add_template(&store, "agent", ReadyWhen::Agent);
        add_template(&store, "console", ReadyWhen::Console);
        bench
    }

    /// A program that is the double in this mode.
    pub fn program(&self, mode: &str) -> PathBuf {
        let path = self.root.join(mode);
        let text = format!("#!/bin/sh\nexec {DOUBLE} vm {mode} \"$@\"\n");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    pub fn config(&self, mode: &str) -> HostConfig {
        HostConfig {
            store_root: self.store(),
            vm_program: self.program(mode),
            cgroup_root: self.cgroup.clone(),
            cgroup_limits_required: false,
            uid_first: 30_000,
            sandboxes_max: 64,
            console_bytes: 8192,
            boot_deadline: Duration::from_secs(20),
        }
    }

    /// Runs `test` on shard 0 of a host of two shards.
    pub fn host<F>(&self, mode: &str, test: impl FnOnce(Host) -> F + Send + 'static)
    where
        F: Future<Output = ()> + 'static,
    {
        self.host_with(self.config(mode), test).unwrap();
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
        let test = std::sync::Arc::new(std::sync::Mutex::new(Some(test)));
        let stop = StopSignal::new().unwrap();
        run(&two_seats(), config, stop, move |host, stop| {
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

    /// What sandboxes have left in the places that a test can look at.
    pub fn leftovers(&self) -> Leftovers {
        let is_dir = |entry: &fs::DirEntry| entry.file_type().unwrap().is_dir();
        let cgroups = fs::read_dir(&self.cgroup)
            .map(|entries| entries.map(Result::unwrap).filter(is_dir).count())
            .unwrap_or(0);
        let sandboxes = self.store().join("sandboxes");
        let disks = fs::read_dir(sandboxes).map(Iterator::count).unwrap_or(0);
        Leftovers { cgroups, disks }
    }
}

/// Counts that are zero when nothing is left.
#[derive(Debug, Default, PartialEq, Eq, Clone, Copy)]
pub struct Leftovers {
    pub cgroups: usize,
    pub disks: usize,
}

impl Drop for Bench {
    fn drop(&mut self) {
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

fn add_template(store: &Store, name: &str, ready: ReadyWhen) {
    let name = name.parse().unwrap();
    let staging = store.stage(&name, false).unwrap();
    for (part, length) in [(Part::Kernel, 4096), (Part::Initramfs, 512), (Part::Disk, DISK_BYTES)] {
        let mut file = staging.create_part(part).unwrap();
        file.write_all(b"template").unwrap();
        file.set_len(length).unwrap();
    }
    let spec = TemplateSpec {
        name,
        vcpus: VcpuCount::new(2).unwrap(),
        memory: Mebibytes::new(64),
        cmdline: "console=ttyS0".to_owned(),
        envd_version: "0.0.1".to_owned(),
        ready,
        inputs_hash: String::new(),
    };
    staging.commit(&spec).unwrap();
}

/// Two shards, sharing a core where there is but one.
pub fn two_seats() -> Plan {
    let topology = topology::read().unwrap();
    let wish = PlanConfig { shards: Shards::Total(2), reserved: Reserved::PerNode(0) };
    plan(&topology, &wish).unwrap_or_else(|_| {
        let core = topology.nodes[0].cores[0].cpu();
        let seat = |index| ShardSeat { shard: ShardId::new(index), core, node: 0 };
        let vcpus = VcpuCores { node: 0, cpus: vec![core], shared_with_shards: true };
        Plan { seats: vec![seat(0), seat(1)], vcpus: vec![vcpus], reserved: vec![] }
    })
}

pub fn request(template: &str) -> CreateRequest {
    CreateRequest {
        template: template.to_owned(),
        timeout: Duration::from_secs(600),
        secure: false,
        metadata: BTreeMap::from([("who".to_owned(), "a test".to_owned())]),
        env_vars: BTreeMap::from([("COLOUR".to_owned(), "green".to_owned())]),
    }
}
