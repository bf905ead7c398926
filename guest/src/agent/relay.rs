//! Bytes to and from a TCP port of the guest.
//!
//! Called by the gateway for every port that is not one of ours. Refuses to buffer more than a
//! fixed amount each way: a side that does not read holds the other back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use mica_units::GuestPort;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// Bytes in flight each way.
const BUFFER_BYTES: usize = 64 * 1024;

/// Connects to whoever listens on the port, on either family's loopback.
pub async fn connect(port: GuestPort) -> Option<TcpStream> {
    for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        if let Ok(stream) = TcpStream::connect(SocketAddr::new(ip, port.get())).await {
            // Interactive traffic goes through here; a failure only costs latency.
            drop(stream.set_nodelay(true));
            return Some(stream);
        }
    }
    None
}

/// Copies both ways until both are done. One that finishes first closes its direction only.
///
/// # Errors
/// When either side breaks off.
pub async fn relay<S>(mut host: S, mut tcp: TcpStream) -> std::io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    tokio::io::copy_bidirectional_with_sizes(&mut host, &mut tcp, BUFFER_BYTES, BUFFER_BYTES)
        .await
        .map(|_| ())
}
