//! A host as `mica plan` has it described, and what of it a simulation goes by.
//!
//! Called by `mica lab simulate` with the file of `--host`, which is that of the plan: what holds for one holds for the
//! other. Refuses what the plan refuses to read, and hosts with a part of a sandbox or of a shard.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use mica_shards::HostConfig;
use serde::Deserialize;
use serde_json::{Value, json};

const FILE_BYTES_MAX: u64 = 4 << 20;
const MIB: f64 = 1024.0 * 1024.0;

/// What a sandbox takes of such a host where nobody says it, in MiB: what the plan takes for one that has run code, and
/// not the memory that its guest could have.
pub(super) const SANDBOX_MIB: u32 = 24;

/// The fields of `docs/capacity.md`. What a simulation does not go by must be there all the same: it is one file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostFile {
    #[serde(rename = "cores")]
    _cores: f64,
    shards: f64,
    memory_bytes: f64,
    #[serde(rename = "nvme_bytes")]
    _nvme_bytes: f64,
    #[serde(rename = "nvme_write_bytes_per_s")]
    _nvme_write_bytes_per_s: f64,
    #[serde(default = "sandboxes_max")]
    sandboxes_max: f64,
}

fn sandboxes_max() -> f64 {
    let places = PathBuf::new();
    f64::from(HostConfig::new(places.clone(), places.clone(), places).sandboxes_max)
}

/// What of a host a simulation goes by. What means nothing there is refused by the simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Planned {
    pub(super) slots: u32,
    pub(super) shards: u32,
    pub(super) memory_mib: u64,
}

impl Planned {
    /// The host of a file.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let name = || path.display().to_string();
        let mut text = String::new();
        let file = File::open(path).with_context(|| format!("cannot open {}", name()))?;
        file.take(FILE_BYTES_MAX + 1)
            .read_to_string(&mut text)
            .with_context(|| format!("cannot read {}", name()))?;
        let small = u64::try_from(text.len()).is_ok_and(|bytes| bytes <= FILE_BYTES_MAX);
        ensure!(small, "{} has more than {FILE_BYTES_MAX} bytes", name());
        Self::parse(&text)
            .with_context(|| format!("{} does not describe a host: see docs/capacity.md", name()))
    }

    fn parse(text: &str) -> Result<Self> {
        let HostFile { shards, memory_bytes, sandboxes_max, .. } = serde_json::from_str(text)?;
        Ok(Self {
            slots: count("sandboxes_max", sandboxes_max)?,
            shards: count("shards", shards)?,
            memory_mib: count("memory_bytes in MiB", (memory_bytes / MIB).floor())?.into(),
        })
    }
}

/// A number that counts something.
fn count(name: &str, value: f64) -> Result<u32> {
    let most = f64::from(u32::MAX);
    let is_count = (1.0..=most).contains(&value) && value.fract() == 0.0;
    ensure!(is_count, "{name} is {value}: it must be a whole number, 1 to {most}");
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be a whole number of 32 bits"
    )]
    Ok(value as u32)
}

/// What each host of a fleet is, for programs.
pub(super) fn json(shape: &super::HostShape) -> Value {
    json!({ "slots": shape.slots, "shards": shape.shards, "memory_mib": shape.memory_mib })
}

#[cfg(test)]
mod tests {
    use mica_shards::capacity::{Demand, Headroom, HostShape, Resource, UnitCosts, plan_capacity};

    use super::*;

    const EXAMPLE: &str = include_str!("../../../examples/host.json");

    #[test]
    fn a_host_has_as_many_slots_as_its_plan_allows_and_a_sandbox_takes_what_it_counts() {
        let Planned { slots, shards, memory_mib } = Planned::parse(EXAMPLE).unwrap();
        assert_eq!((slots, shards, memory_mib), (4096, 12, 384_000));
        let host: Value = serde_json::from_str(EXAMPLE).unwrap();
        let field = |name: &str| host[name].as_f64().unwrap();
        let shape = HostShape {
            cores: field("cores"),
            shards: field("shards"),
            memory_bytes: field("memory_bytes"),
            nvme_bytes: field("nvme_bytes"),
            nvme_write_bytes_per_s: field("nvme_write_bytes_per_s"),
            sandboxes_max: field("sandboxes_max"),
        };
        let demand = Demand {
            creates_per_s: 1.0,
            live: 1.0,
            execs_per_create: 0.0,
            used_percent: 100.0,
            snapshots_per_hour: 0.0,
            kept_hours: 0.0,
        };
        let costs = UnitCosts {
            base_bytes: 0.0,
            idle_bytes: 1.0,
            used_bytes: f64::from(SANDBOX_MIB) * MIB,
            create_cpu_ms: 1.0,
            create_shard_cpu_ms: 1.0,
            exec_cpu_ms: 0.0,
            disk_bytes: 0.0,
            snapshot_bytes: 0.0,
        };
        let none = Headroom { memory: 1.0, cpu: 1.0, drive: 1.0 };
        let plan = plan_capacity(&demand, &costs, &shape, &none).unwrap();
        let carries = |resource| {
            let line = plan.lines.iter().find(|line| line.resource == resource).unwrap();
            line.one_host_carries
        };
        assert_eq!(carries(Resource::Sandboxes), f64::from(slots));
        assert_eq!(carries(Resource::ShardCores), 1000.0 * f64::from(shards));
        let in_memory = memory_mib / u64::from(SANDBOX_MIB);
        assert_eq!(carries(Resource::Memory), f64::from(u32::try_from(in_memory).unwrap()));
    }

    #[test]
    fn what_is_left_out_is_as_the_daemon_has_it_and_nonsense_is_named() {
        let with = |slots: &str| {
            let text = r#"{"cores": 4, "shards": 2, "memory_bytes": 1e9, "nvme_bytes": 1, "nvme_write_bytes_per_s": 1SLOTS}"#;
            Planned::parse(&text.replace("SLOTS", slots)).map_err(|error| format!("{error:#}"))
        };
        let found = with("").unwrap();
        assert_eq!((found.slots, found.shards, found.memory_mib), (4096, 2, 953));
        let error = with(r#", "sandboxes_max": 1.5"#).unwrap_err();
        assert!(error.contains("sandboxes_max is 1.5: it must be a whole number"), "{error}");
        assert!(with(r#", "sockets": 2"#).unwrap_err().contains("unknown field `sockets`"));
        assert!(Planned::parse(r#"{"cores": 4}"#).is_err());
    }
}
