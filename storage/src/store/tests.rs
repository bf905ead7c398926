//! The store as one process and as two see it.

use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};

use mica_units::SandboxId;

use super::*;
use crate::testing::{TempDir, names_in, put, spec};
use crate::{Part, ReadyWhen};

fn sandbox(n: u8) -> SandboxId {
    SandboxId::from_random([n; mica_units::SANDBOX_ID_CHARS])
}

#[test]
fn a_new_store_is_empty_and_opens_again() {
    let dir = TempDir::new();
    let root = dir.join("a/b/store");
    let store = Store::open(&root).unwrap();
    assert!(store.templates().unwrap().is_empty());
    assert_eq!(
        names_in(&root),
        ["lock", "mica-store", "names", "sandboxes", "snapshots", "snapshots.lock", "templates"]
    );
    for private in ["names", "sandboxes", "templates"] {
        let mode = fs::metadata(root.join(private)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{private}");
    }
    drop(store);
    assert!(Store::open(&root).unwrap().templates().unwrap().is_empty());
}

#[test]
fn foreign_directories_and_other_versions_are_refused() {
    let dir = TempDir::new();
    fs::write(dir.join("notes.txt"), "mine").unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert!(matches!(error, StorageError::Foreign { .. }), "{error}");
    assert_eq!(names_in(dir.path()), ["notes.txt"], "nothing was added");

    let dir = TempDir::new();
    fs::create_dir(dir.join("templates")).unwrap();
    fs::write(dir.join("templates/index.html"), "mine").unwrap();
    assert!(matches!(Store::open(dir.path()), Err(StorageError::Foreign { .. })));

    let dir = TempDir::new();
    fs::write(dir.join("mica-store"), "mica store 2\n").unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert!(matches!(error, StorageError::Version { .. }), "{error}");
    fs::write(dir.join("mica-store"), [0xff, 0xfe]).unwrap();
    assert!(matches!(Store::open(dir.path()), Err(StorageError::Foreign { .. })));

    let dir = TempDir::new();
    fs::create_dir(dir.join("lost+found")).unwrap();
    Store::open(dir.path()).unwrap();
}

#[test]
fn templates_are_found_by_name_and_by_id() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let base = put(&store, "base", 1, false).unwrap();
    put(&store, "alpha", 2, false).unwrap();
    let names: Vec<_> =
        store.templates().unwrap().iter().map(|t| t.manifest().name.to_string()).collect();
    assert_eq!(names, ["alpha", "base"]);
    for key in ["base", base.manifest().id.as_str()] {
        let found = store.find_template(key).unwrap().unwrap();
        assert_eq!(found.manifest(), base.manifest());
    }
    for key in ["", "..", "a/b", "nobody", &"0".repeat(20), "base\0"] {
        assert!(store.find_template(key).unwrap().is_none(), "{key:?}");
    }
    let mut kernel = String::new();
    base.open_kernel().unwrap().read_to_string(&mut kernel).unwrap();
    assert_eq!(kernel, "\u{1}".repeat(4096));
    let error = base.open_kernel().unwrap().write_all(b"x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::BADF.raw_os_error()), "read-only");
}

#[test]
fn a_taken_name_is_refused_unless_it_is_to_be_replaced() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let first = put(&store, "base", 1, false).unwrap();
    let error = put(&store, "base", 2, false).unwrap_err();
    assert!(matches!(error, StorageError::TemplateExists { .. }), "{error}");
    let second = put(&store, "base", 3, true).unwrap();
    assert_ne!(first.manifest().id, second.manifest().id);
    assert_eq!(names_in(&dir.join("templates")), [second.manifest().id.as_str()]);
    assert!(store.find_template(&first.manifest().id).unwrap().is_none());
    let error = first.open_kernel().unwrap_err();
    assert!(matches!(error, StorageError::TemplateGone { .. }), "{error}");
}

#[test]
fn deleting_leaves_open_files_and_clones_alone() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let template = put(&store, "base", 7, false).unwrap();
    let disk = store.create_disk(&template, &sandbox(1)).unwrap();
    let mut kernel = template.open_kernel().unwrap();
    let name = "base".parse().unwrap();
    assert!(store.delete_template(&name).unwrap());
    assert!(!store.delete_template(&name).unwrap());
    assert!(names_in(&dir.join("templates")).is_empty());
    let mut bytes = Vec::new();
    assert_eq!(kernel.read_to_end(&mut bytes).unwrap(), 4096);
    disk.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [7; 4096]);
    let error = store.create_disk(&template, &sandbox(2)).unwrap_err();
    assert!(matches!(error, StorageError::TemplateGone { .. }), "{error}");
}

#[test]
fn disks_are_private_copies_and_are_removed() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let template = put(&store, "base", 7, false).unwrap();
    let (one, two) = (sandbox(1), sandbox(2));
    let disk = store.create_disk(&template, &one).unwrap();
    let other = store.create_disk(&template, &two).unwrap();
    disk.write_all_at(&[9; 512], 0).unwrap();
    let mut bytes = [0; 512];
    for untouched in [&other, &template.open_disk().unwrap().unwrap()] {
        untouched.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [7; 512]);
    }
    let path = dir.join("sandboxes").join(one.as_str()).join("disk");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let flags = rustix::io::fcntl_getfd(&disk).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));

    let error = store.create_disk(&template, &one).unwrap_err();
    assert!(matches!(error, StorageError::SandboxExists(id) if id == one), "{error}");
    store.remove_sandbox(&one).unwrap();
    store.remove_sandbox(&one).unwrap();
    assert_eq!(names_in(&dir.join("sandboxes")), [two.as_str()]);
    assert_eq!(store.sweep_sandboxes().unwrap(), 1);
    assert_eq!(store.sweep_sandboxes().unwrap(), 0);
}

#[test]
fn a_template_without_a_disk_gives_none() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let spec = spec("tiny", 1);
    let staging = store.stage(&spec.name, false).unwrap();
    staging.create_part(Part::Kernel).unwrap().write_all(b"kernel").unwrap();
    let template = staging.commit(&spec).unwrap();
    assert_eq!(template.manifest().ready, ReadyWhen::Console);
    assert!(template.open_initramfs().unwrap().is_none());
    let error = store.create_disk(&template, &sandbox(1)).unwrap_err();
    assert!(matches!(error, StorageError::NoDisk { .. }), "{error}");
    assert!(names_in(&dir.join("sandboxes")).is_empty());
}

#[test]
fn a_template_without_a_kernel_is_not_committed() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let spec = spec("tiny", 1);
    let staging = store.stage(&spec.name, false).unwrap();
    staging.create_part(Part::Disk).unwrap().write_all(&[1; 512]).unwrap();
    let error = staging.commit(&spec).unwrap_err();
    assert!(error.to_string().contains("kernel"), "{error}");
    assert!(names_in(&dir.join("templates")).is_empty());
    assert!(store.templates().unwrap().is_empty());
}

#[test]
fn damage_is_told_and_does_not_hide_the_others() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let bad = put(&store, "bad", 1, false).unwrap();
    let good = put(&store, "good", 2, false).unwrap();
    let home = dir.join("templates").join(&bad.manifest().id);
    let manifest = home.join("manifest");
    let mut bytes = fs::read(&manifest).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x10;
    fs::write(&manifest, &bytes).unwrap();
    let listed = store.templates().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].manifest(), good.manifest());
    let error = store.find_template("bad").unwrap_err();
    assert!(chain(&error).contains("checksum"), "{}", chain(&error));

    // The manifest of another template in its place.
    let other = dir.join("templates").join(&good.manifest().id).join("manifest");
    fs::copy(other, &manifest).unwrap();
    let error = store.find_template("bad").unwrap_err();
    assert!(chain(&error).contains("another template"), "{}", chain(&error));

    fs::remove_file(&manifest).unwrap();
    let error = store.find_template("bad").unwrap_err();
    assert!(chain(&error).contains("missing"), "{}", chain(&error));
    // Not swept as rubbish: its name still points there. It can be deleted.
    let store = Store::open(dir.path()).unwrap();
    assert!(home.exists());
    assert!(store.delete_template(&"bad".parse().unwrap()).unwrap());
    assert!(!home.exists());
}

#[test]
fn names_that_point_elsewhere_are_refused() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    for target in ["../../etc", "/etc", "short"] {
        let link = dir.join("names/evil");
        std::os::unix::fs::symlink(target, &link).unwrap();
        let error = store.find_template("evil").unwrap_err();
        assert!(chain(&error).contains("does not point at"), "{}", chain(&error));
        assert!(store.templates().unwrap().is_empty());
        fs::remove_file(link).unwrap();
    }
}

#[test]
fn a_part_that_is_a_symlink_or_shrank_is_not_opened() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let template = put(&store, "base", 1, false).unwrap();
    let kernel = dir.join("templates").join(&template.manifest().id).join("kernel");
    fs::OpenOptions::new().write(true).open(&kernel).unwrap().set_len(100).unwrap();
    let error = template.open_kernel().unwrap_err();
    assert!(matches!(error, StorageError::Part { part: "kernel", .. }), "{error}");
    fs::remove_file(&kernel).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &kernel).unwrap();
    assert!(matches!(template.open_kernel(), Err(StorageError::Io { .. })));
}

#[test]
fn start_up_removes_what_was_never_committed_but_not_while_another_writes() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let spec = spec("base", 1);
    let staging = store.stage(&spec.name, false).unwrap();
    staging.create_part(Part::Kernel).unwrap().write_all(b"kernel").unwrap();

    // A second process opens the store in the middle of that.
    let second = Store::open(dir.path()).unwrap();
    assert_eq!(names_in(&dir.join("templates")).len(), 1, "the writer's files are still there");
    assert!(second.templates().unwrap().is_empty());
    staging.commit(&spec).unwrap();
    assert_eq!(second.templates().unwrap().len(), 1);

    fs::create_dir(dir.join("templates").join("0".repeat(20))).unwrap();
    std::os::unix::fs::symlink("0".repeat(20), dir.join("names/.base.00")).unwrap();
    Store::open(dir.path()).unwrap();
    assert_eq!(names_in(&dir.join("templates")).len(), 1);
    assert_eq!(names_in(&dir.join("names")), ["base"]);
}

#[test]
fn two_writers_take_turns_and_readers_never_wait_or_miss() {
    const ROUNDS: u8 = 25;
    let dir = TempDir::new();
    put(&Store::open(dir.path()).unwrap(), "base", 0, false).unwrap();
    std::thread::scope(|scope| {
        let writers: Vec<_> = [1, 100]
            .map(|first| {
                // Each opens the store itself, as a process of its own would.
                let root = dir.path();
                scope.spawn(move || {
                    for n in 0..ROUNDS {
                        let store = Store::open(root).unwrap();
                        put(&store, "base", first + n, true).unwrap();
                    }
                })
            })
            .into();
        let store = Store::open(dir.path()).unwrap();
        let mut seen = 0;
        while !writers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            let found = store.find_template("base").unwrap();
            assert!(found.is_some(), "a name is never absent while it is replaced");
            assert_eq!(store.templates().unwrap().len(), 1);
            seen += 1;
        }
        assert!(seen > 0);
    });
    assert_eq!(names_in(&dir.join("templates")).len(), 1);
}

/// A file system of one and a half MiB; unmounted when dropped.
struct SmallFileSystem(TempDir);

impl SmallFileSystem {
    fn mount() -> Option<Self> {
        let dir = TempDir::new();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1536k", "tmpfs"])
            .arg(dir.path())
            .output()
            .unwrap();
        if !mount.status.success() {
            println!("skipped: mounting a small file system needs root");
            return None;
        }
        Some(Self(dir))
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let umount = std::process::Command::new("umount").arg(self.0.path()).status().unwrap();
        // Not a second panic while a failed test unwinds.
        if !umount.success() {
            println!("could not unmount {}", self.0.path().display());
        }
        fs::create_dir_all(self.0.path()).unwrap();
    }
}

#[test]
fn a_full_disk_is_told_and_leaves_no_half_disk() {
    let Some(small) = SmallFileSystem::mount() else { return };
    let root = small.0.path();
    let store = Store::open(root).unwrap();
    let spec = spec("big", 1);
    let staging = store.stage(&spec.name, false).unwrap();
    staging.create_part(Part::Kernel).unwrap().write_all(b"kernel").unwrap();
    staging.create_part(Part::Disk).unwrap().write_all(&[1; 1 << 20]).unwrap();
    let template = staging.commit(&spec).unwrap();
    let error = store.create_disk(&template, &sandbox(1)).unwrap_err();
    assert!(matches!(error, StorageError::NoSpace { .. }), "{error}");
    assert!(error.to_string().contains("free some space"), "{error}");
    assert!(names_in(&root.join("sandboxes")).is_empty());

    // A template that does not fit leaves nothing either.
    let staging = store.stage(&"next".parse().unwrap(), false).unwrap();
    let source = root.join("templates").join(&template.manifest().id).join("disk");
    let error = staging.copy_part(Part::Disk, &source).unwrap_err();
    assert!(matches!(error, StorageError::NoSpace { .. }), "{error}");
    drop(staging);
    assert_eq!(names_in(&root.join("templates")), [template.manifest().id.as_str()]);
}
