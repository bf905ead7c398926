//! The bodies of requests about one sandbox: checked, and turned into what the host understands.
//!
//! Called by [`super::sandbox`]. Refuses wrong types, numbers out of bounds, and the wishes this
//! version cannot keep: whoever asks to go on from the disk alone must not get the memory as well.

use std::time::Duration;

use mica_shards::{CLONES_MAX, OnTimeout};
use mica_units::TenantId;
use mica_wire::api::{
    ConnectSandbox, CopySandbox, NewSnapshot, PauseSandbox, RefreshSandbox, ResumeSandbox,
    RollbackSandbox, SetTimeout,
};

use super::json;
use super::life::{self, CONNECT_SECONDS};
use crate::config::Limits;
use crate::error::ApiError;
use crate::snapshot_name::SnapshotName;

/// Most sandboxes of one fork, as E2B documents it.
pub const FORKS_MAX: usize = 20;

/// Longest id of a snapshot that an error message repeats.
const SNAPSHOT_ID_CHARS_MAX: usize = 64;

/// What a resume asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resume {
    /// How long from now; `None`: as long as its create asked for.
    pub life: Option<Duration>,
    /// What then; `None`: as before.
    pub on_timeout: Option<OnTimeout>,
}

/// What a clone or a fork asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copies {
    /// How many.
    pub count: usize,
    /// How long they live; `None`: as long as the first one was made for.
    pub timeout: Option<Duration>,
}

/// Reads the body of a set-timeout. 0 is a valid life: the sandbox's time is over at once.
///
/// # Errors
/// 400, naming what to write instead.
pub fn timeout(body: &[u8], limits: &Limits) -> Result<Duration, ApiError> {
    let SetTimeout { timeout: seconds } = json::read(body)?;
    life::remaining(seconds, limits)
}

/// Reads the body of a refresh: how long the sandbox is to live at the least.
///
/// # Errors
/// 400, naming what to write instead.
pub fn refresh(body: &[u8]) -> Result<Duration, ApiError> {
    let RefreshSandbox { duration } = json::read_or_default(body)?;
    life::refreshed(duration)
}

/// Reads the body of a connect: how long the sandbox is to live at the least. 0 is none: a paused
/// sandbox would be resumed only to end.
///
/// # Errors
/// 400, naming what to write instead.
pub fn connect_timeout(body: &[u8], limits: &Limits) -> Result<Duration, ApiError> {
    let ConnectSandbox { timeout, memory } = json::read_or_default(body)?;
    refuse_disk_only(memory)?;
    life::of_new(timeout.unwrap_or(CONNECT_SECONDS), limits)
}

/// Reads the body of a resume.
///
/// # Errors
/// 400, naming what to write instead.
pub fn resume(body: &[u8], limits: &Limits) -> Result<Resume, ApiError> {
    let ResumeSandbox { timeout, auto_pause, memory } = json::read_or_default(body)?;
    refuse_disk_only(memory)?;
    let on_timeout = auto_pause.map(|pause| match pause {
        true => OnTimeout::Pause,
        false => OnTimeout::Kill,
    });
    let life = timeout.map(|seconds| life::of_new(seconds, limits)).transpose()?;
    Ok(Resume { life, on_timeout })
}

/// Reads the body of a pause: whether the guest has to be healthy.
///
/// # Errors
/// 400, naming what to write instead.
pub fn pause(body: &[u8]) -> Result<bool, ApiError> {
    let PauseSandbox { memory, require_healthy_guest } = json::read_or_default(body)?;
    refuse_disk_only(memory)?;
    Ok(require_healthy_guest.unwrap_or(false))
}

/// Reads the body of a snapshot: its name.
///
/// # Errors
/// 400, naming what to write instead.
pub fn snapshot(body: &[u8], tenant: &TenantId) -> Result<Option<String>, ApiError> {
    let NewSnapshot { name, memory } = json::read_or_default(body)?;
    refuse_disk_only(memory)?;
    if name.as_ref().is_some_and(|name| !SnapshotName::may_be(name, tenant)) {
        return Err(ApiError::bad_request(format!(
            "`name` must be 1 to 128 printable ASCII characters; with `/` or `:` in it, the form is \
             `{tenant}/name:tag` or a part of that"
        )));
    }
    Ok(name)
}

/// Reads the body of a rollback: the id of the snapshot.
///
/// # Errors
/// 400, naming what to write instead; 404 for what cannot be the id of a snapshot.
pub fn rollback(body: &[u8]) -> Result<String, ApiError> {
    let RollbackSandbox { snapshot_id } = json::read(body)?;
    if snapshot_id.is_empty() {
        let message = "`snapshotID` is empty; send the id of one of the sandbox's snapshots";
        return Err(ApiError::bad_request(message));
    }
    if !is_store_id(&snapshot_id) {
        return Err(ApiError::no_such_snapshot(&shown(&snapshot_id)));
    }
    Ok(snapshot_id)
}

/// Whether the text may be the id of a snapshot or a template. A path separator or a dot never is
/// in one, so what passes here cannot leave the store's directory.
#[must_use]
pub fn is_store_id(text: &str) -> bool {
    matches!(text.len(), 1..=SNAPSHOT_ID_CHARS_MAX)
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// As much of an id as an error message repeats.
#[must_use]
pub fn shown(id: &str) -> String {
    id.chars().take(SNAPSHOT_ID_CHARS_MAX).collect()
}

/// Reads the body of a clone.
///
/// # Errors
/// 400, naming what to write instead.
pub fn clones(body: &[u8], limits: &Limits) -> Result<Copies, ApiError> {
    copies(body, CLONES_MAX, limits)
}

/// Reads the body of a fork.
///
/// # Errors
/// 400, naming what to write instead.
pub fn forks(body: &[u8], limits: &Limits) -> Result<Copies, ApiError> {
    copies(body, FORKS_MAX, limits)
}

fn copies(body: &[u8], most: usize, limits: &Limits) -> Result<Copies, ApiError> {
    let CopySandbox { count, timeout } = json::read_or_default(body)?;
    let wanted = count.unwrap_or(1);
    let count = usize::try_from(wanted).ok().filter(|count| (1..=most).contains(count));
    let count = count.ok_or_else(|| {
        ApiError::bad_request(format!("`count` is {wanted}; it must be 1 to {most}"))
    })?;
    let timeout = timeout.map(|seconds| life::of_new(seconds, limits)).transpose()?;
    Ok(Copies { count, timeout })
}

fn refuse_disk_only(memory: Option<bool>) -> Result<(), ApiError> {
    if memory == Some(false) {
        let message = "`memory` is false, but this version always keeps the memory; leave it out";
        return Err(ApiError::bad_request(message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status<T>(result: Result<T, ApiError>) -> Result<T, u16> {
        result.map_err(|error| error.status().as_u16())
    }

    fn limits() -> Limits {
        Limits::default()
    }

    #[test]
    fn timeouts() {
        let read = |body: &str| status(timeout(body.as_bytes(), &limits()));
        assert_eq!(read(r#"{"timeout":0}"#), Ok(Duration::ZERO));
        assert_eq!(read(r#"{"timeout":-1}"#), Ok(mica_shards::NEVER));
        assert_eq!(read(r#"{"timeout":86400}"#), Ok(Duration::from_secs(86_400)));
        for bad in
            [r#"{"timeout":-2}"#, r#"{"timeout":86401}"#, r#"{"timeout":null}"#, "{}", "", "[60]"]
        {
            assert_eq!(read(bad), Err(400), "{bad}");
        }
    }

    #[test]
    fn a_connect_is_for_five_minutes_unless_told() {
        let read = |body: &str| {
            status(connect_timeout(body.as_bytes(), &limits()).map(|life| life.as_secs()))
        };
        assert_eq!(read(r#"{"timeout":7,"memory":true}"#), Ok(7));
        assert_eq!(read(r#"{"timeout":-1}"#), Ok(mica_shards::NEVER.as_secs()));
        for absent in ["", "{}"] {
            assert_eq!(read(absent), Ok(300));
        }
        for bad in [
            r#"{"timeout":-2}"#,
            r#"{"timeout":0}"#,
            r#"{"timeout":86401}"#,
            r#"{"timeout":"7"}"#,
            r#"{"timeout":7,"memory":false}"#,
            "{",
        ] {
            assert_eq!(read(bad), Err(400), "{bad}");
        }
    }

    #[test]
    fn a_resume_lives_and_ends_as_wished_before_unless_told() {
        let read = |body: &str| status(resume(body.as_bytes(), &limits()));
        let wish = |seconds: Option<u64>, on_timeout| {
            Ok(Resume { life: seconds.map(Duration::from_secs), on_timeout })
        };
        for absent in ["", "{}", r#"{"memory":true,"autoPause":null}"#] {
            assert_eq!(read(absent), wish(None, None), "{absent}");
        }
        let wished = r#"{"timeout":60,"autoPause":true}"#;
        assert_eq!(read(wished), wish(Some(60), Some(OnTimeout::Pause)));
        assert_eq!(read(r#"{"autoPause":false}"#), wish(None, Some(OnTimeout::Kill)));
        for bad in [
            r#"{"timeout":0}"#,
            r#"{"timeout":86401}"#,
            r#"{"autoPause":1}"#,
            r#"{"memory":false}"#,
        ] {
            assert_eq!(read(bad), Err(400), "{bad}");
        }
    }

    #[test]
    fn pauses() {
        let read = |body: &str| status(pause(body.as_bytes()));
        for plain in ["", "{}", r#"{"memory":true}"#, r#"{"requireHealthyGuest":false}"#] {
            assert_eq!(read(plain), Ok(false), "{plain}");
        }
        assert_eq!(read(r#"{"requireHealthyGuest":true}"#), Ok(true));
        for bad in [r#"{"memory":false}"#, r#"{"memory":"yes"}"#, "[]", "x"] {
            assert_eq!(read(bad), Err(400), "{bad}");
        }
    }

    #[test]
    fn names_of_snapshots() {
        let read = |body: &str| status(snapshot(body.as_bytes(), &"ns".parse().unwrap()));
        assert_eq!(read(""), Ok(None));
        assert_eq!(read(r#"{"name":null}"#), Ok(None));
        for good in ["ns/app:v1", "ns/app", "app:v1", "App", "a b", "it's #1 (really)"] {
            let body = format!(r#"{{"name":"{good}"}}"#);
            assert_eq!(read(&body), Ok(Some(good.to_owned())), "{good}");
        }
        let long = format!(r#"{{"name":"{}"}}"#, "x".repeat(129));
        for bad in [
            r#"{"name":""}"#,
            r#"{"name":7}"#,
            r#"{"name":"a\nb"}"#,
            "{\"name\":\"\u{e9}\"}",
            r#"{"name":"ns/a b:v1"}"#,
            r#"{"name":"other/app"}"#,
            &long,
        ] {
            assert_eq!(read(bad), Err(400), "{bad}");
        }
    }

    #[test]
    fn ids_of_snapshots() {
        let read = |body: &str| status(rollback(body.as_bytes()));
        assert_eq!(read(r#"{"snapshotID":"0a1b"}"#), Ok("0a1b".to_owned()));
        assert_eq!(read(r#"{"snapshotID":"../0a1b"}"#), Err(404));
        for bad in ["", "{}", r#"{"snapshotID":""}"#, r#"{"snapshotID":null}"#] {
            assert_eq!(read(bad), Err(400), "{bad}");
        }
    }

    #[test]
    fn counts_of_copies() {
        let count = |body: &str| status(clones(body.as_bytes(), &limits()).map(|c| c.count));
        assert_eq!(count(""), Ok(1));
        assert_eq!(count(r#"{"count":1000}"#), Ok(1000));
        for bad in [
            r#"{"count":0}"#,
            r#"{"count":-1}"#,
            r#"{"count":1001}"#,
            r#"{"count":1.5}"#,
            r#"{"count":"2"}"#,
            r#"{"count":99999999999999999999}"#,
            r#"{"count":2,"timeout":0}"#,
            r#"{"count":2,"timeout":86401}"#,
        ] {
            assert_eq!(count(bad), Err(400), "{bad}");
        }
        let fork = |body: &str| status(forks(body.as_bytes(), &limits()));
        let timeout = Some(Duration::from_secs(9));
        assert_eq!(fork(r#"{"count":20,"timeout":9}"#), Ok(Copies { count: 20, timeout }));
        assert_eq!(fork(r#"{"count":21}"#), Err(400));
    }
}
