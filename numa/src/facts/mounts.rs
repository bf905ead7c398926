//! What is mounted where: the file system of the store and the drive below it, and that of control groups.
//!
//! Called by [`super::Facts::read`]. Refuses to follow a path: the caller makes it absolute.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::tree::Tree;

/// The file system below the store.
#[derive(Debug, Default)]
pub struct Store {
    /// Where the store is, or would be.
    pub path: PathBuf,
    /// What is mounted there.
    pub file_system: Option<String>,
    /// The disks that it is on, ordered by name: several below a RAID, none where that is unknown.
    pub disks: Vec<Disk>,
}

/// A device that it is on.
#[derive(Debug, PartialEq, Eq)]
pub struct Disk {
    /// As `/sys/block` has it.
    pub name: String,
    /// What is mounted, where that is not this disk itself: a volume of LVM, LUKS or RAID.
    pub volume: Option<String>,
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
    /// What of control groups is mounted anywhere: `v1`, `v2`, or `v1 and v2`.
    pub versions: Option<&'static str>,
    /// What the group above it may hand out.
    pub controllers: Vec<String>,
    /// The group above it, or the group itself, where processes of its own keep it from handing memory out.
    pub busy: Option<PathBuf>,
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
            disks: mount.map(|mount| self.disks(mount)).unwrap_or_default(),
        }
    }

    /// The disks below what is mounted.
    fn disks(&self, mount: &Mount) -> Vec<Disk> {
        let Some(top) = self.mounted(mount) else { return Vec::new() };
        let bottom = self.bottom(&top);
        bottom.into_iter().map(|name| self.disk(name, &top)).collect()
    }

    /// The whole device that a mounted one is, or is a part of.
    fn mounted(&self, mount: &Mount) -> Option<String> {
        // A share's name may be a disk's.
        let device = mount.source.strip_prefix("/dev/").unwrap_or_default();
        let source = device.rsplit('/').next().unwrap_or_default();
        self.names("sys/block").into_iter().find(|disk| {
            let at = format!("sys/block/{disk}");
            let is = |dir: &str| self.text(&format!("{dir}/dev")).as_ref() == Some(&mount.device);
            let parts = self.names(&at);
            // Btrfs has a device of its own, which is no disk: there its source says which.
            let by_name = mount.device.starts_with("0:") && !source.is_empty();
            let is_source = |name: &String| name == source;
            let mapped = || self.text(&format!("{at}/dm/name")).as_ref().is_some_and(is_source);
            is(&at)
                || parts.iter().any(|part| is(&format!("{at}/{part}")))
                || by_name && (is_source(disk) || parts.iter().any(is_source) || mapped())
        })
    }

    /// What is below a device, and below that, until nothing is: LVM, LUKS and RAID lie on others.
    fn bottom(&self, top: &str) -> BTreeSet<String> {
        let (mut open, mut seen) = (vec![top.to_owned()], BTreeSet::new());
        let mut bottom = BTreeSet::new();
        while let Some(name) = open.pop() {
            let below = self.names(&format!("sys/block/{name}/slaves"));
            if below.is_empty() {
                bottom.insert(name);
            } else if seen.insert(name) {
                open.extend(below.into_iter().map(|part| self.whole(part)));
            }
        }
        bottom
    }

    /// The disk that something is a partition of; itself where it is none.
    fn whole(&self, part: String) -> String {
        let disks = self.names("sys/block");
        let holds = |disk: &String| self.0.join(format!("sys/block/{disk}/{part}")).is_dir();
        if disks.contains(&part) { part } else { disks.into_iter().find(holds).unwrap_or(part) }
    }

    fn disk(&self, name: String, top: &str) -> Disk {
        let at = format!("sys/block/{name}");
        Disk {
            volume: (name != top).then(|| top.to_owned()),
            queues: self.names(&format!("{at}/mq")).len(),
            scheduler: self.chosen(&format!("{at}/queue/scheduler")),
            is_rotational: self.number(&format!("{at}/queue/rotational")).map(|spins| spins != 0),
            backing_file: self.text(&format!("{at}/loop/backing_file")),
            name,
        }
    }

    pub(super) fn cgroup(&self, path: &Path, mounts: &[Mount]) -> Cgroup {
        let there =
            Cgroup { path: path.to_owned(), versions: versions(mounts), ..Cgroup::default() };
        let Some(mount) = mount_of(path, mounts) else { return there };
        // The daemon makes its own, and what it may hand out is what the one above has.
        let above = path.parent().unwrap_or(path);
        Cgroup {
            file_system: Some(mount.file_system.clone()),
            controllers: self.words(&above.join("cgroup.controllers")),
            busy: [above, path].into_iter().find(|group| self.is_busy(group)).map(Path::to_owned),
            favors_dynamic_moves: mount.options.split(',').any(|option| option == "favordynmods"),
            ..there
        }
    }

    /// Whether a group has processes of its own, for which the kernel does not let it hand memory out to
    /// groups below it: Documentation/admin-guide/cgroup-v2.rst, "No Internal Process Constraint". The root
    /// may have both; only there is no `cgroup.type`.
    fn is_busy(&self, group: &Path) -> bool {
        let is_root = self.words(&group.join("cgroup.type")).is_empty();
        let hands_out = self.words(&group.join("cgroup.subtree_control"));
        !is_root
            && !hands_out.iter().any(|controller| controller == "memory")
            && !self.words(&group.join("cgroup.procs")).is_empty()
    }

    /// The words of a file that is named from `/`.
    fn words(&self, path: &Path) -> Vec<String> {
        let path = path.strip_prefix("/").unwrap_or(path);
        let text = self.text(&path.to_string_lossy()).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    }
}

/// Which control groups are mounted anywhere.
fn versions(mounts: &[Mount]) -> Option<&'static str> {
    let has = |kind: &str| mounts.iter().any(|mount| mount.file_system == kind);
    match (has("cgroup"), has("cgroup2")) {
        (true, true) => Some("v1 and v2"),
        (true, false) => Some("v1"),
        (false, true) => Some("v2"),
        (false, false) => None,
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// What `read` makes of a machine with these files.
    fn with<T>(name: &str, files: &[(&str, &str)], read: impl FnOnce(&Tree<'_>) -> T) -> T {
        let root = std::env::temp_dir().join(format!("mica-mounts-{name}-{}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let found = read(&Tree(&root));
        fs::remove_dir_all(&root).unwrap();
        found
    }

    /// The disks below `/store`.
    fn disks(name: &str, mount: &str, files: &[(&str, &str)]) -> Vec<Disk> {
        with(name, files, |tree| tree.store(Path::new("/store/x"), &mounts(mount)).disks)
    }

    /// Two drives below a RAID, that below LUKS, that below a volume. In a real tree `slaves` has links.
    const STACK: &[(&str, &str)] = &[
        ("sys/block/dm-1/dev", "253:1"),
        ("sys/block/dm-1/dm/name", "vg-store"),
        ("sys/block/dm-1/slaves/dm-0/dev", "253:0"),
        ("sys/block/dm-0/dev", "253:0"),
        ("sys/block/dm-0/slaves/md0/dev", "9:0"),
        ("sys/block/md0/dev", "9:0"),
        ("sys/block/md0/slaves/nvme0n1p2/dev", "259:2"),
        ("sys/block/md0/slaves/nvme1n1/dev", "259:4"),
        ("sys/block/nvme0n1/dev", "259:0"),
        ("sys/block/nvme0n1/nvme0n1p2/dev", "259:2"),
        ("sys/block/nvme0n1/mq/0/cpu_list", "0"),
        ("sys/block/nvme0n1/mq/1/cpu_list", "1"),
        ("sys/block/nvme0n1/queue/scheduler", "[none] mq-deadline"),
        ("sys/block/nvme1n1/dev", "259:4"),
        ("sys/block/nvme1n1/mq/0/cpu_list", "0-1"),
        ("sys/block/nvme1n1/queue/scheduler", "none [mq-deadline]"),
    ];

    fn shown(disks: &[Disk]) -> Vec<(&str, Option<&str>, usize, Option<&str>)> {
        let rows = disks.iter();
        rows.map(|d| (&*d.name, d.volume.as_deref(), d.queues, d.scheduler.as_deref())).collect()
    }

    #[test]
    fn volumes_are_followed_down_to_every_disk() {
        let volume = "22 1 253:1 / /store rw - xfs /dev/mapper/vg-store rw";
        let found = disks("volume", volume, STACK);
        let expected = [
            ("nvme0n1", Some("dm-1"), 2, Some("none")),
            ("nvme1n1", Some("dm-1"), 1, Some("mq-deadline")),
        ];
        assert_eq!(shown(&found), expected);
        // Btrfs has a device number of its own; its source has the name that LVM gave.
        let btrfs = "22 1 0:30 / /store rw - btrfs /dev/mapper/vg-store rw";
        assert_eq!(shown(&disks("mapped", btrfs, STACK)), expected);
        let plain = "22 1 259:2 / /store rw - xfs /dev/nvme0n1p2 rw";
        assert_eq!(shown(&disks("plain", plain, STACK)), [("nvme0n1", None, 2, Some("none"))]);
    }

    #[test]
    fn a_ring_of_volumes_has_no_bottom_and_an_end() {
        let ring = [
            ("sys/block/dm-0/dev", "253:0"),
            ("sys/block/dm-0/slaves/dm-1/dev", "253:1"),
            ("sys/block/dm-1/slaves/dm-0/dev", "253:0"),
        ];
        assert_eq!(disks("ring", "22 1 253:0 / /store rw - xfs /dev/dm-0 rw", &ring), []);
    }

    const GROUPS: &str = "30 22 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw";

    #[test]
    fn a_group_with_processes_hands_no_memory_out_unless_it_is_the_root() {
        let group = |name: &str, path: &str, files: &[(&str, &str)]| {
            with(name, files, |tree| tree.cgroup(Path::new(path), &mounts(GROUPS)))
        };
        let busy = [
            ("sys/fs/cgroup/cgroup.procs", "1\n2\n"),
            ("sys/fs/cgroup/unit/cgroup.type", "domain\n"),
            ("sys/fs/cgroup/unit/cgroup.procs", "77\n"),
            ("sys/fs/cgroup/unit/cgroup.controllers", "memory pids\n"),
            ("sys/fs/cgroup/unit/cgroup.subtree_control", "pids\n"),
        ];
        assert_eq!(group("root", "/sys/fs/cgroup/mica", &busy).busy, None);
        let unit = Some(PathBuf::from("/sys/fs/cgroup/unit"));
        let above = group("above", "/sys/fs/cgroup/unit/mica", &busy);
        assert_eq!(
            (above.busy, above.controllers),
            (unit.clone(), vec!["memory".into(), "pids".into()])
        );
        assert_eq!(group("itself", "/sys/fs/cgroup/unit", &busy).busy, unit);
        // Asking for what is there already changes nothing, so the kernel does not look.
        let done =
            [&busy[..4], &[("sys/fs/cgroup/unit/cgroup.subtree_control", "memory")]].concat();
        assert_eq!(group("done", "/sys/fs/cgroup/unit/mica", &done).busy, None);
        let empty = [&busy[..2], &[("sys/fs/cgroup/unit/cgroup.procs", "")]].concat();
        assert_eq!(group("empty", "/sys/fs/cgroup/unit/mica", &empty).busy, None);
    }

    #[test]
    fn both_kinds_of_control_groups_may_be_mounted() {
        let old = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu";
        assert_eq!(versions(&mounts(GROUPS)), Some("v2"));
        assert_eq!(versions(&mounts(old)), Some("v1"));
        assert_eq!(versions(&mounts(&format!("{GROUPS}\n{old}"))), Some("v1 and v2"));
        assert_eq!(versions(&[]), None);
    }
}
