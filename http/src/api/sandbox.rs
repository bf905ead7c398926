//! Everything that is asked of one sandbox.
//!
//! Called by [`super`] once the client has shown its key. Refuses to hold anything between two
//! requests: which operations may meet, the sandbox's own state machine knows.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::{Response, StatusCode};
use mica_shards::rt::time;
use mica_shards::{ConnectError, Lifecycle};
use mica_units::{GuestPort, SandboxId};
use mica_wire::api::{ForkResult, READY, RolledBack};

use super::operate::{self, Copies, Pause};
use super::{Call, json, logs, network, show, status, usage};
use crate::body::Body;
use crate::error::ApiError;
use crate::ids;
use crate::route::Action;
use crate::tenant::TenantHost;

/// How long a guest may take to show that it is healthy, for who demands that it is.
const HEALTH_DEADLINE: Duration = Duration::from_secs(2);

/// The same for who did not ask about its health: a guest that is slow is not refused.
const AGENT_DEADLINE: Duration = Duration::from_secs(10);

type Answer = Result<Response<Body>, ApiError>;

/// Does it.
///
/// # Errors
/// What to answer instead.
pub async fn act(call: &mut Call<'_>, id: &str, action: Action, query: &str) -> Answer {
    let id = sandbox_id(id)?;
    let body = match action {
        Action::Get | Action::Kill | Action::Usage | Action::Logs(_) => Vec::new(),
        _ => call.read().await?,
    };
    let Call { host, config, spelling, .. } = call;
    let spelling = *spelling;
    let limits = &config.limits;
    match action {
        Action::Get => json::answer(StatusCode::OK, &show::detail(config, host.get(id).await?)),
        Action::Kill => {
            host.kill(id).await?;
            Ok(status(StatusCode::NO_CONTENT))
        }
        Action::SetTimeout => {
            let life = operate::timeout(&body, spelling, limits)?;
            // As E2B answers, and its old clients wait for: they set a time first, and resume a sandbox
            // that is not there to have one.
            if host.get(id).await?.state == Lifecycle::Paused {
                return Err(ApiError::paused_has_no_time(id));
            }
            host.set_timeout(id, life).await?;
            Ok(status(StatusCode::NO_CONTENT))
        }
        Action::Refresh => {
            host.extend(id, operate::refresh(&body)?).await?;
            Ok(status(StatusCode::NO_CONTENT))
        }
        Action::SetNetwork => {
            let policy = network::replaced(host.get(id).await?.network, &body)?;
            host.set_network(id, policy).await?;
            Ok(status(StatusCode::NO_CONTENT))
        }
        Action::Usage => usage::of_one(host, id, query).await,
        Action::Logs(version) => logs::answer(host, id, version, query).await,
        Action::Connect(_) => {
            let wish = operate::connect(&body, spelling, limits)?;
            let (info, was_paused) = match wish.keeps_memory {
                true => host.ensure_running(id, wish.life).await?,
                false => host.ensure_booted(id, wish.life).await?,
            };
            let code = if was_paused { StatusCode::CREATED } else { StatusCode::OK };
            json::answer(code, &show::sandbox(config, info))
        }
        Action::Pause => pause(host, id, operate::pause(&body)?).await,
        Action::Resume => {
            let wish = operate::resume(&body, spelling, limits)?;
            let info = match wish.keeps_memory {
                true => host.resume(id, wish.life, wish.on_timeout).await?,
                false => host.boot(id, wish.life, wish.on_timeout).await?,
            };
            json::answer(StatusCode::CREATED, &show::sandbox(config, info))
        }
        Action::Snapshot => {
            let wish = operate::snapshot(&body, host.tenant())?;
            let info = match wish.keeps_memory {
                true => host.snapshot(id, wish.name).await?,
                false => {
                    agent_answers(host, id).await?;
                    host.snapshot_disk(id, wish.name).await?
                }
            };
            json::answer(StatusCode::CREATED, &show::snapshot(info))
        }
        Action::Rollback => rollback(host, id, operate::rollback(&body)?).await,
        Action::Clone => clone(call, id, operate::clones(&body, spelling, limits)?).await,
        Action::Fork => fork(call, id, operate::forks(&body, spelling, limits)?).await,
    }
}

async fn pause(host: &TenantHost<'_>, id: SandboxId, wish: Pause) -> Answer {
    match (wish.must_be_healthy, wish.keeps_memory) {
        (true, _) => must_answer(host, id, HEALTH_DEADLINE).await?,
        (false, false) => agent_answers(host, id).await?,
        (false, true) => {}
    }
    match wish.keeps_memory {
        true => host.pause(id).await?,
        false => host.pause_to_disk(id).await?,
    }
    Ok(status(StatusCode::NO_CONTENT))
}

/// Makes sure that its agent answers, where it has one: without it the disk would not have what the guest has
/// not written yet.
async fn agent_answers(host: &TenantHost<'_>, id: SandboxId) -> Result<(), ApiError> {
    match host.get(id).await?.envd_version.is_empty() {
        true => Ok(()),
        false => must_answer(host, id, AGENT_DEADLINE).await,
    }
}

async fn must_answer(
    host: &TenantHost<'_>,
    id: SandboxId,
    patience: Duration,
) -> Result<(), ApiError> {
    let answered = time::timeout(patience, host.connect(id, GuestPort::ENVD)).await;
    // A port that is closed is an answer as well. What else is wrong, the operation says better.
    match answered {
        Err(_) | Ok(Err(ConnectError::Unreachable)) => Err(ApiError::guest_unresponsive(id)),
        Ok(_) => Ok(()),
    }
}

async fn rollback(host: &TenantHost<'_>, id: SandboxId, snapshot: String) -> Answer {
    let operation_id = operation_id(host);
    tracing::info!(%id, snapshot, operation_id, "rolling back");
    host.rollback(id, snapshot.clone()).await?;
    let done = RolledBack {
        sandbox_id: id.to_string(),
        snapshot_id: snapshot,
        operation_id,
        status: READY.to_owned(),
    };
    json::answer(StatusCode::OK, &done)
}

/// A name that no other operation of this host has.
fn operation_id(host: &TenantHost<'_>) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("op-{:x}-{}", since.as_nanos(), host.shard().index())
}

async fn clone(call: &Call<'_>, id: SandboxId, wish: Copies) -> Answer {
    let clones = call.host.clone_sandbox(id, wish.count, wish.timeout).await?;
    let shown: Vec<_> = clones.into_iter().map(|info| show::sandbox(call.config, info)).collect();
    json::answer(StatusCode::CREATED, &shown)
}

async fn fork(call: &Call<'_>, id: SandboxId, wish: Copies) -> Answer {
    let forks = call.host.fork(id, wish.count, wish.timeout).await?;
    let result = |outcome| match outcome {
        Ok(info) => ForkResult { sandbox: Some(show::sandbox(call.config, info)), error: None },
        Err(error) => ForkResult { sandbox: None, error: Some(ApiError::from(error).to_body()) },
    };
    let shown: Vec<_> = forks.into_iter().map(result).collect();
    json::answer(StatusCode::CREATED, &shown)
}

/// The id of a path. What E2B calls an id but we never draw is unknown, not invalid.
pub fn sandbox_id(text: &str) -> Result<SandboxId, ApiError> {
    let id = ids::without_client(text);
    if !ids::is_e2b_id(id) {
        return Err(ApiError::invalid_sandbox_id());
    }
    id.parse().map_err(|_| ApiError::no_such_sandbox(&id.chars().take(64).collect::<String>()))
}
