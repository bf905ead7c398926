//! Sets of hosts as bits: one set, and a table of sets with a row for each template or port.
//!
//! Called by the registry alone. Refuses to grow: every size is settled when the registry is made, so that
//! nothing here takes memory later.

use super::types::HostNumber;

/// Hosts that one registry can hold. It bounds the longest search: so many bits are 16 words.
pub const HOSTS_MAX: u16 = 1024;

const WORD_BITS: usize = 64;

/// Words of the largest set.
pub(super) const WORDS_MAX: usize = HOSTS_MAX as usize / WORD_BITS;

/// Words of a set of `hosts`.
pub(super) fn words_for(hosts: u16) -> usize {
    usize::from(hosts).div_ceil(WORD_BITS)
}

fn place(host: HostNumber) -> (usize, u64) {
    (host.index() / WORD_BITS, 1 << (host.index() % WORD_BITS))
}

/// A set of hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostSet([u64; WORDS_MAX]);

impl HostSet {
    /// Adds a host. Whether it is new.
    pub fn insert(&mut self, host: HostNumber) -> bool {
        let (word, bit) = place(host);
        let new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        new
    }

    /// Takes a host out. Whether it was there.
    pub fn remove(&mut self, host: HostNumber) -> bool {
        let (word, bit) = place(host);
        let there = self.0[word] & bit != 0;
        self.0[word] &= !bit;
        there
    }

    /// Whether a host is in it.
    #[must_use]
    pub fn contains(&self, host: HostNumber) -> bool {
        let (word, bit) = place(host);
        self.0[word] & bit != 0
    }

    /// The same, and the hosts of these words.
    pub(crate) fn with_words(&self, words: [u64; WORDS_MAX]) -> Self {
        Self(std::array::from_fn(|at| self.0[at] | words[at]))
    }

    /// The hosts of the set, by number.
    pub fn iter(&self) -> impl Iterator<Item = HostNumber> + '_ {
        self.0.iter().zip(0u16..).flat_map(|(word, at)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                let bit = u16::try_from(left.trailing_zeros()).ok().filter(|bit| *bit < 64)?;
                left &= left - 1;
                Some(HostNumber(at * 64 + bit))
            })
        })
    }
}

/// Sets of hosts, one in each row, side by side in one piece of memory.
#[derive(Debug)]
pub(super) struct Rows {
    words: Vec<u64>,
    width: usize,
}

impl Rows {
    /// Empty sets. The kernel gives zeroed memory page by page as it is touched, so rows that are never
    /// used cost address space only.
    pub(super) fn new(rows: usize, width: usize) -> Self {
        Self { words: vec![0; rows * width], width }
    }

    pub(super) fn row(&self, row: usize) -> &[u64] {
        &self.words[row * self.width..][..self.width]
    }

    pub(super) fn contains(&self, row: usize, host: HostNumber) -> bool {
        let (word, bit) = place(host);
        self.words[row * self.width + word] & bit != 0
    }

    pub(super) fn insert(&mut self, row: usize, host: HostNumber) {
        let (word, bit) = place(host);
        self.words[row * self.width + word] |= bit;
    }

    pub(super) fn remove(&mut self, row: usize, host: HostNumber) {
        let (word, bit) = place(host);
        self.words[row * self.width + word] &= !bit;
    }
}

/// Which hosts come into question: all of these at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mask<'a> {
    /// Those with a free slot.
    pub(super) open: &'a HostSet,
    /// Those that have the template, where that is asked.
    pub(super) holders: Option<&'a [u64]>,
    /// Those that the caller does not want.
    pub(super) except: Option<&'a HostSet>,
    /// All rows of ports, and which of them must be free.
    pub(super) ports: &'a Rows,
    pub(super) wanted_ports: &'a [u16],
}

impl Mask<'_> {
    /// 64 hosts of it.
    pub(super) fn word(&self, at: usize) -> u64 {
        let mut word = self.open.0[at];
        if let Some(holders) = self.holders {
            word &= holders[at];
        }
        if let Some(except) = self.except {
            word &= !except.0[at];
        }
        for port in self.wanted_ports {
            word &= !self.ports.row(usize::from(*port))[at];
        }
        word
    }

    pub(super) fn admits(&self, host: HostNumber) -> bool {
        let (word, bit) = place(host);
        self.word(word) & bit != 0
    }
}

/// The host at place `rank` of a set, counted from 0.
pub(super) fn select(words: &[u64], rank: u32) -> Option<HostNumber> {
    let mut left = rank;
    for (word, at) in words.iter().zip(0u16..) {
        let here = word.count_ones();
        if left < here {
            let mut word = *word;
            for _ in 0..left {
                word &= word - 1;
            }
            return u16::try_from(word.trailing_zeros()).ok().map(|bit| HostNumber(at * 64 + bit));
        }
        left -= here;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_hold_their_first_and_last_hosts() {
        let mut set = HostSet::default();
        for number in [0, 63, 64, 1023] {
            assert!(set.insert(HostNumber(number)));
            assert!(!set.insert(HostNumber(number)));
        }
        let all: Vec<u16> = set.iter().map(HostNumber::get).collect();
        assert_eq!(all, [0, 63, 64, 1023]);
        assert!(set.remove(HostNumber(64)) && !set.remove(HostNumber(64)));
        assert!(!set.contains(HostNumber(64)) && set.contains(HostNumber(63)));
    }

    #[test]
    fn every_rank_selects_its_host() {
        let numbers = [0u16, 1, 62, 63, 64, 200, 1023];
        let mut set = HostSet::default();
        for number in numbers {
            set.insert(HostNumber(number));
        }
        for (number, rank) in numbers.into_iter().zip(0..) {
            assert_eq!(select(&set.0, rank), Some(HostNumber(number)));
        }
        assert_eq!(select(&set.0, 7), None);
    }

    #[test]
    fn a_mask_is_the_intersection_of_what_is_asked() {
        let mut open = HostSet::default();
        let mut except = HostSet::default();
        let mut ports = Rows::new(1 << 16, 2);
        let mut holders = Rows::new(1, 2);
        for number in 0..100 {
            open.insert(HostNumber(number));
            if number % 2 == 0 {
                holders.insert(0, HostNumber(number));
            }
            if number % 3 == 0 {
                ports.insert(65_535, HostNumber(number));
            }
        }
        except.insert(HostNumber(2));
        let mask = Mask {
            open: &open,
            holders: Some(holders.row(0)),
            except: Some(&except),
            ports: &ports,
            wanted_ports: &[65_535],
        };
        for number in 0..128 {
            let asked = number < 100 && number % 2 == 0 && number % 3 != 0 && number != 2;
            assert_eq!(mask.admits(HostNumber(number)), asked, "{number}");
        }
    }
}
