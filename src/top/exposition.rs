//! From the text of `GET /metrics` to how long operations took, over all shards.
//!
//! Called by [`super::client`]. Refuses nothing: a line that it does not know says nothing to it.

use std::collections::BTreeMap;

/// How long operations of one kind took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Times {
    /// Upper bounds in nanoseconds, and how many took no longer. What is above the last bound is in `count` alone.
    buckets: BTreeMap<u64, f64>,
    count: f64,
}

/// Reads `mica_operation_seconds`, by operation.
pub fn operations(text: &str) -> BTreeMap<String, Times> {
    let mut found: BTreeMap<String, Times> = BTreeMap::new();
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("mica_operation_seconds_") else { continue };
        let Some((kind, rest)) = rest.split_once('{') else { continue };
        let Some((labels, value)) = rest.rsplit_once("} ") else { continue };
        let (Some(operation), Ok(value)) = (label(labels, "operation"), value.parse::<f64>())
        else {
            continue;
        };
        let times = found.entry(operation.to_owned()).or_default();
        match (kind, label(labels, "le").map(str::parse::<f64>)) {
            ("count", _) => times.count += value,
            ("bucket", Some(Ok(bound_s))) if bound_s.is_finite() => {
                *times.buckets.entry(whole_ns(bound_s)).or_default() += value;
            }
            _ => {}
        }
    }
    found
}

/// The value of a label. Those that are asked for hold no quotes.
fn label<'a>(labels: &'a str, name: &str) -> Option<&'a str> {
    let mut parts = labels.split(',').filter_map(|label| label.split_once("=\""));
    let (_, value) = parts.find(|(found, _)| *found == name)?;
    value.strip_suffix('"')
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a bound is a positive number of seconds far below 2^63 ns, and a cast saturates"
)]
fn whole_ns(seconds: f64) -> u64 {
    (seconds * 1e9).round() as u64
}

impl Times {
    /// The time in seconds that this share of them did not exceed. `known` are the same of its parts, in
    /// microseconds, and finer than buckets: it lies between the least and the greatest of them.
    pub fn quantile(&self, share: f64, known: impl Iterator<Item = u64> + Clone) -> Option<f64> {
        if self.count <= 0.0 {
            return None;
        }
        let rough = self.rough(share * self.count);
        let least = known.clone().min().map(|us| us as f64 / 1e6);
        let greatest = known.max().map(|us| us as f64 / 1e6);
        Some(least.zip(greatest).map_or(rough, |(least, greatest)| rough.clamp(least, greatest)))
    }

    /// Read off the buckets, on the scale that they are spaced by.
    fn rough(&self, wanted: f64) -> f64 {
        let (mut low, mut below) = (0.0, 0.0);
        for (bound_ns, held) in &self.buckets {
            let high = *bound_ns as f64 / 1e9;
            if *held >= wanted && *held > below {
                let part = (wanted - below) / (held - below);
                let from: f64 = if low == 0.0 { high / 2.0 } else { low };
                return from * (high / from).powf(part);
            }
            (low, below) = (high, *held);
        }
        low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"# HELP mica_operation_seconds How long.
# TYPE mica_operation_seconds histogram
mica_operation_seconds_bucket{shard="0",node="0",operation="create",le="0.001"} 0
mica_operation_seconds_bucket{shard="0",node="0",operation="create",le="0.002"} 8
mica_operation_seconds_bucket{shard="0",node="0",operation="create",le="+Inf"} 8
mica_operation_seconds_sum{shard="0",node="0",operation="create"} 0.012
mica_operation_seconds_count{shard="0",node="0",operation="create"} 8
mica_operation_seconds_bucket{shard="1",node="1",operation="create",le="0.001"} 0
mica_operation_seconds_bucket{shard="1",node="1",operation="create",le="0.002"} 0
mica_operation_seconds_bucket{shard="1",node="1",operation="create",le="+Inf"} 2
mica_operation_seconds_count{shard="1",node="1",operation="create"} 2
mica_operation_phase_seconds_count{shard="0",node="0",operation="create",phase="run"} 7
mica_operation_seconds_count{shard="0",node="0",operation="kill"} 0
no line at all
"#;

    #[test]
    fn shards_are_added_and_quantiles_lie_within_what_shards_say() {
        let all = operations(TEXT);
        let create = &all["create"];
        assert_eq!((create.count, create.buckets[&2_000_000]), (10.0, 8.0));
        let none = std::iter::empty();
        let median = create.quantile(0.5, none.clone()).unwrap();
        assert!((0.001..=0.002).contains(&median), "{median}");
        assert_eq!(create.quantile(0.99, none.clone()), Some(0.002), "above every bound");
        assert_eq!(create.quantile(0.99, [1_500, 30_000].into_iter()), Some(0.002));
        assert_eq!(create.quantile(0.5, [1_700, 1_900].into_iter()), Some(0.0017));
        assert_eq!(all["kill"].quantile(0.5, none), None);
    }
}
