//! What the host says, as clients read it.
//!
//! Called by the handlers of [`super`]. Refuses to show a sandbox's token anywhere but to who made
//! it or asks for it by its id.

use mica_shards::{Lifecycle, OnTimeout, SandboxInfo, SnapshotInfo};
use mica_wire::api::{
    OnTimeoutWish, READY, Sandbox, SandboxDetail, SandboxLifecycle, SandboxPauseMode, SandboxState,
    Snapshot,
};

use super::network;
use crate::config::HttpConfig;
use crate::rfc3339;
use crate::snapshot_name::SnapshotName;

/// What `clientID` says. Sandbox ids are global, so it means nothing, and SDKs demand it.
const CLIENT_ID: &str = "mica";

/// What `endAt` says of a sandbox without an end: E2B's SDKs fail on an entry that lacks it. It is before the
/// last day that Python knows, in whose other time zones it has to be a date as well.
const WITHOUT_END: &str = "9999-12-30T00:00:00.000Z";

/// A sandbox as the answer to what made it run.
pub fn sandbox(config: &HttpConfig, info: SandboxInfo) -> Sandbox {
    Sandbox {
        template_id: info.template_id,
        sandbox_id: info.id.to_string(),
        client_id: CLIENT_ID.to_owned(),
        envd_version: info.envd_version,
        alias: Some(info.template_name.to_string()),
        envd_access_token: info.access_token,
        traffic_access_token: info.traffic_token,
        domain: config.domain.clone(),
    }
}

/// What a sandbox is doing.
pub fn state(state: Lifecycle) -> SandboxState {
    match state {
        Lifecycle::Running => SandboxState::Running,
        Lifecycle::Paused => SandboxState::Paused,
    }
}

/// A sandbox as an entry of a list.
pub fn listed(info: SandboxInfo) -> SandboxDetail {
    SandboxDetail {
        template_id: info.template_id,
        sandbox_id: info.id.to_string(),
        client_id: CLIENT_ID.to_owned(),
        alias: Some(info.template_name.to_string()),
        started_at: rfc3339::format(info.started_at),
        end_at: info.end_at.map_or_else(|| WITHOUT_END.to_owned(), rfc3339::format),
        cpu_count: u32::from(info.vcpus.get()),
        memory_mib: info.memory.count(),
        disk_size_mib: info.disk.count(),
        state: state(info.state),
        envd_version: info.envd_version,
        metadata: info.metadata,
        envd_access_token: None,
        domain: None,
        lifecycle: None,
        pause_mode: None,
        allow_internet_access: None,
        network: None,
    }
}

/// A sandbox that was asked for by its id.
pub fn detail(config: &HttpConfig, mut info: SandboxInfo) -> SandboxDetail {
    let envd_access_token = info.access_token.take();
    let on_timeout = match info.on_timeout {
        OnTimeout::Kill => OnTimeoutWish::Kill,
        OnTimeout::Pause | OnTimeout::PauseToDisk => OnTimeoutWish::Pause,
    };
    let pause_mode = match (info.state, info.disk_alone) {
        (Lifecycle::Running, _) => None,
        (Lifecycle::Paused, true) => Some(SandboxPauseMode::Filesystem),
        (Lifecycle::Paused, false) => Some(SandboxPauseMode::Full),
    };
    SandboxDetail {
        envd_access_token,
        domain: config.domain.clone(),
        lifecycle: Some(SandboxLifecycle { auto_resume: info.auto_resume, on_timeout }),
        pause_mode,
        allow_internet_access: Some(info.network.allow_internet_access),
        network: Some(network::shown(&info.network)),
        ..listed(info)
    }
}

/// A snapshot.
pub fn snapshot(info: SnapshotInfo) -> Snapshot {
    Snapshot {
        names: SnapshotName::of(&info).map(SnapshotName::into_text).into_iter().collect(),
        snapshot_id: info.id,
        status: READY.to_owned(),
        origin_sandbox_id: info.sandbox.map(|id| id.to_string()),
        created_at: rfc3339::format(info.created_at),
    }
}
