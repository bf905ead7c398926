//! What a kernel's process, and those that it started, write to their own standard output.
//!
//! Called by [`super::kernel`]: where it is the cell's output, piece by piece; and otherwise into a tail that
//! explains a start that failed. Refuses to keep more than the tail, and never gives half a character.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::ChildStdout;

/// Most that is read at once.
const PIECE_BYTES: usize = 4 * 1024;

/// What is kept to explain a start that failed.
const TAIL_BYTES: usize = 4096;

/// What a pipe holds as the kernel makes it: what was written before a moment is read after so many bytes.
pub const PIPE_BYTES: usize = 64 * 1024;

/// The end of what a process wrote.
pub type Tail = Arc<Mutex<VecDeque<u8>>>;

/// The standard output of a process while it is the cell's output.
#[derive(Debug, Default)]
pub struct OwnOutput {
    stdout: Option<ChildStdout>,
    /// The beginning of a character whose end has not been read.
    rest: Vec<u8>,
}

impl OwnOutput {
    pub fn of(stdout: ChildStdout) -> Self {
        Self { stdout: Some(stdout), rest: Vec::new() }
    }

    /// Whether more may come.
    pub fn is_open(&self) -> bool {
        self.stdout.is_some()
    }

    /// Waits for the next piece; nothing of it is lost when the wait is given up.
    pub async fn next(&mut self) -> String {
        let mut piece = [0; PIECE_BYTES];
        let count = match &mut self.stdout {
            // A pipe that cannot be read has ended.
            Some(stdout) => stdout.read(&mut piece).await.unwrap_or(0),
            None => 0,
        };
        self.took(&piece, count)
    }

    /// A piece that is there already, and how long it was; `None` when there is none.
    pub fn at_once(&mut self) -> Option<(String, usize)> {
        let mut piece = [0; PIECE_BYTES];
        // Straight from the pipe, which does not block: what waits in it may be newer than what the
        // runtime has heard of.
        let count = match rustix::io::read(self.stdout.as_ref()?, &mut piece) {
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return None,
            Err(_) => 0,
        };
        Some((self.took(&piece, count), count))
    }

    fn took(&mut self, piece: &[u8], count: usize) -> String {
        if count == 0 {
            self.stdout = None;
        }
        self.rest.extend(piece.iter().take(count));
        take_text(&mut self.rest)
    }
}

/// The whole characters among the bytes; the beginning of one more stays.
fn take_text(bytes: &mut Vec<u8>) -> String {
    let whole = match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        _ => bytes.len(),
    };
    let rest = bytes.split_off(whole);
    let text = String::from_utf8_lossy(bytes).into_owned();
    *bytes = rest;
    text
}

/// Reads a process's output to its end and keeps the last of it.
pub async fn keep_tail(mut output: impl AsyncRead + Unpin, tail: Tail) {
    let mut buffer = [0_u8; 1024];
    while let Ok(count @ 1..) = output.read(&mut buffer).await {
        let Ok(mut tail) = tail.lock() else { return };
        tail.extend(buffer.iter().take(count));
        let excess = tail.len().saturating_sub(TAIL_BYTES);
        tail.drain(..excess);
    }
}

/// What was kept, as text.
pub fn text(tail: &Tail) -> String {
    let bytes: Vec<u8> = tail.lock().map(|tail| tail.iter().copied().collect()).unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_end_of_the_output_is_kept() {
        let tail = Tail::default();
        let mut output = vec![b'a'; 10_000];
        output.extend(b"the end");
        keep_tail(&output[..], Arc::clone(&tail)).await;
        let kept = text(&tail);
        assert_eq!(kept.len(), TAIL_BYTES);
        assert!(kept.ends_with("the end"));
    }

    #[test]
    fn a_character_that_comes_in_two_parts_stays_whole() {
        let mut bytes = "aé".as_bytes()[..2].to_vec();
        assert_eq!(take_text(&mut bytes), "a");
        bytes.extend([0xa9, b'b']);
        assert_eq!(take_text(&mut bytes), "éb");
        let mut bytes = vec![b'a', 0xff, b'b'];
        assert_eq!(take_text(&mut bytes), "a\u{fffd}b");
        assert!(bytes.is_empty());
    }

    #[tokio::test]
    async fn what_is_there_is_read_without_waiting() {
        let mut child = tokio::process::Command::new("sh")
            .args(["-c", "echo a; read line; echo b"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut own = OwnOutput::of(child.stdout.take().unwrap());
        assert_eq!(own.next().await, "a\n");
        assert_eq!(own.at_once(), None);
        drop(child.stdin.take());
        child.wait().await.unwrap();
        assert_eq!(own.at_once(), Some(("b\n".to_owned(), 2)));
        assert_eq!(own.at_once(), Some((String::new(), 0)));
        assert!(!own.is_open());
    }
}
