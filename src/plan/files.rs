//! The files that `mica plan` reads: a host, and what things cost on one.
//!
//! Called by `mica plan`. Refuses files that are large, fields that it does not know, and reports that have none of
//! the figures it looks for.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use mica_shards::HostConfig;
use mica_shards::capacity::{HostShape, UnitCosts};
use serde::Deserialize;
use serde_json::{Value, json};

const FILE_BYTES_MAX: u64 = 4 << 20;

const MIB: f64 = 1024.0 * 1024.0;

/// Where each comes from is in docs/capacity.md.
pub(super) const DEFAULTS: UnitCosts = UnitCosts {
    base_bytes: 6.0 * 1024.0 * MIB,
    idle_bytes: 4_271_872.0,
    used_bytes: 24.0 * MIB,
    create_cpu_ms: 20.0,
    create_shard_cpu_ms: 1.8,
    exec_cpu_ms: 5.0,
    disk_bytes: 16.0 * MIB,
    snapshot_bytes: 8.0 * MIB,
};

fn read(path: &Path) -> Result<Value> {
    let name = || path.display().to_string();
    let mut text = String::new();
    let file = File::open(path).with_context(|| format!("cannot open {}", name()))?;
    file.take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {}", name()))?;
    let small = u64::try_from(text.len()).is_ok_and(|bytes| bytes <= FILE_BYTES_MAX);
    ensure!(small, "{} has more than {FILE_BYTES_MAX} bytes", name());
    serde_json::from_str(&text).with_context(|| format!("{} is not JSON", name()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostFile {
    cores: f64,
    shards: f64,
    memory_bytes: f64,
    nvme_bytes: f64,
    nvme_write_bytes_per_s: f64,
    /// As `mica serve --sandboxes-max` has it.
    #[serde(default = "sandboxes_max")]
    sandboxes_max: f64,
}

fn sandboxes_max() -> f64 {
    let places = PathBuf::new();
    f64::from(HostConfig::new(places.clone(), places.clone(), places).sandboxes_max)
}

/// The host of a file.
pub(super) fn read_host(path: &Path) -> Result<HostShape> {
    let HostFile { cores, shards, memory_bytes, nvme_bytes, nvme_write_bytes_per_s, sandboxes_max } =
        serde_json::from_value(read(path)?).with_context(|| {
            format!("{} does not describe a host: see docs/capacity.md", path.display())
        })?;
    Ok(HostShape { cores, shards, memory_bytes, nvme_bytes, nvme_write_bytes_per_s, sandboxes_max })
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct CostsFile {
    base_bytes: Option<f64>,
    idle_bytes: Option<f64>,
    used_bytes: Option<f64>,
    create_cpu_ms: Option<f64>,
    create_shard_cpu_ms: Option<f64>,
    exec_cpu_ms: Option<f64>,
    disk_bytes: Option<f64>,
    snapshot_bytes: Option<f64>,
}

/// Puts what a file says in the place of what was thought before.
pub(super) fn read_measured(path: &Path, costs: &mut UnitCosts) -> Result<()> {
    let found = read(path)?;
    let name = path.display();
    let said = if found.get("results").is_some() {
        engine(&found).with_context(|| format!("{name} is a report without what a plan needs"))?
    } else {
        serde_json::from_value(found)
            .with_context(|| format!("{name} holds no unit costs: see docs/capacity.md"))?
    };
    for (place, value) in [
        (&mut costs.base_bytes, said.base_bytes),
        (&mut costs.idle_bytes, said.idle_bytes),
        (&mut costs.used_bytes, said.used_bytes),
        (&mut costs.create_cpu_ms, said.create_cpu_ms),
        (&mut costs.create_shard_cpu_ms, said.create_shard_cpu_ms),
        (&mut costs.exec_cpu_ms, said.exec_cpu_ms),
        (&mut costs.disk_bytes, said.disk_bytes),
        (&mut costs.snapshot_bytes, said.snapshot_bytes),
    ] {
        if let Some(value) = value {
            *place = value;
        }
    }
    Ok(())
}

/// What a report of the engine says. Times that went by are taken for time that a processor worked, which is at
/// most as much: the plan errs on the side of too many hosts.
fn engine(report: &Value) -> Result<CostsFile> {
    let rows = report["results"].as_array().context("its results are not a list")?;
    let ms = |op: &str| {
        let row = rows.iter().find(|row| row["op"] == op)?;
        row["p50_us"].as_f64().map(|us| us / 1000.0)
    };
    let mut said = CostsFile {
        idle_bytes: report["idle_bytes_per_sandbox"].as_f64(),
        create_shard_cpu_ms: ms("create_http").or_else(|| ms("restore_pool_hit")),
        ..CostsFile::default()
    };
    // A miss makes the VM process that a hit finds made: over a life both are done once.
    if let (Some(miss), Some(destroy)) = (ms("restore_pool_miss"), ms("destroy")) {
        let over_http = ms("create_http").zip(ms("restore_pool_hit"));
        let http = over_http.map_or(0.0, |(http, hit)| (http - hit).max(0.0));
        said.create_cpu_ms = Some(miss + destroy + http);
    }
    if said.idle_bytes.or(said.create_shard_cpu_ms).or(said.create_cpu_ms).is_none() {
        bail!(
            "it has neither idle_bytes_per_sandbox nor the operations create_http, restore_pool_hit, \
             restore_pool_miss and destroy: make one with `mica bench engine --json FILE`"
        );
    }
    Ok(said)
}

/// As the file has them.
pub(super) fn costs_json(costs: &UnitCosts) -> Value {
    json!({
        "base_bytes": costs.base_bytes,
        "idle_bytes": costs.idle_bytes,
        "used_bytes": costs.used_bytes,
        "create_cpu_ms": costs.create_cpu_ms,
        "create_shard_cpu_ms": costs.create_shard_cpu_ms,
        "exec_cpu_ms": costs.exec_cpu_ms,
        "disk_bytes": costs.disk_bytes,
        "snapshot_bytes": costs.snapshot_bytes,
    })
}

/// As the file has it.
pub(super) fn host_json(host: &HostShape) -> Value {
    json!({
        "cores": host.cores,
        "shards": host.shards,
        "memory_bytes": host.memory_bytes,
        "nvme_bytes": host.nvme_bytes,
        "nvme_write_bytes_per_s": host.nvme_write_bytes_per_s,
        "sandboxes_max": host.sandboxes_max,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_the_engine_gives_what_a_life_costs() {
        let report = json!({"idle_bytes_per_sandbox": 5_000_000, "results": [
            {"op": "restore_pool_hit", "p50_us": 800.0},
            {"op": "restore_pool_miss", "p50_us": 16_000.0},
            {"op": "destroy", "p50_us": 2000.0},
            {"op": "create_http", "p50_us": 1800.0},
        ]});
        let said = engine(&report).unwrap();
        assert_eq!(said.idle_bytes, Some(5e6));
        assert_eq!(said.create_shard_cpu_ms, Some(1.8));
        assert_eq!(said.create_cpu_ms, Some(16.0 + 2.0 + 1.0));
        assert_eq!(said.exec_cpu_ms, None, "it says nothing of code");
    }

    #[test]
    fn a_report_of_something_else_is_refused() {
        let error = engine(&json!({"results": [{"op": "run_code", "p50_us": 1.0}]})).err().unwrap();
        assert!(error.to_string().contains("mica bench engine --json"), "{error}");
        assert!(engine(&json!({"results": 5})).is_err());
    }

    #[test]
    fn defaults_survive_their_own_form() {
        let said: CostsFile = serde_json::from_value(costs_json(&DEFAULTS)).unwrap();
        assert_eq!(said.create_cpu_ms, Some(DEFAULTS.create_cpu_ms));
        assert_eq!(said.snapshot_bytes, Some(DEFAULTS.snapshot_bytes));
    }
}
