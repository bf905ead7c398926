//! One module for each table that can be reproduced.
//!
//! Called by `mica bench`. Each is the arguments of a subcommand, with the defaults of the report that its table is
//! from, and a `measure`. Refuses counts that would only harm: every number has a bound.

pub mod clone;
pub mod create;
pub mod density;
pub mod dirty;
pub mod exec;
pub mod from_snapshot;
pub mod languages;
pub mod levels;
pub mod pause;
pub mod rollback;
pub mod rounds;
pub mod snapshot;

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::host::Host;
use super::table::Table;

/// Clients at once, at most.
pub const CLIENTS_MAX: u16 = 2000;

/// A table.
pub trait Measure {
    /// The subcommand.
    fn name(&self) -> &'static str;

    /// What it was asked to do, for the report.
    fn options(&self) -> Value;

    /// Measures every row.
    ///
    /// # Errors
    /// When the host cannot be measured. A request that fails is counted, and is no error.
    fn measure(&self, host: &Host, table: &mut Table) -> Result<()>;
}

/// Pairs the conditions with their counts: one for each, or one for all.
///
/// # Errors
/// When there are neither.
pub fn pairs<T: Copy, U: Copy>(
    conditions: &[T],
    counts: &[U],
    names: (&str, &str),
) -> Result<Vec<(T, U)>> {
    let (one, many) = names;
    let fits = counts.len() == 1 || counts.len() == conditions.len();
    ensure!(fits, "{many} takes one number, or as many as {one}: {}", conditions.len());
    Ok(conditions.iter().copied().zip(counts.iter().copied().cycle()).collect())
}

/// Seconds of an option.
///
/// # Errors
/// When it is no time, or more than an hour.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let value: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if !(0.0..=3600.0).contains(&value) {
        return Err("a number of seconds from 0 to 3600".to_owned());
    }
    Ok(Duration::from_secs_f64(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_for_each_condition_or_for_all() {
        let names = ("-c", "-n");
        assert_eq!(pairs(&[1, 10], &[5], names).unwrap(), [(1, 5), (10, 5)]);
        assert_eq!(pairs(&[1, 10], &[5, 6], names).unwrap(), [(1, 5), (10, 6)]);
        let error = pairs(&[1, 10, 20], &[5, 6], names).unwrap_err().to_string();
        assert_eq!(error, "-n takes one number, or as many as -c: 3");
        assert!(pairs::<u8, u8>(&[1], &[], names).is_err());
    }

    #[test]
    fn times_are_bounded() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["-1", "3601", "x", "NaN", "inf"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
