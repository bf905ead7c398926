//! The registry beside a naive one that looks at every host, and what it promises about balance.
//!
//! Called by `cargo test`. Refuses to know how the registry does it: only what it may answer.

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const HOSTS: u16 = 70;
const NAMES: [&str; 4] = ["base", "code", "data", "nobody-has-this"];
const AGE_MAX: Duration = Duration::from_secs(100);

#[derive(Clone, Debug)]
enum Step {
    Report {
        host: u16,
        slots: u32,
        load: u32,
        draining: bool,
        templates: Vec<usize>,
    },
    Allocate {
        template: Option<usize>,
        ports: Vec<u16>,
        except: Vec<u16>,
    },
    /// The ticket at this place among all that were ever given, modulo their number.
    Release(usize),
    Remove(u16),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let host = 0..HOSTS;
    let report = (host.clone(), 0..5u32, 0..8u32, prop::bool::weighted(0.1), vec(0..3usize, 0..4))
        .prop_map(|(host, slots, load, draining, templates)| Step::Report {
            host,
            slots,
            load,
            draining,
            templates,
        });
    // Few ports, so that they meet.
    let allocate = (prop::option::of(0..4usize), vec(8000..8004u16, 0..3), vec(host.clone(), 0..4))
        .prop_map(|(template, ports, except)| Step::Allocate { template, ports, except });
    prop_oneof![
        3 => report,
        8 => allocate,
        4 => any::<prop::sample::Index>().prop_map(|at| Step::Release(at.index(1 << 16))),
        1 => host.prop_map(Step::Remove),
        1 => (0..60u64).prop_map(Step::Pass),
    ]
}

#[derive(Debug)]
struct Plain {
    slots: u32,
    load: u32,
    draining: bool,
    templates: Vec<usize>,
    seen: Duration,
    /// Each with its ports.
    held: Vec<(Ticket, Vec<u16>)>,
}

#[derive(Debug, Default)]
struct Model {
    hosts: Vec<Option<Plain>>,
    given: Vec<Ticket>,
}

impl Model {
    fn fits(&self, host: u16, ports: &[u16], except: &[u16]) -> bool {
        let Some(plain) = &self.hosts[usize::from(host)] else { return false };
        let used = plain.held.len() < plain.slots as usize && !plain.draining;
        let taken = |port| plain.held.iter().any(|(_, ports)| ports.contains(port));
        used && !except.contains(&host) && !ports.iter().any(taken)
    }

    fn has(&self, host: u16, template: Option<usize>) -> bool {
        let plain = self.hosts[usize::from(host)].as_ref();
        plain.is_some_and(|plain| template.is_some_and(|t| plain.templates.contains(&t)))
    }
}

struct Pair {
    registry: Registry,
    keys: Vec<TemplateKey>,
    model: Model,
    now: Duration,
}

impl Pair {
    fn new(seed: u64) -> Self {
        let mut registry = Registry::new(HOSTS, seed).unwrap();
        let keys = NAMES.iter().map(|name| registry.intern(name).unwrap()).collect();
        let hosts = (0..HOSTS).map(|_| None).collect();
        Self { registry, keys, model: Model { hosts, given: Vec::new() }, now: Duration::ZERO }
    }

    fn apply(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Report { host, slots, load, draining, templates } => {
                let (slots, load, draining) = (*slots, *load, *draining);
                let keys: Vec<_> = templates.iter().map(|t| self.keys[*t]).collect();
                let report = Report { slots, load, draining, templates: &keys };
                let new = self.registry.report(HostNumber(*host), &report, self.now).unwrap();
                let plain = &mut self.model.hosts[usize::from(*host)];
                prop_assert_eq!(new, plain.is_none());
                let held = plain.take().map(|plain| plain.held).unwrap_or_default();
                let (templates, seen) = (templates.clone(), self.now);
                *plain = Some(Plain { slots, load, draining, templates, seen, held });
            }
            Step::Allocate { template, ports, except } => {
                self.allocate(*template, ports, except)?
            }
            Step::Release(at) => self.release(*at)?,
            Step::Remove(host) => {
                let was = self.model.hosts[usize::from(*host)].take().is_some();
                prop_assert_eq!(self.registry.remove(HostNumber(*host)), was);
            }
            Step::Pass(seconds) => {
                self.now += Duration::from_secs(*seconds);
                let mut gone = Vec::new();
                self.registry.remove_stale(self.now, AGE_MAX, |host| gone.push(host.get()));
                gone.sort_unstable();
                let is_stale = |plain: &Plain| self.now - plain.seen > AGE_MAX;
                let mut expected = Vec::new();
                for (plain, host) in self.model.hosts.iter_mut().zip(0u16..) {
                    if plain.take_if(|plain| is_stale(plain)).is_some() {
                        expected.push(host);
                    }
                }
                prop_assert_eq!(gone, expected);
            }
        }
        self.same()
    }

    fn allocate(
        &mut self,
        template: Option<usize>,
        ports: &[u16],
        except: &[u16],
    ) -> Result<(), TestCaseError> {
        let Ok(set) = Ports::new(ports) else {
            prop_assert!(ports.len() == 2 && ports[0] == ports[1]);
            return Ok(());
        };
        let mut not = HostSet::default();
        for host in except {
            not.insert(HostNumber(*host));
        }
        let key = template.map(|t| self.keys[t]);
        let want = Want { template: key, ports: set, except: Some(&not), lead_percent: None };
        let fitting: Vec<u16> =
            (0..HOSTS).filter(|host| self.model.fits(*host, ports, except)).collect();
        match self.registry.allocate(&want) {
            Ok(ticket) => {
                let host = ticket.host().get();
                prop_assert!(fitting.contains(&host), "{host} has no room or not the ports");
                let a_holder_fits = fitting.iter().any(|host| self.model.has(*host, template));
                prop_assert!(!a_holder_fits || self.model.has(host, template), "{host}");
                prop_assert!(!self.model.given.contains(&ticket), "given twice: {ticket:?}");
                self.model.given.push(ticket);
                let plain = self.model.hosts[usize::from(host)].as_mut().unwrap();
                plain.held.push((ticket, ports.to_vec()));
            }
            Err(error) => {
                prop_assert!(fitting.is_empty(), "{error}, but {fitting:?} fit");
                let none = self.model.hosts.iter().all(Option::is_none);
                let room = (0..HOSTS).any(|host| self.model.fits(host, &[], except));
                let expected = match (none, room) {
                    (true, _) => AllocateError::NoHosts,
                    (_, true) => AllocateError::PortsTaken,
                    _ => AllocateError::Full,
                };
                prop_assert_eq!(error, expected);
            }
        }
        Ok(())
    }

    fn release(&mut self, at: usize) -> Result<(), TestCaseError> {
        let Some(at) = at.checked_rem(self.model.given.len()) else { return Ok(()) };
        let ticket = self.model.given[at];
        let plain = self.model.hosts[usize::from(ticket.host().get())].as_mut();
        let held = plain.and_then(|plain| {
            let at = plain.held.iter().position(|(held, _)| *held == ticket)?;
            Some(plain.held.swap_remove(at))
        });
        prop_assert_eq!(self.registry.release(ticket).is_ok(), held.is_some());
        prop_assert!(self.registry.release(ticket).is_err(), "released twice");
        Ok(())
    }

    fn same(&self) -> Result<(), TestCaseError> {
        let found: Vec<_> = self.registry.hosts().collect();
        let mut expected = Vec::new();
        for (plain, number) in self.model.hosts.iter().zip(0..) {
            let Some(plain) = plain else { continue };
            let mut templates = plain.templates.clone();
            templates.sort_unstable();
            templates.dedup();
            expected.push(HostStatus {
                host: HostNumber(number),
                slots: plain.slots,
                used: u32::try_from(plain.held.len()).unwrap(),
                load: plain.load,
                draining: plain.draining,
                templates: u16::try_from(templates.len()).unwrap(),
                last_seen: plain.seen,
            });
        }
        prop_assert_eq!(self.registry.len(), expected.len());
        let sum = |of: fn(&HostStatus) -> u32| {
            expected.iter().map(|host| u64::from(of(host))).sum::<u64>()
        };
        prop_assert_eq!(self.registry.slots_sum, sum(|host| host.slots));
        prop_assert_eq!(self.registry.used_sum, sum(|host| host.used));
        prop_assert_eq!(found, expected);
        Ok(())
    }
}

proptest! {
    #[test]
    fn it_answers_as_one_that_looks_at_every_host(
        seed in any::<u64>(),
        steps in vec(step(), 1..400),
    ) {
        let mut pair = Pair::new(seed);
        for step in &steps {
            pair.apply(step)?;
        }
    }
}

fn filled(hosts: u16, slots: u32, seed: u64) -> Registry {
    let mut registry = Registry::new(hosts, seed).unwrap();
    let report = Report { slots, load: 0, draining: false, templates: &[] };
    for host in 0..hosts {
        registry.report(HostNumber(host), &report, Duration::ZERO).unwrap();
    }
    registry
}

#[test]
fn two_choices_keep_hosts_within_a_few_of_one_another() {
    // The theory: the fullest of n hosts is log2(log2 n) + O(1) above the mean, however many there are;
    // with one choice it would be sqrt(2 · mean · ln n), here 37.
    for seed in 0..5 {
        let mut registry = filled(1000, 1000, seed);
        for _ in 0..100_000 {
            registry.allocate(&Want::default()).map(drop).unwrap();
        }
        let most = registry.hosts().map(|host| host.used).max().unwrap();
        assert!(
            (101..=106).contains(&most),
            "seed {seed}: the fullest of 1000 has {most}, not 100"
        );
    }
}

#[test]
fn every_host_that_is_left_is_as_likely_as_any_other() {
    // Three holders among a thousand, unevenly placed: a search from a random place would nearly always find
    // the one after the widest gap.
    let mut registry = filled(1000, 10, 7);
    let key = registry.intern("rare").unwrap();
    let report = Report { slots: 10, load: 0, draining: false, templates: &[key] };
    let holders = [3, 4, 900];
    for host in holders {
        registry.report(HostNumber(host), &report, Duration::ZERO).unwrap();
    }
    let want = Want { template: Some(key), ..Want::default() };
    let mut drawn = [0u32; 3];
    for _ in 0..30_000 {
        let ticket = registry.allocate(&want).unwrap();
        drawn[holders.iter().position(|host| *host == ticket.host().get()).unwrap()] += 1;
        registry.release(ticket).unwrap();
    }
    // 10,000 each, with a standard deviation of 82.
    assert!(drawn.iter().all(|count| count.abs_diff(10_000) < 410), "{drawn:?}");
}

#[test]
fn a_host_with_the_template_is_passed_over_once_it_leads_by_too_much() {
    let mut registry = filled(10, 100, 3);
    let key = registry.intern("one").unwrap();
    let report = Report { slots: 100, load: 0, draining: false, templates: &[key] };
    registry.report(HostNumber(4), &report, Duration::ZERO).unwrap();
    let mut allocate = |lead_percent| {
        let want = Want { template: Some(key), lead_percent, ..Want::default() };
        registry.allocate(&want).unwrap().host().get()
    };
    // The fleet's own fullness grows by a tenth of a percent with each, so the lead of 10 is used up at 12.
    assert_eq!([(); 12].map(|()| allocate(Some(10))), [4; 12]);
    let elsewhere = (0..20).filter(|_| allocate(Some(10)) != 4).count();
    assert!(elsewhere >= 15, "{elsewhere} of 20");
    assert_eq!([(); 20].map(|()| allocate(None)), [4; 20]);
}

#[test]
fn of_two_hosts_the_less_loaded_one_is_always_taken() {
    let mut registry = filled(2, 10, 1);
    let busy = Report { slots: 10, load: 9, draining: false, templates: &[] };
    registry.report(HostNumber(0), &busy, Duration::ZERO).unwrap();
    for _ in 0..9 {
        assert_eq!(registry.allocate(&Want::default()).unwrap().host(), HostNumber(1));
    }
    // What the caller knows better counts instead.
    let busier = |host: HostNumber| if host.get() == 1 { 10 } else { 0 };
    for _ in 0..10 {
        let ticket = registry.allocate_by(&Want::default(), busier).unwrap();
        assert_eq!(ticket.host(), HostNumber(0));
    }
    assert_eq!(registry.allocate(&Want::default()).unwrap().host(), HostNumber(1));
    assert_eq!(registry.allocate(&Want::default()), Err(AllocateError::Full));
}

#[test]
fn a_ticket_of_an_earlier_life_is_refused() {
    let mut registry = filled(1, 1, 1);
    let old = registry.allocate(&Want::default()).unwrap();
    assert!(registry.remove(HostNumber(0)));
    assert_eq!(registry.release(old), Err(ReleaseError::HostLeft));
    let report = Report { slots: 1, load: 0, draining: false, templates: &[] };
    registry.report(HostNumber(0), &report, Duration::ZERO).unwrap();
    let new = registry.allocate(&Want::default()).unwrap();
    assert_eq!(registry.release(old), Err(ReleaseError::HostLeft));
    assert_eq!(registry.release(new), Ok(()));
    assert_eq!(registry.release(new), Err(ReleaseError::ReleasedBefore));
}

#[test]
fn what_is_out_of_bounds_is_refused_and_changes_nothing() {
    assert_eq!(Registry::new(0, 0).unwrap_err(), RegistryError::BadSize(0));
    assert_eq!(Registry::new(1025, 0).unwrap_err(), RegistryError::BadSize(1025));
    assert_eq!(HostNumber::new(1024), None);
    let mut registry = filled(10, 1, 0);
    let good = Report { slots: 1, load: 0, draining: false, templates: &[] };
    let old = TemplateKey { index: 0, turn: 5 };
    let mut refused = |host, report: &Report<'_>| {
        registry.report(HostNumber(host), report, Duration::ZERO).unwrap_err()
    };
    assert_eq!(refused(10, &good), RegistryError::NoSuchNumber(10));
    let slots = Report { slots: SLOTS_MAX + 1, ..good };
    assert_eq!(refused(1, &slots), RegistryError::TooManySlots(SLOTS_MAX + 1));
    let many = vec![old; TEMPLATES_PER_HOST_MAX + 1];
    assert_eq!(
        refused(1, &Report { templates: &many, ..good }),
        RegistryError::TooManyTemplates(1025)
    );
    assert_eq!(
        refused(1, &Report { templates: &many[..1], ..good }),
        RegistryError::OldTemplateKey
    );
    assert_eq!(registry.get(HostNumber(1)).unwrap().slots, 1);
    assert_eq!(Ports::new(&[0]), Err(RegistryError::BadPort(0)));
    assert_eq!(Ports::new(&[1; 9]), Err(RegistryError::TooManyPorts(9)));
}

#[test]
fn a_clock_that_goes_back_leaves_no_host_behind() {
    let mut registry = filled(2, 1, 0);
    let report = Report { slots: 1, load: 0, draining: false, templates: &[] };
    let second = Duration::from_secs;
    registry.report(HostNumber(0), &report, second(50)).unwrap();
    registry.report(HostNumber(1), &report, second(10)).unwrap();
    let mut gone = Vec::new();
    registry.remove_stale(second(60), second(10), |host| gone.push(host));
    assert_eq!(gone, [], "the later report counts as no earlier than the one before");
    registry.remove_stale(second(61), second(10), |host| gone.push(host));
    assert_eq!(gone, [HostNumber(0), HostNumber(1)]);
    assert!(registry.is_empty());
}
