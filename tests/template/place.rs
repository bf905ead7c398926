//! Where `mica template` runs in these tests: a store, a cache and an agent of its own, and scripts in place of the
//! programs that would ask the network.
//!
//! Called by the tests beside it. Refuses to leave anything behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory with a store, a cache, an agent, and scripts in place of apt and debootstrap.
pub struct Place(pub PathBuf);

impl Place {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let place = Self(std::env::temp_dir().join(format!("mica-cli-{}-{n}", std::process::id())));
        fs::create_dir_all(place.path("bin")).unwrap();
        fs::write(place.path("agent"), static_program()).unwrap();
        place.script("apt-cache", APT_CACHE);
        place.script("apt-config", "#!/bin/sh\n");
        place.script("apt-get", APT_GET);
        place.script("debootstrap", DEBOOTSTRAP);
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn script(&self, name: &str, text: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    pub fn mica(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
        let path = std::env::var("PATH").unwrap();
        command
            .arg("template")
            .args(args)
            .args(["--store".as_ref(), self.path("store").as_os_str()])
            .env("MICA_CACHE_DIR", self.path("cache"))
            .env("PATH", format!("{}:{path}", self.path("bin").display()));
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.mica(args).output().unwrap()
    }

    pub fn build(&self) -> Command {
        let agent = self.path("agent");
        self.mica(&["build", "--name", "base", "--guest-binary", agent.to_str().unwrap()])
    }

    /// Fails unless nothing of a build is left: no mount, no process, no directory, no template.
    pub fn assert_nothing_left(&self) {
        let here = self.0.to_str().unwrap();
        for process in fs::read_dir("/proc").unwrap().flatten() {
            // A process may end while it is looked at: what cannot be read is gone.
            let mounts = fs::read_to_string(process.path().join("mountinfo")).unwrap_or_default();
            assert!(!mounts.contains(here), "{} still has {mounts}", process.path().display());
        }
        assert_eq!(names(&self.path("cache/templates/tmp")), [""; 0]);
        assert_eq!(names(&self.path("store/templates")), [""; 0]);
        assert_eq!(names(&self.path("store/names")), [""; 0]);
        let stages = names(&self.path("cache/templates/stages"));
        assert!(stages.iter().all(|s| s.starts_with("kernel-") || s.starts_with("initramfs-")));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// A kernel package with all its drivers built in.
const APT_GET: &str = r#"#!/bin/sh
set -eu
case $1 in
indextargets) echo "Packages http://mirror.invalid/debian bookworm" ;;
download)
    mkdir -p pkg/DEBIAN pkg/boot pkg/lib/modules/6.12
    printf 'Package: k\nVersion: 1\nArchitecture: amd64\nMaintainer: t <t@t>\nDescription: t\n' \
        >pkg/DEBIAN/control
    echo a kernel >pkg/boot/vmlinuz-6.12
    for module in virtio virtio_ring virtio_mmio virtio_blk vsock \
        vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport rng-core virtio-rng \
        virtio_balloon; do
        echo "kernel/$module.ko"
    done >pkg/lib/modules/6.12/modules.builtin
    dpkg-deb -b pkg k.deb >/dev/null
    rm -r pkg ;;
esac
"#;

const APT_CACHE: &str = r#"#!/bin/sh
case $1 in
pkgnames) echo linux-image-6.12.5+deb12-cloud-amd64 ;;
show) echo "Version: 6.12.5-1" ;;
esac
"#;

/// Makes a root with a shell and nothing else. Opening the pipe stops the base recipe at its
/// first command, inside its namespaces and with all its mounts. A whole one has commands that do
/// nothing, so that the recipes get to their ends.
pub const DEBOOTSTRAP: &str = r#"#!/bin/sh
set -eu
root=$3
mkdir -p "$root/proc" "$root/run" "$root/tmp" "$root/dev" "$root/etc/apt" "$root/bin" \
    "$root/usr/sbin"
cp /bin/sh "$root/bin/sh"
for library in $(ldd /bin/sh | grep -o '/[^ ]*'); do
    mkdir -p "$root${library%/*}"
    cp "$library" "$root$library"
done
if [ -n "${WHOLE:-}" ]; then
    mkdir -p "$root/etc/dpkg/dpkg.cfg.d" "$root/etc/apt/apt.conf.d" "$root/etc/sudoers.d" \
        "$root/etc/default"
    for tool in apt-get cat chmod chown find ln mkdir rm useradd; do
        printf '#!/bin/sh\n' >"$root/bin/$tool"
        chmod 755 "$root/bin/$tool"
    done
fi
[ -z "${HANG:-}" ] || mkfifo "$root/usr/sbin/policy-rc.d"
"#;

/// The header of a static x86-64 program: as much of one as the build looks at.
pub fn static_program() -> Vec<u8> {
    let mut elf = vec![0; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[18] = 62;
    elf
}

pub fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

pub fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(out), String::from_utf8_lossy(err))
}

pub fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: a template build needs root");
    }
    root
}
