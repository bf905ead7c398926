//! The order of events: who arrives, whose template is there, whose life is over.
//!
//! Called by `mica lab simulate`, once for each policy. Refuses fleets that the registry could not hold.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use anyhow::{Result, ensure};
use mica_shards::registry::{HOSTS_MAX, SLOTS_MAX, TEMPLATES_PER_HOST_MAX, Ticket};

use super::host::{Host, HostShape};
use super::policy::{Chooser, Chosen, Policy};
use super::random::Random;
use super::report::{Outcome, Tally};
use super::service::Service;
use super::trace::{Arrival, Trace};

/// A fleet.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// How many hosts it has.
    pub hosts: usize,
    /// What each of them is.
    pub shape: HostShape,
    /// What creates take.
    pub service: Service,
    /// What is drawn.
    pub seed: u64,
}

impl Scenario {
    fn check(&self) -> Result<()> {
        let HostShape { slots, memory_mib, shards, pool, templates, cold_ns } = self.shape;
        let hosts_max = usize::from(HOSTS_MAX);
        ensure!((1..=hosts_max).contains(&self.hosts), "hosts must be 1 to {hosts_max}");
        ensure!((1..=SLOTS_MAX).contains(&slots), "a host must have 1 to {SLOTS_MAX} slots");
        ensure!((1..=1 << 32).contains(&memory_mib), "memory must be 1 to 4294967296 MiB");
        ensure!((1..=1024).contains(&shards), "a host must have 1 to 1024 shards");
        ensure!(pool <= SLOTS_MAX, "a pool must have 0 to {SLOTS_MAX} VM processes");
        let most = TEMPLATES_PER_HOST_MAX;
        ensure!((1..=most).contains(&templates), "a host must keep 1 to {most} templates");
        ensure!(cold_ns <= 3_600_000_000_000, "a template must be there after an hour at most");
        Ok(())
    }
}

/// What comes later. In the order of time, and then of when it was decided.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Event {
    at_ns: u64,
    number: u64,
    host: usize,
    kind: Kind,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// The template of this arrival is there.
    Ready(usize),
    /// The life of this arrival is over.
    End(usize),
}

struct Simulation<'a> {
    scenario: &'a Scenario,
    arrivals: &'a [Arrival],
    hosts: Vec<Host>,
    chooser: Chooser,
    /// Of each arrival that was admitted and still lives.
    tickets: Vec<Option<Ticket>>,
    events: BinaryHeap<Reverse<Event>>,
    number: u64,
    random: Random,
    tally: Tally,
}

/// Replays a trace with one policy.
///
/// # Errors
/// When a number of the scenario means nothing.
pub fn simulate(scenario: &Scenario, trace: &Trace, policy: Policy) -> Result<Outcome> {
    scenario.check()?;
    let Scenario { hosts, shape, seed, .. } = scenario;
    let mut simulation = Simulation {
        scenario,
        arrivals: &trace.arrivals,
        hosts: (0..*hosts).map(|_| Host::new(shape)).collect(),
        chooser: Chooser::new(policy, *hosts, trace.templates, shape, *seed)?,
        tickets: vec![None; trace.arrivals.len()],
        events: BinaryHeap::new(),
        number: 0,
        random: Random::new(*seed, 3),
        tally: Tally::new(trace.arrivals.len()),
    };
    for (at, arrival) in trace.arrivals.iter().enumerate() {
        simulation.until(arrival.at_ns)?;
        simulation.arrive(at, arrival)?;
    }
    simulation.tally.arrivals_end();
    simulation.until(u64::MAX)?;
    Ok(simulation.tally.outcome(policy, scenario, trace))
}

impl Simulation<'_> {
    /// Lets everything happen that happens up to `now`.
    fn until(&mut self, now: u64) -> Result<()> {
        while self.events.peek().is_some_and(|Reverse(event)| event.at_ns <= now) {
            let Some(Reverse(Event { at_ns, host, kind, .. })) = self.events.pop() else { break };
            match kind {
                Kind::Ready(at) => self.serve(at, host, at_ns),
                Kind::End(at) => {
                    self.tally.lives(at_ns, -1);
                    self.hosts[host].give_back(self.arrivals[at].memory_mib);
                    self.chooser.release(self.tickets[at].take())?;
                }
            }
        }
        Ok(())
    }

    fn arrive(&mut self, at: usize, arrival: &Arrival) -> Result<()> {
        let shape = &self.scenario.shape;
        let chosen = self.chooser.choose(&self.hosts, shape, arrival)?;
        let Some(Chosen { host, ticket }) = chosen else {
            self.tally.lives(arrival.at_ns, 0);
            self.tally.refused += 1;
            return Ok(());
        };
        self.tickets[at] = ticket;
        self.tally.lives(arrival.at_ns, 1);
        self.hosts[host].take(arrival.memory_mib);
        self.tally.host_used(self.hosts[host].used);
        let (ready_ns, cold) = self.hosts[host].template(shape, arrival);
        if cold {
            self.tally.cold += 1;
            self.chooser.learn(host, &self.hosts[host], shape)?;
        }
        if ready_ns > arrival.at_ns {
            self.later(ready_ns, host, Kind::Ready(at));
        } else {
            self.serve(at, host, ready_ns);
        }
        Ok(())
    }

    fn serve(&mut self, at: usize, host: usize, now: u64) {
        let Scenario { shape, service, .. } = self.scenario;
        let served = self.hosts[host].serve(shape, now, service, &mut self.random);
        let Arrival { at_ns, life_ns, .. } = self.arrivals[at];
        self.tally.created(served, served.done_ns - at_ns);
        self.later(served.done_ns + life_ns, host, Kind::End(at));
    }

    fn later(&mut self, at_ns: u64, host: usize, kind: Kind) {
        self.number += 1;
        self.events.push(Reverse(Event { at_ns, number: self.number, host, kind }));
    }
}
