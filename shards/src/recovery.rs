//! What an earlier daemon left: sandboxes to take over, and rubbish to remove.
//!
//! Called by `run` before any shard starts, with the store and the control groups locked. A sandbox is
//! what its record says. Refuses to keep anything without a record, and to trust a process number: it
//! must be in the recorded control group, and have been started when the record says.
//!
//! | record | process lives | what becomes of it |
//! |---|---|---|
//! | running | yes | taken over |
//! | running | no | gone with its process: removed |
//! | paused in a snapshot | yes | paused, with its process |
//! | paused in a snapshot | no | paused, on disk |
//! | paused with its disk alone | | paused, on disk; the process was about to be ended |
//! | rolling back to one | | its disk may be there already: resumed from that snapshot |

use std::collections::{BTreeMap, BTreeSet};

use mica_storage::{SnapshotKind, StorageError, Store};
use mica_units::SandboxId;
use rustix::process::Pid;

use crate::BUILD_TENANT;
use crate::cgroup::{CgroupError, Cgroups};
use crate::sandbox::{Record, RecordedState, chain};
use crate::shell::start_ticks;

/// A sandbox to be taken over.
#[derive(Debug)]
pub(crate) struct Survivor {
    /// Its name.
    pub(crate) id: SandboxId,
    /// What its daemon wrote down.
    pub(crate) record: Record,
    /// Whether its process lives.
    pub(crate) alive: bool,
}

/// Why the leftovers cannot be put in order.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecoveryError {
    /// The store.
    #[error("the store could not be put in order")]
    Store(#[from] StorageError),
    /// The control groups.
    #[error("the control groups could not be put in order")]
    Cgroup(#[from] CgroupError),
}

/// Finds who survives, and removes the rest.
pub(crate) fn recover(store: &Store, cgroups: &Cgroups) -> Result<Vec<Survivor>, RecoveryError> {
    let groups: BTreeMap<SandboxId, Vec<u32>> = cgroups.children()?.into_iter().collect();
    let mut survivors = Vec::new();
    let mut unreadable = BTreeSet::new();
    for (id, bytes) in store.records()? {
        match Record::decode(&bytes) {
            Ok(record) => {
                let alive = is_alive(&record, &groups);
                // The build it was made for ended with its daemon.
                let builds = record.tenant == BUILD_TENANT;
                if !builds && survives(store, id, &record, alive) {
                    survivors.push(Survivor { id, record, alive });
                } else {
                    tracing::info!(%id, "this sandbox ended with its VM process or its host");
                }
            }
            Err(error) => {
                tracing::error!(%id, error = chain(&error), "the record of a sandbox cannot be read");
                unreadable.insert(id);
            }
        }
    }
    // What goes back to a snapshot starts in a new process, and what has its disk alone, too.
    for survivor in &mut survivors {
        use RecordedState::{OnDisk, RollingBack};
        survivor.alive &= !matches!(survivor.record.state, RollingBack { .. } | OnDisk { .. });
    }
    let kept: BTreeSet<&str> = survivors
        .iter()
        .filter(|survivor| survivor.alive)
        .filter_map(|survivor| Some(survivor.record.process.as_ref()?.name.as_str()))
        .collect();
    let rubbish: Vec<SandboxId> =
        groups.keys().filter(|name| !kept.contains(name.as_str())).copied().collect();
    cgroups.sweep(&rubbish)?;
    let named = store.builds().recover()?;
    let (snapshots, paused) = remove_passing(store, &survivors, &unreadable, named.as_ref())?;
    let ids = survivors.iter().map(|survivor| survivor.id).chain(paused).collect();
    let removed = store.sweep_sandboxes_but(&ids)?;
    if !rubbish.is_empty() || removed + snapshots > 0 {
        let killed = rubbish.len();
        tracing::info!(killed, removed, snapshots, "removed what an earlier run left");
    }
    if !survivors.is_empty() {
        tracing::info!(sandboxes = survivors.len(), "taking over from an earlier run");
    }
    Ok(survivors)
}

fn is_alive(record: &Record, groups: &BTreeMap<SandboxId, Vec<u32>>) -> bool {
    let Some(process) = &record.process else { return false };
    let group = process.name.parse().ok().and_then(|name: SandboxId| groups.get(&name));
    let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
    group.is_some_and(|pids| pids.contains(&process.pid))
        && pid.is_some_and(|pid| start_ticks(pid).ok() == Some(process.start_ticks))
}

fn survives(store: &Store, id: SandboxId, record: &Record, alive: bool) -> bool {
    match &record.state {
        RecordedState::Running => alive,
        RecordedState::Paused { snapshot }
        | RecordedState::OnDisk { snapshot }
        | RecordedState::RollingBack { snapshot } => {
            match store.find_snapshot(snapshot) {
                Ok(found) => found.is_some(),
                // Not a reason to run nothing at all, nor to delete what somebody may mend.
                Err(error) => {
                    let error = chain(&error);
                    tracing::error!(%id, snapshot, error, "a sandbox waits in a damaged snapshot");
                    true
                }
            }
        }
    }
}

/// Removes snapshots of pauses that no sandbox waits in: never acknowledged, or resumed since; what
/// copies were started from; and what was built for templates that do not name it. How many, and whose could not be told, because their record is unreadable:
/// a client's data is not removed for that.
fn remove_passing(
    store: &Store,
    survivors: &[Survivor],
    unreadable: &BTreeSet<SandboxId>,
    named: Option<&BTreeSet<String>>,
) -> Result<(usize, BTreeSet<SandboxId>), StorageError> {
    let waited_in = |survivor: &Survivor| match &survivor.record.state {
        RecordedState::Paused { snapshot } | RecordedState::OnDisk { snapshot } => {
            Some(snapshot.clone())
        }
        _ => None,
    };
    let used: BTreeSet<String> = survivors.iter().filter_map(waited_in).collect();
    let passing = store.select_snapshots(|manifest| {
        let unused = match manifest.kind {
            SnapshotKind::Pause | SnapshotKind::Copies => !used.contains(&manifest.id),
            SnapshotKind::Built => named.is_some_and(|named| !named.contains(&manifest.id)),
            SnapshotKind::Template | SnapshotKind::Snapshot => false,
        };
        unused.then(|| (manifest.id.clone(), manifest.kind, manifest.sandbox))
    })?;
    let (mut removed, mut paused) = (0, BTreeSet::new());
    for (snapshot, kind, sandbox) in passing {
        // The copies are there, or nobody has heard of them.
        let may_wait = kind == SnapshotKind::Pause;
        if let Some(id) = sandbox.filter(|id| may_wait && unreadable.contains(id)) {
            tracing::error!(%id, snapshot, "what may be a paused sandbox is kept on disk");
            paused.insert(id);
            continue;
        }
        store.delete_snapshot(&snapshot)?;
        removed += 1;
    }
    Ok((removed, paused))
}
