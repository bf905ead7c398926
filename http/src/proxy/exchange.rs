//! One request and one answer on a stream of their own.
//!
//! Called by [`super`]. gRPC is spoken as HTTP/2 with prior knowledge, because its servers understand
//! nothing else; everything else as HTTP/1.1. Neither side's body is held beyond a frame. Refuses an
//! answer that leaves HTTP when nobody asked for it.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::client::conn::{http1, http2};
use hyper::header::UPGRADE;
use hyper::{Request, Response, Version};
use mica_shards::GuestStream;
use mica_shards::rt::{self, Task};

use super::repeat::{Heard, Listening, Upload};
use super::streams::Open;
use super::upgrade::{self, Switch, Tunnel};
use super::{grpc, headers};
use crate::body::Body;
use crate::conn::{Adapted, OnShard};

/// Header fields of an answer from a sandbox.
const RESPONSE_FIELDS_MAX: usize = 200;
/// Bytes of the head of such an answer, and of what is read ahead of its body.
const RESPONSE_BUFFER_BYTES_MAX: usize = 128 * 1024;
/// The same for an answer over HTTP/2.
const RESPONSE_HEAD_BYTES_MAX: u32 = 64 * 1024;
const WINDOW_BYTES: u32 = 256 * 1024;
const SEND_BUFFER_BYTES_MAX: usize = 64 * 1024;

/// Why there was no answer.
pub struct Failure {
    /// What broke.
    pub error: Broken,
    /// Whether the sandbox said anything.
    pub heard: bool,
    /// The request, if no byte of it was sent.
    pub unsent: Option<Box<Request<Upload>>>,
}

/// What can break.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The exchange.
    #[error(transparent)]
    Exchange(#[from] hyper::Error),
    /// The sandbox left HTTP by itself.
    #[error("the sandbox switched to a protocol that nobody asked for")]
    Switched,
}

impl Failure {
    fn new(error: impl Into<Broken>, heard: &Heard) -> Self {
        Self { error: error.into(), heard: heard.get(), unsent: None }
    }

    fn sending(
        mut error: hyper::client::conn::TrySendError<Request<Upload>>,
        heard: &Heard,
    ) -> Self {
        let unsent = error.take_message().map(Box::new);
        Self { unsent, ..Self::new(error.into_error(), heard) }
    }
}

/// A stream that waits for its request.
pub struct Line {
    /// The stream.
    pub stream: GuestStream,
    /// Its count.
    pub open: Open,
}

/// Sends the request and waits for the head of the answer. An answer that leaves HTTP is left at
/// `switch`, if the request asked for one.
pub async fn exchange(
    line: Line,
    request: Request<Upload>,
    switch: Option<&Switch>,
) -> Result<Response<Body>, Failure> {
    if grpc::is_call(&request) {
        return Box::pin(over_h2(line, grpc::for_sandbox(request))).await;
    }
    over_h1(line, request, switch).await
}

async fn over_h1(
    line: Line,
    mut request: Request<Upload>,
    switch: Option<&Switch>,
) -> Result<Response<Body>, Failure> {
    *request.version_mut() = Version::HTTP_11;
    let heard = Heard::default();
    let (mut sender, mut connection) = http1::Builder::new()
        .max_headers(RESPONSE_FIELDS_MAX)
        .max_buf_size(RESPONSE_BUFFER_BYTES_MAX)
        .handshake(Adapted(Listening::new(line.stream, Rc::clone(&heard))))
        .await
        .map_err(|error| Failure::new(error, &heard))?;
    // Until it is done with HTTP: the stream may go on as something else.
    let upstream = Upstream::new(rt::spawn(async move {
        if let Err(error) = (&mut connection).await {
            tracing::debug!(%error, "stream into a sandbox ended");
            return None;
        }
        let parts = connection.into_parts();
        Some((parts.io.0.into_stream(), parts.read_buf))
    }));
    let asked = request.headers().contains_key(UPGRADE);
    let mut response =
        sender.try_send_request(request).await.map_err(|error| Failure::sending(error, &heard))?;
    let protocol = response.headers().get(UPGRADE).cloned();
    headers::clean_response(response.headers_mut());
    *response.version_mut() = Version::HTTP_11;
    if !upgrade::is_switch(response.status()) {
        return Ok(response.map(|body| FromSandbox::body(body, upstream, line.open)));
    }
    let (Some(switch), Some(protocol), true) = (switch, protocol, asked) else {
        return Err(Failure::new(Broken::Switched, &heard));
    };
    let Some((guest, early)) = upstream.finish().await else {
        return Err(Failure::new(Broken::Switched, &heard));
    };
    upgrade::announce(response.headers_mut(), protocol);
    switch.put(Tunnel { guest, early: early.to_vec(), _open: line.open });
    Ok(response.map(|_| Body::empty()))
}

async fn over_h2(line: Line, request: Request<Upload>) -> Result<Response<Body>, Failure> {
    let heard = Heard::default();
    let (mut sender, connection) = http2::Builder::new(OnShard)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES_MAX)
        .max_header_list_size(RESPONSE_HEAD_BYTES_MAX)
        .handshake(Adapted(Listening::new(line.stream, Rc::clone(&heard))))
        .await
        .map_err(|error| Failure::new(error, &heard))?;
    let upstream = Upstream::new(rt::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "stream into a sandbox ended");
        }
        None
    }));
    let mut response =
        sender.try_send_request(request).await.map_err(|error| Failure::sending(error, &heard))?;
    headers::clean_response(response.headers_mut());
    Ok(response.map(|body| FromSandbox::body(body, upstream, line.open)))
}

/// What is left of a stream that hyper is done with.
type Left = Option<(GuestStream, Bytes)>;

/// The task that drives a stream into a guest. Dropping this drops the stream.
#[derive(Debug)]
struct Upstream(Option<Task<Left>>);

impl Upstream {
    fn new(task: Task<Left>) -> Self {
        Self(Some(task))
    }

    /// Waits until hyper is done with the stream.
    async fn finish(mut self) -> Left {
        self.0.take()?.join().await?
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.cancel();
        }
    }
}

/// The body of a sandbox's answer.
#[derive(Debug)]
pub struct FromSandbox {
    body: Incoming,
    _upstream: Upstream,
    _open: Open,
}

impl FromSandbox {
    fn body(body: Incoming, upstream: Upstream, open: Open) -> Body {
        Body::sandbox(Self { body, _upstream: upstream, _open: open })
    }
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
