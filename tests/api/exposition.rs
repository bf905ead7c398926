//! A strict parser of what `GET /metrics` says.
//!
//! Used by tests of metrics. Refuses what Prometheus would: a number without its type, a series twice, a histogram
//! that falls. It knows no family.

use std::collections::{BTreeMap, BTreeSet};

use crate::daemon::Daemon;

/// One line: its labels but those of the shard, and the number; summed over the shards.
pub type Samples = BTreeMap<(String, BTreeMap<String, String>), f64>;

/// An exposition.
pub struct Exposition {
    pub kinds: BTreeMap<String, String>,
    pub samples: Samples,
    /// The same with all labels, not summed.
    series: Samples,
}

fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// `name="value",…}` up to the brace: the labels, and what follows.
fn labels(mut text: &str) -> (BTreeMap<String, String>, &str) {
    let mut labels = BTreeMap::new();
    loop {
        let (name, rest) = text.split_once("=\"").expect("a label");
        assert!(is_name(name), "{name:?}");
        let mut value = String::new();
        let mut characters = rest.char_indices();
        let end = loop {
            let (at, character) = characters.next().expect("the end of a value");
            match character {
                '"' => break at,
                '\\' => match characters.next().expect("an escape").1 {
                    'n' => value.push('\n'),
                    other @ ('\\' | '"') => value.push(other),
                    other => panic!("no such escape: {other:?}"),
                },
                other => value.push(other),
            }
        };
        assert!(labels.insert(name.to_owned(), value).is_none(), "{name} twice");
        match rest[end + 1..].split_at(1) {
            (",", rest) => text = rest,
            ("}", rest) => return (labels, rest),
            (other, _) => panic!("{other:?} behind a label"),
        }
    }
}

impl Exposition {
    fn parse(text: &str) -> Self {
        assert!(text.is_empty() || text.ends_with('\n'), "the last line ends, too");
        let (mut kinds, mut samples, mut series) =
            (BTreeMap::new(), Samples::new(), Samples::new());
        let mut seen = BTreeSet::new();
        let mut family = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect("a help");
                assert!(is_name(name) && !help.is_empty() && !kinds.contains_key(name), "{line}");
                name.clone_into(&mut family);
                continue;
            }
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a type");
                assert_eq!(name, family, "help, type and numbers stand together");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                kinds.insert(name.to_owned(), kind.to_owned());
                continue;
            }
            let end = line.find(['{', ' ']).expect("a name");
            let (name, rest) = line.split_at(end);
            let of = match kinds.get(&family).map(String::as_str) {
                Some("histogram") => ["_bucket", "_sum", "_count"]
                    .iter()
                    .find_map(|suffix| name.strip_suffix(suffix))
                    .expect("a part of a histogram"),
                Some(_) => name,
                None => panic!("a number before its type: {line}"),
            };
            assert_eq!(of, family, "{line}");
            assert!(seen.insert(line.rsplit_once(' ').expect("a number").0), "twice: {line}");
            let (mut labels, rest) = match rest.strip_prefix('{') {
                Some(rest) => labels(rest),
                None => (BTreeMap::new(), rest),
            };
            let number = rest.strip_prefix(' ').expect("a space");
            let number = match number {
                "+Inf" => f64::INFINITY,
                number => number.parse().unwrap_or_else(|error| panic!("{error}: {line}")),
            };
            series.insert((name.to_owned(), labels.clone()), number);
            labels.remove("shard");
            labels.remove("node");
            *samples.entry((name.to_owned(), labels)).or_insert(0.0) += number;
        }
        let parsed = Self { kinds, samples, series };
        parsed.check_histograms();
        parsed
    }

    /// Buckets rise, and the last is the count.
    fn check_histograms(&self) {
        let mut buckets: BTreeMap<_, Vec<(f64, f64)>> = BTreeMap::new();
        for ((name, labels), number) in &self.samples {
            let Some(family) = name.strip_suffix("_bucket") else { continue };
            let mut labels = labels.clone();
            let bound = labels.remove("le").expect("a bound");
            let bound =
                if bound == "+Inf" { f64::INFINITY } else { bound.parse().expect("a bound") };
            buckets.entry((family.to_owned(), labels)).or_default().push((bound, *number));
        }
        for ((family, labels), mut buckets) in buckets {
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert!(buckets.is_sorted_by_key(|bucket| bucket.1), "{family} {labels:?}");
            let (last, count) = buckets.last().expect("a bucket");
            assert!(last.is_infinite(), "{family} {labels:?}");
            assert_eq!(self.samples[&(format!("{family}_count"), labels)], *count, "{family}");
        }
    }

    /// What this is over all shards.
    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let key = (name.to_owned(), labels);
        *self.samples.get(&key).unwrap_or_else(|| panic!("no {key:?}"))
    }

    /// The series of a name with all their labels.
    pub fn series(&self, name: &str) -> Vec<(&BTreeMap<String, String>, f64)> {
        let own = self.series.iter().filter(|((of, _), _)| of == name);
        own.map(|((_, labels), number)| (labels, *number)).collect()
    }
}

/// Of all shards.
pub fn scrape(daemon: &Daemon) -> Exposition {
    scrape_at(daemon, "/metrics")
}

/// The same of another page.
pub fn scrape_at(daemon: &Daemon, path: &str) -> Exposition {
    let reply = daemon.ask("GET", path, None);
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    Exposition::parse(std::str::from_utf8(&reply.body).expect("text"))
}
