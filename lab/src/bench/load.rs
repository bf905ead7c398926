//! Closed loops: so many clients, each with the next job as soon as its last one is done.
//!
//! Called by the tables. A failed job is counted with what was said, and never ends a round: who reads the row sees
//! how many there were. Refuses to measure a client's connecting as the host's work: connections are made before.

use std::collections::BTreeMap;
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use super::host::{Host, Timed, lock};
use crate::engine::client::Client;

/// Different errors that are kept. More are one more.
const ERRORS_MAX: usize = 10;
/// How much of an error is kept.
const ERROR_CHARS_MAX: usize = 300;

/// What went wrong, and how often.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failures(BTreeMap<String, u64>);

impl Failures {
    /// Counts one.
    pub fn add(&mut self, error: &anyhow::Error) {
        self.count(format!("{error:#}").chars().take(ERROR_CHARS_MAX).collect(), 1);
    }

    /// Counts another round's.
    pub fn append(&mut self, other: Self) {
        for (error, count) in other.0 {
            self.count(error, count);
        }
    }

    fn count(&mut self, error: String, count: u64) {
        let is_new = !self.0.contains_key(&error);
        let error = if is_new && self.0.len() >= ERRORS_MAX { "others".to_owned() } else { error };
        *self.0.entry(error).or_default() += count;
    }

    /// How many there were.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        self.0.iter().map(|(error, count)| json!({ "error": error, "count": count })).collect()
    }

    /// Each with its count.
    pub fn each(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(error, count)| (error.as_str(), *count))
    }
}

/// What one round of jobs came to.
#[derive(Debug)]
pub struct Round<T> {
    /// From the first call to the last answer.
    pub wall: Duration,
    /// The times of what succeeded.
    pub times: Vec<Duration>,
    /// What came of it, in no order.
    pub values: Vec<T>,
    /// What did not.
    pub failures: Failures,
}

impl<T> Round<T> {
    /// The values, where nothing may fail: the ground of what is measured next.
    ///
    /// # Errors
    /// With the first thing that went wrong.
    pub fn all(self, what: &str) -> Result<Vec<T>> {
        match self.failures.each().next() {
            None => Ok(self.values),
            Some((error, count)) => Err(anyhow!("{what}: {count} times: {error}")),
        }
    }
}

/// Does the jobs from `clients` connections at once, and gives back when all are done.
///
/// # Errors
/// When nobody listens, or the run is to end.
pub fn round<J: Send, T: Send>(
    host: &Host,
    clients: usize,
    jobs: impl IntoIterator<Item = J>,
    work: impl Fn(&mut Client, J) -> Timed<T> + Sync,
) -> Result<Round<T>> {
    let jobs: Vec<J> = jobs.into_iter().collect();
    let count = clients.min(jobs.len());
    let connections = (0..count).map(|_| host.client()).collect::<Result<Vec<_>>>()?;
    let next = Mutex::new(jobs.into_iter());
    let ready = Barrier::new(count);
    let done: Vec<Result<Vec<Timed<T>>>> = thread::scope(|scope| {
        let begin = |mut client: Client| {
            let (next, ready, work) = (&next, &ready, &work);
            scope.spawn(move || {
                ready.wait();
                let mut done = Vec::new();
                while !host.stopped() {
                    let Some(job) = lock(next).next() else { break };
                    if !client.is_open() {
                        client = host.client()?;
                    }
                    done.push(work(&mut client, job));
                }
                host.give_back(client);
                Ok(done)
            })
        };
        let threads: Vec<_> = connections.into_iter().map(begin).collect();
        let panicked = |_| Err(anyhow!("a client panicked"));
        threads.into_iter().map(|one| one.join().unwrap_or_else(panicked)).collect()
    });
    let done: Vec<Timed<T>> =
        done.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    host.go_on()?;
    sum(done)
}

/// What calls came to, of whatever clients.
///
/// # Errors
/// When there were none.
pub fn sum<T>(done: Vec<Timed<T>>) -> Result<Round<T>> {
    let begun = done.iter().map(|one| one.begun).min().context("no jobs")?;
    let ended: Instant = done.iter().map(|one| one.begun + one.took).max().context("no jobs")?;
    let (mut times, mut values) = (Vec::new(), Vec::new());
    let mut failures = Failures::default();
    for one in done {
        match one.value {
            Ok(value) => {
                times.push(one.took);
                values.push(value);
            }
            Err(error) => failures.add(&error),
        }
    }
    Ok(Round { wall: ended - begun, times, values, failures })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_by_what_was_said_and_bounded() {
        let mut failures = Failures::default();
        for number in 0..30 {
            failures.add(&anyhow!("error {}", number % 15));
        }
        assert_eq!(failures.total(), 30);
        let kept: Vec<_> = failures.each().collect();
        assert_eq!(kept.len(), ERRORS_MAX + 1);
        assert!(kept.contains(&("error 0", 2)) && kept.contains(&("others", 10)), "{kept:?}");
        let mut other = Failures::default();
        other.append(failures);
        assert_eq!(other.total(), 30);
        let long = anyhow!("{}", "é".repeat(1000));
        other = Failures::default();
        other.add(&long);
        assert_eq!(other.json()[0]["error"].as_str().map(|e| e.chars().count()), Some(300));
    }

    #[test]
    fn a_round_is_from_the_first_call_to_the_last_answer() {
        let begun = Instant::now();
        let ms = Duration::from_millis;
        let one =
            |at: u64, took: u64, value| Timed { begun: begun + ms(at), took: ms(took), value };
        let round =
            sum(vec![one(5, 10, Ok('b')), one(0, 3, Ok('a')), one(1, 30, Err(anyhow!("gone")))])
                .unwrap();
        assert_eq!(round.wall, ms(31));
        assert_eq!((round.times.len(), round.failures.total()), (2, 1));
        assert!(round.all("them").unwrap_err().to_string().contains("gone"));
        assert!(sum::<()>(Vec::new()).is_err());
    }
}
