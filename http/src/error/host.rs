//! The one place that turns the host's errors into HTTP.
//!
//! Called through `?` by the handlers and by the proxy. Refuses to show a client what only the
//! operator may see: paths and causes go to the log.

use hyper::StatusCode;
use mica_shards::{ConnectError, ShardError};
use mica_units::{GuestPort, SandboxId};

use super::ApiError;

/// How much of a guest's console a failed boot may put into its error message.
const CONSOLE_TAIL_CHARS_MAX: usize = 600;

impl ApiError {
    /// An earlier daemon was asked with this idempotency key, and what it made is not there any more.
    #[must_use]
    pub fn outcome_unknown() -> Self {
        let message = "the host was started again since this Idempotency-Key was used, and its sandbox is \
                       gone, or was never ready; take a new one";
        let error_code = Some("idempotency_outcome_unknown");
        Self { error_code, ..Self::new(StatusCode::CONFLICT, message) }
    }
}

/// How the host's errors look to an API client.
impl From<ShardError> for ApiError {
    fn from(error: ShardError) -> Self {
        let text = error.to_string();
        match error {
            ShardError::NoSuchSandbox(id) => Self::no_such_sandbox(id.as_str()),
            ShardError::NoSuchTemplate(_) | ShardError::NoSuchSnapshot(_) => {
                Self::new(StatusCode::NOT_FOUND, text)
            }
            // The client has to do something else first, or somebody else has.
            ShardError::KilledDuringCreate(_)
            | ShardError::TemplateNotWarm(_)
            | ShardError::ForeignSnapshot { .. }
            | ShardError::SnapshotOfDisk(_)
            | ShardError::AlreadyPaused(_)
            | ShardError::AlreadyRunning(_)
            | ShardError::IsPaused(_) => Self::new(StatusCode::CONFLICT, text),
            // No 409: to a pause that would say that it is paused already, and to a resume that it runs.
            ShardError::CannotBoot { .. } => {
                Self::bad_request(format!("{text}; leave out `memory: false`"))
            }
            ShardError::Conflict { .. } => Self::soon(StatusCode::CONFLICT, text),
            ShardError::NoSpace => Self::new(StatusCode::INSUFFICIENT_STORAGE, text),
            ShardError::OperationFailed { .. } => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, text)
            }
            ShardError::Busy | ShardError::ShuttingDown => {
                Self::soon(StatusCode::SERVICE_UNAVAILABLE, text)
            }
            // Will not have changed in a second.
            ShardError::AtCapacity { .. } => Self::new(StatusCode::SERVICE_UNAVAILABLE, text),
            ShardError::BootFailed { console_tail, .. } => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, with_console(text, &console_tail))
            }
            ShardError::BootTimedOut { console_tail, .. } => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, with_console(text, &console_tail))
            }
            ShardError::Storage { operation, source } => {
                // The cause may hold paths of the host: it goes to the log, not to the client.
                tracing::error!(operation, error = %source, "the template store failed");
                let text = format!("{text}; the host's log says why");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, text)
            }
        }
    }
}

impl ApiError {
    /// How a stream that did not come to be looks to a client of the sandbox.
    #[must_use]
    pub fn from_connect(error: &ConnectError, id: SandboxId, port: GuestPort) -> Self {
        let text = error.to_string();
        match error {
            // One that is paused is not reachable either, and E2B says the same of both.
            ConnectError::NoSuchSandbox(_) | ConnectError::IsPaused(_) => {
                Self::sandbox_not_found(id.as_str())
            }
            // SDKs look for `port is not open` in a 502.
            ConnectError::PortNotOpen(_) => {
                let message = "The sandbox is running but port is not open";
                Self::new(StatusCode::BAD_GATEWAY, message).about(id.as_str()).port(port)
            }
            ConnectError::NotAdmitted(_) => Self::not_admitted(id, false),
            ConnectError::NotWoken { .. } => {
                Self::soon(StatusCode::SERVICE_UNAVAILABLE, text).about(id.as_str())
            }
            ConnectError::Unreachable => {
                Self::new(StatusCode::BAD_GATEWAY, text).about(id.as_str()).port(port)
            }
            ConnectError::Busy => {
                Self::soon(StatusCode::SERVICE_UNAVAILABLE, text).about(id.as_str())
            }
        }
    }
}

fn with_console(text: String, console_tail: &str) -> String {
    let skipped = console_tail.chars().count().saturating_sub(CONSOLE_TAIL_CHARS_MAX);
    let tail: String = console_tail.chars().skip(skipped).collect();
    if tail.is_empty() { text } else { format!("{text}; its console ended with: {tail}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> SandboxId {
        "i0123456789abcdefghij".parse().unwrap()
    }

    fn json(error: &ApiError) -> String {
        String::from_utf8(error.json()).unwrap()
    }

    #[test]
    fn proxy_bodies_are_the_ones_sdks_match() {
        let port = GuestPort::new(8000).unwrap();
        let gone = ApiError::from_connect(&ConnectError::NoSuchSandbox(id()), id(), port);
        assert_eq!(
            json(&gone),
            r#"{"sandboxId":"i0123456789abcdefghij","message":"The sandbox was not found","code":502}"#
        );
        let closed = ApiError::from_connect(&ConnectError::PortNotOpen(port), id(), port);
        assert_eq!(
            json(&closed),
            r#"{"sandboxId":"i0123456789abcdefghij","message":"The sandbox is running but port is not open","port":8000,"code":502}"#
        );
        for (showed_one, end) in [
            (false, "Token header 'e2b-traffic-access-token' is missing"),
            (true, "Provided token is invalid."),
        ] {
            assert_eq!(
                json(&ApiError::not_admitted(id(), showed_one)),
                format!(
                    r#"{{"sandboxId":"i0123456789abcdefghij","message":"Sandbox is secured with traffic access token. {end}","code":403}}"#
                )
            );
        }
        let paused = ApiError::from_connect(&ConnectError::IsPaused(id()), id(), port);
        assert_eq!(paused, gone);
        let between = ApiError::transitioning(id());
        assert_eq!(
            json(&between),
            r#"{"sandboxId":"i0123456789abcdefghij","message":"The sandbox is still transitioning. Try again in a moment.","code":409}"#
        );
        let asleep = ConnectError::NotWoken { sandbox: id(), reason: "no room".to_owned() };
        let asleep = ApiError::from_connect(&asleep, id(), port);
        assert_eq!(asleep.status, 503);
        assert_eq!(asleep.into_response().headers()["retry-after"], "1");
        for error in [gone, closed] {
            assert_eq!(error.into_response().headers()["should-retry"], "false");
        }
    }

    #[test]
    fn the_text_of_a_missing_sandbox_is_e2bs() {
        let error = ApiError::from(ShardError::NoSuchSandbox(id()));
        assert_eq!(
            json(&error),
            r#"{"message":"Sandbox \"i0123456789abcdefghij\" doesn't exist or you don't have access to it","code":404}"#
        );
    }

    #[test]
    fn conflicts_and_full_disks() {
        let conflict = || ShardError::Conflict { sandbox: id(), doing: "a snapshot is made" };
        let foreign = ShardError::ForeignSnapshot { snapshot: "s".to_owned(), sandbox: id() };
        for (error, status, retry) in [
            (conflict(), 409, Some("true")),
            (ShardError::AlreadyPaused(id()), 409, None),
            (ShardError::AlreadyRunning(id()), 409, None),
            (ShardError::IsPaused(id()), 409, None),
            (foreign, 409, None),
            (ShardError::TemplateNotWarm("base".to_owned()), 409, None),
            (ShardError::NoSuchSnapshot("s".to_owned()), 404, None),
            (ShardError::NoSpace, 507, Some("false")),
        ] {
            let text = error.to_string();
            let error = ApiError::from(error);
            assert_eq!((error.status().as_u16(), error.message()), (status, text.clone()));
            let response = error.into_response();
            let header = |name| response.headers().get(name).and_then(|v| v.to_str().ok());
            assert_eq!(header("should-retry"), retry, "{text}");
            let after = (retry == Some("true")).then_some("1");
            assert_eq!(header("retry-after"), after, "{text}");
        }
        let diskless = ShardError::CannotBoot { sandbox: id(), why: "it has no disk" };
        let diskless = ApiError::from(diskless);
        assert_eq!(diskless.status().as_u16(), 400);
        assert!(diskless.message().ends_with("no disk; leave out `memory: false`"), "{diskless:?}");
        let twice = ApiError::from(ShardError::AlreadyPaused(id()));
        assert_eq!(
            json(&twice),
            r#"{"message":"Error pausing sandbox - sandbox 'i0123456789abcdefghij' is already paused","code":409}"#
        );
        let body = ApiError::from(conflict()).to_body();
        assert_eq!((body.code, body.message), (409, conflict().to_string()));
    }

    #[test]
    fn what_may_be_tried_again_says_so() {
        let busy = ApiError::from(ShardError::Busy).into_response();
        assert_eq!(busy.status(), 503);
        assert_eq!(busy.headers()["should-retry"], "true");
        let failed = ShardError::BootFailed {
            reason: "no kernel".to_owned(),
            console_tail: "x".repeat(5000),
        };
        let failed = ApiError::from(failed);
        assert!(failed.message.len() < 1000, "the console is bounded");
        assert_eq!(failed.into_response().headers()["should-retry"], "false");
    }
}
