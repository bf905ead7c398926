//! A shard's numbers for a reader: what it counted, and what is looked at only now.
//!
//! Called for `Operation::Measure`, and by `host` for the sums over all shards. Refuses to look at the
//! processes of its sandboxes more than once a second, however many readers there are.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use mica_numa::rt::{self, time::Instant};

use super::{Measured, Sample, Value, table};
use crate::shard::Shard;
use crate::{WrongNode, pressure, proc};

/// How long a look at all processes is good for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What the processes of a shard's sandboxes use together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Looked {
    at: Instant,
    used: proc::Use,
}

impl Shard {
    /// Everything that this shard can say in numbers.
    pub(crate) async fn measured(&self) -> Measured {
        let mut samples = Vec::new();
        self.metrics.sample(&mut samples);
        self.sample_sandboxes(&mut samples);
        self.sample_pool(&mut samples);
        self.sample_ring(&mut samples);
        self.sample_executor(&mut samples);
        let used = self.used_by_all().await;
        sample_processes(used, &mut samples);
        if let Some(WrongNode { pages, vcpu_time, .. }) = self.wrong_node_of_all() {
            samples.push(Sample::count(&table::VM_WRONG_NODE, [], pages));
            let time = Value::Real(vcpu_time.as_secs_f64());
            samples.push(Sample::new(&table::VM_WRONG_NODE_CPU, [], time));
        }
        let metrics = &self.metrics;
        Measured {
            shard: self.id,
            node: self.node,
            samples,
            sent: metrics.sent.iter().map(|(_, sent)| sent.get()).collect(),
            taken: metrics.taken.get(),
        }
    }

    fn sample_sandboxes(&self, into: &mut Vec<Sample>) {
        let mut by_state: BTreeMap<&'static str, u64> =
            crate::sandbox::STATES.into_iter().map(|state| (state, 0)).collect();
        for state in self.sandbox_states() {
            *by_state.entry(state).or_default() += 1;
        }
        let samples = by_state.into_iter().map(|(s, n)| Sample::count(&table::SANDBOXES, [s], n));
        into.extend(samples);
    }

    fn sample_pool(&self, into: &mut Vec<Sample>) {
        let counts = self.pool.counts();
        into.push(Sample::count(&table::POOL_DEPTH, [], self.pool.waiting() as u64));
        into.push(Sample::count(&table::POOL_BUILDING, [], self.pool.building() as u64));
        into.push(Sample::count(&table::POOL_HITS, [], counts.hits));
        into.push(Sample::count(&table::POOL_MISSES, [], counts.misses));
        let spawns = Value::Durations(self.pool.spawns().distribution());
        into.push(Sample::new(&table::POOL_SPAWN, [], spawns));
    }

    fn sample_ring(&self, into: &mut Vec<Sample>) {
        let stats = self.ring.stats();
        into.push(Sample::count(&table::RING_DEPTH, [], stats.depth as u64));
        into.push(Sample::count(&table::RING_BUFFERS, [], stats.free_buffers as u64));
        into.push(Sample::count(&table::RING_SUBMISSIONS, [], stats.submissions));
        for (kind, times) in stats.completed {
            let times = Value::Durations(times);
            into.push(Sample::new(&table::RING_SECONDS, [kind.name()], times));
        }
    }

    fn sample_executor(&self, into: &mut Vec<Sample>) {
        let stats = rt::stats();
        let idle = self.begun.elapsed().saturating_sub(stats.busy);
        let real = |time: Duration| Value::Real(time.as_secs_f64());
        into.push(Sample::new(&table::EXECUTOR_BUSY, [], real(stats.busy)));
        into.push(Sample::new(&table::EXECUTOR_TASKS, [], real(stats.tasks)));
        into.push(Sample::new(&table::EXECUTOR_IDLE, [], real(idle)));
        into.push(Sample::count(&table::EXECUTOR_RUNS, [], stats.runs));
        if let Some(stalls) = self.metrics.stalls.get() {
            into.push(Sample::count(&table::EXECUTOR_STALLS, [], stalls.count()));
            into.push(Sample::new(&table::EXECUTOR_STALLED, [], real(stalls.total())));
        }
        into.push(Sample::new(&table::CORES_AWAKE, [], real(self.awake.held())));
    }

    async fn used_by_all(&self) -> proc::Use {
        if let Some(Looked { at, used }) = self.metrics.looked.get()
            && at.elapsed() < LOOK_EVERY
        {
            return used;
        }
        let pids = self.pids();
        let read = move || pids.into_iter().filter_map(proc::read).sum();
        match rt::blocking(read).await {
            Ok(used) => {
                self.metrics.looked.set(Some(Looked { at: Instant::now(), used }));
                used
            }
            Err(error) => {
                tracing::debug!(%error, "the processes of sandboxes were not looked at");
                self.metrics.looked.get().map(|looked| looked.used).unwrap_or_default()
            }
        }
    }

    /// What is the host's and no shard's.
    pub(crate) async fn sample_host(&self) -> Vec<Sample> {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let mut info = Sample::count(&table::BUILD_INFO, [env!("CARGO_PKG_VERSION"), ""], 1);
        info.labels[1] = Cow::Owned(kernel);
        let uptime = Value::Real(self.begun.elapsed().as_secs_f64());
        let mut samples = vec![
            info,
            Sample::new(&table::UPTIME, [], uptime),
            Sample::count(&table::DISK_COPIES, [], self.workshop.store.disk_copies()),
        ];
        let nodes = self.workshop.nodes.clone();
        let look = move || {
            let look = |(node, _): &(u32, usize)| Some((*node, pressure::memory(*node).ok()?));
            nodes.iter().filter_map(look).collect::<Vec<_>>()
        };
        for (node, (total, free)) in rt::blocking(look).await.unwrap_or_default() {
            for (family, bytes) in [(&table::NODE_MEMORY, total), (&table::NODE_FREE, free)] {
                let mut sample = Sample::count(family, [""], bytes);
                sample.labels[0] = Cow::Owned(node.to_string());
                samples.push(sample);
            }
        }
        samples
    }
}

fn sample_processes(used: proc::Use, into: &mut Vec<Sample>) {
    into.push(Sample::count(&table::VM_FAULTS, ["minor"], used.minor_faults));
    into.push(Sample::count(&table::VM_FAULTS, ["major"], used.major_faults));
    into.push(Sample::count(&table::VM_COW, [], used.anonymous_bytes));
    into.push(Sample::count(&table::VM_RESIDENT, [], used.resident_bytes));
    into.push(Sample::new(&table::VM_CPU, [], Value::Real(used.cpu.as_secs_f64())));
}

/// Adds what waits for each shard: what all sent to it and it has not taken.
pub(crate) fn add_mailboxes(measured: &mut [Measured]) {
    let sent_to = |shard: usize| -> u64 {
        measured.iter().filter_map(|measured| measured.sent.get(shard)).sum()
    };
    let sent: Vec<u64> =
        measured.iter().map(|measured| sent_to(usize::from(measured.shard.index()))).collect();
    for (measured, sent) in measured.iter_mut().zip(sent) {
        let depth = sent.saturating_sub(measured.taken);
        measured.samples.push(Sample::count(&table::MAILBOX_DEPTH, [], depth));
        measured.samples.push(Sample::count(&table::MAILBOX_TAKEN, [], measured.taken));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mica_units::ShardId;

    #[test]
    fn what_waits_is_what_was_sent_and_not_taken() {
        let shard = |index, sent: [u64; 2], taken| Measured {
            shard: ShardId::new(index),
            node: 0,
            samples: Vec::new(),
            sent: sent.to_vec(),
            taken,
        };
        // The second has taken one that the first had not yet counted as sent.
        let mut measured = [shard(0, [0, 5], 7), shard(1, [9, 0], 6)];
        add_mailboxes(&mut measured);
        let depth = |measured: &Measured| {
            let found = measured.samples.iter().find(|s| s.family.name == "mica_mailbox_depth");
            found.map(|sample| sample.value.clone())
        };
        assert_eq!(depth(&measured[0]), Some(Value::Whole(2)));
        assert_eq!(depth(&measured[1]), Some(Value::Whole(0)));
    }
}
