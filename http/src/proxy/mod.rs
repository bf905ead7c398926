//! Requests to a port inside a sandbox, passed on as they come.
//!
//! Called by [`crate::serve`] for every request that names a sandbox. Every request has a stream into
//! the guest to itself; neither side's body is ever held beyond one frame. When the client goes,
//! the stream into the guest closes at once, and when that ends, so does the client's response. After
//! a whole answer it may carry the same client's next request. Refuses to send a request twice that may
//! have had an effect.
//!
//! A sandbox that is frozen for a moment holds its streams open, so requests simply wait. A rollback
//! closes them: what the guest knew of them is undone. A request that met one, without a byte of an
//! answer, is sent once more if it was never sent or may be repeated.

pub mod answer;
mod answering;
mod exchange;
mod grpc;
mod headers;
mod kept;
pub mod origin;
mod outgoing;
mod repeat;
pub mod signature;
mod streams;
pub mod target;
pub mod token;
mod upgrade;

use std::rc::Rc;
use std::time::Duration;

use hyper::body::{Body as HttpBody, Incoming};
use hyper::header::{COOKIE, HOST, HeaderValue};
use hyper::{HeaderMap, Request, Response, Uri};
use mica_shards::rt::time;
use mica_shards::{ConnectError, GuestStream, Host, Lifecycle, ShardError, Visitor};
use mica_units::{GuestPort, SandboxId};

use crate::body::{self, Body};
use crate::config::Limits;
use crate::error::ApiError;
use crate::percent;
use answering::Return;
pub use answering::{Answering, Broken, FromSandbox};
use exchange::{Line, exchange};
pub use kept::Kept;
use kept::Shelf;
use repeat::Upload;
use streams::Streams;
pub use upgrade::{Switch, Tunnel};

/// A stream that broke within this time was not silent: somebody closed it.
const AT_ONCE: Duration = Duration::from_secs(1);

/// How many of the streams that a shard may have may wait for a next request at most: one in so many.
const KEPT_PART: usize = 4;

/// Routes of envd between E2B's own host and its agent.
const INTERNAL_ROUTES: [&str; 7] =
    ["init", "freeze", "unfreeze", "fsfreeze", "fsthaw", "collapse", "upgrade"];

/// The proxy of one shard.
#[derive(Debug)]
pub struct Proxy {
    host: Host,
    limits: Limits,
    streams: Streams,
    shelf: Shelf,
}

/// Where a request goes, and who sends it.
#[derive(Debug)]
struct Port<'p> {
    proxy: &'p Proxy,
    id: SandboxId,
    port: GuestPort,
    traffic_token: Option<String>,
    kept: &'p Rc<Kept>,
}

impl Proxy {
    /// A proxy that has no streams.
    #[must_use]
    pub fn new(host: Host, limits: Limits) -> Self {
        let shelf = Shelf::new(limits.streams_max / KEPT_PART, host.shard_count());
        Self { host, limits, streams: Streams::default(), shelf }
    }

    /// Room for the streams that one connection of a client keeps.
    #[must_use]
    pub fn client(&self) -> Rc<Kept> {
        self.shelf.client()
    }

    /// Passes one request on. An answer that leaves HTTP is left at `switch`.
    ///
    /// # Errors
    /// What to answer when the sandbox gives no answer of its own.
    pub async fn forward(
        &self,
        id: SandboxId,
        port: GuestPort,
        mut request: Request<Incoming>,
        switch: Option<&Switch>,
        kept: &Rc<Kept>,
    ) -> Result<Response<Body>, ApiError> {
        let traffic_token = headers::take_traffic_token(request.headers_mut());
        let to = Port { proxy: self, id, port, traffic_token, kept };
        let line = match to.enter(&request).await {
            Ok(line) => line,
            Err(error) => {
                let (parts, unread) = request.into_parts();
                body::discard(&parts.headers, unread).await;
                return Err(error);
            }
        };
        let was_kept = line.stream.is_kept();
        let request = to.address(request, line.stream.masked_host()).map(Upload::Client);
        let repeat = repeat::prepare(&request).map(Box::new);
        let failure = match exchange(line, request, switch).await {
            Ok(response) => return Ok(response),
            Err(failure) => failure,
        };
        tracing::debug!(%id, %port, error = %failure.error, "no answer from the sandbox");
        let unheard = repeat.filter(|_| !failure.heard);
        if let Some(request) = failure.unsent.or(unheard) {
            match to.connect(None).await {
                Ok(line) => {
                    if let Ok(response) = Box::pin(exchange(line, *request, switch)).await {
                        return Ok(response);
                    }
                }
                // What closed a stream that nothing was sent on was no answer to this request.
                Err(error) if was_kept => return Err(error),
                Err(_) => {}
            }
        }
        // The second failure says no more than the first.
        Err(to.absence().await.unwrap_or_else(|| ApiError::hung_up(id, port)))
    }
}

impl Port<'_> {
    /// A stream to the port, if this path may go there.
    async fn enter<B: HttpBody>(&self, request: &Request<B>) -> Result<Line, ApiError> {
        if self.port == GuestPort::ENVD && is_internal(request.uri().path()) {
            return Err(ApiError::internal_route(self.id.as_str()));
        }
        let kept = if self.may_take_kept(request) {
            self.kept.take(self.id, self.port).await
        } else {
            None
        };
        self.connect(kept).await
    }

    /// Whether a request may go where an earlier one went. A server may close a stream that is idle at the
    /// moment at which a request is sent on it; what cannot be sent again goes to servers that are
    /// known to wait for longer than any stream is kept. A gRPC call has HTTP/2 to itself.
    fn may_take_kept<B: HttpBody>(&self, request: &Request<B>) -> bool {
        let waits = matches!(self.port, GuestPort::ENVD | GuestPort::CODE_INTERPRETER);
        (waits || repeat::is_repeatable(request)) && !grpc::is_call(request)
    }

    async fn connect(&self, kept: Option<GuestStream>) -> Result<Line, ApiError> {
        let most = self.proxy.limits.streams_max;
        let open = self.proxy.streams.open(most);
        let open = open.ok_or_else(|| ApiError::too_many_streams(self.id))?;
        let stream = self.open(kept).await?;
        let then = Return { kept: Rc::clone(self.kept), id: self.id, port: self.port };
        Ok(Line { stream, open, then })
    }

    /// A stream to the port. One that breaks at once, before anything was sent on it, met a rollback
    /// or a guest in trouble; it is opened once more.
    async fn open(&self, mut kept: Option<GuestStream>) -> Result<GuestStream, ApiError> {
        let Self { proxy: Proxy { host, limits, .. }, id, port, .. } = *self;
        let mut broken = false;
        loop {
            let began = time::Instant::now();
            let visitor = Visitor::Client(self.traffic_token.clone());
            let visit = host.visit_again(id, port, visitor, kept.take());
            let connected = time::timeout(limits.connect_timeout, visit).await;
            let error = match connected.unwrap_or(Err(ConnectError::Unreachable)) {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            let absence = match error {
                ConnectError::Unreachable | ConnectError::IsPaused(_) => self.absence().await,
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
                (None, ConnectError::NotAdmitted(_)) => {
                    ApiError::not_admitted(id, self.traffic_token.is_some())
                }
                (None, error) => ApiError::from_connect(&error, id, port),
            });
        }
    }

    /// The answer for a sandbox that has ended or is paused. One that is killed or paused under a
    /// request looks like one that hung up or does not answer, and SDKs have to be told which it was.
    async fn absence(&self) -> Option<ApiError> {
        let absent = match self.proxy.host.get(self.id).await {
            Ok(info) => info.state == Lifecycle::Paused,
            Err(error) => matches!(error, ShardError::NoSuchSandbox(_)),
        };
        absent.then(|| ApiError::sandbox_not_found(self.id.as_str()))
    }

    /// The request as the sandbox's server should see it. `mask` is the host that it is to see.
    fn address(&self, request: Request<Incoming>, mask: Option<&str>) -> Request<Incoming> {
        let upgrade = upgrade::wanted(&request, self.port);
        let (mut parts, body) = request.into_parts();
        headers::clean_request(&mut parts.headers);
        if let Some(protocol) = upgrade {
            upgrade::announce(&mut parts.headers, protocol);
        }
        let mask = mask.and_then(|mask| HeaderValue::from_str(mask).ok());
        if let Some(host) = mask.or_else(|| host_of(&parts.uri)) {
            // A target that says where it goes overrides the header (RFC 9112, 3.2.2; RFC 9113, 8.3.1).
            parts.headers.insert(HOST, host);
        } else if !parts.headers.contains_key(HOST)
            && let Ok(host) = format!("{}-{}", self.port, self.id).try_into()
        {
            // An HTTP/1.0 client may send no host; an HTTP/1.1 server demands one.
            parts.headers.insert(HOST, host);
        }
        join_cookies(&mut parts.headers);
        // A target in absolute form is for proxies; the server behind gets the path.
        if let Some(path) = parts.uri.path_and_query().cloned() {
            parts.uri = Uri::from(path);
        }
        Request::from_parts(parts, body)
    }
}

/// The host that a target names, without what may stand before it.
fn host_of(uri: &Uri) -> Option<HeaderValue> {
    let authority = uri.authority()?.as_str();
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    HeaderValue::from_str(host).ok()
}

/// HTTP/2 may split cookies into fields, HTTP/1.1 may not (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let mut cookies = headers.get_all(COOKIE).iter();
    let (Some(first), Some(second)) = (cookies.next(), cookies.next()) else { return };
    let rest = std::iter::once(second).chain(cookies);
    let mut joined = first.as_bytes().to_vec();
    for cookie in rest {
        joined.extend_from_slice(b"; ");
        joined.extend_from_slice(cookie.as_bytes());
    }
    if let Ok(joined) = HeaderValue::from_bytes(&joined) {
        headers.insert(COOKIE, joined);
    }
}

/// Whether a path means a route of envd that clients may not use, however it is written.
pub fn is_internal(path: &str) -> bool {
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

    #[test]
    fn cookies_are_one_field_and_the_target_names_the_host() {
        let mut headers = HeaderMap::new();
        for cookie in ["a=1", "b=2", "c=3"] {
            headers.append(COOKIE, HeaderValue::from_static(cookie));
        }
        join_cookies(&mut headers);
        assert_eq!(headers.get_all(COOKIE).iter().collect::<Vec<_>>(), ["a=1; b=2; c=3"]);
        let host = |uri: &str| host_of(&uri.parse().unwrap());
        assert_eq!(host("http://user:pass@8000-x.any:9/a"), Some("8000-x.any:9".parse().unwrap()));
        assert_eq!(host("/a"), None);
    }
}
