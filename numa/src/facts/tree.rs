//! The files of `/proc` and `/sys`, below a root.
//!
//! Called by the readers of facts. Refuses to fail: what is not there, or is not what it should be, is `None`.

use std::fs;
use std::path::Path;

/// The files below a root.
pub(super) struct Tree<'t>(pub(super) &'t Path);

impl Tree<'_> {
    pub(super) fn text(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.0.join(path)).ok()?;
        Some(text.trim().to_owned())
    }

    pub(super) fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// The names in a directory, in order.
    pub(super) fn names(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.0.join(path)).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// The word in brackets of a file that shows all choices.
    pub(super) fn chosen(&self, path: &str) -> Option<String> {
        let text = self.text(path)?;
        let words = text.split_whitespace();
        let mut chosen = words.filter_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
        chosen.next().map(str::to_owned)
    }
}

/// Whether a name is `prefix` and a number.
pub(super) fn is_numbered(name: &str, prefix: &str) -> bool {
    let number = name.strip_prefix(prefix).unwrap_or_default();
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}
