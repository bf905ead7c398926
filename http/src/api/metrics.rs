//! `GET /metrics`: numbers of the host, in the text format of Prometheus.
//!
//! Called by [`super`]. Needs a key like everything but health. Refuses to keep numbers of its own:
//! shards count, and are asked.

use hyper::Response;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use mica_shards::HostCounters;

use crate::body::Body;
use crate::error::ApiError;
use crate::tenant::TenantHost;

/// Name, kind, what it means, and which number it is.
type Metric = (&'static str, &'static str, &'static str, fn(&HostCounters) -> u64);

const METRICS: [Metric; 5] = [
    ("mica_sandboxes", "gauge", "Sandboxes, paused ones included.", |c| c.sandboxes),
    ("mica_shells", "gauge", "VM processes that wait for a guest.", |c| c.shells),
    ("mica_pool_hits_total", "counter", "Starts that found a VM process ready.", |c| c.pool_hits),
    ("mica_pool_misses_total", "counter", "Starts that waited for a VM process to be made.", |c| {
        c.pool_misses
    }),
    (
        "mica_disk_copies_total",
        "counter",
        "Disks that were copied because the store's file system does not clone.",
        |c| c.disk_copies,
    ),
];

/// Asks every shard and answers.
///
/// # Errors
/// When a shard does not answer.
pub async fn answer(host: &TenantHost<'_>) -> Result<Response<Body>, ApiError> {
    let counters = host.counters().await?;
    let mut response = Response::new(Body::full(text(&counters).into_bytes()));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(response)
}

fn text(counters: &HostCounters) -> String {
    let mut text = String::new();
    for (name, kind, help, value) in METRICS {
        let value = value(counters);
        text += &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_has_its_name_and_kind() {
        let counters = HostCounters { pool_misses: 7, disk_copies: 3, ..HostCounters::default() };
        let text = text(&counters);
        assert!(text.contains("# TYPE mica_pool_misses_total counter\nmica_pool_misses_total 7\n"));
        assert!(text.contains("\nmica_disk_copies_total 3\n"));
        assert_eq!(text.lines().count(), 3 * METRICS.len());
    }
}
