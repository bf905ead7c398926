//! `GET /metrics` and `GET /metrics/sandboxes`: numbers of the host, and of each of its sandboxes, in the
//! text format of Prometheus, version 0.0.4.
//!
//! Called by [`crate::api`]. Refuses to keep numbers of its own: shards count, and are asked.

use std::collections::BTreeMap;

use hyper::Response;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use mica_shards::Host;
use mica_shards::metrics::{Family, Kind, Measured, Sample, Value};
use mica_shards::rt;
use mica_units::Distribution;

use crate::body::Body;
use crate::error::ApiError;

/// Asks every shard and answers.
///
/// # Errors
/// When a shard does not answer.
pub async fn answer(host: &Host) -> Result<Response<Body>, ApiError> {
    Ok(shown(text(&host.measure().await?)))
}

/// The same of every sandbox: a look at each process. Written off the shard, as it may be a megabyte.
///
/// # Errors
/// When a shard does not answer, or no thread has room.
pub async fn answer_sandboxes(host: &Host) -> Result<Response<Body>, ApiError> {
    let measured = host.measure_sandboxes().await?;
    let text = rt::blocking(move || text(&measured)).await.map_err(|error| {
        tracing::debug!(%error, "numbers of sandboxes were not written");
        ApiError::busy()
    })?;
    Ok(shown(text))
}

fn shown(text: String) -> Response<Body> {
    let mut response = Response::new(Body::full(text.into_bytes()));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// A family, and its numbers with the shard that each is of.
type Shown<'m> = (&'static Family, Vec<(&'m Measured, &'m Sample)>);

/// All of it. A family is written once, with the numbers of every shard behind its head.
fn text(measured: &[Measured]) -> String {
    let mut families: BTreeMap<&str, Shown<'_>> = BTreeMap::new();
    for shard in measured {
        for sample in &shard.samples {
            let family = families.entry(sample.family.name);
            family.or_insert_with(|| (sample.family, Vec::new())).1.push((shard, sample));
        }
    }
    let mut text = String::new();
    for (name, (family, samples)) in families {
        let Family { kind, help, .. } = family;
        text += &format!("# HELP {name} {}\n# TYPE {name} {kind}\n", escaped(help, false));
        for (shard, sample) in samples {
            write_sample(&mut text, shard, sample);
        }
    }
    text
}

fn write_sample(text: &mut String, shard: &Measured, sample: &Sample) {
    let family = sample.family;
    let mut labels: Vec<(&str, String)> = Vec::new();
    if family.per_shard {
        labels.push(("shard", shard.shard.index().to_string()));
        labels.push(("node", shard.node.to_string()));
    }
    let own = family.labels.iter().zip(&sample.labels);
    labels.extend(own.map(|(name, value)| (*name, value.to_string())));
    match &sample.value {
        Value::Whole(value) => line(text, family.name, "", &labels, &value.to_string()),
        Value::Real(value) => line(text, family.name, "", &labels, &number(*value)),
        Value::Durations(durations) => write_histogram(text, family, &mut labels, durations),
    }
}

fn write_histogram(
    text: &mut String,
    family: &Family,
    labels: &mut Vec<(&str, String)>,
    durations: &Distribution,
) {
    debug_assert_eq!(family.kind, Kind::Histogram, "{}", family.name);
    for (bound_ns, below) in &durations.buckets {
        labels.push(("le", number(seconds(*bound_ns))));
        line(text, family.name, "_bucket", labels, &below.to_string());
        labels.pop();
    }
    labels.push(("le", "+Inf".to_owned()));
    line(text, family.name, "_bucket", labels, &durations.count.to_string());
    labels.pop();
    line(text, family.name, "_sum", labels, &number(seconds(durations.sum_ns)));
    line(text, family.name, "_count", labels, &durations.count.to_string());
}

fn line(text: &mut String, name: &str, suffix: &str, labels: &[(&str, String)], value: &str) {
    text.push_str(name);
    text.push_str(suffix);
    for (place, (label, value)) in labels.iter().enumerate() {
        text.push(if place == 0 { '{' } else { ',' });
        text.push_str(label);
        text.push_str("=\"");
        text.push_str(&escaped(value, true));
        text.push('"');
    }
    if !labels.is_empty() {
        text.push('}');
    }
    text.push(' ');
    text.push_str(value);
    text.push('\n');
}

/// What would end a line, a value or an escape is escaped. In a help line quotes are only quotes.
fn escaped(value: &str, quotes: bool) -> String {
    let mut escaped = String::with_capacity(value.len());
    for character in value.chars() {
        match character {
            '\\' => escaped.push_str("\\\\"),
            '\n' => escaped.push_str("\\n"),
            '"' if quotes => escaped.push_str("\\\""),
            other => escaped.push(other),
        }
    }
    escaped
}

fn seconds(ns: u64) -> f64 {
    // Exact up to 2^53 ns, which are 104 days.
    ns as f64 / 1e9
}

fn number(value: f64) -> String {
    if value.is_nan() {
        "NaN".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "+Inf".to_owned() } else { "-Inf".to_owned() }
    } else {
        value.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mica_units::ShardId;
    use std::time::Duration;

    static COUNT: Family = Family {
        name: "test_total",
        kind: Kind::Counter,
        unit: "tests",
        help: "Back\\slash and\nline, \"quoted\".",
        labels: &["what"],
        per_shard: true,
    };
    static TIMES: Family = Family {
        name: "test_seconds",
        kind: Kind::Histogram,
        unit: "seconds",
        help: "Times.",
        labels: &[],
        per_shard: false,
    };

    #[test]
    fn a_family_has_one_head_and_a_line_for_each_shard() {
        let shard = |index, node| {
            let samples = vec![Sample::count(&COUNT, ["a\"b\\c\nd"], 7)];
            Measured::new(ShardId::new(index), node, samples)
        };
        let text = text(&[shard(0, 0), shard(1, 1)]);
        let expected = "# HELP test_total Back\\\\slash and\\nline, \"quoted\".\n\
                        # TYPE test_total counter\n\
                        test_total{shard=\"0\",node=\"0\",what=\"a\\\"b\\\\c\\nd\"} 7\n\
                        test_total{shard=\"1\",node=\"1\",what=\"a\\\"b\\\\c\\nd\"} 7\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_histogram_is_cumulative_and_in_seconds() {
        static BOUNDS_NS: [u64; 2] = [1_000_000, 2_500_000];
        let times = mica_units::Buckets::new(&BOUNDS_NS);
        for us in [500, 2000, 9000] {
            times.record(Duration::from_micros(us));
        }
        let value = Value::Durations(times.distribution());
        let samples = vec![Sample::new(&TIMES, [], value)];
        let text = text(&[Measured::new(ShardId::new(0), 0, samples)]);
        let lines: Vec<_> = text.lines().skip(2).collect();
        let expected = [
            "test_seconds_bucket{le=\"0.001\"} 1",
            "test_seconds_bucket{le=\"0.0025\"} 2",
            "test_seconds_bucket{le=\"+Inf\"} 3",
            "test_seconds_sum 0.0115",
            "test_seconds_count 3",
        ];
        assert_eq!(lines, expected);
        assert_eq!((number(f64::INFINITY), number(0.25)), ("+Inf".to_owned(), "0.25".to_owned()));
    }
}
