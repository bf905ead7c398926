//! What whoever traces sees of operations: a span for each, and in it one for each phase, open while it lasts.
//!
//! Run by `cargo test` as root, alone in its process: who listens there listens to all threads.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "hosts/common.rs"]
#[expect(dead_code, reason = "the other tests need the rest")]
mod common;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Bench, request, tell};
use mica_shards::metrics::SandboxOperation;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

const TARGET: &str = "mica::operations";

/// A span: what it said of itself, what it was within, and from when until when it was open.
#[derive(Clone, Debug)]
struct Seen {
    name: &'static str,
    fields: BTreeMap<&'static str, String>,
    within: Option<u64>,
    opened: Instant,
    closed: Option<Instant>,
}

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.fields.insert(field.name(), format!("{value:?}").trim_matches('"').to_owned());
    }
}

/// All spans of operations, in the order in which they were opened. Ids are used again.
#[derive(Clone, Debug, Default)]
struct Spans(Arc<Mutex<Vec<(u64, Seen)>>>);

impl Spans {
    fn with_open(&self, id: &Id, change: impl FnOnce(&mut Seen)) {
        let mut all = self.0.lock().unwrap();
        let open =
            |(other, seen): &&mut (u64, Seen)| *other == id.into_u64() && seen.closed.is_none();
        if let Some((_, seen)) = all.iter_mut().find(open) {
            change(seen);
        }
    }
}

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, _: Context<'_, S>) {
        if attributes.metadata().target() != TARGET {
            return;
        }
        let mut seen = Seen {
            name: attributes.metadata().name(),
            fields: BTreeMap::new(),
            within: attributes.parent().map(Id::into_u64),
            opened: Instant::now(),
            closed: None,
        };
        attributes.record(&mut seen);
        self.0.lock().unwrap().push((id.into_u64(), seen));
    }

    fn on_record(&self, id: &Id, record: &Record<'_>, _: Context<'_, S>) {
        self.with_open(id, |seen| record.record(seen));
    }

    fn on_close(&self, id: Id, _: Context<'_, S>) {
        self.with_open(&id, |seen| seen.closed = Some(Instant::now()));
    }
}

/// The operations, each with its phases, once all of them are closed.
fn operations(all: &[(u64, Seen)]) -> Vec<(Seen, Vec<Seen>)> {
    let mut found = Vec::new();
    for (at, (id, operation)) in all.iter().enumerate().filter(|(_, (_, s))| s.name == "operation")
    {
        let closed = operation.closed.unwrap_or_else(|| panic!("never closed: {operation:?}"));
        let mut phases = Vec::new();
        for (_, phase) in &all[at + 1..] {
            if phase.within == Some(*id) && phase.opened <= closed {
                phases.push(phase.clone());
            }
        }
        found.push((operation.clone(), phases));
    }
    found
}

/// Checks one operation against the phases that it has, and how much of it they cover.
fn check(operation: &Seen, phases: &[Seen], expected: &[&str]) {
    let names: Vec<&str> = phases.iter().map(|phase| phase.name).collect();
    assert_eq!(names, expected, "{operation:?}");
    let closed = operation.closed.unwrap();
    let mut covered = Duration::ZERO;
    let mut until = operation.opened;
    for phase in phases {
        let end = phase.closed.unwrap_or_else(|| panic!("never closed: {phase:?}"));
        assert!(phase.fields.is_empty() && operation.opened <= phase.opened && end <= closed);
        covered += end.saturating_duration_since(until.max(phase.opened));
        until = until.max(end);
    }
    let whole = closed - operation.opened;
    // Others may have had the core between two of them.
    assert!(covered * 4 >= whole * 3, "{covered:?} of {whole:?}: {operation:?} {phases:?}");
}

#[test]
fn each_phase_is_a_span_of_its_name_and_lasts_as_long_as_the_phase() {
    let spans = Spans::default();
    let listening = tracing_subscriber::registry().with(spans.clone());
    tracing::subscriber::set_global_default(listening).unwrap();
    let bench = Bench::new();
    let done = Arc::new(Mutex::new(Vec::new()));
    let ids = Arc::clone(&done);
    bench.host("good", |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        tell(&host, id, "fill 10 40 3").await;
        let snapshot = host.snapshot(id, None).await.unwrap().id;
        host.rollback(id, snapshot.clone()).await.unwrap();
        let copy = host.create(request(&snapshot)).await.unwrap().id;
        host.pause(copy).await.unwrap();
        host.resume(copy, Duration::from_secs(600), None).await.unwrap();
        host.kill(copy).await.unwrap();
        assert!(host.delete_snapshot(&snapshot).await.unwrap());
        ids.lock().unwrap().extend([id, copy]);
    });
    let [id, copy] = done.lock().unwrap()[..] else { panic!("two were made") };
    let all = spans.0.lock().unwrap().clone();
    let found = operations(&all);
    // One whose process was kept is thawed, and needs no other.
    let thawed = ["run", "ready"].as_slice();
    let names = |operation: SandboxOperation| {
        operation.phases().iter().map(|phase| phase.name()).collect::<Vec<_>>()
    };
    for (name, sandbox, expected) in [
        ("create", id, names(SandboxOperation::Create)),
        ("snapshot", id, names(SandboxOperation::Snapshot)),
        ("rollback", id, names(SandboxOperation::Rollback)),
        // It was asked for as a create.
        ("restore", copy, names(SandboxOperation::Restore)),
        ("pause", copy, names(SandboxOperation::Pause)),
        ("resume", copy, thawed.to_vec()),
        ("kill", copy, vec![]),
    ] {
        let own = |(seen, _): &&(Seen, _)| {
            seen.fields["name"] == name && seen.fields["sandbox"] == sandbox.to_string()
        };
        let [(operation, phases)] = found.iter().filter(own).collect::<Vec<_>>()[..] else {
            panic!("not one {name} of {sandbox} in {found:#?}");
        };
        if expected.is_empty() {
            assert!(phases.is_empty(), "{phases:?}");
        } else {
            check(operation, phases, &expected);
        }
    }
    assert_eq!(found.len(), 7, "{found:#?}");
}
