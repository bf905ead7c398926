//! Everything that is answered with an error.
//!
//! Called by every handler, by the proxy and by the connection driver. Refuses an error without the
//! JSON body `{"code","message"}`: SDKs branch on `code` in the body as often as on the status.

mod builds;
mod form;
mod host;
mod page;
mod proxy;

use std::time::Duration;

use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Method, Response, StatusCode};
use mica_shards::ShardError;
use mica_units::{GuestPort, SandboxId};
use mica_wire::api::ErrorBody;
use serde::Serialize;

use crate::body::Body;
pub use page::prefers_page;

/// Newer SDKs retry 429, 502, 503 and 504 unless this says `false`.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("should-retry");

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    about: Option<About>,
    retry: Retry,
    allow: Option<String>,
    /// A word that newer SDKs branch on.
    error_code: Option<&'static str>,
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
    /// In so many seconds: the request had no effect.
    After(u64),
}

#[derive(Serialize)]
struct ErrorJson<'a> {
    #[serde(rename = "sandboxId", skip_serializing_if = "Option::is_none")]
    sandbox_id: Option<&'a str>,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    code: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_code: Option<&'static str>,
}

impl ApiError {
    /// Whether what was asked for is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.status == StatusCode::NOT_FOUND
    }

    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        // A 5xx is final unless its maker knows better: a retry storm helps nobody.
        let retry = if status.is_server_error() { Retry::No } else { Retry::Unsaid };
        let message = message.into();
        Self { status, message, about: None, retry, allow: None, error_code: None }
    }

    /// The request had no effect, and may have one in a second.
    fn soon(status: StatusCode, message: impl Into<String>) -> Self {
        Self { retry: Retry::Soon, ..Self::new(status, message) }
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
            "the API key is missing or not valid; send one that this host made (`mica key create`) \
             as X-API-Key or as a bearer token",
        )
    }

    /// The key has as many sandboxes as it may.
    #[must_use]
    pub fn too_many_sandboxes(live: u32, most: u32) -> Self {
        let message = format!(
            "this API key has {live} sandboxes, running and paused, and may have {most}; end some"
        );
        Self { retry: Retry::After(1), ..Self::new(StatusCode::TOO_MANY_REQUESTS, message) }
    }

    /// The key makes sandboxes faster than it may.
    #[must_use]
    pub fn too_fast(wait: Duration) -> Self {
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        let message =
            "this API key makes sandboxes faster than it may; wait as long as Retry-After says";
        let retry = Retry::After(seconds.max(1));
        Self { retry, ..Self::new(StatusCode::TOO_MANY_REQUESTS, message) }
    }

    /// A profile of the daemon is being taken.
    #[must_use]
    pub fn already_profiling() -> Self {
        let message = "a profile of this daemon is being taken; ask again when it is done";
        Self::soon(StatusCode::CONFLICT, message)
    }

    /// No profile of the daemon can be had.
    #[must_use]
    pub fn no_profile(why: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, format!("there is no profile: {why}"))
    }

    /// The first request with this idempotency key is not answered yet.
    #[must_use]
    pub fn in_progress() -> Self {
        let message =
            "a request with this Idempotency-Key is being carried out; ask again in a moment";
        let error_code = Some("idempotency_in_progress");
        Self { error_code, ..Self::soon(StatusCode::CONFLICT, message) }
    }

    /// The idempotency key was used for something else.
    #[must_use]
    pub fn idempotency_mismatch() -> Self {
        let message = "this Idempotency-Key was used with another request; take a new one";
        let error_code = Some("idempotency_request_mismatch");
        Self { error_code, ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, message) }
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
    pub fn method_not_allowed(method: &Method, allow: &str) -> Self {
        let message = format!("{method} is not served here; use {allow}");
        Self { allow: Some(allow.to_owned()), ..Self::new(StatusCode::METHOD_NOT_ALLOWED, message) }
    }

    /// E2B or CubeSandbox have it, this host has not.
    #[must_use]
    pub fn not_offered(what: &str) -> Self {
        Self::new(StatusCode::NOT_IMPLEMENTED, format!("this host does not offer {what}"))
    }

    /// The id cannot be one of a sandbox.
    #[must_use]
    pub fn invalid_sandbox_id() -> Self {
        Self::bad_request("Invalid sandbox ID: it is made of 0-9 and a-z alone")
    }

    /// Headers name a sandbox under a host name that is not ours.
    #[must_use]
    pub fn foreign_host() -> Self {
        Self::bad_request(
            "Invalid host: E2b-Sandbox-Id and E2b-Sandbox-Port count only under localhost, an address, \
             or a name of this host; use one, or start the host with --domain NAME and use \
             sandbox.NAME",
        )
    }

    /// A file is asked for by a signature that no sandbox made.
    #[must_use]
    pub fn unknown_signature() -> Self {
        Self::bad_request(
            "no sandbox that runs or wakes made this signature; ask under its own host name, \
             49983-ID.DOMAIN, to be told more",
        )
    }

    /// More of something is being done than one shard does at a time.
    #[must_use]
    pub fn busy() -> Self {
        Self::soon(StatusCode::SERVICE_UNAVAILABLE, "this host is busy; try again in a moment")
    }

    /// A paused sandbox has no end that could be moved.
    #[must_use]
    pub fn paused_has_no_time(id: SandboxId) -> Self {
        let text =
            format!("Sandbox \"{id}\" is paused, so it has no time to set; connect or resume it");
        Self::new(StatusCode::NOT_FOUND, text)
    }

    /// The shard has as many streams into sandboxes as it may.
    #[must_use]
    pub fn too_many_streams(id: SandboxId) -> Self {
        let message = "this host has as many streams into sandboxes as it may; close some";
        Self::soon(StatusCode::TOO_MANY_REQUESTS, message).about(id.as_str())
    }

    /// The id may be one of a sandbox, but there is none.
    #[must_use]
    pub fn no_such_sandbox(id: &str) -> Self {
        let message = format!("Sandbox \"{id}\" doesn't exist or you don't have access to it");
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// Neither a template nor a snapshot has that id.
    #[must_use]
    pub fn no_such_template(id: &str) -> Self {
        let message = format!("neither a template nor a snapshot is called \"{id}\"");
        Self::new(StatusCode::NOT_FOUND, message)
    }

    /// No snapshot has that id.
    #[must_use]
    pub fn no_such_snapshot(id: &str) -> Self {
        ShardError::NoSuchSnapshot(id.to_owned()).into()
    }

    /// A client wants to delete what only the operator may.
    #[must_use]
    pub fn template_is_kept(name: &str) -> Self {
        let message = format!(
            "\"{name}\" is a template, not a snapshot; the operator of this host deletes it with \
             `mica template delete {name}`"
        );
        Self::new(StatusCode::FORBIDDEN, message)
    }

    /// A client wants to change what only the operator may.
    #[must_use]
    pub fn template_stays(name: &str) -> Self {
        let message = format!(
            "\"{name}\" is a template of this host's operator: it is public and keeps its name"
        );
        Self::new(StatusCode::FORBIDDEN, message)
    }

    /// The agent of a sandbox has to answer before what is kept, and does not. SDKs take every 409 of a pause for
    /// one that is paused already, and E2B's word for such an agent for a resume that was refused.
    #[must_use]
    pub fn guest_unresponsive(id: SandboxId) -> Self {
        let message = format!(
            "the agent in sandbox '{id}' does not answer, so nothing was kept and it goes on; keep its \
             memory and do not ask for a healthy guest, or end what keeps it busy"
        );
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
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

    /// The proxy's answer for a sandbox that is on its way into or out of a pause, in E2B's words.
    #[must_use]
    pub fn transitioning(id: SandboxId) -> Self {
        let message = "The sandbox is still transitioning. Try again in a moment.";
        Self::soon(StatusCode::CONFLICT, message).about(id.as_str())
    }

    /// The ports of the sandbox are not public, and the client showed no traffic token or another.
    #[must_use]
    pub fn not_admitted(id: SandboxId, showed_one: bool) -> Self {
        let message = if showed_one {
            "Sandbox is secured with traffic access token. Provided token is invalid."
        } else {
            "Sandbox is secured with traffic access token. Token header \
             'e2b-traffic-access-token' is missing"
        };
        Self::new(StatusCode::FORBIDDEN, message).about(id.as_str())
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

    /// What it says.
    #[cfg(test)]
    pub fn message(&self) -> String {
        self.message.clone()
    }

    /// As an entry in a list of outcomes.
    #[must_use]
    pub fn to_body(&self) -> ErrorBody {
        let error_code = self.error_code.map(str::to_owned);
        ErrorBody { code: self.status.as_u16(), message: self.message.clone(), error_code }
    }

    fn json(&self) -> Vec<u8> {
        let body = ErrorJson {
            sandbox_id: self.about.as_ref().map(|about| about.sandbox_id.as_str()),
            message: &self.message,
            port: self.about.as_ref().and_then(|about| about.port).map(GuestPort::get),
            code: self.status.as_u16(),
            error_code: self.error_code,
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
            Retry::Soon | Retry::After(_) => {
                let seconds = if let Retry::After(seconds) = self.retry { seconds } else { 1 };
                headers.insert(SHOULD_RETRY, HeaderValue::from_static("true"));
                headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
            }
        }
        if let Some(allow) = self.allow.and_then(|allow| HeaderValue::try_from(allow).ok()) {
            headers.insert(ALLOW, allow);
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
    fn a_guest_that_does_not_answer_is_busy_and_not_paused() {
        let error = ApiError::guest_unresponsive(id());
        assert!(json(&error).ends_with(r#","code":503}"#), "{error:?}");
        assert_eq!(error.into_response().headers()["should-retry"], "false");
    }

    #[test]
    fn an_outcome_in_a_list_has_all_that_the_answer_would_have() {
        for error in [ApiError::in_progress(), ApiError::busy()] {
            let listed = serde_json::to_value(error.to_body()).unwrap();
            assert_eq!(listed, serde_json::from_str::<serde_json::Value>(&json(&error)).unwrap());
        }
    }

    #[test]
    fn who_is_over_a_quota_is_told_when_to_come_back() {
        for (error, seconds) in [
            (ApiError::too_many_sandboxes(3, 3), "1"),
            (ApiError::too_fast(Duration::ZERO), "1"),
            (ApiError::too_fast(Duration::from_millis(1001)), "2"),
            (ApiError::too_fast(Duration::from_secs(7)), "7"),
        ] {
            let response = error.into_response();
            assert_eq!(response.status(), 429);
            assert_eq!(response.headers()["retry-after"], seconds);
            assert_eq!(response.headers()["should-retry"], "true");
        }
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
