//! Watching directories: one inotify instance for each watcher, which counts against the user who watches.
//!
//! Called by [`super::rpc`]. Refuses more than [`WATCHERS_MAX`] watchers, files, network file systems
//! unless they are asked for, and to leave out an event in silence: a watcher that falls behind ends
//! with an error.
//!
//! ```text
//!  WatchDir ───────────▶ Watch ──▶ stream     a slow client fills the kernel's queue, then it ends
//!  CreateWatcher ──────▶ Watch ──▶ queue ──▶ GetWatcherEvents     bounded in events and bytes
//! ```

mod messages;
mod polled;
mod service;
mod tree;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::statfs;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use self::messages::{EventType, FilesystemEvent, WatchRequest};
use self::tree::{Happened, Tree};
use super::entry::{EntryInfo, Names};
use super::rpc::{for_user, target};
use crate::connect::{Code, ConnectError, Context};
use crate::users::User;

pub use service::add_methods;

/// Most watchers at once, of both kinds.
pub const WATCHERS_MAX: usize = 256;

/// File systems whose events happen elsewhere: NFS, CIFS, SMB, SMB2, FUSE.
const NETWORK_MAGIC: [u32; 5] = [0x6969, 0xff53_4d42, 0x517b, 0xfe53_4d42, 0x6573_5546];

/// A watched directory.
struct Watch {
    user: User,
    ready: AsyncFd<OwnedFd>,
    /// Away while a thread reads it.
    tree: Option<Tree>,
    with_entries: bool,
    /// Who keeps the watcher keeps this.
    place: Option<OwnedSemaphorePermit>,
}

impl Watch {
    async fn open(
        places: &Arc<Semaphore>,
        context: &Context,
        request: &WatchRequest,
    ) -> Result<Self, ConnectError> {
        let place = Arc::clone(places).try_acquire_owned().map_err(|_| {
            ConnectError::new(
                Code::ResourceExhausted,
                format!("{WATCHERS_MAX} watchers are open already; remove one first"),
            )
        })?;
        let user = context.user()?;
        let path = target(context, &request.path)?;
        let (recursive, network) = (request.recursive, request.allow_network_mounts);
        let tree = for_user(&user, move || {
            check(&path, network)?;
            Tree::open(&path, recursive)
        })
        .await?;
        let failed = |error: std::io::Error| ConnectError::io("cannot wait for events", &error);
        // A second descriptor of the same instance: waiting for it needs no thread.
        let waited = tree.descriptor().try_clone_to_owned().map_err(failed)?;
        Ok(Self {
            user,
            ready: wait_for(waited).map_err(failed)?,
            tree: Some(tree),
            // The old client does not know what an event's entry is.
            with_entries: request.include_entry && !context.is_legacy_sdk(),
            place: Some(place),
        })
    }

    /// Waits for the next events. Once this has failed, or was dropped while it waited for a
    /// thread, the watch is over.
    async fn next(&mut self) -> Result<Vec<FilesystemEvent>, ConnectError> {
        loop {
            let failed = |error| ConnectError::io("cannot wait for events", &error);
            let mut guard = self.ready.readable().await.map_err(failed)?;
            let over = || ConnectError::internal("the watcher is over");
            let mut tree = self.tree.take().ok_or_else(over)?;
            let with_entries = self.with_entries;
            let (tree, events, is_drained) = for_user(&self.user, move || {
                let (happened, is_drained) = tree.read()?;
                let events = describe(tree.root(), happened, with_entries);
                Ok((tree, events, is_drained))
            })
            .await?;
            self.tree = Some(tree);
            if is_drained {
                guard.clear_ready();
            }
            if !events.is_empty() {
                return Ok(events);
            }
        }
    }
}

#[expect(
    deprecated,
    reason = "its successor is unsafe, for types that may lie about their descriptor; OwnedFd cannot"
)]
fn wait_for(descriptor: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(descriptor, Interest::READABLE)
}

/// Refuses what cannot be watched.
fn check(path: &Path, allow_network_mounts: bool) -> Result<(), ConnectError> {
    let shown = path.display();
    let found = std::fs::metadata(path)
        .map_err(|error| ConnectError::io(&format!("path {shown} not found"), &error))?;
    if !found.is_dir() {
        return Err(ConnectError::invalid_argument(format!("path {shown} not a directory")));
    }
    let system = statfs(path).map_err(|errno| {
        ConnectError::io(&format!("cannot look at the file system of {shown}"), &errno.into())
    })?;
    if is_network(system.f_type) && !allow_network_mounts {
        return Err(ConnectError::invalid_argument(format!(
            "cannot watch path on network filesystem: {shown}; set allowNetworkMounts to watch it \
             all the same"
        )));
    }
    Ok(())
}

/// By `f_type`. The kernel's magic numbers have 32 bits, whatever the width and the sign of the field.
fn is_network(f_type: i64) -> bool {
    u32::try_from(f_type & 0xffff_ffff).is_ok_and(|magic| NETWORK_MAGIC.contains(&magic))
}

fn describe(root: &Path, happened: Vec<Happened>, with_entries: bool) -> Vec<FilesystemEvent> {
    let mut names = Names::default();
    let mut entry = |happened: &Happened| {
        // Nothing is there any more after the others, or something else.
        let may_be_there =
            matches!(happened.kind, EventType::Create | EventType::Write | EventType::Chmod);
        if !with_entries || !may_be_there {
            return None;
        }
        let at = if happened.path == Path::new(".") {
            root.to_owned()
        } else {
            root.join(&happened.path)
        };
        // It may have gone since.
        EntryInfo::look(&at, &at, &mut names).ok().map(Box::new)
    };
    let event = |happened: Happened| FilesystemEvent {
        entry: entry(&happened),
        name: happened.path.to_string_lossy().into_owned(),
        kind: happened.kind.into(),
    };
    happened.into_iter().map(event).collect()
}

/// As how many of these requests the bytes can be read.
pub(super) fn decodes(codec: crate::connect::Codec, data: &[u8]) -> usize {
    use crate::untrusted::decodes;
    decodes::<WatchRequest>(codec, data) + decodes::<messages::WatcherId>(codec, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_file_systems_are_known_by_their_numbers() {
        for magic in [0x6969, 0xff53_4d42, -0x00ac_b2be, 0x6573_5546] {
            assert!(is_network(magic), "{magic:x}");
        }
        // ext4, tmpfs, overlayfs.
        for magic in [0xef53, 0x0102_1994, 0x794c_7630] {
            assert!(!is_network(magic), "{magic:x}");
        }
    }
}
