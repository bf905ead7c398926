//! The three drives of one start: the root overlay, the tools drive and the store.
//!
//! `up` makes them before QEMU starts. The overlay and the tools drive are new each time; the store
//! is made once and kept, so that templates live through `down` and `up`.

use super::image::Image;
use super::state::{self, Home};
use super::{image, run};
use anyhow::{Context as _, Result};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Taken from the directory of programs when they are there. `mica-lab` itself always goes in.
pub const PROGRAMS: [&str; 4] = ["mica", "mica-vm", "mica-guest", "standin-vm"];

/// Where the tools drive is mounted in the host.
pub const TOOLS: &str = "/opt/mica";

const TOOLS_SPARE_MIB: u64 = 512;

/// The programs found beside one another: name → (path, digest).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs(pub BTreeMap<String, (PathBuf, String)>);

impl Programs {
    pub fn find(directory: &Path) -> Result<Programs> {
        let mut found = BTreeMap::new();
        for name in PROGRAMS {
            let path = directory.join(name);
            if path.is_file() {
                let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
                found.insert(name.to_owned(), (path, image::hex_digest(&bytes)));
            }
        }
        Ok(Programs(found))
    }

    pub fn digests(&self) -> BTreeMap<String, String> {
        self.0.iter().map(|(name, (_, digest))| (name.clone(), digest.clone())).collect()
    }

    /// The names that the host lacks or has in another version.
    pub fn changed_since(&self, in_host: &BTreeMap<String, String>) -> Vec<&str> {
        self.0
            .iter()
            .filter(|(name, (_, digest))| in_host.get(*name) != Some(digest))
            .map(|(name, _)| name.as_str())
            .collect()
    }
}

/// A fresh overlay: what the last start wrote to the root is gone.
pub fn make_root_overlay(home: &Home, image: &Image) -> Result<()> {
    state::remove(&home.root_overlay())?;
    run::capture(
        "make the root overlay",
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .arg(image.root())
            .arg(home.root_overlay()),
    )
    .map(drop)
}

/// The drive with the programs and secrets of this start.
pub fn make_tools(home: &Home, programs: &Programs, token: &str, key: &str) -> Result<()> {
    let tree = home.file("tools");
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("remove {}", tree.display()))?;
    }
    let bin = tree.join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("make {}", bin.display()))?;
    let own = std::env::current_exe().context("find the path of mica-lab itself")?;
    let mut bytes = 0;
    let named = programs.0.iter().map(|(name, (path, _))| (name.as_str(), path.as_path()));
    for (name, path) in named.chain([("mica-lab", own.as_path())]) {
        let to = bin.join(name);
        bytes += fs::copy(path, &to)
            .with_context(|| format!("copy {} to {}", path.display(), to.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("make {} executable", to.display()))?;
    }
    state::write_private(&tree.join("token"), token.as_bytes())?;
    state::write_private(&tree.join("api-key"), format!("{key}\n").as_bytes())?;
    let size_mib = bytes / (1024 * 1024) + TOOLS_SPARE_MIB;
    state::remove(&home.tools_drive())?;
    state::write_private(&home.tools_drive(), &[])?;
    run::capture(
        "make the tools drive",
        Command::new("mkfs.ext4")
            .args(["-q", "-F", "-L", "mica-tools", "-O", "^has_journal", "-m", "0", "-d"])
            .arg(&tree)
            .arg(home.tools_drive())
            .arg(format!("{size_mib}M")),
    )?;
    fs::remove_dir_all(&tree).with_context(|| format!("remove {}", tree.display()))
}

/// The store's drive: a sparse file that the host formats when it finds it blank.
pub fn make_store(home: &Home, gib: u32) -> Result<()> {
    let path = home.store_drive();
    if path.exists() {
        return Ok(());
    }
    OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&path)
        .and_then(|file: File| file.set_len(u64::from(gib) << 30))
        .with_context(|| format!("make the store's drive {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_counts_as_changed_when_its_bytes_did() {
        let directory = std::env::temp_dir().join(format!("mica-programs-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("mica"), "one").unwrap();
        fs::write(directory.join("unrelated"), "x").unwrap();
        let first = Programs::find(&directory).unwrap();
        assert_eq!(first.0.len(), 1);
        assert_eq!(first.changed_since(&BTreeMap::new()), ["mica"]);
        assert!(first.changed_since(&first.digests()).is_empty());
        fs::write(directory.join("mica"), "two").unwrap();
        let second = Programs::find(&directory).unwrap();
        assert_eq!(second.changed_since(&first.digests()), ["mica"]);
        fs::remove_dir_all(&directory).unwrap();
    }
}
