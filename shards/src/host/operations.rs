//! What callers may do with a sandbox beyond making, showing and ending it; snapshots and templates.
//!
//! Called by `http` through [`Host`]. Routes to the owner like the rest. Refuses to leave half of a
//! clone: all sandboxes of one come up, or none stays.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use mica_numa::rt;
use mica_storage::{LayerId, SnapshotKind, SnapshotManifest, StorageError, Template};
use mica_units::{Mebibytes, SandboxId};

use super::{Host, out_of_form};
use crate::event::{IfRunning, Operation, Reply, Spawned};
use crate::{CreateRequest, HostCounters, SandboxInfo, ShardError, SnapshotInfo, TemplateInfo};

/// Most sandboxes of one clone or fork.
pub const CLONES_MAX: usize = 1000;

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
        match self.ask(self.owner(id), Operation::Snapshot(id, name)).await? {
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
        self.ask_done(id, Operation::Pause(id)).await
    }

    /// Lets a paused sandbox go on, for `life` from now.
    ///
    /// # Errors
    /// [`ShardError::AlreadyRunning`] for one that runs; see [`ShardError`].
    pub async fn resume(&self, id: SandboxId, life: Duration) -> Result<SandboxInfo, ShardError> {
        Ok(self.ask_resume(id, life, IfRunning::Refuse).await?.0)
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
        self.ask_resume(id, life, IfRunning::Extend).await
    }

    async fn ask_resume(
        &self,
        id: SandboxId,
        life: Duration,
        if_running: IfRunning,
    ) -> Result<(SandboxInfo, bool), ShardError> {
        match self.ask(self.owner(id), Operation::Resume(id, life, if_running)).await? {
            Reply::Resumed(result) => result.map(|(info, was_paused)| (*info, was_paused)),
            other => Err(out_of_form(&other)),
        }
    }

    /// Makes `count` sandboxes that start where this one is now, and which goes on: all or none.
    /// `timeout` is theirs; otherwise they live as long as this one was made for.
    ///
    /// # Errors
    /// See [`ShardError`]. No sandbox of it is left then.
    pub async fn clone_sandbox(
        &self,
        id: SandboxId,
        count: usize,
        timeout: Option<Duration>,
    ) -> Result<Vec<SandboxInfo>, ShardError> {
        let (made, mut failures) = split(self.fork(id, count, timeout).await?);
        let Some(failure) = failures.pop() else { return Ok(made) };
        for clone in made {
            match self.kill(clone.id).await {
                Ok(()) | Err(ShardError::NoSuchSandbox(_)) => {}
                Err(error) => tracing::warn!(id = %clone.id, %error, "a clone is left behind"),
            }
        }
        Err(failure)
    }

    /// The same, but each of them may fail for itself.
    ///
    /// # Errors
    /// When none could be tried: see [`ShardError`].
    pub async fn fork(
        &self,
        id: SandboxId,
        count: usize,
        timeout: Option<Duration>,
    ) -> Result<Vec<Result<SandboxInfo, ShardError>>, ShardError> {
        let mut request = match self.ask(self.owner(id), Operation::RequestOf(id)).await? {
            Reply::Request(result) => *result?,
            other => return Err(out_of_form(&other)),
        };
        let snapshot = self.snapshot(id, None).await?.id;
        request.template.clone_from(&snapshot);
        request.timeout = timeout.unwrap_or(request.timeout);
        let made = self.create_all(count.min(CLONES_MAX), &request).await;
        // The clones hold the layers by links of their own.
        if let Err(error) = self.delete_snapshot(&snapshot).await {
            tracing::warn!(snapshot, %error, "the snapshot of a clone is left behind");
        }
        Ok(made)
    }

    /// Starts all at once; each shard takes what it is given.
    async fn create_all(
        &self,
        count: usize,
        request: &CreateRequest,
    ) -> Vec<Result<SandboxInfo, ShardError>> {
        let start = |_| {
            let (host, request) = (self.clone(), request.clone());
            rt::spawn(async move { host.create(request).await })
        };
        let started: Vec<_> = (0..count).map(start).collect();
        let mut made = Vec::with_capacity(count);
        for task in started {
            made.push(task.join().await.unwrap_or(Err(ShardError::ShuttingDown)));
        }
        made
    }

    /// Every snapshot that clients made, of one sandbox or of all; newest first.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn snapshots(&self, of: Option<SandboxId>) -> Result<Vec<SnapshotInfo>, ShardError> {
        let store = self.0.shard.workshop.store.clone();
        let listed = rt::blocking(move || store.snapshots()).await;
        let listed = listed.map_err(|_| ShardError::Busy)?.map_err(storage("listing snapshots"))?;
        let mut infos: Vec<SnapshotInfo> = listed
            .iter()
            .map(|snapshot| snapshot.manifest())
            .filter(|manifest| manifest.kind == SnapshotKind::Snapshot)
            .filter(|manifest| of.is_none() || manifest.sandbox == of)
            .map(snapshot_info)
            .collect();
        infos.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        Ok(infos)
    }

    /// Deletes a snapshot of a client's. Sandboxes made from it go on, and so do later snapshots.
    /// Whether there was one.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn delete_snapshot(&self, id: &str) -> Result<bool, ShardError> {
        let (store, id) = (self.0.shard.workshop.store.clone(), id.to_owned());
        let delete = move || match store.find_snapshot(&id)? {
            Some(snapshot) if snapshot.manifest().kind == SnapshotKind::Snapshot => {
                store.delete_snapshot(&snapshot.manifest().id)
            }
            _ => Ok(false),
        };
        let deleted = rt::blocking(delete).await.map_err(|_| ShardError::Busy)?;
        deleted.map_err(storage("deleting a snapshot"))
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
        Ok(sum)
    }

    /// This node's copy of a snapshot's base layer in memory; none where it does not fit.
    pub(crate) async fn replica(&self, snapshot: String, layer: LayerId) -> Option<OwnedFd> {
        let librarian = self.0.shard.librarian;
        match self.ask(librarian, Operation::Replica(snapshot, layer)).await {
            Ok(Reply::Replica(copy)) => copy,
            Ok(other) => {
                tracing::error!(?other, "a shard answered out of form");
                None
            }
            Err(error) => {
                tracing::debug!(%error, "no copy of a base layer");
                None
            }
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
        let mut spawns: BTreeMap<String, Spawned> = BTreeMap::new();
        for reply in self.ask_all(|| Operation::Spawns).await? {
            let Reply::Spawns(some) = reply else { return Err(out_of_form(&reply)) };
            for (template_id, new) in some {
                let sum = spawns.entry(template_id).or_insert(Spawned { count: 0, ..new });
                *sum = Spawned { count: sum.count + new.count, last: sum.last.max(new.last) };
            }
        }
        Ok(templates.iter().map(|template| template_info(template, &spawns)).collect())
    }
}

fn split(results: Vec<Result<SandboxInfo, ShardError>>) -> (Vec<SandboxInfo>, Vec<ShardError>) {
    let (mut made, mut failures) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(info) => made.push(info),
            Err(error) => failures.push(error),
        }
    }
    (made, failures)
}

fn storage(operation: &'static str) -> impl Fn(StorageError) -> ShardError {
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
        created_at: UNIX_EPOCH + Duration::from_millis(manifest.created_unix_ms),
    }
}

fn template_info(template: &Template, spawns: &BTreeMap<String, Spawned>) -> TemplateInfo {
    let manifest = template.manifest();
    let spawned = spawns.get(&manifest.id);
    TemplateInfo {
        id: manifest.id.clone(),
        name: manifest.name.clone(),
        vcpus: manifest.vcpus,
        memory: manifest.memory,
        disk: Mebibytes::covering_bytes(manifest.disk_bytes()).unwrap_or(Mebibytes::new(0)),
        envd_version: manifest.envd_version.clone(),
        created_at: UNIX_EPOCH + Duration::from_millis(manifest.created_unix_ms),
        spawn_count: spawned.map_or(0, |spawned| spawned.count),
        last_spawned_at: spawned.map(|spawned| spawned.last),
    }
}
