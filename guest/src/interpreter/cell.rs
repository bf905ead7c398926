//! One cell while it runs: kernel messages in, events out, interrupts when its client leaves.
//!
//! Called by [`super::session`], one cell after another. Refuses to hold more than
//! [`PENDING_BYTES_MAX`] for a slow client (the kernel's output is then left unread), and gives up
//! on a kernel that does not give way to as many interrupts as its row says.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::events::Event;
use super::kernel::{Kernel, Signalled};
use super::languages::{Kind, Upkeep};
use super::protocol::{Body, Incoming};
use super::snippets::Snippets;

/// Most bytes of events that wait for a slow client before the kernel's output is left unread.
const PENDING_BYTES_MAX: usize = 8 * 1024 * 1024;

/// After the reply to a cell, how long to wait for the rest of its output without hearing any.
/// The kernel drops output when it is not read fast enough, and the end marker with it.
const SILENCE_AFTER_REPLY: Duration = Duration::from_secs(10);

/// Times that code is sent again which the kernel gave back unread. One that has just been interrupted gives
/// back what it finds waiting, which may be the cell after the one that was meant.
pub const ABORTS_MAX: u32 = 3;

/// A cell that nobody waits for is interrupted again this often.
const INTERRUPT_EVERY: Duration = Duration::from_secs(5);

/// One cell.
#[derive(Debug)]
pub struct Job {
    pub code: String,
    pub env: BTreeMap<String, String>,
    /// Nobody's cell, run before there is a client: it leaves no trace.
    pub rehearsal: bool,
    /// Dropping the receiver means that the client has gone.
    pub events: mpsc::Sender<Event>,
}

/// A request to end the kernel and start another; the answer is sent when it is up.
pub type Restart = oneshot::Sender<Result<(), String>>;

/// Why a kernel is no longer used.
pub enum Ending {
    /// The context is gone.
    Closed,
    Restart(Restart),
    /// It ended by itself, or its connection did.
    Died(String),
}

/// How a cell went.
pub enum Cell {
    Done,
    Broken(Ending),
}

/// A cell while it runs: what has come out of it and has not reached the client yet.
pub struct Run {
    pub code: String,
    pub env: BTreeMap<String, String>,
    pub rehearsal: bool,
    kind: &'static Kind,
    events: mpsc::Sender<Event>,
    /// The silent request behind the cell, where there is one.
    last: Option<Last>,
    /// The kernel could not read the cell, and did not say why.
    unread: Option<Body>,
    pending: VecDeque<Event>,
    pending_bytes: usize,
    begun: bool,
    /// The interpreter has ended and begun again under the cell.
    pub is_anew: bool,
    errored: bool,
    idle: bool,
    replied_at: Option<Instant>,
    /// Whether the kernel gave back what was sent last, and how often it did.
    is_given_back: bool,
    aborts: u32,
    interrupts: u32,
    next_interrupt: Instant,
}

/// The silent request that comes after a cell.
struct Last {
    id: String,
    /// Whether it ends with a message of its own behind all output, and not when it is idle.
    flushes: bool,
}

impl Run {
    pub fn new(job: Job, kind: &'static Kind) -> Self {
        Self {
            code: job.code,
            env: job.env,
            rehearsal: job.rehearsal,
            kind,
            events: job.events,
            last: None,
            unread: None,
            pending: VecDeque::new(),
            pending_bytes: 0,
            begun: false,
            is_anew: false,
            errored: false,
            idle: false,
            replied_at: None,
            is_given_back: false,
            aborts: 0,
            interrupts: 0,
            next_interrupt: Instant::now(),
        }
    }

    /// Runs until the kernel is idle again and all of its output is on its way.
    pub async fn drive(
        &mut self,
        kernel: &mut Kernel,
        id: &str,
        restarts: &mut mpsc::Receiver<Restart>,
    ) -> Result<(), Ending> {
        // A copy, so that waiting on it does not borrow the run.
        let events = self.events.clone();
        loop {
            if self.idle && self.replied_at.is_some() {
                return Ok(());
            }
            let gone = events.is_closed();
            if gone {
                self.pending.clear();
                self.pending_bytes = 0;
            }
            let patience = self.replied_at.map(|at| at + SILENCE_AFTER_REPLY);
            tokio::select! {
                biased;
                restart = restarts.recv() => {
                    return Err(restart.map_or(Ending::Closed, Ending::Restart));
                }
                // Before the kernel: one that writes without pause is interrupted all the same.
                () = sleep_until(self.next_interrupt), if gone => self.interrupt(kernel).await?,
                () = events.closed(), if !gone => self.next_interrupt = Instant::now(),
                permit = events.reserve(), if !self.pending.is_empty() => {
                    if let (Ok(permit), Some(event)) = (permit, self.pending.pop_front()) {
                        self.pending_bytes = self.pending_bytes.saturating_sub(event.weight());
                        permit.send(event);
                    }
                }
                signalled = kernel.next(), if self.pending_bytes < PENDING_BYTES_MAX => {
                    match signalled {
                        Signalled::Message(message) if message.parent_id == id => {
                            self.take(message);
                        }
                        Signalled::Message(message) => self.take_last(message),
                        Signalled::OwnStdout(text) => self.own_stdout(text),
                        Signalled::Unreadable(error) => self.note(&error.to_string()),
                        Signalled::Ended(status) => return Err(Ending::Died(status)),
                    }
                }
                // After it: what is there to be read is no silence.
                () = sleep_until(patience.unwrap_or_else(Instant::now)),
                    if !gone && patience.is_some() && self.pending.is_empty() =>
                {
                    return Ok(());
                }
            }
        }
    }

    async fn interrupt(&mut self, kernel: &mut Kernel) -> Result<(), Ending> {
        if self.interrupts >= self.kind.interrupts_max {
            return Err(Ending::Died("it did not give way to interrupts".to_owned()));
        }
        self.interrupts += 1;
        self.next_interrupt = Instant::now() + INTERRUPT_EVERY;
        kernel.interrupt().await.map_err(|error| Ending::Died(error.to_string()))
    }

    /// Waits for the silent request behind the cell, and takes what of the cell's output comes late.
    pub async fn drain(
        &mut self,
        kernel: &mut Kernel,
        id: String,
        flushes: bool,
        restarts: &mut mpsc::Receiver<Restart>,
    ) -> Result<(), Ending> {
        (self.idle, self.replied_at) = (false, None);
        self.last = Some(Last { id, flushes });
        // No request has this id: what belongs to the cell itself is output as any other now.
        self.drive(kernel, "", restarts).await
    }

    fn take_last(&mut self, message: Incoming) {
        let Some(last) = &self.last else { return };
        let is_own = message.parent_id == last.id;
        match message.body {
            Body::Flushed => self.idle = true,
            Body::Idle if is_own && !last.flushes => self.idle = true,
            Body::ReplyAborted if is_own => self.give_back(),
            Body::ReplyOk | Body::ReplyError { .. } if is_own => {
                self.replied_at = Some(Instant::now());
            }
            Body::Stdout(_) | Body::Stderr(_) | Body::Display(_) | Body::MainResult(_) => {
                self.take(message);
            }
            _ => {}
        }
    }

    fn own_stdout(&mut self, text: String) {
        if !text.is_empty() {
            self.push(Event::Stdout { text, timestamp: super::kernel::now() });
        }
    }

    /// Whether the kernel could not read the cell, and did not say why.
    pub fn is_unread(&self) -> bool {
        self.unread.is_some()
    }

    /// Tells what was wrong with it: the reason where there is one, or what the kernel said.
    pub fn explain(&mut self, reason: Option<Body>) {
        let said = self.unread.take();
        if let Some(Body::ReplyError { name, value, traceback }) = reason.or(said) {
            self.error(name, value, traceback);
        }
    }

    /// Whether this is all that a kernel says about a cell that it could not read.
    fn says_unread(&self, value: &str, traceback: &str) -> bool {
        let Upkeep::Code(snippets) = self.kind.upkeep else { return false };
        let unread = snippets.unread.map(|(text, _)| text);
        unread == Some(value) && traceback.is_empty() && !self.errored
    }

    fn take(&mut self, message: Incoming) {
        if self.replied_at.is_some() {
            self.replied_at = Some(Instant::now());
        }
        let timestamp = message.date;
        match message.body {
            Body::Input { execution_count } => {
                self.begun = true;
                self.push(Event::NumberOfExecutions { execution_count });
            }
            Body::Stdout(text) => {
                if let Upkeep::Code(Snippets { anew: Some(end), .. }) = self.kind.upkeep {
                    self.is_anew |= text.trim_end().ends_with(end);
                }
                self.push(Event::Stdout { text, timestamp });
            }
            Body::Stderr(text) => self.push(Event::Stderr { text, timestamp }),
            Body::Display(bundle) => self.push(Event::result(bundle, false)),
            Body::MainResult(bundle) => self.push(Event::result(bundle, true)),
            Body::Error { name, value, traceback } => self.error(name, value, traceback),
            Body::ReplyError { name, value, traceback } => {
                self.replied_at = Some(Instant::now());
                if self.says_unread(&value, &traceback) {
                    self.unread = Some(Body::ReplyError { name, value, traceback });
                } else {
                    self.error(name, value, traceback);
                }
            }
            Body::ReplyAborted => {
                self.give_back();
                // One that has begun has done something, and one that nobody waits for is not wanted.
                self.is_given_back &= !self.begun && !self.events.is_closed();
                if !self.is_given_back {
                    let value = "Execution was aborted".to_owned();
                    self.error("ExecutionAborted".to_owned(), value, String::new());
                }
            }
            Body::ReplyOk => self.replied_at = Some(Instant::now()),
            Body::Idle => self.idle = true,
            Body::Unreadable => self.note("its content is not valid JSON"),
            Body::Busy | Body::KernelInfo | Body::Flushed | Body::Other => {}
        }
    }

    /// The kernel did not run what it was sent, which then never begins: there is no end of it to wait for.
    fn give_back(&mut self) {
        (self.idle, self.replied_at) = (true, Some(Instant::now()));
        self.is_given_back = self.aborts < ABORTS_MAX;
        self.aborts += 1;
    }

    /// Whether what was sent last is to be sent again: it had no effect. The run is then as before it.
    pub fn begins_again(&mut self) -> bool {
        let again = std::mem::take(&mut self.is_given_back);
        if again {
            (self.idle, self.replied_at) = (false, None);
        }
        again
    }

    /// The same error comes on both channels; one is enough.
    fn error(&mut self, name: String, value: String, traceback: String) {
        if !self.errored {
            self.errored = true;
            self.push(Event::Error { name, value, traceback });
        }
    }

    fn note(&mut self, reason: &str) {
        let text = format!("a message of the kernel was left out: {reason}\n");
        self.push(Event::Stderr { text, timestamp: super::kernel::now() });
    }

    fn push(&mut self, event: Event) {
        self.pending_bytes += event.weight();
        self.pending.push_back(event);
    }

    /// The kernel is gone in the middle of the cell: say so in the words that E2B uses.
    pub async fn broken(mut self, ending: Ending) -> Cell {
        let (name, value) = match &ending {
            Ending::Closed => (
                "ExecutionAborted",
                "The context was removed before the execution was finished".to_owned(),
            ),
            Ending::Restart(_) => ("ContextRestarting", "Context was restarted".to_owned()),
            Ending::Died(status) => (
                "UnexpectedEndOfExecution",
                "Connection to the execution was closed before the execution was finished: \
                 the kernel ended ("
                    .to_owned()
                    + status
                    + ")",
            ),
        };
        self.push(Event::synthetic(name, value));
        self.finish().await;
        Cell::Broken(ending)
    }

    /// Hands over the rest and the end, without letting a slow client hold up the context.
    pub async fn finish(mut self) {
        self.push(Event::EndOfExecution);
        if self.events.is_closed() {
            return;
        }
        let (events, mut pending) = (self.events, self.pending);
        let deliver = async move {
            while let Some(event) = pending.pop_front() {
                if events.send(event).await.is_err() {
                    return;
                }
            }
        };
        // What is left is bounded by PENDING_BYTES_MAX, and goes when the client does.
        tokio::spawn(deliver);
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc::error::TryRecvError;

    fn run() -> (Run, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(16);
        let (code, env) = (String::new(), BTreeMap::new());
        let kind = super::super::languages::find(None).unwrap().kind;
        (Run::new(Job { code, env, rehearsal: false, events }, kind), receiver)
    }

    fn message(body: Body) -> Incoming {
        Incoming { parent_id: "p".into(), date: "d".into(), body }
    }

    fn error() -> Body {
        Body::Error { name: "E".into(), value: "v".into(), traceback: "t".into() }
    }

    #[tokio::test]
    async fn an_error_on_both_channels_is_told_once() {
        let (mut run, mut receiver) = run();
        run.take(message(Body::Input { execution_count: 4 }));
        run.take(message(error()));
        run.take(message(Body::ReplyError {
            name: "E".into(),
            value: "v".into(),
            traceback: "t".into(),
        }));
        run.take(message(Body::Idle));
        assert!(run.begun && run.idle && run.replied_at.is_some());
        run.finish().await;
        assert_eq!(receiver.recv().await, Some(Event::NumberOfExecutions { execution_count: 4 }));
        assert!(matches!(receiver.recv().await, Some(Event::Error { .. })));
        assert_eq!(receiver.recv().await, Some(Event::EndOfExecution));
        assert_eq!(receiver.recv().await, None);
    }

    #[tokio::test]
    async fn a_cell_that_is_given_back_begins_again_a_few_times() {
        let (mut run, mut receiver) = run();
        for _ in 0..ABORTS_MAX {
            run.take(message(Body::ReplyAborted));
            assert!(run.idle && run.begins_again());
            assert!(!run.idle && run.replied_at.is_none());
        }
        run.take(message(Body::ReplyAborted));
        assert!(run.idle && !run.begins_again());
        run.finish().await;
        let Some(Event::Error { name, .. }) = receiver.recv().await else { panic!("no error") };
        assert_eq!(name, "ExecutionAborted");
    }

    #[tokio::test]
    async fn what_has_begun_and_what_nobody_waits_for_ends_with_an_aborted_reply() {
        let (mut begun, receiver) = run();
        begun.take(message(Body::Input { execution_count: 1 }));
        begun.take(message(Body::ReplyAborted));
        assert!(begun.idle && !begun.begins_again() && begun.errored);
        drop(receiver);
        let (mut left, receiver) = run();
        drop(receiver);
        left.take(message(Body::ReplyAborted));
        assert!(left.idle && !left.begins_again());
    }

    #[tokio::test]
    async fn the_end_of_the_kernel_is_told_in_the_words_of_e2b() {
        for (ending, wanted) in [
            (Ending::Died("signal: 9".into()), "UnexpectedEndOfExecution"),
            (Ending::Restart(oneshot::channel().0), "ContextRestarting"),
            (Ending::Closed, "ExecutionAborted"),
        ] {
            let (run, mut receiver) = run();
            assert!(matches!(run.broken(ending).await, Cell::Broken(_)));
            let Some(Event::Error { name, .. }) = receiver.recv().await else { panic!("none") };
            assert_eq!(name, wanted);
            assert_eq!(receiver.recv().await, Some(Event::EndOfExecution));
        }
    }

    #[tokio::test]
    async fn what_waits_is_counted() {
        let (mut run, mut receiver) = run();
        run.take(message(Body::Stdout("x".repeat(5000))));
        assert!(run.pending_bytes > 5000);
        assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
    }
}
