//! The bodies of requests about one sandbox: checked, and turned into what the host understands.
//!
//! Called by [`super::sandbox`]. Refuses wrong types and numbers out of bounds.

use std::time::Duration;

use mica_shards::{CLONES_MAX, OnTimeout};
use mica_units::TenantId;
use mica_wire::api::{
    ConnectSandbox, CopySandbox, NewSnapshot, PauseSandbox, RefreshSandbox, ResumeSandbox,
    RollbackSandbox, SetTimeout,
};

use super::json;
use super::life::{self, CONNECT_SECONDS};
use super::spelling::Spelling;
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
    /// Whether it goes on from its memory, where that is kept, and not from its disk alone.
    pub keeps_memory: bool,
}

/// What a connect asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connect {
    /// How long from now, at the least.
    pub life: Duration,
    /// As of [`Resume`].
    pub keeps_memory: bool,
}

/// What a pause asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// Whether the guest has to be healthy.
    pub must_be_healthy: bool,
    /// Whether its memory is kept, and not its disk alone.
    pub keeps_memory: bool,
}

/// What a snapshot asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotWish {
    /// Its name.
    pub name: Option<String>,
    /// Whether it keeps the memory, and not the disk alone.
    pub keeps_memory: bool,
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
pub fn timeout(body: &[u8], spelling: Spelling, limits: &Limits) -> Result<Duration, ApiError> {
    let SetTimeout { timeout: seconds } = json::read(body)?;
    life::remaining(seconds, spelling, limits)
}

/// Reads the body of a refresh: how long the sandbox is to live at the least.
///
/// # Errors
/// 400, naming what to write instead.
pub fn refresh(body: &[u8]) -> Result<Duration, ApiError> {
    let RefreshSandbox { duration } = json::read_or_default(body)?;
    life::refreshed(duration)
}

/// Reads the body of a connect. A life of 0 is none: a paused sandbox would be resumed only to end.
///
/// # Errors
/// 400, naming what to write instead.
pub fn connect(body: &[u8], spelling: Spelling, limits: &Limits) -> Result<Connect, ApiError> {
    let ConnectSandbox { timeout, memory } = json::read_or_default(body)?;
    let life = life::of_new(timeout.unwrap_or(CONNECT_SECONDS), spelling, limits)?;
    Ok(Connect { life, keeps_memory: memory.unwrap_or(true) })
}

/// Reads the body of a resume.
///
/// # Errors
/// 400, naming what to write instead.
pub fn resume(body: &[u8], spelling: Spelling, limits: &Limits) -> Result<Resume, ApiError> {
    let ResumeSandbox { timeout, auto_pause, memory } = json::read_or_default(body)?;
    let on_timeout = auto_pause.map(|pause| match pause {
        true => OnTimeout::Pause,
        false => OnTimeout::Kill,
    });
    let life = timeout.map(|seconds| life::of_new(seconds, spelling, limits)).transpose()?;
    Ok(Resume { life, on_timeout, keeps_memory: memory.unwrap_or(true) })
}

/// Reads the body of a pause.
///
/// # Errors
/// 400, naming what to write instead.
pub fn pause(body: &[u8]) -> Result<Pause, ApiError> {
    let PauseSandbox { memory, require_healthy_guest } = json::read_or_default(body)?;
    let must_be_healthy = require_healthy_guest.unwrap_or(false);
    Ok(Pause { must_be_healthy, keeps_memory: memory.unwrap_or(true) })
}

/// Reads the body of a snapshot.
///
/// # Errors
/// 400, naming what to write instead.
pub fn snapshot(body: &[u8], tenant: &TenantId) -> Result<SnapshotWish, ApiError> {
    let NewSnapshot { name, memory } = json::read_or_default(body)?;
    if name.as_ref().is_some_and(|name| !SnapshotName::may_be(name, tenant)) {
        return Err(ApiError::bad_request(format!(
            "`name` must be 1 to 128 printable ASCII characters; with `/` or `:` in it, the form is \
             `{tenant}/name:tag` or a part of that"
        )));
    }
    Ok(SnapshotWish { name, keeps_memory: memory.unwrap_or(true) })
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
pub fn clones(body: &[u8], spelling: Spelling, limits: &Limits) -> Result<Copies, ApiError> {
    copies(body, CLONES_MAX, spelling, limits)
}

/// Reads the body of a fork.
///
/// # Errors
/// 400, naming what to write instead.
pub fn forks(body: &[u8], spelling: Spelling, limits: &Limits) -> Result<Copies, ApiError> {
    copies(body, FORKS_MAX, spelling, limits)
}

fn copies(
    body: &[u8],
    most: usize,
    spelling: Spelling,
    limits: &Limits,
) -> Result<Copies, ApiError> {
    let CopySandbox { count, timeout } = json::read_or_default(body)?;
    let wanted = count.unwrap_or(1);
    let count = usize::try_from(wanted).ok().filter(|count| (1..=most).contains(count));
    let count = count.ok_or_else(|| {
        ApiError::bad_request(format!("`count` is {wanted}; it must be 1 to {most}"))
    })?;
    let timeout = timeout.map(|seconds| life::of_new(seconds, spelling, limits)).transpose()?;
    Ok(Copies { count, timeout })
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
        let read = |body: &str| status(timeout(body.as_bytes(), Spelling::Either, &limits()));
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
    fn nothing_of_e2bs_is_without_an_end() {
        let (body, spelling, limits) = (br#"{"timeout":-1}"#, Spelling::E2b, &limits());
        assert_eq!(status(timeout(body, spelling, limits)), Ok(Duration::ZERO));
        assert_eq!(status(connect(body, spelling, limits)).err(), Some(400));
        assert_eq!(status(resume(body, spelling, limits)).err(), Some(400));
        assert_eq!(status(forks(body, spelling, limits)).err(), Some(400));
    }

    #[test]
    fn a_connect_is_for_five_minutes_unless_told() {
        let read = |body: &str| {
            let wish = connect(body.as_bytes(), Spelling::Either, &limits());
            status(wish.map(|wish| (wish.life.as_secs(), wish.keeps_memory)))
        };
        assert_eq!(read(r#"{"timeout":7,"memory":true}"#), Ok((7, true)));
        assert_eq!(read(r#"{"timeout":7,"memory":false}"#), Ok((7, false)));
        assert_eq!(read(r#"{"timeout":-1}"#), Ok((mica_shards::NEVER.as_secs(), true)));
        for absent in ["", "{}", r#"{"memory":null}"#] {
            assert_eq!(read(absent), Ok((300, true)));
        }
        for bad in [
            r#"{"timeout":-2}"#,
            r#"{"timeout":0}"#,
            r#"{"timeout":86401}"#,
            r#"{"timeout":"7"}"#,
            r#"{"timeout":7,"memory":0}"#,
            "{",
        ] {
            assert_eq!(read(bad), Err(400), "{bad}");
        }
    }

    #[test]
    fn a_resume_lives_and_ends_as_wished_before_unless_told() {
        let read = |body: &str| status(resume(body.as_bytes(), Spelling::Either, &limits()));
        let wish = |seconds: Option<u64>, on_timeout| {
            let life = seconds.map(Duration::from_secs);
            Ok(Resume { life, on_timeout, keeps_memory: true })
        };
        let of_disk = Resume { life: None, on_timeout: None, keeps_memory: false };
        assert_eq!(read(r#"{"memory":false}"#), Ok(of_disk));
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
            r#"{"memory":"false"}"#,
        ] {
            assert_eq!(read(bad), Err(400), "{bad}");
        }
    }

    #[test]
    fn pauses() {
        let read = |body: &str| status(pause(body.as_bytes()));
        let wish = |must_be_healthy, keeps_memory| Ok(Pause { must_be_healthy, keeps_memory });
        for plain in ["", "{}", r#"{"memory":true}"#, r#"{"requireHealthyGuest":false}"#] {
            assert_eq!(read(plain), wish(false, true), "{plain}");
        }
        assert_eq!(read(r#"{"requireHealthyGuest":true}"#), wish(true, true));
        assert_eq!(read(r#"{"memory":false}"#), wish(false, false));
        for bad in [r#"{"memory":"yes"}"#, "[]", "x"] {
            assert_eq!(read(bad), Err(400), "{bad}");
        }
    }

    #[test]
    fn names_of_snapshots() {
        let wish = |body: &str| status(snapshot(body.as_bytes(), &"ns".parse().unwrap()));
        assert!(wish("").unwrap().keeps_memory && wish(r#"{"memory":true}"#).unwrap().keeps_memory);
        assert!(!wish(r#"{"memory":false}"#).unwrap().keeps_memory);
        let read = |body: &str| wish(body).map(|wish| wish.name);
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
        let count = |body: &str| {
            status(clones(body.as_bytes(), Spelling::Either, &limits()).map(|c| c.count))
        };
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
        let fork = |body: &str| status(forks(body.as_bytes(), Spelling::Either, &limits()));
        let timeout = Some(Duration::from_secs(9));
        assert_eq!(fork(r#"{"count":20,"timeout":9}"#), Ok(Copies { count: 20, timeout }));
        assert_eq!(fork(r#"{"count":21}"#), Err(400));
    }
}
