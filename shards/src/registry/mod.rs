//! Chooses a host among many for a sandbox: by template, free slots, free ports and load.
//!
//! Called by `host` on every shard, to which the shards of the machine are the hosts, and by whoever places
//! sandboxes on a fleet, such as the simulator in `lab`. Each caller has a registry of its own, and what it
//! takes from it is a claim: the host that was chosen admits or refuses. So nothing here is shared, and nothing
//! waits. Refuses to read a clock, to know addresses or names of hosts, and to take memory while it chooses.
//!
//! ```text
//!   open      ……1011   hosts with a free slot           two of the hosts that are left are drawn,
//!   holders   ……1101   hosts with the template     ──▶  each as likely as any other; the less
//!  !port 80   ……1111   hosts where it is free           loaded one takes the sandbox
//! ```
//!
//! Every question is a bit for each host, so a choice is a few words of bits. Where many hosts are left, drawing
//! numbers until one fits takes about as many draws for a thousand as for a hundred; where few are left, they
//! are counted, over at most 16 words. If no host with the template has room, one without it is taken the same
//! way. Two draws instead of the best of all: nearly as even, and a burst of creates that all see
//! the same loads does not fall on one host.

mod bits;
mod member;
mod templates;
mod types;

#[cfg(test)]
mod model;

use std::time::Duration;

pub use bits::{HOSTS_MAX, HostSet};
pub use types::{
    AllocateError, HostNumber, HostStatus, PORTS_MAX, Ports, RegistryError, ReleaseError, Report,
    SLOTS_MAX, TEMPLATES_PER_HOST_MAX, TemplateKey, Ticket, Want,
};

use bits::{Mask, Rows, WORDS_MAX, select, words_for};
use member::{BySight, Member};
use templates::{TEMPLATES_MAX, Templates};

/// Numbers that are drawn before the hosts that are left are counted instead.
const PROBES: u32 = 8;

/// Where fewer than one in so many hosts has the template, they are counted at once.
const PROBE_ONE_IN: u32 = 4;

/// The hosts, and what is taken of them.
#[derive(Debug)]
pub struct Registry {
    /// Hosts that have reported and not left.
    present: HostSet,
    /// Those of them that can take a sandbox.
    open: HostSet,
    /// Which hosts have a template; a row for each.
    holders: Rows,
    /// On which hosts a port is taken; a row for each.
    ports: Rows,
    /// What choosing reads, apart from the rest: many fit into a cache.
    statuses: Vec<HostStatus>,
    members: Vec<Member>,
    by_sight: BySight,
    templates: Templates,
    count: u16,
    /// One more than the highest number that ever reported.
    end: u16,
    /// Slots of all hosts, and those of them that are taken.
    slots_sum: u64,
    used_sum: u64,
    random: Random,
}

impl Registry {
    /// An empty registry for hosts of numbers below `hosts_max`. `seed` settles what it draws.
    ///
    /// # Errors
    /// When `hosts_max` is 0 or above [`HOSTS_MAX`].
    pub fn new(hosts_max: u16, seed: u64) -> Result<Self, RegistryError> {
        if !(1..=HOSTS_MAX).contains(&hosts_max) {
            return Err(RegistryError::BadSize(hosts_max));
        }
        let width = words_for(hosts_max);
        Ok(Self {
            present: HostSet::default(),
            open: HostSet::default(),
            holders: Rows::new(TEMPLATES_MAX, width),
            ports: Rows::new(1 << 16, width),
            statuses: (0..hosts_max).map(HostNumber).map(HostStatus::unknown).collect(),
            members: (0..hosts_max).map(|_| Member::default()).collect(),
            by_sight: BySight::new(hosts_max),
            templates: Templates::default(),
            count: 0,
            end: 0,
            slots_sum: 0,
            used_sum: 0,
            random: Random(seed),
        })
    }

    /// The key of a template, new or known.
    ///
    /// # Errors
    /// When the name is empty or too long, or when every key is of a template that some host has.
    pub fn intern(&mut self, template: &str) -> Result<TemplateKey, RegistryError> {
        self.templates.intern(template)
    }

    /// The key of a template that is known.
    #[must_use]
    pub fn template(&self, template: &str) -> Option<TemplateKey> {
        self.templates.key(template)
    }

    /// Takes in what a host says of itself at `now`, which is counted from any fixed moment. What is allocated
    /// on it stays. Whether the host is new.
    ///
    /// # Errors
    /// When the number or what is said is out of bounds; nothing changes then.
    pub fn report(
        &mut self,
        host: HostNumber,
        report: &Report<'_>,
        now: Duration,
    ) -> Result<bool, RegistryError> {
        self.check(host, report)?;
        let is_new = self.present.insert(host);
        // A clock that goes back must not break the order of the list.
        let newest = self.by_sight.newest();
        let newest = newest.map(|newest| self.statuses[usize::from(newest)].last_seen);
        let seen = newest.map_or(now, |newest| newest.max(now));
        if is_new {
            self.count += 1;
            self.end = self.end.max(host.0 + 1);
        } else {
            self.by_sight.remove(host.0);
        }
        self.by_sight.append(host.0);
        let member = &mut self.members[host.index()];
        member.leases.make_room(report.slots);
        if is_new {
            member.life = member.life.wrapping_add(1);
        }
        let Report { slots, load, draining, .. } = *report;
        let status = &mut self.statuses[host.index()];
        self.slots_sum = self.slots_sum - u64::from(status.slots) + u64::from(slots);
        *status = HostStatus { slots, load, draining, last_seen: seen, ..*status };
        self.set_templates(host, report.templates);
        self.show_room(host);
        Ok(is_new)
    }

    fn check(&self, host: HostNumber, report: &Report<'_>) -> Result<(), RegistryError> {
        if host.index() >= self.members.len() {
            return Err(RegistryError::NoSuchNumber(host.0));
        }
        if report.slots > SLOTS_MAX {
            return Err(RegistryError::TooManySlots(report.slots));
        }
        if report.templates.len() > TEMPLATES_PER_HOST_MAX {
            return Err(RegistryError::TooManyTemplates(report.templates.len()));
        }
        let known = |key: &TemplateKey| self.templates.holders(*key).is_some();
        let all = report.templates.iter().all(known);
        all.then_some(()).ok_or(RegistryError::OldTemplateKey)
    }

    fn set_templates(&mut self, host: HostNumber, templates: &[TemplateKey]) {
        let Self { members, holders, templates: names, .. } = self;
        let had = &mut members[host.index()].templates;
        if had == templates {
            return;
        }
        for key in had.drain(..) {
            holders.remove(usize::from(key.index), host);
            names.count(usize::from(key.index), false);
        }
        for key in templates {
            let row = usize::from(key.index);
            // Named twice, it counts once.
            if !holders.contains(row, host) {
                holders.insert(row, host);
                names.count(row, true);
                had.push(*key);
            }
        }
        self.statuses[host.index()].templates = u16::try_from(had.len()).unwrap_or(u16::MAX);
    }

    /// Keeps the bit of a host that can take a sandbox.
    fn show_room(&mut self, host: HostNumber) {
        let HostStatus { slots, used, draining, .. } = self.statuses[host.index()];
        if used < slots && !draining {
            self.open.insert(host);
        } else {
            self.open.remove(host);
        }
    }

    /// Takes a slot of the host that suits best.
    ///
    /// # Errors
    /// When no host has one. See [`AllocateError`].
    pub fn allocate(&mut self, want: &Want<'_>) -> Result<Ticket, AllocateError> {
        self.choose(want, |_, status| status.load)
    }

    /// The same where the caller knows the load of a host better than its last report. `load` is asked for the
    /// hosts that are drawn.
    ///
    /// # Errors
    /// When no host has a slot. See [`AllocateError`].
    pub fn allocate_by(
        &mut self,
        want: &Want<'_>,
        load: impl Fn(HostNumber) -> u32,
    ) -> Result<Ticket, AllocateError> {
        self.choose(want, |host, _| load(host))
    }

    fn choose(
        &mut self,
        want: &Want<'_>,
        load: impl Fn(HostNumber, &HostStatus) -> u32,
    ) -> Result<Ticket, AllocateError> {
        let wanted_ports = want.ports.as_slice();
        let Self { open, ports, random, .. } = self;
        let any = Mask { open, holders: None, except: want.except, ports, wanted_ports };
        let held = want.template.and_then(|key| self.templates.holders(key));
        let held = held.filter(|(_, count)| *count > 0).and_then(|(row, count)| {
            let mask = Mask { holders: Some(self.holders.row(row)), ..any };
            random.two_of(&mask, self.end, count >= u32::from(self.end) / PROBE_ONE_IN)
        });
        let (statuses, slots_sum, used_sum) = (&self.statuses, self.slots_sum, self.used_sum);
        let less_loaded = |(first, second): (HostNumber, HostNumber)| {
            let [one, two] = [first, second].map(|host| &statuses[host.index()]);
            let is_below = two.is_below(load(second, two), one, load(first, one));
            if is_below { second } else { first }
        };
        let held = held.map(less_loaded).filter(|host| {
            let status = &statuses[host.index()];
            let used = u64::from(status.used.max(load(*host, status)));
            want.lead_percent.is_none_or(|lead| {
                let most = 100 * used_sum + u64::from(lead) * slots_sum;
                used * 100 * slots_sum <= u64::from(status.slots) * most
            })
        });
        let anywhere = held.or_else(|| random.two_of(&any, self.end, true).map(less_loaded));
        anywhere.map(|host| self.take(host, want.ports)).ok_or_else(|| self.none_left(want))
    }

    fn take(&mut self, host: HostNumber, ports: Ports) -> Ticket {
        for port in ports.as_slice() {
            self.ports.insert(usize::from(*port), host);
        }
        let status = &mut self.statuses[host.index()];
        status.used += 1;
        self.used_sum += 1;
        // It was open, so that it is not draining.
        if status.used >= status.slots {
            self.open.remove(host);
        }
        let member = &mut self.members[host.index()];
        let (lease, turn) = member.leases.take(ports);
        Ticket { host, life: member.life, lease, turn }
    }

    fn none_left(&self, want: &Want<'_>) -> AllocateError {
        let ports = &self.ports;
        let room =
            Mask { open: &self.open, holders: None, except: want.except, ports, wanted_ports: &[] };
        if self.count == 0 {
            AllocateError::NoHosts
        } else if (0..words_for(self.end)).all(|at| room.word(at) == 0) {
            AllocateError::Full
        } else {
            AllocateError::PortsTaken
        }
    }

    /// Gives a slot and its ports back.
    ///
    /// # Errors
    /// When it was given back before, or its host has left.
    pub fn release(&mut self, ticket: Ticket) -> Result<(), ReleaseError> {
        let Ticket { host, life, lease, turn } = ticket;
        let member = self.members.get_mut(host.index()).ok_or(ReleaseError::HostLeft)?;
        if member.life != life || !self.present.contains(host) {
            return Err(ReleaseError::HostLeft);
        }
        let ports = member.leases.give_back(lease, turn)?;
        for port in ports.as_slice() {
            self.ports.remove(usize::from(*port), host);
        }
        self.statuses[host.index()].used -= 1;
        self.used_sum -= 1;
        self.show_room(host);
        Ok(())
    }

    /// Takes a host out, with all that was allocated on it. Whether it was there.
    pub fn remove(&mut self, host: HostNumber) -> bool {
        if !self.present.remove(host) {
            return false;
        }
        self.set_templates(host, &[]);
        self.by_sight.remove(host.0);
        self.open.remove(host);
        let HostStatus { slots, used, .. } = self.statuses[host.index()];
        self.slots_sum -= u64::from(slots);
        self.used_sum -= u64::from(used);
        self.statuses[host.index()] = HostStatus::unknown(host);
        self.count -= 1;
        let leases = &mut self.members[host.index()].leases;
        for port in leases.ports() {
            self.ports.remove(usize::from(port), host);
        }
        leases.clear();
        true
    }

    /// Takes out every host that has not reported for longer than `age_max`, and shows each. The ones that have
    /// are not looked at.
    pub fn remove_stale(
        &mut self,
        now: Duration,
        age_max: Duration,
        mut gone: impl FnMut(HostNumber),
    ) {
        while let Some(oldest) = self.by_sight.oldest() {
            let seen = self.statuses[usize::from(oldest)].last_seen;
            if now.saturating_sub(seen) <= age_max {
                return;
            }
            self.remove(HostNumber(oldest));
            gone(HostNumber(oldest));
        }
    }

    /// What is known of a host.
    #[must_use]
    pub fn get(&self, host: HostNumber) -> Option<HostStatus> {
        self.present.contains(host).then(|| self.statuses[host.index()])
    }

    /// What is known of all hosts, by number.
    pub fn hosts(&self) -> impl Iterator<Item = HostStatus> + '_ {
        self.present.iter().map(|host| self.statuses[host.index()])
    }

    /// How many hosts there are.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// Numbers that need to be even, not secret: a Weyl sequence, mixed (`SplitMix64`).
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`. With 32 random bits for at most 1,024 hosts, the most likely is at most one part in four
    /// million above the least.
    fn below(&mut self, end: u32) -> u32 {
        let wide = (self.next() >> 32) * u64::from(end);
        u32::try_from(wide >> 32).unwrap_or(0)
    }

    /// Two different ones of the hosts that the mask leaves, or one twice where there is no other.
    fn two_of(
        &mut self,
        mask: &Mask<'_>,
        end: u16,
        probe: bool,
    ) -> Option<(HostNumber, HostNumber)> {
        if probe
            && let Some(first) = self.probe(mask, end, None)
            && let Some(second) = self.probe(mask, end, Some(first))
        {
            return Some((first, second));
        }
        self.count_out(mask, end)
    }

    fn probe(
        &mut self,
        mask: &Mask<'_>,
        end: u16,
        other_than: Option<HostNumber>,
    ) -> Option<HostNumber> {
        for _ in 0..PROBES {
            let host = HostNumber(u16::try_from(self.below(u32::from(end))).unwrap_or(0));
            if mask.admits(host) && Some(host) != other_than {
                return Some(host);
            }
        }
        None
    }

    fn count_out(&mut self, mask: &Mask<'_>, end: u16) -> Option<(HostNumber, HostNumber)> {
        let mut left = [0; WORDS_MAX];
        let mut total = 0;
        for (at, word) in left.iter_mut().enumerate().take(words_for(end)) {
            *word = mask.word(at);
            total += word.count_ones();
        }
        let first = self.below(total);
        // Of all others; the last one stands in for the first.
        let others = total.checked_sub(1)?;
        let second = Some(self.below(others)).filter(|second| *second != first).unwrap_or(others);
        Some((select(&left, first)?, select(&left, second)?))
    }
}
