//! Streams of a shard in the shape hyper wants.
//!
//! Called by the connection driver (client side, [`ServerIo`]) and by the sandbox proxy (guest side,
//! [`Adapted`]). [`ServerIo`] also gives hyper's own error heads, which have no body, the JSON body
//! that every answer of ours has. Refuses to parse a request: that is hyper's.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use super::phase::Phase;
use super::stream::ClientStream;
use crate::error::ApiError;
use crate::proxy::Switch;
use futures_lite::{AsyncRead, AsyncWrite};
use hyper::rt::{Read, ReadBufCursor, Write};

/// Most bytes of one read. Lives on the stack of one poll, so a connection at rest holds nothing.
const READ_BYTES: usize = 16 * 1024;

/// Reads what there is into `cursor`, and says how much it was.
///
/// One copy more than needed: telling hyper how much of its own buffer is filled takes an unsafe
/// call.
fn poll_fill(
    stream: &mut (impl AsyncRead + Unpin),
    cx: &mut Context<'_>,
    mut cursor: ReadBufCursor<'_>,
) -> Poll<io::Result<usize>> {
    let mut scratch = [0; READ_BYTES];
    let wanted = cursor.remaining().min(READ_BYTES);
    if wanted == 0 {
        return Poll::Ready(Ok(0));
    }
    let count = ready!(Pin::new(stream).poll_read(cx, &mut scratch[..wanted]))?;
    cursor.put_slice(&scratch[..count]);
    Poll::Ready(Ok(count))
}

/// A futures stream as hyper reads and writes it.
#[derive(Debug)]
pub struct Adapted<S>(pub S);

impl<S: AsyncRead + Unpin> Read for Adapted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        cursor: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        poll_fill(&mut self.0, cx, cursor).map_ok(drop)
    }
}

impl<S: AsyncWrite + Unpin> Write for Adapted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_close(cx)
    }
}

/// A client's connection.
#[derive(Debug)]
pub struct ServerIo {
    stream: Adapted<ClientStream>,
    /// What was read of it before.
    early: Vec<u8>,
    phase: Rc<Phase>,
    switch: Rc<Switch>,
    /// An error answer of ours that stands in for one of hyper's, and how much of it has left.
    substitute: Option<(Vec<u8>, usize)>,
}

impl ServerIo {
    /// Wraps a connection of which `early` was read already.
    #[must_use]
    pub fn new(stream: ClientStream, early: Vec<u8>, phase: Rc<Phase>, switch: Rc<Switch>) -> Self {
        Self { stream: Adapted(stream), early, phase, switch, substitute: None }
    }

    /// Gives the connection back.
    #[must_use]
    pub fn into_stream(self) -> ClientStream {
        self.stream.0
    }

    /// Whether an answer of ours already stands in for one of hyper's.
    #[must_use]
    pub fn has_substitute(&self) -> bool {
        self.substitute.is_some()
    }

    fn poll_substitute(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some((answer, sent)) = &mut self.substitute
            && *sent < answer.len()
        {
            let count = ready!(Pin::new(&mut self.stream).poll_write(cx, &answer[*sent..]))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            *sent += count;
        }
        Poll::Ready(Ok(()))
    }
}

impl Read for ServerIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut cursor: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.early.is_empty() {
            let count = self.early.len().min(cursor.remaining());
            cursor.put_slice(&self.early[..count]);
            self.early = self.early.split_off(count);
            self.phase.received();
            return Poll::Ready(Ok(()));
        }
        if ready!(poll_fill(&mut self.stream.0, cx, cursor))? > 0 {
            self.phase.received();
        }
        Poll::Ready(Ok(()))
    }
}

impl Write for ServerIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        // At a message boundary only hyper itself can be writing: the service has no request.
        if self.substitute.is_none()
            && self.phase.is_between()
            && let Some(error) = hyper_error(bytes)
        {
            self.substitute = Some((error.to_last_message(), 0));
        }
        if self.substitute.is_some() {
            ready!(self.poll_substitute(cx))?;
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_substitute(cx))?;
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.phase.flushed();
        if let Some(passing) = self.switch.passing() {
            passing.flushed();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_substitute(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Which error a head of hyper's own making reports. `None` for any other bytes.
fn hyper_error(bytes: &[u8]) -> Option<ApiError> {
    let status = bytes.strip_prefix(b"HTTP/1.1 ").or(bytes.strip_prefix(b"HTTP/1.0 "))?.get(..3)?;
    Some(match status {
        b"431" => ApiError::head_too_large(),
        b"414" => ApiError::uri_too_long(),
        b"400" => ApiError::not_http(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hypers_own_error_heads_are_recognised() {
        let status = |bytes: &[u8]| hyper_error(bytes).map(|error| error.status().as_u16());
        assert_eq!(status(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"), Some(400));
        assert_eq!(status(b"HTTP/1.1 431 Request Header Fields Too Large\r\n\r\n"), Some(431));
        assert_eq!(status(b"HTTP/1.1 100 Continue\r\n\r\n"), None);
        assert_eq!(status(b"HTTP/1.1 200 OK\r\n\r\n"), None);
        assert_eq!(status(b"HTTP/1.1 40"), None);
        assert_eq!(status(b""), None);
    }
}
