//! How the double behaves just now: a word in a file, so that a test can change it at any time.
//!
//! Called by everything here at each fork of the road. Refuses nothing: an unknown word is good
//! behaviour.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

/// Where the word is.
#[derive(Clone, Debug)]
pub struct Mood(PathBuf);

impl Mood {
    pub fn at(path: &str) -> Self {
        Self(path.into())
    }

    /// The word of this moment.
    pub fn now(&self) -> String {
        std::fs::read_to_string(&self.0).unwrap().trim().to_owned()
    }

    pub fn is(&self, word: &str) -> bool {
        self.now() == word
    }

    /// Whether the mood is `word:N`, and this is the N-th time that any process asks.
    pub fn is_turn(&self, word: &str) -> bool {
        let now = self.now();
        let Some(turn) = now.strip_prefix(word).and_then(|rest| rest.strip_prefix(':')) else {
            return false;
        };
        let turn: usize = turn.parse().unwrap();
        (1..=turn).find(|n| self.take(&format!("{word}.{n}"))).is_some_and(|n| n == turn)
    }

    /// Whether this process is the first that takes this token.
    fn take(&self, token: &str) -> bool {
        let name = format!("{}.{token}", self.0.display());
        OpenOptions::new().write(true).create_new(true).open(Path::new(&name)).is_ok()
    }
}
