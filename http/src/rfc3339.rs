//! Instants as RFC 3339 text, in UTC, to the millisecond.
//!
//! Called for `startedAt`, `endAt` and the `startedAfter` filter. Refuses leap seconds and years
//! outside 1970 to 9999: no sandbox started then.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAY_SECONDS: u64 = 86_400;
/// The last second of the year 9999.
const SECONDS_MAX: u64 = 253_402_300_799;

/// Writes an instant as `2026-11-22T11:56:16.123Z`. Instants outside the years 1970 to 9999 are
/// written as the nearest end of that span.
#[must_use]
pub fn format(instant: SystemTime) -> String {
    let since = instant.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let since = since.min(Duration::from_secs(SECONDS_MAX));
    let (days, second_of_day) = (since.as_secs() / DAY_SECONDS, since.as_secs() % DAY_SECONDS);
    let (year, month, day) = date_of_day(days);
    let (hour, minute, second) =
        (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    let millis = since.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// Reads an instant, with any fraction and any offset. `None` when the text is not RFC 3339.
#[must_use]
pub fn parse(text: &str) -> Option<SystemTime> {
    let bytes = text.as_bytes();
    let head = bytes.get(..19)?;
    let separators = [(4, b'-'), (7, b'-'), (13, b':'), (16, b':')];
    if separators.iter().any(|(at, byte)| head[*at] != *byte) || !matches!(head[10], b'T' | b't') {
        return None;
    }
    let number = |from: usize, to: usize| digits(&head[from..to]);
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let in_range = year >= 1970
        && (1..=12).contains(&month)
        && (1..=days_in_month(year, month)).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60;
    if !in_range {
        return None;
    }
    let seconds = day_of_date(year, month, day) * DAY_SECONDS + hour * 3600 + minute * 60 + second;
    let (nanos, zone) = fraction(&bytes[19..])?;
    let instant = UNIX_EPOCH + Duration::new(seconds, nanos);
    match offset_seconds(zone)? {
        (true, ahead) => instant.checked_sub(Duration::from_secs(ahead)),
        (false, behind) => instant.checked_add(Duration::from_secs(behind)),
    }
}

/// The value of 1 to 9 ASCII digits.
fn digits(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 9 {
        return None;
    }
    text.iter().try_fold(0, |value, byte| match byte {
        b'0'..=b'9' => Some(value * 10 + u64::from(byte - b'0')),
        _ => None,
    })
}

/// Splits `.123Z` into nanoseconds and the zone. Digits past the ninth are dropped.
fn fraction(text: &[u8]) -> Option<(u32, &[u8])> {
    let Some(rest) = text.strip_prefix(b".") else { return Some((0, text)) };
    let length = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let kept = length.min(9);
    let scale = 10u64.pow(u32::try_from(9 - kept).ok()?);
    let nanos = digits(&rest[..kept])? * scale;
    Some((u32::try_from(nanos).ok()?, &rest[length..]))
}

/// Reads `Z` or `+01:00`: whether it is ahead of UTC, and by how many seconds.
fn offset_seconds(zone: &[u8]) -> Option<(bool, u64)> {
    match zone {
        b"Z" | b"z" => Some((true, 0)),
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let (hours, minutes) = (digits(&[*h1, *h2])?, digits(&[*m1, *m2])?);
            let valid = hours < 24 && minutes < 60;
            valid.then_some((*sign == b'+', hours * 3600 + minutes * 60))
        }
        _ => None,
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400)
}

fn days_in_month(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + u64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Leap days from year 1 up to the end of `year`.
fn leap_days_through(year: u64) -> u64 {
    year / 4 - year / 100 + year / 400
}

/// Days from 1970-01-01 to the first of January of `year`.
fn day_of_year(year: u64) -> u64 {
    (year - 1970) * 365 + leap_days_through(year - 1) - leap_days_through(1969)
}

fn day_of_date(year: u64, month: u64, day: u64) -> u64 {
    day_of_year(year) + (1..month).map(|m| days_in_month(year, m)).sum::<u64>() + day - 1
}

/// The calendar date of a day counted from 1970-01-01.
fn date_of_day(days: u64) -> (u64, u64, u64) {
    // 365.2425 days a year; the guess is at most one year off.
    let mut year = 1970 + days * 10_000 / 3_652_425;
    while day_of_year(year) > days {
        year -= 1;
    }
    while day_of_year(year + 1) <= days {
        year += 1;
    }
    let mut left = days - day_of_year(year);
    let mut month = 1;
    while left >= days_in_month(year, month) {
        left -= days_in_month(year, month);
        month += 1;
    }
    (year, month, left + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn known_instants() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_234_567_890, "2009-02-13T23:31:30.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
            (SECONDS_MAX, "9999-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(format(at(seconds)), text);
            assert_eq!(parse(text), Some(at(seconds)), "{text}");
        }
        assert_eq!(format(at(1) + Duration::from_millis(7)), "1970-01-01T00:00:01.007Z");
        assert_eq!(format(at(SECONDS_MAX + 1)), "9999-12-31T23:59:59.000Z");
    }

    #[test]
    fn every_day_of_four_centuries_round_trips() {
        for day in 0..400 * 366 {
            let instant = at(day * DAY_SECONDS + 12_345);
            assert_eq!(parse(&format(instant)), Some(instant), "day {day}");
        }
    }

    #[test]
    fn the_examples_of_rfc_3339_section_5_8() {
        let first = parse("1985-04-12T23:20:50.52Z");
        assert_eq!(first, Some(at(482_196_050) + Duration::from_millis(520)));
        assert_eq!(parse("1996-12-19T16:39:57-08:00"), Some(at(851_042_397)));
        assert_eq!(parse("1996-12-20T00:39:57Z"), Some(at(851_042_397)));
        // The section's other two: a leap second, refused, and a year before 1970, refused.
        assert_eq!(parse("1990-12-31T23:59:60Z"), None);
        assert_eq!(parse("1937-01-01T12:00:27.87+00:20"), None);
    }

    #[test]
    fn what_is_not_a_date_is_refused() {
        for bad in [
            "",
            "2026",
            "2026-02-30T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-01-01 00:00:00Z",
            "2026-01-01T00:00:00",
            "2026-01-01T00:00:00.Z",
            "2026-01-01T24:00:00Z",
            "2026-01-01T00:00:00+1:00",
            "2026-01-01T00:00:0\u{e9}Z",
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
