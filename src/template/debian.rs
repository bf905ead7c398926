//! What the machine's own package manager knows: mirrors, proxies, the newest kernel.
//!
//! Called by the build. Refuses to guess: everything is asked of apt's configuration, so a build
//! uses the mirrors and proxies the machine already uses.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::runner::Runner;

/// The Debian release templates are built from.
pub const SUITE: &str = "bookworm";

/// Where the packages of [`SUITE`] come from on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirrors {
    /// The address and release name of each repository; the first is the main one.
    repositories: Vec<(String, String)>,
}

impl Mirrors {
    /// Reads them from apt's configuration.
    ///
    /// # Errors
    /// When apt has no repository of [`SUITE`].
    pub fn of_this_machine(runner: &Runner) -> Result<Self> {
        let mut command = Command::new("apt-get");
        command.args(["indextargets", "--format", "$(IDENTIFIER) $(SITE) $(RELEASE)"]);
        Self::parse(&runner.output(command)?)
    }

    fn parse(targets: &str) -> Result<Self> {
        let mut repositories = Vec::new();
        for line in targets.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let ["Packages", site, release] = words[..] else { continue };
            let of_suite = release == SUITE
                || release
                    .strip_prefix(SUITE)
                    .is_some_and(|rest| matches!(rest, "-updates" | "-security" | "/updates"));
            let entry = (site.to_owned(), release.to_owned());
            if of_suite && !repositories.contains(&entry) {
                repositories.push(entry);
            }
        }
        repositories.sort_by_key(|(_, release)| release != SUITE);
        match repositories.first() {
            Some((_, release)) if release == SUITE => Ok(Self { repositories }),
            _ => bail!(
                "apt on this machine has no `{SUITE}` repository; add Debian 12's to \
                 /etc/apt/sources.list.d and run `apt-get update`"
            ),
        }
    }

    /// The address of the main repository.
    pub fn main(&self) -> &str {
        self.repositories.first().map_or("", |(site, _)| site)
    }

    /// The lines of a sources.list for the root file system.
    pub fn sources_list(&self) -> String {
        let line = |(site, release): &(String, String)| format!("deb {site} {release} main\n");
        self.repositories.iter().map(line).collect()
    }
}

/// apt's own proxy settings, as configuration lines; empty where it has none.
pub fn proxy_config(runner: &Runner) -> Result<String> {
    let mut command = Command::new("apt-config");
    command.args(["dump"]);
    let dump = runner.output(command)?;
    let wanted = |line: &&str| {
        let name = line.split_whitespace().next().unwrap_or_default().to_ascii_lowercase();
        name.starts_with("acquire::http") && name.contains("::proxy")
    };
    Ok(dump.lines().filter(wanted).collect::<Vec<_>>().join("\n"))
}

/// A kernel package.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelPackage {
    /// The package's name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// The newest signed 6.12 cloud kernel that apt can get.
///
/// # Errors
/// When it knows none.
pub fn newest_kernel(runner: &Runner) -> Result<KernelPackage> {
    let mut command = Command::new("apt-cache");
    command.args(["pkgnames", "linux-image-6.12."]);
    let Some(name) = newest_of(&runner.output(command)?) else {
        bail!(
            "apt knows no linux-image-6.12.*-cloud-amd64 package; run `apt-get update`, and see \
             that {SUITE}-security is among its repositories"
        );
    };
    let mut command = Command::new("apt-cache");
    command.args(["show", "--no-all-versions", &name]);
    let shown = runner.output(command)?;
    let version = shown
        .lines()
        .find_map(|line| line.strip_prefix("Version: "))
        .with_context(|| format!("apt-cache shows no version of {name}"))?;
    Ok(KernelPackage { name, version: version.trim().to_owned() })
}

fn newest_of(names: &str) -> Option<String> {
    let patch = |name: &str| -> Option<u32> {
        let middle = name.strip_prefix("linux-image-6.12.")?.strip_suffix("-cloud-amd64")?;
        middle.split('+').next()?.parse().ok()
    };
    names.lines().filter_map(|name| Some((patch(name)?, name))).max().map(|(_, n)| n.to_owned())
}

/// Whether `name` is the name of a Debian package, perhaps with `=version`.
pub fn is_package(name: &str) -> bool {
    let (name, version) = name.split_once('=').unwrap_or((name, "0"));
    let head = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    name.len() >= 2
        && name.bytes().next().is_some_and(head)
        && name.bytes().all(|b| head(b) || b"+-.".contains(&b))
        && !version.is_empty()
        && version.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.:~".contains(&b))
}

/// Whether `text` is a requirement that pip may be given: a name, extras and versions, but no
/// option, no path and no address.
pub fn is_requirement(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-[]=<>!~+".contains(&b);
    text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric()) && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_come_from_apts_own_list() {
        let targets = "Packages http://a.example/debian bookworm-updates\n\
             Packages http://a.example/debian bookworm\n\
             DEP-11 http://a.example/debian bookworm\n\
             Packages http://s.example/debian-security bookworm-security\n\
             Packages http://n.example nodistro\n\
             Packages http://a.example/debian bookworm-backports\n";
        let mirrors = Mirrors::parse(targets).unwrap();
        assert_eq!(mirrors.main(), "http://a.example/debian");
        assert_eq!(
            mirrors.sources_list(),
            "deb http://a.example/debian bookworm main\n\
             deb http://a.example/debian bookworm-updates main\n\
             deb http://s.example/debian-security bookworm-security main\n"
        );
        assert!(Mirrors::parse("Packages http://t.example trixie\n").is_err());
    }

    #[test]
    fn the_newest_kernel_is_the_highest_number() {
        let names = "linux-image-6.12.9+deb12-cloud-amd64\n\
             linux-image-6.12.117+deb12-cloud-amd64\n\
             linux-image-6.12.118+deb12-amd64\n\
             linux-image-6.12.119+deb12-cloud-amd64-unsigned\n\
             linux-image-6.12.43+deb12-cloud-amd64\n";
        assert_eq!(newest_of(names).as_deref(), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(newest_of("linux-image-6.1.0-1-cloud-amd64\n"), None);
    }

    #[test]
    fn options_do_not_pass_as_names() {
        for good in ["git", "g++", "python3.11", "libc6=2.36-9+deb12u1"] {
            assert!(is_package(good), "{good}");
        }
        for bad in ["", "-y", "a", "../x", "a b", "git=", "Git", "git;rm"] {
            assert!(!is_package(bad), "{bad}");
        }
        for good in ["numpy", "numpy==2.0", "pandas[excel]>=2", "e2b_charts"] {
            assert!(is_requirement(good), "{good}");
        }
        for bad in ["", "-r", "--index-url", "./x", "a/b", "git+https://h/x", "a b", "a;b"] {
            assert!(!is_requirement(bad), "{bad}");
        }
    }
}
