//! Times of operations, and the floor's times of the same work, taken in turn with them.
//!
//! Called by everything that measures. Refuses to judge.

use std::time::Duration;

use crate::bench::phases::Phase;

/// The times of one operation.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Its name in the results.
    pub op: &'static str,
    /// How long it took, each time.
    pub times: Vec<Duration>,
    /// How long the same work took as bare system calls. Empty where there is no such work.
    pub floor: Vec<Duration>,
    /// What the daemon says it spent the time on; nothing where there is none.
    pub phases: Vec<Phase>,
}

/// The series of one run, in the order in which they began.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Book(Vec<Series>);

impl Book {
    /// Adds a time, and the floor's of the same round.
    pub fn add(&mut self, op: &'static str, time: Duration, floor: Duration) {
        let series = self.series(op);
        series.times.push(time);
        series.floor.push(floor);
    }

    /// Says what the daemon spent the times of an operation on.
    pub fn spent(&mut self, op: &'static str, phases: impl IntoIterator<Item = Phase>) {
        self.series(op).phases.extend(phases);
    }

    fn series(&mut self, op: &'static str) -> &mut Series {
        let at = self.0.iter().position(|series| series.op == op).unwrap_or_else(|| {
            let (times, floor, phases) = (Vec::new(), Vec::new(), Vec::new());
            self.0.push(Series { op, times, floor, phases });
            self.0.len() - 1
        });
        &mut self.0[at]
    }

    /// Takes another book's series in.
    pub fn append(&mut self, other: Self) {
        for Series { op, times, floor, phases } in other.0 {
            let series = self.series(op);
            series.times.extend(times);
            series.floor.extend(floor);
            series.phases.extend(phases);
        }
    }

    /// Every series.
    #[must_use]
    pub fn all(&self) -> &[Series] {
        &self.0
    }
}

/// The time that `percent` of a hundred of these stay at or below. Zero when there are none.
#[must_use]
pub fn percentile(times: &[Duration], percent: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(rank).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let times: Vec<_> = (1..=200).rev().map(Duration::from_micros).collect();
        let at = |percent| percentile(&times, percent).as_micros();
        assert_eq!([at(50), at(95), at(99), at(100)], [100, 190, 198, 200]);
        assert_eq!(percentile(&times[..1], 50).as_micros(), 200);
        assert_eq!(percentile(&[], 99), Duration::ZERO);
    }

    #[test]
    fn books_keep_the_order_and_join_what_has_one_name() {
        let ms = Duration::from_millis;
        let mut book = Book::default();
        book.add("b", ms(1), ms(1));
        book.add("a", ms(2), ms(1));
        let mut other = Book::default();
        other.add("a", ms(3), ms(2));
        book.append(other);
        let names: Vec<_> = book.all().iter().map(|series| series.op).collect();
        assert_eq!(names, ["b", "a"]);
        assert_eq!(book.all()[1].times, [ms(2), ms(3)]);
        assert_eq!(book.all()[1].floor, [ms(1), ms(2)]);
    }
}
