//! `GET /debug/pprof/profile` and `GET /debug/flamegraph`: where the daemon spends its processors.
//!
//! Called by [`crate::api`]. A timer of the process sends it a signal for every hundredth second of
//! processor time, and whichever thread runs then writes its stack down. Refuses a second profile while one
//! is taken, for there is one such timer; and one that is longer than a minute. Stacks are walked with
//! unwind tables that glibc 2.35 and newer find without a lock; in the code that walks them, and in the
//! kernel's own pages, none is taken.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use hyper::Response;
use hyper::header::{CONTENT_DISPOSITION, CONTENT_TYPE, HeaderValue};
use mica_shards::rt::{self, time};
use pprof::protos::Message;
use pprof::{ProfilerGuard, ProfilerGuardBuilder};

use crate::body::Body;
use crate::error::ApiError;
use crate::percent;

/// Samples for each second of processor time. Not a round number, so that it does not beat with timers.
const SAMPLES_PER_SECOND: i32 = 99;

/// How long a profile takes unless told, and at most.
const SECONDS_DEFAULT: u64 = 10;
const SECONDS_MAX: u64 = 60;

/// Code in which no sample is taken.
const NOT_IN: [&str; 3] = ["libgcc", "ld-linux", "vdso"];

/// What the client gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// pprof's protobuf, compressed, as `go tool pprof` reads it.
    Pprof,
    /// A picture.
    Flamegraph,
}

/// Takes a profile and answers with it.
///
/// # Errors
/// 400 for seconds out of bounds, 409 while another one is taken.
pub async fn answer(form: Form, query: &str) -> Result<Response<Body>, ApiError> {
    let length = seconds(query)?;
    let turn = Turn::take().ok_or_else(ApiError::already_profiling)?;
    // Who goes away meanwhile keeps the turn until it has started and ended.
    let guard = match rt::blocking(move || start().map(|guard| (guard, turn))).await {
        Ok(Ok(both)) => Sampling(Some(both)),
        Ok(Err(error)) => return Err(ApiError::no_profile(&error.to_string())),
        Err(error) => return Err(ApiError::no_profile(&error.to_string())),
    };
    time::sleep(length).await;
    let bytes = guard.finish(form).await?;
    let mut response = Response::new(Body::full(bytes));
    let (kind, name) = match form {
        Form::Pprof => ("application/octet-stream", "attachment; filename=\"profile.pb.gz\""),
        Form::Flamegraph => ("image/svg+xml", "inline"),
    };
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(CONTENT_DISPOSITION, HeaderValue::from_static(name));
    Ok(response)
}

fn start() -> pprof::Result<ProfilerGuard<'static>> {
    ProfilerGuardBuilder::default().frequency(SAMPLES_PER_SECOND).blocklist(&NOT_IN).build()
}

/// Whose turn it is, from the request on: starting reads unwind tables, which takes a moment the first
/// time. Of the whole process, as its timer is.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The right to take a profile. Given back when dropped.
struct Turn;

impl Turn {
    fn take() -> Option<Self> {
        (!TAKEN.swap(true, Ordering::AcqRel)).then_some(Self)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        TAKEN.store(false, Ordering::Release);
    }
}

/// A profile being taken. Whoever drops it ends it, off the shard: that takes a lock and files.
struct Sampling(Option<(ProfilerGuard<'static>, Turn)>);

impl Sampling {
    async fn finish(mut self, form: Form) -> Result<Vec<u8>, ApiError> {
        let Some((guard, turn)) = self.0.take() else { return Ok(Vec::new()) };
        let made = rt::blocking(move || {
            let report = guard.report().build();
            drop(guard);
            drop(turn);
            encode(form, &report.map_err(io::Error::other)?)
        });
        let made = made.await.map_err(|error| ApiError::no_profile(&error.to_string()))?;
        made.map_err(|error| ApiError::no_profile(&error.to_string()))
    }
}

impl Drop for Sampling {
    fn drop(&mut self) {
        let Some((guard, turn)) = self.0.take() else { return };
        rt::spawn(async move {
            if let Err(error) = rt::blocking(move || drop((guard, turn))).await {
                tracing::debug!(%error, "a profile was ended on the shard");
            }
        })
        .detach();
    }
}

fn encode(form: Form, report: &pprof::Report) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    match form {
        Form::Pprof => {
            let profile = report.pprof().map_err(io::Error::other)?;
            let mut zipped = GzEncoder::new(&mut bytes, Compression::default());
            zipped.write_all(&profile.encode_to_vec())?;
            zipped.finish()?;
        }
        // Of no samples there is no picture.
        Form::Flamegraph if report.data.is_empty() => bytes.extend_from_slice(EMPTY.as_bytes()),
        Form::Flamegraph => report.flamegraph(&mut bytes).map_err(io::Error::other)?,
    }
    Ok(bytes)
}

const EMPTY: &str = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"400\" height=\"40\">\
                     <text x=\"8\" y=\"24\">no sample: the daemon used no processor</text></svg>\n";

/// How long it is to take.
fn seconds(query: &str) -> Result<Duration, ApiError> {
    let pairs = percent::query_pairs(query)
        .map_err(|error| ApiError::bad_request(format!("the query is not valid: {error}")))?;
    let given = pairs.into_iter().rfind(|(key, _)| key == "seconds");
    let Some((_, text)) = given else { return Ok(Duration::from_secs(SECONDS_DEFAULT)) };
    let seconds = text.parse().ok().filter(|seconds| (1..=SECONDS_MAX).contains(seconds));
    seconds.map(Duration::from_secs).ok_or_else(|| {
        ApiError::bad_request(format!("`seconds` must be 1 to {SECONDS_MAX}, a whole number"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let turn = Turn::take();
        assert!(turn.is_some() && Turn::take().is_none());
        drop(turn);
        assert!(Turn::take().is_some());
    }

    #[test]
    fn a_profile_takes_a_minute_at_most() {
        assert_eq!(seconds("").unwrap(), Duration::from_secs(SECONDS_DEFAULT));
        assert_eq!(seconds("x=y&seconds=60").unwrap(), Duration::from_secs(60));
        for bad in ["seconds=0", "seconds=61", "seconds=-1", "seconds=1.5", "seconds=", "%zz"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
