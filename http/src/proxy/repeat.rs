//! What it takes to send a request a second time.
//!
//! Called by [`super`] for every request. Refuses to keep a body: a request that has one is sent
//! once, unless not even its head was.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_lite::{AsyncRead, AsyncWrite};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::{Method, Request};
use mica_shards::GuestStream;

/// Whether a request may be sent a second time when nobody knows what came of the first.
pub fn is_repeatable<B: HttpBody>(request: &Request<B>) -> bool {
    let idempotent = matches!(
        *request.method(),
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE
    );
    idempotent && request.body().is_end_stream()
}

/// The same request once more, if repeating it is safe and takes no body. Methods are the ones that
/// RFC 9110, 9.2.2 lets a client repeat by itself.
pub fn prepare(request: &Request<Upload>) -> Option<Request<Upload>> {
    if !is_repeatable(request) {
        return None;
    }
    let mut again = Request::new(Upload::Nothing);
    request.method().clone_into(again.method_mut());
    request.uri().clone_into(again.uri_mut());
    request.headers().clone_into(again.headers_mut());
    *again.version_mut() = request.version();
    Some(again)
}

/// The body of a request on its way into a sandbox.
#[derive(Debug)]
pub enum Upload {
    /// As the client sends it.
    Client(Incoming),
    /// None.
    Nothing,
}

impl HttpBody for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Client(body) => Pin::new(body).poll_frame(cx),
            Self::Nothing => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Client(body) => body.is_end_stream(),
            Self::Nothing => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Client(body) => body.size_hint(),
            Self::Nothing => SizeHint::with_exact(0),
        }
    }
}

/// Whether a byte came out of a stream.
pub type Heard = Rc<Cell<bool>>;

/// A stream into a guest that notes when it hears something.
#[derive(Debug)]
pub struct Listening {
    stream: GuestStream,
    heard: Heard,
}

impl Listening {
    /// Notes in `heard`.
    pub fn new(stream: GuestStream, heard: Heard) -> Self {
        Self { stream, heard }
    }
}

impl AsyncRead for Listening {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if count > 0 {
            self.heard.set(true);
        }
        Poll::Ready(Ok(count))
    }
}

impl AsyncWrite for Listening {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_idempotent_and_has_no_body_is_repeated() {
        let request = |method: &str| {
            let request = Request::builder().method(method).uri("/x?y").header("a", "b");
            request.body(Upload::Nothing).unwrap()
        };
        for method in ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"] {
            let again = prepare(&request(method)).expect(method);
            assert_eq!(
                (again.method().as_str(), again.uri().to_string().as_str()),
                (method, "/x?y")
            );
            assert_eq!(again.headers()["a"], "b");
        }
        for method in ["POST", "PATCH", "CONNECT", "BREW"] {
            assert!(prepare(&request(method)).is_none(), "{method}");
        }
    }
}
