//! What the filesystem service does, as plain functions on paths.
//!
//! Called by [`super::rpc`] on a thread of `identity`, which makes what is made the user's. Refuses a
//! listing of more than [`LISTED_MAX`] entries.

use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, OFlags};

use super::entry::{EntryInfo, Names};
use super::upload::{Upload, temporary_name};
use crate::connect::{Code, ConnectError};

/// Most entries of one listing.
pub const LISTED_MAX: usize = 100_000;

/// Deepest listing; also bounds the walk through a tree that grows under it.
const DEPTH_MAX: usize = 1_000;

type Outcome<T> = Result<T, ConnectError>;

/// One entry, links not followed.
pub fn stat(path: &Path) -> Outcome<EntryInfo> {
    EntryInfo::look(path, path, &mut Names::default())
        .map_err(|error| ConnectError::io(&format!("cannot look at '{}'", path.display()), &error))
}

/// Makes a directory and its parents; they belong to the user, whose name the thread has.
pub fn make_dir(path: &Path) -> Outcome<EntryInfo> {
    let shown = path.display();
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => {
            return Err(ConnectError::new(
                Code::AlreadyExists,
                format!("directory already exists: {shown}"),
            ));
        }
        Ok(_) => {
            return Err(ConnectError::invalid_argument(format!(
                "path already exists but it is not a directory: {shown}"
            )));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(ConnectError::io(&format!("error getting file info of '{shown}'"), &error));
        }
    }
    std::fs::create_dir_all(path)
        .map_err(|error| ConnectError::io(&format!("cannot make directory '{shown}'"), &error))?;
    stat(path)
}

/// Renames; the destination's parents are made.
pub fn rename(from: &Path, to: &Path) -> Outcome<EntryInfo> {
    // Before anything is made for it, and so that what is missing is the source for certain.
    std::fs::symlink_metadata(from).map_err(|error| {
        let what = format!("source file not found: '{}'", from.display());
        ConnectError::io(&what, &error)
    })?;
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent).map_err(|error| {
            ConnectError::io(&format!("cannot make directory '{}'", parent.display()), &error)
        })?;
    }
    match std::fs::rename(from, to) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::CrossesDevices => {
            move_across(from, to).map_err(|error| failed_move(from, to, &error))?;
        }
        Err(error) => return Err(failed_move(from, to, &error)),
    }
    stat(to)
}

fn failed_move(from: &Path, to: &Path, error: &std::io::Error) -> ConnectError {
    let what = format!("error renaming '{}' to '{}'", from.display(), to.display());
    ConnectError::io(&what, error)
}

/// `/tmp` is often a file system of its own. A file is copied under a temporary name, renamed,
/// and removed where it was; a directory would need all of that for its tree, and is refused.
fn move_across(from: &Path, to: &Path) -> std::io::Result<()> {
    if !std::fs::symlink_metadata(from)?.is_file() {
        return Err(std::io::Error::new(
            std::io::ErrorKind::CrossesDevices,
            "they are on different file systems, and only files can be moved between those",
        ));
    }
    let upload = if to.exists() { Upload::Over } else { Upload::New };
    let temporary = temporary_name(to, upload)?;
    let copied = copy(from, &temporary).and_then(|()| std::fs::rename(&temporary, to));
    if let Err(error) = copied {
        // The first error is the one to tell; the copy may not even have begun.
        std::fs::remove_file(&temporary).unwrap_or_default();
        return Err(error);
    }
    std::fs::remove_file(from)
}

/// A file that is moved stays whose it was, and as it was.
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    // What it is, was looked at; what stands there now may be a link or a pipe.
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits()).unwrap_or(0);
    let mut source = OpenOptions::new().read(true).custom_flags(flags).open(from)?;
    let found = source.metadata()?;
    let mut target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    std::io::copy(&mut source, &mut target)?;
    fchown(&target, Some(found.uid()), Some(found.gid()))?;
    target.set_permissions(found.permissions())
}

/// Removes a file, a link, or a whole directory; what is not there is no error.
pub fn remove(path: &Path) -> Outcome<()> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error)
            if !matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            Err(ConnectError::io(&format!("error removing '{}'", path.display()), &error))
        }
        _ => Ok(()),
    }
}

/// The entries below a directory, parents before children, by name, down to `depth`. A link to a
/// directory can be listed itself; links inside are not followed.
pub fn list(path: &Path, depth: u32) -> Outcome<Vec<EntryInfo>> {
    let depth = usize::try_from(depth.max(1)).unwrap_or(DEPTH_MAX).min(DEPTH_MAX);
    let shown = path.display();
    let real = std::fs::canonicalize(path).map_err(|error| link_error(path, &error))?;
    let found = std::fs::metadata(&real)
        .map_err(|error| ConnectError::io(&format!("directory not found: '{shown}'"), &error))?;
    if !found.is_dir() {
        return Err(ConnectError::invalid_argument(format!("path is not a directory: {shown}")));
    }
    let mut names = Names::default();
    let mut entries = Vec::new();
    // What is still to be shown, the next one last.
    let mut waiting = children(&real)
        .map_err(|error| ConnectError::io(&format!("error reading directory '{shown}'"), &error))?;
    while let Some(at) = waiting.pop() {
        let below = at.strip_prefix(&real).unwrap_or(&at).to_owned();
        let Ok(entry) = EntryInfo::look(&at, &path.join(&below), &mut names) else {
            // Removed since its directory was read.
            continue;
        };
        entries.push(entry);
        if entries.len() + waiting.len() > LISTED_MAX {
            return Err(ConnectError::new(
                Code::ResourceExhausted,
                format!("'{shown}' has over {LISTED_MAX} entries; list a smaller part of it"),
            ));
        }
        let is_dir = std::fs::symlink_metadata(&at).is_ok_and(|found| found.is_dir());
        if is_dir && below.components().count() < depth {
            // One that cannot be read is shown without what is in it.
            waiting.extend(children(&at).unwrap_or_default());
        }
    }
    Ok(entries)
}

fn link_error(path: &Path, error: &std::io::Error) -> ConnectError {
    if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) {
        return ConnectError::new(
            Code::FailedPrecondition,
            format!("cyclic symlink or too long a chain of links at '{}'", path.display()),
        );
    }
    ConnectError::io(&format!("path not found: '{}'", path.display()), error)
}

/// In reverse order of their names, for a stack.
fn children(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        if paths.len() > LISTED_MAX {
            break;
        }
        paths.push(entry?.path());
    }
    paths.sort_unstable_by(|a, b| b.cmp(a));
    Ok(paths)
}

/// Whether an existing file can be written to: not on a read-only disk, and not an immutable one.
pub fn may_write(path: &Path) -> rustix::io::Result<()> {
    rustix::fs::accessat(CWD, path, rustix::fs::Access::WRITE_OK, AtFlags::EACCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn base(name: &str) -> PathBuf {
        let base = std::env::temp_dir().join(format!("mica-ops-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&base).unwrap();
        base
    }

    fn paths(entries: &[EntryInfo], base: &Path) -> Vec<String> {
        let prefix = format!("{}/", base.display());
        entries.iter().map(|e| e.path.strip_prefix(&prefix).unwrap().to_owned()).collect()
    }

    #[test]
    fn listing_is_ordered_and_bounded_in_depth() {
        let base = base("list");
        std::fs::create_dir_all(base.join("b/c/d")).unwrap();
        std::fs::write(base.join("b/f"), "").unwrap();
        std::fs::write(base.join("a"), "").unwrap();
        std::os::unix::fs::symlink(base.join("b"), base.join("z")).unwrap();
        assert_eq!(paths(&list(&base, 0).unwrap(), &base), ["a", "b", "z"]);
        assert_eq!(
            paths(&list(&base, 3).unwrap(), &base),
            ["a", "b", "b/c", "b/c/d", "b/f", "z"],
            "links inside are not followed"
        );
        // The listed path itself may be a link, and is shown as it was asked for.
        assert_eq!(paths(&list(&base.join("z"), 1).unwrap(), &base), ["z/c", "z/f"]);
        assert_eq!(list(&base.join("a"), 1).unwrap_err().code, Code::InvalidArgument);
        assert_eq!(list(&base.join("no"), 1).unwrap_err().code, Code::NotFound);
        std::os::unix::fs::symlink("loop", base.join("loop")).unwrap();
        assert_eq!(list(&base.join("loop"), 1).unwrap_err().code, Code::FailedPrecondition);
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn directories_are_made_once() {
        let base = base("make");
        let made = make_dir(&base.join("x/y")).unwrap();
        assert_eq!(made.name, "y");
        assert_eq!(make_dir(&base.join("x/y")).unwrap_err().code, Code::AlreadyExists);
        std::fs::write(base.join("f"), "").unwrap();
        assert_eq!(make_dir(&base.join("f")).unwrap_err().code, Code::InvalidArgument);
        assert_eq!(make_dir(&base.join("f/g")).unwrap_err().code, Code::InvalidArgument);
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn moving_makes_parents_and_misses_nothing() {
        let base = base("move");
        std::fs::write(base.join("a"), "1").unwrap();
        assert_eq!(rename(&base.join("a"), &base.join("p/q/b")).unwrap().name, "b");
        assert_eq!(std::fs::read_to_string(base.join("p/q/b")).unwrap(), "1");
        let missing = rename(&base.join("a"), &base.join("new/c")).unwrap_err();
        assert_eq!(missing.code, Code::NotFound);
        assert!(!base.join("new").exists(), "nothing is made for a source that is not there");
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn files_move_between_file_systems() {
        let shm = PathBuf::from(format!("/dev/shm/mica-ops-{}", std::process::id()));
        if std::fs::write(&shm, "far").is_err() {
            eprintln!("skipped: there is no /dev/shm here");
            return;
        }
        std::fs::set_permissions(&shm, std::fs::Permissions::from_mode(0o751)).unwrap();
        let (uid, gid) = if rustix::process::geteuid().is_root() {
            (65_533, 65_532)
        } else {
            let found = std::fs::metadata(&shm).unwrap();
            (found.uid(), found.gid())
        };
        std::os::unix::fs::chown(&shm, Some(uid), Some(gid)).unwrap();
        let base = base("across");
        assert_eq!(rename(&shm, &base.join("near")).unwrap().name, "near");
        assert_eq!(std::fs::read_to_string(base.join("near")).unwrap(), "far");
        let found = std::fs::metadata(base.join("near")).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (uid, gid, 0o751));
        assert!(!shm.exists());
        assert_eq!(std::fs::read_dir(&base).unwrap().count(), 1, "no temporary file is left");
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn removing_does_not_follow_links() {
        let base = base("remove");
        std::fs::create_dir_all(base.join("kept")).unwrap();
        std::fs::write(base.join("kept/f"), "").unwrap();
        std::fs::create_dir_all(base.join("gone/deep")).unwrap();
        std::os::unix::fs::symlink(base.join("kept"), base.join("gone/deep/link")).unwrap();
        remove(&base.join("gone")).unwrap();
        assert!(!base.join("gone").exists() && base.join("kept/f").exists());
        remove(&base.join("gone")).unwrap();
        remove(&base.join("kept/f/below")).unwrap();
        std::fs::remove_dir_all(base).unwrap();
    }
}
