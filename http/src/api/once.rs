//! `POST /sandboxes`, once for each `Idempotency-Key`.
//!
//! Called by [`super`]. Who repeats a create that was answered gets that answer again, whatever became
//! of the sandbox since; of an earlier daemon's, as long as the sandbox is there. Only what was made is
//! kept: after a failure the same key tries again, for it had no effect. Refuses the same key with another body, and a second request while the first is at work.

use hyper::header::HeaderName;
use hyper::{HeaderMap, Response, StatusCode};
use mica_shards::{Digest, Once, OnceName, ShardError};
use mica_units::SandboxId;
use sha2::{Digest as _, Sha256};

use super::{Call, create, json, show};
use crate::body::Body;
use crate::error::ApiError;
use crate::route::Version;

const HEADER: HeaderName = HeaderName::from_static("idempotency-key");

/// Longest name of a request.
const NAME_CHARS_MAX: usize = 255;

/// Makes a sandbox, or says again that it was made.
///
/// # Errors
/// What to answer instead.
pub async fn create(
    call: &mut Call<'_>,
    version: Version,
    headers: &HeaderMap,
) -> Result<Response<Body>, ApiError> {
    let name = name(headers)?;
    let body = call.read().await?;
    let mut wanted = create::create_request(version, call.spelling, &body, &call.config.limits)?;
    // In the sandbox's record it outlives the daemon.
    wanted.once = name.map(|name| OnceName { name, digest: digest(version, &body) });
    let doing = match wanted.once.clone() {
        None => None,
        Some(asked) => match call.host.once(asked).await? {
            Once::Begun(doing) => Some(doing),
            Once::Done(answer) => return Ok(json::encoded(StatusCode::CREATED, answer.to_vec())),
            Once::Left(Some(id)) => return left(call, id).await,
            Once::Left(None) => return Err(ApiError::outcome_unknown()),
            Once::Running => return Err(ApiError::in_progress()),
            Once::Mismatch => return Err(ApiError::idempotency_mismatch()),
        },
    };
    let made = match call.host.create(wanted).await {
        Ok(made) => json::encode(&show::sandbox(call.config, made))?,
        Err(error) => {
            // Told before it is answered, so that who tries again at once begins again.
            if let Some(doing) = doing {
                doing.failed().await;
            }
            return Err(error);
        }
    };
    if let Some(doing) = doing {
        doing.done(made.clone()).await;
    }
    Ok(json::encoded(StatusCode::CREATED, made))
}

/// Says again what an earlier daemon made, as long as it is there.
async fn left(call: &Call<'_>, id: SandboxId) -> Result<Response<Body>, ApiError> {
    match call.host.get(id).await {
        Ok(made) => json::answer(StatusCode::CREATED, &show::sandbox(call.config, made)),
        Err(ShardError::NoSuchSandbox(_)) => Err(ApiError::outcome_unknown()),
        Err(error) => Err(error.into()),
    }
}

/// What was asked for. The versions differ in their defaults, so they are different requests.
fn digest(version: Version, body: &[u8]) -> Digest {
    let version = match version {
        Version::V1 => [1],
        Version::V2 => [2],
    };
    Sha256::new().chain_update(version).chain_update(body).finalize().into()
}

/// The name of the request, if it has one.
fn name(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut values = headers.get_all(HEADER).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let in_form = |text: &&str| {
        matches!(text.len(), 1..=NAME_CHARS_MAX)
            && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    };
    match value.to_str().ok().filter(in_form) {
        Some(text) if values.next().is_none() => Ok(Some(text.to_owned())),
        _ => Err(ApiError::bad_request(format!(
            "`Idempotency-Key` must be one of 1 to {NAME_CHARS_MAX} characters of a-z, 0-9 and `-`"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    fn read(values: &[&str]) -> Result<Option<String>, u16> {
        let pairs = values.iter().map(|value| (HEADER, HeaderValue::from_str(value).unwrap()));
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, value);
        }
        name(&headers).map_err(|error| error.status().as_u16())
    }

    #[test]
    fn names() {
        assert_eq!(read(&[]), Ok(None));
        let uuid = "0b8e5a2c-6a0f-4a8b-9d4e-3b1c5f7a9e00";
        assert_eq!(read(&[uuid]), Ok(Some(uuid.to_owned())));
        assert!(read(&["a".repeat(255).as_str()]).is_ok());
        for bad in ["", "A", "a b", "a_b", "a.b", &"a".repeat(256), "\u{e9}"] {
            assert_eq!(read(&[bad]), Err(400), "{bad}");
        }
        assert_eq!(read(&["a", "a"]), Err(400));
    }

    #[test]
    fn requests_differ_by_body_and_version() {
        let of = |version, body: &str| digest(version, body.as_bytes());
        assert_eq!(of(Version::V2, "{}"), of(Version::V2, "{}"));
        assert_ne!(of(Version::V2, "{}"), of(Version::V2, "{ }"));
        assert_ne!(of(Version::V1, "{}"), of(Version::V2, "{}"));
    }
}
