//! A stopwatch for one operation: each moment of it belongs to the phase that ends next.
//!
//! Held by a driver, and by the piece of work that the driver waits for. What it measures it also shows
//! to whoever traces: the operation as a span, and in it each phase as one, made when the phase ends, for
//! only then is it known which it was. Refuses to measure anything where metrics are off: it has no clock
//! then.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use mica_units::SandboxId;

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
    span: tracing::Span,
}

/// What a stopwatch measured.
#[derive(Debug)]
pub(crate) struct Stopped {
    pub(crate) operation: Operation,
    pub(crate) sandbox: SandboxId,
    pub(crate) total: Duration,
    pub(crate) spent: Spent,
}

impl Stopwatch {
    /// One that measures nothing.
    pub(crate) fn off() -> Self {
        Self(None)
    }

    /// One that has run since `begun`.
    pub(crate) fn since(operation: Operation, sandbox: SandboxId, begun: Instant) -> Self {
        let name = operation.name();
        let span = tracing::debug_span!(target: "mica::operations", "operation", name, %sandbox);
        Self(Some(Rc::new(Running {
            operation: Cell::new(operation),
            sandbox,
            begun,
            last: Cell::new(begun),
            spent: nothing_spent(),
            span,
        })))
    }

    /// Whether it measures something.
    pub(crate) fn runs(&self) -> bool {
        self.0.is_some()
    }

    /// What it measures turned out to be this.
    pub(crate) fn is_rather(&self, operation: Operation) {
        if let Some(running) = &self.0 {
            running.operation.set(operation);
        }
    }

    /// What has passed since the last time was spent on this.
    pub(crate) fn lap(&self, phase: Phase) {
        if let Some(running) = &self.0 {
            running.lap(phase, Instant::now());
        }
    }

    /// What it measured. It measures nothing any more.
    pub(crate) fn stop(&mut self) -> Option<Stopped> {
        let running = self.0.take()?;
        let (operation, now) = (running.operation.get(), Instant::now());
        // What is left is the last phase's.
        if let Some(last) = operation.phases().last() {
            running.lap(*last, now);
        }
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
        let (name, took_us) = (phase.name(), passed.as_micros());
        tracing::trace_span!(
            target: "mica::operations", parent: &self.span, "phase", name, took_us
        )
        .in_scope(|| {});
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
        let mut watch = Stopwatch::since(Operation::Create, id, Instant::now());
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
}
