//! One HTTP/1.1 connection: a stream and a router in, requests answered until it closes.
//!
//! Called by the gateway and by the loopback listeners. Refuses a request head over
//! [`HEAD_BYTES_MAX`] and a connection that idles over [`IDLE_SECONDS_MAX`].

use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Request, Router};

/// Longest request line and headers together.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;

/// How long a connection may wait for its next request. Longer than any proxy in front of it
/// keeps one, so that it is the proxy that closes and no request meets a closing connection.
pub const IDLE_SECONDS_MAX: u64 = 640;

/// Serves one connection to its end.
///
/// # Errors
/// What broke it off. A client that closes early is one of the ways.
pub async fn serve<S>(stream: S, router: Arc<Router>) -> Result<(), hyper::Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let service = service_fn(move |request: Request| {
        let router = Arc::clone(&router);
        async move { Ok::<_, std::convert::Infallible>(router.answer(request).await) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(IDLE_SECONDS_MAX))
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .await
}
