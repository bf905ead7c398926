//! Seconds since the Unix epoch as text, and the text of HTTP's headers back.
//!
//! Called wherever a time goes onto the wire. Pure. Refuses nothing that is to be written: a year
//! outside 0 to 9999 is written with as many digits as it has.

use prost::Message;
use serde::{Serialize, Serializer};

/// The message `google.protobuf.Timestamp`, which is text in JSON.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Timestamp {
    /// Since the Unix epoch.
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    /// On top of them, always forward.
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&rfc3339(self.seconds, u32::try_from(self.nanos).unwrap_or(0)))
    }
}

/// `2026-01-02T03:04:05.006000007Z`; the fraction is left out when it is zero.
#[must_use]
pub fn rfc3339(unix_seconds: i64, nanoseconds: u32) -> String {
    const DAY: i64 = 86_400;
    let days = unix_seconds.div_euclid(DAY);
    let second = unix_seconds.rem_euclid(DAY);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let fraction = match nanoseconds {
        0 => String::new(),
        some => format!(".{some:09}"),
    };
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// `Thu, 01 Jan 1970 00:00:00 GMT`, as HTTP headers have it.
#[must_use]
pub fn http_date(unix_seconds: u64) -> String {
    const DAY: u64 = 86_400;
    // 1970-01-01 was a Thursday.
    const WEEKDAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let days = unix_seconds / DAY;
    let (year, month, day) = civil(i64::try_from(days).unwrap_or(0));
    let weekday = WEEKDAYS.iter().cycle().nth(usize::try_from(days % 7).unwrap_or(0));
    let month = usize::try_from(month - 1).ok().and_then(|month| MONTHS.get(month));
    let (hour, minute, second) =
        (unix_seconds % DAY / 3600, unix_seconds / 60 % 60, unix_seconds % 60);
    format!(
        "{}, {day:02} {} {year:04} {hour:02}:{minute:02}:{second:02} GMT",
        weekday.unwrap_or(&"Thu"),
        month.unwrap_or(&"Jan"),
    )
}

/// The seconds of an HTTP date in the one form that may be sent today; the two old forms that may
/// still be read come from nobody. `None` for anything else.
#[must_use]
pub fn from_http_date(text: &str) -> Option<u64> {
    const MINUTE: u64 = 60;
    let text = text.trim();
    // Days have two digits each and months three letters, so the numbers have fixed places.
    let number = |at: std::ops::Range<usize>| text.get(at)?.parse::<u64>().ok();
    let time_of_day = (number(17..19)? * MINUTE + number(20..22)?) * MINUTE + number(23..25)?;
    let year = i64::try_from(number(12..16)?).ok()?;
    let first = days_to_year(year)?;
    // The candidate days of one year: whichever is written like this is the one.
    (0..366)
        .map(|day| (first + day) * 86_400 + time_of_day)
        .find(|candidate| http_date(*candidate) == text)
}

/// Days from 1970 to the first day of a year.
fn days_to_year(year: i64) -> Option<u64> {
    let years = year.checked_sub(1970).filter(|years| (0..10_000).contains(years))?;
    let leap_days = |year: i64| year / 4 - year / 100 + year / 400;
    u64::try_from(years * 365 + leap_days(year - 1) - leap_days(1969)).ok()
}

/// Year, month and day of a count of days since 1970-01-01, in the Gregorian calendar. Counts in
/// eras of 400 years from 0000-03-01, so that the leap day is the last of its year.
fn civil(days: i64) -> (i64, i64, i64) {
    const DAYS_TO_1970: i64 = 719_468;
    const DAYS_PER_ERA: i64 = 146_097;
    let since = days.saturating_add(DAYS_TO_1970);
    let era = since.div_euclid(DAYS_PER_ERA);
    let day_of_era = since.rem_euclid(DAYS_PER_ERA);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times() {
        for (seconds, nanoseconds, wanted) in [
            (0, 0, "1970-01-01T00:00:00Z"),
            (951_782_400, 0, "2000-02-29T00:00:00Z"),
            (1_709_251_199, 5, "2024-02-29T23:59:59.000000005Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00Z"),
            (-1, 0, "1969-12-31T23:59:59Z"),
            (253_402_300_799, 0, "9999-12-31T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(seconds, nanoseconds), wanted);
        }
    }

    #[test]
    fn http_dates() {
        assert_eq!(http_date(0), "Thu, 01 Jan 1970 00:00:00 GMT");
        assert_eq!(http_date(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        for seconds in [0, 784_111_777, 951_782_399, 951_868_800, 1_709_251_199, 4_107_542_400] {
            assert_eq!(from_http_date(&http_date(seconds)), Some(seconds));
        }
        for bad in ["", "Sun", "Mon, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:99 GMT"] {
            assert_eq!(from_http_date(bad), None, "{bad}");
        }
        let text = serde_json::to_string(&Timestamp { seconds: 0, nanos: 5 }).unwrap();
        assert_eq!(text, r#""1970-01-01T00:00:00.000000005Z""#);
    }
}
