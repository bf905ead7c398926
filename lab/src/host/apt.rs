//! What the lab needs of the outer machine's package system.
//!
//! Called by image.rs and by `up`. It asks the machine's own apt configuration where packages come
//! from, so that the lab uses the mirror that the machine's owner chose. It installs nothing.

use super::run;
use anyhow::{Context as _, Result, bail, ensure};
use std::path::Path;
use std::process::Command;

/// The release that the lab's host is made of.
pub const SUITE: &str = "bookworm";

/// Programs that must be on the outer machine, with the package that has each.
const PROGRAMS: [(&str, &str); 11] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("debootstrap", "debootstrap"),
    ("mkfs.ext4", "e2fsprogs"),
    ("unshare", "util-linux"),
    ("chroot", "coreutils"),
    ("apt-get", "apt"),
    ("apt-cache", "apt"),
    ("dpkg-deb", "dpkg"),
    ("find", "findutils"),
    ("xz", "xz-utils"),
];

/// Fails with the command that installs what is missing.
pub fn check_programs() -> Result<()> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut places: Vec<&Path> = path.split(':').map(Path::new).collect();
    places.extend(["/usr/sbin", "/sbin"].map(Path::new));
    let found = |name: &str| places.iter().any(|place| place.join(name).is_file());
    let missing = missing_packages(&found);
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "the lab needs packages that this machine does not have; run: apt-get install -y {}",
        missing.join(" ")
    )
}

fn missing_packages(found: &dyn Fn(&str) -> bool) -> Vec<&'static str> {
    let mut missing: Vec<&str> =
        PROGRAMS.iter().filter(|(name, _)| !found(name)).map(|(_, package)| *package).collect();
    missing.dedup();
    missing
}

/// A kernel package of the distribution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// `linux-image-6.12.117+deb12-cloud-amd64`
    pub package: String,
    /// The version of the package, which changes when the kernel is rebuilt.
    pub version: String,
}

impl Kernel {
    /// What `uname -r` says: `6.12.117+deb12-cloud-amd64`.
    pub fn release(&self) -> &str {
        self.package.strip_prefix("linux-image-").unwrap_or(&self.package)
    }
}

/// The newest 6.12 cloud kernel that apt knows.
pub fn newest_kernel() -> Result<Kernel> {
    let pattern = r"^linux-image-6\.12\..*-cloud-amd64$";
    let text = run::capture(
        "list the kernel packages",
        Command::new("apt-cache").args(["search", "--names-only", pattern]),
    )?;
    let package = newest(&text).with_context(|| {
        format!(
            "apt knows no package {pattern}; the lab needs {SUITE} and its security updates as \
             package sources: check /etc/apt and run `apt-get update`"
        )
    })?;
    let shown = run::capture(
        "read the kernel package's version",
        Command::new("apt-cache").args(["show", "--no-all-versions", &package]),
    )?;
    let version = shown
        .lines()
        .find_map(|line| line.strip_prefix("Version: "))
        .with_context(|| format!("apt-cache shows no version of {package}"))?;
    Ok(Kernel { version: version.trim().to_owned(), package })
}

/// The newest of `apt-cache search` lines, by the numbers in its name.
fn newest(lines: &str) -> Option<String> {
    lines
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| !name.contains("unsigned") && !name.contains("dbg"))
        .max_by_key(|name| numbers(name))
        .map(str::to_owned)
}

fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// The mirror that debootstrap uses: `MICA_DEBIAN_MIRROR`, or what apt has for the suite.
pub fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("MICA_DEBIAN_MIRROR") {
        ensure!(mirror.contains("://"), "MICA_DEBIAN_MIRROR must be a URL, not {mirror:?}");
        return Ok(mirror);
    }
    let text = run::capture(
        "ask apt for its mirrors",
        Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI) $(CODENAME) $(COMPONENT)",
            "Identifier: Packages",
        ]),
    )?;
    pick_mirror(&text).with_context(|| {
        format!("apt has no source for {SUITE} main; set MICA_DEBIAN_MIRROR to a Debian mirror")
    })
}

fn pick_mirror(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (uri, codename, component) = (words.next()?, words.next()?, words.next()?);
        (codename == SUITE && component == "main").then(|| uri.trim_end_matches('/').to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_newest_by_number_not_by_letter() {
        let lines = "linux-image-6.12.9+deb12-cloud-amd64 - Linux\n\
                     linux-image-6.12.117+deb12-cloud-amd64 - Linux\n\
                     linux-image-6.12.200+deb12-cloud-amd64-unsigned - Linux\n\
                     linux-image-6.12.100+deb12-cloud-amd64 - Linux\n";
        assert_eq!(newest(lines).unwrap(), "linux-image-6.12.117+deb12-cloud-amd64");
        assert_eq!(newest(""), None);
    }

    #[test]
    fn the_mirror_is_the_suite_s_own_not_its_updates() {
        let targets = "http://a.example/debian-security/ bookworm-security main\n\
                       http://b.example/debian/ bookworm contrib\n\
                       http://c.example/debian/ bookworm main\n";
        assert_eq!(pick_mirror(targets).unwrap(), "http://c.example/debian");
        assert_eq!(pick_mirror("http://a.example/ trixie main\n"), None);
    }

    #[test]
    fn a_missing_program_names_its_package_once() {
        assert_eq!(missing_packages(&|name| !name.starts_with("apt-")), ["apt"]);
        assert!(missing_packages(&|_| true).is_empty());
    }
}
