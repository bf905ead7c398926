//! A command that goes on while others run: what it wrote since somebody last looked, and whether it ended.
//!
//! Called for the command that a template starts. Refuses to keep more than [`KEPT_BYTES_MAX`] of what it
//! writes; what comes above is dropped. Dropping it leaves the process alone.

use std::cell::RefCell;
use std::rc::Rc;

use mica_shards::rt::{self, Task};

use super::connect::ProcessEvent;
use super::guest::Events;
use super::log::{Level, Lines};

/// What is kept until it is taken.
const KEPT_BYTES_MAX: usize = 1 << 20;

/// One command, and the task that reads what it writes.
#[derive(Debug)]
pub struct Background {
    heard: Rc<RefCell<Heard>>,
    task: Task<()>,
}

#[derive(Debug, Default)]
struct Heard {
    lines: Vec<(Level, String)>,
    bytes: usize,
    ended: Option<Result<(), String>>,
}

impl Heard {
    fn line(&mut self, level: Level, line: &str) {
        if self.bytes + line.len() <= KEPT_BYTES_MAX {
            self.bytes += line.len();
            self.lines.push((level, line.to_owned()));
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.task.cancel();
    }
}

impl Background {
    /// Reads what a command writes from now on.
    pub fn watch(events: Events) -> Self {
        let heard = Rc::<RefCell<Heard>>::default();
        let task = rt::spawn(listen(events, Rc::clone(&heard)));
        Self { heard, task }
    }

    /// What it wrote since this was last asked.
    pub fn take_lines(&self) -> Vec<(Level, String)> {
        let mut heard = self.heard.borrow_mut();
        heard.bytes = 0;
        std::mem::take(&mut heard.lines)
    }

    /// How it ended, if it did.
    pub fn ended(&self) -> Option<Result<(), String>> {
        self.heard.borrow().ended.clone()
    }
}

async fn listen(mut events: Events, heard: Rc<RefCell<Heard>>) {
    let (mut out, mut err) = (Lines::default(), Lines::default());
    let ended = loop {
        match events.next().await {
            Ok(ProcessEvent::Output { is_error: false, bytes }) => {
                out.push(&bytes, |line| heard.borrow_mut().line(Level::Info, line));
            }
            Ok(ProcessEvent::Output { is_error: true, bytes }) => {
                err.push(&bytes, |line| heard.borrow_mut().line(Level::Warn, line));
            }
            Ok(ProcessEvent::Ended { code: 0, .. }) => break Ok(()),
            Ok(ProcessEvent::Ended { status, .. }) => break Err(status),
            Ok(ProcessEvent::Other) => {}
            Err(error) => break Err(error.to_string()),
        }
    };
    out.end(|line| heard.borrow_mut().line(Level::Info, line));
    err.end(|line| heard.borrow_mut().line(Level::Warn, line));
    heard.borrow_mut().ended = Some(ended);
}
