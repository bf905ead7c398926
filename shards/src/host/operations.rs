//! What callers may do with a sandbox beyond making, showing and ending it; snapshots and templates.
//!
//! Called by `http` through [`Host`]. Routes to the owner like the rest. Refuses to delete what is no
//! snapshot of a client's.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use mica_numa::rt;
use mica_storage::{LayerId, SnapshotKind, SnapshotManifest, StorageError, Template};
use mica_units::{Mebibytes, SandboxId, TenantId};

use super::{Host, out_of_form};
use crate::event::{IfRunning, Keeps, Operation, Purpose, Reply, Wake};
use crate::replicas::NoCopy;
use crate::{
    HostCounters, LogLine, OnTimeout, SandboxInfo, ShardError, SnapshotInfo, TemplateInfo, Usage,
    WrongNode,
};

impl Host {
    /// Makes a snapshot of a running sandbox, which goes on. Durable when this returns.
    ///
    /// # Errors
    /// See [`ShardError`]. The sandbox goes on as it was.
    pub async fn snapshot(
        &self,
        id: SandboxId,
        name: Option<String>,
    ) -> Result<SnapshotInfo, ShardError> {
        self.snapshot_for(id, Purpose::Client(name), Keeps::All).await
    }

    /// The same of its disk alone: its agent is told to write to it what is to stay, and what is made from
    /// it boots.
    ///
    /// # Errors
    /// [`ShardError::CannotBoot`] where nothing could boot from it; see [`ShardError`].
    pub async fn snapshot_disk(
        &self,
        id: SandboxId,
        name: Option<String>,
    ) -> Result<SnapshotInfo, ShardError> {
        self.snapshot_for(id, Purpose::Client(name), Keeps::Disk).await
    }

    pub(super) async fn snapshot_for(
        &self,
        id: SandboxId,
        purpose: Purpose,
        keeps: Keeps,
    ) -> Result<SnapshotInfo, ShardError> {
        match self.ask(self.owner(id), Operation::Snapshot(id, purpose, keeps)).await? {
            Reply::Snapshot(result) => result.map(|info| *info),
            other => Err(out_of_form(&other)),
        }
    }

    /// Puts a running sandbox back to one of its own snapshots, in place.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn rollback(&self, id: SandboxId, snapshot: String) -> Result<(), ShardError> {
        self.ask_done(id, Operation::Rollback(id, snapshot)).await
    }

    /// Pauses a sandbox. When this returns it is on disk, and shows as paused.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn pause(&self, id: SandboxId) -> Result<(), ShardError> {
        self.ask_done(id, Operation::Pause(id, Keeps::All)).await
    }

    /// The same, keeping the disk alone: its agent is told to write to it what is to stay, and when it goes
    /// on it boots.
    ///
    /// # Errors
    /// [`ShardError::CannotBoot`] where it could not boot then; see [`ShardError`].
    pub async fn pause_to_disk(&self, id: SandboxId) -> Result<(), ShardError> {
        self.ask_done(id, Operation::Pause(id, Keeps::Disk)).await
    }

    /// Lets a paused sandbox go on, for `life` from now; without one for as long as its create asked
    /// for, and 15 seconds at the least. `on_timeout` replaces what was wished for the end of its time.
    ///
    /// # Errors
    /// [`ShardError::AlreadyRunning`] for one that runs; see [`ShardError`].
    pub async fn resume(
        &self,
        id: SandboxId,
        life: impl Into<Option<Duration>>,
        on_timeout: Option<OnTimeout>,
    ) -> Result<SandboxInfo, ShardError> {
        let (life, if_running) = (life.into(), IfRunning::Refuse);
        let wake = Wake { life, on_timeout, if_running, from: Keeps::All, size: None };
        Ok(self.wake(id, wake).await?.0)
    }

    /// The same from its disk alone: it boots, and what its memory was is dropped.
    ///
    /// # Errors
    /// [`ShardError::CannotBoot`] where nothing is left to boot from; see [`Self::resume`].
    pub async fn boot(
        &self,
        id: SandboxId,
        life: impl Into<Option<Duration>>,
        on_timeout: Option<OnTimeout>,
    ) -> Result<SandboxInfo, ShardError> {
        let (life, if_running) = (life.into(), IfRunning::Refuse);
        let wake = Wake { life, on_timeout, if_running, from: Keeps::Disk, size: None };
        Ok(self.wake(id, wake).await?.0)
    }

    /// Makes sure that a sandbox runs, for at least `life` from now. Whether it was paused.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn ensure_running(
        &self,
        id: SandboxId,
        life: Duration,
    ) -> Result<(SandboxInfo, bool), ShardError> {
        let (life, if_running) = (Some(life), IfRunning::Extend);
        let wake = Wake { life, on_timeout: None, if_running, from: Keeps::All, size: None };
        self.wake(id, wake).await
    }

    /// The same; a paused one boots from its disk alone.
    ///
    /// # Errors
    /// As [`Self::boot`].
    pub async fn ensure_booted(
        &self,
        id: SandboxId,
        life: Duration,
    ) -> Result<(SandboxInfo, bool), ShardError> {
        let (life, if_running) = (Some(life), IfRunning::Extend);
        let wake = Wake { life, on_timeout: None, if_running, from: Keeps::Disk, size: None };
        self.wake(id, wake).await
    }

    pub(super) async fn wake(
        &self,
        id: SandboxId,
        wake: Wake,
    ) -> Result<(SandboxInfo, bool), ShardError> {
        match self.ask(self.owner(id), Operation::Resume(id, wake)).await? {
            Reply::Resumed(result) => result.map(|(info, was_paused)| (*info, was_paused)),
            other => Err(out_of_form(&other)),
        }
    }

    /// Makes a sandbox's remaining life at least `life` from now.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn extend(&self, id: SandboxId, life: Duration) -> Result<(), ShardError> {
        self.ask_done(id, Operation::Extend(id, life)).await
    }

    /// What was written about a sandbox, oldest first.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn logs(&self, id: SandboxId) -> Result<Vec<LogLine>, ShardError> {
        match self.ask(self.owner(id), Operation::Logs(id)).await? {
            Reply::Logs(result) => result,
            other => Err(out_of_form(&other)),
        }
    }

    /// Keeps what a sandbox uses now, if that is said. What is kept of it then, oldest first.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn usages(
        &self,
        id: SandboxId,
        now: Option<Usage>,
    ) -> Result<Vec<Usage>, ShardError> {
        match self.ask(self.owner(id), Operation::Usage(id, now)).await? {
            Reply::Usages(result) => result,
            other => Err(out_of_form(&other)),
        }
    }

    /// Every snapshot that clients made, of one sandbox or of all; newest first.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn snapshots(&self, of: Option<SandboxId>) -> Result<Vec<SnapshotInfo>, ShardError> {
        let store = self.0.shard.workshop.store.clone();
        let list = move || {
            store.select_snapshots(|manifest| {
                let wanted = manifest.kind == SnapshotKind::Snapshot
                    && (of.is_none() || manifest.sandbox == of);
                wanted.then(|| snapshot_info(manifest))
            })
        };
        let listed = rt::blocking(list).await.map_err(|_| ShardError::Busy)?;
        let mut infos = listed.map_err(storage("listing snapshots"))?;
        infos.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        Ok(infos)
    }

    /// Deletes a snapshot of a client's. Sandboxes made from it go on, and so do later snapshots.
    /// Whether there was one.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn delete_snapshot(&self, id: &str) -> Result<bool, ShardError> {
        self.delete_if(id, |manifest| manifest.kind == SnapshotKind::Snapshot).await
    }

    /// The same if it is this tenant's: another's is as good as none.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn delete_snapshot_of(&self, tenant: TenantId, id: &str) -> Result<bool, ShardError> {
        let is_own = move |manifest: &SnapshotManifest| {
            let owner = manifest.tenant.clone().unwrap_or_default();
            manifest.kind == SnapshotKind::Snapshot && owner == tenant
        };
        self.delete_if(id, is_own).await
    }

    pub(super) async fn delete_if(
        &self,
        id: &str,
        wanted: impl Fn(&SnapshotManifest) -> bool + Send + 'static,
    ) -> Result<bool, ShardError> {
        let (store, asked) = (self.0.shard.workshop.store.clone(), id.to_owned());
        let delete = move || match store.find_snapshot(&asked)? {
            Some(snapshot) if wanted(snapshot.manifest()) => {
                store.delete_snapshot(&snapshot.manifest().id)
            }
            _ => Ok(false),
        };
        let deleted = rt::blocking(delete).await.map_err(|_| ShardError::Busy)?;
        let deleted = deleted.map_err(storage("deleting a snapshot"))?;
        if deleted && let Err(error) = self.ask_all(|| Operation::Forget(id.to_owned())).await {
            tracing::warn!(id, %error, "a deleted snapshot takes room until its shards let it go");
        }
        Ok(deleted)
    }

    /// Numbers of the whole host.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn counters(&self) -> Result<HostCounters, ShardError> {
        let mut sum = HostCounters::default();
        for reply in self.ask_all(|| Operation::Counts).await? {
            let Reply::Counts(counts) = reply else { return Err(out_of_form(&reply)) };
            sum.pool_hits += counts.pool.hits;
            sum.pool_misses += counts.pool.misses;
            sum.shells += counts.shells as u64;
            sum.sandboxes += counts.sandboxes as u64;
        }
        sum.disk_copies = self.0.shard.workshop.store.disk_copies();
        Ok(sum)
    }

    /// What of a sandbox is on the wrong node. The kernel walks the page tables of its process for that.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn wrong_node(&self, id: SandboxId) -> Result<WrongNode, ShardError> {
        match self.ask(self.owner(id), Operation::WrongNode(id)).await? {
            Reply::WrongNode(result) => result,
            other => Err(out_of_form(&other)),
        }
    }

    /// This node's copy of a snapshot's base layer in memory, when it is there; none where it does not
    /// fit. The outer error is one of the way to who keeps it, the inner one says why it was not made.
    pub(crate) async fn replica(
        &self,
        snapshot: String,
        layer: LayerId,
    ) -> Result<Result<Option<OwnedFd>, NoCopy>, ShardError> {
        let librarian = self.0.shard.librarian;
        match self.ask(librarian, Operation::Replica(snapshot, layer)).await? {
            Reply::Replica(copy) => Ok(copy),
            other => Err(out_of_form(&other)),
        }
    }

    /// Every template, with what this host made of it.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn templates(&self) -> Result<Vec<TemplateInfo>, ShardError> {
        let store = self.0.shard.workshop.store.clone();
        let listed = rt::blocking(move || store.templates()).await;
        let templates =
            listed.map_err(|_| ShardError::Busy)?.map_err(storage("listing templates"))?;
        let mut templates: Vec<_> = templates.iter().map(template_info).collect();
        self.count_spawns(&mut templates).await?;
        Ok(templates)
    }

    /// Says of templates what this host made of each, by its id.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn count_spawns(&self, templates: &mut [TemplateInfo]) -> Result<(), ShardError> {
        if templates.is_empty() {
            return Ok(());
        }
        for reply in self.ask_all(|| Operation::Spawns).await? {
            let Reply::Spawns(some) = reply else { return Err(out_of_form(&reply)) };
            for template in &mut *templates {
                let Some(spawned) = some.get(&template.id) else { continue };
                template.spawn_count += spawned.count;
                template.last_spawned_at = template.last_spawned_at.max(Some(spawned.last));
            }
        }
        Ok(())
    }
}

pub(super) fn storage(operation: &'static str) -> impl Fn(StorageError) -> ShardError {
    move |error| match error {
        StorageError::NoSpace { .. } => ShardError::NoSpace,
        error => ShardError::Storage { operation, source: Arc::new(error) },
    }
}

pub(crate) fn snapshot_info(manifest: &SnapshotManifest) -> SnapshotInfo {
    SnapshotInfo {
        id: manifest.id.clone(),
        name: manifest.name.clone(),
        sandbox: manifest.sandbox,
        template_id: manifest.template_id.clone(),
        tenant: manifest.tenant.clone(),
        created_at: UNIX_EPOCH + Duration::from_millis(manifest.created_unix_ms),
    }
}

fn template_info(template: &Template) -> TemplateInfo {
    let manifest = template.manifest();
    TemplateInfo {
        id: manifest.id.clone(),
        name: manifest.name.clone(),
        vcpus: manifest.vcpus,
        memory: manifest.memory,
        disk: Mebibytes::covering_bytes(manifest.disk_bytes()).unwrap_or(Mebibytes::new(0)),
        envd_version: manifest.envd_version.clone(),
        created_at: UNIX_EPOCH + Duration::from_millis(manifest.created_unix_ms),
        spawn_count: 0,
        last_spawned_at: None,
        build_count: 1,
        public: true,
        build_id: None,
    }
}
