//! How long a sandbox may live, from the seconds that clients send.
//!
//! Called by everything in [`super`] that reads a `timeout`. Refuses less than the endpoint allows
//! and more than the host does.

use std::time::Duration;

use mica_shards::NEVER;

use super::spelling::Spelling;
use crate::config::Limits;
use crate::error::ApiError;

/// Of a connect that names no time.
pub const CONNECT_SECONDS: i64 = 300;

/// What `timeout` says of a life without an end, as CubeSandbox's clients write it. E2B has none.
const WITHOUT_END: i64 = -1;

/// A refresh makes a life at least so long, as E2B's does, and takes no more than CubeSandbox's.
const REFRESH_SECONDS_MIN: i64 = 15;
const REFRESH_SECONDS_MAX: i64 = 3600;

/// The life of a new sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewLife {
    /// How long.
    pub timeout: Duration,
    /// Whether each request starts it again.
    pub idle: bool,
}

/// Of a create; one that says nothing gets the host's own. CubeSandbox's clients write the same field and
/// mean something else by it: seconds since the last request, 0 for an end at once, nothing for no end.
///
/// # Errors
/// 400, naming the bound.
pub fn of_create(
    timeout: Option<i64>,
    spelling: Spelling,
    limits: &Limits,
) -> Result<NewLife, ApiError> {
    let is_cube = spelling == Spelling::Cube;
    let timeout = match timeout {
        timeout if is_cube => remaining(timeout.unwrap_or(WITHOUT_END), spelling, limits)?,
        Some(seconds) => of_new(seconds, spelling, limits)?,
        None => limits.sandbox_timeout_default,
    };
    let idle = is_cube && timeout != NEVER && !timeout.is_zero();
    Ok(NewLife { timeout, idle })
}

/// Of a sandbox that is made, or that somebody goes on with: at least a second, or without an end where
/// that can be written.
///
/// # Errors
/// 400, naming the bound.
pub fn of_new(seconds: i64, spelling: Spelling, limits: &Limits) -> Result<Duration, ApiError> {
    let never = if spelling == Spelling::E2b { "" } else { ", or -1 for no end" };
    match seconds {
        1.. => bounded(seconds, limits),
        WITHOUT_END if spelling != Spelling::E2b => Ok(NEVER),
        _ => Err(ApiError::bad_request(format!(
            "`timeout` is {seconds}; it must be at least 1 second{never}"
        ))),
    }
}

/// Of one that is refreshed.
///
/// # Errors
/// 400, naming the bound.
pub fn refreshed(seconds: Option<i64>) -> Result<Duration, ApiError> {
    match seconds.unwrap_or(REFRESH_SECONDS_MIN) {
        seconds @ 0..=REFRESH_SECONDS_MAX => {
            Ok(Duration::from_secs(seconds.max(REFRESH_SECONDS_MIN).unsigned_abs()))
        }
        seconds => Err(ApiError::bad_request(format!(
            "`duration` is {seconds}; it must be 0 to {REFRESH_SECONDS_MAX} seconds"
        ))),
    }
}

/// Of one that is there. 0 is valid: its time is over at once. E2B takes every number below for 0; elsewhere
/// -1 says that it never is.
///
/// # Errors
/// 400, naming the bound.
pub fn remaining(seconds: i64, spelling: Spelling, limits: &Limits) -> Result<Duration, ApiError> {
    match seconds {
        0.. => bounded(seconds, limits),
        _ if spelling == Spelling::E2b => Ok(Duration::ZERO),
        WITHOUT_END => Ok(NEVER),
        _ => Err(ApiError::bad_request(format!(
            "`timeout` is {seconds}; it must be 0 or more seconds, or -1 for no end"
        ))),
    }
}

fn bounded(seconds: i64, limits: &Limits) -> Result<Duration, ApiError> {
    let max = limits.sandbox_timeout_max;
    match u64::try_from(seconds).map(Duration::from_secs) {
        Ok(life) if life <= max => Ok(life),
        _ => {
            let hours = max.as_secs() / 3600;
            let bound = match hours {
                0 => format!("{} seconds", max.as_secs()),
                hours => format!("{hours} hours"),
            };
            Err(ApiError::bad_request(format!("Timeout cannot be greater than {bound}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_of_new_sandboxes_in_every_spelling() {
        use Spelling::{Cube, E2b, Either};
        let life = |timeout, spelling| of_create(timeout, spelling, &Limits::default()).ok();
        let fixed = |seconds| Some(NewLife { timeout: Duration::from_secs(seconds), idle: false });
        let idle = |seconds| Some(NewLife { timeout: Duration::from_secs(seconds), idle: true });
        let never = Some(NewLife { timeout: NEVER, idle: false });
        for spelling in [E2b, Either] {
            assert_eq!(life(None, spelling), fixed(300));
            assert_eq!(life(Some(7), spelling), fixed(7));
            assert_eq!(life(Some(0), spelling), None);
        }
        assert_eq!((life(Some(-1), E2b), life(Some(-1), Either)), (None, never));
        assert_eq!(life(None, Cube), never);
        assert_eq!(life(Some(-1), Cube), never);
        assert_eq!(life(Some(0), Cube), fixed(0));
        assert_eq!(life(Some(7), Cube), idle(7));
        for bad in [-2, 86_401, i64::MIN, i64::MAX] {
            for spelling in [E2b, Cube, Either] {
                assert_eq!(life(Some(bad), spelling), None, "{bad}");
            }
        }
        let limits = Limits { sandbox_timeout_default: NEVER, ..Limits::default() };
        assert_eq!(of_create(None, E2b, &limits).ok(), never);
    }

    #[test]
    fn less_than_no_time_is_none_to_e2b() {
        let left = |seconds, spelling| remaining(seconds, spelling, &Limits::default()).ok();
        for seconds in [0, -1, -2, i64::MIN] {
            assert_eq!(left(seconds, Spelling::E2b), Some(Duration::ZERO), "{seconds}");
        }
        for spelling in [Spelling::Cube, Spelling::Either] {
            assert_eq!(left(-1, spelling), Some(NEVER));
            assert_eq!((left(0, spelling), left(-2, spelling)), (Some(Duration::ZERO), None));
        }
        for spelling in [Spelling::E2b, Spelling::Cube] {
            assert_eq!(left(86_400, spelling), Some(Duration::from_secs(86_400)));
            assert_eq!(left(86_401, spelling), None);
        }
    }

    #[test]
    fn refreshes_have_a_floor_and_a_bound() {
        let seconds = |wish| refreshed(wish).ok().map(|life| life.as_secs());
        assert_eq!(seconds(None), Some(15));
        assert_eq!(seconds(Some(0)), Some(15));
        assert_eq!(seconds(Some(16)), Some(16));
        assert_eq!(seconds(Some(3600)), Some(3600));
        assert_eq!(seconds(Some(3601)), None);
        assert_eq!(seconds(Some(-1)), None);
    }
}
