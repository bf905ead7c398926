//! The bodies that clients send: checked, and turned into what the host understands.
//!
//! Called by [`super`]. Refuses wrong types, a life time out of bounds, a template name that
//! cannot be one, and the wishes this version cannot keep where keeping quiet would cost the
//! client its data.

use std::time::Duration;

use mica_shards::CreateRequest;
use mica_units::IdError;
use mica_wire::api::{ConnectSandbox, NewSandbox, SetTimeout};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::config::Limits;
use crate::error::ApiError;
use crate::route::Version;

const TIMEOUT_SECONDS_V1: i64 = 15;
const TIMEOUT_SECONDS_V2: i64 = 300;
/// Longest template id or name, so that an error message can repeat it.
const TEMPLATE_CHARS_MAX: usize = 128;

/// What clients may wish for and this version cannot do.
#[derive(Deserialize)]
struct Unsupported {
    #[serde(rename = "autoPause")]
    auto_pause: Option<bool>,
    #[serde(rename = "volumeMounts")]
    volume_mounts: Option<Vec<serde_json::Value>>,
}

/// Reads the body of a create.
///
/// # Errors
/// 400, naming the field and what to write in it.
pub fn create_request(
    version: Version,
    body: &[u8],
    limits: &Limits,
) -> Result<CreateRequest, ApiError> {
    let wanted: NewSandbox = json(body)?;
    refuse_unsupported(&json(body)?)?;
    let default = match version {
        Version::V1 => TIMEOUT_SECONDS_V1,
        Version::V2 => TIMEOUT_SECONDS_V2,
    };
    let seconds = wanted.timeout.unwrap_or(default);
    if seconds < 1 {
        let message = format!("`timeout` is {seconds}; it must be at least 1 second");
        return Err(ApiError::bad_request(message));
    }
    Ok(CreateRequest {
        template: template(&wanted.template_id)?,
        timeout: life(seconds, limits)?,
        secure: wanted.secure.unwrap_or(true),
        metadata: wanted.metadata.unwrap_or_default(),
        env_vars: env_vars(wanted.env_vars.unwrap_or_default())?,
    })
}

/// Reads the body of a set-timeout. 0 is a valid life: the sandbox ends at once.
///
/// # Errors
/// 400, naming what to write instead.
pub fn timeout(body: &[u8], limits: &Limits) -> Result<Duration, ApiError> {
    let SetTimeout { timeout: seconds } = json(body)?;
    remaining(seconds, limits)
}

/// Reads the body of a connect: how long the sandbox is to live at the least.
///
/// # Errors
/// 400, naming what to write instead.
pub fn connect_timeout(
    version: Version,
    body: &[u8],
    limits: &Limits,
) -> Result<Duration, ApiError> {
    let ConnectSandbox { timeout } = match (version, body) {
        (Version::V2, []) => ConnectSandbox::default(),
        _ => json(body)?,
    };
    let seconds = match (version, timeout) {
        (_, Some(seconds)) => seconds,
        (Version::V2, None) => TIMEOUT_SECONDS_V2,
        (Version::V1, None) => {
            let message = "`timeout` is missing; send the seconds that the sandbox is to live on";
            return Err(ApiError::bad_request(message));
        }
    };
    remaining(seconds, limits)
}

fn remaining(seconds: i64, limits: &Limits) -> Result<Duration, ApiError> {
    if seconds < 0 {
        let message = format!("`timeout` is {seconds}; it must be 0 or more seconds from now");
        return Err(ApiError::bad_request(message));
    }
    life(seconds, limits)
}

fn life(seconds: i64, limits: &Limits) -> Result<Duration, ApiError> {
    let max = limits.sandbox_timeout_max;
    match u64::try_from(seconds).map(Duration::from_secs) {
        Ok(life) if life <= max => Ok(life),
        _ => {
            let hours = max.as_secs() / 3600;
            let bound = match hours {
                0 => format!("{} seconds", max.as_secs()),
                hours => format!("{hours} hours"),
            };
            Err(ApiError::bad_request(format!("Timeout cannot be greater than {bound}")))
        }
    }
}

/// Ids and names have one alphabet. A path separator or a dot is in neither, so what passes here
/// can never leave the store's directory.
fn template(text: &str) -> Result<String, ApiError> {
    let in_form = matches!(text.len(), 1..=TEMPLATE_CHARS_MAX)
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    if in_form {
        return Ok(text.to_owned());
    }
    let problem = IdError::TemplateName;
    Err(ApiError::bad_request(format!("`templateID` is no id or name of a template: {problem}")))
}

fn env_vars(
    vars: std::collections::BTreeMap<String, String>,
) -> Result<std::collections::BTreeMap<String, String>, ApiError> {
    let bad = |(name, value): (&String, &String)| {
        name.is_empty() || name.contains(['=', '\0']) || value.contains('\0')
    };
    match vars.iter().find(|(name, value)| bad((name, value))) {
        None => Ok(vars),
        Some((name, _)) => Err(ApiError::bad_request(format!(
            "`envVars` has {:?}: a name is not empty and has no `=`, and neither name nor value \
             has a zero byte",
            name.chars().take(50).collect::<String>()
        ))),
    }
}

fn refuse_unsupported(wanted: &Unsupported) -> Result<(), ApiError> {
    let what = if wanted.auto_pause == Some(true) {
        "`autoPause` is not supported by this version: the sandbox would be killed, not paused; \
         leave it out"
    } else if wanted.volume_mounts.as_ref().is_some_and(|mounts| !mounts.is_empty()) {
        "`volumeMounts` is not supported by this version; leave it out"
    } else {
        return Ok(());
    };
    Err(ApiError::bad_request(what))
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| {
        ApiError::bad_request(format!("the request body is not the JSON expected here: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(body: &str) -> Result<CreateRequest, ApiError> {
        create_request(Version::V2, body.as_bytes(), &Limits::default())
    }

    #[test]
    fn the_captured_create_of_the_sdk_without_what_is_not_supported() {
        let request = create(
            r#"{"templateID":"code-interpreter-v1","timeout":60,"autoPause":false,
                "network":{"allowOut":["1.1.1.1"]},"metadata":{"a":"b c"},"envVars":{"X":"1"},
                "mcp":null,"allow_internet_access":true,"unknown":[1]}"#,
        )
        .unwrap();
        assert_eq!(request.template, "code-interpreter-v1");
        assert_eq!(request.timeout, Duration::from_secs(60));
        assert!(request.secure);
        assert_eq!(request.metadata["a"], "b c");
        assert_eq!(request.env_vars["X"], "1");
    }

    #[test]
    fn defaults_differ_by_version() {
        let body = br#"{"templateID":"base"}"#;
        let life = |version| create_request(version, body, &Limits::default()).unwrap().timeout;
        assert_eq!(life(Version::V1), Duration::from_secs(15));
        assert_eq!(life(Version::V2), Duration::from_secs(300));
    }

    #[test]
    fn every_bad_create_is_a_400() {
        for bad in [
            "",
            "{",
            "[]",
            "null",
            r#"{"timeout":60}"#,
            r#"{"templateID":7}"#,
            r#"{"templateID":""}"#,
            r#"{"templateID":"base/.."}"#,
            r#"{"templateID":"../../etc"}"#,
            r#"{"templateID":"base","timeout":0}"#,
            r#"{"templateID":"base","timeout":-1}"#,
            r#"{"templateID":"base","timeout":1.5}"#,
            r#"{"templateID":"base","timeout":"60"}"#,
            r#"{"templateID":"base","timeout":86401}"#,
            r#"{"templateID":"base","timeout":99999999999999999999}"#,
            r#"{"templateID":"base","metadata":{"a":1}}"#,
            r#"{"templateID":"base","envVars":{"A=B":"c"}}"#,
            r#"{"templateID":"base","envVars":{"A":"\u0000"}}"#,
            r#"{"templateID":"base","autoPause":true}"#,
            r#"{"templateID":"base","volumeMounts":[{"name":"v","path":"/v"}]}"#,
            r#"{"templateID":"base"} trailing"#,
        ] {
            let status = create(bad).map_err(|error| error.status().as_u16());
            assert_eq!(status.err(), Some(400), "{bad}");
        }
        let deep = format!(r#"{{"templateID":"base","x":{}}}"#, "[".repeat(10_000));
        assert!(create(&deep).is_err(), "nesting is bounded");
    }

    #[test]
    fn timeouts() {
        let read = |body: &str| timeout(body.as_bytes(), &Limits::default());
        assert_eq!(read(r#"{"timeout":0}"#), Ok(Duration::ZERO));
        assert_eq!(read(r#"{"timeout":86400}"#), Ok(Duration::from_secs(86_400)));
        for bad in [r#"{"timeout":-1}"#, r#"{"timeout":86401}"#, r#"{"timeout":null}"#, "{}", ""] {
            assert_eq!(read(bad).map_err(|e| e.status().as_u16()), Err(400), "{bad}");
        }
    }

    #[test]
    fn a_connect_needs_its_timeout_on_v1_alone() {
        let read = |version, body: &str| {
            connect_timeout(version, body.as_bytes(), &Limits::default())
                .map(|life| life.as_secs())
                .map_err(|e| e.status().as_u16())
        };
        for version in [Version::V1, Version::V2] {
            assert_eq!(read(version, r#"{"timeout":7,"memory":true}"#), Ok(7));
            for bad in [r#"{"timeout":-1}"#, r#"{"timeout":86401}"#, r#"{"timeout":"7"}"#, "{"] {
                assert_eq!(read(version, bad), Err(400), "{bad}");
            }
        }
        for absent in ["", "{}"] {
            assert_eq!(read(Version::V1, absent), Err(400));
            assert_eq!(read(Version::V2, absent), Ok(300));
        }
    }
}
