//! What one planned host does with a create: brings its template in, queues for a shard, takes a VM process.
//!
//! Called by the simulator. Refuses nothing by itself: whether a sandbox fits is asked before.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::random::Random;
use super::service::Service;
use super::trace::Arrival;

/// Every host of a fleet has the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostShape {
    /// Sandboxes that it can hold.
    pub slots: u32,
    /// Memory for them.
    pub memory_mib: u64,
    /// Creates that it works on at one time; more queue.
    pub shards: u32,
    /// VM processes that it keeps ready.
    pub pool: u32,
    /// Templates that it keeps at hand. A further one takes the place of the one used longest ago.
    pub templates: usize,
    /// How long it takes to bring in a template that it has not.
    pub cold_ns: u64,
}

/// A template that a host has, or is bringing in.
#[derive(Clone, Copy, Debug)]
struct Held {
    template: u16,
    ready_ns: u64,
    used_ns: u64,
}

/// One host.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) used: u32,
    pub(super) used_mib: u64,
    /// When each shard has done all that it was given, the earliest first.
    shards: BinaryHeap<Reverse<u64>>,
    /// When the pool would be full if nothing were taken.
    pool_full_ns: u64,
    held: Vec<Held>,
}

/// What became of a create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Served {
    pub(super) waited_ns: u64,
    pub(super) done_ns: u64,
    pub(super) pool_hit: bool,
}

impl Host {
    pub(super) fn new(shape: &HostShape) -> Self {
        let shards = (0..shape.shards).map(|_| Reverse(0)).collect();
        Self { used: 0, used_mib: 0, shards, pool_full_ns: 0, held: Vec::new() }
    }

    pub(super) fn fits(&self, shape: &HostShape, memory_mib: u32) -> bool {
        self.used < shape.slots && self.used_mib + u64::from(memory_mib) <= shape.memory_mib
    }

    pub(super) fn take(&mut self, memory_mib: u32) {
        self.used += 1;
        self.used_mib += u64::from(memory_mib);
    }

    pub(super) fn give_back(&mut self, memory_mib: u32) {
        self.used -= 1;
        self.used_mib -= u64::from(memory_mib);
    }

    /// When the template of an arrival is there, and whether it had to be brought in.
    pub(super) fn template(&mut self, shape: &HostShape, arrival: &Arrival) -> (u64, bool) {
        let (template, now) = (arrival.template, arrival.at_ns);
        if let Some(held) = self.held.iter_mut().find(|held| held.template == template) {
            held.used_ns = now;
            return (held.ready_ns.max(now), false);
        }
        if self.held.len() >= shape.templates {
            let oldest = self.held.iter().enumerate().min_by_key(|(_, held)| held.used_ns);
            if let Some((at, _)) = oldest {
                self.held.swap_remove(at);
            }
        }
        let ready_ns = now + shape.cold_ns;
        self.held.push(Held { template, ready_ns, used_ns: now });
        (ready_ns, true)
    }

    /// The templates it has.
    pub(super) fn templates(&self) -> impl Iterator<Item = u16> + '_ {
        self.held.iter().map(|held| held.template)
    }

    /// Works on a create whose template is there. Calls come in the order of `now`.
    pub(super) fn serve(
        &mut self,
        shape: &HostShape,
        now: u64,
        service: &Service,
        random: &mut Random,
    ) -> Served {
        let Reverse(free_ns) = self.shards.pop().unwrap_or(Reverse(0));
        let start_ns = free_ns.max(now);
        let pool_hit = self.take_process(shape, start_ns, service.making_ns());
        let done_ns = start_ns + service.draw(pool_hit, random);
        self.shards.push(Reverse(done_ns));
        Served { waited_ns: start_ns - now, done_ns, pool_hit }
    }

    /// Whether a VM process was ready. They are made one after the other, as they are taken.
    fn take_process(&mut self, shape: &HostShape, now: u64, making_ns: u64) -> bool {
        let missing_ns = self.pool_full_ns.saturating_sub(now);
        let hit = missing_ns + making_ns <= making_ns * u64::from(shape.pool);
        if hit {
            self.pool_full_ns = self.pool_full_ns.max(now) + making_ns;
        }
        hit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: HostShape =
        HostShape { slots: 2, memory_mib: 3000, shards: 2, pool: 3, templates: 2, cold_ns: 1000 };

    fn arrival(at_ns: u64, template: u16) -> Arrival {
        Arrival { at_ns, life_ns: 1, template, memory_mib: 1000 }
    }

    #[test]
    fn slots_and_memory_both_count() {
        let mut host = Host::new(&SHAPE);
        assert!(host.fits(&SHAPE, 3000) && !host.fits(&SHAPE, 3001));
        host.take(1000);
        assert!(host.fits(&SHAPE, 2000) && !host.fits(&SHAPE, 2001));
        host.take(1000);
        assert!(!host.fits(&SHAPE, 1), "no slot is left");
        host.give_back(1000);
        assert!(host.fits(&SHAPE, 1));
    }

    #[test]
    fn a_template_comes_in_once_and_the_one_used_longest_ago_goes() {
        let mut host = Host::new(&SHAPE);
        assert_eq!(host.template(&SHAPE, &arrival(0, 1)), (1000, true));
        assert_eq!(host.template(&SHAPE, &arrival(10, 1)), (1000, false), "on its way");
        assert_eq!(host.template(&SHAPE, &arrival(2000, 2)), (3000, true));
        assert_eq!(host.template(&SHAPE, &arrival(4000, 1)), (4000, false), "there");
        assert_eq!(host.template(&SHAPE, &arrival(5000, 3)), (6000, true));
        let mut left: Vec<_> = host.templates().collect();
        left.sort_unstable();
        assert_eq!(left, [1, 3]);
    }

    #[test]
    fn creates_queue_when_every_shard_is_busy_and_the_pool_runs_dry() {
        let mut host = Host::new(&SHAPE);
        let (service, mut random) = (Service::default(), Random::new(1, 1));
        let served: Vec<_> = (0..4).map(|_| host.serve(&SHAPE, 0, &service, &mut random)).collect();
        let hits: Vec<_> = served.iter().map(|served| served.pool_hit).collect();
        assert_eq!(hits, [true, true, true, false]);
        let waits: Vec<_> = served.iter().map(|served| served.waited_ns).collect();
        let [first, second] = [served[0].done_ns, served[1].done_ns];
        assert_eq!(waits[..3], [0, 0, first.min(second)]);
        let later = served[3].done_ns + 4 * service.making_ns();
        assert!(host.serve(&SHAPE, later, &service, &mut random).pool_hit, "it is filled again");
    }
}
