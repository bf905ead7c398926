//! A stopwatch for one operation: each moment of it belongs to the phase that ends next.
//!
//! Held by a driver, and by the piece of work that the driver waits for. What it measures it also shows
//! to whoever traces: the operation as a span, and in it a span for each phase, of its name and open while
//! it lasts. Refuses to measure anything where metrics are off: it has no clock then; and to make a span
//! for nobody: where none listens, an operation costs one look at that.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use mica_units::SandboxId;
use tracing::Span;
use tracing::field::display;

use super::operations::{Operation, Phase, Spent, nothing_spent};

/// One operation at work. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stopwatch(Option<Rc<Running>>);

#[derive(Debug)]
struct Running {
    operation: Cell<Operation>,
    sandbox: SandboxId,
    begun: Instant,
    last: Cell<Instant>,
    spent: Spent,
    /// Until it is stopped, while somebody traces.
    spans: RefCell<Option<Box<Spans>>>,
}

/// An operation that was asked for, on its way to the shard that does it.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) at: Instant,
    spans: Option<Box<Spans>>,
}

/// What whoever traces sees of an operation that goes on.
#[derive(Debug)]
struct Spans {
    /// None between phases, and where two go on at once.
    phase: Option<Span>,
    operation: Span,
}

/// What a stopwatch measured.
#[derive(Debug)]
pub(crate) struct Stopped {
    pub(crate) operation: Operation,
    pub(crate) sandbox: SandboxId,
    pub(crate) total: Duration,
    pub(crate) spent: Spent,
}

impl Asked {
    /// One that is asked for now and begins with `first`.
    pub(super) fn now(
        operation: Operation,
        first: Option<Phase>,
        sandbox: Option<SandboxId>,
    ) -> Self {
        let mut asked = Self::untraced();
        let (name, sandbox) = (operation.name(), sandbox.map(display));
        let operation =
            tracing::debug_span!(target: "mica::operations", "operation", name, sandbox);
        if !operation.is_disabled() {
            let mut spans = Spans { phase: None, operation };
            spans.turn(first);
            asked.spans = Some(Box::new(spans));
        }
        asked
    }

    /// The same, which nobody sees.
    pub(super) fn untraced() -> Self {
        Self { at: Instant::now(), spans: None }
    }

    /// What goes to a shard with the request for this sandbox. The time until it is there is the phase's
    /// that is open; a shard that has no room gives nothing back, and the next one's way is a phase anew.
    pub(crate) fn sent_for(&mut self, sandbox: SandboxId) -> Self {
        let send = |spans: &mut Box<Spans>| {
            spans.operation.record("sandbox", display(sandbox));
            let phase = spans.phase.take();
            let phase = phase.or_else(|| Some(Phase::Route.span(&spans.operation)));
            Box::new(Spans { phase, operation: spans.operation.clone() })
        };
        Self { at: self.at, spans: self.spans.as_mut().map(send) }
    }
}

impl Spans {
    fn turn(&mut self, next: Option<Phase>) {
        // The last one ends before the next begins.
        self.phase = None;
        self.phase = next.map(|phase| phase.span(&self.operation));
    }
}

impl Stopwatch {
    /// One that measures nothing.
    pub(crate) fn off() -> Self {
        Self(None)
    }

    /// One that has run since this was asked.
    pub(crate) fn since(operation: Operation, sandbox: SandboxId, asked: Asked) -> Self {
        Self(Some(Rc::new(Running {
            operation: Cell::new(operation),
            sandbox,
            begun: asked.at,
            last: Cell::new(asked.at),
            spent: nothing_spent(),
            spans: RefCell::new(asked.spans),
        })))
    }

    /// Whether it measures something.
    pub(crate) fn runs(&self) -> bool {
        self.0.is_some()
    }

    /// What it measures turned out to be this.
    pub(crate) fn is_rather(&self, operation: Operation) {
        let Some(running) = &self.0 else { return };
        running.operation.set(operation);
        if let Some(spans) = &*running.spans.borrow() {
            spans.operation.record("name", operation.name());
        }
    }

    /// What has passed since the last time was spent on this, and what follows it begins. The last phase goes on:
    /// what is left is its.
    pub(crate) fn lap(&self, phase: Phase) {
        let Some(running) = &self.0 else { return };
        let phases = running.operation.get().phases();
        running.lap(phase, Instant::now());
        if let Some(next) = phases.iter().skip_while(|other| **other != phase).nth(1) {
            self.turn(Some(*next));
        }
    }

    /// The same where another one follows, or none that it could tell.
    pub(crate) fn lap_to(&self, phase: Phase, next: Option<Phase>) {
        if let Some(running) = &self.0 {
            running.lap(phase, Instant::now());
            self.turn(next);
        }
    }

    /// The same where it goes on, beside what else begins: for whoever traces, as long as this is held.
    pub(crate) fn lap_on(&self, phase: Phase) -> Option<Span> {
        let running = self.0.as_ref()?;
        running.lap(phase, Instant::now());
        running.spans.borrow_mut().as_mut()?.phase.take()
    }

    /// For whoever traces, this begins now, and what was open is over. The time goes to what ends next.
    pub(crate) fn turn(&self, next: Option<Phase>) {
        let Some(running) = &self.0 else { return };
        if let Some(spans) = &mut *running.spans.borrow_mut() {
            spans.turn(next);
        }
    }

    /// A phase of its own beside what is open: for whoever traces it lasts as long as this is held.
    pub(crate) fn beside(&self, phase: Phase) -> Option<Span> {
        let spans = self.0.as_ref()?.spans.borrow();
        spans.as_ref().map(|spans| phase.span(&spans.operation))
    }

    /// What it measured. It measures nothing any more.
    pub(crate) fn stop(&mut self) -> Option<Stopped> {
        let running = self.0.take()?;
        let (operation, now) = (running.operation.get(), Instant::now());
        // What is left is the last phase's.
        if let Some(last) = operation.phases().last() {
            running.lap(*last, now);
        }
        // Others may hold the stopwatch still.
        drop(running.spans.take());
        let total = now.saturating_duration_since(running.begun);
        let spent = running.spent.clone();
        Some(Stopped { operation, sandbox: running.sandbox, total, spent })
    }
}

impl Running {
    fn lap(&self, phase: Phase, now: Instant) {
        let passed = now.saturating_duration_since(self.last.replace(now));
        let spent = &self.spent[phase as usize];
        spent.set(spent.get() + passed);
    }
}

impl Stopped {
    /// One line for people: what was done, and where the time went.
    pub(crate) fn line(&self, is_done: bool) -> String {
        let Self { operation, sandbox, total, spent } = self;
        let how = if is_done { "ok" } else { "error" };
        let mut line = format!("{} {sandbox} {how} {} µs", operation.name(), total.as_micros());
        for (place, phase) in operation.phases().iter().enumerate() {
            let separator = if place == 0 { ':' } else { ',' };
            let us = spent[*phase as usize].get().as_micros();
            line += &format!("{separator} {} {us}", phase.name());
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_to_the_whole() {
        let id = SandboxId::from_random([7; 20]);
        let mut watch = Stopwatch::since(Operation::Create, id, Asked::untraced());
        for phase in [Phase::Layers, Phase::Pool, Phase::Layers] {
            let until = Instant::now() + Duration::from_micros(200);
            while Instant::now() < until {}
            watch.clone().lap(phase);
        }
        watch.is_rather(Operation::Restore);
        let stopped = watch.stop().expect("it ran");
        assert_eq!(stopped.operation, Operation::Restore);
        let sum: Duration = stopped.spent.iter().map(Cell::get).sum();
        let total = stopped.total;
        assert!(sum == total && sum >= Duration::from_micros(600), "{sum:?} of {total:?}");
        let spent = |phase: Phase| stopped.spent[phase as usize].get().as_micros();
        assert!(spent(Phase::Layers) >= 400);
        assert!(watch.stop().is_none() && !watch.runs());
        Stopwatch::off().lap(Phase::Run);
        let expected = format!(
            "restore {id} ok {} µs: route 0, layers {}, pool {}, state 0, run 0, ready {}",
            total.as_micros(),
            spent(Phase::Layers),
            spent(Phase::Pool),
            spent(Phase::Ready),
        );
        assert_eq!(stopped.line(true), expected);
    }

    #[test]
    fn where_nobody_traces_no_span_is_made() {
        let id = SandboxId::from_random([7; 20]);
        let made = || Asked::now(Operation::Create, Some(Phase::Route), Some(id)).spans.is_some();
        assert!(!made());
        tracing::subscriber::with_default(tracing_subscriber::registry(), || assert!(made()));
    }
}
