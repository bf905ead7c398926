//! The files that `mica plan` reads, and a host as one of them describes it.
//!
//! Called by `mica plan`, and by [`super::measured`] for what things cost. Refuses files that are large, and fields that
//! it does not know.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use mica_shards::HostConfig;
use mica_shards::capacity::HostShape;
use serde::Deserialize;
use serde_json::{Value, json};

const FILE_BYTES_MAX: u64 = 4 << 20;

/// The JSON in a file.
pub(super) fn read(path: &Path) -> Result<Value> {
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
