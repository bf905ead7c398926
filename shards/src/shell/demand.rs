//! How many shells to keep: from what was asked for lately, and at this hour of earlier days.
//!
//! Called by the pool. Pure: time comes in as numbers. For each template a moving average of creates
//! per second, which forgets half in [`HALF_LIFE_S`], and for each hour of the day the highest such
//! average seen, which forgets a part each day. The hours are kept across restarts. Refuses to know
//! more than [`TEMPLATES_MAX`] templates: the quietest is forgotten.

use std::collections::BTreeMap;

/// Seconds in which the moving average forgets half.
const HALF_LIFE_S: f64 = 20.0;

/// What is left of an hour's peak a day later.
const DAY_DECAY: f64 = 0.7;

/// Templates that are told apart.
const TEMPLATES_MAX: usize = 256;

/// Below this many creates per second a template counts as quiet.
const QUIET: f64 = 0.001;

/// Hours of a day (UTC).
const HOURS: usize = 24;

/// What one template was asked for.
#[derive(Clone, Debug, PartialEq)]
struct History {
    /// Creates per second, as of `at_s`.
    rate: f64,
    at_s: f64,
    /// The highest rate in each hour of the day, in creates per second.
    peaks: [f64; HOURS],
    /// The day, counted from 1970, that each peak is of.
    days: [u32; HOURS],
}

impl History {
    fn new(now_s: f64) -> Self {
        Self { rate: 0.0, at_s: now_s, peaks: [0.0; HOURS], days: [0; HOURS] }
    }

    fn rate(&self, now_s: f64) -> f64 {
        // A clock that goes back makes nothing grow.
        self.rate * (-(now_s - self.at_s).max(0.0) * std::f64::consts::LN_2 / HALF_LIFE_S).exp()
    }

    fn record(&mut self, now_s: f64) {
        // One create adds an impulse whose integral over all time to come is one create.
        self.rate = self.rate(now_s) + std::f64::consts::LN_2 / HALF_LIFE_S;
        self.at_s = now_s;
        let (day, hour) = day_and_hour(now_s);
        self.peaks[hour] = self.peak(day, hour).max(self.rate);
        self.days[hour] = day;
    }

    fn peak(&self, day: u32, hour: usize) -> f64 {
        let age = day.saturating_sub(self.days[hour]);
        self.peaks[hour] * DAY_DECAY.powi(i32::try_from(age).unwrap_or(i32::MAX))
    }

    /// Creates per second to be ready for.
    fn expected(&self, now_s: f64) -> f64 {
        let (day, hour) = day_and_hour(now_s);
        self.rate(now_s).max(self.peak(day, hour))
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float becomes the nearest integer of the range, which is what is meant"
)]
fn day_and_hour(now_s: f64) -> (u32, usize) {
    let hours = (now_s / 3600.0) as u64;
    (u32::try_from(hours / 24).unwrap_or(u32::MAX), (hours % 24) as usize)
}

/// Between which numbers a pool stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Shells that are kept however quiet it is.
    pub(crate) floor: usize,
    /// Shells that are never exceeded.
    pub(crate) ceiling: usize,
}

/// What all templates were asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Demand {
    templates: BTreeMap<String, History>,
}

impl Demand {
    /// Counts a create. `now_s` is in seconds since 1970.
    pub(crate) fn record(&mut self, template: &str, now_s: f64) {
        if !self.templates.contains_key(template) && self.templates.len() >= TEMPLATES_MAX {
            let quietest = |(_, a): &(&String, &History), (_, b): &(&String, &History)| {
                a.expected(now_s).total_cmp(&b.expected(now_s))
            };
            let quietest = self.templates.iter().min_by(quietest).map(|(name, _)| name.clone());
            quietest.and_then(|name| self.templates.remove(&name));
        }
        let history = self.templates.entry(template.to_owned());
        history.or_insert_with(|| History::new(now_s)).record(now_s);
    }

    /// How many shells to hold for these templates together: what is expected to be asked for while
    /// `refill_s` pass, on top of the floor.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "what is too large for an integer becomes the largest, and is cut by the ceiling"
    )]
    pub(crate) fn target<'a>(
        &self,
        templates: impl Iterator<Item = &'a str>,
        now_s: f64,
        refill_s: f64,
        bounds: Bounds,
    ) -> usize {
        let expected: f64 = templates
            .filter_map(|template| self.templates.get(template))
            .map(|history| history.expected(now_s))
            .filter(|rate| *rate > QUIET)
            .sum();
        let wanted = (expected * refill_s).ceil() as usize;
        wanted.saturating_add(bounds.floor).min(bounds.ceiling.max(bounds.floor))
    }

    /// The hours, as text: a line for each template with its name, and day and peak of each hour.
    pub(crate) fn to_text(&self) -> String {
        let line = |(name, history): (&String, &History)| {
            let hours = history.days.iter().zip(history.peaks);
            let hours: Vec<String> = hours.map(|(day, peak)| format!("{day}:{peak:.4}")).collect();
            format!("{name} {}\n", hours.join(" "))
        };
        self.templates.iter().map(line).collect()
    }

    /// Reads [`Demand::to_text`] back. A line that is out of form is left out: it is only a hint.
    pub(crate) fn from_text(text: &str, now_s: f64) -> Self {
        let line = |line: &str| {
            let mut words = line.split(' ');
            let mut history = History::new(now_s);
            let name = words.next().filter(|name| !name.is_empty())?;
            for hour in 0..HOURS {
                let (day, peak) = words.next()?.split_once(':')?;
                history.days[hour] = day.parse().ok()?;
                history.peaks[hour] = peak.parse().ok().filter(|peak| (0.0..1e6).contains(peak))?;
            }
            Some((name.to_owned(), history))
        };
        Self { templates: text.lines().take(TEMPLATES_MAX).filter_map(line).collect() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds { floor: 2, ceiling: 50 };
    const NOON: f64 = 20_000.0 * 86_400.0 + 12.0 * 3600.0;

    fn target(demand: &Demand, now_s: f64) -> usize {
        demand.target(["a", "b"].into_iter(), now_s, 2.0, BOUNDS)
    }

    fn busy(from_s: f64, per_s: u32, seconds: u32) -> Demand {
        let mut demand = Demand::default();
        for create in 0..per_s * seconds {
            demand.record("a", from_s + f64::from(create) / f64::from(per_s));
        }
        demand
    }

    #[test]
    fn a_quiet_host_keeps_the_floor_and_a_busy_one_more() {
        assert_eq!(target(&Demand::default(), NOON), 2);
        let demand = busy(NOON, 5, 120);
        let now_s = NOON + 120.0;
        let busy = target(&demand, now_s);
        assert!((10..=13).contains(&busy), "5 creates a second, 2 s to refill: {busy}");
        assert_eq!(target(&super::tests::busy(NOON, 200, 60), NOON + 60.0), 50, "the ceiling");
    }

    #[test]
    fn the_hour_is_remembered_and_the_next_one_is_quiet() {
        let demand = busy(NOON, 5, 120);
        assert!(target(&demand, NOON + 600.0) >= 10, "the same hour");
        assert_eq!(target(&demand, NOON + 3600.0), 2, "the next hour");
        let next_day = target(&demand, NOON + 86_400.0 + 60.0);
        assert!((7..10).contains(&next_day), "the same hour of the next day: {next_day}");
        assert_eq!(target(&demand, NOON + 40.0 * 86_400.0), 2, "long after");
    }

    #[test]
    fn hours_survive_a_restart() {
        let demand = busy(NOON, 5, 120);
        let again = Demand::from_text(&demand.to_text(), NOON + 600.0);
        assert_eq!(target(&again, NOON + 600.0), target(&demand, NOON + 600.0));
        let rubbish = "a 1:2\n\nb NaN:NaN\nc";
        assert_eq!(Demand::from_text(rubbish, NOON).templates.len(), 0);
    }

    proptest! {
        #[test]
        fn targets_stay_in_their_bounds(
            creates in prop::collection::vec((0usize..300, 0.0f64..1e9), 0..400),
            now_s in 0.0f64..2e9, floor in 0usize..10, ceiling in 0usize..100,
        ) {
            let mut demand = Demand::default();
            for (template, at_s) in creates {
                demand.record(&template.to_string(), at_s);
            }
            prop_assert!(demand.templates.len() <= TEMPLATES_MAX);
            let names: Vec<String> = demand.templates.keys().cloned().collect();
            let bounds = Bounds { floor, ceiling };
            let target = demand.target(names.iter().map(String::as_str), now_s, 1.0, bounds);
            prop_assert!(target >= floor && target <= ceiling.max(floor));
        }
    }
}
