//! What sandboxes use: asked of their agents, and kept for a while by their shards.
//!
//! Called by [`super`]. An agent is asked when a client asks, never before: numbers that nobody wants
//! would keep every guest awake. Refuses to wait for an agent that does not answer: what is kept is
//! shown then.

use std::time::{Duration, UNIX_EPOCH};

use futures_util::future::join_all;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, Response, StatusCode};
use mica_shards::rt::{self, time};
use mica_shards::{Lifecycle, SandboxInfo, ShardError, Usage};
use mica_units::{GuestPort, SandboxId};
use mica_wire::api::{SandboxMetric, SandboxesWithMetrics};
use serde::Deserialize;

use super::json;
use super::sandbox::sandbox_id;
use crate::body::Body;
use crate::conn::Adapted;
use crate::error::ApiError;
use crate::tenant::TenantHost;
use crate::{percent, rfc3339};

/// How long an agent may take.
const AGENT_DEADLINE: Duration = Duration::from_secs(2);

/// Longest answer of an agent.
const ANSWER_BYTES_MAX: usize = 16 * 1024;

/// Sandboxes that one request asks about.
const SANDBOXES_MAX: usize = 100;

/// The last second of the year 9999: what times are written up to.
const SECONDS_MAX: u64 = 253_402_300_799;

/// What envd answers to `GET /metrics`.
#[derive(Deserialize)]
struct EnvdMetrics {
    ts: u64,
    cpu_count: u32,
    cpu_used_pct: f64,
    mem_total: u64,
    mem_used: u64,
    mem_cache: u64,
    disk_total: u64,
    disk_used: u64,
}

/// `GET /sandboxes/{id}/metrics`.
///
/// # Errors
/// What to answer instead.
pub async fn of_one(
    host: &TenantHost<'_>,
    id: SandboxId,
    query: &str,
) -> Result<Response<Body>, ApiError> {
    let (start, end) = span(query)?;
    let kept = sampled(host, host.get(id).await?).await?;
    let within = kept.iter().filter(|usage| (start..=end).contains(&usage.at_unix_s));
    let metrics: Vec<SandboxMetric> = within.map(metric).collect();
    json::answer(StatusCode::OK, &metrics)
}

/// `GET /sandboxes/metrics`: the newest of each.
///
/// # Errors
/// What to answer instead.
pub async fn of_many(host: &TenantHost<'_>, query: &str) -> Result<Response<Body>, ApiError> {
    let ids = ids(query)?;
    let sample = |id| async move { (id, async { sampled(host, host.get(id).await?).await }.await) };
    let mut found = SandboxesWithMetrics::default();
    for (id, kept) in join_all(ids.into_iter().map(sample)).await {
        // Somebody else's, gone, or not to be had now: each is left out.
        if let Ok(kept) = kept
            && let Some(newest) = kept.last()
        {
            found.sandboxes.insert(id.to_string(), metric(newest));
        }
    }
    json::answer(StatusCode::OK, &found)
}

/// Asks a running sandbox's agent, and gives all that is kept.
async fn sampled(host: &TenantHost<'_>, info: SandboxInfo) -> Result<Vec<Usage>, ShardError> {
    let now = match info.state {
        Lifecycle::Paused => None,
        Lifecycle::Running => match time::timeout(AGENT_DEADLINE, ask_agent(host, &info)).await {
            Ok(Ok(usage)) => Some(usage),
            Ok(Err(why)) => {
                tracing::info!(id = %info.id, why, "no numbers from an agent");
                None
            }
            Err(time::Elapsed) => {
                tracing::info!(id = %info.id, "an agent does not say what it uses");
                None
            }
        },
    };
    host.usages(info.id, now).await
}

async fn ask_agent(host: &TenantHost<'_>, info: &SandboxInfo) -> Result<Usage, String> {
    let stream = host.connect(info.id, GuestPort::ENVD).await.map_err(|error| error.to_string())?;
    let (mut sender, connection) = http1::Builder::new()
        .handshake(Adapted(stream))
        .await
        .map_err(|error| error.to_string())?;
    let driving = rt::spawn(connection);
    let mut request = Request::get("/metrics").header(HOST, "localhost");
    if let Some(token) = &info.access_token {
        request = request.header("x-access-token", token);
    }
    let request = request.body(Empty::<bytes::Bytes>::new()).map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    if response.status() != StatusCode::OK {
        return Err(format!("it answers {}", response.status()));
    }
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
    let body = body.collect().await.map_err(|error| error.to_string())?.to_bytes();
    driving.cancel();
    usage(&body)
}

fn usage(body: &[u8]) -> Result<Usage, String> {
    let said: EnvdMetrics = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    // The guest says what it likes; what is shown stays a number within its kind.
    let percent = if said.cpu_used_pct.is_finite() { said.cpu_used_pct } else { 0.0 };
    Ok(Usage {
        at_unix_s: said.ts.min(SECONDS_MAX),
        cpu_count: said.cpu_count,
        cpu_used_percent: percent.max(0.0),
        memory_total_bytes: said.mem_total,
        memory_used_bytes: said.mem_used,
        memory_cache_bytes: said.mem_cache,
        disk_total_bytes: said.disk_total,
        disk_used_bytes: said.disk_used,
    })
}

fn metric(usage: &Usage) -> SandboxMetric {
    SandboxMetric {
        timestamp: rfc3339::format(UNIX_EPOCH + Duration::from_secs(usage.at_unix_s)),
        timestamp_unix: usage.at_unix_s,
        cpu_count: usage.cpu_count,
        cpu_used_pct: usage.cpu_used_percent,
        mem_used: usage.memory_used_bytes,
        mem_total: usage.memory_total_bytes,
        mem_cache: usage.memory_cache_bytes,
        disk_used: usage.disk_used_bytes,
        disk_total: usage.disk_total_bytes,
    }
}

/// From `start` to `end`, in seconds since 1970.
fn span(query: &str) -> Result<(u64, u64), ApiError> {
    let (mut start, mut end) = (0, u64::MAX);
    for (key, value) in pairs(query)? {
        let bound = match key.as_str() {
            "start" => &mut start,
            "end" => &mut end,
            _ => continue,
        };
        let parsed = value.parse().map_err(|_| {
            ApiError::bad_request(format!("`{key}` must be seconds since 1970, 0 or more"))
        });
        *bound = parsed?;
    }
    if start > end {
        return Err(ApiError::bad_request("`start` is after `end`; swap them"));
    }
    Ok((start, end))
}

fn ids(query: &str) -> Result<Vec<SandboxId>, ApiError> {
    let value = pairs(query)?.into_iter().find(|(key, _)| key == "sandbox_ids");
    let (_, value) = value.ok_or_else(|| {
        ApiError::bad_request("`sandbox_ids` is missing; send ids, separated by commas")
    })?;
    let texts: Vec<&str> = value.split(',').filter(|id| !id.is_empty()).collect();
    if texts.len() > SANDBOXES_MAX {
        let message = format!("`sandbox_ids` must be {SANDBOXES_MAX} ids at most");
        return Err(ApiError::bad_request(message));
    }
    let mut ids = Vec::new();
    for text in texts {
        match sandbox_id(text) {
            Ok(id) => ids.push(id),
            // An id that this host never draws has no numbers.
            Err(error) if error == ApiError::invalid_sandbox_id() => return Err(error),
            Err(_) => {}
        }
    }
    Ok(ids)
}

fn pairs(query: &str) -> Result<Vec<(String, String)>, ApiError> {
    percent::query_pairs(query)
        .map_err(|error| ApiError::bad_request(format!("the query is not valid: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_ids() {
        assert_eq!(span("").unwrap(), (0, u64::MAX));
        assert_eq!(span("start=5&end=9&x=y").unwrap(), (5, 9));
        for bad in ["start=-1", "end=x", "start=9&end=5", "start=1.5"] {
            assert!(span(bad).is_err(), "{bad}");
        }
        let id = "i0123456789abcdefghij";
        assert_eq!(ids(&format!("sandbox_ids={id}%2C,unknown")).unwrap().len(), 1);
        let many = format!("sandbox_ids={}", vec![id; 101].join(","));
        for bad in ["", "sandbox_ids=..", &many] {
            assert!(ids(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_guest_says_is_a_number_or_nothing() {
        let said = |percent: &str| {
            let body = format!(
                r#"{{"ts":99999999999999,"cpu_count":2,"cpu_used_pct":{percent},"mem_total":4,
                    "mem_used":3,"mem_cache":2,"disk_total":6,"disk_used":5}}"#
            );
            usage(body.as_bytes())
        };
        let shown = metric(&said("12.5").unwrap());
        assert_eq!((shown.cpu_used_pct, shown.mem_used, shown.disk_total), (12.5, 3, 6));
        assert_eq!(shown.timestamp_unix, SECONDS_MAX);
        assert_eq!(said("-3.0").unwrap().cpu_used_percent, 0.0);
        assert!(said("1e999").is_err() && said("\"x\"").is_err());
        assert!(usage(b"{}").is_err() && usage(b"").is_err());
    }
}
