//! One client connection, from accept to close.
//!
//! Called by [`crate::serve`] for every connection. Drives hyper, keeps the deadlines that hyper's
//! timers cannot (they want to be `Send`), and answers where hyper would only hang up. Refuses to
//! know what a request means.

mod io;
mod phase;

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use futures_lite::{AsyncReadExt, AsyncWriteExt, FutureExt};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};

use mica_shards::rt::net::TcpStream;
use mica_shards::rt::time;

use crate::body::Body;
use crate::config::Limits;
use crate::error::ApiError;
use crate::serve::Entry;
pub use io::Adapted;
use io::ServerIo;
pub use phase::InService;
use phase::{Overdue, Phase};

/// What a client may still send after an error before its bytes are answered with a reset, which
/// would destroy the answer on its way.
const LINGER_BYTES_MAX: usize = 1 << 20;
const LINGER_TIME: Duration = Duration::from_secs(1);

enum Turn {
    Ended(Result<(), hyper::Error>),
    Time,
    Stopping,
}

/// Serves a connection until it closes, answering each request with `answer`.
pub async fn drive<Fut>(
    stream: TcpStream,
    limits: &Limits,
    stop: &Entry,
    answer: impl Fn(Request<Incoming>) -> Fut,
) where
    Fut: Future<Output = Response<Body>>,
{
    let phase = Phase::new();
    let service = service_fn(|request| {
        let serving = phase.serve();
        let response = answer(request);
        async move { Ok::<_, Infallible>(response.await.map(|body| body.until_dropped(serving))) }
    });
    let mut connection = http1::Builder::new()
        .max_header_size(limits.head_bytes_max)
        .max_buf_size(limits.head_bytes_max.max(MAX_BUF_FLOOR))
        .max_headers(limits.head_fields_max)
        .header_read_timeout(None)
        .serve_connection(ServerIo::new(stream, Rc::clone(&phase)), service);
    let mut stopping = false;
    let error = loop {
        let wait = match phase.check(limits) {
            Ok(wait) => wait,
            Err(Overdue::Idle) => return,
            Err(Overdue::Head) => break Some(ApiError::head_too_slow()),
        };
        match turn(Pin::new(&mut connection), wait, (!stopping).then_some(stop)).await {
            Turn::Time => {}
            Turn::Stopping => {
                stopping = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
            Turn::Ended(Ok(())) => return,
            Turn::Ended(Err(error)) => {
                tracing::debug!(%error, "connection ended");
                if !error.is_parse() {
                    return;
                }
                // hyper has answered what it can name. What it cannot (an HTTP/2 preface, say) is
                // still unanswered, and the boundary still untouched.
                break phase.is_between().then(ApiError::not_http);
            }
        }
    };
    let io = connection.into_parts().io;
    let answered = io.has_substitute();
    hang_up(io.into_stream(), error.filter(|_| !answered)).await;
}

/// hyper refuses smaller buffers.
const MAX_BUF_FLOOR: usize = 8192;

async fn turn<C>(connection: C, wait: Duration, stop: Option<&Entry>) -> Turn
where
    C: Future<Output = Result<(), hyper::Error>>,
{
    let work = async { Turn::Ended(connection.await) };
    let timer = async {
        time::sleep(wait).await;
        Turn::Time
    };
    let stopped = async {
        match stop {
            Some(stop) => stop.stopped().await,
            None => std::future::pending().await,
        }
        Turn::Stopping
    };
    work.or(timer).or(stopped).await
}

/// Says why, if it was not said, and closes so that the client can still read it.
pub async fn hang_up(mut stream: TcpStream, error: Option<ApiError>) {
    let farewell = async {
        if let Some(error) = error {
            stream.write_all(&error.to_last_message()).await?;
        }
        stream.close().await?;
        let mut scratch = [0; 4096];
        let mut discarded = 0;
        while discarded < LINGER_BYTES_MAX {
            match stream.read(&mut scratch).await? {
                0 => break,
                count => discarded += count,
            }
        }
        Ok::<_, std::io::Error>(())
    };
    match time::timeout(LINGER_TIME, farewell).await {
        Ok(Ok(())) => {}
        // Both are the client's doing: it is gone, or does not close.
        Ok(Err(error)) => tracing::debug!(%error, "the last answer was not taken"),
        Err(elapsed) => tracing::debug!(%elapsed, "the client did not close"),
    }
}
