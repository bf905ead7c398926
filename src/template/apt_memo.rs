//! What apt knows, kept for as long as nothing that it reads has changed.
//!
//! Called by the build's plan. apt reads its package lists anew for every question on a machine
//! where it keeps no cache of its own, which takes seconds. Refuses a memo that is not about the
//! present state of apt's files: then apt is asked again.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::cache::Key;
use super::debian::{self, KernelPackage, Mirrors};
use super::runner::Runner;

/// Where apt's answers come from.
const APT_READS: [&str; 3] = ["/etc/apt", "/var/lib/apt/lists", "/usr/share/keyrings"];
/// Raised when the questions change.
const VERSION: &str = "1";
const FILE: &str = "apt.json";
const DEPTH_MAX: u32 = 8;
const FILES_MAX: usize = 100_000;

/// What apt said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answers {
    /// Where packages come from.
    pub mirrors: Mirrors,
    /// The kernel to use.
    pub package: KernelPackage,
}

#[derive(Serialize, Deserialize)]
struct Memo {
    state: String,
    answers: Answers,
}

/// Asks apt, or finds what it said last time.
///
/// # Errors
/// When apt does not answer, or the cache directory cannot be used.
pub fn ask(runner: &Runner, cache: &Path) -> Result<Answers> {
    let reads: Vec<&Path> = APT_READS.iter().map(Path::new).collect();
    // Looked at before apt is asked: what changes meanwhile makes the memo out of date at once.
    let state = state_of(&reads)?;
    let path = cache.join(FILE);
    if let Some(answers) = recall(&path, &state) {
        return Ok(answers);
    }
    runner.say("plan", "asking apt for its mirrors and the newest kernel")?;
    let mirrors = Mirrors::of_this_machine(runner)?;
    let answers = Answers { mirrors, package: debian::newest_kernel(runner)? };
    fs::create_dir_all(cache)
        .with_context(|| format!("could not make the cache directory {}", cache.display()))?;
    remember(&path, &Memo { state, answers: answers.clone() })?;
    Ok(answers)
}

/// A memo that cannot be read is as good as none.
fn recall(path: &Path, state: &str) -> Option<Answers> {
    let memo: Memo = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (memo.state == state).then_some(memo.answers)
}

fn remember(path: &Path, memo: &Memo) -> Result<()> {
    let bytes = serde_json::to_vec(memo).context("could not write down what apt said")?;
    // Two builds may do this at the same time, each with a file of its own until the rename.
    let new = path.with_extension(format!("{}.new", std::process::id()));
    fs::write(&new, bytes)
        .and_then(|()| fs::rename(&new, path))
        .with_context(|| format!("could not write {}", path.display()))
}

/// A hash over name, size, time and identity of every file below `roots`.
fn state_of(roots: &[&Path]) -> Result<String> {
    let config = std::env::var_os("APT_CONFIG").unwrap_or_default();
    let mut lines = vec![VERSION.to_owned(), config.to_string_lossy().into_owned()];
    for root in roots {
        look(root, 0, &mut lines)?;
    }
    let inputs: Vec<_> = lines.iter().map(|line| ("file", line.as_str())).collect();
    Ok(Key::of(&inputs).as_str().to_owned())
}

fn look(path: &Path, depth: u32, lines: &mut Vec<String>) -> Result<()> {
    let shown = path.display();
    // What a link leads to counts; one that leads nowhere is nothing to apt either.
    let found = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other.with_context(|| format!("could not look at {shown}"))?,
    };
    let (seconds, nanoseconds) = (found.mtime(), found.mtime_nsec());
    let (size, inode) = (found.size(), found.ino());
    lines.push(format!("{shown} {size} {inode} {seconds}.{nanoseconds}"));
    if lines.len() > FILES_MAX || depth > DEPTH_MAX {
        bail!("{shown} has more in it than apt's directories have");
    }
    if !found.is_dir() {
        return Ok(());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(path).with_context(|| format!("could not list {shown}"))? {
        names.push(entry?.path());
    }
    names.sort();
    names.iter().try_for_each(|name| look(name, depth + 1, lines))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memo_holds_until_a_file_changes() {
        let dir = std::env::temp_dir().join(format!("mica-apt-memo-{}", std::process::id()));
        let (lists, memo) = (dir.join("lists"), dir.join(FILE));
        fs::create_dir_all(lists.join("deep")).unwrap();
        fs::write(lists.join("deep/a"), "1").unwrap();
        let state = || state_of(&[&lists, &dir.join("not-there")]).unwrap();
        let before = state();
        assert_eq!(before, state());
        let answers = Answers {
            mirrors: serde_json::from_str(r#"{"repositories":[["http://m.example","s"]]}"#)
                .unwrap(),
            package: KernelPackage { name: "linux".to_owned(), version: "6".to_owned() },
        };
        assert_eq!(recall(&memo, &before), None);
        remember(&memo, &Memo { state: before.clone(), answers: answers.clone() }).unwrap();
        assert_eq!(recall(&memo, &before), Some(answers));

        fs::write(lists.join("deep/a"), "22").unwrap();
        let longer = state();
        assert_ne!(before, longer);
        assert_eq!(recall(&memo, &longer), None);
        fs::write(lists.join("b"), "").unwrap();
        assert_ne!(longer, state());
        fs::write(&memo, "{").unwrap();
        assert_eq!(recall(&memo, &before), None, "a damaged memo");
        fs::remove_dir_all(&dir).unwrap();
    }
}
