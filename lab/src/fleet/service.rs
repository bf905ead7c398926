//! How long a create takes on a host that has nothing else to do.
//!
//! Called by the simulator for each create. Refuses reports that lack the two operations it draws from.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::random::Random;

/// A distribution by some of its percentiles, straight between them.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Curve {
    p50_ns: f64,
    p95_ns: f64,
    p99_ns: f64,
    max_ns: f64,
}

impl Curve {
    const fn of_us(p50: f64, p95: f64, p99: f64, max: f64) -> Self {
        Self { p50_ns: p50 * 1e3, p95_ns: p95 * 1e3, p99_ns: p99 * 1e3, max_ns: max * 1e3 }
    }

    /// The time that a part of all stays at or below. Below the median they lie as far from it as those up to the
    /// 95th percentile lie above, but none below half of it: reports do not say.
    fn at(&self, part: f64) -> f64 {
        let least = (2.0 * self.p50_ns - self.p95_ns).max(self.p50_ns / 2.0);
        let points = [
            (0.0, least),
            (0.5, self.p50_ns),
            (0.95, self.p95_ns),
            (0.99, self.p99_ns),
            (1.0, self.max_ns),
        ];
        let pairs = points.windows(2).map(|pair| (pair[0], pair[1]));
        for ((low, from), (high, to)) in pairs {
            if part <= high {
                return from + (to - from) * (part - low) / (high - low);
            }
        }
        self.max_ns
    }

    fn read(results: &[Value], op: &str) -> Result<Self> {
        let row = results.iter().find(|row| row["op"] == op);
        let row = row.with_context(|| format!("it has no operation {op}"))?;
        let us = |name: &str| {
            let value = row[name].as_f64().filter(|us| (0.001..1e9).contains(us));
            value.with_context(|| format!("{name} of {op} is no time"))
        };
        let curve = Self::of_us(us("p50_us")?, us("p95_us")?, us("p99_us")?, us("max_us")?);
        let sorted = [curve.p50_ns, curve.p95_ns, curve.p99_ns, curve.max_ns].is_sorted();
        ensure!(sorted, "the percentiles of {op} are not in order");
        Ok(curve)
    }
}

/// What creates take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Service {
    /// With a VM process that waits in the pool.
    hit: Curve,
    /// With one that has to be made.
    miss: Curve,
}

impl Default for Service {
    /// A run of `make bench`: see `benches/README.md` for its machine.
    fn default() -> Self {
        Self {
            hit: Curve::of_us(828.2, 1064.9, 1233.0, 6869.0),
            miss: Curve::of_us(16_181.9, 28_227.7, 32_041.9, 32_540.3),
        }
    }
}

impl Service {
    /// What a file of `mica bench engine --json` found.
    ///
    /// # Errors
    /// When it is no such file.
    pub fn read(report: &Value) -> Result<Self> {
        let results = report["results"].as_array().context("it has no list of results")?;
        let hit = Curve::read(results, "restore_pool_hit")?;
        let miss = Curve::read(results, "restore_pool_miss")?;
        Ok(Self { hit, miss })
    }

    /// How long the next one takes.
    pub(super) fn draw(&self, hit: bool, random: &mut Random) -> u64 {
        let curve = if hit { &self.hit } else { &self.miss };
        whole(curve.at(random.unit()))
    }

    /// How long making one VM process for the pool takes.
    pub(super) fn making_ns(&self) -> u64 {
        whole((self.miss.p50_ns - self.hit.p50_ns).max(1.0))
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "times of reports are checked to be positive and below 1000 s"
)]
fn whole(ns: f64) -> u64 {
    ns as u64
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn draws_have_the_percentiles_of_the_report() {
        let mut random = Random::new(1, 1);
        let service = Service::default();
        let mut drawn: Vec<_> = (0..100_000).map(|_| service.draw(true, &mut random)).collect();
        drawn.sort_unstable();
        for (percent, expected_us) in [(50, 828.2), (95, 1064.9), (99, 1233.0)] {
            let found = drawn[drawn.len() * percent / 100] as f64 / 1e3;
            assert!((found / expected_us - 1.0).abs() < 0.02, "p{percent}: {found}");
        }
        assert!(service.draw(false, &mut random) > 5_000_000);
    }

    #[test]
    fn reports_are_read_and_bad_ones_named() {
        let row = |op: &str| json!({"op": op, "p50_us": 1.0, "p95_us": 2.0, "p99_us": 3.0, "max_us": 4.0});
        let good = json!({"results": [row("restore_pool_hit"), row("restore_pool_miss")]});
        assert_eq!(Service::read(&good).unwrap().hit, Curve::of_us(1.0, 2.0, 3.0, 4.0));
        let mut turned = good.clone();
        turned["results"][1]["p95_us"] = json!(0.5);
        let mut negative = good;
        negative["results"][0]["p50_us"] = json!(-1.0);
        for (bad, expected) in [
            (json!({}), "no list of results"),
            (json!({"results": [row("restore_pool_hit")]}), "no operation restore_pool_miss"),
            (turned, "not in order"),
            (negative, "p50_us of restore_pool_hit is no time"),
        ] {
            assert!(Service::read(&bad).unwrap_err().to_string().contains(expected), "{bad}");
        }
    }
}
