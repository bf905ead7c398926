//! A request on its way into a sandbox, as HTTP/1.1.
//!
//! Called by [`super::exchange`]. Frames the body anew, whatever its framing was. Holds a piece of it at
//! most, and reads no other before that is sent. Refuses a body that is not as long as it said.

use std::io::{self, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_lite::AsyncWrite;
use hyper::HeaderMap;
use hyper::body::{Body as HttpBody, Frame};
use hyper::header::{
    CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderName, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING,
};
use hyper::http::request::Parts;

use super::repeat::Upload;

/// Pieces of the body below this are sent together with what stands before them.
const TOGETHER_BYTES_MAX: usize = 16 * 1024;

/// Fields that mean something else behind a body than before it (RFC 9110, 6.5.1).
const NO_TRAILERS: [HeaderName; 7] =
    [CONTENT_LENGTH, CONTENT_TYPE, HOST, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING];

/// Why a request was not sent to its end.
#[derive(Debug, thiserror::Error)]
pub enum Unsent {
    /// The client's body broke off.
    #[error("the client's body broke off")]
    Client(#[source] hyper::Error),
    /// It is longer or shorter than it said.
    #[error("the client's body is not as long as it said")]
    Length,
    /// The stream takes no more.
    #[error(transparent)]
    Stream(#[from] io::Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Coding {
    Nothing,
    /// So many bytes are left to be read.
    Length(u64),
    Chunked,
}

/// The request.
#[derive(Debug)]
pub struct Outgoing {
    body: Upload,
    coding: Coding,
    /// Which fields the head says come behind the body.
    trailers: Option<String>,
    /// What is to be sent first, and how much of it was.
    front: Vec<u8>,
    sent: usize,
    /// What is sent then, where it would be a waste to copy it.
    piece: Bytes,
    /// Whether the body has been read to its end.
    is_read: bool,
    touched: bool,
}

impl Outgoing {
    /// A request of which nothing is sent.
    #[must_use]
    pub fn new(parts: &Parts, body: Upload) -> Self {
        let coding = match (body.is_end_stream(), body.size_hint().exact()) {
            (true, _) => Coding::Nothing,
            (false, Some(length)) => Coding::Length(length),
            (false, None) => Coding::Chunked,
        };
        let named = parts.headers.get_all(TRAILER).iter().filter_map(|value| value.to_str().ok());
        let named = named.collect::<Vec<_>>().join(",").to_ascii_lowercase();
        let trailers = (coding == Coding::Chunked && !named.is_empty()).then_some(named);
        Self {
            is_read: coding == Coding::Nothing,
            front: head(parts, coding),
            body,
            coding,
            trailers,
            sent: 0,
            piece: Bytes::new(),
            touched: false,
        }
    }

    /// The body, if nobody can have seen anything of the request.
    #[must_use]
    pub fn untouched(self) -> Option<Upload> {
        (!self.touched).then_some(self.body)
    }

    /// Sends what can be sent. Ready when all is.
    ///
    /// # Errors
    /// See [`Unsent`].
    pub fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<Result<(), Unsent>> {
        loop {
            self.fill(cx)?;
            if self.sent < self.front.len() {
                let count =
                    ready!(Pin::new(&mut *stream).poll_write(cx, &self.front[self.sent..]))?;
                self.sent += taken(count)?;
                self.touched = true;
                if self.sent == self.front.len() {
                    // Its memory too: a body may come slowly.
                    (self.front, self.sent) = (Vec::new(), 0);
                }
            } else if !self.piece.is_empty() {
                let count = ready!(Pin::new(&mut *stream).poll_write(cx, &self.piece))?;
                let _sent = self.piece.split_to(taken(count)?);
                if self.piece.is_empty() {
                    self.piece = Bytes::new();
                    self.end_chunk();
                }
            } else if self.is_read {
                return Poll::Ready(Ok(()));
            } else {
                return Poll::Pending;
            }
        }
    }

    /// Reads from the body while there is room.
    fn fill(&mut self, cx: &mut Context<'_>) -> Result<(), Unsent> {
        while !self.is_read && self.piece.is_empty() && self.front.len() < TOGETHER_BYTES_MAX {
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(frame)) => {
                    self.touched = true;
                    self.add(frame.map_err(Unsent::Client)?)?;
                }
                Poll::Ready(None) => self.end(None)?,
            }
        }
        Ok(())
    }

    fn add(&mut self, frame: Frame<Bytes>) -> Result<(), Unsent> {
        let data = match frame.into_data() {
            Ok(data) => data,
            Err(frame) => return self.end(frame.trailers_ref()),
        };
        if data.is_empty() {
            return Ok(());
        }
        match &mut self.coding {
            Coding::Nothing => return Err(Unsent::Length),
            Coding::Length(left) => {
                let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
                *left = left.checked_sub(length).ok_or(Unsent::Length)?;
            }
            Coding::Chunked => write!(self.front, "{:x}\r\n", data.len())?,
        }
        if data.len() < TOGETHER_BYTES_MAX {
            self.front.extend_from_slice(&data);
            self.end_chunk();
        } else {
            self.piece = data;
        }
        Ok(())
    }

    fn end_chunk(&mut self) {
        if self.coding == Coding::Chunked {
            self.front.extend_from_slice(b"\r\n");
        }
    }

    fn end(&mut self, trailers: Option<&HeaderMap>) -> Result<(), Unsent> {
        self.is_read = true;
        match self.coding {
            Coding::Length(left) if left > 0 => return Err(Unsent::Length),
            Coding::Length(_) | Coding::Nothing => {}
            Coding::Chunked => {
                self.front.extend_from_slice(b"0\r\n");
                let named = self.trailers.take().unwrap_or_default();
                let is_named = |name: &HeaderName| {
                    named.split(',').any(|one| one.trim() == name.as_str())
                        && !NO_TRAILERS.contains(name)
                };
                for (name, value) in trailers.into_iter().flatten() {
                    if is_named(name) {
                        field(&mut self.front, name, value.as_bytes());
                    }
                }
                self.front.extend_from_slice(b"\r\n");
            }
        }
        Ok(())
    }
}

fn taken(count: usize) -> io::Result<usize> {
    if count == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(count) }
}

fn field(to: &mut Vec<u8>, name: &HeaderName, value: &[u8]) {
    to.extend_from_slice(name.as_str().as_bytes());
    to.extend_from_slice(b": ");
    to.extend_from_slice(value);
    to.extend_from_slice(b"\r\n");
}

fn head(parts: &Parts, coding: Coding) -> Vec<u8> {
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let fields = parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4);
    let mut head = Vec::with_capacity(path.len() + 64 + fields.sum::<usize>());
    head.extend_from_slice(parts.method.as_str().as_bytes());
    head.push(b' ');
    head.extend_from_slice(path.as_bytes());
    head.extend_from_slice(b" HTTP/1.1\r\n");
    for (name, value) in &parts.headers {
        if *name != CONTENT_LENGTH && *name != TRANSFER_ENCODING {
            field(&mut head, name, value.as_bytes());
        }
    }
    match coding {
        Coding::Length(length) => {
            field(&mut head, &CONTENT_LENGTH, length.to_string().as_bytes());
        }
        Coding::Chunked => field(&mut head, &TRANSFER_ENCODING, b"chunked"),
        // Some servers want to hear of a body that is empty.
        Coding::Nothing if parts.headers.contains_key(CONTENT_LENGTH) => {
            field(&mut head, &CONTENT_LENGTH, b"0");
        }
        Coding::Nothing => {}
    }
    head.extend_from_slice(b"\r\n");
    head
}
