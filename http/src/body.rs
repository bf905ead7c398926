//! Bodies of our responses, and reading the bodies of control-plane requests.
//!
//! Called by every handler and by the proxy. Refuses a request body that is too long or too slow,
//! and never holds more than a frame of a proxied one.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::HeaderMap;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::header::EXPECT;
use mica_shards::rt::time;

use crate::config::Limits;
use crate::conn::InService;
use crate::error::ApiError;
use crate::proxy::{Broken, FromSandbox};

/// What is still read and thrown away of a body that is too long, so that the client gets to read
/// the answer instead of a reset.
const DISCARD_BYTES_MAX: usize = 8 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(1);

/// The body of a response.
#[derive(Debug)]
pub struct Body {
    content: Content,
    /// Dropped with the body: the connection is then between requests.
    _serving: Option<InService>,
}

#[derive(Debug)]
enum Content {
    Full(Option<Bytes>),
    Sandbox(FromSandbox),
}

impl Body {
    /// No bytes.
    #[must_use]
    pub fn empty() -> Self {
        Self { content: Content::Full(None), _serving: None }
    }

    /// These bytes.
    #[must_use]
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        let content = Content::Full((!bytes.is_empty()).then_some(bytes));
        Self { content, _serving: None }
    }

    /// What a sandbox answers, frame by frame.
    #[must_use]
    pub fn sandbox(body: FromSandbox) -> Self {
        Self { content: Content::Sandbox(body), _serving: None }
    }

    /// Holds `serving` for as long as this body lives.
    #[must_use]
    pub fn until_dropped(self, serving: InService) -> Self {
        Self { _serving: Some(serving), ..self }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        match &mut self.content {
            Content::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Content::Sandbox(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Full(bytes) => bytes.is_none(),
            Content::Sandbox(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Full(bytes) => {
                let length = bytes.as_ref().map_or(0, Bytes::len);
                SizeHint::with_exact(u64::try_from(length).unwrap_or(u64::MAX))
            }
            Content::Sandbox(body) => body.size_hint(),
        }
    }
}

/// Reads the body of a control-plane request.
///
/// # Errors
/// 413 when it is too long, 408 when it is too slow, 400 when it ends too early.
pub async fn read(body: Incoming, limits: &Limits) -> Result<Vec<u8>, ApiError> {
    time::timeout(limits.body_timeout, collect(body, limits.body_bytes_max))
        .await
        .unwrap_or_else(|_| Err(ApiError::body_too_slow()))
}

/// Reads and drops what is left of a request that is answered without its body. A client that is
/// still writing when the connection closes reads a reset instead of the answer; and some write
/// the end of an empty body after everything else.
pub async fn discard(headers: &HeaderMap, mut body: Incoming) {
    // Reading would ask a client that waits for `100 Continue` to send what nobody wants.
    if body.is_end_stream() || headers.contains_key(EXPECT) {
        return;
    }
    let rest = async {
        let mut total = 0usize;
        while let Some(Ok(frame)) = body.frame().await {
            total = total.saturating_add(frame.data_ref().map_or(0, Bytes::len));
            if total > DISCARD_BYTES_MAX {
                break;
            }
        }
    };
    if time::timeout(DISCARD_TIME, rest).await.is_err() {
        tracing::debug!("a body that nobody wants is still coming; answering over it");
    }
}

async fn collect(mut body: Incoming, bytes_max: usize) -> Result<Vec<u8>, ApiError> {
    let mut collected = Vec::new();
    let mut total = 0usize;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            ApiError::bad_request(format!(
                "the request body cannot be read ({error}); send it whole"
            ))
        })?;
        let Some(data) = frame.data_ref() else { continue };
        total = total.saturating_add(data.len());
        if total > DISCARD_BYTES_MAX {
            break;
        }
        if total <= bytes_max {
            collected.extend_from_slice(data);
        }
    }
    if total > bytes_max { Err(ApiError::body_too_large(bytes_max)) } else { Ok(collected) }
}
