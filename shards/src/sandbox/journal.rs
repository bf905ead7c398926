//! What happened to a sandbox, what its console says, and what it used.
//!
//! Written by the driver and by whoever asks for numbers; read by the shard for clients. Refuses to
//! grow: old entries go. Lives in memory alone: a new daemon starts with an empty one.

use std::collections::VecDeque;
use std::time::SystemTime;

use mica_numa::rt;

use super::Sandbox;
use crate::console;
use crate::{LogLine, LogSource, ShardError, Usage};

/// Events that are kept.
const EVENTS_MAX: usize = 128;

/// Looks at the console whose time is kept.
const LOOKS_MAX: usize = 128;

/// Numbers that are kept.
const USAGES_MAX: usize = 120;

/// Longest line of the console; the rest of it is cut.
const LINE_CHARS_MAX: usize = 1024;

/// What is kept of one sandbox.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    events: VecDeque<(SystemTime, String)>,
    /// How much a console held when it was looked at. Every line up to there is as old as that.
    looks: VecDeque<(u64, SystemTime)>,
    /// Whose console that is.
    process: String,
    usages: VecDeque<Usage>,
}

impl Journal {
    fn note(&mut self, at: SystemTime, text: String) {
        push(&mut self.events, (at, text), EVENTS_MAX);
    }

    /// Notes how much there is now, if that is more than before.
    fn look(&mut self, process: &str, total: u64, now: SystemTime) {
        if self.process != process {
            process.clone_into(&mut self.process);
            self.looks.clear();
        }
        if self.looks.back().is_none_or(|(before, _)| *before < total) {
            push(&mut self.looks, (total, now), LOOKS_MAX);
        }
    }

    /// When the line that ends there was first looked at.
    fn seen(&self, end: u64, now: SystemTime) -> SystemTime {
        self.looks.iter().find(|(total, _)| *total >= end).map_or(now, |(_, at)| *at)
    }
}

fn push<T>(entries: &mut VecDeque<T>, entry: T, most: usize) {
    if entries.len() >= most {
        entries.pop_front();
    }
    entries.push_back(entry);
}

impl Sandbox {
    /// Notes what happened to it just now.
    pub(crate) fn note(&self, text: String) {
        self.journal.borrow_mut().note(SystemTime::now(), text);
    }

    /// Keeps a number, if there is one, and gives all that are kept, oldest first.
    pub(crate) fn usages(&self, now: Option<Usage>) -> Vec<Usage> {
        let mut journal = self.journal.borrow_mut();
        if let Some(usage) = now {
            push(&mut journal.usages, usage, USAGES_MAX);
        }
        journal.usages.iter().copied().collect()
    }

    /// What happened to it and what its console says, oldest first. Of a sandbox without a process
    /// there is no console.
    pub(crate) async fn logs(&self, console_bytes: u64) -> Result<Vec<LogLine>, ShardError> {
        let held = self.held.borrow().clone();
        let mut lines = Vec::new();
        if let Some(held) = held {
            let failed = |error: std::io::Error| ShardError::OperationFailed {
                operation: "reading the console",
                sandbox: self.id,
                reason: error.to_string(),
            };
            let fd = held.console.try_clone().map_err(failed)?;
            let read = move || console::last(&fd, console_bytes, console_bytes);
            let read = rt::blocking(read).await.map_err(|_| ShardError::Busy)?;
            let (total, bytes) = read.map_err(failed)?;
            let now = SystemTime::now();
            let mut journal = self.journal.borrow_mut();
            journal.look(&held.name.to_string(), total, now);
            for (end, text) in lines_of(total, &bytes) {
                lines.push(LogLine {
                    at: journal.seen(end, now),
                    text,
                    source: LogSource::Console,
                });
            }
        }
        let journal = self.journal.borrow();
        let host = |(at, text): &(SystemTime, String)| LogLine {
            at: *at,
            text: text.clone(),
            source: LogSource::Host,
        };
        lines.extend(journal.events.iter().map(host));
        // Lines of one moment keep their order.
        lines.sort_by_key(|line| line.at);
        Ok(lines)
    }
}

/// The whole lines at the end of a console that held `total` bytes in all, with where each ends.
fn lines_of(total: u64, bytes: &[u8]) -> Vec<(u64, String)> {
    let first = total.saturating_sub(bytes.len() as u64);
    let mut at = first;
    let mut lines = Vec::new();
    for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
        let begins = at;
        at = at.saturating_add(piece.len() as u64);
        // The oldest one may have lost its beginning, the newest one is not over.
        let is_cut = begins == first && first > 0;
        let Some(line) = piece.strip_suffix(b"\n").filter(|_| !is_cut) else { continue };
        let text: String = console::sanitise(line).chars().take(LINE_CHARS_MAX).collect();
        if !text.trim().is_empty() {
            lines.push((at, text));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn at(second: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(second)
    }

    #[test]
    fn whole_lines_alone() {
        let lines = lines_of(13, b"one\r\n\r\ntwo\nth");
        assert_eq!(lines, [(5, "one".to_owned()), (11, "two".to_owned())]);
        let turned = lines_of(1000, b"ne\ntwo\n");
        assert_eq!(turned, [(1000, "two".to_owned())]);
        assert!(lines_of(0, b"").is_empty());
        let long = [&[b'x'; 5000][..], b"\n"].concat();
        assert_eq!(lines_of(5001, &long)[0].1.len(), LINE_CHARS_MAX);
    }

    #[test]
    fn a_line_is_as_old_as_the_first_look_at_it() {
        let mut journal = Journal::default();
        journal.look("a", 10, at(1));
        journal.look("a", 10, at(2));
        journal.look("a", 20, at(3));
        assert_eq!(journal.seen(5, at(9)), at(1));
        assert_eq!(journal.seen(11, at(9)), at(3));
        assert_eq!(journal.seen(21, at(9)), at(9));
        journal.look("b", 4, at(5));
        assert_eq!(journal.seen(4, at(9)), at(5), "another process, another console");
    }

    #[test]
    fn nothing_grows_without_end() {
        let mut journal = Journal::default();
        for n in 0..1000 {
            journal.note(at(n), n.to_string());
            journal.look("a", n + 1, at(n));
        }
        assert_eq!((journal.events.len(), journal.looks.len()), (EVENTS_MAX, LOOKS_MAX));
        assert_eq!(journal.events.back(), Some(&(at(999), "999".to_owned())));
    }
}
