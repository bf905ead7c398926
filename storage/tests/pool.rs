//! A pool on a real loop device, and the store on it: clones share extents, and stay in few.
//!
//! Called by `cargo test`. Needs root, loop devices and `mkfs.xfs`. Without them it says that it is
//! skipped; with `REQUIRE_XFS=1` it fails instead.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use mica_storage::{
    Pool, PoolCreated, PoolError, Reflink, StorageError, Store, pools, reflink_support,
};
use mica_units::SandboxId;

/// A directory that goes away, and a pool in it.
struct Bench {
    dir: PathBuf,
    pool: Pool,
}

impl Bench {
    fn new(name: &str) -> Option<Self> {
        let missing = why_not();
        if let Some(missing) = missing {
            let required = std::env::var_os("REQUIRE_XFS").is_some_and(|value| value == "1");
            assert!(!required, "REQUIRE_XFS=1, and {missing}");
            eprintln!("skipped: {missing}");
            return None;
        }
        let dir = std::env::temp_dir().join(format!("mica-pool-{name}-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let pool = Pool::at(&dir.join("a pool"), None).unwrap();
        Some(Self { dir, pool })
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if self.pool.image().exists() {
            self.pool.remove().unwrap();
        }
        fs::remove_dir_all(&self.dir).unwrap();
    }
}

fn why_not() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("making a pool needs root");
    }
    if !Path::new("/dev/loop-control").exists() {
        return Some("there are no loop devices");
    }
    let mkfs = Command::new("mkfs.xfs").arg("-V").output();
    mkfs.is_err().then_some("mkfs.xfs is not installed")
}

const SIZE: u64 = 400 << 20;

#[test]
fn a_pool_is_made_once_found_mounted_again_and_removed() {
    let Some(bench) = Bench::new("life") else { return };
    let pool = &bench.pool;
    assert!(matches!(pool.create(1 << 20), Err(PoolError::TooSmall(_))));
    assert!(matches!(pool.remove(), Err(PoolError::NoPool { .. })));
    assert_eq!(pool.create(SIZE).unwrap(), PoolCreated::Made);
    assert_eq!(pool.create(SIZE).unwrap(), PoolCreated::AlreadyThere);
    let blocks = fs::metadata(pool.image()).unwrap().blocks();
    assert!(blocks * 512 >= SIZE, "the image is sparse: {blocks} blocks");
    assert_eq!(reflink_support(pool.mount()).unwrap(), Reflink::Clones);
    let listed = pools().unwrap();
    let found = listed.iter().find(|info| info.mount == pool.mount()).unwrap();
    assert_eq!(found.image, pool.image());
    assert!(found.bytes > SIZE / 2 && found.free_bytes < found.bytes);

    fs::write(pool.mount().join("kept"), "x").unwrap();
    let busy = File::open(pool.mount().join("kept")).unwrap();
    assert!(matches!(pool.remove(), Err(PoolError::Storage(StorageError::Io { .. }))), "in use");
    assert!(pool.image().exists());
    drop(busy);
    // As after a restart of the machine.
    rustix::mount::unmount(pool.mount(), rustix::mount::UnmountFlags::empty()).unwrap();
    assert_eq!(pool.create(SIZE).unwrap(), PoolCreated::Mounted);
    assert_eq!(fs::read_to_string(pool.mount().join("kept")).unwrap(), "x");
    pool.remove().unwrap();
    assert!(!pool.image().exists());
    assert!(pools().unwrap().iter().all(|info| info.mount != pool.mount()));
}

#[test]
fn what_is_not_a_pool_is_not_touched() {
    let Some(bench) = Bench::new("foreign") else { return };
    let pool = &bench.pool;
    fs::write(pool.mount().join("mine"), "x").unwrap();
    assert!(matches!(pool.create(SIZE), Err(PoolError::NotEmpty(_))));
    fs::remove_file(pool.mount().join("mine")).unwrap();
    fs::write(pool.image(), "mine").unwrap();
    assert!(matches!(pool.create(SIZE), Err(PoolError::ForeignImage(_))));
    assert!(matches!(pool.remove(), Err(PoolError::ForeignImage(_))));
    assert_eq!(fs::read_to_string(pool.image()).unwrap(), "mine");
    fs::remove_file(pool.image()).unwrap();
    let proc = Pool::at(Path::new("/proc"), Some(pool.image())).unwrap();
    assert!(matches!(proc.create(SIZE), Err(PoolError::Occupied { .. })));
    let huge = pool.create(1 << 60).unwrap_err();
    assert!(matches!(huge, PoolError::Storage(_)), "{huge}");
    assert_eq!(fs::read_dir(&bench.dir).unwrap().count(), 1, "only the directory is there");
}

/// How many extents a file has, as filefrag(8) counts them.
fn extents(path: &Path) -> u32 {
    let out = Command::new("filefrag").arg(path).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let at = words.iter().position(|word| word.starts_with("extent")).unwrap();
    words[at - 1].parse().unwrap()
}

#[test]
fn disks_on_a_pool_are_clones_and_roll_back_in_place() {
    let Some(bench) = Bench::new("disks") else { return };
    bench.pool.create(SIZE).unwrap();
    let store = Store::open(&bench.pool.mount().join("store")).unwrap();
    let source_path = bench.pool.mount().join("source");
    let len = 64 << 20;
    fs::write(&source_path, vec![1; len]).unwrap();
    let source = File::open(&source_path).unwrap();
    source.sync_all().unwrap();
    let free =
        || pools().unwrap().iter().find(|p| p.mount == bench.pool.mount()).unwrap().free_bytes;
    let before = free();
    let sandbox = SandboxId::from_random([1; 20]);
    let disk = store.create_sandbox(&sandbox, Some(&source)).unwrap().unwrap();
    disk.sync_all().unwrap();
    assert!(before - free() < 8 << 20, "the data was copied");
    // All blocks of 2 MiB, out of order, each in the device before the next one comes.
    for n in 0..512u64 {
        disk.write_all_at(&[2; 4096], (n * 325 % 512) * 4096).unwrap();
        disk.sync_data().unwrap();
    }
    let path = store.root().join("sandboxes").join(sandbox.as_str()).join("disk");
    assert!(extents(&path) <= 20, "the disk fell into {} extents", extents(&path));
    let inode = disk.metadata().unwrap().ino();
    store.reclone_disk(&source, &disk).unwrap();
    let mut bytes = vec![0; len];
    disk.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 1));
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
}

#[test]
fn a_full_pool_is_told_and_harms_nothing() {
    let Some(bench) = Bench::new("full") else { return };
    bench.pool.create(POOL_MIN).unwrap();
    let store = Store::open(&bench.pool.mount().join("store")).unwrap();
    let free = pools().unwrap().iter().find(|p| p.mount == bench.pool.mount()).unwrap().free_bytes;
    let staging = store.stage_snapshot("aaaaaaaaaaaaaaaaaaaa").unwrap();
    let (layer, file) = staging.create_layer().unwrap();
    let file = mica_storage::BlockingFile::new(file);
    let frames = u32::try_from(free / 4096 * 2).unwrap();
    let mut writer = mica_storage::PackedWriter::new(file, layer, frames);
    let full = mica_storage::run_blocking(writer.allocate(frames, 1)).unwrap_err();
    assert!(matches!(full, StorageError::NoSpace { .. }), "{full}");
    drop((writer, staging));
    assert_eq!(fs::read_dir(store.root().join("snapshots")).unwrap().count(), 0);
    fs::write(bench.pool.mount().join("there is room again"), vec![1; 1 << 20]).unwrap();
}

const POOL_MIN: u64 = mica_storage::POOL_BYTES_MIN;
