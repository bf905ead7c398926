//! Numbers as people read them.
//!
//! Called by [`super::render`]. Pure. Refuses more digits than tell something.

use std::time::{Duration, SystemTime};

use mica_http::rfc3339;

/// Three digits.
fn short(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

pub fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{} {}", short(value), units[unit]) }
}

pub fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// A time that something took.
pub fn took(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 1e-3 => format!("{:.0} µs", seconds * 1e6),
        seconds if seconds < 1.0 => format!("{} ms", short(seconds * 1e3)),
        seconds => format!("{} s", short(seconds)),
    }
}

/// How long something has lasted, in its two largest units.
pub fn lasted(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// The time of day.
pub fn clock(at: SystemTime) -> String {
    let text = rfc3339(at);
    text.get(11..19).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_change_where_they_should() {
        assert_eq!(
            [bytes(1023), bytes(1024), bytes(150 << 20), bytes(3 << 40)],
            ["1023 B", "1.00 KiB", "150 MiB", "3.00 TiB"]
        );
        assert_eq!([took(0.000_012), took(0.0031), took(1.5)], ["12 µs", "3.10 ms", "1.50 s"]);
        let of = |seconds| lasted(Duration::from_secs(seconds));
        assert_eq!(
            [of(59), of(61), of(3661), of(90_000)],
            ["59 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]
        );
        assert_eq!(clock(SystemTime::UNIX_EPOCH + Duration::from_secs(3723)), "01:02:03");
        assert_eq!(percent(0.047), "5 %");
    }
}
