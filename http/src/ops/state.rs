//! `GET /ui/state`: nodes, shards and a page of sandboxes, for the dashboard and `mica top`.
//!
//! Called by [`crate::api`]. Refuses more than a page of sandboxes, for each costs a look at its process.

use std::time::{Duration, SystemTime};

use hyper::{Response, StatusCode};
use mica_shards::metrics::{OperationView, Quantiles};
use mica_shards::{Host, HostView, SandboxView, ShardView};
use mica_units::SandboxId;
use mica_wire::api::{
    HostState, HostSummary, NodeSummary, OperationSummary, PhaseSummary, PoolSummary,
    SandboxSummary, ShardSummary,
};

use crate::api::{Cursor, PAGE_ENTRIES_MAX, json, page_limit, show, with_next};
use crate::body::Body;
use crate::error::ApiError;
use crate::{percent, rfc3339};

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct StateQuery {
    limit: usize,
    after: Option<(SystemTime, SandboxId)>,
}

impl StateQuery {
    fn parse(query: &str) -> Result<Self, ApiError> {
        let pairs = percent::query_pairs(query)
            .map_err(|error| ApiError::bad_request(format!("the query is not valid: {error}")))?;
        let mut parsed = Self { limit: PAGE_ENTRIES_MAX, after: None };
        for (key, value) in pairs {
            match key.as_str() {
                "limit" => parsed.limit = page_limit(&value)?,
                "nextToken" if !value.is_empty() => {
                    let after = Cursor::from_token(&value).and_then(Cursor::start);
                    parsed.after = Some(after.ok_or_else(|| {
                        ApiError::bad_request("`nextToken` must be an `x-next-token` of this host")
                    })?);
                }
                _ => {}
            }
        }
        Ok(parsed)
    }
}

/// Asks every shard and answers.
///
/// # Errors
/// 400 for a query out of form; when a shard does not answer.
pub async fn answer(host: &Host, query: &str) -> Result<Response<Body>, ApiError> {
    let query = StateQuery::parse(query)?;
    let view = host.view(query.after, query.limit).await?;
    let last = view.sandboxes.last().filter(|_| view.has_more);
    let next = last.map(|last| Cursor::at(last.started_at, last.id).to_token());
    let state = state(view, host.has_metrics());
    Ok(with_next(json::answer(StatusCode::OK, &state)?, next))
}

fn state(view: HostView, metrics: bool) -> HostState {
    let HostView { uptime, kernel, nodes, shards, sandboxes, sandboxes_total, .. } = view;
    let node = |node: mica_shards::NodeView| NodeSummary {
        node: node.node,
        memory_bytes: node.memory_bytes,
        free_bytes: node.free_bytes,
        vcpus: u32::try_from(node.vcpus).unwrap_or(u32::MAX),
    };
    HostState {
        host: HostSummary {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_s: uptime.as_secs_f64(),
            kernel,
            metrics,
            nodes: nodes.into_iter().map(node).collect(),
            shards: shards.iter().map(shard).collect(),
        },
        sandboxes: sandboxes.into_iter().map(sandbox).collect(),
        sandboxes_total: sandboxes_total as u64,
    }
}

fn shard(view: &ShardView) -> ShardSummary {
    ShardSummary {
        shard: view.shard.index(),
        node: view.node,
        core: view.core,
        busy_fraction: view.busy_share,
        mailbox_depth: view.mailbox_depth,
        sandboxes: view.sandboxes,
        pool: PoolSummary {
            depth: view.pool_depth,
            hits: view.pool_hits,
            misses: view.pool_misses,
        },
        ops: view
            .operations
            .iter()
            .map(|operation| (operation.operation.to_owned(), summary(operation)))
            .collect(),
    }
}

fn summary(view: &OperationView) -> OperationSummary {
    let phase = |(order, (name, quantiles)): (u32, &(&'static str, Option<Quantiles>))| {
        let [p50_us, p95_us, p99_us] = whole_us(*quantiles);
        ((*name).to_owned(), PhaseSummary { order, p50_us, p95_us, p99_us })
    };
    let [p50_us, p95_us, p99_us] = whole_us(view.total);
    OperationSummary {
        count: view.count,
        errors: view.errors,
        p50_us,
        p95_us,
        p99_us,
        phases: (0..).zip(&view.phases).map(phase).collect(),
    }
}

fn whole_us(quantiles: Option<Quantiles>) -> [Option<u64>; 3] {
    let us = |pick: fn(&Quantiles) -> Duration| {
        quantiles.as_ref().map(|q| u64::try_from(pick(q).as_micros()).unwrap_or(u64::MAX))
    };
    [us(|q| q.p50), us(|q| q.p95), us(|q| q.p99)]
}

fn sandbox(view: SandboxView) -> SandboxSummary {
    SandboxSummary {
        id: view.id.to_string(),
        template: view.template,
        tenant: view.tenant.as_str().to_owned(),
        state: show::state(view.state),
        shard: view.shard.index(),
        node: view.node,
        started_at: rfc3339::format(view.started_at),
        memory_bytes: view.process.map(|process| process.memory_bytes),
        cpu: view.process.and_then(|process| process.cpu),
        wrong_node_pages: view.process.and_then(|process| process.wrong_node_pages),
        wrong_node_cpu_s: view
            .process
            .and_then(|process| process.wrong_node_time)
            .map(|time| time.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    #[test]
    fn a_page_is_bounded_and_its_token_of_this_host() {
        let whole = StateQuery { limit: PAGE_ENTRIES_MAX, after: None };
        assert_eq!(StateQuery::parse("").unwrap(), whole);
        assert_eq!(StateQuery::parse("nextToken=&x=y").unwrap(), whole);
        let id: SandboxId = "i0123456789abcdefghij".parse().unwrap();
        let at = UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789);
        let token = Cursor::at(at, id).to_token();
        let parsed = StateQuery::parse(&format!("limit=7&nextToken={token}")).unwrap();
        assert_eq!(parsed, StateQuery { limit: 7, after: Some((at, id)) });
        let far = format!("nextToken={:x}-{id}", u128::MAX);
        for bad in ["limit=0", "limit=101", "limit=x", "nextToken=x", &far] {
            assert!(StateQuery::parse(bad).is_err(), "{bad}");
        }
    }
}
