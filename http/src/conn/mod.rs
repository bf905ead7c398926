//! One client connection, from accept to close.
//!
//! Called by [`crate::serve`] for every connection. Finds out what the client speaks, drives hyper,
//! keeps the deadlines that hyper's timers cannot (they want to be `Send`), and answers where hyper
//! would only hang up. Refuses to know what a request means.
//!
//! ```text
//!  stream   first bytes: TLS or not, HTTP/1 or HTTP/2
//!   ├ h1    one request after another ── 101 ──▶ splice: bytes both ways
//!   │  ╰─ nothing happens ─▶ silent ─ a request ─▶ h1
//!   └ h2    up to a hundred at a time
//! ```

mod h1;
mod h2;
mod io;
mod phase;
mod silent;
mod splice;
mod stream;

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use futures_lite::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, FutureExt};
use futures_util::FutureExt as _;
use hyper::body::Incoming;
use hyper::{Request, Response};

use mica_shards::rt::net::TcpStream;
use mica_shards::rt::{self, time};

use crate::body::Body;
use crate::config::Limits;
use crate::error::ApiError;
use crate::proxy::Switch;
use crate::serve::Entry;
pub use io::Adapted;
pub use phase::InService;
use phase::Phase;
pub use stream::{Accepts, UnderTls};
use stream::{ClientStream, Protocol, Unserved};

/// What a client may still send after an error before its bytes are answered with a reset, which
/// would destroy the answer on its way.
const LINGER_BYTES_MAX: usize = 1 << 20;
const LINGER_TIME: Duration = Duration::from_secs(1);

/// What every request of a connection is given to. The second argument is where an answer of `101`
/// leaves what the connection goes on as; a protocol without such an answer gives none.
pub trait Answer: Fn(Request<Incoming>, Option<Rc<Switch>>) -> Self::Answering + 'static {
    /// The answer on its way.
    type Answering: Future<Output = Response<Body>> + 'static;
}

impl<A, F> Answer for A
where
    A: Fn(Request<Incoming>, Option<Rc<Switch>>) -> F + 'static,
    F: Future<Output = Response<Body>> + 'static,
{
    type Answering = F;
}

/// Runs what hyper's HTTP/2 wants to run beside a connection.
#[derive(Clone, Copy, Debug)]
pub struct OnShard;

impl<F> hyper::rt::Executor<F> for OnShard
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        rt::spawn(future).detach();
    }
}

/// Serves a connection until it closes, answering each request with `answer`.
pub async fn drive(
    mut stream: TcpStream,
    accepts: &Accepts,
    limits: &Limits,
    stop: &Entry,
    answer: impl Answer,
) {
    let phase = Phase::new();
    let mut early = Vec::new();
    let sniffed = stream::sniff(&mut stream, &mut early);
    match before_requests(sniffed, limits.head_timeout, stop).await {
        Some(Ok(())) => {}
        Some(Err(error)) => return tracing::debug!(%error, "connection ended"),
        // Too slow, or the shard stops. One that was silent is not owed a word.
        None if early.is_empty() => return,
        None => return Box::pin(hang_up(stream, Some(ApiError::head_too_slow()))).await,
    }
    // What is rare or short has a box of its own: a connection at rest keeps only what it needs.
    let unwrapped = Box::pin(stream::unwrap(stream, early, accepts));
    match before_requests(unwrapped, limits.head_timeout, stop).await {
        Some(Ok((stream, protocol))) => {
            let answer = marked(&stream, answer);
            match protocol {
                Protocol::H1 => h1::drive(stream, phase, limits, stop, answer).await,
                Protocol::H2 => h2::drive(stream, phase, limits, stop, answer).await,
            }
        }
        Some(Err(Unserved::Broken(error))) => tracing::debug!(%error, "no TLS"),
        Some(Err(Unserved::InTheClear(stream))) => {
            Box::pin(hang_up(stream, Some(ApiError::in_the_clear()))).await;
        }
        None => tracing::debug!("a TLS handshake did not end in time"),
    }
}

/// The same answers, to requests that say whether they came under TLS.
fn marked(stream: &ClientStream, answer: impl Answer) -> impl Answer {
    let is_tls = stream.is_tls();
    move |mut request: Request<Incoming>, switch| {
        if is_tls {
            request.extensions_mut().insert(UnderTls);
        }
        answer(request, switch)
    }
}

/// What comes before the first request, within the time that its head has. `None`: it did not end in
/// time, or the shard stops.
async fn before_requests<T>(
    work: impl Future<Output = T>,
    time: Duration,
    stop: &Entry,
) -> Option<T> {
    let work = async { Some(work.await) };
    let over = async {
        time::sleep(time).await;
        None
    };
    let stopped = async {
        stop.stopped().await;
        None
    };
    work.or(over).or(stopped).await
}

enum Turn {
    Ended(Result<(), hyper::Error>),
    Time,
    Stopping,
}

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

/// An answer on its way, in a box: hyper keeps the room for one as long as a connection lives.
type Serving<'a> = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + 'a>>;

/// An answer that counts as one until its last byte has left.
fn serve<'a>(
    answering: impl Future<Output = Response<Body>> + 'a,
    serving: InService,
) -> Serving<'a> {
    // Not an async block: that has room for what it captures and for what it awaits, which is the same.
    Box::pin(answering.map(|response| Ok(response.map(|body| body.until_dropped(serving)))))
}

/// Says why, if it was not said, and closes so that the client can still read it.
pub async fn hang_up(mut stream: impl AsyncRead + AsyncWrite + Unpin, error: Option<ApiError>) {
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
