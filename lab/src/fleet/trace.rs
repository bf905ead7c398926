//! Who arrives when: read from a file, or made from a seed.
//!
//! Called by `mica lab simulate`. Refuses traces that are too long, whose times go back, or that hold anything but
//! numbers where numbers belong.

use std::collections::HashMap;
use std::io::BufRead;

use anyhow::{Context, Result, bail, ensure};

use super::random::Random;

/// Arrivals of one trace.
pub const ARRIVALS_MAX: usize = 20_000_000;

/// Templates of one trace.
pub const TEMPLATES_MAX: usize = 4000;

/// Longest time of a trace and of a life: 30 years.
const SECONDS_MAX: f64 = 1e9;

/// The memory of a sandbox whose line does not say.
pub(super) const MEMORY_MIB: u32 = 2048;

/// The part of time in which a bursty load comes at its higher rate, and how long that lasts.
const BURST_SHARE: f64 = 0.1;
const BURST_SECONDS: f64 = 1.0;

/// A sandbox that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When.
    pub at_ns: u64,
    /// How long it lives once it is made.
    pub life_ns: u64,
    /// Of which template.
    pub template: u16,
    /// With how much memory.
    pub memory_mib: u32,
}

/// Arrivals in the order of their times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Who arrives.
    pub arrivals: Vec<Arrival>,
    /// How many templates there are.
    pub templates: usize,
}

/// A load that is made.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// How many arrive.
    pub arrivals: usize,
    /// In a second, on average.
    pub per_s: f64,
    /// How long each lives, on average.
    pub life_s: f64,
    /// How many times the average a burst is. 1: they come by chance, but evenly.
    pub burst: f64,
    /// Of how many templates; the second is asked for half as often as the first, the third a third as often.
    pub templates: usize,
    /// What each takes of its host.
    pub memory_mib: u32,
}

/// A number of seconds that a simulation can count in.
fn nanoseconds(seconds: f64) -> Option<u64> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to lie between 0 and a billion seconds"
    )]
    (0.0..=SECONDS_MAX).contains(&seconds).then_some((seconds * 1e9) as u64)
}

impl Trace {
    /// Reads lines of `time_s,template,life_s[,memory_mib]`. Empty ones, such as start with `#`, and a first
    /// one that names the fields are passed over. One that says no memory takes the usual.
    ///
    /// # Errors
    /// When a line is not in form; it is named by its number.
    pub fn read(lines: impl BufRead, usual_mib: u32) -> Result<Self> {
        let mut names = HashMap::new();
        let mut arrivals: Vec<Arrival> = Vec::new();
        for (line, number) in lines.lines().zip(1usize..) {
            let line = line.with_context(|| format!("line {number} cannot be read"))?;
            let text = line.trim();
            let passed = text.is_empty() || text.starts_with('#');
            if passed || (arrivals.is_empty() && text.starts_with("time_s,")) {
                continue;
            }
            let latest = arrivals.last().map_or(0, |arrival| arrival.at_ns);
            let arrival = parse(text, usual_mib, &mut names);
            let arrival = arrival.with_context(|| format!("line {number}"))?;
            ensure!(arrival.at_ns >= latest, "line {number}: its time is before that of the last");
            ensure!(arrivals.len() < ARRIVALS_MAX, "more than {ARRIVALS_MAX} arrivals");
            arrivals.push(arrival);
        }
        ensure!(!arrivals.is_empty(), "there are no arrivals in it");
        Ok(Self { arrivals, templates: names.len() })
    }

    /// Makes one.
    ///
    /// # Errors
    /// When a number means nothing.
    pub fn make(load: &Load, seed: u64) -> Result<Self> {
        let Load { arrivals, per_s, life_s, burst, templates, memory_mib } = *load;
        ensure!((1..=ARRIVALS_MAX).contains(&arrivals), "arrivals must be 1 to {ARRIVALS_MAX}");
        ensure!((1..=TEMPLATES_MAX).contains(&templates), "templates must be 1 to {TEMPLATES_MAX}");
        ensure!(
            (1e-6..=1e9).contains(&per_s),
            "the rate must be 0.000001 to 1000000000, not {per_s}"
        );
        ensure!(
            (1e-6..=1e8).contains(&life_s),
            "a life must have 0.000001 to 100000000 s, not {life_s}"
        );
        ensure!(
            (1.0..=10.0).contains(&burst),
            "a burst must be 1 to 10 times the rate, not {burst}"
        );
        let shares = zipf(templates);
        let mut random = Random::new(seed, 1);
        let mut clock = Clock::new(per_s, burst);
        let arrivals = (0..arrivals).map(|_| {
            let at_ns = nanoseconds(clock.next(&mut random)).context("the trace is too long")?;
            let life_ns = nanoseconds(random.exponential(life_s)).context("a life is too long")?;
            let drawn = random.unit();
            let template = shares.partition_point(|share| *share <= drawn).min(templates - 1);
            let template = u16::try_from(template)?;
            Ok(Arrival { at_ns, life_ns, template, memory_mib })
        });
        Ok(Self { arrivals: arrivals.collect::<Result<_>>()?, templates })
    }
}

fn parse(text: &str, usual_mib: u32, names: &mut HashMap<String, u16>) -> Result<Arrival> {
    let fields: Vec<&str> = text.split(',').map(str::trim).collect();
    let (time, template, life, memory) = match fields[..] {
        [time, template, life] => (time, template, life, None),
        [time, template, life, memory] => (time, template, life, Some(memory)),
        _ => bail!("it has {} fields, not time_s,template,life_s[,memory_mib]", fields.len()),
    };
    let seconds = |name: &str, text: &str| {
        let value: f64 =
            text.parse().with_context(|| format!("{name} is not a number: {text:?}"))?;
        nanoseconds(value).with_context(|| format!("{name} is {value}, not 0 to {SECONDS_MAX}"))
    };
    ensure!((1..=256).contains(&template.len()), "a template's name has 1 to 256 bytes");
    let memory_mib = memory.map_or(Ok(usual_mib), |text| {
        let mib = text.parse().ok().filter(|mib| (1..=1 << 24).contains(mib));
        mib.with_context(|| format!("memory_mib is {text:?}, not 1 to {}", 1 << 24))
    })?;
    let (at_ns, life_ns) = (seconds("time_s", time)?, seconds("life_s", life)?);
    let next = names.len();
    let template = match names.get(template) {
        Some(known) => *known,
        None => {
            ensure!(next < TEMPLATES_MAX, "more than {TEMPLATES_MAX} templates");
            let new = u16::try_from(next)?;
            names.insert(template.to_owned(), new);
            new
        }
    };
    Ok(Arrival { at_ns, life_ns, template, memory_mib })
}

/// For each template, the share of arrivals that are of it or of one before it.
fn zipf(templates: usize) -> Vec<f64> {
    let mut sum = 0.0;
    let mut sums: Vec<f64> = (1u32..)
        .take(templates)
        .map(|rank| {
            sum += 1.0 / f64::from(rank);
            sum
        })
        .collect();
    for share in &mut sums {
        *share /= sum;
    }
    sums
}

/// Arrivals by chance, at one of two rates for times that also end by chance.
struct Clock {
    now_s: f64,
    /// Each with how long it lasts on average.
    rates: [(f64, f64); 2],
    /// Which of them it is, and when the other begins.
    in_burst: bool,
    until_s: f64,
}

impl Clock {
    fn new(per_s: f64, burst: f64) -> Self {
        let calm = per_s * (1.0 - BURST_SHARE * burst) / (1.0 - BURST_SHARE);
        let calm_seconds = BURST_SECONDS / BURST_SHARE - BURST_SECONDS;
        let rates = [(calm, calm_seconds), (per_s * burst, BURST_SECONDS)];
        Self { now_s: 0.0, rates, in_burst: true, until_s: 0.0 }
    }

    fn next(&mut self, random: &mut Random) -> f64 {
        // In one rate time has no memory, so what is left of a wait is drawn again in the next.
        loop {
            let (rate, _) = self.rates[usize::from(self.in_burst)];
            let then = self.now_s + random.exponential(1.0) / rate.max(1e-12);
            if then <= self.until_s {
                self.now_s = then;
                return then;
            }
            self.now_s = self.until_s;
            self.in_burst = !self.in_burst;
            let (_, lasts) = self.rates[usize::from(self.in_burst)];
            self.until_s = self.now_s + random.exponential(lasts);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOAD: Load = Load {
        arrivals: 200_000,
        per_s: 1000.0,
        life_s: 5.0,
        burst: 1.0,
        templates: 3,
        memory_mib: MEMORY_MIB,
    };

    /// Arrivals in each tenth of a second.
    fn counts(trace: &Trace) -> Vec<f64> {
        let last = trace.arrivals.last().unwrap().at_ns / 100_000_000;
        let mut counts = vec![0.0; usize::try_from(last).unwrap() + 1];
        for arrival in &trace.arrivals {
            counts[usize::try_from(arrival.at_ns / 100_000_000).unwrap()] += 1.0;
        }
        counts.pop();
        counts
    }

    fn mean_and_variance(values: &[f64]) -> (f64, f64) {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
        (mean, squares / values.len() as f64)
    }

    #[test]
    fn a_load_has_its_rate_and_bursts_are_bursts() {
        let even = Trace::make(&LOAD, 1).unwrap();
        let (mean, variance) = mean_and_variance(&counts(&even));
        assert!((mean - 100.0).abs() < 2.0, "{mean}");
        assert!((0.8..1.2).contains(&(variance / mean)), "by chance: {variance} of {mean}");
        let bursty = Trace::make(&Load { burst: 8.0, ..LOAD }, 1).unwrap();
        let (mean, variance) = mean_and_variance(&counts(&bursty));
        assert!((70.0..130.0).contains(&mean), "{mean}");
        assert!(variance / mean > 50.0, "{variance} of {mean}");
    }

    #[test]
    fn templates_have_their_shares_and_lives_their_mean() {
        let trace = Trace::make(&LOAD, 2).unwrap();
        let mut counts = [0.0f64; 3];
        let mut lives = 0.0;
        for arrival in &trace.arrivals {
            counts[usize::from(arrival.template)] += 1.0;
            lives += arrival.life_ns as f64 / 1e9;
        }
        assert!((counts[0] / counts[1] - 2.0).abs() < 0.05, "{counts:?}");
        assert!((counts[0] / counts[2] - 3.0).abs() < 0.1, "{counts:?}");
        assert!((lives / 200_000.0 - 5.0).abs() < 0.1, "{lives}");
    }

    #[test]
    fn a_file_is_read_as_it_is_written() {
        let text =
            "time_s,template,life_s\n# the first\n0,base,10\n\n0.5, code ,2.5,512\n0.5,base,1\n";
        let trace = Trace::read(text.as_bytes(), MEMORY_MIB).unwrap();
        let arrival =
            |at_ns, life_ns, template, memory_mib| Arrival { at_ns, life_ns, template, memory_mib };
        assert_eq!(trace.templates, 2);
        let (half, second) = (500_000_000, 1_000_000_000);
        assert_eq!(
            trace.arrivals,
            [
                arrival(0, 10 * second, 0, 2048),
                arrival(half, 5 * half, 1, 512),
                arrival(half, second, 0, 2048),
            ]
        );
    }

    #[test]
    fn bad_lines_are_named() {
        for (text, expected) in [
            ("", "no arrivals"),
            ("0,base,1\n1,base\n", "line 2: it has 2 fields"),
            ("x,base,1", "line 1: time_s is not a number"),
            ("0,base,-1", "line 1: life_s is -1"),
            ("NaN,base,1", "time_s is NaN"),
            ("1e300,base,1", "not 0 to 1000000000"),
            ("0,,1", "a template's name"),
            ("0,base,1,0", "memory_mib"),
            ("2,base,1\n1,base,1", "line 2: its time is before"),
        ] {
            let error = format!("{:#}", Trace::read(text.as_bytes(), MEMORY_MIB).unwrap_err());
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        for load in [
            Load { per_s: f64::NAN, ..LOAD },
            Load { per_s: 0.0, ..LOAD },
            Load { life_s: -1.0, ..LOAD },
            Load { burst: 11.0, ..LOAD },
            Load { arrivals: 0, ..LOAD },
            Load { templates: 5000, ..LOAD },
        ] {
            assert!(Trace::make(&load, 1).is_err(), "{load:?}");
        }
    }
}
