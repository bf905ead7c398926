//! A byte stream into a guest.
//!
//! Called by the proxy of `http`. Refuses nothing after the verdict: what flows is the guest's, and
//! hostile.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_lite::{AsyncRead, AsyncWrite};
use mica_numa::rt::net::UnixStream;

/// What a stream is good for: as long as its sandbox takes streams without a break. A pause, a rollback and
/// a resume begin another, even where the old streams would live on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Epoch(u64);

impl Epoch {
    pub(crate) fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// A connection to a port of a guest, past its verdict. Dropping it closes both directions.
#[derive(Debug)]
pub struct GuestStream {
    pub(crate) stream: UnixStream,
    pub(crate) mask: Option<String>,
    pub(crate) epoch: Epoch,
    pub(crate) kept: bool,
}

impl GuestStream {
    /// What the server behind it is to see as `Host`, if that is not what the client wrote.
    #[must_use]
    pub fn masked_host(&self) -> Option<&str> {
        self.mask.as_deref()
    }

    /// Whether it was used before the visit that it is for.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.kept
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for GuestStream {
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
