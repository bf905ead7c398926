//! How sure a ratio of two medians is: the bootstrap, over blocks of a run and the samples in them.
//!
//! Called by `mica bench ab`. Blocks are drawn first, because what a machine does in one minute all samples of that
//! minute share. The same seed gives the same interval. Refuses to say anything of no samples.

/// Times that the samples are drawn again.
pub const RESAMPLES: usize = 2000;

/// Samples of both sides that were taken in turn with each other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Block {
    /// Of the first.
    pub a: Vec<f64>,
    /// Of the second.
    pub b: Vec<f64>,
}

/// A ratio, and between what it lies with 95 %.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The median of the first.
    pub a: f64,
    /// The median of the second.
    pub b: f64,
    /// The second by the first.
    pub ratio: f64,
    /// 2.5 % of the ratios of samples drawn again are below this.
    pub low: f64,
    /// And 2.5 % above this.
    pub high: f64,
}

impl Estimate {
    /// Of these blocks. `None` where a side has no samples, or its median is zero.
    #[must_use]
    pub fn of(blocks: &[Block], seed: u64) -> Option<Self> {
        let a = median(blocks.iter().flat_map(|block| block.a.iter().copied()).collect())?;
        let b = median(blocks.iter().flat_map(|block| block.b.iter().copied()).collect())?;
        if a <= 0.0 {
            return None;
        }
        let mut random = Random(seed);
        let mut ratios: Vec<f64> =
            (0..RESAMPLES).filter_map(|_| drawn(blocks, &mut random)).collect();
        ratios.sort_by(f64::total_cmp);
        let at = |part: usize| ratios.get(ratios.len() * part / 1000).copied();
        Some(Self { a, b, ratio: b / a, low: at(25)?, high: at(974)? })
    }

    /// Whether the interval leaves out that there is no difference.
    #[must_use]
    pub fn differs(&self) -> bool {
        self.low > 1.0 || self.high < 1.0
    }
}

/// The ratio of samples that were drawn again.
fn drawn(blocks: &[Block], random: &mut Random) -> Option<f64> {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in blocks {
        let block = &blocks[random.below(blocks.len())];
        for (from, to) in [(&block.a, &mut a), (&block.b, &mut b)] {
            to.extend((0..from.len()).map(|_| from[random.below(from.len())]));
        }
    }
    let a = median(a).filter(|a| *a > 0.0)?;
    Some(median(b)? / a)
}

/// The middle one, or between the middle two. `None` of none.
#[must_use]
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    let middle = values.len() / 2;
    values.sort_by(f64::total_cmp);
    let upper = *values.get(middle)?;
    let even = values.len().is_multiple_of(2);
    Some(if even { f64::midpoint(values[middle - 1], upper) } else { upper })
}

/// SplitMix64: enough to draw samples, and the same on every machine.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `count`, which is not zero.
    fn below(&mut self, count: usize) -> usize {
        let wide = u128::from(self.next()) * u128::try_from(count).unwrap_or(1);
        usize::try_from(wide >> 64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Samples around a mean, evenly spread by a tenth of it.
    fn around(mean: f64, count: usize, random: &mut Random) -> Vec<f64> {
        let even =
            |random: &mut Random| f64::from(u32::try_from(random.below(1000)).unwrap()) / 1000.0;
        (0..count).map(|_| mean * (0.95 + 0.1 * even(random))).collect()
    }

    fn blocks(a: f64, b: f64, seed: u64) -> Vec<Block> {
        let random = &mut Random(seed);
        (0..6).map(|_| Block { a: around(a, 40, random), b: around(b, 40, random) }).collect()
    }

    #[test]
    fn the_interval_holds_the_true_ratio_and_nothing_far_from_it() {
        for (seed, truth) in [(1, 1.0), (2, 1.1), (3, 0.5), (4, 2.0)] {
            let found = Estimate::of(&blocks(100.0, 100.0 * truth, seed), 7).unwrap();
            assert!(found.low <= truth && truth <= found.high, "{found:?} for {truth}");
            assert!(found.high - found.low < 0.05 * truth, "{found:?}");
            assert!(found.low <= found.ratio && found.ratio <= found.high, "{found:?}");
            assert_eq!(found.differs(), (truth - 1.0).abs() > 0.05, "{found:?}");
        }
    }

    #[test]
    fn it_misses_about_as_often_as_it_says() {
        let holds = |seed| {
            let found = Estimate::of(&blocks(100.0, 100.0, seed), seed).unwrap();
            found.low <= 1.0 && 1.0 <= found.high
        };
        let held = (100..200).filter(|seed| holds(*seed)).count();
        assert!(held >= 88, "{held} of 100 intervals of 95 % hold the truth");
    }

    #[test]
    fn what_a_block_shares_makes_it_less_sure() {
        // The same samples, but in each block both sides share nothing: whole blocks of one side are slow.
        let mut together = blocks(100.0, 100.0, 9);
        let sure = Estimate::of(&together, 1).unwrap();
        for (index, block) in together.iter_mut().enumerate() {
            let slow = if index % 2 == 0 { 1.5 } else { 1.0 };
            block.b.iter_mut().for_each(|sample| *sample *= slow);
        }
        let unsure = Estimate::of(&together, 1).unwrap();
        assert!(unsure.high - unsure.low > 3.0 * (sure.high - sure.low), "{unsure:?} {sure:?}");
    }

    #[test]
    fn the_same_seed_gives_the_same_and_no_samples_nothing() {
        let some = blocks(10.0, 11.0, 5);
        assert_eq!(Estimate::of(&some, 3), Estimate::of(&some, 3));
        assert_ne!(Estimate::of(&some, 3), Estimate::of(&some, 4));
        assert_eq!(Estimate::of(&[], 1), None);
        assert_eq!(Estimate::of(&[Block { a: vec![1.0], b: vec![] }], 1), None);
        assert_eq!(Estimate::of(&[Block { a: vec![0.0], b: vec![1.0] }], 1), None);
    }
}
