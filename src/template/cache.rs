//! The build cache: one directory per stage and inputs, complete or not there.
//!
//! Called by the build. Refuses two builds at once in one cache, so that what lies in its `tmp`
//! can only be the remains of a build that was killed, and is removed.
//!
//! ```text
//! <cache>/lock
//! <cache>/tmp/<pid>-<n>/              work in progress, removed when dropped
//! <cache>/stages/<stage>-<inputs>/    a stage's result, renamed here when complete
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::runner::Runner;

/// Results of each kind of stage that [`Cache::prune`] keeps. A few templates, each with what it
/// was before its last changes.
const KEPT_PER_STAGE: usize = 6;

/// The hash of everything a stage was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// Hashes labelled inputs. Lengths go in as well, so no two lists give the same bytes.
    pub fn of(inputs: &[(&str, &str)]) -> Self {
        let mut hash = Sha256::new();
        for (label, value) in inputs {
            for text in [label, value] {
                hash.update(text.len().to_le_bytes());
                hash.update(text.as_bytes());
            }
        }
        Self(hex(&hash.finalize()))
    }

    /// Hashes a file's content.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of_file(path: &Path) -> Result<Self> {
        let read = || -> std::io::Result<Self> {
            let mut hash = Sha256::new();
            std::io::copy(&mut File::open(path)?, &mut hash)?;
            Ok(Self(hex(&hash.finalize())))
        };
        read().with_context(|| format!("could not read {}", path.display()))
    }

    /// 64 hexadecimal digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        if write!(text, "{byte:02x}").is_err() {
            unreachable!("a String takes every write");
        }
        text
    })
}

/// The cache directory, held by this build alone.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
    fresh: bool,
    _lock: File,
}

/// A working directory that is removed when dropped.
#[derive(Debug)]
pub struct WorkDir {
    path: PathBuf,
}

impl Cache {
    /// Takes the cache; waits while another build has it. With `fresh`, no stage is reused.
    ///
    /// # Errors
    /// When the directory cannot be used, or the build is cancelled while it waits.
    pub fn open(root: &Path, fresh: bool, runner: &Runner) -> Result<Self> {
        for dir in [root.to_path_buf(), root.join("stages"), root.join("tmp")] {
            fs::create_dir_all(&dir)
                .with_context(|| format!("could not make the cache directory {}", dir.display()))?;
        }
        // There are root's programs in it that a user of this machine is not to find, setuid ones of images among
        // them.
        fs::set_permissions(root, fs::Permissions::from_mode(0o700))
            .with_context(|| format!("could not close {} to others", root.display()))?;
        let path = root.join("lock");
        let lock =
            File::create(&path).with_context(|| format!("could not open {}", path.display()))?;
        let mut told = false;
        loop {
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK | Errno::INTR) => {
                    runner.check()?;
                    if !told {
                        runner.say("cache", "another build is running; waiting for it")?;
                        told = true;
                    }
                    // There is no wait for a lock that a signal can end without a handler.
                    std::thread::sleep(std::time::Duration::from_millis(200));
                }
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("could not lock {}", path.display()));
                }
            }
        }
        let cache = Self { root: root.to_path_buf(), fresh, _lock: lock };
        cache.remove_remains()?;
        Ok(cache)
    }

    fn remove_remains(&self) -> Result<()> {
        let tmp = self.root.join("tmp");
        for entry in
            fs::read_dir(&tmp).with_context(|| format!("could not list {}", tmp.display()))?
        {
            let path = entry?.path();
            fs::remove_dir_all(&path)
                .with_context(|| format!("could not remove {}", path.display()))?;
        }
        Ok(())
    }

    /// A new, empty working directory.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn work_dir(&self) -> Result<WorkDir> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = self.root.join("tmp").join(format!("{}-{n}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("could not make {}", path.display()))?;
        Ok(WorkDir { path })
    }

    /// The directory of a stage, made by `make` if it is not there yet. What a failed `make`
    /// leaves is removed.
    ///
    /// # Errors
    /// What `make` says, with the name of the stage.
    pub fn stage(
        &self,
        runner: &Runner,
        stage: &'static str,
        key: &Key,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let done = self.root.join("stages").join(format!("{stage}-{}", &key.as_str()[..24]));
        if done.exists() && !self.fresh {
            mark_used(&done)?;
            runner.say(stage, "unchanged, taken from the cache")?;
            return Ok(done);
        }
        runner.check()?;
        let started = std::time::Instant::now();
        let work = self.work_dir()?;
        let out = work.path().join("out");
        let made = fs::create_dir(&out)
            .with_context(|| format!("could not make {}", out.display()))
            .and_then(|()| make(&out))
            .and_then(|()| publish(&work, &out, &done));
        made.with_context(|| format!("step `{stage}` failed"))?;
        mark_used(&done)?;
        let seconds = started.elapsed().as_secs_f32();
        runner.say(stage, &format!("done in {seconds:.1} s"))?;
        Ok(done)
    }

    /// Removes what was not used for the longest time: each change of an agent or a package makes
    /// new results, of up to gigabytes, and nothing else ever removes the old.
    ///
    /// # Errors
    /// When the cache directory cannot be read or written.
    pub fn prune(&self) -> Result<()> {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for path in by_last_use(&self.root.join("stages"))? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let stage = name.rsplit_once('-').map_or(&*name, |(stage, _)| stage);
            let seen = counts.entry(stage.to_owned()).or_insert(0);
            *seen += 1;
            if *seen > KEPT_PER_STAGE {
                // Out of sight in one step: a removal that is cut off leaves no half of a stage.
                let work = self.work_dir()?;
                fs::rename(&path, work.path().join("old"))
                    .with_context(|| format!("could not move {}", path.display()))?;
            }
        }
        Ok(())
    }
}

/// For [`by_last_use`].
fn mark_used(stage: &Path) -> Result<()> {
    File::open(stage)
        .and_then(|dir| dir.set_modified(std::time::SystemTime::now()))
        .with_context(|| format!("could not mark {} as used", stage.display()))
}

/// The entries of a directory, those used last first.
fn by_last_use(dir: &Path) -> Result<Vec<PathBuf>> {
    let read = || -> std::io::Result<Vec<(std::time::SystemTime, PathBuf)>> {
        let used = |entry: fs::DirEntry| Ok((entry.metadata()?.modified()?, entry.path()));
        fs::read_dir(dir)?.map(|entry| entry.and_then(used)).collect()
    };
    let mut found = read().with_context(|| format!("could not list {}", dir.display()))?;
    found.sort_by(|a, b| b.cmp(a));
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Makes a complete stage visible under its name. All of it is on the device before that, so a
/// power cut cannot leave a stage that only looks complete.
fn publish(work: &WorkDir, out: &Path, done: &Path) -> Result<()> {
    let dir = File::open(out).context("could not open the stage")?;
    rustix::fs::syncfs(&dir).context("could not sync the stage")?;
    if done.exists() {
        let old = work.path().join("old");
        fs::rename(done, &old).with_context(|| format!("could not move {}", done.display()))?;
    }
    fs::rename(out, done).with_context(|| format!("could not rename to {}", done.display()))
}

impl WorkDir {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "could not remove");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_inputs_apart() {
        let one = Key::of(&[("a", "bc")]);
        assert_eq!(one, Key::of(&[("a", "bc")]));
        assert_ne!(one, Key::of(&[("ab", "c")]));
        assert_ne!(Key::of(&[("a", ""), ("b", "")]), Key::of(&[("a", "")]));
        assert_eq!(one.as_str().len(), 64);
    }

    #[test]
    fn what_was_used_last_stays() {
        let root = std::env::temp_dir().join(format!("mica-cache-{}", std::process::id()));
        let runner = Runner::new().unwrap();
        let cache = Cache::open(&root, false, &runner).unwrap();
        let stage = |stage, input: usize| {
            let key = Key::of(&[("input", &input.to_string())]);
            cache.stage(&runner, stage, &key, |out| Ok(fs::write(out.join("f"), "x")?)).unwrap()
        };
        let other = stage("other", 0);
        let made: Vec<_> = (0..=KEPT_PER_STAGE).map(|input| stage("some", input)).collect();
        assert_eq!(stage("some", 0), made[0], "used again, so the second is the oldest now");
        cache.prune().unwrap();
        let gone: Vec<_> = made.iter().filter(|path| !path.exists()).collect();
        assert_eq!(gone, [&made[1]]);
        assert!(other.exists());
        assert_eq!(fs::read_dir(root.join("tmp")).unwrap().count(), 0);
        fs::remove_dir_all(&root).unwrap();
    }
}
