//! What this shard's front end served: requests by route and status, how long they took, and what was
//! passed on to sandboxes.
//!
//! Told by [`crate::serve`] of every answer, asked by the shard as one of its sources. Refuses labels
//! that a client could choose: a route is the pattern of the router's table, or none.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use hyper::StatusCode;
use mica_shards::metrics::{Family, Kind, Sample, Source, Value};
use mica_units::{Buckets, Durations};

use crate::route::{ENDPOINT_COUNT, ENDPOINTS};

static REQUESTS: Family = Family {
    name: "mica_http_requests_total",
    kind: Kind::Counter,
    unit: "requests",
    help: "Requests to the control plane, by route and class of status.",
    labels: &["method", "route", "status"],
    per_shard: true,
};

static REQUEST_SECONDS: Family = Family {
    name: "mica_http_request_seconds",
    kind: Kind::Histogram,
    unit: "seconds",
    help: "From the head of a request to the head of its answer, by route.",
    labels: &["method", "route"],
    per_shard: true,
};

static PROXIED: Family = Family {
    name: "mica_proxied_requests_total",
    kind: Kind::Counter,
    unit: "requests",
    help: "Requests to sandboxes, by class of the status that the client got.",
    labels: &["status"],
    per_shard: true,
};

static PROXIED_SECONDS: Family = Family {
    name: "mica_proxied_request_seconds",
    kind: Kind::Histogram,
    unit: "seconds",
    help: "From the head of a request to a sandbox to the head of its answer.",
    labels: &[],
    per_shard: true,
};

/// What shards have no names for.
pub static FAMILIES: &[&Family] = &[&REQUESTS, &REQUEST_SECONDS, &PROXIED, &PROXIED_SECONDS];

/// Bounds of a route's durations: coarse, for there are many routes.
static BOUNDS_NS: [u64; 10] = [
    100_000,
    250_000,
    1_000_000,
    2_500_000,
    10_000_000,
    25_000_000,
    100_000_000,
    250_000_000,
    1_000_000_000,
    10_000_000_000,
];

const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

#[derive(Debug)]
struct Counted {
    by_class: [Cell<u64>; CLASSES.len()],
    times: Buckets<{ BOUNDS_NS.len() }>,
}

impl Counted {
    const fn new() -> Self {
        Self { by_class: [const { Cell::new(0) }; CLASSES.len()], times: Buckets::new(&BOUNDS_NS) }
    }
}

/// What a request turned out to be for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// An endpoint of the control plane, by its place in the router's table.
    Endpoint(usize),
    /// Nothing that is there.
    Nothing,
    /// A sandbox.
    Sandbox,
}

/// The numbers of one shard.
#[derive(Debug)]
pub struct Requests {
    /// One for each endpoint, and one for requests that have none.
    by_route: Vec<Counted>,
    proxied: [Cell<u64>; CLASSES.len()],
    proxied_times: Durations,
}

impl Requests {
    /// None yet.
    #[must_use]
    pub fn new() -> Rc<Self> {
        Rc::new(Self {
            by_route: (0..=ENDPOINT_COUNT).map(|_| Counted::new()).collect(),
            proxied: [const { Cell::new(0) }; CLASSES.len()],
            proxied_times: Durations::default(),
        })
    }

    /// Counts an answer.
    pub fn answered(&self, served: Served, status: StatusCode, began: Instant) {
        let class = usize::from(status.as_u16() / 100).clamp(1, CLASSES.len()) - 1;
        let took = began.elapsed();
        match served {
            Served::Endpoint(place) => self.count(place, class, took),
            Served::Nothing => self.count(ENDPOINT_COUNT, class, took),
            Served::Sandbox => {
                add_one(&self.proxied[class]);
                self.proxied_times.record(took);
            }
        }
    }

    fn count(&self, place: usize, class: usize, took: Duration) {
        if let Some(counted) = self.by_route.get(place) {
            add_one(&counted.by_class[class]);
            counted.times.record(took);
        }
    }
}

fn add_one(cell: &Cell<u64>) {
    cell.set(cell.get().saturating_add(1));
}

/// Method and pattern of the endpoint at this place.
fn names(place: usize) -> (&'static str, &'static str) {
    // The methods of the table are all standard ones, which are static; others have no name here.
    let method = |endpoint: &'static crate::route::Endpoint| endpoint.method.as_str();
    ENDPOINTS.get(place).map_or(("", "none"), |endpoint| (method(endpoint), endpoint.path))
}

impl Source for Requests {
    /// Routes that nobody asked for are left out.
    fn sample(&self, into: &mut Vec<Sample>) {
        for (place, counted) in self.by_route.iter().enumerate() {
            if counted.times.count() == 0 {
                continue;
            }
            let (method, route) = names(place);
            for (class, count) in CLASSES.iter().zip(&counted.by_class) {
                if count.get() > 0 {
                    into.push(Sample::count(&REQUESTS, [method, route, class], count.get()));
                }
            }
            let times = Value::Durations(counted.times.distribution());
            into.push(Sample::new(&REQUEST_SECONDS, [method, route], times));
        }
        for (class, count) in CLASSES.iter().zip(&self.proxied) {
            into.push(Sample::count(&PROXIED, [class], count.get()));
        }
        let times = Value::Durations(self.proxied_times.distribution());
        into.push(Sample::new(&PROXIED_SECONDS, [], times));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_by_what_was_asked_and_how_it_ended() {
        let requests = Requests::new();
        let now = Instant::now();
        requests.answered(Served::Endpoint(0), StatusCode::OK, now);
        requests.answered(Served::Endpoint(0), StatusCode::NOT_FOUND, now);
        requests.answered(Served::Nothing, StatusCode::NOT_FOUND, now);
        requests.answered(Served::Sandbox, StatusCode::SWITCHING_PROTOCOLS, now);
        // Beyond the table is nothing.
        requests.answered(Served::Endpoint(usize::MAX), StatusCode::OK, now);
        let mut samples = Vec::new();
        requests.sample(&mut samples);
        let count = |family: &Family, labels: &[&str]| {
            let found = samples.iter().find(|sample| {
                sample.family.name == family.name && sample.labels.iter().eq(labels.iter())
            });
            found.map(|sample| sample.value.clone())
        };
        assert_eq!(count(&REQUESTS, &["GET", "/health", "2xx"]), Some(Value::Whole(1)));
        assert_eq!(count(&REQUESTS, &["GET", "/health", "4xx"]), Some(Value::Whole(1)));
        assert_eq!(count(&REQUESTS, &["GET", "/health", "5xx"]), None);
        assert_eq!(count(&REQUESTS, &["", "none", "4xx"]), Some(Value::Whole(1)));
        assert_eq!(count(&PROXIED, &["1xx"]), Some(Value::Whole(1)));
        let Some(Value::Durations(times)) = count(&REQUEST_SECONDS, &["GET", "/health"]) else {
            panic!("no times");
        };
        assert_eq!(times.count, 2);
    }
}
