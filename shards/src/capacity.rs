//! How many hosts a load needs, and what runs out first: arithmetic over unit costs.
//!
//! Called by `mica plan`, which reads the files and prints the table. Refuses numbers that mean nothing, and
//! hosts that could not hold a single sandbox. What it does not know is the order in which things happen: queues
//! and bursts are for the simulator in `lab`.

use std::fmt;

/// The load that is planned for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    /// Sandboxes that are made in a second, all hosts together.
    pub creates_per_s: f64,
    /// Sandboxes that are alive at one time.
    pub live: f64,
    /// How often code is run in each of them, from its create to its end.
    pub execs_per_create: f64,
    /// How many of a hundred live ones have run code, and so have written to more of their memory.
    pub used_percent: f64,
    /// Snapshots that are taken in an hour.
    pub snapshots_per_hour: f64,
    /// Hours that a snapshot is kept.
    pub kept_hours: f64,
}

/// What each thing costs a host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UnitCosts {
    /// Memory of the host itself: its system, the daemon, and the copies of templates' memory.
    pub base_bytes: f64,
    /// Memory of a sandbox that has done nothing.
    pub idle_bytes: f64,
    /// Memory of one that has run code.
    pub used_bytes: f64,
    /// Processor time of a whole life besides its code: a VM process made for the pool, a restore, an end.
    pub create_cpu_ms: f64,
    /// The part of it that is the shard's.
    pub create_shard_cpu_ms: f64,
    /// Processor time of code that is run once.
    pub exec_cpu_ms: f64,
    /// What the drive holds of one live sandbox: blocks of the template's disk that it wrote over.
    pub disk_bytes: f64,
    /// What a snapshot writes to the drive, and holds there.
    pub snapshot_bytes: f64,
}

/// One host.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostShape {
    /// Cores, those of shards included.
    pub cores: f64,
    /// Cores that carry shards.
    pub shards: f64,
    /// Its memory.
    pub memory_bytes: f64,
    /// The drive that holds the store.
    pub nvme_bytes: f64,
    /// What the drive can write all day.
    pub nvme_write_bytes_per_s: f64,
    /// Most sandboxes that it is told to hold.
    pub sandboxes_max: f64,
}

/// How much more of a resource there is to be than is used on average.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Headroom {
    /// For memory.
    pub memory: f64,
    /// For processors.
    pub cpu: f64,
    /// For the drive.
    pub drive: f64,
}

impl Default for Headroom {
    /// For memory and processors what `SoulBox`'s capacity model takes. A file system that is nearly full is slow.
    fn default() -> Self {
        Self { memory: 1.5, cpu: 1.3, drive: 1.2 }
    }
}

/// What a host can run out of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Memory.
    Memory,
    /// Cores of virtual CPUs and VM processes.
    VmCores,
    /// Cores of shards.
    ShardCores,
    /// Room on the drive.
    DriveBytes,
    /// What the drive can write.
    DriveWrites,
    /// The bound on sandboxes that the daemon is given.
    Sandboxes,
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Memory => "memory",
            Self::VmCores => "cores for VMs",
            Self::ShardCores => "cores for shards",
            Self::DriveBytes => "room on the drive",
            Self::DriveWrites => "writes to the drive",
            Self::Sandboxes => "sandboxes allowed",
        })
    }
}

/// One resource of a plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Line {
    /// Which.
    pub resource: Resource,
    /// What the load needs, headroom included, on all hosts together.
    pub need: f64,
    /// What one host has for it: all of it, but what the host itself takes.
    pub host_has: f64,
    /// Hosts that this resource alone would need.
    pub hosts: u64,
    /// How much of the load one host can carry before this runs out; above 1, more than all of it.
    pub one_host_carries: f64,
}

/// What a load needs.
#[derive(Clone, Debug, PartialEq)]
pub struct CapacityPlan {
    /// Every resource.
    pub lines: Vec<Line>,
    /// Hosts that are needed.
    pub hosts: u64,
    /// What runs out first on a host.
    pub first: Resource,
    /// How long a sandbox lives on average, in seconds, if this many are made and this many are alive (Little's law).
    pub mean_life_s: f64,
}

impl CapacityPlan {
    /// The line of what runs out first.
    #[must_use]
    pub fn tightest(&self) -> Option<&Line> {
        self.lines.iter().find(|line| line.resource == self.first)
    }
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CapacityError {
    /// A number that means nothing here.
    #[error("{name} is {value}: it must be {least} to {most}")]
    OutOfRange {
        /// Of what.
        name: &'static str,
        /// The number.
        value: f64,
        /// The least that is taken.
        least: f64,
        /// The most.
        most: f64,
    },
    /// Every core is a shard's.
    #[error(
        "the host has {cores} cores and {shards} shards: at least one core must be left for VMs"
    )]
    NoCoreLeft {
        /// Cores of the host.
        cores: f64,
        /// Of which shards.
        shards: f64,
    },
    /// The host itself needs all its memory.
    #[error(
        "the host has {have:.0} bytes of memory, and with headroom needs {need:.0} before it holds a sandbox"
    )]
    NoMemoryLeft {
        /// What it has.
        have: f64,
        /// What it needs itself.
        need: f64,
    },
    /// One sandbox alone is too much.
    #[error("one host has too little {0} for one sandbox")]
    HostTooSmall(Resource),
}

const TIB: f64 = 1024.0 * 1024.0 * 1024.0 * 1024.0;

/// What is not a number compares as outside of every range.
fn check(values: &[(&'static str, f64, f64, f64)]) -> Result<(), CapacityError> {
    let bad = values.iter().find(|(_, value, least, most)| !(*least..=*most).contains(value));
    bad.map_or(Ok(()), |(name, value, least, most)| {
        Err(CapacityError::OutOfRange { name, value: *value, least: *least, most: *most })
    })
}

impl Demand {
    fn check(&self) -> Result<(), CapacityError> {
        check(&[
            ("the number of creates in a second", self.creates_per_s, 1e-6, 1e7),
            ("the number of live sandboxes", self.live, 1.0, 1e9),
            ("the number of executions of each sandbox", self.execs_per_create, 0.0, 1e6),
            ("the percentage of used sandboxes", self.used_percent, 0.0, 100.0),
            ("the number of snapshots in an hour", self.snapshots_per_hour, 0.0, 1e9),
            ("the number of hours that snapshots are kept", self.kept_hours, 0.0, 1e5),
        ])
    }
}

impl UnitCosts {
    fn check(&self) -> Result<(), CapacityError> {
        check(&[
            ("base_bytes", self.base_bytes, 0.0, TIB),
            ("idle_bytes", self.idle_bytes, 1.0, TIB),
            ("used_bytes", self.used_bytes, 1.0, TIB),
            ("create_cpu_ms", self.create_cpu_ms, 1e-6, 1e6),
            ("create_shard_cpu_ms", self.create_shard_cpu_ms, 1e-6, 1e6),
            ("exec_cpu_ms", self.exec_cpu_ms, 0.0, 1e9),
            ("disk_bytes", self.disk_bytes, 0.0, TIB),
            ("snapshot_bytes", self.snapshot_bytes, 0.0, TIB),
        ])
    }
}

impl HostShape {
    fn check(&self) -> Result<(), CapacityError> {
        check(&[
            ("cores", self.cores, 1.0, 1e5),
            ("shards", self.shards, 1.0, 1e5),
            ("memory_bytes", self.memory_bytes, 1.0, 1024.0 * TIB),
            ("nvme_bytes", self.nvme_bytes, 1.0, 1e6 * TIB),
            ("nvme_write_bytes_per_s", self.nvme_write_bytes_per_s, 1.0, TIB),
            ("sandboxes_max", self.sandboxes_max, 1.0, 1e6),
        ])
    }
}

impl Headroom {
    fn check(&self) -> Result<(), CapacityError> {
        check(&[
            ("the headroom of memory", self.memory, 1.0, 100.0),
            ("the headroom of processors", self.cpu, 1.0, 100.0),
            ("the headroom of the drive", self.drive, 1.0, 100.0),
        ])
    }
}

/// What the load needs on hosts of this shape.
///
/// # Errors
/// When a number means nothing, or a host could not hold one sandbox.
pub fn plan_capacity(
    demand: &Demand,
    costs: &UnitCosts,
    host: &HostShape,
    headroom: &Headroom,
) -> Result<CapacityPlan, CapacityError> {
    demand.check()?;
    costs.check()?;
    host.check()?;
    headroom.check()?;
    if host.shards >= host.cores {
        return Err(CapacityError::NoCoreLeft { cores: host.cores, shards: host.shards });
    }
    let base = costs.base_bytes * headroom.memory;
    if base >= host.memory_bytes {
        return Err(CapacityError::NoMemoryLeft { have: host.memory_bytes, need: base });
    }
    let used = demand.used_percent / 100.0;
    let each_bytes = costs.idle_bytes * (1.0 - used) + costs.used_bytes * used;
    let vm_cpu_ms = costs.create_cpu_ms + demand.execs_per_create * costs.exec_cpu_ms;
    let cores = |cpu_ms: f64| demand.creates_per_s * cpu_ms / 1000.0 * headroom.cpu;
    let kept = demand.snapshots_per_hour * demand.kept_hours;
    let held = demand.live * costs.disk_bytes + kept * costs.snapshot_bytes;
    let written_per_s = demand.snapshots_per_hour / 3600.0 * costs.snapshot_bytes;
    let needs = [
        (Resource::Memory, demand.live * each_bytes * headroom.memory, host.memory_bytes - base),
        (Resource::VmCores, cores(vm_cpu_ms), host.cores - host.shards),
        (Resource::ShardCores, cores(costs.create_shard_cpu_ms), host.shards),
        (Resource::DriveBytes, held * headroom.drive, host.nvme_bytes),
        (Resource::DriveWrites, written_per_s * headroom.drive, host.nvme_write_bytes_per_s),
        (Resource::Sandboxes, demand.live, host.sandboxes_max),
    ];
    // What cannot be divided between hosts.
    if each_bytes * headroom.memory > host.memory_bytes - base {
        return Err(CapacityError::HostTooSmall(Resource::Memory));
    }
    if costs.disk_bytes.max(costs.snapshot_bytes) * headroom.drive > host.nvme_bytes {
        return Err(CapacityError::HostTooSmall(Resource::DriveBytes));
    }
    let lines: Vec<Line> = needs.map(|(resource, need, has)| line(resource, need, has)).to_vec();
    let tightest = lines.iter().min_by(|a, b| a.one_host_carries.total_cmp(&b.one_host_carries));
    let first = tightest.map_or(Resource::Memory, |line| line.resource);
    let hosts = lines.iter().map(|line| line.hosts).max().unwrap_or(1);
    Ok(CapacityPlan { lines, hosts, first, mean_life_s: demand.live / demand.creates_per_s })
}

fn line(resource: Resource, need: f64, host_has: f64) -> Line {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive, and checks above keep it far below 2^53; `as` saturates"
    )]
    let hosts = (need / host_has).ceil().max(1.0) as u64;
    let one_host_carries = if need > 0.0 { host_has / need } else { f64::INFINITY };
    Line { resource, need, host_has, hosts, one_host_carries }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
    const MIB: f64 = 1024.0 * 1024.0;

    fn demand() -> Demand {
        Demand {
            creates_per_s: 100.0,
            live: 5000.0,
            execs_per_create: 10.0,
            used_percent: 50.0,
            snapshots_per_hour: 3600.0,
            kept_hours: 24.0,
        }
    }

    fn costs() -> UnitCosts {
        UnitCosts {
            base_bytes: 6.0 * GIB,
            idle_bytes: 4.0 * MIB,
            used_bytes: 24.0 * MIB,
            create_cpu_ms: 20.0,
            create_shard_cpu_ms: 2.0,
            exec_cpu_ms: 5.0,
            disk_bytes: 16.0 * MIB,
            snapshot_bytes: 8.0 * MIB,
        }
    }

    fn host() -> HostShape {
        HostShape {
            cores: 48.0,
            shards: 12.0,
            memory_bytes: 375.0 * GIB,
            nvme_bytes: 2048.0 * GIB,
            nvme_write_bytes_per_s: 2e9,
            sandboxes_max: 4096.0,
        }
    }

    fn plan(demand: &Demand) -> Result<CapacityPlan, CapacityError> {
        plan_capacity(demand, &costs(), &host(), &Headroom::default())
    }

    #[test]
    fn needs_are_what_one_gets_by_hand() {
        let plan = plan(&demand()).unwrap();
        let need =
            |resource| plan.lines.iter().find(|line| line.resource == resource).unwrap().need;
        // 5000 sandboxes of 14 MiB on average, and half as much again.
        assert_eq!(need(Resource::Memory), 5000.0 * 14.0 * MIB * 1.5);
        // 100 lives of 20 + 10 · 5 ms in a second.
        assert!((need(Resource::VmCores) - 7.0 * 1.3).abs() < 1e-9);
        assert!((need(Resource::ShardCores) - 0.2 * 1.3).abs() < 1e-9);
        // One snapshot a second.
        assert!((need(Resource::DriveWrites) - 8.0 * MIB * 1.2).abs() < 1.0);
        let held = 5000.0 * 16.0 * MIB + 86_400.0 * 8.0 * MIB;
        assert_eq!(need(Resource::DriveBytes), held * 1.2);
        assert_eq!((plan.hosts, plan.first), (2, Resource::Sandboxes));
        assert_eq!(plan.mean_life_s, 50.0);
        assert_eq!(plan.tightest().unwrap().one_host_carries, 4096.0 / 5000.0);
    }

    #[test]
    fn every_resource_can_be_the_first_to_run_out() {
        type Weaken = fn(&mut HostShape);
        let cases: [(Resource, Weaken); 6] = [
            (Resource::Memory, |host| host.memory_bytes = 20.0 * GIB),
            (Resource::VmCores, |host| (host.cores, host.shards) = (2.0, 1.0)),
            (Resource::ShardCores, |host| host.shards = 1.0),
            (Resource::DriveBytes, |host| host.nvme_bytes = 1.0 * GIB),
            (Resource::DriveWrites, |host| host.nvme_write_bytes_per_s = 1e5),
            (Resource::Sandboxes, |host| host.sandboxes_max = 10.0),
        ];
        for (resource, weaken) in cases {
            let mut host = host();
            weaken(&mut host);
            let busy_shard = resource == Resource::ShardCores;
            let create_shard_cpu_ms = if busy_shard { 2000.0 } else { 2.0 };
            let costs = UnitCosts { create_shard_cpu_ms, ..costs() };
            let plan = plan_capacity(&demand(), &costs, &host, &Headroom::default()).unwrap();
            assert_eq!(plan.first, resource, "{plan:?}");
        }
    }

    #[test]
    fn nonsense_is_named() {
        let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, 1e300];
        for value in bad {
            for wrong in
                [Demand { creates_per_s: value, ..demand() }, Demand { live: value, ..demand() }]
            {
                let error = plan(&wrong).unwrap_err();
                assert!(matches!(error, CapacityError::OutOfRange { .. }), "{error}");
                assert!(error.to_string().contains("must be"), "{error}");
            }
            let wrong = UnitCosts { idle_bytes: value, ..costs() };
            let error = plan_capacity(&demand(), &wrong, &host(), &Headroom::default());
            assert!(error.unwrap_err().to_string().starts_with("idle_bytes is"));
            let wrong = HostShape { nvme_bytes: value, ..host() };
            assert!(plan_capacity(&demand(), &costs(), &wrong, &Headroom::default()).is_err());
            let wrong = Headroom { cpu: value, ..Headroom::default() };
            assert!(plan_capacity(&demand(), &costs(), &host(), &wrong).is_err());
        }
    }

    #[test]
    fn hosts_that_hold_nothing_are_refused() {
        let with = |host: HostShape| {
            plan_capacity(&demand(), &costs(), &host, &Headroom::default()).unwrap_err().to_string()
        };
        let error = with(HostShape { cores: 12.0, ..host() });
        assert!(error.contains("12 cores and 12 shards"), "{error}");
        let error = with(HostShape { memory_bytes: 8.0 * GIB, ..host() });
        assert!(error.contains("before it holds a sandbox"), "{error}");
        let error = with(HostShape { memory_bytes: 9.0 * GIB + 1.0, ..host() });
        assert_eq!(error, "one host has too little memory for one sandbox");
        let error = with(HostShape { nvme_bytes: 1.0, ..host() });
        assert_eq!(error, "one host has too little room on the drive for one sandbox");
    }

    proptest! {
        #[test]
        fn more_load_never_needs_fewer_hosts(
            creates in 1e-3..1e5f64, live in 1.0..1e6f64, snapshots in 0.0..1e6f64,
            more in 1.0..50.0f64, which in 0..3usize,
        ) {
            let (creates_per_s, snapshots_per_hour) = (creates, snapshots);
            let less = Demand { creates_per_s, live, snapshots_per_hour, ..demand() };
            let mut greater = less;
            *[&mut greater.creates_per_s, &mut greater.live, &mut greater.snapshots_per_hour]
                [which] *= more;
            let (less, greater) = (plan(&less).unwrap(), plan(&greater).unwrap());
            prop_assert!(less.hosts <= greater.hosts);
            let carried = |plan: &CapacityPlan| plan.tightest().unwrap().one_host_carries;
            prop_assert!(carried(&less) >= carried(&greater));
            // What is needed fits on that many, and not on one fewer.
            let fits = |hosts: u64| {
                less.lines.iter().all(|line| line.need <= line.host_has * hosts as f64 * (1.0 + 1e-12))
            };
            prop_assert!(fits(less.hosts));
            prop_assert!(less.hosts == 1 || !fits(less.hosts - 1));
        }
    }
}
