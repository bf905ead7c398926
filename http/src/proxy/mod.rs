//! Requests to a port inside a sandbox, passed on as they come.
//!
//! Called by [`crate::serve`] for every request that names a sandbox. Every request has its own
//! stream into the guest; neither side's body is ever held beyond one frame. When the client goes,
//! the stream into the guest closes at once, and when that ends, so does the client's response.
//! Refuses to send a request twice that may have had an effect.
//!
//! A sandbox that is frozen for a moment holds its streams open, so requests simply wait. A rollback
//! closes them: what the guest knew of them is undone. A request that met one, without a byte of an
//! answer, is sent once more if it was never sent or may be repeated.

mod headers;
mod repeat;
pub mod target;

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, Response, Uri, Version};
use mica_shards::rt::{self, Task, time};
use mica_shards::{ConnectError, GuestStream, Host, Lifecycle, ShardError};
use mica_units::{GuestPort, SandboxId};

use crate::body::{self, Body};
use crate::config::Limits;
use crate::conn::Adapted;
use crate::error::ApiError;
use crate::percent;
use repeat::{Heard, Listening, Upload};

/// Header fields of an answer from a sandbox.
const RESPONSE_FIELDS_MAX: usize = 200;
/// Bytes of the head of such an answer, and of what is read ahead of its body.
const RESPONSE_BUFFER_BYTES_MAX: usize = 128 * 1024;

/// A stream that broke within this time was not silent: somebody closed it.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Routes of envd between E2B's own host and its agent.
const INTERNAL_ROUTES: [&str; 7] =
    ["init", "freeze", "unfreeze", "fsfreeze", "fsthaw", "collapse", "upgrade"];

/// Passes one request on.
///
/// # Errors
/// What to answer when the sandbox gives no answer of its own.
pub async fn forward(
    host: &Host,
    limits: &Limits,
    id: SandboxId,
    port: GuestPort,
    request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    let stream = match enter(host, limits, id, port, request.uri().path()).await {
        Ok(stream) => stream,
        Err(error) => {
            let (parts, unread) = request.into_parts();
            body::discard(&parts.headers, unread).await;
            return Err(error);
        }
    };
    let request = for_sandbox(request, id, port).map(Upload::Client);
    let repeat = repeat::prepare(&request).map(Box::new);
    let failure = match exchange(stream, request).await {
        Ok(response) => return Ok(response),
        Err(failure) => failure,
    };
    tracing::debug!(%id, %port, error = %failure.error, "no answer from the sandbox");
    let unheard = repeat.filter(|_| !failure.heard);
    if let Some(request) = failure.unsent.or(unheard)
        && let Ok(stream) = connect(host, limits, id, port).await
        && let Ok(response) = exchange(stream, *request).await
    {
        return Ok(response);
    }
    // The second failure says no more than the first.
    Err(absence(host, id).await.unwrap_or_else(|| ApiError::hung_up(id, port)))
}

/// A stream to the port, if this path may go there.
async fn enter(
    host: &Host,
    limits: &Limits,
    id: SandboxId,
    port: GuestPort,
    path: &str,
) -> Result<GuestStream, ApiError> {
    if port == GuestPort::ENVD && is_internal(path) {
        return Err(ApiError::internal_route(id.as_str()));
    }
    connect(host, limits, id, port).await
}

/// A stream to the port. One that breaks at once, before anything was sent on it, met a rollback or a
/// guest in trouble; it is opened once more.
async fn connect(
    host: &Host,
    limits: &Limits,
    id: SandboxId,
    port: GuestPort,
) -> Result<GuestStream, ApiError> {
    let mut broken = false;
    loop {
        let began = time::Instant::now();
        let connected = time::timeout(limits.connect_timeout, host.connect(id, port)).await;
        let error = match connected.unwrap_or(Err(ConnectError::Unreachable)) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let absence = match error {
            ConnectError::Unreachable | ConnectError::IsPaused(_) => absence(host, id).await,
            _ => None,
        };
        return Err(match (absence, error) {
            (Some(absence), _) => absence,
            // Neither paused nor running for all the time that the host waited.
            (None, ConnectError::IsPaused(_)) => ApiError::transitioning(id),
            (None, ConnectError::Unreachable) if !broken && began.elapsed() < AT_ONCE => {
                broken = true;
                continue;
            }
            (None, error) => ApiError::from_connect(&error, id, port),
        });
    }
}

/// The answer for a sandbox that has ended or is paused. One that is killed or paused under a
/// request looks like one that hung up or does not answer, and SDKs have to be told which it was.
async fn absence(host: &Host, id: SandboxId) -> Option<ApiError> {
    let absent = match host.get(id).await {
        Ok(info) => info.state == Lifecycle::Paused,
        Err(error) => matches!(error, ShardError::NoSuchSandbox(_)),
    };
    absent.then(|| ApiError::sandbox_not_found(id.as_str()))
}

/// Why there was no answer.
struct Failure {
    error: hyper::Error,
    /// Whether the sandbox said anything.
    heard: bool,
    /// The request, if no byte of it was sent.
    unsent: Option<Box<Request<Upload>>>,
}

impl Failure {
    fn new(error: hyper::Error, heard: &Heard) -> Self {
        Self { error, heard: heard.get(), unsent: None }
    }
}

/// Sends the request and waits for the head of the answer.
async fn exchange(
    stream: GuestStream,
    request: Request<Upload>,
) -> Result<Response<Body>, Failure> {
    let heard = Heard::default();
    let (mut sender, connection) = http1::Builder::new()
        .max_headers(RESPONSE_FIELDS_MAX)
        .max_buf_size(RESPONSE_BUFFER_BYTES_MAX)
        .handshake(Adapted(Listening::new(stream, Rc::clone(&heard))))
        .await
        .map_err(|error| Failure::new(error, &heard))?;
    let upstream = Upstream(rt::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "stream into a sandbox ended");
        }
    }));
    let mut response = sender.try_send_request(request).await.map_err(|mut error| {
        let unsent = error.take_message().map(Box::new);
        Failure { unsent, ..Failure::new(error.into_error(), &heard) }
    })?;
    headers::clean_response(response.headers_mut());
    *response.version_mut() = Version::HTTP_11;
    Ok(response.map(|body| Body::sandbox(FromSandbox { body, _upstream: upstream })))
}

/// The task that drives a stream into a guest. Dropping this drops the stream.
#[derive(Debug)]
struct Upstream(Task<()>);

impl Drop for Upstream {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// The body of a sandbox's answer.
#[derive(Debug)]
pub struct FromSandbox {
    body: Incoming,
    _upstream: Upstream,
}

impl HttpBody for FromSandbox {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The request as the sandbox's server should see it.
fn for_sandbox(request: Request<Incoming>, id: SandboxId, port: GuestPort) -> Request<Incoming> {
    let (mut parts, body) = request.into_parts();
    headers::clean_request(&mut parts.headers);
    // An HTTP/1.0 client may send no host; an HTTP/1.1 server demands one.
    if !parts.headers.contains_key(HOST)
        && let Ok(host) = format!("{port}-{id}").try_into()
    {
        parts.headers.insert(HOST, host);
    }
    // A target in absolute form is for proxies; the server behind gets the path.
    if let Some(path) = parts.uri.path_and_query().cloned() {
        parts.uri = Uri::from(path);
    }
    parts.version = Version::HTTP_11;
    Request::from_parts(parts, body)
}

/// Whether a path means a route of envd that clients may not use, however it is written.
fn is_internal(path: &str) -> bool {
    let Ok(path) = percent::decode_segment(path) else {
        // Not decodable here, so no server should take it for one of ours; but do not bet on it.
        return true;
    };
    let mut segments: Vec<&str> = Vec::new();
    for segment in path.split(['/', '\\']) {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            other => segments.push(other),
        }
    }
    matches!(segments.as_slice(), [only] if INTERNAL_ROUTES.contains(&only.to_ascii_lowercase().as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn internal_routes_are_seen_through_any_spelling() {
        for path in
            ["/init", "/init/", "//init", "/x/../init", "/%69nit", "/./freeze", "/UPGRADE", "/%zz"]
        {
            assert!(is_internal(path), "{path}");
        }
        for path in ["/", "/health", "/files", "/initial", "/init/x", "/process.Process/Start"] {
            assert!(!is_internal(path), "{path}");
        }
    }
}
