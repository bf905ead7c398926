//! Bodies: reading one with a bound, and answering with bytes or with a bounded stream.
//!
//! Called by every handler. Refuses to gather more than the caller's limit, and a stream holds at
//! most its channel's capacity in chunks: whoever writes it waits for the client.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio::sync::mpsc;

use super::HttpError;

/// The body of an answer.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// The client is gone; nothing more can be sent to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client closed the connection before the answer was complete")]
pub struct Disconnected;

/// The writing end of a streamed body. Dropping it ends the body in good order.
#[derive(Clone, Debug)]
pub struct BodySender(mpsc::Sender<Result<Bytes, std::io::Error>>);

impl BodySender {
    /// Sends one chunk, waiting while the client is behind. It is flushed as it is.
    ///
    /// # Errors
    /// [`Disconnected`] once the client has gone.
    pub async fn send(&self, chunk: impl Into<Bytes>) -> Result<(), Disconnected> {
        self.0.send(Ok(chunk.into())).await.map_err(|_| Disconnected)
    }

    /// Breaks the body off, so that the client sees a cut connection and not a complete answer.
    ///
    /// # Errors
    /// [`Disconnected`] when the client has gone already.
    pub async fn abort(self, error: std::io::Error) -> Result<(), Disconnected> {
        self.0.send(Err(error)).await.map_err(|_| Disconnected)
    }

    /// Waits until the client has gone.
    pub async fn closed(&self) {
        self.0.closed().await;
    }
}

/// A body fed by a [`BodySender`], which may be `capacity` chunks ahead of the client.
#[must_use]
pub fn channel(capacity: usize) -> (BodySender, Body) {
    let (sender, receiver) = mpsc::channel(capacity.max(1));
    (BodySender(sender), ChannelBody(receiver).boxed_unsync())
}

/// The reading end, as hyper polls it.
struct ChannelBody(mpsc::Receiver<Result<Bytes, std::io::Error>>);

impl http_body::Body for ChannelBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        self.0.poll_recv(context).map(|chunk| chunk.map(|chunk| chunk.map(Frame::data)))
    }
}

/// No body; the answer carries `Content-Length: 0`.
#[must_use]
pub fn empty() -> Body {
    full(Bytes::new())
}

/// All of the body at once.
#[must_use]
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// How much of a request is still read after it has been answered, and for how long.
const DRAIN_BYTES_MAX: usize = 64 * 1024 * 1024;
const DRAIN_TIME_MAX: Duration = Duration::from_secs(10);

/// A request's body while it is read. Dropped before its end, it is read on in the background for a
/// while: a connection that is closed with bytes unread is reset, and takes the answer with it before
/// the client has read it.
#[derive(Debug)]
pub struct RequestBody(Option<Incoming>);

impl RequestBody {
    /// Nothing of it is read yet.
    #[must_use]
    pub fn new(body: Incoming) -> Self {
        Self(Some(body))
    }

    /// The next piece; nothing after the end or an error.
    pub async fn frame(&mut self) -> Option<Result<Frame<Bytes>, hyper::Error>> {
        let frame = self.0.as_mut()?.frame().await;
        if !matches!(frame, Some(Ok(_))) {
            self.0 = None;
        }
        frame
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        let Some(mut body) = self.0.take() else { return };
        if http_body::Body::is_end_stream(&body) {
            return;
        }
        // Without a runtime the connection is over as well.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let read_on = async move {
            let mut left = DRAIN_BYTES_MAX;
            while let Some(Ok(frame)) = body.frame().await {
                left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
                if left == 0 {
                    return;
                }
            }
        };
        // Too slow is as good as too much: the connection is closed either way.
        runtime.spawn(async {
            tokio::time::timeout(DRAIN_TIME_MAX, read_on).await.unwrap_or_default();
        });
    }
}

/// Reads a request's body, at most `limit_bytes` of it.
///
/// # Errors
/// 413 when there is more, 400 when the client breaks off.
pub async fn read_bounded(body: Incoming, limit_bytes: usize) -> Result<Bytes, HttpError> {
    let mut body = RequestBody::new(body);
    let mut read = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            HttpError::bad_request(format!("cannot read the request body: {error}"))
        })?;
        let Some(data) = frame.data_ref() else { continue };
        if data.len() > limit_bytes - read.len() {
            return Err(HttpError::new(
                http::StatusCode::PAYLOAD_TOO_LARGE,
                format!("the request body is over {limit_bytes} bytes; send less"),
            ));
        }
        read.extend_from_slice(data);
    }
    Ok(read.freeze())
}
