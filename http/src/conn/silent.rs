//! A connection of HTTP/1.1 on which nothing happens, without the buffers that hyper keeps for it.
//!
//! Called by [`super::h1`], which takes it from hyper after a moment of silence and gives it back when a
//! request comes. hyper holds 16 KiB for a connection as long as it lives; this holds nothing. Refuses to
//! read ahead more than a little of what a client sends behind its request.

use std::fmt::Write as _;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_lite::{AsyncRead, AsyncWrite};
use hyper::body::Frame;

use super::stream::ClientStream;
use crate::proxy::{Answering, Broken};

/// Bytes of one read, on the stack of one poll.
const READ_BYTES: usize = 1024;

/// What is read of the requests behind the one that is being answered.
const AHEAD_BYTES_MAX: usize = 8 * 1024;

/// Why an answer is not passed on to its end.
#[derive(Debug, thiserror::Error)]
pub enum Cut {
    /// The client went.
    #[error("the client went")]
    Gone,
    /// Its connection broke.
    #[error("the client's connection broke")]
    Client(#[from] io::Error),
    /// The answer broke.
    #[error(transparent)]
    Answer(#[from] Broken),
}

/// Waits until the client says something, and gives that. Nothing: it went.
pub async fn word(client: &mut ClientStream) -> io::Result<Vec<u8>> {
    poll_fn(|cx| {
        let mut piece = [0; READ_BYTES];
        let count = ready!(Pin::new(&mut *client).poll_read(cx, &mut piece))?;
        Poll::Ready(Ok(piece[..count].to_vec()))
    })
    .await
}

/// An answer whose head has left.
pub struct Rest {
    answering: Answering,
    is_chunked: bool,
    /// What the client has not taken, and how much of it it has.
    held: Vec<u8>,
    taken: usize,
    unflushed: bool,
    is_over: bool,
    /// What the client sent meanwhile.
    ahead: Vec<u8>,
}

impl Rest {
    /// What is left of an answer. `ahead`: what was read of the client behind its request.
    pub fn new(answering: Answering, ahead: Vec<u8>) -> Self {
        Self {
            is_chunked: answering.body.left().is_none(),
            answering,
            held: Vec::new(),
            taken: 0,
            unflushed: false,
            is_over: false,
            ahead,
        }
    }

    /// Passes it on to its end, and gives what the client sent meanwhile. May be dropped at any await and
    /// called again.
    pub async fn pass(&mut self, client: &mut ClientStream) -> Result<Vec<u8>, Cut> {
        poll_fn(|cx| {
            if let Poll::Ready(gone) = self.poll_ahead(cx, client) {
                return Poll::Ready(Err(gone));
            }
            ready!(self.poll_on(cx, client))?;
            Poll::Ready(Ok(std::mem::take(&mut self.ahead)))
        })
        .await
    }

    /// Reads what the client sends. Ready when it is gone: then the server has to learn it.
    fn poll_ahead(&mut self, cx: &mut Context<'_>, client: &mut ClientStream) -> Poll<Cut> {
        while self.ahead.len() < AHEAD_BYTES_MAX {
            let mut piece = [0; READ_BYTES];
            match ready!(Pin::new(&mut *client).poll_read(cx, &mut piece)) {
                Ok(0) => return Poll::Ready(Cut::Gone),
                Ok(count) => self.ahead.extend_from_slice(&piece[..count]),
                Err(error) => return Poll::Ready(error.into()),
            }
        }
        Poll::Pending
    }

    fn poll_on(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut ClientStream,
    ) -> Poll<Result<(), Cut>> {
        loop {
            while self.taken < self.held.len() {
                let held = &self.held[self.taken..];
                match ready!(Pin::new(&mut *client).poll_write(cx, held))? {
                    0 => return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into())),
                    count => self.taken += count,
                }
                self.unflushed = true;
            }
            (self.held, self.taken) = (Vec::new(), 0);
            let next = if self.is_over { Poll::Ready(None) } else { self.answering.poll(cx) };
            match next {
                Poll::Ready(Some(frame)) => self.hold(frame?),
                Poll::Ready(None) if !self.is_over => {
                    self.is_over = true;
                    if self.is_chunked {
                        self.held.extend_from_slice(b"0\r\n\r\n");
                    }
                }
                waits => {
                    if self.unflushed {
                        ready!(Pin::new(&mut *client).poll_flush(cx))?;
                        self.unflushed = false;
                    }
                    return waits.map(|_| Ok(()));
                }
            }
        }
    }

    /// Frames a piece. Fields behind the last one were not announced, so nobody waits for them.
    fn hold(&mut self, frame: Frame<Bytes>) {
        let Ok(data) = frame.into_data() else { return };
        if !self.is_chunked {
            self.held.extend_from_slice(&data);
            return;
        }
        let mut size = String::new();
        // Text takes all that is written to it.
        if write!(size, "{:x}\r\n", data.len()).is_ok() {
            self.held.extend_from_slice(size.as_bytes());
        }
        self.held.extend_from_slice(&data);
        self.held.extend_from_slice(b"\r\n");
    }
}
