//! How long a sandbox may live, from the seconds that clients send.
//!
//! Called by everything in [`super`] that reads a `timeout`. Refuses less than the endpoint allows
//! and more than the host does.

use std::time::Duration;

use crate::config::Limits;
use crate::error::ApiError;

/// Of a create on v1, and of a resume.
pub const TIMEOUT_SECONDS_V1: i64 = 15;
/// Of a create and of a connect on v2.
pub const TIMEOUT_SECONDS_V2: i64 = 300;

/// Of a sandbox that is made: at least a second.
///
/// # Errors
/// 400, naming the bound.
pub fn of_new(seconds: i64, limits: &Limits) -> Result<Duration, ApiError> {
    if seconds < 1 {
        let message = format!("`timeout` is {seconds}; it must be at least 1 second");
        return Err(ApiError::bad_request(message));
    }
    bounded(seconds, limits)
}

/// Of one that is there. 0 is valid: its time is over at once.
///
/// # Errors
/// 400, naming the bound.
pub fn remaining(seconds: i64, limits: &Limits) -> Result<Duration, ApiError> {
    if seconds < 0 {
        let message = format!("`timeout` is {seconds}; it must be 0 or more seconds from now");
        return Err(ApiError::bad_request(message));
    }
    bounded(seconds, limits)
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
