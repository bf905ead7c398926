//! What came of a simulation: a table for people, JSON for programs, both the same for the same seed.
//!
//! Called by the simulator, which counts here, and by `mica lab simulate`. Refuses to say which policy is best.

use std::fmt::Write as _;

use clap::ValueEnum;
use serde_json::{Value, json};

use super::host::Served;
use super::policy::Policy;
use super::simulate::Scenario;
use super::trace::Trace;

/// Counts while a simulation runs.
#[derive(Debug)]
pub(super) struct Tally {
    pub(super) refused: u64,
    pub(super) cold: u64,
    misses: u64,
    queued: u64,
    latencies_ns: Vec<u64>,
    waits_ns: Vec<u64>,
    live: u64,
    live_max: u64,
    /// Sandboxes times nanoseconds, while there are arrivals.
    live_ns: u128,
    last_ns: u64,
    arrivals_over: bool,
    host_used_max: u32,
}

impl Tally {
    pub(super) fn new(arrivals: usize) -> Self {
        Self {
            refused: 0,
            cold: 0,
            misses: 0,
            queued: 0,
            latencies_ns: Vec::with_capacity(arrivals),
            waits_ns: Vec::with_capacity(arrivals),
            live: 0,
            live_max: 0,
            live_ns: 0,
            last_ns: 0,
            arrivals_over: false,
            host_used_max: 0,
        }
    }

    /// Keeps how many live, and for how long.
    pub(super) fn lives(&mut self, now: u64, change: i64) {
        if !self.arrivals_over {
            self.live_ns += u128::from(self.live) * u128::from(now - self.last_ns);
            self.last_ns = now;
        }
        self.live = self.live.saturating_add_signed(change);
        self.live_max = self.live_max.max(self.live);
    }

    /// What comes after the last arrival says nothing about the load.
    pub(super) fn arrivals_end(&mut self) {
        self.arrivals_over = true;
    }

    pub(super) fn host_used(&mut self, used: u32) {
        self.host_used_max = self.host_used_max.max(used);
    }

    pub(super) fn created(&mut self, served: Served, latency_ns: u64) {
        self.latencies_ns.push(latency_ns);
        self.waits_ns.push(served.waited_ns);
        self.misses += u64::from(!served.pool_hit);
        self.queued += u64::from(served.waited_ns > 0);
    }

    pub(super) fn outcome(mut self, policy: Policy, scenario: &Scenario, trace: &Trace) -> Outcome {
        self.latencies_ns.sort_unstable();
        self.waits_ns.sort_unstable();
        let span_ns = trace.arrivals.last().map_or(0, |arrival| arrival.at_ns).max(1);
        let lives: u128 = trace.arrivals.iter().map(|arrival| u128::from(arrival.life_ns)).sum();
        let slots = u64::from(scenario.shape.slots) * u64::try_from(scenario.hosts).unwrap_or(0);
        Outcome {
            policy,
            arrivals: trace.arrivals.len(),
            created: self.latencies_ns.len(),
            refused: self.refused,
            cold: self.cold,
            misses: self.misses,
            queued: self.queued,
            latency_ns: [50, 95, 99, 100].map(|percent| percentile(&self.latencies_ns, percent)),
            wait_p99_ns: percentile(&self.waits_ns, 99),
            live_mean: ratio(self.live_ns, u128::from(span_ns)),
            live_max: self.live_max,
            offered: ratio(lives, u128::from(span_ns)),
            slots,
            host_used_max: self.host_used_max,
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "means are for people")]
fn ratio(part: u128, whole: u128) -> f64 {
    part as f64 / whole as f64
}

/// The value that `percent` of a hundred stay at or below. Zero when there are none.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(rank).copied().unwrap_or_default()
}

/// What came of one policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Which.
    pub policy: Policy,
    /// Sandboxes that were asked for.
    pub arrivals: usize,
    /// Those that were made.
    pub created: usize,
    /// Those for which no host had room.
    pub refused: u64,
    /// Times that a template was brought in.
    pub cold: u64,
    /// Creates that found the pool empty.
    pub misses: u64,
    /// Creates that waited for a shard.
    pub queued: u64,
    /// Time from arrival to the created sandbox: the median, the 95th and the 99th percentile, the longest.
    pub latency_ns: [u64; 4],
    /// Waiting for a shard, 99th percentile.
    pub wait_p99_ns: u64,
    /// Live sandboxes on average, from the start to the last arrival.
    pub live_mean: f64,
    /// The most at one time.
    pub live_max: u64,
    /// How many would be alive on average if none were refused: arrivals in a second times their lives.
    pub offered: f64,
    /// How many the fleet can hold.
    pub slots: u64,
    /// The most on one host.
    pub host_used_max: u32,
}

impl Outcome {
    fn policy_name(&self) -> String {
        self.policy.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with a few digits")]
fn ms(ns: u64) -> f64 {
    (ns as f64 / 1e3).round() / 1e3
}

/// As people read it.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    if let Some(first) = outcomes.first() {
        let Outcome { arrivals, offered, slots, .. } = first;
        line(
            &mut text,
            &format!(
                "{arrivals} arrivals; {offered:.0} sandboxes would be alive on average, {slots} have room\n"
            ),
        );
    }
    line(
        &mut text,
        &format!(
            "{:<22} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8}",
            "create, ms",
            "p50",
            "p95",
            "p99",
            "max",
            "wait p99",
            "refused",
            "cold",
            "no shell",
            "alive",
            "fullest"
        ),
    );
    for outcome in outcomes {
        let [p50, p95, p99, max] = outcome.latency_ns.map(ms);
        let Outcome { refused, cold, misses, live_mean, host_used_max, .. } = outcome;
        let (name, wait) = (outcome.policy_name(), ms(outcome.wait_p99_ns));
        line(
            &mut text,
            &format!(
                "{name:<22} {p50:>9.2} {p95:>9.2} {p99:>9.2} {max:>9.2} {wait:>9.2} {refused:>9} {cold:>9} \
             {misses:>9} {live_mean:>9.0} {host_used_max:>8}"
            ),
        );
    }
    text
}

fn line(text: &mut String, line: &str) {
    if writeln!(text, "{line}").is_err() {
        unreachable!("a string takes what is written to it");
    }
}

/// As programs read it.
#[must_use]
pub fn json(outcomes: &[Outcome]) -> Value {
    let row = |outcome: &Outcome| {
        let [p50_ms, p95_ms, p99_ms, max_ms] = outcome.latency_ns.map(ms);
        json!({
            "policy": outcome.policy_name(),
            "arrivals": outcome.arrivals,
            "created": outcome.created,
            "refused": outcome.refused,
            "template_cold_starts": outcome.cold,
            "pool_misses": outcome.misses,
            "queued": outcome.queued,
            "p50_ms": p50_ms,
            "p95_ms": p95_ms,
            "p99_ms": p99_ms,
            "max_ms": max_ms,
            "wait_p99_ms": ms(outcome.wait_p99_ns),
            "live_mean": (outcome.live_mean * 10.0).round() / 10.0,
            "live_max": outcome.live_max,
            "live_offered": (outcome.offered * 10.0).round() / 10.0,
            "slots": outcome.slots,
            "host_used_max": outcome.host_used_max,
        })
    };
    outcomes.iter().map(row).collect()
}
