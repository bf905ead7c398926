//! The host as one tenant may see it.
//!
//! Called by every handler of [`crate::api`], which gets this instead of the [`Host`]: a handler cannot
//! forget whose a sandbox or a snapshot is, for it has no other way to one. What is another tenant's is
//! answered as what is not there, in the same words. Here is also where a key's limits are kept. Refuses
//! a sandbox to whoever has as many as the key may have.

use std::cell::Cell;
use std::time::Duration;

use mica_shards::{
    ConnectError, CreateRequest, GuestStream, Host, LogLine, MemoKey, NetworkPolicy, OnTimeout,
    Once, OnceName, SandboxInfo, Seat, ShardError, SnapshotInfo, TemplateInfo, Usage,
};
use mica_units::{GuestPort, SandboxId, ShardId, TenantId};
use mica_wire::api::TemplateBuild;

use crate::builds;
use crate::builds::listed::{self, Listed};
use crate::error::ApiError;
use crate::keys::Caller;

/// A host, and whoever asks.
#[derive(Debug)]
pub struct TenantHost<'a> {
    host: &'a Host,
    caller: &'a Caller,
}

impl<'a> TenantHost<'a> {
    /// What this caller may see of the host.
    #[must_use]
    pub fn new(host: &'a Host, caller: &'a Caller) -> Self {
        Self { host, caller }
    }

    /// The shard that this request is on.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        self.host.shard()
    }

    /// The host, once it is clear that this sandbox is the caller's. Ids are never used again, so what
    /// holds now holds for whatever is asked next.
    async fn of(&self, id: SandboxId) -> Result<&Host, ShardError> {
        let owner = self.host.tenant_of(id).await?;
        if owner == self.caller.tenant { Ok(self.host) } else { Err(ShardError::NoSuchSandbox(id)) }
    }

    /// Who asks.
    #[must_use]
    pub fn tenant(&self) -> &TenantId {
        &self.caller.tenant
    }

    /// For builds of templates, whose store has every tenant's and asks itself whose is whose.
    #[must_use]
    pub fn builder(&self) -> (&Host, &TenantId) {
        (self.host, &self.caller.tenant)
    }

    /// Room for so many more sandboxes of this key, or 429.
    fn reserved(&self, count: usize) -> Result<Vec<Seat>, ApiError> {
        let Some(grant) = &self.caller.grant else { return Ok(Vec::new()) };
        let most = grant.limits.sandboxes_max;
        grant.account.reserve(count, most).map_err(|too_many| {
            ApiError::too_many_sandboxes(too_many.live, most.unwrap_or(u32::MAX))
        })
    }

    /// The same, counted against the key's rate too.
    fn seats(&self, count: usize) -> Result<Vec<Seat>, ApiError> {
        let Some(grant) = &self.caller.grant else { return Ok(Vec::new()) };
        let seats = self.reserved(count)?;
        if let Some(rate) = grant.limits.creates_per_second {
            grant.account.spend(count, rate).map_err(|error| ApiError::too_fast(error.wait))?;
        }
        Ok(seats)
    }

    /// [`Host::once`], under a name of this tenant's.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn once(&self, asked: OnceName) -> Result<Once, ShardError> {
        let OnceName { name, digest } = asked;
        let tenant = self.caller.tenant.clone();
        self.host.once(MemoKey { tenant, name }, digest).await
    }

    /// [`Host::create`], for this tenant, and counted for the key.
    ///
    /// # Errors
    /// 429 beyond the key's limits; see [`ShardError`].
    pub async fn create(&self, request: CreateRequest) -> Result<SandboxInfo, ApiError> {
        // A try that fails gives its seat back, so each has one of its own; the rate counts them as one.
        let first = Cell::new(Some(self.seats(1)?.pop()));
        let seat = || match first.take() {
            Some(seat) => Ok(seat),
            None => Ok(self.reserved(1)?.pop()),
        };
        let tenant = self.caller.tenant.clone();
        let request = CreateRequest { tenant, ..request };
        builds::create(self.host, &self.caller.tenant, request, &seat).await
    }

    /// [`Host::clone_sandbox`], counted for the key.
    ///
    /// # Errors
    /// 429 beyond the key's limits; see [`ShardError`].
    pub async fn clone_sandbox(
        &self,
        id: SandboxId,
        count: usize,
        timeout: Option<Duration>,
    ) -> Result<Vec<SandboxInfo>, ApiError> {
        let host = self.of(id).await?;
        Ok(host.clone_counted(id, count, timeout, self.seats(count)?).await?)
    }

    /// [`Host::fork`], counted for the key.
    ///
    /// # Errors
    /// 429 beyond the key's limits; see [`ShardError`].
    pub async fn fork(
        &self,
        id: SandboxId,
        count: usize,
        timeout: Option<Duration>,
    ) -> Result<Vec<Result<SandboxInfo, ShardError>>, ApiError> {
        let host = self.of(id).await?;
        Ok(host.fork_counted(id, count, timeout, self.seats(count)?).await?)
    }

    /// [`Host::get`].
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn get(&self, id: SandboxId) -> Result<SandboxInfo, ShardError> {
        let info = self.host.get(id).await?;
        if info.tenant == self.caller.tenant {
            Ok(info)
        } else {
            Err(ShardError::NoSuchSandbox(id))
        }
    }

    /// [`Host::list`], of this tenant's.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn list(&self) -> Result<Vec<SandboxInfo>, ShardError> {
        let mut all = self.host.list().await?;
        all.retain(|info| info.tenant == self.caller.tenant);
        Ok(all)
    }

    /// [`Host::kill`].
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn kill(&self, id: SandboxId) -> Result<(), ShardError> {
        self.of(id).await?.kill(id).await
    }

    /// [`Host::set_timeout`].
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn set_timeout(&self, id: SandboxId, life: Duration) -> Result<(), ShardError> {
        self.of(id).await?.set_timeout(id, life).await
    }

    /// [`Host::extend`].
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn extend(&self, id: SandboxId, life: Duration) -> Result<(), ShardError> {
        self.of(id).await?.extend(id, life).await
    }

    /// [`Host::set_network`].
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn set_network(
        &self,
        id: SandboxId,
        policy: NetworkPolicy,
    ) -> Result<(), ShardError> {
        self.of(id).await?.set_network(id, policy).await
    }

    /// [`Host::logs`].
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn logs(&self, id: SandboxId) -> Result<Vec<LogLine>, ShardError> {
        self.of(id).await?.logs(id).await
    }

    /// [`Host::usages`].
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn usages(
        &self,
        id: SandboxId,
        newest: Option<Usage>,
    ) -> Result<Vec<Usage>, ShardError> {
        self.of(id).await?.usages(id, newest).await
    }

    /// [`Host::connect`].
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(
        &self,
        id: SandboxId,
        port: GuestPort,
    ) -> Result<GuestStream, ConnectError> {
        match self.of(id).await {
            Ok(host) => host.connect(id, port).await,
            Err(ShardError::Busy) => Err(ConnectError::Busy),
            Err(_) => Err(ConnectError::NoSuchSandbox(id)),
        }
    }

    /// [`Host::pause`].
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn pause(&self, id: SandboxId) -> Result<(), ShardError> {
        self.of(id).await?.pause(id).await
    }

    /// [`Host::pause_to_disk`].
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn pause_to_disk(&self, id: SandboxId) -> Result<(), ShardError> {
        self.of(id).await?.pause_to_disk(id).await
    }

    /// [`Host::resume`].
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn resume(
        &self,
        id: SandboxId,
        life: Option<Duration>,
        on_timeout: Option<OnTimeout>,
    ) -> Result<SandboxInfo, ShardError> {
        self.of(id).await?.resume(id, life, on_timeout).await
    }

    /// [`Host::boot`].
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn boot(
        &self,
        id: SandboxId,
        life: Option<Duration>,
        on_timeout: Option<OnTimeout>,
    ) -> Result<SandboxInfo, ShardError> {
        self.of(id).await?.boot(id, life, on_timeout).await
    }

    /// [`Host::ensure_running`].
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn ensure_running(
        &self,
        id: SandboxId,
        life: Duration,
    ) -> Result<(SandboxInfo, bool), ShardError> {
        self.of(id).await?.ensure_running(id, life).await
    }

    /// [`Host::ensure_booted`].
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn ensure_booted(
        &self,
        id: SandboxId,
        life: Duration,
    ) -> Result<(SandboxInfo, bool), ShardError> {
        self.of(id).await?.ensure_booted(id, life).await
    }

    /// [`Host::snapshot`].
    ///
    /// # Errors
    /// 409 where a template has the name; see [`ShardError`].
    pub async fn snapshot(
        &self,
        id: SandboxId,
        name: Option<String>,
    ) -> Result<SnapshotInfo, ApiError> {
        Ok(self.to_name(id, name.as_deref()).await?.snapshot(id, name).await?)
    }

    /// [`Host::snapshot_disk`].
    ///
    /// # Errors
    /// As [`Self::snapshot`].
    pub async fn snapshot_disk(
        &self,
        id: SandboxId,
        name: Option<String>,
    ) -> Result<SnapshotInfo, ApiError> {
        Ok(self.to_name(id, name.as_deref()).await?.snapshot_disk(id, name).await?)
    }

    /// The host of a sandbox, of which something is to have this name.
    async fn to_name(&self, id: SandboxId, name: Option<&str>) -> Result<&Host, ApiError> {
        let host = self.of(id).await?;
        if let Some(name) = name {
            builds::refuse_templates_name(self.builder(), name).await?;
        }
        Ok(host)
    }

    /// [`Host::rollback`]. The owner's shard sees to it that the snapshot is the same tenant's.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn rollback(&self, id: SandboxId, snapshot: String) -> Result<(), ShardError> {
        self.of(id).await?.rollback(id, snapshot).await
    }

    /// [`Host::snapshots`], of this tenant's.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn snapshots(&self, of: Option<SandboxId>) -> Result<Vec<SnapshotInfo>, ShardError> {
        let mut all = self.host.snapshots(of).await?;
        all.retain(|info| info.tenant.clone().unwrap_or_default() == self.caller.tenant);
        Ok(all)
    }

    /// [`Host::delete_snapshot`], if it is this tenant's.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn delete_snapshot(&self, id: &str) -> Result<bool, ShardError> {
        self.host.delete_snapshot_of(self.caller.tenant.clone(), id).await
    }

    /// [`Host::templates`], which are the operator's and all tenants see, and those that this tenant built.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn templates(&self) -> Result<Vec<Listed>, ApiError> {
        let mut ready = self.host.templates().await?;
        let mut unfinished = Vec::new();
        let mut built = Vec::new();
        for template in listed::all(self.host, &self.caller.tenant).await? {
            match template {
                Listed::Ready(info) => built.push(*info),
                Listed::Unfinished(_) => unfinished.push(template),
            }
        }
        self.host.count_spawns(&mut built).await?;
        ready.append(&mut built);
        let ready = ready.into_iter().map(|info| Listed::Ready(Box::new(info)));
        Ok(ready.chain(unfinished).collect())
    }

    /// The template of this id or name, in any form that a create takes, and its builds; `None` of those: it
    /// is the operator's.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn template(
        &self,
        id: &str,
    ) -> Result<Option<(Listed, Option<Vec<TemplateBuild>>)>, ApiError> {
        let operators = self.host.templates().await?;
        let named = |template: &TemplateInfo| template.id == id || template.name.as_str() == id;
        if let Some(found) = operators.into_iter().find(named) {
            return Ok(Some((Listed::Ready(Box::new(found)), None)));
        }
        let found = listed::find(self.host, &self.caller.tenant, id).await?;
        let Some((mut template, builds)) = found else { return Ok(None) };
        if let Listed::Ready(info) = &mut template {
            self.host.count_spawns(std::slice::from_mut(&mut **info)).await?;
        }
        Ok(Some((template, Some(builds))))
    }
}
