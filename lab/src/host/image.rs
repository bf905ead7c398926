//! The emulated host's root file system and kernel, built once and cached by what went in.
//!
//! `up` calls `ensure`. The root is made by debootstrap and mkfs.ext4 from packages of the
//! distribution; the kernel package is unpacked into it without being configured, since the host
//! boots without an initramfs. A build works in a directory of its own and is renamed into place
//! as its last act, so an interrupted one leaves nothing that could be taken for an image.
//! Nothing is downloaded except through the distribution's own tools.

use super::apt::{self, Kernel, SUITE};
use super::{progress, run};
use anyhow::{Context as _, Result, ensure};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Changed by hand when the steps below change in a way that the inputs do not show.
const BUILDER_VERSION: u32 = 3;

/// Beyond debootstrap's minbase. libhwloc15 is linked by the daemon; tini reaps orphans.
const PACKAGES: [&str; 8] =
    ["kmod", "iproute2", "xfsprogs", "procps", "util-linux", "numactl", "libhwloc15", "tini"];

const INIT: &str = include_str!("init.sh");

/// What the init script mounts with one call. Debian's kernel leaves even /dev to it.
const FSTAB: &str = "\
proc /proc proc nosuid,nodev,noexec 0 0
sysfs /sys sysfs nosuid,nodev,noexec 0 0
devtmpfs /dev devtmpfs nosuid,mode=755 0 0
devpts /dev/pts devpts nosuid,noexec,gid=5,mode=620,ptmxmode=666,X-mount.mkdir 0 0
tmpfs /dev/shm tmpfs nosuid,nodev,X-mount.mkdir 0 0
tmpfs /run tmpfs nosuid,nodev,mode=755 0 0
tmpfs /tmp tmpfs nosuid,nodev 0 0
cgroup2 /sys/fs/cgroup cgroup2 nosuid,nodev,noexec 0 0
";

/// Sparse; what is written to it lives in an overlay that goes with the lab.
const ROOT_MIB: u32 = 4096;

/// The root is a partition, not a bare file system: without an initramfs the kernel finds a root
/// only by a device name or a partition's id, and it names NVMe drives in no fixed order.
const PARTITION_START: u32 = 1024 * 1024;
const DISK_SIGNATURE: u32 = 0x4d49_4341;

/// What the kernel calls that partition.
pub fn root_partuuid() -> String {
    format!("{DISK_SIGNATURE:08x}-01")
}

/// Documentation and translations, which nobody reads in the host.
const LEFT_OUT: [&str; 4] =
    ["usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt/archives"];

/// What a directory in the making is called.
const UNFINISHED: &str = "building-";

/// A built image: where its two files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub directory: PathBuf,
    pub kernel_release: String,
}

impl Image {
    pub fn root(&self) -> PathBuf {
        self.directory.join("root.ext4")
    }
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }
}

/// Everything that decides what the image will be, in two stages: installing packages takes a
/// minute and changes rarely, packing a root takes seconds and changes with the init script.
#[derive(Debug, Clone)]
struct Inputs {
    kernel: Kernel,
}

impl Inputs {
    /// One line per input of the installed tree; its digest names the cached directory.
    fn describe_base(&self) -> String {
        format!(
            "builder {BUILDER_VERSION}\nsuite {SUITE}\npackages {}\nleft out {}\nkernel {} {}\n",
            PACKAGES.join(" "),
            LEFT_OUT.join(" "),
            self.kernel.package,
            self.kernel.version,
        )
    }

    fn describe(&self) -> String {
        format!(
            "{}root MiB {ROOT_MIB}\ninit {}\nfstab {}\n",
            self.describe_base(),
            hex_digest(INIT.as_bytes()),
            hex_digest(FSTAB.as_bytes()),
        )
    }

    fn base_name(&self) -> String {
        format!("base-{}", &hex_digest(self.describe_base().as_bytes())[..16])
    }

    fn image_name(&self) -> String {
        format!("image-{}", &hex_digest(self.describe().as_bytes())[..16])
    }
}

/// SHA-256 in hex.
pub fn hex_digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `MICA_CACHE_DIR`, else `/var/cache/mica`; the lab's part of it.
pub fn cache_directory() -> PathBuf {
    std::env::var_os("MICA_CACHE_DIR")
        .map_or_else(|| PathBuf::from("/var/cache/mica"), PathBuf::from)
        .join("lab")
}

/// The cached image of the newest kernel, built now if it is not there.
pub fn ensure() -> Result<Image> {
    let kernel = apt::newest_kernel()?;
    let kernel_release = kernel.release().to_owned();
    let inputs = Inputs { kernel };
    let cache = cache_directory();
    let image = Image { directory: cache.join(inputs.image_name()), kernel_release };
    if image.root().is_file() {
        return Ok(image);
    }
    ensure!(
        rustix::process::geteuid().is_root(),
        "building the lab's image needs root (debootstrap does); run this as root once"
    );
    fs::create_dir_all(&cache).with_context(|| format!("make {}", cache.display()))?;
    let lock = File::create(cache.join("lock")).context("open the image cache's lock")?;
    flock(&lock, FlockOperation::LockExclusive).context("lock the image cache")?;
    sweep(&cache)?;
    let built = build(&inputs, &cache);
    if built.is_err() {
        sweep(&cache).context("clean up after a failed build")?;
    }
    built.context("build the host image")?;
    Ok(image)
}

/// Both stages, each made under a temporary name and renamed when it is whole.
fn build(inputs: &Inputs, cache: &Path) -> Result<()> {
    let base = cache.join(inputs.base_name());
    if !base.is_dir() {
        progress::say(&format!(
            "building the host image ({SUITE}, {}); one to two minutes, once",
            inputs.kernel.package
        ));
        stage(&base, |work| install(inputs, work))?;
    }
    let image = cache.join(inputs.image_name());
    if image.is_dir() {
        return Ok(()); // Somebody else made it while we waited for the lock.
    }
    stage(&image, |work| pack(inputs, &base, work))
}

fn stage(result: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = result.file_name().context("a stage has a name")?.to_string_lossy().into_owned();
    let work = result.with_file_name(format!("{UNFINISHED}{name}"));
    fs::create_dir_all(&work).with_context(|| format!("make {}", work.display()))?;
    make(&work)?;
    fs::rename(&work, result).with_context(|| format!("rename to {}", result.display()))
}

/// Removes what an interrupted build left. Its mounts are gone with its mount namespace.
fn sweep(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache).with_context(|| format!("list {}", cache.display()))? {
        let entry = entry.with_context(|| format!("list {}", cache.display()))?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            let path = entry.path();
            fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// The first stage: an installed tree and the kernel.
fn install(inputs: &Inputs, work: &Path) -> Result<()> {
    let root = work.join("root");
    fs::create_dir_all(&root).with_context(|| format!("make {}", root.display()))?;
    install_packages(&root)?;
    install_kernel(&inputs.kernel, work, &root)?;
    for name in LEFT_OUT {
        let path = root.join(name);
        if path.is_dir() {
            fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// The second stage: the tree with its configuration, as a drive. The tree is written to in place,
/// the same files each time, under the cache's lock.
fn pack(inputs: &Inputs, base: &Path, work: &Path) -> Result<()> {
    let root = base.join("root");
    configure(&root)?;
    let image = work.join("root.ext4");
    run::watched(
        "pack the root file system",
        Command::new("mkfs.ext4")
            .args(["-q", "-F", "-L", "mica-root", "-O", "^has_journal", "-m", "0"])
            .args(["-E", &format!("offset={PARTITION_START}"), "-d"])
            .arg(&root)
            .arg(&image)
            .arg(format!("{ROOT_MIB}M")),
    )?;
    write_partition_table(&image)?;
    fs::copy(base.join("vmlinuz"), work.join("vmlinuz")).context("copy the kernel")?;
    let note = work.join("inputs.txt");
    fs::write(&note, inputs.describe()).with_context(|| format!("write {}", note.display()))
}

/// Gives the image its length and a partition table with the one partition.
fn write_partition_table(image: &Path) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let file = OpenOptions::new().write(true).open(image)?;
        file.set_len(u64::from(PARTITION_START) + (u64::from(ROOT_MIB) << 20))?;
        file.write_all_at(&partition_table(), 0)
    };
    write().context("write the image's partition table")
}

/// A classic master boot record: a signature, one Linux partition, the magic at its end.
fn partition_table() -> [u8; 512] {
    const SECTOR: u32 = 512;
    let mut record = [0_u8; 512];
    record[440..444].copy_from_slice(&DISK_SIGNATURE.to_le_bytes());
    let entry = &mut record[446..462];
    entry[4] = 0x83;
    entry[8..12].copy_from_slice(&(PARTITION_START / SECTOR).to_le_bytes());
    entry[12..16].copy_from_slice(&(ROOT_MIB * (1024 * 1024 / SECTOR)).to_le_bytes());
    record[510..].copy_from_slice(&[0x55, 0xaa]);
    record
}

/// In a mount namespace of its own: whatever debootstrap mounts goes away with it.
fn install_packages(root: &Path) -> Result<()> {
    let mirror = apt::mirror()?;
    run::watched(
        "install packages (debootstrap)",
        Command::new("unshare")
            .args(["--mount", "--propagation", "private", "debootstrap", "--variant=minbase"])
            .arg(format!("--include={}", PACKAGES.join(",")))
            .arg(SUITE)
            .arg(root)
            .arg(mirror)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

/// The modules are unpacked here once, since emulated code would take seconds for it at each boot.
fn install_kernel(kernel: &Kernel, work: &Path, root: &Path) -> Result<()> {
    run::watched(
        "download the kernel package",
        Command::new("apt-get")
            .args(["download", "-q", "-o", "APT::Sandbox::User=root"])
            .arg(format!("{}={}", kernel.package, kernel.version))
            .current_dir(work),
    )?;
    let archive = fs::read_dir(work)
        .context("list the build directory")?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get downloaded no .deb file")?;
    let unpacked = work.join("kernel");
    run::watched(
        "unpack the kernel package",
        Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(&unpacked),
    )?;
    let release = kernel.release();
    fs::rename(unpacked.join("boot").join(format!("vmlinuz-{release}")), work.join("vmlinuz"))
        .context("take the kernel out of its package")?;
    let modules = root.join("usr/lib/modules");
    fs::create_dir_all(&modules).context("make the module directory")?;
    fs::rename(unpacked.join("lib/modules").join(release), modules.join(release))
        .context("take the modules out of the kernel's package")?;
    fs::remove_dir_all(&unpacked).context("remove the unpacked kernel package")?;
    fs::remove_file(&archive).context("remove the kernel package")?;
    run::watched(
        "unpack the modules",
        Command::new("find").arg(modules.join(release)).args([
            "-name",
            "*.ko.xz",
            "-exec",
            "xz",
            "--decompress",
            "{}",
            "+",
        ]),
    )?;
    run::watched("index the modules", Command::new("chroot").arg(root).args(["depmod", release]))
}

fn configure(root: &Path) -> Result<()> {
    let init = root.join("usr/sbin/mica-init");
    fs::write(&init, INIT).context("write the init script")?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).context("set its mode")?;
    for (name, text) in [
        ("etc/hostname", "mica-lab\n"),
        ("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 mica-lab\n"),
        ("etc/resolv.conf", "nameserver 10.0.2.3\n"),
        ("etc/fstab", FSTAB),
    ] {
        fs::write(root.join(name), text).with_context(|| format!("write /{name}"))?;
    }
    for name in ["opt/mica", "var/lib/mica"] {
        fs::create_dir_all(root.join(name)).with_context(|| format!("make /{name}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(package: &str, version: &str) -> Inputs {
        Inputs { kernel: Kernel { package: package.to_owned(), version: version.to_owned() } }
    }

    #[test]
    fn the_names_follow_each_input_and_nothing_else() {
        let one = inputs("linux-image-6.12.1", "6.12.1-1");
        let same = inputs("linux-image-6.12.1", "6.12.1-1");
        assert_eq!((one.base_name(), one.image_name()), (same.base_name(), same.image_name()));
        for other in
            [inputs("linux-image-6.12.1", "6.12.1-2"), inputs("linux-image-6.12.2", "6.12.1-1")]
        {
            assert_ne!(one.base_name(), other.base_name());
            assert_ne!(one.image_name(), other.image_name());
        }
        for package in PACKAGES {
            assert!(one.describe_base().contains(package));
        }
        assert!(one.describe().contains(&hex_digest(INIT.as_bytes())));
        assert!(!one.describe_base().contains(&hex_digest(INIT.as_bytes())));
    }

    #[test]
    fn a_failed_stage_leaves_nothing_that_could_be_taken_for_its_result() {
        let cache = std::env::temp_dir().join(format!("mica-stage-{}", std::process::id()));
        fs::create_dir_all(&cache).unwrap();
        let result = cache.join("image-1");
        let failed = stage(&result, |work| {
            fs::write(work.join("half"), "x").unwrap();
            anyhow::bail!("broken")
        });
        assert!(failed.is_err() && !result.exists());
        sweep(&cache).unwrap();
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 0);
        stage(&result, |work| fs::write(work.join("whole"), "x").context("write")).unwrap();
        assert!(result.join("whole").is_file());
        fs::remove_dir_all(&cache).unwrap();
    }

    #[test]
    fn a_digest_is_sha_256() {
        assert_eq!(
            hex_digest(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn the_partition_lies_where_the_file_system_was_made() {
        let record = partition_table();
        assert_eq!(record[446 + 8..446 + 12], 2048_u32.to_le_bytes());
        assert_eq!(record[446 + 12..446 + 16], (4096_u32 * 2048).to_le_bytes());
        assert_eq!(record[510..], [0x55, 0xaa]);
        assert_eq!(root_partuuid(), "4d494341-01");
    }

    #[test]
    fn the_init_script_finds_each_drive_by_its_serial() {
        for serial in ["mica-tools", "mica-store"] {
            assert!(INIT.contains(&format!("drive {serial}")), "{serial}");
        }
    }
}
