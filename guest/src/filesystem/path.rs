//! Paths as clients write them, made absolute and clean.
//!
//! Called by every operation of this module. Pure. Refuses a NUL and a path longer than the
//! kernel takes; everything else is for the kernel to judge.

use std::path::{Component, Path, PathBuf};

use crate::sandbox::Sandbox;
use crate::users::User;

/// The kernel's own limit.
const PATH_BYTES_MAX: usize = 4096;

/// A path that cannot be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    #[error("a path cannot hold a NUL byte")]
    Nul,
    #[error("a path cannot be longer than {PATH_BYTES_MAX} bytes")]
    TooLong,
}

/// Resolves `~` and what is relative against the user's home, and `.` and `..` by name alone, as
/// E2B does: the answer shows this path.
pub fn resolve(sandbox: &Sandbox, user: &User, given: &str) -> Result<PathBuf, PathError> {
    if given.contains('\0') {
        return Err(PathError::Nul);
    }
    if given.len() > PATH_BYTES_MAX {
        return Err(PathError::TooLong);
    }
    Ok(clean(&sandbox.resolve_path(given, user)))
}

fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            // At the root this does nothing, so the path cannot leave it.
            Component::ParentDir => drop(cleaned.pop()),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

/// The last name of a clean path; the root is its own.
pub fn name(path: &Path) -> String {
    path.file_name().map_or_else(|| "/".into(), |name| name.to_string_lossy()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::TemplateSettings;

    #[test]
    fn paths_are_clean_and_start_at_home() {
        let sandbox = Sandbox::new(TemplateSettings::default(), true);
        let user = crate::users::find("root").unwrap();
        for (given, wanted) in [
            ("a/../b", "/root/b"),
            ("~/x/.", "/root/x"),
            ("../../../../etc//passwd", "/etc/passwd"),
            ("/..", "/"),
            ("/a/b/..//./c/", "/a/c"),
            ("", "/root"),
        ] {
            assert_eq!(resolve(&sandbox, &user, given), Ok(PathBuf::from(wanted)), "{given}");
        }
        assert_eq!(resolve(&sandbox, &user, "a\0b"), Err(PathError::Nul));
        assert_eq!(resolve(&sandbox, &user, &"a".repeat(5000)), Err(PathError::TooLong));
        assert_eq!(name(Path::new("/")), "/");
        assert_eq!(name(Path::new("/a/b")), "b");
    }
}
