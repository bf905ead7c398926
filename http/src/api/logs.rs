//! What was written about a sandbox: its console, and what happened to it.
//!
//! Called by [`super::sandbox`]. Refuses parameters out of form and pages without a bound.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::{Response, StatusCode};
use mica_shards::{LogLine, LogSource};
use mica_units::SandboxId;
use mica_wire::api::{LogEntry, LogLevel, Logs, LogsV2, SandboxLog};

use super::json;
use crate::body::Body;
use crate::error::ApiError;
use crate::route::Version;
use crate::tenant::TenantHost;
use crate::{percent, rfc3339};

/// Entries of one answer, also where the client does not say.
const ENTRIES_MAX: usize = 1000;

/// What the agent's lines begin with.
const AGENT: &str = "mica-guest";

/// What a kernel's lines begin with when it gives up a program, or itself.
const KERNEL_ERRORS: [&str; 3] =
    ["Out of memory: Killed process", "Memory cgroup out of memory: Killed", "Kernel panic - "];

/// Longest text that is looked for.
const SEARCH_CHARS_MAX: usize = 256;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct LogQuery {
    /// Where it starts: not before that; backward, not after.
    from: Option<SystemTime>,
    limit: usize,
    backward: bool,
    level: LogLevel,
    search: String,
}

/// Answers.
///
/// # Errors
/// What to answer instead.
pub async fn answer(
    host: &TenantHost<'_>,
    id: SandboxId,
    version: Version,
    query: &str,
) -> Result<Response<Body>, ApiError> {
    let query = LogQuery::parse(version, query)?;
    let entries = query.pick(host.logs(id).await?);
    match version {
        Version::V1 => {
            let logs = entries.iter().map(older).collect();
            json::answer(StatusCode::OK, &Logs { logs, log_entries: entries })
        }
        Version::V2 => json::answer(StatusCode::OK, &LogsV2 { logs: entries }),
    }
}

impl LogQuery {
    fn parse(version: Version, query: &str) -> Result<Self, ApiError> {
        let pairs = percent::query_pairs(query)
            .map_err(|error| ApiError::bad_request(format!("the query is not valid: {error}")))?;
        let mut parsed = Self {
            from: None,
            limit: ENTRIES_MAX,
            backward: false,
            level: LogLevel::Debug,
            search: String::new(),
        };
        let start = if version == Version::V1 { "start" } else { "cursor" };
        for (key, value) in pairs {
            let form = |form: &str| ApiError::bad_request(format!("`{key}` must be {form}"));
            match key.as_str() {
                key if key == start => {
                    let moment = value.parse().ok().and_then(at_ms);
                    parsed.from = Some(moment.ok_or_else(|| form("milliseconds since 1970"))?);
                }
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| *limit <= ENTRIES_MAX);
                    parsed.limit = limit.ok_or_else(|| form("0 to 1000"))?;
                }
                _ if version == Version::V1 => {}
                "direction" => match value.as_str() {
                    "forward" => parsed.backward = false,
                    "backward" => parsed.backward = true,
                    _ => return Err(form("`forward` or `backward`")),
                },
                "level" => {
                    parsed.level = match value.as_str() {
                        "debug" => LogLevel::Debug,
                        "info" => LogLevel::Info,
                        "warn" => LogLevel::Warn,
                        "error" => LogLevel::Error,
                        _ => return Err(form("`debug`, `info`, `warn` or `error`")),
                    };
                }
                "search" if value.chars().count() > SEARCH_CHARS_MAX => {
                    return Err(form("256 characters at most"));
                }
                "search" => parsed.search = value,
                _ => {}
            }
        }
        Ok(parsed)
    }

    /// Of lines in the order of time: those asked for.
    fn pick(&self, mut lines: Vec<LogLine>) -> Vec<LogEntry> {
        if self.backward {
            lines.reverse();
        }
        let wanted = |line: &LogLine| {
            let at = since_ms(line.at);
            self.from.map(since_ms).is_none_or(|from| match self.backward {
                true => at <= from,
                false => at >= from,
            })
        };
        lines
            .into_iter()
            .filter(wanted)
            .map(entry)
            .filter(|entry| entry.level >= self.level && entry.message.contains(&self.search))
            .take(self.limit)
            .collect()
    }
}

fn at_ms(ms: i64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_millis(u64::try_from(ms).ok()?))
}

/// Clients read times to the millisecond, and ask with what they read.
fn since_ms(at: SystemTime) -> u128 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}

fn entry(line: LogLine) -> LogEntry {
    let source = match line.source {
        LogSource::Console => "console",
        LogSource::Host => "host",
    };
    LogEntry {
        timestamp: rfc3339::format(line.at),
        level: level(&line),
        message: line.text,
        fields: BTreeMap::from([("source".to_owned(), source.to_owned())]),
    }
}

/// How much a line matters, as far as it says: the priority that whoever writes to `/dev/kmsg` may put before
/// a line, the agent's own complaints (it writes nothing else), and what the kernel says when it kills. Of
/// what else a guest writes nobody knows. What the host notes is what was asked of it, and went well.
fn level(line: &LogLine) -> LogLevel {
    if line.source == LogSource::Host {
        return LogLevel::Info;
    }
    let text = line.text.trim_start();
    if let Some(priority) = priority(text) {
        return match priority {
            0..=3 => LogLevel::Error,
            4 => LogLevel::Warn,
            5 | 6 => LogLevel::Info,
            _ => LogLevel::Debug,
        };
    }
    let text = without_time(text);
    if KERNEL_ERRORS.iter().any(|error| text.starts_with(error)) {
        LogLevel::Error
    } else if text.starts_with(AGENT) {
        LogLevel::Warn
    } else {
        LogLevel::Info
    }
}

/// The priority of `<N>`, without the facility that N may also hold.
fn priority(text: &str) -> Option<u16> {
    let (number, _) = text.strip_prefix('<')?.split_once('>')?;
    let is_number = matches!(number.len(), 1..=3) && number.bytes().all(|b| b.is_ascii_digit());
    is_number.then(|| number.parse::<u16>().ok()).flatten().map(|number| number % 8)
}

/// What follows the kernel's `[  seconds.micros] `.
fn without_time(text: &str) -> &str {
    let is_time = |inner: &str| inner.bytes().all(|b| b.is_ascii_digit() || b" .".contains(&b));
    match text.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
        Some((inner, rest)) if is_time(inner) => rest,
        _ => text,
    }
}

/// E2B's older clients parse the line itself, and look for its level.
fn older(entry: &LogEntry) -> SandboxLog {
    let mut line = serde_json::json!({
        "level": entry.level, "message": entry.message, "timestamp": entry.timestamp,
    });
    for (name, value) in &entry.fields {
        line[name] = value.clone().into();
    }
    SandboxLog { timestamp: entry.timestamp.clone(), line: line.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines() -> Vec<LogLine> {
        let line = |ms: u64, text: &str| LogLine {
            at: UNIX_EPOCH + Duration::from_millis(ms),
            text: text.to_owned(),
            source: LogSource::Console,
        };
        vec![line(1000, "one"), line(2000, "two"), line(3000, "three")]
    }

    fn texts(version: Version, query: &str) -> Vec<String> {
        let picked = LogQuery::parse(version, query).unwrap().pick(lines());
        picked.into_iter().map(|entry| entry.message).collect()
    }

    #[test]
    fn pages_go_both_ways() {
        for (query, expected) in [
            ("", vec!["one", "two", "three"]),
            ("limit=2", vec!["one", "two"]),
            ("limit=0", vec![]),
            ("cursor=2000", vec!["two", "three"]),
            ("cursor=2000&direction=backward", vec!["two", "one"]),
            ("direction=backward&limit=1", vec!["three"]),
            ("search=o", vec!["one", "two"]),
            ("level=info&unknown=1", vec!["one", "two", "three"]),
            ("level=warn", vec![]),
        ] {
            assert_eq!(texts(Version::V2, query), expected, "{query}");
        }
        assert_eq!(texts(Version::V1, "start=2001&cursor=5000"), ["three"]);
    }

    #[test]
    fn lines_have_the_level_that_they_say() {
        use LogLevel::{Debug, Error, Info, Warn};
        for (text, expected) in [
            ("<0>gone", Error),
            ("<3>systemd[1]: failed", Error),
            ("<4>slow", Warn),
            ("<30>of a daemon, informational", Info),
            ("<7>detail", Debug),
            ("<8x>", Info),
            ("<>", Info),
            ("<1234>", Info),
            ("[   12.345678] Out of memory: Killed process 7 (python)", Error),
            ("Kernel panic - not syncing: Attempted to kill init!", Error),
            ("[    0.000000] Linux version 6", Info),
            ("[error] of a program", Info),
            ("mica-guest: cannot start the Python kernel: no such file", Warn),
            ("hello", Info),
        ] {
            let line = |source| LogLine { at: UNIX_EPOCH, text: text.to_owned(), source };
            assert_eq!(level(&line(LogSource::Console)), expected, "{text}");
            assert_eq!(level(&line(LogSource::Host)), Info, "{text}");
        }
        let mut all = lines();
        all[1].text = "<4>two".to_owned();
        let picked = LogQuery::parse(Version::V2, "level=warn").unwrap().pick(all);
        let messages: Vec<_> = picked.into_iter().map(|entry| entry.message).collect();
        assert_eq!(messages, ["<4>two"], "as it was written");
    }

    #[test]
    fn bad_parameters_are_refused() {
        let long = format!("search={}", "x".repeat(257));
        for bad in
            ["limit=1001", "limit=-1", "cursor=x", "cursor=-1", "direction=up", "level=all", &long]
        {
            assert!(LogQuery::parse(Version::V2, bad).is_err(), "{bad}");
        }
        assert!(LogQuery::parse(Version::V2, "cursor=9223372036854775807").is_ok());
    }

    #[test]
    fn an_older_line_is_json_with_a_level() {
        let line = older(&entry(lines().remove(0))).line;
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&line["level"], &line["message"]), (&"info".into(), &"one".into()));
        assert_eq!(line["source"], "console");
    }
}
