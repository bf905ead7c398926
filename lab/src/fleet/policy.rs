//! Who chooses the host: the product's registry, and others to set beside it.
//!
//! Called by the simulator for each arrival. Refuses an arrival only when no host has room for it, whatever the policy:
//! they differ in which host they take, not in how hard they look.

use std::time::Duration;

use anyhow::{Context, Result};
use mica_shards::registry::{HostNumber, HostSet, Registry, Report, TemplateKey, Ticket, Want};

use super::host::{Host, HostShape};
use super::random::Random;
use super::trace::Arrival;

/// A way to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Policy {
    /// The registry: of two hosts drawn among those that have the template and room, the less loaded one, unless it
    /// is fuller than the fleet by a tenth of its slots.
    LeastOfTwo,
    /// The same, however full it is.
    LeastOfTwoStrict,
    /// The registry, which is not told of templates.
    LeastOfTwoAnywhere,
    /// The host with the fewest sandboxes of all; the one of the lowest number among equals.
    LeastLoaded,
    /// Every host in turn.
    RoundRobin,
    /// Any host.
    Random,
}

/// See [`Want::lead_percent`].
const LEAD_PERCENT: u8 = 10;

/// One policy at work.
pub(super) struct Chooser {
    policy: Policy,
    registry: Registry,
    keys: Vec<TemplateKey>,
    random: Random,
    next: usize,
}

/// A host that was chosen, by its place, with the registry's ticket if it chose.
pub(super) struct Chosen {
    pub(super) host: usize,
    pub(super) ticket: Option<Ticket>,
}

fn number(host: usize) -> Result<HostNumber> {
    let number = u16::try_from(host).ok().and_then(HostNumber::new);
    number.with_context(|| format!("host {host} is more than a registry can hold"))
}

impl Chooser {
    pub(super) fn new(
        policy: Policy,
        hosts: usize,
        templates: usize,
        shape: &HostShape,
        seed: u64,
    ) -> Result<Self> {
        let mut random = Random::new(seed, 2);
        let mut registry = Registry::new(u16::try_from(hosts)?, random.next())?;
        let keys = (0..templates).map(|template| registry.intern(&format!("template-{template}")));
        let keys = keys.collect::<Result<Vec<_>, _>>()?;
        let report = Report { slots: shape.slots, load: 0, draining: false, templates: &[] };
        for host in 0..hosts {
            registry.report(number(host)?, &report, Duration::ZERO)?;
        }
        Ok(Self { policy, registry, keys, random, next: 0 })
    }

    /// A host with room, if there is one.
    pub(super) fn choose(
        &mut self,
        hosts: &[Host],
        shape: &HostShape,
        arrival: &Arrival,
    ) -> Result<Option<Chosen>> {
        let fits = |at: &usize| hosts[*at].fits(shape, arrival.memory_mib);
        let count = hosts.len();
        // From a place on, round to it again.
        let round = |start: usize| (start..count).chain(0..start).find(fits);
        let host = match self.policy {
            Policy::LeastOfTwo | Policy::LeastOfTwoStrict => {
                let key = self.keys.get(usize::from(arrival.template)).copied();
                return self.by_registry(hosts, shape, arrival, key);
            }
            Policy::LeastOfTwoAnywhere => return self.by_registry(hosts, shape, arrival, None),
            Policy::LeastLoaded => (0..count).filter(fits).min_by_key(|at| hosts[*at].used),
            Policy::RoundRobin => {
                let found = round(self.next);
                self.next = found.map_or(self.next, |at| (at + 1) % count);
                found
            }
            Policy::Random => {
                let random = &mut self.random;
                let drawn = (0..8).map(|_| random.below(count)).find(fits);
                // Few are left: every one of them as likely as any other.
                drawn.or_else(|| {
                    let left: Vec<usize> = (0..count).filter(fits).collect();
                    (!left.is_empty()).then(|| left[random.below(left.len())])
                })
            }
        };
        Ok(host.map(|host| Chosen { host, ticket: None }))
    }

    /// The host admits or refuses, as in a real fleet: it knows its memory, the registry only its slots.
    fn by_registry(
        &mut self,
        hosts: &[Host],
        shape: &HostShape,
        arrival: &Arrival,
        template: Option<TemplateKey>,
    ) -> Result<Option<Chosen>> {
        let mut tried = HostSet::default();
        loop {
            let lead_percent = (self.policy == Policy::LeastOfTwo).then_some(LEAD_PERCENT);
            let want = Want { template, lead_percent, except: Some(&tried), ..Want::default() };
            let Ok(ticket) = self.registry.allocate(&want) else { return Ok(None) };
            let host = usize::from(ticket.host().get());
            if hosts[host].fits(shape, arrival.memory_mib) {
                return Ok(Some(Chosen { host, ticket: Some(ticket) }));
            }
            self.registry.release(ticket)?;
            tried.insert(ticket.host());
        }
    }

    /// Takes note that a host has other templates now.
    pub(super) fn learn(&mut self, at: usize, host: &Host, shape: &HostShape) -> Result<()> {
        if !matches!(self.policy, Policy::LeastOfTwo | Policy::LeastOfTwoStrict) {
            return Ok(());
        }
        let keys = host.templates().filter_map(|template| self.keys.get(usize::from(template)));
        let templates: Vec<TemplateKey> = keys.copied().collect();
        let report = Report { slots: shape.slots, load: 0, draining: false, templates: &templates };
        self.registry.report(number(at)?, &report, Duration::ZERO)?;
        Ok(())
    }

    pub(super) fn release(&mut self, ticket: Option<Ticket>) -> Result<()> {
        ticket.map_or(Ok(()), |ticket| Ok(self.registry.release(ticket)?))
    }
}
