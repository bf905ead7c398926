//! A number with its name, on its way to whoever asked for it.
//!
//! Made by shards and by what runs on them, rendered by `http`. Refuses to know a format.

use std::borrow::Cow;
use std::fmt;

use mica_units::{Distribution, ShardId};

/// What a number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only rises, while the daemon runs.
    Counter,
    /// It rises and falls.
    Gauge,
    /// Durations in buckets.
    Histogram,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        })
    }
}

/// Numbers of one name, told apart by labels.
#[derive(Debug)]
pub struct Family {
    /// The name, which ends in its unit.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// The unit, or what is counted.
    pub unit: &'static str,
    /// One line about it.
    pub help: &'static str,
    /// The names of its labels, behind `shard` and `node` where it is a shard's.
    pub labels: &'static [&'static str],
    /// Whether each shard has its own. Others are the host's or a node's.
    pub per_shard: bool,
}

/// A number.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A count or a size.
    Whole(u64),
    /// A time in seconds, or a share.
    Real(f64),
    /// Durations.
    Durations(Distribution),
}

/// One number of a family.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The family.
    pub family: &'static Family,
    /// The values of its labels, in order.
    pub labels: Vec<Cow<'static, str>>,
    /// The number.
    pub value: Value,
}

impl Sample {
    /// A number.
    #[must_use]
    pub fn new<const N: usize>(
        family: &'static Family,
        labels: [&'static str; N],
        value: Value,
    ) -> Self {
        debug_assert_eq!(family.labels.len(), N, "{}", family.name);
        Self { family, labels: labels.into_iter().map(Cow::Borrowed).collect(), value }
    }

    /// A count or a size.
    #[must_use]
    pub fn count<const N: usize>(
        family: &'static Family,
        labels: [&'static str; N],
        count: u64,
    ) -> Self {
        Self::new(family, labels, Value::Whole(count))
    }
}

/// Something on a shard that counts for itself.
pub trait Source: fmt::Debug {
    /// Adds what it has counted.
    fn sample(&self, into: &mut Vec<Sample>);
}

/// The numbers of one shard.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Whose.
    pub shard: ShardId,
    /// Its memory node.
    pub node: u32,
    /// The numbers.
    pub samples: Vec<Sample>,
    /// Messages that it sent, by the number of the shard they are for, and took.
    pub(crate) sent: Vec<u64>,
    pub(crate) taken: u64,
}

impl Measured {
    /// These numbers of a shard.
    #[must_use]
    pub fn new(shard: ShardId, node: u32, samples: Vec<Sample>) -> Self {
        Self { shard, node, samples, sent: Vec::new(), taken: 0 }
    }
}
