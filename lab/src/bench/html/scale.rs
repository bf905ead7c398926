//! From values to places on an axis, and where its marks stand.
//!
//! Called by [`super::chart`]. Refuses nothing: an axis without values is one from 0 to 1.

/// An axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    log: bool,
    min: f64,
    max: f64,
    /// Where the smallest value stands, and where the largest.
    from: f64,
    to: f64,
}

/// The steps of one decade.
const STEPS: [f64; 3] = [1.0, 2.0, 5.0];
/// Marks of a linear axis, at most.
const MARKS_MAX: u32 = 6;
/// Marks of a logarithmic one, at most.
const LOG_MARKS_MAX: usize = 8;

impl Scale {
    /// One that has room for all of these, between two places. A logarithmic one leaves out what is not above 0.
    #[must_use]
    pub fn of(values: impl Iterator<Item = f64>, log: bool, from: f64, to: f64) -> Self {
        let good = |value: &f64| value.is_finite() && (!log || *value > 0.0);
        let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(good) {
            (min, max) = (min.min(value), max.max(value));
        }
        if !min.is_finite() {
            return Self { log: false, min: 0.0, max: 1.0, from, to };
        }
        if log {
            let (mut low, mut high) = (step_below(min), step_above(max));
            if low >= high {
                (low, high) = (low / 2.0, high * 2.0);
            }
            return Self { log, min: low, max: high, from, to };
        }
        let (low, high) = (min.min(0.0), max.max(0.0));
        let step = step_of(low, high);
        let (low, mut high) = ((low / step).floor() * step, (high / step).ceil() * step);
        if high <= low {
            high = low + 1.0;
        }
        Self { log, min: low, max: high, from, to }
    }

    /// Where a value stands; outside of the axis at its end.
    #[must_use]
    pub fn at(&self, value: f64) -> f64 {
        let part = if self.log {
            (value.max(self.min) / self.min).ln() / (self.max / self.min).ln()
        } else {
            (value - self.min) / (self.max - self.min)
        };
        self.from + (self.to - self.from) * part.clamp(0.0, 1.0)
    }

    /// Values that get a mark.
    #[must_use]
    pub fn marks(&self) -> Vec<f64> {
        if !self.log {
            let step = step_of(self.min, self.max);
            let count = ((self.max - self.min) / step).round();
            let mut marks = Vec::new();
            let mut index = 0.0;
            while index <= count {
                marks.push(self.min + index * step);
                index += 1.0;
            }
            return marks;
        }
        let all = |steps: &[f64]| -> Vec<f64> {
            let mut marks = Vec::new();
            let mut decade = 10f64.powf(self.min.log10().floor());
            while decade <= self.max * 1.001 {
                let within = |mark: &f64| (self.min * 0.999..=self.max * 1.001).contains(mark);
                marks.extend(steps.iter().map(|step| step * decade).filter(within));
                decade *= 10.0;
            }
            marks
        };
        let fine = all(&STEPS);
        if fine.len() <= LOG_MARKS_MAX { fine } else { all(&STEPS[..1]) }
    }

    /// Marks at these values, if they do not stand in each other's way; else the usual ones.
    #[must_use]
    pub fn marks_at(&self, values: &[f64], room: f64) -> Vec<f64> {
        let mut values: Vec<f64> = values.to_vec();
        values.sort_by(f64::total_cmp);
        values.dedup();
        let apart = |two: &[f64]| (self.at(two[1]) - self.at(two[0])).abs() >= room;
        if values.len() >= 2 && values.windows(2).all(apart) { values } else { self.marks() }
    }
}

/// A step that makes at most [`MARKS_MAX`] marks.
fn step_of(min: f64, max: f64) -> f64 {
    step_above((max - min).max(f64::MIN_POSITIVE) / f64::from(MARKS_MAX))
}

/// The next of 1, 2, 5 times a power of ten that is not smaller.
fn step_above(value: f64) -> f64 {
    let decade = 10f64.powf(value.log10().floor());
    let fits = |step: &&f64| **step * decade >= value * 0.999_999;
    STEPS.iter().find(fits).map_or(10.0 * decade, |step| step * decade)
}

/// The next that is not larger.
fn step_below(value: f64) -> f64 {
    let decade = 10f64.powf(value.log10().floor());
    let fits = |step: &&f64| **step * decade <= value * 1.000_001;
    STEPS.iter().rev().find(fits).map_or(decade, |step| step * decade)
}

/// A value as a mark says it: three digits that count.
#[must_use]
pub fn label(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let digits = 2.0 - value.abs().log10().floor();
    if digits <= 0.0 {
        return grouped(value.round());
    }
    let scale = 10f64.powf(digits.min(9.0));
    format!("{}", (value * scale).round() / scale)
}

fn grouped(value: f64) -> String {
    let text = format!("{:.0}", value.abs());
    let mut out = String::new();
    for (index, digit) in text.chars().enumerate() {
        if index > 0 && (text.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    if value < 0.0 { format!("-{out}") } else { out }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_axes_begin_at_zero_and_end_at_a_round_value() {
        let scale = Scale::of([3.0, 47.0].into_iter(), false, 0.0, 100.0);
        assert_eq!(scale.marks(), [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]);
        assert!((scale.at(25.0) - 50.0).abs() < 1e-9);
        assert!((scale.at(500.0) - 100.0).abs() < 1e-9);
        let negative = Scale::of([-30.0, 60.0].into_iter(), false, 0.0, 100.0);
        assert!(negative.marks().contains(&0.0) && negative.at(-30.0) < negative.at(0.0));
    }

    #[test]
    fn logarithmic_axes_have_the_same_room_for_every_factor() {
        let scale = Scale::of([1.0, 10.0, 50.0].into_iter(), true, 0.0, 100.0);
        assert_eq!(scale.marks(), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        let (a, b) = (scale.at(10.0) - scale.at(1.0), scale.at(50.0) - scale.at(5.0));
        assert!((a - b).abs() < 1e-9);
        let wide = Scale::of([0.002, 9000.0].into_iter(), true, 0.0, 100.0);
        assert!(wide.marks().len() <= LOG_MARKS_MAX, "{:?}", wide.marks());
        let one = Scale::of([7.0].into_iter(), true, 0.0, 100.0);
        assert!(one.at(7.0) > 0.0 && one.at(7.0) < 100.0);
    }

    #[test]
    fn marks_stand_at_the_values_where_there_is_room() {
        let scale = Scale::of([1.0, 50.0].into_iter(), true, 0.0, 500.0);
        assert_eq!(scale.marks_at(&[1.0, 50.0, 10.0, 1.0], 20.0), [1.0, 10.0, 50.0]);
        assert_eq!(scale.marks_at(&[1.0, 1.01, 50.0], 20.0), scale.marks());
    }

    #[test]
    fn no_values_are_an_axis_all_the_same() {
        let scale = Scale::of([f64::NAN].into_iter(), true, 0.0, 1.0);
        assert!((scale.at(0.5) - 0.5).abs() < 1e-9);
        assert!(!scale.marks().is_empty());
    }

    #[test]
    fn labels_have_three_digits_that_count() {
        let labels = [0.0, 0.05, 2.5, 20.0, 123.4, 1_234_567.0].map(label);
        assert_eq!(labels, ["0", "0.05", "2.5", "20", "123", "1,234,567"]);
    }
}
