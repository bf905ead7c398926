//! What the host says, as clients read it.
//!
//! Called by the handlers of [`super`]. Refuses to show a sandbox's token anywhere but to who made
//! it or asks for it by its id.

use mica_shards::{Lifecycle, SandboxInfo, SnapshotInfo, TemplateInfo};
use mica_wire::api::{READY, Sandbox, SandboxDetail, SandboxState, Snapshot, Template};

use crate::config::HttpConfig;
use crate::rfc3339;

/// What `clientID` says. Sandbox ids are global, so it means nothing, and SDKs demand it.
const CLIENT_ID: &str = "mica";

/// A sandbox as the answer to what made it run.
pub fn sandbox(config: &HttpConfig, info: SandboxInfo) -> Sandbox {
    Sandbox {
        template_id: info.template_id,
        sandbox_id: info.id.to_string(),
        client_id: CLIENT_ID.to_owned(),
        envd_version: info.envd_version,
        alias: Some(info.template_name.to_string()),
        envd_access_token: info.access_token,
        domain: config.domain.clone(),
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
        end_at: rfc3339::format(info.end_at),
        cpu_count: u32::from(info.vcpus.get()),
        memory_mib: info.memory.count(),
        disk_size_mib: info.disk.count(),
        state: match info.state {
            Lifecycle::Running => SandboxState::Running,
            Lifecycle::Paused => SandboxState::Paused,
        },
        envd_version: info.envd_version,
        metadata: info.metadata,
        envd_access_token: None,
    }
}

/// A sandbox that was asked for by its id.
pub fn detail(mut info: SandboxInfo) -> SandboxDetail {
    let envd_access_token = info.access_token.take();
    SandboxDetail { envd_access_token, ..listed(info) }
}

/// A snapshot.
pub fn snapshot(info: SnapshotInfo) -> Snapshot {
    Snapshot {
        snapshot_id: info.id,
        names: info.name.into_iter().collect(),
        status: READY.to_owned(),
        origin_sandbox_id: info.sandbox.map(|id| id.to_string()),
        created_at: rfc3339::format(info.created_at),
    }
}

/// A template.
pub fn template(info: TemplateInfo) -> Template {
    let created_at = rfc3339::format(info.created_at);
    Template {
        build_id: info.id.clone(),
        template_id: info.id,
        cpu_count: u32::from(info.vcpus.get()),
        memory_mib: info.memory.count(),
        disk_size_mib: info.disk.count(),
        public: true,
        aliases: vec![info.name.to_string()],
        names: vec![info.name.to_string()],
        updated_at: created_at.clone(),
        created_at,
        created_by: None,
        last_spawned_at: info.last_spawned_at.map(rfc3339::format),
        spawn_count: info.spawn_count,
        build_count: 1,
        envd_version: info.envd_version,
        build_status: "ready".to_owned(),
    }
}
