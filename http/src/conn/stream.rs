//! A client's bytes, in the clear or under TLS, and which protocol they are.
//!
//! Called by [`super`] for every accepted connection before anything is parsed. One port serves all:
//! the first byte tells TLS, the first 24 tell HTTP/2 with prior knowledge. Refuses a handshake that
//! takes longer than a request head may.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_lite::{AsyncRead, AsyncWrite};
use futures_rustls::TlsAcceptor;
use futures_rustls::server::TlsStream;
use mica_shards::rt::net::TcpStream;
use rustls::ServerConfig;

use crate::config::ALPN_H2;

/// The type of the record that begins every TLS connection. No HTTP method begins with this byte.
const TLS_HANDSHAKE: u8 = 0x16;

/// What a client that knows HTTP/2 is spoken here says first (RFC 9113, 3.4).
const H2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Most bytes that are looked at before it is known whose they are.
const SNIFF_BYTES: usize = 1024;

/// What a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1, or nothing known: the same parser says what is wrong.
    H1,
    /// HTTP/2.
    H2,
}

/// Which connections a listener takes.
#[derive(Clone, Debug)]
pub enum Accepts {
    /// In the clear, and under TLS if it is configured.
    Both(Option<Arc<ServerConfig>>),
    /// Under TLS alone.
    TlsOnly(Arc<ServerConfig>),
}

/// Bytes that were read too early, and then the rest.
#[derive(Debug)]
pub struct Rewound {
    early: Vec<u8>,
    stream: TcpStream,
}

/// A client's connection.
#[derive(Debug)]
pub enum ClientStream {
    /// In the clear.
    Plain(Rewound),
    /// Under TLS.
    Tls(Box<TlsStream<Rewound>>),
}

/// Why a connection does not get as far as its first request.
#[derive(Debug)]
pub enum Unserved {
    /// It broke, or it is TLS that is none. There is nobody to tell.
    Broken(io::Error),
    /// It is not TLS, and has to be.
    InTheClear(ClientStream),
}

/// Marks the requests that came under TLS of this host's own.
#[derive(Clone, Copy, Debug)]
pub struct UnderTls;

impl ClientStream {
    /// Whether the client's bytes came under TLS.
    pub fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }
}

impl From<TcpStream> for ClientStream {
    fn from(stream: TcpStream) -> Self {
        Self::Plain(Rewound { early: Vec::new(), stream })
    }
}

/// Reads as much as it takes to know what a client speaks. What was read is in `early`, also when
/// this is dropped.
pub async fn sniff(stream: &mut TcpStream, early: &mut Vec<u8>) -> io::Result<()> {
    poll_fn(|cx| {
        loop {
            // On the stack of one poll, so that a client that waits costs nothing.
            let mut piece = [0; SNIFF_BYTES];
            let count = ready!(Pin::new(&mut *stream).poll_read(cx, &mut piece))?;
            early.extend_from_slice(&piece[..count]);
            let undecided = early.len() < H2_PREFACE.len() && H2_PREFACE.starts_with(early);
            if count == 0 || !undecided {
                return Poll::Ready(Ok(()));
            }
        }
    })
    .await
}

/// Turns an accepted connection into what hyper reads.
pub async fn unwrap(
    stream: TcpStream,
    early: Vec<u8>,
    accepts: &Accepts,
) -> Result<(ClientStream, Protocol), Unserved> {
    let is_tls = early.first() == Some(&TLS_HANDSHAKE);
    let is_h2 = early.starts_with(H2_PREFACE);
    let stream = Rewound { early, stream };
    let config = match accepts {
        Accepts::Both(Some(config)) | Accepts::TlsOnly(config) if is_tls => Arc::clone(config),
        Accepts::TlsOnly(_) => return Err(Unserved::InTheClear(ClientStream::Plain(stream))),
        Accepts::Both(_) => {
            let protocol = if is_h2 { Protocol::H2 } else { Protocol::H1 };
            return Ok((ClientStream::Plain(stream), protocol));
        }
    };
    let stream = TlsAcceptor::from(config).accept(stream).await.map_err(Unserved::Broken)?;
    let agreed = stream.get_ref().1.alpn_protocol();
    let protocol = if agreed == Some(ALPN_H2) { Protocol::H2 } else { Protocol::H1 };
    Ok((ClientStream::Tls(Box::new(stream)), protocol))
}

impl AsyncRead for Rewound {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if self.early.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let count = self.early.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.early[..count]);
        if count == self.early.len() {
            // Its memory too: it is not needed again in the connection's life.
            self.early = Vec::new();
        } else {
            self.early.drain(..count);
        }
        Poll::Ready(Ok(count))
    }
}

impl AsyncWrite for Rewound {
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

impl AsyncRead for ClientStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_close(cx),
            Self::Tls(stream) => Pin::new(stream).poll_close(cx),
        }
    }
}
