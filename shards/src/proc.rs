//! What a process uses, as /proc tells.
//!
//! Called on blocking threads. Refuses to fail: a process may end while it is looked at.

use std::fs;
use std::time::Duration;

/// What one process uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Use {
    /// Memory that it has, also what it shares.
    pub(crate) resident_bytes: u64,
    /// Memory that is no file's: of a VM process, what its guest wrote and what is its own.
    pub(crate) anonymous_bytes: u64,
    /// Time on processors, the guest's included.
    pub(crate) cpu: Duration,
    /// Faults that needed no device.
    pub(crate) minor_faults: u64,
    /// Faults that did.
    pub(crate) major_faults: u64,
}

impl std::iter::Sum for Use {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            resident_bytes: sum.resident_bytes.saturating_add(one.resident_bytes),
            anonymous_bytes: sum.anonymous_bytes.saturating_add(one.anonymous_bytes),
            cpu: sum.cpu.saturating_add(one.cpu),
            minor_faults: sum.minor_faults.saturating_add(one.minor_faults),
            major_faults: sum.major_faults.saturating_add(one.major_faults),
        })
    }
}

/// Reads what a process uses; none when it is gone.
pub(crate) fn read(pid: u32) -> Option<Use> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    parse(&stat, &status, rustix::param::clock_ticks_per_second())
}

fn parse(stat: &str, status: &str, ticks_per_second: u64) -> Option<Use> {
    // The name is in parentheses and may hold anything, parentheses and spaces among it.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    // proc_pid_stat(5) counts from 1, and the state is the third.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let ticks = field(14)?.saturating_add(field(15)?);
    let seconds = ticks as f64 / ticks_per_second.max(1) as f64;
    let bytes = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        // A process that has ended and is not yet waited for has no memory.
        kib.unwrap_or(0) << 10
    };
    Some(Use {
        resident_bytes: bytes("VmRSS:"),
        anonymous_bytes: bytes("RssAnon:"),
        cpu: Duration::from_secs_f64(seconds),
        minor_faults: field(10)?,
        major_faults: field(12)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_behind_a_name_that_may_hold_anything() {
        let stat = "12 (a) b) S 1 12 12 0 -1 4194560 101 0 7 0 150 50 0 0 20 0 1 0 5 6 7\n";
        let status = "Name:\ta\nVmRSS:\t  15 kB\nRssAnon:\t    12 kB\nRssFile:\t 3 kB\n";
        let used = parse(stat, status, 100).expect("in form");
        assert_eq!((used.resident_bytes, used.anonymous_bytes), (15 << 10, 12 << 10));
        let both: Use = [used, used].into_iter().sum();
        assert_eq!((both.anonymous_bytes, both.cpu), (24 << 10, used.cpu * 2));
        assert_eq!((used.minor_faults, used.major_faults), (101, 7));
        assert_eq!(used.cpu, Duration::from_secs(2));
        assert_eq!(parse("12 (x) S 1", status, 100), None);
        let own = read(std::process::id()).expect("this process is there");
        assert!(own.anonymous_bytes > 0 && own.minor_faults > 0);
        assert_eq!(read(u32::MAX), None);
    }
}
