//! Numbers of every sandbox by itself, for a reader that wants them so.
//!
//! Asked by `http` through [`Host::measure_sandboxes`]. Not among the numbers of shards: a series for each of
//! thousands of sandboxes, most of which live for minutes, is something to want on purpose. Refuses to say
//! anything of a sandbox without a process.

use std::borrow::Cow;
use std::time::Duration;

use super::{Family, Measured, Sample, Value, table};
use crate::{Host, ProcessView, SandboxView, ShardError};

impl Host {
    /// What every sandbox with a process uses, ordered by its start.
    ///
    /// # Errors
    /// See [`ShardError`].
    pub async fn measure_sandboxes(&self) -> Result<Vec<Measured>, ShardError> {
        let view = self.view(None, usize::MAX).await?;
        Ok(view.sandboxes.iter().filter_map(of_sandbox).collect())
    }
}

fn of_sandbox(view: &SandboxView) -> Option<Measured> {
    let ProcessView { memory_bytes, cpu, wrong_node_pages, wrong_node_time } = view.process?;
    let labels = [view.id.to_string(), view.template.clone(), view.tenant.as_str().to_owned()];
    let sample = |family: &'static Family, value: Value| Sample {
        family,
        labels: labels.iter().cloned().map(Cow::Owned).collect(),
        value,
    };
    let time = wrong_node_time.as_ref().map(Duration::as_secs_f64);
    let known = [
        Some(sample(&table::SANDBOX_MEMORY, Value::Whole(memory_bytes))),
        cpu.map(|cpu| sample(&table::SANDBOX_PROCESSORS, Value::Real(cpu))),
        wrong_node_pages.map(|pages| sample(&table::SANDBOX_WRONG_NODE, Value::Whole(pages))),
        time.map(|time| sample(&table::SANDBOX_WRONG_NODE_CPU, Value::Real(time))),
    ];
    Some(Measured::new(view.shard, view.node, known.into_iter().flatten().collect()))
}
