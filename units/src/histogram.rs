//! How long things took, counted in buckets: recorded in place, without a lock, an atomic or an
//! allocation.
//!
//! Called by whoever measures something on one thread; a reader gets a copy. Refuses to be shared
//! between threads: its cells are plain.
//!
//! Two kinds. [`Durations`] has fixed buckets, eight to an octave, from 1 µs to 137 s: a quantile read
//! from it is off by 6 % at most. [`Buckets`] has the bounds that it is given.

use std::cell::Cell;
use std::time::Duration;

/// Buckets to an octave: each is at most an eighth wider than its lower bound.
const PER_OCTAVE: usize = 8;
const PER_OCTAVE_BITS: u32 = 3;

/// Exponents of the octaves, in nanoseconds: 2^10 is a microsecond, 2^37 a little over two minutes.
const OCTAVE_FIRST: u32 = 10;
const OCTAVE_END: u32 = 37;

/// One below them, the octaves, one above.
const CELLS: usize = 2 + (OCTAVE_END - OCTAVE_FIRST) as usize * PER_OCTAVE;

/// The bounds at which a copy for a reader is cut: whole octaves, 8 µs to 69 s.
const SHOWN_FIRST: u32 = 13;
const SHOWN_END: u32 = 36;

const _: () = assert!(1 << PER_OCTAVE_BITS == PER_OCTAVE);
const _: () = assert!(OCTAVE_FIRST < SHOWN_FIRST && SHOWN_END <= OCTAVE_END);

/// Durations in log-spaced buckets.
#[derive(Clone, Debug)]
pub struct Durations {
    counts: Box<[Cell<u64>; CELLS]>,
    sum_ns: Cell<u64>,
}

impl Default for Durations {
    fn default() -> Self {
        Self { counts: Box::new([const { Cell::new(0) }; CELLS]), sum_ns: Cell::new(0) }
    }
}

impl Durations {
    /// Counts one.
    pub fn record(&self, duration: Duration) {
        let ns = whole_ns(duration);
        add(&self.counts[cell_of(ns)], 1);
        add(&self.sum_ns, ns);
    }

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().map(Cell::get).sum()
    }

    /// The duration that this share of them, 0 to 1, did not exceed. `None`: there was none.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let wanted = share.clamp(0.0, 1.0) * count as f64;
        let mut below = 0.0;
        for (cell, held) in self.counts.iter().enumerate() {
            let held = held.get() as f64;
            if held > 0.0 && below + held >= wanted {
                let (low, high) = bounds_of(cell);
                let part = ((wanted - below) / held).clamp(0.0, 1.0);
                let ns = low as f64 + (high - low) as f64 * part;
                return Some(Duration::from_secs_f64(ns / 1e9));
            }
            below += held;
        }
        None
    }

    /// A copy in buckets of whole octaves, from 8 µs to 69 s.
    #[must_use]
    pub fn distribution(&self) -> Distribution {
        let mut buckets = Vec::with_capacity((SHOWN_END - SHOWN_FIRST + 1) as usize);
        let (mut below, mut next) = (0, 0);
        for exponent in SHOWN_FIRST..=SHOWN_END {
            // All cells up to the end of the octave that ends at this bound.
            let end = 1 + (exponent - OCTAVE_FIRST) as usize * PER_OCTAVE;
            below += self.counts[next..end].iter().map(Cell::get).sum::<u64>();
            next = end;
            buckets.push((1u64 << exponent, below));
        }
        Distribution { buckets, count: self.count(), sum_ns: self.sum_ns.get() }
    }
}

/// Durations in buckets of given bounds.
#[derive(Clone, Debug)]
pub struct Buckets<const N: usize> {
    bounds_ns: &'static [u64; N],
    counts: [Cell<u64>; N],
    above: Cell<u64>,
    sum_ns: Cell<u64>,
}

impl<const N: usize> Buckets<N> {
    /// None yet. The bounds rise; each bucket holds what is not above its bound.
    #[must_use]
    pub const fn new(bounds_ns: &'static [u64; N]) -> Self {
        Self {
            bounds_ns,
            counts: [const { Cell::new(0) }; N],
            above: Cell::new(0),
            sum_ns: Cell::new(0),
        }
    }

    /// Counts one.
    pub fn record(&self, duration: Duration) {
        let ns = whole_ns(duration);
        let bucket = self.bounds_ns.iter().position(|bound| ns <= *bound);
        add(bucket.map_or(&self.above, |bucket| &self.counts[bucket]), 1);
        add(&self.sum_ns, ns);
    }

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().map(Cell::get).sum::<u64>() + self.above.get()
    }

    /// A copy.
    #[must_use]
    pub fn distribution(&self) -> Distribution {
        let mut below = 0;
        let cumulated = |(bound, held): (&u64, &Cell<u64>)| {
            below += held.get();
            (*bound, below)
        };
        let buckets = self.bounds_ns.iter().zip(&self.counts).map(cumulated).collect();
        Distribution { buckets, count: self.count(), sum_ns: self.sum_ns.get() }
    }
}

/// What a reader gets: durations in buckets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Distribution {
    /// Bounds in nanoseconds, rising, and how many durations were not above each.
    pub buckets: Vec<(u64, u64)>,
    /// How many there were, those above the last bound included.
    pub count: u64,
    /// All of them together, in nanoseconds.
    pub sum_ns: u64,
}

fn whole_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn add(cell: &Cell<u64>, more: u64) {
    cell.set(cell.get().saturating_add(more));
}

/// The cell of a duration: the first whose upper bound is not below it.
fn cell_of(ns: u64) -> usize {
    // Upper bounds belong to their cell, so what is on one counts as the nanosecond before.
    let ns = ns.saturating_sub(1);
    let Some(exponent) = ns.checked_ilog2().filter(|exponent| *exponent >= OCTAVE_FIRST) else {
        return 0;
    };
    if exponent >= OCTAVE_END {
        return CELLS - 1;
    }
    let within = (ns >> (exponent - PER_OCTAVE_BITS)) & (PER_OCTAVE as u64 - 1);
    let within = usize::try_from(within).unwrap_or(0);
    1 + (exponent - OCTAVE_FIRST) as usize * PER_OCTAVE + within
}

/// The lower bound of a cell, which is not in it, and the upper one, which is. Nanoseconds.
fn bounds_of(cell: usize) -> (u64, u64) {
    let lower = |cell: usize| match cell {
        0 => 0,
        cell => {
            let octave = OCTAVE_FIRST as usize + (cell - 1) / PER_OCTAVE;
            let step = (1u64 << octave) >> PER_OCTAVE_BITS;
            (1u64 << octave) + step * ((cell - 1) % PER_OCTAVE) as u64
        }
    };
    // What is above them all is shown as their end: how far above, nobody kept.
    (lower(cell), lower((cell + 1).min(CELLS - 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_duration_lies_within_the_bounds_of_its_cell() {
        let mut ns = 1u64;
        while ns < 1 << 40 {
            for ns in [ns - 1, ns, ns + 1] {
                let cell = cell_of(ns);
                let (low, high) = bounds_of(cell);
                assert!(cell == 0 || ns > low, "{ns} in {cell}: {low}..{high}");
                assert!(cell == CELLS - 1 || ns <= high, "{ns} in {cell}: {low}..{high}");
            }
            ns += ns / 7 + 1;
        }
        assert_eq!((cell_of(0), cell_of(u64::MAX)), (0, CELLS - 1));
        assert_eq!(bounds_of(CELLS - 1).0, 1 << OCTAVE_END);
    }

    #[test]
    fn quantiles_are_within_an_eighth() {
        let durations = Durations::default();
        assert_eq!(durations.quantile(0.5), None);
        for us in 1..=10_000 {
            durations.record(Duration::from_micros(us));
        }
        for (share, us) in [(0.5, 5000.0), (0.95, 9500.0), (0.99, 9900.0)] {
            let got = durations.quantile(share).unwrap().as_secs_f64() * 1e6;
            assert!((got / us - 1.0).abs() < 0.0625, "{share}: {got} and not {us}");
        }
        let far = Durations::default();
        far.record(Duration::from_secs(1000));
        assert_eq!(far.quantile(0.5), Some(Duration::from_nanos(1 << OCTAVE_END)));
    }

    #[test]
    fn a_copy_counts_what_is_not_above_each_bound() {
        let durations = Durations::default();
        for ns in [0, 8191, 8192, 8193, 1 << 20, (1 << 20) + 1, u64::MAX / 4] {
            durations.record(Duration::from_nanos(ns));
        }
        let copy = durations.distribution();
        let below = |bound: u64| copy.buckets.iter().find(|(b, _)| *b == bound).unwrap().1;
        assert_eq!((below(1 << 13), below(1 << 14), below(1 << 20), below(1 << 21)), (3, 4, 5, 6));
        assert_eq!((copy.buckets.last(), copy.count), (Some(&(1 << 36, 6)), 7));
        assert!(copy.buckets.is_sorted());
    }

    #[test]
    fn given_bounds_are_kept() {
        static BOUNDS_NS: [u64; 2] = [1_000, 5_000];
        let buckets = Buckets::new(&BOUNDS_NS);
        for ns in [1, 1_000, 1_001, 5_000, 5_001] {
            buckets.record(Duration::from_nanos(ns));
        }
        let copy = buckets.distribution();
        assert_eq!(
            (copy.buckets, copy.count, copy.sum_ns),
            (vec![(1_000, 2), (5_000, 4)], 5, 12_003)
        );
    }
}
