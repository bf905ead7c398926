//! Telling cheaply that a name or an id still stands for what it stood for.
//!
//! Called by shards before each create, on the shard itself: only inodes that are held open are looked at,
//! so nothing waits for a device. Refuses to be sure where the clock of the file system is too coarse to
//! tell: what changed a moment before it was looked at may have changed again.

use std::fs::File;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags, Stat};

use crate::error::{Result, StorageError};
use crate::id::is_id;
use crate::store::Store;
use crate::template::MANIFEST_FILE;

/// Longest time between two ticks of a file system's clock, and some.
const TICK: Duration = Duration::from_millis(20);

/// What was looked at, and when.
#[derive(Debug)]
pub struct Stamp {
    directories: Vec<Directory>,
}

#[derive(Debug)]
struct Directory {
    held: File,
    seen: Times,
}

/// Both times of a directory that a change of its entries or its name moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Times {
    modified: (i64, u64),
    changed: (i64, u64),
}

impl Times {
    /// `None` for a directory that was removed.
    fn of(stat: &Stat) -> Option<Self> {
        let modified = (stat.st_mtime, stat.st_mtime_nsec);
        let changed = (stat.st_ctime, stat.st_ctime_nsec);
        (stat.st_nlink > 0).then_some(Self { modified, changed })
    }

    /// Whether a later change is bound to show.
    fn is_settled(self, now: SystemTime) -> bool {
        let (seconds, nanoseconds) = self.changed.max(self.modified);
        let Ok(seconds) = u64::try_from(seconds) else { return false };
        let last = UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_nanos(nanoseconds);
        now.duration_since(last).is_ok_and(|since| since > TICK)
    }
}

impl Stamp {
    /// Whether nothing has changed since. `false` when that cannot be told.
    #[must_use]
    pub fn holds(&self) -> bool {
        let same = |directory: &Directory| {
            let now = rustix::fs::fstat(&directory.held).ok();
            now.and_then(|stat| Times::of(&stat)) == Some(directory.seen)
        };
        self.directories.iter().all(same)
    }
}

impl Store {
    /// A stamp of what this stands for now: taken before it is looked up, it holds as long as looking up
    /// again gives the same. `None` when there is nothing, or it changed just now.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn stamp(&self, id_or_template: &str) -> Result<Option<Stamp>> {
        let now = SystemTime::now();
        let by_id = self.snapshots_dir().join(id_or_template);
        let mut directories = Vec::new();
        let target = if is_id(id_or_template) && by_id.join(MANIFEST_FILE).exists() {
            by_id
        } else {
            let Ok(name) = id_or_template.parse() else { return Ok(None) };
            directories.push(self.names_dir());
            let Some(id) = self.target_of(&name)? else { return Ok(None) };
            self.snapshots_dir().join(id)
        };
        directories.push(target);
        let mut stamp = Stamp { directories: Vec::new() };
        for path in directories {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let held = match rustix::fs::open(&path, flags, Mode::empty()) {
                Ok(held) => File::from(held),
                Err(rustix::io::Errno::NOENT) => return Ok(None),
                Err(errno) => return Err(StorageError::io("open", &path, errno.into())),
            };
            let stat = rustix::fs::fstat(&held)
                .map_err(|errno| StorageError::io("look at", &path, errno.into()))?;
            match Times::of(&stat).filter(|seen| seen.is_settled(now)) {
                Some(seen) => stamp.directories.push(Directory { held, seen }),
                None => return Ok(None),
            }
        }
        Ok(Some(stamp))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tests::{base, image};
    use crate::testing::{TempDir, put};

    const ID: &str = "aaaaaaaaaaaaaaaaaaaa";

    /// A stamp, once what it is of has not been touched for a tick.
    fn settled(store: &Store, of: &str) -> Stamp {
        loop {
            if let Some(stamp) = store.stamp(of).unwrap() {
                return stamp;
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_stamp_holds_until_its_snapshot_changes_or_goes() {
        let dir = TempDir::new();
        let store = Store::open(dir.path()).unwrap();
        let snapshot = base(&store, ID, &image(1), None);
        assert!(store.stamp(ID).unwrap().is_none(), "made just now");
        let stamp = settled(&store, ID);
        base(&store, "bbbbbbbbbbbbbbbbbbbb", &image(2), None);
        assert!(stamp.holds(), "another one is nothing to it");
        // As a flattening does.
        std::fs::write(snapshot.dir().join("manifest.new"), "").unwrap();
        assert!(!stamp.holds());
        std::fs::remove_file(snapshot.dir().join("manifest.new")).unwrap();
        let stamp = settled(&store, ID);
        assert!(store.delete_snapshot(ID).unwrap());
        assert!(!stamp.holds());
        assert!(store.stamp(ID).unwrap().is_none());
        assert!(store.stamp("nobody").unwrap().is_none());
        assert!(store.stamp("no/name").unwrap().is_none());
    }

    #[test]
    fn a_name_that_comes_to_mean_another_template_shows() {
        let dir = TempDir::new();
        let store = Store::open(dir.path()).unwrap();
        let template = put(&store, "base", 1, false).unwrap();
        base(&store, &template.manifest().id, &image(1), None);
        let (by_name, by_id) = (settled(&store, "base"), settled(&store, &template.manifest().id));
        assert!(by_name.holds() && by_id.holds());
        put(&store, "other", 2, false).unwrap();
        assert!(!by_name.holds(), "that cannot be told from a change of its own");
        assert!(by_id.holds());
    }
}
