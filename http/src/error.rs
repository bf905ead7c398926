//! Everything that is answered with an error, and the one place that turns the host's errors into
//! HTTP.
//!
//! Called by every handler, by the proxy and by the connection driver. Refuses an error without the
//! JSON body `{"code","message"}`: SDKs branch on `code` in the body as often as on the status.

use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Method, Response, StatusCode};
use mica_shards::{ConnectError, ShardError};
use mica_units::{GuestPort, SandboxId};
use serde::Serialize;

use crate::body::Body;

/// Newer SDKs retry 429, 502, 503 and 504 unless this says `false`.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("should-retry");
/// How much of a guest's console a failed boot may put into its error message.
const CONSOLE_TAIL_CHARS_MAX: usize = 600;

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    about: Option<About>,
    retry: Retry,
    allow: Option<&'static str>,
}

/// What an error of the proxy is about, in the form E2B's SDKs match.
#[derive(Clone, Debug, PartialEq, Eq)]
struct About {
    sandbox_id: String,
    port: Option<GuestPort>,
}

/// What the client is told about trying again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Retry {
    /// Nothing: the client's own rules apply.
    Unsaid,
    /// It would not help, or the request may have had an effect.
    No,
    /// In a second: the request had no effect.
    Soon,
}

#[derive(Serialize)]
struct ErrorJson<'a> {
    #[serde(rename = "sandboxId", skip_serializing_if = "Option::is_none")]
    sandbox_id: Option<&'a str>,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    code: u16,
}

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        // A 5xx is final unless its maker knows better: a retry storm helps nobody.
        let retry = if status.is_server_error() { Retry::No } else { Retry::Unsaid };
        Self { status, message: message.into(), about: None, retry, allow: None }
    }

    /// The request is out of form; `message` says what to change.
    #[must_use]
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// No key, or none of ours.
    #[must_use]
    pub fn unauthorized() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "the API key is missing or not valid; send one of the host's key file as X-API-Key",
        )
    }

    /// Our mistake. The log has the cause.
    #[must_use]
    pub fn internal() -> Self {
        let message = "the host made a mistake; its log says which";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// No such route.
    #[must_use]
    pub fn no_route(path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("this host serves nothing at {path}"))
    }

    /// The route is there, the method is not.
    #[must_use]
    pub fn method_not_allowed(method: &Method, allow: &'static str) -> Self {
        let message = format!("{method} is not served here; use {allow}");
        Self { allow: Some(allow), ..Self::new(StatusCode::METHOD_NOT_ALLOWED, message) }
    }

    /// The id cannot be one of a sandbox.
    #[must_use]
    pub fn invalid_sandbox_id() -> Self {
        Self::bad_request("Invalid sandbox ID: it is made of 0-9 and a-z alone")
    }

    /// The id may be one of a sandbox, but there is none.
    #[must_use]
    pub fn no_such_sandbox(id: &str) -> Self {
        let message = format!("Sandbox \"{id}\" doesn't exist or you don't have access to it");
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// A control-plane body is longer than it may be.
    #[must_use]
    pub fn body_too_large(bytes_max: usize) -> Self {
        let message = format!("the request body is longer than {bytes_max} bytes; send less");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    }

    /// A control-plane body did not arrive in time.
    #[must_use]
    pub fn body_too_slow() -> Self {
        let message = "the request body did not arrive in time; send it at once";
        Self::new(StatusCode::REQUEST_TIMEOUT, message)
    }

    /// A request head did not arrive in time.
    #[must_use]
    pub fn head_too_slow() -> Self {
        let message = "the request head did not arrive in time; send it at once";
        Self::new(StatusCode::REQUEST_TIMEOUT, message)
    }

    /// A request head is longer than it may be.
    #[must_use]
    pub fn head_too_large() -> Self {
        let message = "the request has too many or too long headers; send fewer";
        Self::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, message)
    }

    /// A request line is longer than it may be.
    #[must_use]
    pub fn uri_too_long() -> Self {
        Self::new(StatusCode::URI_TOO_LONG, "the request target is too long; shorten it")
    }

    /// The bytes are not a request.
    #[must_use]
    pub fn not_http() -> Self {
        Self::bad_request("this is not a valid HTTP/1.1 request; correct its head")
    }

    /// The shard has as many connections as it may.
    #[must_use]
    pub fn too_many_connections() -> Self {
        let message = "this host has as many connections as it may; try again in a moment";
        Self { retry: Retry::Soon, ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    /// A route of envd that only the host itself may use.
    #[must_use]
    pub fn internal_route(id: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "this route of envd is not open to clients").about(id)
    }

    /// The proxy's answer for a sandbox that does not run. SDKs look for `was not found` in a 502.
    #[must_use]
    pub fn sandbox_not_found(id: &str) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "The sandbox was not found").about(id)
    }

    /// The sandbox hung up before it answered. The request may have had an effect.
    #[must_use]
    pub fn hung_up(id: SandboxId, port: GuestPort) -> Self {
        let message = "The sandbox closed the connection before it answered";
        Self::new(StatusCode::BAD_GATEWAY, message).about(id.as_str()).port(port)
    }

    fn about(self, sandbox_id: &str) -> Self {
        let about = About { sandbox_id: sandbox_id.to_owned(), port: None };
        Self { about: Some(about), ..self }
    }

    fn port(mut self, port: GuestPort) -> Self {
        if let Some(about) = &mut self.about {
            about.port = Some(port);
        }
        self
    }

    /// The status, which is also `code` in the body.
    #[cfg(test)]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    fn json(&self) -> Vec<u8> {
        let body = ErrorJson {
            sandbox_id: self.about.as_ref().map(|about| about.sandbox_id.as_str()),
            message: &self.message,
            port: self.about.as_ref().and_then(|about| about.port).map(GuestPort::get),
            code: self.status.as_u16(),
        };
        serde_json::to_vec(&body).unwrap_or_default()
    }

    /// The response.
    #[must_use]
    pub fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::full(self.json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        let json = HeaderValue::from_static("application/json; charset=utf-8");
        headers.insert(CONTENT_TYPE, json);
        match self.retry {
            Retry::Unsaid => {}
            Retry::No => drop(headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"))),
            Retry::Soon => {
                headers.insert(SHOULD_RETRY, HeaderValue::from_static("true"));
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
        }
        if let Some(allow) = self.allow {
            headers.insert(ALLOW, HeaderValue::from_static(allow));
        }
        if self.status == StatusCode::REQUEST_TIMEOUT {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// The response as bytes, for where hyper writes none. The connection closes after it.
    #[must_use]
    pub fn to_last_message(&self) -> Vec<u8> {
        let body = self.json();
        let mut message = format!(
            "HTTP/1.1 {}\r\ncontent-type: application/json; charset=utf-8\r\n\
             content-length: {}\r\nconnection: close\r\n",
            self.status,
            body.len()
        );
        if self.retry == Retry::Soon {
            message.push_str("should-retry: true\r\nretry-after: 1\r\n");
        }
        message.push_str("\r\n");
        let mut message = message.into_bytes();
        message.extend_from_slice(&body);
        message
    }
}

/// How the host's errors look to an API client.
impl From<ShardError> for ApiError {
    fn from(error: ShardError) -> Self {
        let text = error.to_string();
        let soon =
            |text| Self { retry: Retry::Soon, ..Self::new(StatusCode::SERVICE_UNAVAILABLE, text) };
        match error {
            ShardError::NoSuchSandbox(id) => Self::no_such_sandbox(id.as_str()),
            ShardError::NoSuchTemplate(_) => Self::new(StatusCode::NOT_FOUND, text),
            ShardError::KilledDuringCreate(_) => Self::new(StatusCode::CONFLICT, text),
            ShardError::Busy | ShardError::ShuttingDown => soon(text),
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
            ConnectError::NoSuchSandbox(_) => Self::sandbox_not_found(id.as_str()),
            // SDKs look for `port is not open` in a 502.
            ConnectError::PortNotOpen(_) => {
                let message = "The sandbox is running but port is not open";
                Self::new(StatusCode::BAD_GATEWAY, message).about(id.as_str()).port(port)
            }
            ConnectError::Unreachable => {
                Self::new(StatusCode::BAD_GATEWAY, text).about(id.as_str()).port(port)
            }
            ConnectError::Busy => Self {
                retry: Retry::Soon,
                ..Self::new(StatusCode::SERVICE_UNAVAILABLE, text).about(id.as_str())
            },
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

    #[test]
    fn a_last_message_is_whole() {
        let error = ApiError::head_too_slow();
        let message = String::from_utf8(error.to_last_message()).unwrap();
        let (head, body) = message.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 408 Request Timeout\r\n"), "{head}");
        assert!(head.contains(&format!("content-length: {}", body.len())), "{head}");
        assert_eq!(body, json(&error));
    }
}
