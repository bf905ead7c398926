//! How long a sandbox may live, from the seconds that clients send.
//!
//! Called by everything in [`super`] that reads a `timeout`. Refuses less than the endpoint allows
//! and more than the host does.

use std::time::Duration;

use mica_shards::NEVER;

use crate::config::Limits;
use crate::error::ApiError;

/// Of a connect that names no time.
pub const CONNECT_SECONDS: i64 = 300;

/// What `timeout` says of a life without an end, as CubeSandbox's clients write it.
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

/// Of a create; one that says nothing gets the host's own. CubeSandbox's clients write the same field and mean something else by it: seconds
/// since the last request, 0 for an end at once, nothing for no end. They are told from E2B's by
/// `lifecycle`, which E2B's never send.
///
/// # Errors
/// 400, naming the bound.
pub fn of_create(
    timeout: Option<i64>,
    has_lifecycle: bool,
    limits: &Limits,
) -> Result<NewLife, ApiError> {
    let timeout = match (has_lifecycle, timeout) {
        (true, timeout) => remaining(timeout.unwrap_or(WITHOUT_END), limits)?,
        (false, Some(seconds)) => of_new(seconds, limits)?,
        (false, None) => limits.sandbox_timeout_default,
    };
    let idle = has_lifecycle && timeout != NEVER && !timeout.is_zero();
    Ok(NewLife { timeout, idle })
}

/// Of a sandbox that is made, or that somebody goes on with: at least a second, or without an end.
///
/// # Errors
/// 400, naming the bound.
pub fn of_new(seconds: i64, limits: &Limits) -> Result<Duration, ApiError> {
    if seconds < 1 && seconds != WITHOUT_END {
        let message = format!("`timeout` is {seconds}; it must be at least 1 second, or -1");
        return Err(ApiError::bad_request(message));
    }
    bounded(seconds, limits)
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

/// Of one that is there. 0 is valid: its time is over at once. So is -1: it never is.
///
/// # Errors
/// 400, naming the bound.
pub fn remaining(seconds: i64, limits: &Limits) -> Result<Duration, ApiError> {
    if seconds < WITHOUT_END {
        let message = format!("`timeout` is {seconds}; it must be 0 or more seconds, or -1");
        return Err(ApiError::bad_request(message));
    }
    bounded(seconds, limits)
}

fn bounded(seconds: i64, limits: &Limits) -> Result<Duration, ApiError> {
    if seconds == WITHOUT_END {
        return Ok(NEVER);
    }
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
    fn lives_of_new_sandboxes_in_both_spellings() {
        let life =
            |timeout, has_lifecycle| of_create(timeout, has_lifecycle, &Limits::default()).ok();
        let fixed = |seconds| Some(NewLife { timeout: Duration::from_secs(seconds), idle: false });
        let idle = |seconds| Some(NewLife { timeout: Duration::from_secs(seconds), idle: true });
        let never = Some(NewLife { timeout: NEVER, idle: false });
        assert_eq!(life(None, false), fixed(300));
        assert_eq!(life(Some(7), false), fixed(7));
        assert_eq!(life(Some(0), false), None);
        assert_eq!(life(Some(-1), false), never);
        assert_eq!(life(None, true), never);
        assert_eq!(life(Some(-1), true), never);
        assert_eq!(life(Some(0), true), fixed(0));
        assert_eq!(life(Some(7), true), idle(7));
        for bad in [-2, 86_401, i64::MIN, i64::MAX] {
            assert_eq!(life(Some(bad), false), None, "{bad}");
            assert_eq!(life(Some(bad), true), None, "{bad}");
        }
        let limits = Limits { sandbox_timeout_default: NEVER, ..Limits::default() };
        assert_eq!(of_create(None, false, &limits).ok(), never);
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
