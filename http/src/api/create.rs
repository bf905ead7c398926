//! The body of a create: checked, and turned into what the host understands.
//!
//! Called by [`super`]. Refuses wrong types, a life time out of bounds, a template name that
//! cannot be one, and the wishes this version cannot keep where keeping quiet would cost the
//! client its data.

use std::collections::BTreeMap;

use mica_shards::{CreateRequest, OnTimeout, Reference};
use mica_units::{IdError, TenantId};
use mica_wire::api::{NewSandbox, OnTimeoutWish};
use serde::Deserialize;

use super::spelling::{CubeFields, Spelling};
use super::{json, life, network};
use crate::config::Limits;
use crate::error::ApiError;
use crate::route::Version;
use crate::snapshot_name::SnapshotName;

/// Longest template id or name, so that an error message can repeat it. A tenant's, a template's and a tag
/// fit in.
const TEMPLATE_CHARS_MAX: usize = 192;

/// What clients may wish for and this host does not have. To make the sandbox without it would be to
/// break a promise that the client sees only later.
#[derive(Deserialize)]
struct Unsupported {
    #[serde(rename = "volumeMounts")]
    volume_mounts: Option<Vec<serde_json::Value>>,
    mcp: Option<serde_json::Value>,
    iam: Option<serde_json::Value>,
}

/// The label by which CubeSandbox's clients ask for directories of the host.
const HOST_MOUNT: &str = "host-mount";

/// Reads the body of a create.
///
/// # Errors
/// 400, naming the field and what to write in it; 501 for what this host does not have.
pub fn create_request(
    version: Version,
    spelling: Spelling,
    body: &[u8],
    limits: &Limits,
) -> Result<CreateRequest, ApiError> {
    let wanted: NewSandbox = json::read(body)?;
    refuse_unsupported(&json::read(body)?, wanted.metadata.as_ref())?;
    let template = template(&wanted.template_id)?;
    let spelling = spelling.with(&json::read::<CubeFields>(body)?);
    let life = life::of_create(wanted.timeout, spelling, limits)?;
    let (on_timeout, auto_resume) = at_its_end(&wanted)?;
    Ok(CreateRequest {
        // Clients of the first version that do not ask for a token do not send one to every service.
        secure: wanted.secure.unwrap_or(version == Version::V2),
        idle: life.idle,
        on_timeout,
        auto_resume,
        network: network::of_create(wanted.network, wanted.allow_internet_access)?,
        metadata: wanted.metadata.unwrap_or_default(),
        env_vars: env_vars(wanted.env_vars.unwrap_or_default())?,
        ..CreateRequest::new(&template, life.timeout)
    })
}

/// What is to happen when the time is over, and whether a request wakes it then. `lifecycle` wins over
/// the flat fields.
fn at_its_end(wanted: &NewSandbox) -> Result<(OnTimeout, bool), ApiError> {
    let lifecycle = wanted.lifecycle.unwrap_or_default();
    let pause = match lifecycle.on_timeout {
        Some(wish) => wish == OnTimeoutWish::Pause,
        None => wanted.auto_pause.unwrap_or(false),
    };
    let wakes = lifecycle.auto_resume.or(wanted.auto_resume).is_some_and(|wish| wish.is_on());
    let keeps_memory = wanted.auto_pause_memory.unwrap_or(true);
    let on_timeout = match (pause, keeps_memory) {
        (true, false) if wakes => {
            let message = "`autoPauseMemory` is false: a sandbox that is paused without its memory \
                           boots when a client connects to it, and no request wakes it; leave out \
                           `autoPauseMemory` or `autoResume`";
            return Err(ApiError::bad_request(message));
        }
        (false, false) => {
            let message = "`autoPauseMemory` says nothing without `autoPause`; leave it out";
            return Err(ApiError::bad_request(message));
        }
        (true, true) => OnTimeout::Pause,
        (true, false) => OnTimeout::PauseToDisk,
        (false, true) => OnTimeout::Kill,
    };
    // It may also be paused by hand.
    Ok((on_timeout, wakes))
}

/// Ids and names have one alphabet. What has a namespace or a tag is a name of [`crate::builds`], and what has
/// other characters may be a snapshot's label; both are compared with what is there, and are never a path.
fn template(text: &str) -> Result<String, ApiError> {
    let is_label = || SnapshotName::parse(text, &TenantId::default()).is_some();
    if text.len() <= TEMPLATE_CHARS_MAX && (Reference::parse(text).is_some() || is_label()) {
        return Ok(text.to_owned());
    }
    let problem = IdError::TemplateName;
    Err(ApiError::bad_request(format!("`templateID` is no id or name of a template: {problem}")))
}

fn env_vars(vars: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, ApiError> {
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

fn refuse_unsupported(
    wanted: &Unsupported,
    metadata: Option<&BTreeMap<String, String>>,
) -> Result<(), ApiError> {
    let what = if wanted.mcp.is_some() {
        "MCP; leave out `mcp`, and start the server in the sandbox yourself"
    } else if wanted.volume_mounts.as_ref().is_some_and(|mounts| !mounts.is_empty()) {
        "volumes; leave out `volumeMounts`, and write the files into the sandbox or its template"
    } else if wanted.iam.is_some() {
        "identity tokens; leave out `iam`, and give the sandbox its credentials in `envVars`"
    } else if metadata.is_some_and(|metadata| metadata.contains_key(HOST_MOUNT)) {
        "directories of its own in sandboxes; leave `host-mount` out of `metadata`, and write the \
         files into the sandbox or its template"
    } else {
        return Ok(());
    };
    Err(ApiError::not_offered(what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn create(body: &str) -> Result<CreateRequest, ApiError> {
        create_request(Version::V2, Spelling::Either, body.as_bytes(), &Limits::default())
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
    fn versions_differ_in_who_needs_a_token_and_not_in_the_life() {
        let body = br#"{"templateID":"base"}"#;
        let create =
            |version| create_request(version, Spelling::E2b, body, &Limits::default()).unwrap();
        for (version, secure) in [(Version::V1, false), (Version::V2, true)] {
            let request = create(version);
            assert_eq!((request.timeout, request.secure), (Duration::from_secs(300), secure));
        }
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
            r#"{"templateID":"base","timeout":-2}"#,
            r#"{"templateID":"base","timeout":1.5}"#,
            r#"{"templateID":"base","timeout":"60"}"#,
            r#"{"templateID":"base","timeout":86401}"#,
            r#"{"templateID":"base","timeout":99999999999999999999}"#,
            r#"{"templateID":"base","metadata":{"a":1}}"#,
            r#"{"templateID":"base","envVars":{"A=B":"c"}}"#,
            r#"{"templateID":"base","envVars":{"A":"\u0000"}}"#,
            r#"{"templateID":"base","autoPause":1}"#,
            r#"{"templateID":"base","autoPause":true,"autoPauseMemory":0}"#,
            r#"{"templateID":"base","autoPause":true,"autoPauseMemory":false,"autoResume":true}"#,
            r#"{"templateID":"base","autoPauseMemory":false}"#,
            r#"{"templateID":"base","network":{"allowOut":["example.org"]}}"#,
            r#"{"templateID":"base","lifecycle":"pause"}"#,
            r#"{"templateID":"base","volumeMounts":7}"#,
            r#"{"templateID":"base","envs":{"A=B":"c"}}"#,
            r#"{"templateID":"base","envVars":{"A":"b"},"envs":{"A":"c"}}"#,
            r#"{"templateID":"base"} trailing"#,
        ] {
            let status = create(bad).map_err(|error| error.status().as_u16());
            assert_eq!(status.err(), Some(400), "{bad}");
        }
        let deep = format!(r#"{{"templateID":"base","x":{}}}"#, "[".repeat(10_000));
        assert!(create(&deep).is_err(), "nesting is bounded");
    }

    #[test]
    fn what_this_host_does_not_have_is_a_501_that_says_what_to_leave_out() {
        for (wish, named) in [
            (r#""mcp":{}"#, "does not offer MCP; leave out `mcp`"),
            (r#""mcp":{"exa":{"apiKey":"x"}}"#, "`mcp`"),
            (r#""volumeMounts":[{"name":"v","path":"/v"}]"#, "`volumeMounts`"),
            (r#""iam":{"tokens":{"aws":{"audience":"a","tokenType":"b"}}}"#, "`iam`"),
            (r#""metadata":{"host-mount":"[]"}"#, "`host-mount`"),
        ] {
            let refused = create(&format!(r#"{{"templateID":"base",{wish}}}"#)).unwrap_err();
            assert_eq!(refused.status().as_u16(), 501, "{wish}");
            assert!(refused.message().contains(named), "{}", refused.message());
        }
        for nothing in [r#""mcp":null"#, r#""volumeMounts":[]"#, r#""iam":null"#] {
            let asked = create(&format!(r#"{{"templateID":"base",{nothing}}}"#));
            assert!(asked.is_ok(), "{nothing}: {asked:?}");
        }
    }

    #[test]
    fn variables_under_either_name() {
        for name in ["envVars", "envs"] {
            let request = create(&format!(r#"{{"templateID":"base","{name}":{{"X":"1"}}}}"#));
            assert_eq!(request.unwrap().env_vars["X"], "1", "{name}");
        }
    }

    #[test]
    fn the_end_of_its_time_in_every_form() {
        for (wish, expected) in [
            ("", OnTimeout::Kill),
            (r#","autoPause":false"#, OnTimeout::Kill),
            (r#","autoPause":null"#, OnTimeout::Kill),
            (r#","autoPause":true"#, OnTimeout::Pause),
            (r#","auto_pause":true"#, OnTimeout::Pause),
            (r#","autoPause":true,"autoPauseMemory":true"#, OnTimeout::Pause),
            (r#","autoPause":true,"autoPauseMemory":false"#, OnTimeout::PauseToDisk),
            (
                r#","autoPause":true,"autoPauseMemory":false,"autoResume":{"enabled":false}"#,
                OnTimeout::PauseToDisk,
            ),
            (
                r#","autoPauseMemory":false,"lifecycle":{"on_timeout":"pause"}"#,
                OnTimeout::PauseToDisk,
            ),
            (r#","autoPause":true,"autoResume":{"enabled":false}"#, OnTimeout::Pause),
            (r#","autoResume":{"enabled":true}"#, OnTimeout::Kill),
            (r#","lifecycle":{"onTimeout":"pause"}"#, OnTimeout::Pause),
            (r#","lifecycle":{"on_timeout":"pause","autoResume":false}"#, OnTimeout::Pause),
            (r#","autoPause":true,"lifecycle":{"on_timeout":"kill"}"#, OnTimeout::Kill),
        ] {
            let request = create(&format!(r#"{{"templateID":"base"{wish}}}"#)).unwrap();
            assert_eq!(request.on_timeout, expected, "{wish}");
        }
    }

    #[test]
    fn who_wakes_it_in_every_form() {
        for (wish, wakes) in [
            ("", false),
            (r#","autoPause":true"#, false),
            (r#","autoPause":true,"autoResume":{"enabled":true}"#, true),
            (r#","autoPause":true,"autoResume":true"#, true),
            (r#","autoResume":{"enabled":true}"#, true),
            (r#","autoPause":true,"autoResume":{"enabled":false}"#, false),
            (r#","lifecycle":{"on_timeout":"pause","auto_resume":true}"#, true),
            (r#","lifecycle":{"onTimeout":"pause","autoResume":false},"autoResume":true"#, false),
        ] {
            let request = create(&format!(r#"{{"templateID":"base"{wish}}}"#)).unwrap();
            assert_eq!(request.auto_resume, wakes, "{wish}");
        }
    }
}
