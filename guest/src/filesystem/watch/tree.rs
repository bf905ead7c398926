//! A watched directory, and with `recursive` all directories below it: inotify's events as E2B's.
//!
//! Called by [`super::Watch`] on a thread of `identity`, because it blocks.
//! Refuses more than [`DIRECTORIES_MAX`] directories, and to go on once the kernel has lost events.
//!
//! ```text
//!  inotify                          told
//!  CREATE, MOVED_TO                 CREATE    a new directory's content follows, as if made after
//!  MOVED_FROM, MOVE_SELF            RENAME
//!  ATTRIB                           CHMOD
//!  MODIFY                           WRITE
//!  DELETE, DELETE_SELF              REMOVE
//!  an upload's rename into place    CREATE if there was nothing, WRITE
//! ```

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use super::messages::EventType;
use crate::connect::{Code, ConnectError};
use crate::filesystem::upload::{self, Upload};

/// Most directories below one watched one.
pub const DIRECTORIES_MAX: usize = 16_384;

/// Events taken from the kernel before they are passed on.
const BATCH_EVENTS: usize = 1024;

/// Room for the kernel's answer; one event is at most 272 bytes.
const READ_BYTES: usize = 32 * 1024;

const EVENTS: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::ONLYDIR);

/// One thing that happened, relative to the watched directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Happened {
    pub kind: EventType,
    pub path: PathBuf,
}

/// One event as the kernel tells it.
struct Raw {
    descriptor: i32,
    flags: ReadFlags,
    cookie: u32,
    name: Option<OsString>,
}

/// See the module.
#[derive(Debug)]
pub struct Tree {
    inotify: OwnedFd,
    root: PathBuf,
    is_recursive: bool,
    /// Directories by their descriptors, and back, relative to the root.
    directories: HashMap<i32, PathBuf>,
    descriptors: BTreeMap<PathBuf, i32>,
    /// A directory that went, until it is known whether it comes back under another name.
    moved: Option<(u32, PathBuf)>,
    /// An upload on its way from its temporary name to its own.
    uploaded: Option<(u32, Upload)>,
    /// What was told because it was found in a new directory: the kernel may tell it once more.
    found: HashSet<PathBuf>,
}

impl Tree {
    /// Watches `root`, which may be reached through a link.
    ///
    /// # Errors
    /// When there is nothing to watch, or a limit is reached.
    pub fn open(root: &Path, is_recursive: bool) -> Result<Self, ConnectError> {
        let flags = CreateFlags::CLOEXEC | CreateFlags::NONBLOCK;
        let inotify = inotify::init(flags).map_err(|errno| match errno {
            Errno::MFILE | Errno::NFILE => ConnectError::new(
                Code::ResourceExhausted,
                "the kernel has no more watchers for this user \
                 (fs.inotify.max_user_instances); remove one first",
            ),
            other => ConnectError::io("cannot make a watcher", &other.into()),
        })?;
        let mut tree = Self {
            inotify,
            root: root.to_owned(),
            is_recursive,
            directories: HashMap::new(),
            descriptors: BTreeMap::new(),
            moved: None,
            uploaded: None,
            found: HashSet::new(),
        };
        let descriptor = inotify::add_watch(&tree.inotify, root, EVENTS)
            .map_err(|errno| watch_error(root, errno))?;
        tree.insert(descriptor, PathBuf::new());
        if is_recursive {
            let below = tree.children(Path::new(""));
            tree.adopt(below, None)?;
        }
        Ok(tree)
    }

    /// What can be waited for: readable when something has happened.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }

    /// The watched directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What has happened since the last call, a bounded part of it, and whether that is all.
    ///
    /// # Errors
    /// `resource_exhausted` when events were lost; the tree is of no use from there on.
    pub fn read(&mut self) -> Result<(Vec<Happened>, bool), ConnectError> {
        let (raw, is_drained) = self.read_raw()?;
        let mut happened = Vec::new();
        for event in raw {
            self.translate(event, &mut happened)?;
        }
        if is_drained {
            // What may have been told twice would have come by now, and the other half of a move.
            self.found.clear();
            self.settle();
        }
        Ok((happened, is_drained))
    }

    /// Lets a directory go that was moved to where nobody watches.
    fn settle(&mut self) {
        if let Some((_, former)) = self.moved.take() {
            self.forget(&former);
        }
    }

    fn read_raw(&self) -> Result<(Vec<Raw>, bool), ConnectError> {
        let mut space = vec![MaybeUninit::uninit(); READ_BYTES];
        let mut reader = inotify::Reader::new(&self.inotify, &mut space);
        let mut raw = Vec::new();
        loop {
            if raw.len() >= BATCH_EVENTS && reader.is_buffer_empty() {
                return Ok((raw, false));
            }
            match reader.next() {
                Ok(event) => raw.push(Raw {
                    descriptor: event.wd(),
                    flags: event.events(),
                    cookie: event.cookie(),
                    name: event.file_name().map(|name| OsString::from_vec(name.to_bytes().into())),
                }),
                Err(Errno::AGAIN) => return Ok((raw, true)),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ConnectError::io("cannot read events", &errno.into())),
            }
        }
    }

    fn translate(&mut self, event: Raw, out: &mut Vec<Happened>) -> Result<(), ConnectError> {
        let has = |flags: ReadFlags| event.flags.intersects(flags);
        if has(ReadFlags::QUEUE_OVERFLOW) {
            return Err(lost("the kernel's queue of events ran over"));
        }
        let Some(directory) = self.directories.get(&event.descriptor) else {
            // Of a directory that is no longer watched.
            return Ok(());
        };
        if has(ReadFlags::IGNORED) {
            self.remove(event.descriptor);
            return Ok(());
        }
        let Some(name) = event.name else {
            // Of the directory itself. Below the root, its parent tells the same.
            if directory.as_os_str().is_empty() {
                let of_itself = |kind| Happened { kind, path: PathBuf::from(".") };
                out.extend(kinds(event.flags).map(of_itself));
            }
            return Ok(());
        };
        if let Some(upload) = upload::temporary(&name) {
            if has(ReadFlags::MOVED_FROM) {
                self.uploaded = Some((event.cookie, upload));
            }
            return Ok(());
        }
        let path = directory.join(name);
        let is_directory = self.is_recursive && has(ReadFlags::ISDIR);
        let is_told = has(ReadFlags::CREATE | ReadFlags::MOVED_TO) && self.found.remove(&path);
        if has(ReadFlags::MOVED_TO)
            && let Some((_, upload)) = self.uploaded.take_if(|(cookie, _)| *cookie == event.cookie)
        {
            if upload == Upload::New && !is_told {
                out.push(Happened { kind: EventType::Create, path: path.clone() });
            }
            out.push(Happened { kind: EventType::Write, path });
            return Ok(());
        }
        if is_told && has(ReadFlags::CREATE) {
            return Ok(());
        }
        let kinds = kinds(event.flags).filter(|_| !is_told);
        out.extend(kinds.map(|kind| Happened { kind, path: path.clone() }));
        if is_directory && has(ReadFlags::MOVED_FROM) {
            if let Some((_, former)) = self.moved.replace((event.cookie, path)) {
                self.forget(&former);
            }
        } else if is_directory && has(ReadFlags::MOVED_TO) {
            match self.moved.take_if(|(cookie, _)| *cookie == event.cookie) {
                Some((_, from)) => self.rename(&from, &path),
                None => {
                    self.settle();
                    self.adopt(vec![path], None)?;
                }
            }
        } else if is_directory && has(ReadFlags::CREATE) {
            // It may have the name of one that has just gone.
            self.settle();
            self.adopt(vec![path], Some(out))?;
        }
        Ok(())
    }

    /// Watches directories and all below them. With `out`, what is in them is told as created: they
    /// are new, and it came before the watch did.
    fn adopt(
        &mut self,
        mut waiting: Vec<PathBuf>,
        mut out: Option<&mut Vec<Happened>>,
    ) -> Result<(), ConnectError> {
        let flags = EVENTS | WatchFlags::DONT_FOLLOW;
        while let Some(path) = waiting.pop() {
            let at = self.root.join(&path);
            if self.directories.len() >= DIRECTORIES_MAX {
                return Err(ConnectError::new(
                    Code::ResourceExhausted,
                    format!(
                        "'{}' has over {DIRECTORIES_MAX} directories; watch a smaller part of it",
                        self.root.display()
                    ),
                ));
            }
            let descriptor = match inotify::add_watch(&self.inotify, &at, flags) {
                Ok(descriptor) => descriptor,
                // It has gone since, or its file system lets even root not see what is in it.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS) => continue,
                Err(errno) => return Err(watch_error(&at, errno)),
            };
            self.insert(descriptor, path.clone());
            if let Some(out) = &mut out {
                self.tell_content(&path, out)?;
            }
            waiting.extend(self.children(&path));
        }
        Ok(())
    }

    fn tell_content(&mut self, path: &Path, out: &mut Vec<Happened>) -> Result<(), ConnectError> {
        // A directory that cannot be read, or no longer, tells nothing.
        let Ok(entries) = std::fs::read_dir(self.root.join(path)) else { return Ok(()) };
        for entry in entries.map_while(Result::ok) {
            if upload::temporary(&entry.file_name()).is_some() {
                continue;
            }
            if self.found.len() >= DIRECTORIES_MAX {
                return Err(lost("a new directory has too many entries"));
            }
            let path = path.join(entry.file_name());
            self.found.insert(path.clone());
            let has_content =
                entry.metadata().is_ok_and(|found| found.is_file() && found.len() > 0);
            out.push(Happened { kind: EventType::Create, path: path.clone() });
            if has_content {
                out.push(Happened { kind: EventType::Write, path });
            }
        }
        Ok(())
    }

    /// The directories in a directory, links not followed; one too many is enough to be refused.
    fn children(&self, path: &Path) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.root.join(path)) else { return Vec::new() };
        entries
            .map_while(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| path.join(entry.file_name()))
            .take(DIRECTORIES_MAX + 1)
            .collect()
    }

    fn insert(&mut self, descriptor: i32, path: PathBuf) {
        if let Some(former) = self.directories.insert(descriptor, path.clone()) {
            self.descriptors.remove(&former);
        }
        self.descriptors.insert(path, descriptor);
    }

    fn remove(&mut self, descriptor: i32) {
        if let Some(path) = self.directories.remove(&descriptor)
            && self.descriptors.get(&path) == Some(&descriptor)
        {
            self.descriptors.remove(&path);
        }
    }

    /// A directory and all below it.
    fn below(&self, path: &Path) -> Vec<(PathBuf, i32)> {
        let from = self.descriptors.range(path.to_owned()..);
        from.take_while(|(found, _)| found.starts_with(path))
            .map(|(path, descriptor)| (path.clone(), *descriptor))
            .collect()
    }

    /// Stops watching a directory and all below it.
    fn forget(&mut self, path: &Path) {
        for (_, descriptor) in self.below(path) {
            self.remove(descriptor);
            // One that is gone already is what is wanted.
            inotify::remove_watch(&self.inotify, descriptor).unwrap_or_default();
        }
    }

    /// A directory and all below it have another path now.
    fn rename(&mut self, from: &Path, to: &Path) {
        for (path, descriptor) in self.below(from) {
            let below = path.strip_prefix(from).unwrap_or(Path::new("")).to_owned();
            let path = if below.as_os_str().is_empty() { to.to_owned() } else { to.join(below) };
            self.insert(descriptor, path);
        }
    }
}

/// What an event of the kernel is, in the order in which several at once are told.
fn kinds(flags: ReadFlags) -> impl Iterator<Item = EventType> {
    [
        (ReadFlags::CREATE | ReadFlags::MOVED_TO, EventType::Create),
        (ReadFlags::MOVED_FROM | ReadFlags::MOVE_SELF, EventType::Rename),
        (ReadFlags::ATTRIB, EventType::Chmod),
        (ReadFlags::MODIFY, EventType::Write),
        (ReadFlags::DELETE | ReadFlags::DELETE_SELF, EventType::Remove),
    ]
    .into_iter()
    .filter(move |(of, _)| flags.intersects(*of))
    .map(|(_, kind)| kind)
}

/// The error for events that will never be told.
pub fn lost(why: &str) -> ConnectError {
    ConnectError::new(
        Code::ResourceExhausted,
        format!("{why}, so events were lost; start another watcher and list the directory"),
    )
}

fn watch_error(path: &Path, errno: Errno) -> ConnectError {
    let shown = path.display();
    if errno == Errno::NOSPC {
        return ConnectError::new(
            Code::ResourceExhausted,
            format!(
                "cannot watch '{shown}': the kernel has no more watches for this user \
                 (fs.inotify.max_user_watches); watch fewer directories"
            ),
        );
    }
    ConnectError::io(&format!("cannot watch '{shown}'"), &errno.into())
}

#[cfg(test)]
mod tests;
