//! What the registry's operations cost: the work of each benchmark.
//!
//! Called by `registry_report`, which times it for `mica bench registry`, by `benches/registry.rs`, and by
//! `bench-allocations`. Names and sizes are those of Fast Sandbox's own benchmarks, so that rows can be laid side by
//! side. Refuses to time less than a batch: one operation is shorter than reading the clock.

use std::hint::black_box;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Barrier, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mica_shards::registry::{
    HostNumber, HostStatus, Ports, Registry, Report, TemplateKey, Ticket, Want,
};

/// Slots of each host.
const SLOTS: u32 = 100;
/// Templates that there are; every host has half of them.
const TEMPLATES: usize = 10;
/// Operations between two looks at the clock: fewer than the smaller pool has slots for.
pub const BATCH: usize = 2000;
/// Ports that sandboxes ask for, two at a time: so few that at the end of a batch each is taken on 40 of the 50
/// hosts of the smaller pool that have the template.
const PORTS: u16 = 100;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Allocate,
    AllocateWithPorts,
    AllocateNoMatch,
    Report,
    GetAll,
    Get,
    Release,
    RemoveStale,
    Parallel,
}

/// One benchmark.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Its name, as Fast Sandbox has it.
    pub name: &'static str,
    /// Hosts in the pool.
    pub hosts: u16,
    /// What Fast Sandbox's report says, in ns.
    pub seed_ns: f64,
    kind: Kind,
}

/// Every benchmark.
pub const ALL: [Work; 11] = {
    const fn work(name: &'static str, kind: Kind, hosts: u16, seed_ns: f64) -> Work {
        Work { name, hosts, seed_ns, kind }
    }
    [
        work("BenchmarkRegistryAllocate", Kind::Allocate, 100, 1312.0),
        work("BenchmarkRegistryAllocateWithPorts", Kind::AllocateWithPorts, 100, 1469.0),
        work("BenchmarkRegistryAllocateNoImageMatch", Kind::AllocateNoMatch, 100, 1349.0),
        work("BenchmarkRegistryAllocateLargePool", Kind::Allocate, 1000, 14_613.0),
        work("BenchmarkRegistryRegisterOrUpdate", Kind::Report, 100, 127.9),
        work("BenchmarkRegistryGetAllFastlets", Kind::GetAll, 100, 4810.0),
        work("BenchmarkRegistryGetAllFastletsLargePool", Kind::GetAll, 1000, 51_290.0),
        work("BenchmarkRegistryGetFastletByID", Kind::Get, 100, 27.06),
        work("BenchmarkRegistryRelease", Kind::Release, 100, 14.49),
        work("BenchmarkRegistryCleanupStaleFastlets", Kind::RemoveStale, 100, 38.58),
        work("BenchmarkParallelAllocate", Kind::Parallel, 100, 1513.0),
    ]
};

/// A pool and everything that its operations need, made before the clock runs.
#[derive(Debug)]
pub struct Pool {
    registry: Registry,
    hosts: Vec<HostNumber>,
    templates: Vec<TemplateKey>,
    /// One that no host has.
    unheld: TemplateKey,
    ports: Vec<Ports>,
    tickets: Vec<Ticket>,
    statuses: Vec<HostStatus>,
    now: Duration,
}

impl Pool {
    /// A pool of `hosts`.
    ///
    /// # Errors
    /// When the registry does not take that many.
    pub fn new(hosts: u16) -> Result<Self> {
        let mut registry = Registry::new(hosts, 1)?;
        let names = (0..TEMPLATES).map(|n| registry.intern(&format!("template-{n}")));
        let templates = names.collect::<Result<Vec<_>, _>>()?;
        let unheld = registry.intern("nobody-has-this")?;
        let pair = |n| Ports::new(&[8000 + n % PORTS, 8000 + (n + 1) % PORTS]);
        let mut pool = Self {
            registry,
            hosts: (0..hosts).filter_map(HostNumber::new).collect(),
            templates,
            unheld,
            ports: (0..PORTS).step_by(2).map(pair).collect::<Result<_, _>>()?,
            tickets: Vec::with_capacity(BATCH),
            statuses: Vec::with_capacity(usize::from(hosts)),
            now: Duration::ZERO,
        };
        for at in 0..pool.hosts.len() {
            pool.report(at)?;
        }
        Ok(pool)
    }

    fn report(&mut self, at: usize) -> Result<()> {
        let at = at % self.hosts.len();
        let twice = [&self.templates[..], &self.templates[..]].concat();
        let templates = &twice[at % TEMPLATES..][..TEMPLATES / 2];
        let report = Report { slots: SLOTS, load: 0, draining: false, templates };
        self.registry.report(self.hosts[at], &report, self.now)?;
        Ok(())
    }

    /// Allocates, and keeps the tickets; the time it took.
    ///
    /// # Errors
    /// When the pool is full.
    pub fn allocate(
        &mut self,
        count: usize,
        want: impl Fn(&Self, usize) -> Want<'static>,
    ) -> Result<Duration> {
        ensure!(self.tickets.len() + count <= self.tickets.capacity(), "release first");
        let start = Instant::now();
        for n in 0..count {
            let want = want(self, n);
            self.tickets.push(self.registry.allocate(black_box(&want))?);
        }
        Ok(start.elapsed())
    }

    /// Gives all tickets back; the time it took.
    ///
    /// # Errors
    /// When one is refused.
    pub fn release(&mut self) -> Result<Duration> {
        let start = Instant::now();
        for ticket in self.tickets.drain(..) {
            self.registry.release(black_box(ticket))?;
        }
        Ok(start.elapsed())
    }

    /// A sandbox of one of the templates.
    #[must_use]
    pub fn of_template(&self, n: usize) -> Want<'static> {
        Want { template: Some(self.templates[n % TEMPLATES]), ..Want::default() }
    }

    /// The same, with two ports of its host.
    #[must_use]
    pub fn with_ports(&self, n: usize) -> Want<'static> {
        Want { ports: self.ports[n % self.ports.len()], ..self.of_template(n) }
    }

    /// One of a template that no host has.
    #[must_use]
    pub fn of_none(&self, _: usize) -> Want<'static> {
        Want { template: Some(self.unheld), ..Want::default() }
    }

    fn batch(&mut self, kind: Kind, count: usize) -> Result<Duration> {
        let allocated = match kind {
            Kind::Allocate => self.allocate(count, Self::of_template)?,
            Kind::AllocateWithPorts => self.allocate(count, Self::with_ports)?,
            Kind::AllocateNoMatch => self.allocate(count, Self::of_none)?,
            Kind::Release => {
                self.allocate(count, Self::of_template)?;
                return self.release();
            }
            Kind::Report => return self.reports(count),
            Kind::Parallel => return parallel(u16::try_from(self.hosts.len())?, count),
            Kind::GetAll | Kind::Get | Kind::RemoveStale => return self.looks(kind, count),
        };
        self.release()?;
        Ok(allocated)
    }

    fn reports(&mut self, count: usize) -> Result<Duration> {
        let templates = self.templates[..TEMPLATES / 2].to_vec();
        let report = Report { slots: SLOTS, load: 0, draining: false, templates: &templates };
        let start = Instant::now();
        for n in 0..count {
            self.now += Duration::from_nanos(1);
            let host = self.hosts[n % self.hosts.len()];
            black_box(self.registry.report(black_box(host), &report, self.now)?);
        }
        Ok(start.elapsed())
    }

    fn looks(&mut self, kind: Kind, count: usize) -> Result<Duration> {
        let start = Instant::now();
        for n in 0..count {
            match kind {
                Kind::GetAll => {
                    self.statuses.clear();
                    self.statuses.extend(self.registry.hosts());
                    black_box(&self.statuses);
                }
                Kind::Get => {
                    black_box(self.registry.get(black_box(self.hosts[n % self.hosts.len()])));
                }
                _ => {
                    let age_max = Duration::from_secs(1);
                    let gone = |host: HostNumber| {
                        black_box(host);
                    };
                    self.registry.remove_stale(black_box(self.now), age_max, gone);
                }
            }
        }
        let time = start.elapsed();
        ensure!(self.registry.len() == self.hosts.len(), "a host that had reported was removed");
        Ok(time)
    }
}

/// As shards do it: a registry on each thread, and loads that all of them see. The time is that of
/// all threads together for `count` choices among them, as Go's parallel benchmarks count.
fn parallel(hosts: u16, count: usize) -> Result<Duration> {
    let threads = std::thread::available_parallelism()?.get();
    let each = count.div_ceil(threads);
    let loads: Vec<AtomicU32> = (0..hosts).map(|_| AtomicU32::new(0)).collect();
    let (begin, slowest) = (Barrier::new(threads), RwLock::new(Duration::ZERO));
    let work = || -> Result<()> {
        let mut pool = Pool::new(hosts)?;
        begin.wait();
        let start = Instant::now();
        for n in 0..each {
            let want = pool.of_template(n);
            let load = |host: HostNumber| loads[usize::from(host.get())].load(Ordering::Relaxed);
            let ticket = pool.registry.allocate_by(black_box(&want), load)?;
            // What the host does that admits it.
            loads[usize::from(ticket.host().get())].fetch_add(1, Ordering::Relaxed);
            pool.tickets.push(ticket);
        }
        let time = start.elapsed();
        let mut slowest = slowest.write().unwrap_or_else(PoisonError::into_inner);
        *slowest = time.max(*slowest);
        Ok(())
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        running.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked")))
        })
    })?;
    // The threads did a few more than asked where they do not divide it.
    let slowest = slowest.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (asked, done) = (u32::try_from(count)?, u32::try_from(each * threads)?);
    Ok(slowest * asked / done)
}

impl Work {
    /// Operations of one batch: looking at a thousand hosts is itself a batch.
    #[must_use]
    pub fn batch(&self) -> usize {
        if self.kind == Kind::GetAll { 50 } else { BATCH }
    }

    /// Whether it is a choice by one thread, of which it is told what it takes of the allocator.
    #[must_use]
    pub fn is_choice(&self) -> bool {
        matches!(self.kind, Kind::Allocate | Kind::AllocateWithPorts | Kind::AllocateNoMatch)
    }

    /// Does it `count` times; the time that the operations themselves took.
    ///
    /// # Errors
    /// When one of them fails, which none may.
    pub fn run(&self, pool: &mut Pool, count: u64) -> Result<Duration> {
        let mut left = usize::try_from(count)?;
        let mut total = Duration::ZERO;
        while left > 0 {
            let now = left.min(BATCH);
            total += pool.batch(self.kind, now).with_context(|| self.name)?;
            left -= now;
        }
        Ok(total)
    }
}
