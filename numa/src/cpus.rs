//! Lists of hardware threads as the kernel writes them: `0-3,8,10-11`.
//!
//! Called by the planner and the readers of topologies, and by the binary for what people type.
//! Refuses numbers that an affinity mask of this process cannot name, so a list is never long.

use std::fmt;
use std::str::FromStr;

use rustix::thread::CpuSet;

/// How many hardware threads can be named: what an affinity mask of this process holds.
pub const CPUS_MAX: u32 = 1024;

const _: () = assert!(CPUS_MAX as usize == CpuSet::MAX_CPU);

/// A set of hardware threads, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuList(Vec<u32>);

/// Why a text is no list
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{part:?} is not a part of a cpu list; write numbers and ranges, such as 0-3,8,10-11")]
pub struct CpuListError {
    /// The part that cannot be read.
    part: String,
}

impl CpuList {
    /// The hardware threads, in order.
    #[must_use]
    pub fn cpus(&self) -> &[u32] {
        &self.0
    }

    /// Whether it holds this one.
    #[must_use]
    pub fn contains(&self, cpu: u32) -> bool {
        self.0.binary_search(&cpu).is_ok()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<u32> for CpuList {
    fn from_iter<I: IntoIterator<Item = u32>>(cpus: I) -> Self {
        let mut cpus: Vec<u32> = cpus.into_iter().collect();
        cpus.sort_unstable();
        cpus.dedup();
        Self(cpus)
    }
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let mut taken = vec![false; CPUS_MAX as usize];
        for part in text.trim().split(',').filter(|_| !text.trim().is_empty()) {
            let error = || CpuListError { part: part.chars().take(40).collect() };
            let range = parse_range(part.trim()).ok_or_else(error)?;
            let slots = taken.get_mut(range.first..=range.last).ok_or_else(error)?;
            for group in slots.chunks_mut(range.group) {
                let used = range.used.min(group.len());
                group[..used].fill(true);
            }
        }
        let numbered = (0..).zip(taken).filter(|(_, taken)| *taken);
        Ok(Self(numbered.map(|(cpu, _)| cpu).collect()))
    }
}

/// `N`, `N-M`, or `N-M:USED/GROUP`: of each group of cpus, the first so many.
struct Range {
    first: usize,
    last: usize,
    used: usize,
    group: usize,
}

fn parse_range(part: &str) -> Option<Range> {
    let number = |text: &str| {
        // The standard library would take a sign too.
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| text.parse::<usize>().ok()).flatten()
    };
    let (ends, groups) = part.split_once(':').map_or((part, None), |(e, g)| (e, Some(g)));
    let (first, last) = match ends.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None if groups.is_none() => (number(ends)?, number(ends)?),
        None => return None,
    };
    let (used, group) = match groups {
        Some(groups) => groups.split_once('/').map(|(u, g)| Some((number(u)?, number(g)?)))??,
        None => (1, 1),
    };
    let sound = first <= last && (1..=group).contains(&used);
    sound.then_some(Range { first, last, used, group })
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for cpu in &self.0 {
            match runs.last_mut() {
                Some((_, last)) if last.checked_add(1) == Some(*cpu) => *last = *cpu,
                _ => runs.push((*cpu, *cpu)),
            }
        }
        for (index, (first, last)) in runs.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_reads_them() {
        let read = |text: &str| text.parse::<CpuList>().unwrap().to_string();
        assert_eq!(read("0-3,8,10-11\n"), "0-3,8,10-11");
        assert_eq!(read("11, 8 ,0-3,10,2"), "0-3,8,10-11");
        assert_eq!(read("0-7:1/2"), "0,2,4,6");
        assert_eq!(read("0-9:2/5"), "0-1,5-6");
        assert_eq!(read("1023"), "1023");
        assert_eq!(read(""), "");
    }

    #[test]
    fn what_is_no_list_is_named() {
        for bad in ["x", "1-", "-1", "3-1", "0,,1", "1024", "0-4294967296", "+1", "0-3:0/2"] {
            let said = bad.parse::<CpuList>().unwrap_err().to_string();
            assert!(said.contains("such as 0-3,8"), "{bad}: {said}");
        }
        for bad in ["0-3:3/2", "0-3:1", "3:1/2", "0-3:1/0", "all", "0;1"] {
            assert!(bad.parse::<CpuList>().is_err(), "{bad}");
        }
        let long = "9".repeat(10_000);
        assert!(long.parse::<CpuList>().unwrap_err().to_string().len() < 200);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(cpus in prop::collection::vec(0..CPUS_MAX, 0..50)) {
            let list: CpuList = cpus.into_iter().collect();
            prop_assert_eq!(list.to_string().parse::<CpuList>(), Ok(list));
        }

        #[test]
        fn no_text_panics(text in ".{0,40}", ranges in "[0-9,:/-]{0,40}") {
            for text in [text, ranges] {
                if let Ok(list) = text.parse::<CpuList>() {
                    prop_assert!(list.cpus().iter().all(|cpu| *cpu < CPUS_MAX));
                }
            }
        }
    }
}
