//! What is mounted where: the file system of the store and the drive below it, and that of control groups.
//!
//! Called by [`super::Facts::read`]. Refuses to follow a path: the caller makes it absolute.

use std::path::{Path, PathBuf};

use super::tree::Tree;

/// The file system below the store.
#[derive(Debug, Default)]
pub struct Store {
    /// Where the store is, or would be.
    pub path: PathBuf,
    /// What is mounted there.
    pub file_system: Option<String>,
    /// What it is on, where that is a disk.
    pub disk: Option<Disk>,
}

/// The device that it is on.
#[derive(Debug, PartialEq, Eq)]
pub struct Disk {
    /// As `/sys/block` has it.
    pub name: String,
    /// How many it takes requests from at once.
    pub queues: usize,
    /// What sorts its requests.
    pub scheduler: Option<String>,
    /// Whether it has a head that moves.
    pub is_rotational: Option<bool>,
    /// The file that a loop device reads.
    pub backing_file: Option<String>,
}

/// Where control groups of sandboxes would be.
#[derive(Debug, Default)]
pub struct Cgroup {
    /// The group under which every sandbox would have its own.
    pub path: PathBuf,
    /// What is mounted there: `cgroup2`, or something else.
    pub file_system: Option<String>,
    /// What the group above it may hand out.
    pub controllers: Vec<String>,
    /// Whether moves wait for no grace period.
    pub favors_dynamic_moves: bool,
}

/// A line of `/proc/self/mountinfo`.
#[derive(Debug)]
pub(super) struct Mount {
    device: String,
    point: PathBuf,
    file_system: String,
    source: String,
    options: String,
}

impl Tree<'_> {
    pub(super) fn store(&self, path: &Path, mounts: &[Mount]) -> Store {
        let mount = mount_of(path, mounts);
        Store {
            path: path.to_owned(),
            file_system: mount.map(|mount| mount.file_system.clone()),
            disk: mount.and_then(|mount| self.disk(mount)),
        }
    }

    /// The whole disk that a mounted device is on.
    fn disk(&self, mount: &Mount) -> Option<Disk> {
        let source = mount.source.rsplit('/').next().unwrap_or_default();
        let name = self.names("sys/block").into_iter().find(|disk| {
            let at = format!("sys/block/{disk}");
            let is = |dir: &str| self.text(&format!("{dir}/dev")).as_ref() == Some(&mount.device);
            let parts = self.names(&at);
            // Btrfs has a device of its own, which is no disk: there its source says which.
            let by_name = mount.device.starts_with("0:") && !source.is_empty();
            is(&at)
                || parts.iter().any(|part| is(&format!("{at}/{part}")))
                || by_name && (disk == source || parts.iter().any(|part| part == source))
        })?;
        let at = format!("sys/block/{name}");
        Some(Disk {
            queues: self.names(&format!("{at}/mq")).len(),
            scheduler: self.chosen(&format!("{at}/queue/scheduler")),
            is_rotational: self.number(&format!("{at}/queue/rotational")).map(|spins| spins != 0),
            backing_file: self.text(&format!("{at}/loop/backing_file")),
            name,
        })
    }

    pub(super) fn cgroup(&self, path: &Path, mounts: &[Mount]) -> Cgroup {
        let Some(mount) = mount_of(path, mounts) else {
            return Cgroup { path: path.to_owned(), ..Cgroup::default() };
        };
        // The daemon makes its own, and what it may hand out is what the one above has.
        let above = path.parent().unwrap_or(path).join("cgroup.controllers");
        let above = above.strip_prefix("/").unwrap_or(&above).to_owned();
        let controllers = self.text(&above.to_string_lossy()).unwrap_or_default();
        Cgroup {
            path: path.to_owned(),
            file_system: Some(mount.file_system.clone()),
            controllers: controllers.split_whitespace().map(str::to_owned).collect(),
            favors_dynamic_moves: mount.options.split(',').any(|option| option == "favordynmods"),
        }
    }
}

/// All that is in a `mountinfo`.
pub(super) fn mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (front, back) = line.split_once(" - ")?;
        let (front, mut back): (Vec<&str>, _) = (front.split(' ').collect(), back.split(' '));
        Some(Mount {
            device: (*front.get(2)?).to_owned(),
            // A space in a name is written so.
            point: PathBuf::from(front.get(4)?.replace("\\040", " ")),
            file_system: back.next()?.to_owned(),
            source: back.next()?.to_owned(),
            options: back.next()?.to_owned(),
        })
    };
    text.lines().filter_map(mount).collect()
}

/// The mount that a path is below: the longest, and of several at one place the last.
fn mount_of<'m>(path: &Path, mounts: &'m [Mount]) -> Option<&'m Mount> {
    let over = mounts.iter().filter(|mount| path.starts_with(&mount.point));
    over.max_by_key(|mount| mount.point.components().count())
}
