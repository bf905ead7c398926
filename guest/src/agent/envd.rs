//! The routes of port 49983: health, environment, figures, and the RPC services.
//!
//! Called by the agent. Refuses E2B's own routes between host and guest (`/init` and its like):
//! here they go over the control exchange.

use http::{Method, StatusCode};
use serde::Serialize;

use crate::http::{Access, Call, HttpError, Response, Router, json, status};
use crate::{filesystem, http as plumbing, process};

/// Registers all of them.
pub fn register(router: &mut Router) {
    router.add(Method::GET, "/health", Access::Open, |_: Call| async {
        Ok(status(StatusCode::NO_CONTENT))
    });
    router.add(Method::GET, "/envs", Access::Token, |call: Call| async move {
        json(StatusCode::OK, &call.sandbox.environment_of(Some(&call.identity)))
    });
    router.add(Method::GET, "/metrics", Access::Token, |_: Call| metrics());
    process::register(router);
    filesystem::register(router);
}

const BYTES_PER_MIB: u64 = 1024 * 1024;

#[derive(Debug, Serialize)]
struct Metrics {
    ts: u64,
    cpu_count: usize,
    cpu_used_pct: f64,
    mem_total: u64,
    mem_used: u64,
    /// The same two in MiB, for SDKs of before there were bytes.
    mem_total_mib: u64,
    mem_used_mib: u64,
    mem_cache: u64,
    disk_total: u64,
    disk_used: u64,
}

async fn metrics() -> Result<Response, HttpError> {
    let busy_before = cpu_ticks()?;
    // A rate needs two readings, and there is no condition to wait for but time.
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    let busy_after = cpu_ticks()?;
    let memory = read("/proc/meminfo")?;
    let kib = |name: &str| field(&memory, name).unwrap_or(0).saturating_mul(1024);
    let mem_total = kib("MemTotal:");
    let mem_used = mem_total.saturating_sub(kib("MemAvailable:"));
    let disk = rustix::fs::statvfs("/").map_err(|errno| failed("statvfs /", &errno.into()))?;
    let disk_total = disk.f_blocks.saturating_mul(disk.f_frsize);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    json(
        StatusCode::OK,
        &Metrics {
            ts: now.map_or(0, |since| since.as_secs()),
            cpu_count: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            cpu_used_pct: used_percent(busy_before, busy_after),
            mem_total,
            mem_used,
            mem_total_mib: mem_total / BYTES_PER_MIB,
            mem_used_mib: mem_used / BYTES_PER_MIB,
            mem_cache: kib("Cached:"),
            disk_total,
            disk_used: disk_total.saturating_sub(disk.f_bfree.saturating_mul(disk.f_frsize)),
        },
    )
}

fn failed(what: &str, error: &std::io::Error) -> HttpError {
    let message = format!("cannot read {what}: {error}");
    plumbing::HttpError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
}

fn read(path: &str) -> Result<String, HttpError> {
    std::fs::read_to_string(path).map_err(|error| failed(path, &error))
}

/// The number behind a name at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// (busy, all) ticks of all processors since boot.
fn cpu_ticks() -> Result<(u64, u64), HttpError> {
    let text = read("/proc/stat")?;
    let line = text.lines().find_map(|line| line.strip_prefix("cpu ")).unwrap_or("");
    let ticks: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; the guest's shares are in user already.
    let all: u64 = ticks.iter().take(8).sum();
    let idle: u64 = ticks.iter().skip(3).take(2).sum();
    Ok((all.saturating_sub(idle), all))
}

fn used_percent(before: (u64, u64), after: (u64, u64)) -> f64 {
    let busy = u32::try_from(after.0.saturating_sub(before.0)).unwrap_or(u32::MAX);
    let all = u32::try_from(after.1.saturating_sub(before.1)).unwrap_or(u32::MAX);
    let percent = if all == 0 { 0.0 } else { f64::from(busy) * 100.0 / f64::from(all) };
    // Two places, as E2B has it.
    (percent * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_their_lines() {
        let text = "MemTotal:       16 kB\nMemAvailable:    4 kB\nCached:  x kB\n";
        assert_eq!(field(text, "MemTotal:"), Some(16));
        assert_eq!(field(text, "Cached:"), None);
        assert_eq!(field(text, "Nothing:"), None);
        assert!((used_percent((10, 100), (35, 200)) - 25.0).abs() < f64::EPSILON);
        assert!((used_percent((0, 0), (1, 3)) - 33.33).abs() < f64::EPSILON);
        assert!(used_percent((10, 100), (10, 100)).abs() < f64::EPSILON);
    }
}
