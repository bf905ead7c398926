//! What the tests of this crate share: a directory that goes away, and small templates.
//!
//! Called by tests only.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use mica_units::{Mebibytes, VcpuCount};

use crate::{Part, ReadyWhen, Result, Store, Template, TemplateSpec};

/// A directory that is removed when dropped.
#[derive(Debug)]
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        Self::below(&std::env::temp_dir())
    }

    /// In memory where the machine has that: for tests of many steps, each of which syncs.
    pub(crate) fn in_memory() -> Self {
        let shm = Path::new("/dev/shm");
        if shm.is_dir() { Self::below(shm) } else { Self::new() }
    }

    fn below(parent: &Path) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("mica-storage-{}-{n}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// What a small template is. Its `inputs_hash` is `content` in hexadecimal.
pub(crate) fn spec(name: &str, content: u8) -> TemplateSpec {
    TemplateSpec {
        name: name.parse().unwrap(),
        vcpus: VcpuCount::new(1).unwrap(),
        memory: Mebibytes::new(64),
        cmdline: "console=ttyS0".to_owned(),
        envd_version: String::new(),
        ready: ReadyWhen::Console,
        inputs_hash: format!("{content:02x}"),
    }
}

/// Commits a template whose kernel, initramfs and disk are all `content`.
pub(crate) fn put(store: &Store, name: &str, content: u8, replace: bool) -> Result<Template> {
    let spec = spec(name, content);
    let staging = store.stage(&spec.name, replace)?;
    for part in Part::ALL {
        std::io::Write::write_all(&mut staging.create_part(part)?, &[content; 4096])
            .map_err(|e| crate::StorageError::io("write", store.root(), e))?;
    }
    staging.commit(&spec)
}

/// The names below a directory, sorted.
pub(crate) fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
