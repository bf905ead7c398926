//! `mica NAME …` for a NAME that is a program of its own: runs `mica-NAME` beside this executable.
//!
//! Called for `mica lab`, whose dependencies have no place in a daemon. Refuses to look anywhere but
//! beside itself: a search path would run what somebody else put there.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The path of a program that is installed beside this one.
///
/// # Errors
/// When the system cannot tell where this program is.
pub fn beside(name: &str) -> Result<PathBuf> {
    let this = std::env::current_exe().context("cannot tell where this program is")?;
    Ok(this.with_file_name(name))
}

/// Becomes the helper. Returns only when it cannot.
///
/// # Errors
/// When there is no such helper, or it cannot be run.
pub fn become_helper(words: &[OsString]) -> Result<()> {
    let (name, arguments) = words.split_first().context("no command was given; see mica --help")?;
    let name = name.to_str().filter(|name| is_plain(name));
    let Some(name) = name else { bail!("that is no command; see mica --help") };
    let program = beside(&format!("mica-{name}"))?;
    if !program.exists() {
        bail!("no command `{name}`: there is no {}; see mica --help", program.display());
    }
    let error = Command::new(&program).args(arguments).exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}

/// A name that cannot leave the directory.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_is_named_plainly_and_must_exist() {
        assert!(is_plain("lab"));
        for bad in ["", "../lab", "a/b", "Lab", "lab.sh"] {
            assert!(!is_plain(bad), "{bad}");
        }
        let missing = become_helper(&["no-such-helper".into(), "--x".into()]);
        assert!(missing.unwrap_err().to_string().contains("no command `no-such-helper`"));
    }
}
