//! The events of one execution, as the SDKs read them: one JSON object per line.
//!
//! Made by [`super::session`] from kernel messages and written by [`super::http`]. Does no input
//! or output. A line is never empty and never holds a newline of its own, because the Python SDK
//! parses every line it gets.

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Map, Value};

/// One line of the stream.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    NumberOfExecutions { execution_count: u64 },
    Stdout { text: String, timestamp: String },
    Stderr { text: String, timestamp: String },
    Result(Map<String, Value>),
    Error { name: String, value: String, traceback: String },
    Keepalive,
    EndOfExecution,
}

/// MIME types that have a field of their own in a result.
const FIELDS: [(&str, &str); 12] = [
    ("text/plain", "text"),
    ("text/html", "html"),
    ("text/markdown", "markdown"),
    ("image/svg+xml", "svg"),
    ("image/png", "png"),
    ("image/jpeg", "jpeg"),
    ("application/pdf", "pdf"),
    ("text/latex", "latex"),
    ("application/json", "json"),
    ("application/javascript", "javascript"),
    ("e2b/data", "data"),
    ("e2b/chart", "chart"),
];

impl Event {
    /// The event for a MIME bundle of `display_data` or `execute_result`.
    pub fn result(mut bundle: Map<String, Value>, is_main_result: bool) -> Self {
        let mut result = Map::new();
        for (mime, field) in FIELDS {
            if let Some(value) = bundle.remove(mime).filter(|value| !value.is_null()) {
                let value = if field == "text" { unquoted(value) } else { value };
                result.insert(field.to_owned(), value);
            }
        }
        result.insert("extra".to_owned(), Value::Object(bundle));
        result.insert("is_main_result".to_owned(), Value::Bool(is_main_result));
        Self::Result(result)
    }

    /// An error that the interpreter itself makes.
    pub fn synthetic(name: &str, value: impl Into<String>) -> Self {
        Self::Error { name: name.to_owned(), value: value.into(), traceback: String::new() }
    }

    /// The line, newline included.
    pub fn line(&self) -> Bytes {
        // Serialising strings and JSON values into memory has no failing case; if it ever had
        // one, a keepalive is a line that every client ignores.
        let mut line =
            serde_json::to_vec(self).unwrap_or_else(|_| br#"{"type":"keepalive"}"#.to_vec());
        line.push(b'\n');
        Bytes::from(line)
    }

    /// About how much memory the event holds, for the bound on what waits for a slow client.
    pub fn weight(&self) -> usize {
        const FIXED: usize = 128;
        let held = match self {
            Self::Stdout { text, .. } | Self::Stderr { text, .. } => text.len(),
            Self::Error { name, value, traceback } => name.len() + value.len() + traceback.len(),
            Self::Result(map) => map.values().map(value_weight).sum(),
            Self::NumberOfExecutions { .. } | Self::Keepalive | Self::EndOfExecution => 0,
        };
        FIXED + held
    }
}

fn value_weight(value: &Value) -> usize {
    const FIXED: usize = 32;
    FIXED
        + match value {
            Value::String(text) => text.len(),
            Value::Array(items) => items.iter().map(value_weight).sum(),
            Value::Object(map) => {
                map.iter().map(|(name, value)| name.len() + value_weight(value)).sum()
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        }
}

/// A string shows as the literal it would be in code; the quotes around it are not part of the
/// answer.
fn unquoted(value: Value) -> Value {
    let Value::String(text) = value else { return value };
    let within = |quote| text.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
    let inner = within('\'').or_else(|| within('"')).map(str::to_owned);
    Value::String(inner.unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(map) => map,
            _ => panic!("not an object"),
        }
    }

    fn line(event: &Event) -> Value {
        let line = event.line();
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        assert_eq!(line.last(), Some(&b'\n'));
        serde_json::from_slice(&line).unwrap()
    }

    #[test]
    fn every_mime_type_gets_its_field() {
        let bundle = object(json!({
            "text/plain": "'it'", "text/html": "<b>", "text/markdown": "m", "image/svg+xml": "s",
            "image/png": "p", "image/jpeg": "j", "application/pdf": "d", "text/latex": "l",
            "application/json": {"a": 1}, "application/javascript": "x",
            "e2b/data": {"c": [1]}, "e2b/chart": {"type": "line"}, "application/x-own": 5,
        }));
        assert_eq!(
            line(&Event::result(bundle, true)),
            json!({
                "type": "result", "text": "it", "html": "<b>", "markdown": "m", "svg": "s",
                "png": "p", "jpeg": "j", "pdf": "d", "latex": "l", "json": {"a": 1},
                "javascript": "x", "data": {"c": [1]}, "chart": {"type": "line"},
                "extra": {"application/x-own": 5}, "is_main_result": true,
            })
        );
    }

    #[test]
    fn quotes_are_stripped_as_a_pair_only() {
        let text = |repr: &str| {
            let event = Event::result(object(json!({"text/plain": repr})), true);
            line(&event)["text"].clone()
        };
        assert_eq!(text("'a'"), "a");
        assert_eq!(text("''"), "");
        assert_eq!(text("'"), "'");
        assert_eq!(text("\"it's\""), "it's");
        assert_eq!(text("\"'"), "\"'");
        assert_eq!(text("['a']"), "['a']");
    }

    #[test]
    fn absent_and_null_fields_are_left_out() {
        let event = Event::result(object(json!({"text/plain": "1", "text/html": null})), false);
        assert_eq!(
            line(&event),
            json!({"type": "result", "text": "1", "extra": {}, "is_main_result": false})
        );
    }

    #[test]
    fn lines_have_the_names_that_sdks_read() {
        assert_eq!(
            line(&Event::NumberOfExecutions { execution_count: 3 }),
            json!({"type": "number_of_executions", "execution_count": 3})
        );
        assert_eq!(
            line(&Event::Stdout { text: "a\nb\n".into(), timestamp: "t".into() }),
            json!({"type": "stdout", "text": "a\nb\n", "timestamp": "t"})
        );
        assert_eq!(line(&Event::Keepalive), json!({"type": "keepalive"}));
        assert_eq!(line(&Event::EndOfExecution), json!({"type": "end_of_execution"}));
        assert_eq!(
            line(&Event::synthetic("ExecutionAborted", "x")),
            json!({"type": "error", "name": "ExecutionAborted", "value": "x", "traceback": ""})
        );
    }

    #[test]
    fn weight_grows_with_what_is_held() {
        let small = Event::Stdout { text: "a".into(), timestamp: String::new() };
        let large = Event::result(object(json!({"e2b/data": {"c": ["x".repeat(9000)]}})), false);
        assert!(small.weight() < 1000);
        assert!(large.weight() > 9000);
    }
}
