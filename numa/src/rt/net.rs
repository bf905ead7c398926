//! Sockets of a shard.
//!
//! Called by the HTTP front end (TCP) and by `shards` (streams into guests, control sockets).
//! Refuses blocking calls. Every descriptor made here is close-on-exec.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_lite::{AsyncRead, AsyncWrite};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

/// Connections that the kernel completes ahead of `accept`, for each listener.
const BACKLOG: i32 = 1024;

/// A listening TCP socket. Every shard binds its own to the same address (`SO_REUSEPORT`), and the
/// kernel spreads connections among them.
///
/// glommio's listener is not used: it accepts without close-on-exec, and a VM process must not
/// inherit a client's connection.
#[derive(Debug)]
pub struct TcpListener(OwnedFd);

impl TcpListener {
    /// Binds and listens.
    ///
    /// # Errors
    /// When the address is taken by another user or program, or is not of this machine.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
        // Without REUSEADDR a restart fails while old connections are in TIME_WAIT.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        sockopt::set_socket_reuseport(&socket, true)?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Self(socket))
    }

    /// Waits for the next connection. `TCP_NODELAY` is on.
    ///
    /// # Errors
    /// When the process has no descriptor left, or the connection broke before it was taken.
    pub async fn accept(&self) -> io::Result<TcpStream> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            match rustix::net::accept_with(&self.0, flags) {
                Ok(connection) => {
                    sockopt::set_tcp_nodelay(&connection, true)?;
                    return Ok(TcpStream::from_fd(connection));
                }
                Err(Errno::AGAIN) => super::ready::connecting(&self.0).await?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The address it listens on, with the port the kernel chose if 0 was asked for.
    ///
    /// # Errors
    /// Only what `getsockname` can fail with.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        let address = rustix::net::getsockname(&self.0)?;
        SocketAddr::try_from(address).map_err(io::Error::from)
    }
}

/// Lets other tasks run when this one has had its share of time.
///
/// A socket whose other end is fast enough is always ready, and a task that only reads from it would
/// never end its turn: one guest could hold up a shard.
#[derive(Debug, Default)]
struct Turn {
    given_up: bool,
}

impl Turn {
    fn poll(&mut self, cx: &Context<'_>) -> Poll<()> {
        if !self.given_up && glommio::executor().need_preempt() {
            self.given_up = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.given_up = false;
        Poll::Ready(())
    }
}

macro_rules! stream_type {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name {
            inner: $inner,
            turn: Turn,
        }

        impl $name {
            fn over(inner: $inner) -> Self {
                Self { inner, turn: Turn::default() }
            }
        }

        impl AsyncRead for $name {
            fn poll_read(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buffer: &mut [u8],
            ) -> Poll<io::Result<usize>> {
                ready!(self.turn.poll(cx));
                Pin::new(&mut self.inner).poll_read(cx, buffer)
            }
        }

        impl AsyncWrite for $name {
            fn poll_write(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                ready!(self.turn.poll(cx));
                Pin::new(&mut self.inner).poll_write(cx, bytes)
            }

            fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.inner).poll_flush(cx)
            }

            fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.inner).poll_close(cx)
            }
        }
    };
}

stream_type! {
    /// A TCP connection. Closing it (`poll_close`) ends the writing direction only.
    TcpStream, glommio::net::TcpStream
}

stream_type! {
    /// A connected Unix socket, stream or seqpacket: on a seqpacket socket one read is one packet.
    UnixStream, glommio::net::UnixStream
}

impl TcpStream {
    /// Connects to `address`.
    ///
    /// # Errors
    /// When nothing listens there or the network does not reach it.
    pub async fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = glommio::net::TcpStream::connect(address).await.map_err(io::Error::from)?;
        stream.set_nodelay(true).map_err(io::Error::from)?;
        Ok(Self::over(stream))
    }

    /// Takes over a connected socket, from another shard for instance.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self::over(crate::sys::glommio_tcp_stream(fd))
    }
}

impl UnixStream {
    /// Takes over a connected socket.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self::over(crate::sys::glommio_unix_stream(fd))
    }
}
