//! What this process may: whose it is, its limits, its capabilities.
//!
//! Called by [`super::Facts::read`]. Refuses to ask the kernel but through `/proc`.

/// A resource limit in bytes or files; `None` is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What is in force.
    pub soft: Option<u64>,
    /// What it may be raised to.
    pub hard: Option<u64>,
}

/// A limit by its name in `/proc/self/limits`.
pub(super) fn limit(limits: &str, name: &str) -> Option<Limit> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    let mut values = line.split_whitespace();
    let mut value = || match values.next()? {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    };
    Some(Limit { soft: value()?, hard: value()? })
}

/// The effective capabilities, a bit for each.
pub(super) fn capabilities(status: &str) -> Option<u64> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(effective.trim(), 16).ok()
}

pub(super) fn is_root(status: &str) -> Option<bool> {
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    ids.split_whitespace().nth(1).map(|effective| effective == "0")
}
